"""The player: ranges of the archive, the footer and its audit, and which facts are compared where."""

import array
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.changes import (
    chmod_and_back,
    replace_by_copy_keeping_folder_times,
    touch,
)
from support.recordings import COPIES, around_blocks, copied, player_of, record
from support.reference import Reference
from support.trees import pattern

from tartapefs import (
    OffsetError,
    Tape,
    TapeCompleted,
    TapeError,
    TapeIntegrityError,
    TapePlayer,
)
from tartapefs.play import engine

FOOTER = 1024
PHOTOS, DEEP = "data/photos", "data/photos/2024"


@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("size", [0, 1, 2, 511, 512, 513, 1024, 1025, 5000, 1 << 20])
def test_read_at_every_block(player: TapePlayer, archive: bytes, size: int) -> None:
    """`read` and `readinto` give the recorded bytes, and fewer only where the archive ends."""
    for offset in around_blocks(len(archive)):
        wanted = archive[offset : offset + size]
        assert player.read(offset, size) == wanted, offset
        buffer = bytearray(b"?" * size)
        assert player.readinto(buffer, offset) == len(wanted)
        assert buffer == wanted + b"?" * (size - len(wanted)), offset


def test_read_byte_by_byte(player: TapePlayer, archive: bytes) -> None:
    assert b"".join(player.read(offset, 1) for offset in range(len(archive))) == archive


def test_read_backwards(player: TapePlayer, archive: bytes) -> None:
    pieces = [player.read(offset, 100) for offset in reversed(range(0, len(archive), 100))]
    assert b"".join(reversed(pieces)) == archive


@pytest.mark.parametrize("beyond", [0, 1, 511, 512, 2**40, 2**63, 2**64])
def test_read_at_and_beyond_the_end(player: TapePlayer, archive: bytes, beyond: int) -> None:
    """As of any file: no bytes, and no error."""
    assert player.read(len(archive) + beyond, 100) == b""
    assert player.readinto(bytearray(100), len(archive) + beyond) == 0


def test_read_sizes_beyond_any_memory(player: TapePlayer, archive: bytes) -> None:
    """Only what there is is set aside."""
    assert player.read(100, 2**62) == archive[100:]


@pytest.mark.parametrize("offset", [-1, -512, -(2**63), -(2**70)])
def test_read_before_the_start(player: TapePlayer, offset: int) -> None:
    with pytest.raises(OffsetError, match=str(offset)):
        player.read(offset, 10)
    with pytest.raises(OffsetError, match=str(offset)):
        player.readinto(bytearray(10), offset)
    with pytest.raises(OffsetError):
        player.read(offset, 0)
    assert player.drift is None


def test_read_of_a_negative_size(player: TapePlayer) -> None:
    with pytest.raises(ValueError, match="-1"):
        player.read(0, -1)


def test_readinto_any_writable_buffer(player: TapePlayer, archive: bytes) -> None:
    """Memory of whatever element type counts by its bytes; a part of it is filled where it lies."""
    numbers = array.array("I", [7] * 200)
    assert player.readinto(numbers, 500) == 800
    assert numbers.tobytes() == archive[500:1300]
    outer = bytearray(b"?" * 1000)
    assert player.readinto(memoryview(outer)[100:600], 700) == 500
    assert outer == b"?" * 100 + archive[700:1200] + b"?" * 400
    assert player.readinto(bytearray(), 0) == 0
    assert player.readinto(array.array("I"), 0) == 0


def test_readinto_memory_that_is_not_writable(player: TapePlayer) -> None:
    with pytest.raises((TypeError, ValueError)):
        player.readinto(b"?" * 100, 0)  # type: ignore[arg-type]
    assert player.drift is None


def test_offsets_by_name(player: TapePlayer, small: Path) -> None:
    expected = Reference(small)
    for name, start in expected.starts.items():
        assert player.get_offset_of(os.fsdecode(name)) == start
        assert player.get_offset_of(os.fsdecode(name).rstrip("/")) == start
        assert player.tape.find(name).arc_path == os.fsdecode(name).rstrip("/")
    with pytest.raises(KeyError):
        player.get_offset_of("data/nothing")


@pytest.mark.usefixtures("way_to_open")
def test_copied_tape(small: Path, tmp_path: Path, archive: bytes) -> None:
    """A folder that was copied with its tape plays; inodes and times of change are not compared there."""
    copy = tmp_path / "elsewhere" / "data"
    copy.parent.mkdir()
    subprocess.run(["cp", "-a", small, copy], check=True)
    with Tape.discover(copy) as tape:
        player = TapePlayer(tape)
        assert not player.at_home
        assert player.read(0, tape.total_size) == archive
        for harmless in (chmod_and_back, replace_by_copy_keeping_folder_times):
            harmless(copy / "photos" / "513")
            assert player.read(0, tape.total_size) == archive
        touch(copy / "photos" / "513")
        with pytest.raises(TapeIntegrityError, match="mtime"):
            player.read(0, tape.total_size)
        player.close()


def test_at_home(player: TapePlayer, small: Path, tmp_path: Path, archive: bytes) -> None:
    """At home it is where both the folder and the index are the recorded ones, moved or not."""
    assert player.at_home
    moved = small.rename(tmp_path / "moved")
    with Tape.discover(moved) as tape:
        other = TapePlayer(tape)
        assert other.at_home
        other.close()
    shutil.copy(moved / ".tartape" / "index.db", tmp_path / "index.db")
    with Tape.from_index(tmp_path / "index.db") as tape:
        other = TapePlayer(tape, source_root=moved)
        assert not other.at_home
        other.close()
    assert len(archive) == player.tape.total_size


def test_unknown_source(small: Path, tmp_path: Path, archive: bytes) -> None:
    """An index alone does not tell where its folder is; who names it plays it."""
    shutil.copy(small / ".tartape" / "index.db", tmp_path / "index.db")
    with Tape.from_index(tmp_path / "index.db") as tape:
        with pytest.raises(TapeError, match="source"):
            TapePlayer(tape)
        with pytest.raises(FileNotFoundError):
            TapePlayer(tape, source_root=tmp_path / "missing")
        player = TapePlayer(tape, source_root=str(small))
        assert player.read(0, tape.total_size) == archive
        player.close()


def test_source_given_by_a_link(small: Path, tmp_path: Path, archive: bytes) -> None:
    """The folder that the link leads to at the time of opening is the source."""
    (tmp_path / "link").symlink_to(small)
    with Tape.discover(tmp_path / "link") as tape:
        player = TapePlayer(tape, source_root=tmp_path / "link")
        (tmp_path / "link").unlink()
        assert player.read(0, tape.total_size) == archive
        player.close()


def test_another_folder_is_not_the_source(small: Path, tmp_path: Path) -> None:
    """A tape played from a folder that only looks alike fails before any byte of it."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "z").write_bytes(pattern(1500))
    with Tape.discover(small) as tape:
        player = TapePlayer(tape, source_root=other)
        with pytest.raises(TapeIntegrityError):
            player.read(tape.find("data/z").start + 512, 10)
        player.close()


def test_player_closes_its_own(small: Path) -> None:
    """The player closes the source, the tape stays open; closing twice does no harm."""
    with Tape.discover(small) as tape:
        player = TapePlayer(tape)
        player.close()
        player.close()
        assert tape.find("data/z")


def test_many_kinds_of_reads_at_once(player: TapePlayer, small: Path) -> None:
    """A slow reader of the first bytes and a fast one of the last see a change at their own next read."""
    slow = player.play(chunk_size=1)
    for _ in range(10):
        next(slow)
    time.sleep(0.01)
    touch(small / "z")
    with pytest.raises(TapeIntegrityError):
        list(player.play(start_offset=player.get_offset_of("data/z")))
    with pytest.raises(TapeIntegrityError):
        next(slow)


def putting_time_back(path: Path, change: Callable[[Path], object]) -> None:
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def read_to(player: TapePlayer, stop: int, size: int = 4000) -> None:
    for at in range(0, stop, size):
        player.read(at, min(size, stop - at))


@pytest.mark.parametrize("footer_in", ["a request of its own", "two requests", "the last request"])
@pytest.mark.parametrize("audited_before", [False, True], ids=["first time", "audited before"])
def test_no_footer_without_an_audit_that_began_later(tree: Path, footer_in: str, audited_before: bool) -> None:
    """A file is added in a folder that was read already: not seen by any later read but the footer's."""
    expected = record(tree)
    end = len(expected) - FOOTER
    with player_of(tree) as player:
        if audited_before:
            player.audit()
            read_to(player, len(expected))
        read_to(player, end if footer_in != "the last request" else end - 700)
        (tree / "empty-folder" / "new").touch()
        with pytest.raises(TapeIntegrityError) as caught:
            match footer_in:
                case "a request of its own":
                    player.read(end, FOOTER)
                case "two requests":
                    player.read(end, 1)
                case _:
                    player.read(end - 700, 700 + FOOTER)
        assert caught.value.member == "data/empty-folder"


def test_an_audit_is_not_repeated_for_every_look_at_the_end(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that looks at the end again and again costs one audit a second at most."""
    expected = record(tree)
    now = 1000.0
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    with player_of(tree) as player:
        audits = []
        real = player.audit
        monkeypatch.setattr(player, "audit", lambda: (audits.append(now), real()))
        for _ in range(100):
            assert player.read(len(expected) - 10, 10) == bytes(10)
            now += 1 / 64
    assert audits == [1000.0, 1001.015625]


def test_the_footer_read_first_says_nothing_of_what_is_read_later(tree: Path) -> None:
    """Not promised: who reads the end before the rest is told of what is added meanwhile by later audits only."""
    expected = record(tree)
    end = len(expected) - FOOTER
    with player_of(tree) as player:
        assert player.read(end, FOOTER) == bytes(FOOTER)
        (tree / "empty-folder" / "new").touch()
        start = player.get_offset_of(PHOTOS)
        assert player.read(start, end - start) == expected[start:end]
        with pytest.raises(TapeIntegrityError):
            player.read(end, FOOTER)


def test_play_does_not_complete(tree: Path) -> None:
    """No `tape_completed` for a folder to which a file was added behind the reader."""
    expected = record(tree)
    played, seen = b"", []
    with player_of(tree) as player, pytest.raises(TapeIntegrityError):
        for event in player.play():
            seen.append(event)
            played += event.data
            if len(played) == len(expected) - FOOTER and not (tree / "empty-folder" / "new").exists():
                (tree / "empty-folder" / "new").touch()
    assert played == expected[:-FOOTER]
    assert not any(isinstance(event, TapeCompleted) for event in seen)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_an_error_during_the_audit_is_no_drift(tree: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The error passes through, the footer is not served; once the fault is gone the tape plays to its end."""
    expected = record(tree)
    end = len(expected) - FOOTER
    with player_of(tree) as player:
        read_to(player, end)
        real = player.source.lstat

        def failing(path: bytes) -> os.stat_result:
            if path == b"photos/2024":
                raise OSError(number, os.strerror(number), path)
            return real(path)

        with monkeypatch.context() as patch:
            patch.setattr(player.source, "lstat", failing)
            for action in (player.audit, lambda: player.read(end, FOOTER)):
                with pytest.raises(OSError) as caught:
                    action()
                assert caught.value.errno == number
                assert not isinstance(caught.value, TapeIntegrityError)
        assert player.drift is None
        assert player.read(0, len(expected)) == expected


BY_CTIME: dict[str, Callable[[Path], object]] = {
    "mode of a file and back": lambda root: ((root / "script.sh").chmod(0o700), (root / "script.sh").chmod(0o755)),
    "hard link of a file added": lambda root: os.link(root / "script.sh", root.parent / "other"),
    "owner of a file": lambda root: os.chown(root / "script.sh", os.geteuid(), os.getegid()),
    "extended attribute": lambda root: os.setxattr(root / "script.sh", "user.note", b"x"),
}


@pytest.mark.parametrize("name", BY_CTIME)
def test_a_change_of_ctime_alone(tree: Path, name: str) -> None:
    """Drift by default, with a line that names the way out; nothing at all with `--source-check mtime`."""
    (tree / "photos").chmod(0o755)
    expected = record(tree)
    BY_CTIME[name](tree)
    with player_of(tree) as player, pytest.raises(TapeIntegrityError) as caught:
        player.read(0, len(expected))
    assert [difference.what for difference in caught.value.differences] == ["ctime"]
    assert "ctime changed since recording" in str(caught.value)
    assert '--source-check mtime"' in str(caught.value)
    assert caught.value.member == "data/script.sh"
    with player_of(tree, "mtime") as player:
        assert b"".join(event.data for event in player.play()) == expected
        player.audit()


@pytest.mark.parametrize(
    ("what", "change"),
    {
        "size": lambda path: os.truncate(path, 5),
        "mtime": lambda path: path.write_bytes(path.read_bytes()),
        "mode": lambda path: path.chmod(0o600),
        "type": lambda path: path.unlink(),
    }.items(),
)
def test_by_mtime_everything_else_counts(tree: Path, what: str, change: Callable[[Path], object]) -> None:
    expected = record(tree)
    change(tree / "photos" / "5000.bin")
    with player_of(tree, "mtime") as player, pytest.raises(TapeIntegrityError) as caught:
        read_to(player, len(expected))
    # A file that is gone is seen by its folder's mtime first.
    assert caught.value.differences[0].what == ("mtime" if what == "type" else what)


def test_a_hard_linked_snapshot_plays_by_mtime(tree: Path) -> None:
    """As backup programs make them: each file is one more name of the same inode, which changes its ctime."""
    expected = record(tree)
    subprocess.run(["cp", "-al", tree, tree.parent / "snapshot"], check=True)
    with player_of(tree) as player, pytest.raises(TapeIntegrityError, match="--source-check mtime"):
        player.read(0, len(expected))
    with player_of(tree, "mtime") as player:
        assert player.read(0, len(expected)) == expected


@pytest.mark.parametrize("command", COPIES)
def test_a_copy_is_checked_too(old_tree: Path, command: list[str]) -> None:
    expected = record(old_tree)
    copy = copied(command, old_tree)
    with player_of(copy) as player:
        (copy / "empty-folder" / "new").touch()
        with pytest.raises(TapeIntegrityError):
            read_to(player, len(expected))


def test_what_a_copy_cannot_tell(tree: Path) -> None:
    """Not promised: away from home, and with `--source-check mtime`, a rewrite of equal size, its mtime put back."""
    expected = record(tree)
    copy = copied(["cp", "-a"], tree)
    for root, check in ((tree, "mtime"), (copy, "full")):
        putting_time_back(root / "photos" / "5000.bin", lambda path: path.write_bytes(b"x" * 5000))
        with player_of(root, check) as player:
            at = player.get_offset_of("data/photos/5000.bin") + 512
            assert player.read(0, len(expected)) == expected[:at] + b"x" * 5000 + expected[at + 5000 :]
