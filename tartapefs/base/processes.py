"""Other processes, as /proc shows them: those that read an archive."""

import os

_PF_EXITING = 0x4  # of the flags in /proc/PID/stat, see proc(5)


def process_of(thread: int) -> int:
    """The process of a thread, whose number is what FUSE tells of a reader; that number itself where it is hidden."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            return int(file.read().partition(b"\nTgid:")[2].split(maxsplit=1)[0])
    except (OSError, IndexError):
        return thread


def command_of(pid: int) -> bytes | None:
    """The name of the program that a process runs, of at most 15 bytes; None where that cannot be seen."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().removesuffix(b"\n")
    except OSError:
        return None


def is_ending(pid: int) -> bool:
    """Whether a process has ended, or was killed and waits for nothing but the system calls of its threads.

    False for 0, which stands for a process in another PID namespace, and where it cannot be seen.
    """
    if not pid:
        return False
    try:
        return all(
            _flags(f"/proc/{pid}/task/{thread}/stat") & _PF_EXITING for thread in os.listdir(f"/proc/{pid}/task")
        )
    except FileNotFoundError:
        return not _is_hidden(pid)
    except OSError:
        return False


def _flags(path: str) -> int:
    try:
        with open(path, "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[6])
    except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
        return _PF_EXITING


def _is_hidden(pid: int) -> bool:
    """Whether the process exists, although /proc does not show it to this user (`hidepid`)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
