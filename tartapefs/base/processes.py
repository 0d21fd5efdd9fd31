"""Processes and threads: starting them, waiting for their end, and what /proc shows of others.

Where /proc hides other users' processes (`hidepid`), a function says so or assumes that the process is alive.
"""

import errno
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

from tartapefs.base import signals

_PF_EXITING = 0x4  # of the flags in /proc/PID/stat, see proc(5)


def fork() -> int:
    """Calls `os.fork` with signals blocked: Python loses what a handler raises within its hooks at a fork."""
    with signals.undisturbed():
        return os.fork()


def start_thread(target: Callable[..., object], *arguments: object, name: str | None = None) -> threading.Thread:
    """Starts a daemon thread, which ends with the process at the latest.

    Raises OSError if a limit forbids another: one on processes counts threads, one on memory their stacks.
    """
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no thread can be started, for a limit on processes or memory") from None
    return thread


def close_all_but(*descriptors: int) -> None:
    """Closes every other descriptor of this process."""
    for name in os.listdir("/proc/self/fd"):  # not by the limit, which may be a billion or none
        if int(name) not in descriptors:
            with suppress(OSError):  # the one that this list was read from
                os.close(int(name))


def await_end(process: int, seconds: float) -> bool:
    """Waits until the process of this descriptor, of `os.pidfd_open`, has ended; returns whether it has in time."""
    ended = select.poll()  # `select.select` takes no descriptor above 1023
    ended.register(process, select.POLLIN)
    return bool(ended.poll(1000 * seconds))


def process_of(thread: int) -> int:
    """The process of a thread, whose number FUSE gives for a reader; that number itself if /proc does not show it."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            return int(file.read().partition(b"\nTgid:")[2].split(maxsplit=1)[0])
    except (OSError, IndexError):
        return thread


def command_of(pid: int) -> bytes | None:
    """The name of the program that a process runs, at most 15 bytes; None if /proc does not show it."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().removesuffix(b"\n")
    except OSError:
        return None


def positions_in(pid: int, device: str, inode: int) -> list[int]:
    """The positions of the process' descriptors of one file, that `inode` of the file system `device` (`major:minor`).

    Empty if /proc does not show them. Reads that name an offset, and mappings, do not move a position.
    """
    found = []
    with suppress(OSError, ValueError):
        with open(f"/proc/{pid}/mountinfo", "rb") as lines:  # in its own namespace a mount has a number of its own
            mounts = {line.split(b" ", 3)[0] for line in lines if line.split(b" ", 3)[2] == device.encode()}
        for name in os.listdir(f"/proc/{pid}/fdinfo"):
            with suppress(OSError, ValueError), open(f"/proc/{pid}/fdinfo/{name}", "rb") as file:
                facts = dict(line.split(b":\t", 1) for line in file.read().splitlines() if b":\t" in line)
                if facts.get(b"mnt_id") in mounts and int(facts.get(b"ino", inode)) == inode:
                    found.append(int(facts[b"pos"]))
    return found


def is_ending(pid: int) -> bool:
    """Whether a process has ended, or was killed and only waits for the system calls of its threads.

    False for 0, which stands for a process in another PID namespace, and for one that /proc hides.
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
