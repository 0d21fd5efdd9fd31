"""Files that a program is writing while they are recorded: what it changes later must show, or nothing is recorded.

A `write` moves its file's times when it begins, a store through a mapping those of the first store to a page; so a file
that can be in the middle of either has no `stat` that would tell what comes next.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.filesystems import KINDS, Filesystem, filesystem_of
from support.programs import run
from support.recordings import assert_recorded, played
from support.reference import Reference
from support.users import as_nobody

from tartapefs import SourceBusyError, TapeConstraintError, TapeIntegrityError, TapeRecorder
from tartapefs.archive import ustar
from tartapefs.record import recorder, settling
from tartapefs.source import file_systems

PAGE = mmap.PAGESIZE
SIZE = 8 * PAGE


@pytest.fixture(scope="module", params=KINDS)
def filesystem(request: pytest.FixtureRequest) -> Iterator[Filesystem]:
    with tempfile.TemporaryDirectory() as place:  # where other users can go, unlike pytest's own
        os.chmod(place, 0o755)
        with filesystem_of(request.param, Path(place)) as made:
            yield made


@pytest.fixture
def root(filesystem: Filesystem) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=filesystem.folder) as place:
        os.chmod(place, 0o755)
        yield make_root(Path(place) / "data")


def make_root(root: Path) -> Path:
    (root / "logs").mkdir(parents=True)
    (root / "logs" / "app.log").write_bytes(b"a" * SIZE)
    (root / "other").write_bytes(b"at rest")
    return root


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "_PATIENCE", 0.1)


def assert_refused(root: Path) -> None:
    with pytest.raises(SourceBusyError) as caught:
        TapeRecorder(root).commit()
    assert [problem.path for problem in caught.value.problems] == ["logs/app.log"]
    assert not os.path.lexists(root / ".tartape")


# A write whose bytes the kernel cannot fetch: the pages that it is to write from are missing, and userfaultfd(2) lets
# the one who would provide them wait.

_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def write_under_way(path: Path) -> Iterator[Callable[[], None]]:
    """A `write` over the file's start that has moved its times and written some; what is given lets it go on."""
    number = _USERFAULTFD.get(platform.machine())
    if number is None:
        pytest.skip("the number of the system call userfaultfd is not known here")
    faults = _libc.syscall(number, os.O_CLOEXEC)
    if faults < 0:
        pytest.skip(f"no userfaultfd: {os.strerror(ctypes.get_errno())}")
    memory = mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[: 2 * PAGE] = b"b" * 2 * PAGE
    missing = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 2 * PAGE
    fcntl.ioctl(faults, _UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
    fcntl.ioctl(faults, _UFFDIO_REGISTER, struct.pack("QQQQ", missing, 2 * PAGE, 1, 0))
    fd = os.open(path, os.O_WRONLY)
    writer = threading.Thread(target=os.pwrite, args=(fd, memory, 0))

    def go_on() -> None:
        if writer.is_alive():
            fcntl.ioctl(faults, _UFFDIO_ZEROPAGE, struct.pack("QQQq", missing, 2 * PAGE, 0, 0))
            writer.join(20)
            os.close(fd)

    writer.start()
    try:
        assert os.read(faults, 32)  # comes when the write has arrived at the missing page
        yield go_on
    finally:
        go_on()
        os.close(faults)
    assert not writer.is_alive()


def test_the_write_under_way_is_one(root: Path) -> None:
    """The check on these tests: bytes come later than the times, and nothing in `stat` tells."""
    path = root / "logs" / "app.log"
    before = path.stat().st_mtime_ns
    with write_under_way(path) as go_on:
        during = path.stat()
        go_on()
        after = path.stat()
    assert before <= during.st_mtime_ns == after.st_mtime_ns
    assert (during.st_ctime_ns, during.st_size) == (after.st_ctime_ns, after.st_size)
    assert path.read_bytes()[: 4 * PAGE] == b"b" * 2 * PAGE + bytes(2 * PAGE)


def test_write_under_way(root: Path, impatient: None) -> None:
    """Refused, with nothing written; recorded once it has ended."""
    with write_under_way(root / "logs" / "app.log"):
        assert_refused(root)
    TapeRecorder(root).commit()
    assert_recorded(root)


@pytest.mark.long
def test_write_that_ends_soon(root: Path) -> None:
    """Waited for, and recorded with all its bytes."""
    with write_under_way(root / "logs" / "app.log") as go_on:
        soon = threading.Timer(0.3, go_on)
        soon.start()
        TapeRecorder(root).commit()
        soon.join()
    assert_recorded(root)


def test_what_is_written_while_the_recorder_waits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded as it is once nobody writes it any more, and not as it was at the first look."""
    file, sleep = (root / "logs" / "app.log").open("ab", buffering=0), time.sleep

    def pause(seconds: float) -> None:
        if not file.closed:
            file.write(b"more")
            file.close()
        sleep(seconds)

    monkeypatch.setattr(settling.time, "sleep", pause)
    TapeRecorder(root).commit()
    assert file.closed
    assert_recorded(root)


@pytest.mark.long
def test_dirty_mapping(root: Path, impatient: None) -> None:
    """Refused while it lasts, also with no descriptor open; what is stored after the recording shows."""
    path = root / "logs" / "app.log"
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    with mapping:
        mapping[5000] = 1
        assert_refused(root)
    TapeRecorder(root).commit()
    assert_recorded(root)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[5000] = 2
    with pytest.raises(TapeIntegrityError):
        played(root)


def test_skipped_when_asked(root: Path, impatient: None) -> None:
    with (root / "logs" / "app.log").open("ab"):
        recording = TapeRecorder(root, skip_busy=True)
        recording.commit()
    assert [problem.path for problem in recording.skipped] == ["logs/app.log"]
    assert recording.left_out == 1
    expected = Reference(root, (b"logs/app.log",))
    assert played(root) == expected.read(0, expected.size)


def test_file_of_another_user(filesystem: Filesystem, root: Path) -> None:
    """Nobody but its owner gets a lease: its dirty pages are written back, so that the next store shows."""
    with tempfile.TemporaryDirectory(dir=filesystem.folder) as place, (root / "other").open("r+b") as file:
        os.chmod(place, 0o777)
        file.truncate(SIZE)
        with mmap.mmap(file.fileno(), 0) as mapping:
            mapping[5000] = 1
            as_nobody(lambda: TapeRecorder(root, Path(place) / "index.db").commit())
            assert played(root, Path(place) / "index.db")
            mapping[5000] = 2
            if filesystem.sees_dirty_stores:
                with pytest.raises(TapeIntegrityError):
                    played(root, Path(place) / "index.db")
            else:
                assert played(root, Path(place) / "index.db")  # as documented


def test_lease_of_another_program_for_reading(root: Path) -> None:
    fd = os.open(root / "logs" / "app.log", os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        TapeRecorder(root).commit()
    finally:
        os.close(fd)
    assert_recorded(root)


@pytest.mark.long(but=2)
@pytest.mark.parametrize("returned", [False, True])
def test_lease_of_another_program_for_writing(root: Path, monkeypatch: pytest.MonkeyPatch, returned: bool) -> None:
    """Who has one may hold changes back: the file is busy until it is returned."""
    monkeypatch.setattr(settling, "_PATIENCE", 2 if returned else 0.1)
    fd = os.open(root / "logs" / "app.log", os.O_RDWR)
    asked = []
    before = signal.signal(signal.SIGURG, lambda number, frame: asked.append(number))
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        if returned:
            soon = threading.Timer(0.3, os.close, (fd,))
            soon.start()
            TapeRecorder(root).commit()
            soon.join()
            assert_recorded(root)
        else:
            assert_refused(root)
        assert asked
    finally:
        signal.signal(signal.SIGURG, before)
        if not returned:
            os.close(fd)


# The same on every file system


def test_who_waits_for_the_lease_does_no_harm(tmp_path: Path) -> None:
    """A program that opens the file for writing meanwhile waits until it is recorded, and the recorder lives on.

    Without further ado the kernel would send SIGIO to the recorder, whose default is to end the process.
    """
    root = make_root(tmp_path / "data")
    script = """
        import os, subprocess, sys, time
        import tartapefs
        path = sys.argv[1] + "/logs/app.log"
        ino, real, writers = os.stat(path).st_ino, os.fstat, []

        def slow(fd):
            found = real(fd)
            if found.st_ino == ino and not writers:  # the lease is held now
                writers.append(subprocess.Popen(["sh", "-c", 'echo later >> "$0"', path]))
                time.sleep(0.5)
                assert writers[0].poll() is None, "it did not wait"
            return found

        os.fstat = slow
        try:
            tartapefs.TapeRecorder(sys.argv[1]).commit()
        except tartapefs.TapeIntegrityError as error:  # where the stamp was fresh, it is looked at again
            print(error.member)
        assert writers[0].wait() == 0
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), root], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert (root / "logs" / "app.log").stat().st_size == SIZE + len("later\n")
    if (root / ".tartape").exists():
        with pytest.raises(TapeIntegrityError):
            played(root)


def test_only_what_changed_lately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is always open, and written now and then, is recorded once it has been at rest."""
    monkeypatch.setattr(settling, "_PATIENCE", 0)
    root = make_root(tmp_path / "data")
    with (root / "logs" / "app.log").open("ab", buffering=0) as file:
        assert_refused(root)
        monkeypatch.setattr(settling, "_RECENT_NS", 300_000_000)
        time.sleep(0.5)
        TapeRecorder(root).commit()
        assert_recorded(root)
        file.write(b"x")
        with pytest.raises(TapeIntegrityError):
            played(root)


def test_an_empty_file_is_recorded(tmp_path: Path) -> None:
    """Whatever comes moves its size."""
    root = make_root(tmp_path / "data")
    with (root / "new").open("xb", buffering=0) as file:
        TapeRecorder(root).commit()
        assert_recorded(root)
        file.write(b"x")
        with pytest.raises(TapeIntegrityError):
            played(root)


def test_opened_for_writing_after_the_first_look(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh file is looked at again at the end, and may be busy by then."""
    for name in ("_TICK_NS", "_COARSE_TICK_NS"):  # or it may be fresh no more on a busy machine
        monkeypatch.setattr(settling, name, 300 * 10**9)
    monkeypatch.setattr(settling.time, "sleep", lambda seconds: None)
    root = make_root(tmp_path / "data")
    opened = []

    def meanwhile(path: str) -> bool:
        if path == "other":
            opened.append((root / "logs" / "app.log").open("ab"))
        return False

    (root / "logs" / "app.log").write_bytes(b"c" * SIZE)
    try:
        with pytest.raises(SourceBusyError, match=r"app\.log"):
            TapeRecorder(root, exclude=meanwhile, skip_busy=True).commit()
    finally:
        for file in opened:
            file.close()


def test_written_after_the_walk_has_seen_it(tmp_path: Path) -> None:
    """The look at it that nobody disturbs finds that, and all is recorded anew, as it is by then."""
    root = make_root(tmp_path / "data")
    reached = []

    class Walk(recorder.Walk):
        def __iter__(self) -> Iterator[ustar.Facts]:
            for facts in super().__iter__():
                yield facts
                if facts[0].endswith(b"app.log") and not reached:
                    reached.append((root / "logs" / "app.log").write_bytes(b"c" * SIZE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "Walk", Walk)
        TapeRecorder(root).commit()
    assert reached
    assert_recorded(root)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is no place for a second process")
@pytest.mark.parametrize("busy", [100, 300], ids=["second process", "first process"])
def test_one_of_many(tmp_path: Path, busy: int) -> None:
    """Two processes look at 256 files in turn."""
    (root := tmp_path / "data").mkdir()
    for number in range(2200):
        (root / f"{number:04}").write_bytes(b"x")
    script = """
        import os, sys
        from tartapefs import TapeRecorder
        from tartapefs.record import settling
        settling._PATIENCE = 0
        TapeRecorder(sys.argv[1], processes=2).commit()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), root]
    with (root / f"{busy:04}").open("ab"):
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.stderr.endswith(
            f"{busy:04}: changed less than a minute ago, and a program has it open for writing\n"
        )
    assert subprocess.run(command, timeout=60).returncode == 0
    assert_recorded(root)


def test_named_with_other_problems(tmp_path: Path, impatient: None) -> None:
    """A file that is written after another is refused is told of, too."""
    root = make_root(tmp_path / "data")
    (root / ("a" * 101)).touch()
    with (root / "logs" / "app.log").open("ab"), pytest.raises(TapeConstraintError) as caught:
        TapeRecorder(root).commit()
    assert [problem.path for problem in caught.value.problems] == ["a" * 101, "logs/app.log"]


def test_where_a_lease_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of NFS has no lease to give without a delegation, which says nothing of writers."""
    monkeypatch.setattr(file_systems, "magic_of", lambda fd: 0x6969)
    root = make_root(tmp_path / "data")
    with (root / "logs" / "app.log").open("ab"):
        TapeRecorder(root).commit()
    assert_recorded(root)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EINVAL, errno.ENOLCK])
def test_where_there_are_no_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    real = fcntl.fcntl

    def refusing(fd: int, command: int, *argument: int) -> object:
        if command == fcntl.F_SETLEASE:
            raise OSError(error, os.strerror(error))
        return real(fd, command, *argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    root = make_root(tmp_path / "data")
    with (root / "logs" / "app.log").open("ab"):
        TapeRecorder(root).commit()
    assert_recorded(root)


@pytest.mark.long
def test_command_line(tmp_path: Path) -> None:
    """All of them are named, each on its line; nothing is written unless they are left out."""
    root = make_root(tmp_path / "data")
    with (root / "logs" / "app.log").open("ab"), (root / "other").open("ab"):
        result = run("record", root)
        assert result.returncode == 4
        lines = result.stderr.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["logs/app.log", "other", "tartapefs"]
        assert "open for writing" in lines[0]
        assert "--skip-busy" in lines[-1]
        assert not os.path.lexists(root / ".tartape")
        result = run("record", root, "--skip-busy", "--json")
        assert result.returncode == 0, result.stderr
        assert [skipped["path"] for skipped in json.loads(result.stdout)["skipped"]] == ["logs/app.log", "other"]
        assert "left out: logs/app.log: " in result.stderr


# Changes that could hide from `stat`


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_fresh_files_are_settled(tmp_path: Path, keep_mtime: bool) -> None:
    """Recorded right after it was written, changed right after that, at equal size: the change shows."""
    root = tmp_path / "tree"
    root.mkdir()
    for turn in range(8):
        file = root / f"{turn}"
        file.write_bytes(b"before")
        TapeRecorder(root, overwrite=True).commit()
        mtime_ns = file.stat().st_mtime_ns
        file.write_bytes(b"after!")
        if keep_mtime:
            os.utime(file, ns=(mtime_ns, mtime_ns))
        with pytest.raises(TapeIntegrityError):
            played(root)


@pytest.mark.parametrize(
    "mtime", [-5, 0, 2_000_000_000, int(time.time()) + 3600], ids=["before", "epoch", "coarse", "now"]
)
def test_fresh_files_of_any_mtime_are_settled(tmp_path: Path, mtime: int) -> None:
    """Also where the time of change is fresh, and the modification time was set to be anything else."""
    root = tmp_path / "tree"
    root.mkdir()
    file = root / "file"
    for _ in range(8):
        file.write_bytes(b"before")
        os.utime(file, (mtime, mtime))
        TapeRecorder(root, overwrite=True).commit()
        file.write_bytes(b"after!")
        os.utime(file, (mtime, mtime))
        with pytest.raises(TapeIntegrityError):
            played(root)
