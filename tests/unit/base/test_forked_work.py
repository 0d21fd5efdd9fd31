"""A second process for a large recording: the same index, the same errors, and nothing that stays behind.

Each test runs a program of its own, since a process with the threads of a test runner is never forked.
"""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support.reference import Reference

from tartapefs import Tape, TapeRecorder
from tartapefs.base import forked_work

FILES = 6000

TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is no place for a second process")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More members than one process writes alone, one of them a link."""
    root = tmp_path_factory.mktemp("many") / "data"
    for number in range(FILES):
        if number % 500 == 0:
            (folder := root / f"{number:05}").mkdir(parents=True)
        (folder / f"file-{number}").touch()
    (root / "link").symlink_to("00000")
    return root


def program(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program after a line that makes `parts` count the recordings for which a process was forked."""
    start = """
        import os, sys
        from tartapefs import TapeRecorder
        from tartapefs.base import forked_work
        from tartapefs.index import reader as index
        parts, run = [], forked_work.run
        def counted(work, items):
            parts.append(1)
            return run(work, items)
        forked_work.run = counted
        def children():
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                return file.read().split()
        root, to = sys.argv[1:3]
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(start) + textwrap.dedent(text)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def passed(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@TWO_CORES
@pytest.mark.parametrize("owners", [True, False], ids=["anonymous", "owners"])
def test_the_same_index_as_of_one_process(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owners: bool
) -> None:
    """The headers are those of `tarfile`, the rows those that one process writes."""
    text = f"""
        print(TapeRecorder(root, to, anonymize={owners}).commit(), len(parts), children())
    """
    result = program(text, many, tmp_path / "forked.db")
    monkeypatch.setattr(forked_work, "is_possible", lambda: False)
    fingerprint = TapeRecorder(many, tmp_path / "alone.db", anonymize=owners).commit()
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{fingerprint} 1 []\n", "")
    with Tape.from_index(tmp_path / "forked.db") as tape, Tape.from_index(tmp_path / "alone.db") as alone:
        assert tape.rows_are_sound()
        assert tape.rows_digest == alone.rows_digest
        assert list(tape.members()) == list(alone.members())
        assert tape.member_count == len(list(tape.members())) == FILES + FILES // 500 + 2
    if owners:
        reference = Reference(many)
        headers = b"".join(reference.read(start, 512) for start in reference.starts.values())
        assert hashlib.sha256(headers).hexdigest() == fingerprint


def test_a_few_members_fork_nothing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(100):
        (root / str(number)).touch()
    passed(program("TapeRecorder(root, to).commit(); assert parts == []", root, tmp_path / "few.db"))


@TWO_CORES
def test_a_process_with_threads_is_not_forked(many: Path, tmp_path: Path) -> None:
    text = """
        import threading
        ended = threading.Event()
        thread = threading.Thread(target=ended.wait)
        thread.start()
        TapeRecorder(root, to).commit()
        assert parts == []
        ended.set()
        thread.join()
        TapeRecorder(root, to, overwrite=True).commit()
        assert parts == [1]
    """
    passed(program(text, many, tmp_path / "index.db"))


AFTER = """
    else:
        raise AssertionError("it was recorded")
    assert parts == [1]
    assert children() == []
    assert not [name for name in os.listdir(os.path.dirname(to)) if name.startswith(os.path.basename(to))]
"""


@TWO_CORES
def test_a_disk_that_refuses(many: Path, tmp_path: Path) -> None:
    """What the second process is told is what the caller is told."""
    text = """
    import errno, resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        TapeRecorder(root, to).commit()
    except OSError as error:
        assert error.errno in (errno.EIO, errno.ENOSPC) and error.filename == to, repr(error)
    """
    passed(program(textwrap.dedent(text) + textwrap.dedent(AFTER), many, tmp_path / "index.db"))


@TWO_CORES
@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "BrokenPipeError", "RuntimeError"])
def test_an_interrupt(many: Path, tmp_path: Path, raised: str) -> None:
    """It is what the caller gets, whatever it is, and nothing stays behind."""
    text = f"""
    def stop(members, size):
        if members > 4000:
            raise {raised}
    try:
        TapeRecorder(root, to, on_progress=stop).commit()
    except {raised}:
        pass
    """
    passed(program(textwrap.dedent(text) + textwrap.dedent(AFTER), many, tmp_path / "index.db"))


@TWO_CORES
def test_a_second_process_that_is_killed(many: Path, tmp_path: Path) -> None:
    text = """
    import signal
    def kill(members, size):
        for child in children():
            os.kill(int(child), signal.SIGKILL)
    try:
        TapeRecorder(root, to, on_progress=kill).commit()
    except OSError as error:
        assert "was killed" in str(error)
    """
    passed(program(textwrap.dedent(text) + textwrap.dedent(AFTER), many, tmp_path / "index.db"))


@TWO_CORES
def test_a_first_process_that_is_killed(many: Path, tmp_path: Path) -> None:
    """The second one ends with it, and whoever records next is not kept out."""
    text = """
        import signal
        def kill(members, size):
            if children():
                print(*children(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        TapeRecorder(root, to, on_progress=kill).commit()
    """
    index = tmp_path / "index.db"
    result = program(text, many, index)
    assert result.returncode == -signal.SIGKILL
    assert not index.exists()
    child = Path("/proc", result.stdout.strip(), "cmdline")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    TapeRecorder(many, index).commit()
    with Tape.from_index(index) as tape:
        assert tape.rows_are_sound()
