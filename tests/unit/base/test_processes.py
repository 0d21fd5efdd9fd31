"""Processes and threads: forks with signals, limits, descriptors, and what /proc shows."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from tartapefs.base import processes


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process of `cat`, which has answered: the kernel names it after its program only a moment after the exec."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"x")
        assert process.stdout.read(1) == b"x"
        yield process
        process.kill()


@pytest.mark.parametrize("hook", ["before", "after_in_parent"])
def test_a_signal_during_a_fork_is_not_lost(hook: str) -> None:
    """Python ignores what is raised in its hooks at a fork, the exception that a signal's handler raises included."""
    text = f"""
        import os, signal, sys
        from tartapefs.base import processes
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        os.register_at_fork({hook}=lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            if processes.fork() == 0:
                os._exit(0)
        finally:
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (7, "")


def test_inherited_descriptors_are_closed_whatever_the_limit() -> None:
    """Not by counting up to it: it may be a billion, or below what is open."""
    code = (
        "import os, resource\n"
        "from tartapefs.base import processes\n"
        "os.dup2(1, 900)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "processes.close_all_but(0, 1, 2)\n"
        "print(os.listdir('/proc/self/fd'))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "['0', '1', '2', '3']\n", result.stderr  # and what lists them


def test_a_thread_that_cannot_start_is_an_error_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python raises RuntimeError, which no caller expects of a limit."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(BlockingIOError, match="no thread can be started"):
        processes.start_thread(print)


def test_a_thread_runs_and_does_not_keep_the_process() -> None:
    got: list[object] = []
    thread = processes.start_thread(got.append, 1, name="one")
    thread.join(60)
    assert got == [1]
    assert (thread.name, thread.daemon) == ("one", True)


def test_the_end_of_a_process_is_awaited(child: subprocess.Popen[bytes]) -> None:
    descriptor = os.pidfd_open(child.pid)
    try:
        assert not processes.await_end(descriptor, 0)
        child.kill()
        assert processes.await_end(descriptor, 60)
    finally:
        os.close(descriptor)


def test_the_process_of_a_thread() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(processes.process_of(threading.get_native_id())))
    thread.start()
    thread.join()
    assert found == [os.getpid()]
    assert processes.process_of(1 << 30) == 1 << 30  # there is none


def test_the_command_of_a_process(child: subprocess.Popen[bytes]) -> None:
    assert processes.command_of(child.pid) == b"cat"
    assert processes.command_of(1 << 30) is None


def test_a_process_that_ends() -> None:
    assert not processes.is_ending(0)
    assert not processes.is_ending(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not processes.is_ending(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert processes.is_ending(process.pid)  # not waited for yet
    assert processes.is_ending(process.pid)
