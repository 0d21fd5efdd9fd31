"""Recorders that are interrupted or killed, that meet another one, or whose disk refuses: the old index or none."""

import contextlib
import fcntl
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from errno import EAGAIN, ENOSPC
from pathlib import Path
from types import FrameType

import pytest
from support.generations import Generations
from support.recordings import assert_recorded, nothing_written, played, whole

import tartapefs
from tartapefs import (
    OutputError,
    Tape,
    TapeBusyError,
    TapeRecorder,
)

HOLD = """
import sys
from tartapefs.base.saved_state import SavedState
state = SavedState(sys.argv[1], "recording")
print("held", flush=True)
sys.stdin.read()
"""


def test_two_recorders_at_once(tree: Path) -> None:
    """While one records, another is told so, and disturbs neither it nor the tape that is there."""
    TapeRecorder(tree).commit()
    index = tree / ".tartape" / "index.db"
    before = index.read_bytes()
    command = [sys.executable, "-c", HOLD, f"{index}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(TapeBusyError, match="another recording") as caught:
            TapeRecorder(tree, overwrite=True).commit()
        assert isinstance(caught.value, BlockingIOError)
        assert (caught.value.path, caught.value.errno) == (str(index), EAGAIN)
        assert os.path.exists(f"{index}.lock")
        assert index.read_bytes() == before
    TapeRecorder(tree, overwrite=True).commit()  # its file is there, but nobody holds it
    assert_recorded(tree)
    assert os.listdir(tree / ".tartape") == ["index.db"]


def test_recorder_within_a_recorder(tree: Path) -> None:
    """The lock is between recorders, not between processes."""
    caught: list[BaseException] = []

    def record_too(path: str) -> bool:
        if not caught:
            with pytest.raises(TapeBusyError) as error:
                TapeRecorder(tree).commit()
            caught.append(error.value)
        return False

    TapeRecorder(tree, exclude=record_too).commit()
    assert len(caught) == 1
    assert_recorded(tree)


KILLED = """
import os, signal, sys
from tartapefs import TapeRecorder
TapeRecorder(sys.argv[1], overwrite=True, exclude=lambda path: os.kill(os.getpid(), signal.SIGKILL)).commit()
"""


@pytest.mark.parametrize("had_tape", [False, True])
def test_killed_recorder(tree: Path, had_tape: bool) -> None:
    """What it leaves is the old index or none; its unfinished files are removed by the next recorder."""
    folder = tree / ".tartape"
    if had_tape:
        TapeRecorder(tree).commit()
        before = (folder / "index.db").read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED, tree], env=os.environ | {"PYTHONPATH": package_path()})
    assert killed.returncode == -signal.SIGKILL
    *found, part, lock = sorted(os.listdir(folder))
    assert found == ["index.db"] * had_tape and lock == "index.db.lock"
    assert re.fullmatch(r"index\.db\.[0-9a-f]{16}\.part", part)
    if had_tape:
        assert (folder / "index.db").read_bytes() == before
        assert_recorded(tree)
    TapeRecorder(tree, overwrite=had_tape).commit()
    assert os.listdir(folder) == ["index.db"]
    assert_recorded(tree)


def package_path() -> str:
    return str(Path(tartapefs.__file__).parents[1])


_INTERRUPTIBLE = tuple(
    module.__file__
    for module in (
        tartapefs.record.recorder,
        tartapefs.record.comparison,
        tartapefs.record.options,
        tartapefs.record.settling,
        tartapefs.record.tape_folder,
        tartapefs.index.extender,
        tartapefs.index.writer,
        tartapefs.base.forked_work,
        contextlib,
    )
)


def _interrupted_after(moments: int, recorder: TapeRecorder) -> bool:
    """Records, with a SIGINT in the given one of the moments in which Python handles signals; whether it had less.

    These are the beginning of each function, and the end of each that is not written in Python, its result still at
    hand.
    """
    left = moments

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename in _INTERRUPTIBLE:
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)

    try:
        sys.setprofile(profile)
        recorder.commit()
    except KeyboardInterrupt:
        return False
    finally:
        sys.setprofile(None)
    return left > 0


# Python drops what a handler raises within a destructor: then the recording goes on.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_interrupt_at_any_moment(tmp_path: Path, elsewhere: bool) -> None:
    """Whenever it comes, there is no index, or the new one; nothing else is left behind, and the root is as it was."""
    root, place = tmp_path / "data", tmp_path / "place"
    root.mkdir()
    place.mkdir()
    (root / "file").write_bytes(b"content")
    os.utime(root, (10**9, 10**9))
    time.sleep(0.05)  # until nothing of it is fresh
    index = place / "index" if elsewhere else None
    folder, name = (place, "index") if elsewhere else (root / ".tartape", "index.db")
    moments, ended = 1, False
    while not ended:
        ended = _interrupted_after(moments, TapeRecorder(root, index))
        found = os.listdir(folder) if folder.exists() else []
        assert found in ([], [name]), moments
        assert root.stat().st_mtime == 10**9, moments
        if found:
            with Tape.discover(root, index) as tape:
                assert tape.member_count == 2
            (folder / name).unlink()
            if not elsewhere:
                folder.rmdir()
        assert os.listdir(root) == ["file"], moments
        os.utime(root, (10**9, 10**9))
        moments += 1
    assert moments > 100, "it was not interrupted often"
    gc.collect()  # of descriptors within reference cycles of tracebacks


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupt_at_any_moment_of_an_append(tmp_path: Path) -> None:
    """Whenever it comes, there is the old index, to the byte, or the new one, and nothing beside it."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "file").write_bytes(b"content")
    os.utime(root, (10**9, 10**9))
    index, expected = root / ".tartape" / "index.db", Generations(root)
    TapeRecorder(root).commit()
    before = index.read_bytes(), expected.append()
    (root / "new").write_bytes(b"new")
    os.utime(root, (10**9 + 1, 10**9 + 1))
    after = expected.append()
    time.sleep(0.05)  # until nothing of it is fresh
    moments, ended = 1, False
    while not ended:
        ended = _interrupted_after(moments, TapeRecorder(root, append=True))
        assert os.listdir(root / ".tartape") == ["index.db"], moments
        assert root.stat().st_mtime == 10**9 + 1, moments
        if index.read_bytes() != before[0]:
            assert played(root) == after, moments
            index.write_bytes(before[0])
        moments += 1
    assert after.startswith(before[1][:-1024])
    assert moments > 100, "it was not interrupted often"
    gc.collect()  # of descriptors within reference cycles of tracebacks


@pytest.mark.parametrize("content", [b"", b"somebody's" * 5000])
def test_files_of_others_beside_the_index(tree: Path, content: bytes) -> None:
    """Another file of any name stays as it is; one in the place of the lock is refused, and stays too."""
    folder = tree / ".tartape"
    folder.mkdir()
    for name in ("index.db.new", "index.db.part", "index.db.0123456789abcdef.part"):
        (folder / name).write_bytes(content)
    TapeRecorder(tree).commit()
    (folder / "index.db.lock").write_bytes(content)
    with pytest.raises(OutputError, match="not a file that a recording saves; move or remove it"):
        TapeRecorder(tree, overwrite=True).commit()
    assert {path.read_bytes() for path in folder.iterdir() if path.name != "index.db"} == {content}
    assert len(os.listdir(folder)) == 5
    assert_recorded(tree)


def test_lock_that_is_a_link_is_not_followed(tree: Path, tmp_path: Path) -> None:
    """Whoever may write in the folder of the index cannot have another file emptied."""
    (tmp_path / "precious").write_bytes(b"precious")
    (tree / ".tartape").mkdir()
    for target in (tmp_path / "precious", tmp_path / "nothing"):
        (tree / ".tartape" / "index.db.lock").symlink_to(target)
        with pytest.raises(OutputError, match="symbolic link"):
            TapeRecorder(tree).commit()
        (tree / ".tartape" / "index.db.lock").unlink()
    assert (tmp_path / "precious").read_bytes() == b"precious" and not (tmp_path / "nothing").exists()


def test_index_at_rest_is_a_single_file(tree: Path) -> None:
    """No write-ahead log, journal or unfinished file beside it, after recording and after reading."""
    TapeRecorder(tree).commit()
    assert os.listdir(tree / ".tartape") == ["index.db"]
    assert_recorded(tree)
    assert os.listdir(tree / ".tartape") == ["index.db"]


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 192 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k,nr_inodes=0", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.root
def test_full_disk(small_disk: Path) -> None:
    """An OSError that says so; no index and no folder for it is left."""
    root = small_disk / "tree"
    root.mkdir()
    for number in range(4000):
        os.mknod(root / f"a file with a name of some length, the number of which is {number}")
    mtime_ns = root.stat().st_mtime_ns
    with pytest.raises(OSError, match="No space") as caught:
        TapeRecorder(root).commit()
    assert caught.value.errno == ENOSPC
    nothing_written(root, mtime_ns)


@pytest.mark.root
@pytest.mark.parametrize("how", ["overwrite", "append"])
def test_full_disk_when_there_is_a_tape(tree: Path, small_disk: Path, how: str) -> None:
    """The old index stays, and plays what did not change."""
    index = small_disk / "index.db"
    TapeRecorder(tree, index).commit()
    before = index.read_bytes()
    for number in range(3000):
        os.mknod(tree / f"a file with a name of some length, the number of which is {number}")
    with pytest.raises(OSError, match="No space") as caught:
        TapeRecorder(tree, index, **{how: True}).commit()  # type: ignore[arg-type]
    assert caught.value.errno == ENOSPC
    assert index.read_bytes() == before
    assert os.listdir(small_disk) == ["index.db"]


@pytest.mark.root
@pytest.mark.parametrize("reserve", [0, 1, 2, 4, 8])
def test_disk_that_fills_up_at_any_point(tree: Path, small_disk: Path, reserve: int) -> None:
    """However few pages are left: the new index, or none."""
    index = small_disk / "index.db"
    (small_disk / "ballast").write_bytes(bytes((192 - 4 * reserve) * 1024))
    try:
        TapeRecorder(tree, index).commit()
    except OSError as error:
        assert error.errno == ENOSPC
        assert os.listdir(small_disk) == ["ballast"]
    else:
        assert reserve > 1
        assert played(tree, index) == whole(tree)


@pytest.mark.root
def test_read_only_file_system(tree: Path, tmp_path: Path) -> None:
    """A tape on one plays; a folder on one is recorded with the index elsewhere, and refused without."""
    TapeRecorder(tree).commit()
    seen = tmp_path / "read-only"
    seen.mkdir()
    (tmp_path / "other" / "data").mkdir(parents=True)
    (tmp_path / "other" / "data" / "file").write_bytes(b"1")
    subprocess.run(["mount", "--bind", tmp_path, seen], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", seen], check=True)
        assert played(seen / "data") == whole(tree)
        bare = seen / "other" / "data"
        with pytest.raises(OSError, match="Read-only"):
            TapeRecorder(bare).commit()
        TapeRecorder(bare, tmp_path / "index.db").commit()
        assert played(bare, tmp_path / "index.db") == whole(bare)
    finally:
        subprocess.run(["umount", seen], check=True)
    assert os.listdir(tmp_path / "other" / "data") == ["file"]


def test_lock_is_held_as_long_as_it_records(tree: Path) -> None:
    """The file is locked as long as the recorder is at work, by `flock`."""
    locked = []

    def is_locked(path: str) -> bool:
        with open(tree / ".tartape" / "index.db.lock", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked.append(False)
            except BlockingIOError:
                locked.append(True)
        return False

    TapeRecorder(tree, exclude=is_locked).commit()
    assert locked
    assert all(locked)


# Recorders that add a generation

KILLED_WHILE_APPENDING = """
import os, signal, sys
from tartapefs import TapeRecorder
die = lambda members, size: os.kill(os.getpid(), signal.SIGKILL)
TapeRecorder(sys.argv[1], append=True, on_progress=die).commit()
"""


def test_killed_while_it_appends(tree: Path) -> None:
    """The old index stays; the next recorder removes what is unfinished, and adds the generation."""
    TapeRecorder(tree).commit()
    folder = tree / ".tartape"
    before, prefix = (folder / "index.db").read_bytes(), played_members(tree)
    (tree / "new").write_text("new")
    command = [sys.executable, "-c", KILLED_WHILE_APPENDING, tree]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": package_path()})
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "index.db").read_bytes() == before
    TapeRecorder(tree, append=True).commit()
    assert os.listdir(folder) == ["index.db"]
    assert played_members(tree).startswith(prefix)


def played_members(tree: Path) -> bytes:
    """The archive without its footer."""
    return played(tree)[:-1024]


def test_two_recorders_that_append(tree: Path) -> None:
    TapeRecorder(tree).commit()
    index = tree / ".tartape" / "index.db"
    before = index.read_bytes()
    (tree / "new").write_text("new")
    command = [sys.executable, "-c", HOLD, f"{index}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(TapeBusyError, match="another recording"):
            TapeRecorder(tree, append=True).commit()
        assert index.read_bytes() == before
    TapeRecorder(tree, append=True).commit()
    assert os.listdir(tree / ".tartape") == ["index.db"]
