"""Large files stay open from one part to the next, and hide no change."""

import gc
import os
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from support.changes import (
    Change,
    overwrite,
    replace,
    replace_by_copy_keeping_folder_times,
    times_kept,
)
from support.daemon import open_in
from support.filesystems import is_on_a_local_disk
from support.reference import Reference

from tartapefs import Tape, TapePlayer, TapeRecorder
from tartapefs.play import descriptor_cache
from tartapefs.source import folder as source


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A recorded folder with large files, at depths from the root on to where none is kept open."""
    root = tmp_path / "deep"
    for depth in range(6):
        place = root.joinpath(*"abcde"[:depth])
        place.mkdir()
        (place / "file").write_bytes(random.Random(depth).randbytes((1 << 20) + 700 * depth))
    TapeRecorder(root).commit()
    return root


@pytest.mark.usefixtures("way_to_open")
def test_large_files_stay_open_while_they_are_read(deep: Path) -> None:
    """From one part to the next; not beyond the last one, nor beyond `rest`, nor where that would not be faster."""
    reference = Reference(deep)
    with Tape.discover(deep) as tape, closing(TapePlayer(tape)) as player:
        for depth in range(6):
            path = deep.joinpath(*"abcde"[:depth], "file")
            start = reference.starts[f"deep/{path.relative_to(deep)}".encode()] + 512
            for at in (start + 9999, start, start + 5, start + 600_000):
                assert player.read(at, 4096) == reference.read(at, 4096)
                assert open_in(deep) == ([str(path)] if depth < 4 and is_on_a_local_disk(deep) else [])
            size = path.stat().st_size
            assert player.read(start + 4096, size - 4096) == path.read_bytes()[4096:]
            assert open_in(deep) == []
        for depth in (2, 0, 1):
            start = reference.starts[f"deep/{'a/b/'[: 2 * depth]}file".encode()] + 512
            assert player.read(start, 700) == reference.read(start, 700)
        assert len(open_in(deep)) == 3 * is_on_a_local_disk(deep)
        player.rest()
        assert open_in(deep) == []
        assert b"".join(event.data for event in player.play()) == reference.read(0, reference.size)
        assert open_in(deep) == []
        assert player.read(start, 700) == reference.read(start, 700)
        assert len(open_in(deep)) == is_on_a_local_disk(deep)
    assert open_in(deep) == []


def test_large_files_kept_by_many_threads(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a descriptor for itself while it reads; of those of all no more stay than are kept."""
    monkeypatch.setattr(descriptor_cache, "_CAPACITY", 2)
    reference = Reference(deep)

    def read(seed: int) -> None:
        some = random.Random(seed)
        for _ in range(500):
            at, size = some.randrange(reference.size - 1024), some.randrange(1, 5000)
            assert player.read(at, size) == reference.read(at, size)[: tape.total_size - at]

    with Tape.discover(deep) as tape, closing(TapePlayer(tape)) as player:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(16)))
        assert len(open_in(deep)) <= 2
    assert open_in(deep) == []


@pytest.mark.root
@pytest.mark.needs("bindfs")
def test_no_file_stays_open_where_others_change_it(deep: Path, tmp_path: Path) -> None:
    """On a network file system, or any other that answers for itself, each read opens its file."""
    (tmp_path / "bound").mkdir()
    subprocess.run(["bindfs", deep.parent, tmp_path / "bound"], check=True)
    try:
        root = tmp_path / "bound" / "deep"
        with Tape.discover(root) as tape, closing(TapePlayer(tape)) as player:
            start = tape.find("deep/file").start + 512
            assert player.read(start, 700) == (deep / "file").read_bytes()[:700]
            assert open_in(root) == []
    finally:
        subprocess.run(["umount", tmp_path / "bound"], check=True)


def test_a_kept_file_that_is_read_short(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call may give less than it was asked for."""
    whole, content = os.preadv, (deep / "file").read_bytes()
    with Tape.discover(deep) as tape, closing(TapePlayer(tape)) as player:
        start = tape.find("deep/file").start + 512
        assert player.read(start, 1000) == content[:1000]
        assert len(open_in(deep)) == is_on_a_local_disk(deep)
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][: -(-len(views[0]) // 2)]], at))
        assert player.read(start + 5, 1000) == content[5:1005]


def test_no_way_leads_by_a_link(deep: Path) -> None:
    """Not even to the very file: nothing is kept that was opened in the instant in which a folder became a link."""
    with closing(source.Source(str(deep))) as folder:
        way = [os.fsencode(deep / below) for below in ("", "a", "a/b", "a/b/file")]
        assert [place for place, _, _ in folder.resolve(b"a/b/file")] == (way if is_on_a_local_disk(deep) else [])
        (deep / "a").rename(deep / "moved")
        (deep / "a").symlink_to("moved")
        with pytest.raises(NotADirectoryError):
            folder.resolve(b"a/b/file")


@pytest.mark.parametrize("way", [replace, replace_by_copy_keeping_folder_times], ids=lambda way: way.__name__)
def test_a_kept_file_hides_no_other(deep: Path, way: Change) -> None:
    """Where inodes do not count: what has the name now is read, or found to be another."""
    with Tape.discover(deep) as tape, closing(TapePlayer(tape, check="mtime")) as player:
        start = tape.find("deep/file").start + 512
        old = player.read(start, 1000)
        with times_kept(deep / "file"):
            way(deep / "file")
            overwrite(deep / "file", data=b"other bytes")
        assert player.read(start + 1, 999) == b"ther bytes" + (deep / "file").read_bytes()[11:1000]
        assert player.read(start, 1000) != old


@pytest.mark.usefixtures("way_to_open")
def test_no_file_stays_open(player: TapePlayer, small: Path, archive: bytes) -> None:
    """Between two reads nothing in the source is open, so an idle archive is in nobody's way."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for offset in range(0, len(archive), 700):
        player.read(offset, 1500)
        assert open_in(small) == []
    for event in player.play(chunk_size=400):
        assert event.type
        assert open_in(small) == []
    assert len(os.listdir("/proc/self/fd")) == before
