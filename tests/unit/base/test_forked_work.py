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
from contextlib import closing
from pathlib import Path

import pytest
from support.reference import Reference

from tartapefs import Tape, TapePlayer, TapeRecorder

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
        parts, forked = [], forked_work._run_forked
        def counted(*arguments):
            parts.append(1)
            return forked(*arguments)
        forked_work._run_forked = counted
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
def test_the_same_index_as_of_one_process(many: Path, tmp_path: Path, owners: bool) -> None:
    """The headers are those of `tarfile`, the rows those that one process writes."""
    text = f"""
        print(TapeRecorder(root, to, anonymize={owners}, processes=2).commit(), len(parts), children())
    """
    result = program(text, many, tmp_path / "forked.db")
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
    passed(program("TapeRecorder(root, to, processes=2).commit(); assert parts == []", root, tmp_path / "few.db"))


CHILDREN = """
import atexit, os, resource, sys

def report():
    \"\"\"Says whether this process had a child that it awaited, or has one, by the kernel's accounts.\"\"\"
    try:
        os.waitpid(-1, os.WNOHANG)
        unwaited = True
    except ChildProcessError:
        unwaited = False
    had_child = unwaited or resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0
    print("forked" if had_child else "not forked", *threads, file=sys.stderr)

threads = []
sys.addaudithook(lambda event, arguments: event.startswith("_thread.start") and threads.append(event))
atexit.register(report)
"""
CALLS = {
    "record": "TapeRecorder(root, to).commit()",
    "play": "list(TapePlayer(Tape.discover(root, to)).play())",
    "read": "TapePlayer(Tape.discover(root, to)).read(0, 1 << 20)",
    "open": "Tape.discover(root, to).open().read()",
    "parts": "[part.read() for part in Tape.discover(root, to).parts(1 << 20)]",
}


def forks(text: str, *arguments: object) -> str:
    """What a program of a single thread says of its children and threads at its end."""
    start = f"{CHILDREN}\nfrom tartapefs import Tape, TapePlayer, TapeRecorder\nroot, to = sys.argv[1:3]\n"
    command = [sys.executable, "-W", "error", "-c", start + text, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("call", CALLS)
def test_a_library_call_forks_nothing(many: Path, tmp_path: Path, call: str) -> None:
    """Nor does it start a thread, from a source that is fast and of small members."""
    index = tmp_path / "index.db"
    if call != "record":
        TapeRecorder(many, index).commit()
    assert forks(CALLS[call], many, index) == "not forked"


@TWO_CORES
@pytest.mark.parametrize("call", ["record", "play"])
def test_a_library_call_forks_if_asked(many: Path, tmp_path: Path, call: str) -> None:
    """The check on the test above."""
    index = tmp_path / "index.db"
    if call != "record":
        TapeRecorder(many, index).commit()
    asked = CALLS[call].replace("to).commit", "to, processes=2).commit").replace("play()", "play(processes=2)")
    assert forks(asked, many, index) == "forked"


@TWO_CORES
@pytest.mark.parametrize("command", ["record", "play --events", "seal --digest sha256"])
def test_a_command_forks(many: Path, tmp_path: Path, command: str) -> None:
    index = tmp_path / "index.db"
    if command != "record":
        TapeRecorder(many, index).commit()
    text = f"from tartapefs.cli import main\nsys.argv = ['tartapefs', *{command.split()}, '--index', to, root]\nmain()"
    assert forks(text, many, index).startswith("forked")


@pytest.mark.parametrize("processes", [0, 3, -1, None, "2"])
def test_another_number_of_processes(many: Path, tmp_path: Path, processes: object) -> None:
    message = f"^processes is 1 or 2, not {processes!r}$"
    with pytest.raises(ValueError, match=message):
        TapeRecorder(many, tmp_path / "index.db", processes=processes)  # type: ignore[arg-type]
    TapeRecorder(many, tmp_path / "index.db").commit()
    with (
        Tape.discover(many, tmp_path / "index.db") as tape,
        closing(TapePlayer(tape)) as player,
        pytest.raises(ValueError, match=message),
    ):
        player.play(processes=processes)  # type: ignore[arg-type]


@TWO_CORES
def test_a_process_with_threads_is_not_forked(many: Path, tmp_path: Path) -> None:
    text = """
        import threading
        ended = threading.Event()
        thread = threading.Thread(target=ended.wait)
        thread.start()
        TapeRecorder(root, to, processes=2).commit()
        assert parts == []
        ended.set()
        thread.join()
        TapeRecorder(root, to, overwrite=True, processes=2).commit()
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
        TapeRecorder(root, to, processes=2).commit()
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
        TapeRecorder(root, to, on_progress=stop, processes=2).commit()
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
        TapeRecorder(root, to, on_progress=kill, processes=2).commit()
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
        TapeRecorder(root, to, on_progress=kill, processes=2).commit()
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


@TWO_CORES
def test_a_second_process_that_fails_before_it_has_read_all() -> None:
    """Its error is told, not that the connection was reset, which the kernel says first."""
    text = """
        (reading, writing), send = os.pipe(), forked_work._send

        def sent(channel, message):
            result = send(channel, message)
            if not message:  # the last one: from here on the child fails, and has ended before its answer is read
                os.write(writing, b"x")
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            return result

        def work(items):
            next(items)
            os.read(reading, 1)
            raise ValueError("the reason")

        forked_work._send = sent
        try:
            forked_work.run(work, iter(range(2000)), 2, 1)
        except ValueError as error:
            assert parts and str(error) == "the reason"
        else:
            raise AssertionError
    """
    passed(program(text, "no", "files"))
