"""Folders with names and targets that do not fit into ustar, from the recording to what readers make of the archive."""

import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support import reference
from support.generations import Generations
from support.long_names import contents, fill
from support.mounting import mountpoint as mountpoint
from support.programs import TARTAPEFS, run
from support.seals import playing, seal_again, seal_of

from tartapefs import Tape, TapeConstraintError, TapeFormatError, TapePlayer, TapeRecorder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder with 1,000 names, nearly all too long."""
    root = tmp_path_factory.mktemp("long") / "data"
    root.mkdir()
    fill(root, 1000, 1)
    TapeRecorder(root, long_names=True).commit()
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> reference.Reference:
    return reference.Reference(root)


@pytest.fixture
def player(root: Path) -> Iterator[TapePlayer]:
    with playing(root) as player:
        yield player


def test_the_archive(player: TapePlayer, expected: reference.Reference) -> None:
    """All bytes, at all borders of segments, and anywhere."""
    whole = expected.read(0, expected.size)
    assert player.tape.total_size == len(whole)
    assert player.read(0, len(whole)) == whole
    assert b"".join(event.data for event in player.play()) == whole
    some = random.Random(2)
    for start in [*expected.boundaries(), *some.choices(range(len(whole)), k=500)]:
        at, size = max(0, start + some.randrange(-1, 2)), some.choice((1, 512, 2000, 70_000))
        assert player.read(at, size) == whole[at : at + size]


def test_members(player: TapePlayer, expected: reference.Reference) -> None:
    """Each is found by its name and by every offset of its header, and its body is where it says."""
    whole = expected.read(0, expected.size)
    for name, start in expected.starts.items():
        member = player.tape.find(name)
        assert (member.start, member.name) == (start, name)
        assert member.header() == whole[start : member.body]
        for at in (start, member.body - 1, member.stop - 1):
            assert player.tape.member_at(at) == member
        header, *rest = member.segments()
        assert (header.start, header.stop) == (start, member.body)
        assert ([rest[0].start, rest[0].stop] if member.size else []) == (
            [member.body, member.body + member.size] if member.size else []
        )
    events = [event for event in player.play() if event.type == "file_start"]
    assert [event.metadata.start_offset for event in events] == list(expected.starts.values())


def test_blocks_are_those_of_gnu_tar(root: Path, expected: reference.Reference) -> None:
    ours = reference.blocks_of(expected.read(0, expected.size))
    command = ["tar", "--format=gnu", "--sort=name", "--owner=root:0", "--group=root:0", "-cf", "-", "data"]
    theirs = reference.blocks_of(subprocess.run(command, cwd=root.parent, check=True, capture_output=True).stdout)
    assert len(ours) > 800
    assert ours.items() <= theirs.items()


def test_refused_without_the_option(root: Path, tmp_path: Path) -> None:
    """All that is too long is listed, the option is named, and nothing is written."""
    index = tmp_path / "index.db"
    result = run("record", root, "--index", index)
    assert result.returncode == 4
    with pytest.raises(TapeConstraintError) as caught:
        TapeRecorder(root, index).commit()
    *listed, _, hint = result.stderr.splitlines()
    assert len(listed) == len(caught.value.problems) > 800
    command = f"tartapefs record {root} --index {index} --long-names"
    assert hint == f'tartapefs: "{command}" records names and targets of any length, as GNU tar does'
    assert not index.exists()


def test_what_fits_is_the_same_with_the_option(tmp_path: Path) -> None:
    root = tmp_path / "data"
    folder = root / ("p" * 90) / ("q" * 50)
    folder.mkdir(parents=True)
    (folder / ("n" * 100)).write_bytes(b"x")
    (root / "link").symlink_to("t" * 100)
    plain = TapeRecorder(root, tmp_path / "a.db").commit()
    assert TapeRecorder(root, tmp_path / "b.db", long_names=True).commit() == plain
    with Tape.from_index(tmp_path / "a.db") as without, Tape.from_index(tmp_path / "b.db") as tape:
        assert (without.long_names, tape.long_names) == (False, True)
        assert without.total_size == tape.total_size
        assert (without.version, tape.version) == (3, 7)


@pytest.mark.parametrize(("long_names", "version"), [(True, 3), (False, 7), (True, 11), (True, 4)])
def test_another_format(tmp_path: Path, long_names: bool, version: int) -> None:
    """Format and facts of an index must agree: a version that knows no long names refuses 7 to 10 by their numbers."""
    root = tmp_path / "data"
    root.mkdir()
    TapeRecorder(root, long_names=long_names).commit()
    with closing(sqlite3.connect(root / ".tartape" / "index.db")) as database, database:
        database.execute(f"PRAGMA user_version={version}")
    with pytest.raises(TapeFormatError):
        Tape.discover(root)


def test_the_longest_path(tmp_path: Path) -> None:
    """A name of 4,095 bytes is archived, read and extracted; a longer one is refused, and the option is not named."""
    root = tmp_path / "data"
    (root / ("top" + "n" * 200)).mkdir(parents=True)
    folder, name = os.open(root / ("top" + "n" * 200), os.O_RDONLY), b"data/top" + b"n" * 200
    while 4095 - len(name) > 250:
        name += b"/" + b"d" * 200
        os.mkdir(b"d" * 200, dir_fd=folder)
        below = os.open(b"d" * 200, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    last = b"f" * (4094 - len(name))
    with open(os.open(last, os.O_CREAT | os.O_WRONLY, dir_fd=folder), "wb") as file:
        file.write(b"deep" * 200)
    TapeRecorder(root, long_names=True).commit()
    with playing(root) as player:
        member = player.tape.find(name + b"/" + last)
        assert player.read(member.body, 800) == b"deep" * 200
        archive = player.read(0, player.tape.total_size)
    (tmp_path / "out").mkdir()
    done = subprocess.run(["tar", "-xf", "-"], input=archive, cwd=tmp_path / "out", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out" / "data") == contents(root)
    os.rename(last, last + b"f", src_dir_fd=folder, dst_dir_fd=folder)
    os.close(folder)
    result = run("record", root, "--force")
    assert result.returncode == 4
    assert "has 4096 bytes, at most 4095 can be restored" in result.stderr
    assert "--long-names" not in result.stderr
    shutil.rmtree(root)


def test_the_option_is_kept(tmp_path: Path) -> None:
    """By --force and --append, until it is dropped."""
    root = tmp_path / "data"
    root.mkdir()
    (root / ("n" * 200)).touch()
    assert run("record", root, "--long-names").returncode == 0
    result = run("record", root, "--force")
    assert 'as recorded before: --long-names ("--no-long-names" to drop)' in result.stderr
    (root / ("o" * 200)).touch()
    assert run("record", root, "--append").returncode == 0
    assert json.loads(run("info", root, "--json").stdout)["long_names"] is True
    result = run("record", root, "--force", "--no-long-names")
    assert result.returncode == 4
    assert f'"tartapefs record {root} --force --no-long-names --long-names" records names' in result.stderr


def test_append_without_the_option(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    assert run("record", root).returncode == 0
    (root / ("n" * 200)).touch()
    result = run("record", root, "--append")
    assert result.returncode == 4
    assert f'"tartapefs record --force --long-names {root}" records names and targets of any length' in result.stderr
    assert run("record", root, "--append", "--long-names").returncode == 2


@pytest.mark.parametrize("is_sealed", [False, True], ids=["bare", "sealed"])
def test_generations(tmp_path: Path, is_sealed: bool) -> None:
    """What is added, and what was there, is the archive of both generations; names are found in both."""
    root = tmp_path / "data"
    root.mkdir()
    fill(root, 100, 3)
    generations = Generations(root)
    TapeRecorder(root, long_names=True).commit()
    if is_sealed:
        seal_again(root)
    generations.append()
    (root / ("new " + "n" * 200)).mkdir()
    fill(root / ("new " + "n" * 200), 100, 4)
    os.utime(root, (0, 10**9))
    TapeRecorder(root, append=True).commit()
    expected = generations.append()
    with playing(root) as player:
        tape = player.tape
        assert tape.version == 7 + 2 + 8 + is_sealed
        assert player.read(0, tape.total_size) == expected
        assert tape.rows_are_sound()
        for generation in generations.names:
            for name in generation:
                assert tape.find(name).name == name


def test_a_root_with_a_long_name(tmp_path: Path) -> None:
    """The archive begins with a block that others begin with, too: its name tells whether a copy is one of it."""
    archives = []
    for letter in "ab":
        root = tmp_path / (letter * 250)
        root.mkdir()
        (root / "file").write_bytes(b"x" * 5000)
        TapeRecorder(root, long_names=True).commit()
        with playing(root) as player:
            archives.append(player.read(0, player.tape.total_size))
    copy = tmp_path / "copy.tar"
    copy.write_bytes(archives[0])
    refused = run("resume", root, copy)
    assert refused.returncode == 1
    assert "does not begin as this archive does" in refused.stderr
    assert copy.read_bytes() == archives[0]
    copy.write_bytes(archives[1][:2000])
    assert run("resume", root, copy).returncode == 0
    assert copy.read_bytes() == archives[1]


def test_sealed(root: Path, expected: reference.Reference, tmp_path: Path) -> None:
    """The seal is that of the definition; copies are checked, extracted and compared by it."""
    whole = expected.read(0, expected.size)
    index, copy = tmp_path / "index.db", tmp_path / "copy.tar"
    TapeRecorder(root, index, long_names=True).commit()
    assert run("seal", root, "--index", index).returncode == 0
    copy.write_bytes(whole)
    with Tape.from_index(index) as tape, closing(TapePlayer(tape, root)) as player:
        assert tape.seal == seal_of(whole, tape.algorithm, tape.block_size)
        assert tape.rows_are_sound()
        assert player.read(0, len(whole)) == whole
    assert run("check", root, copy, "--index", index).returncode == 0
    assert run("extract", root, copy, "data", "--index", index, "-C", tmp_path).returncode == 0
    assert contents(tmp_path / "data") == contents(root)
    assert run("verify-extracted", root, tmp_path / "data", "--index", index).returncode == 0


def test_digests_of_files(root: Path, expected: reference.Reference) -> None:
    sums = subprocess.run(
        [*TARTAPEFS, "digest", root, "--sums", "-"], check=True, capture_output=True
    ).stdout  # fmt: skip
    done = subprocess.run(["sha256sum", "--check", "--quiet", "-"], input=sums, cwd=root.parent, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(sums.splitlines()) == sum(kind[0] == "file" for kind in contents(root).values())


@pytest.mark.fuse
def test_mounted(root: Path, expected: reference.Reference, mountpoint: Path) -> None:
    """Reads of the mount at random offsets, and in order."""
    whole = expected.read(0, expected.size)
    assert run("mount", root, mountpoint).returncode == 0
    some = random.Random(5)
    with open(mountpoint / "archive.tar", "rb", buffering=0) as archive:
        for start in some.choices([*expected.boundaries(), *range(0, len(whole), 997)], k=1000):
            start = max(0, start + some.randrange(-2, 600))
            assert os.pread(archive.fileno(), 1500, start) == whole[start : start + 1500]
        assert hashlib.file_digest(archive, "sha256").digest() == hashlib.sha256(whole).digest()
    assert run("unmount", mountpoint).returncode == 0


READERS = {
    "tar": ["tar", "-xf"],
    "bsdtar": ["bsdtar", "-xf"],
    "7z": ["7z", "x", "-snl", "-y"],
    "python": [sys.executable, "-m", "tarfile", "-e"],
}


@pytest.mark.parametrize("reader", [pytest.param(name, marks=pytest.mark.needs(READERS[name][0])) for name in READERS])
def test_readers(root: Path, expected: reference.Reference, tmp_path: Path, reader: str) -> None:
    """Each gets every name, content and target."""
    (tmp_path / "archive.tar").write_bytes(expected.read(0, expected.size))
    (tmp_path / "out").mkdir()
    command = [*READERS[reader], tmp_path / "archive.tar"]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out" / "data") == contents(root)


@pytest.mark.needs("busybox")
def test_busybox(tmp_path: Path) -> None:
    """It takes strings of up to 4,095 bytes, the NUL included: so targets of 4,094."""
    root = tmp_path / "data"
    root.mkdir()
    fill(root, 200, 6, longest_target=4094)
    TapeRecorder(root, long_names=True).commit()
    with playing(root) as player:
        archive = player.read(0, player.tape.total_size)
    (tmp_path / "out").mkdir()
    done = subprocess.run(["busybox", "tar", "-xf", "-"], input=archive, cwd=tmp_path / "out", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out" / "data") == contents(root)
