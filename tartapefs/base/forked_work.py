"""Runs a function in a forked process, to use a second core in spite of the GIL.

Rule: it is forked only where nothing can go wrong by that: from a process of a single thread, so that no lock is held
by one that the copy does not have. It ends before the call returns, whatever happens, and with its parent at the
latest: it then finds no more items, and no end of them either.
"""

import errno
import os
import pickle
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, NoReturn, TypeVar

from tartapefs.base import signals

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

MANY = 2048  # members, from which on a second process is worth the fork
_BATCH = 256  # items in a message
_MOST = 1 << 18  # bytes of a message; the kernel takes 208 KiB


def fork() -> int:
    """`os.fork`, undisturbed: what a handler raises within Python's own hooks at a fork would be lost."""
    with signals.undisturbed():
        return os.fork()


def thread(target: Callable[..., object], *arguments: object, name: str | None = None) -> threading.Thread:
    """A thread that has begun, and ends with the process at the latest.

    Raises OSError where there may be no more: a limit on processes counts threads, one on memory their stacks.
    """
    begun = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    try:
        begun.start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no thread can be started, for a limit on processes or memory") from None
    return begun


def close_all_but(*kept: int) -> None:
    """Closes every descriptor of this process but these."""
    for name in os.listdir("/proc/self/fd"):  # not by the limit, which may be a billion or none
        if int(name) not in kept:
            with suppress(OSError):  # the one that this list was read from
                os.close(int(name))


def await_end(process: int, seconds: float) -> bool:
    """Until the process of this descriptor, of `os.pidfd_open`, has ended, or for so long; whether it has."""
    ended = select.poll()  # `select.select` takes no descriptor above 1023
    ended.register(process, select.POLLIN)
    return bool(ended.poll(1000 * seconds))


def is_possible() -> bool:
    """Whether this process may be forked, and has a second core to gain by it."""
    try:
        return len(os.listdir("/proc/self/task")) == 1 and len(os.sched_getaffinity(0)) > 1
    except OSError:
        return False


def apart(work: Callable[[Iterator[_Item]], _Result], items: Iterator[_Item]) -> _Result:
    """What `work(items)` returns or raises, done by another process. 256 items are to be at most 200 KiB, pickled.

    Where there may be no other process, this one does it. Raises what `items` raises, and OSError if the other process
    was killed.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            try:
                pid = fork()
            except OSError:
                return work(items)
            if pid == 0:
                ours.close()
                _serve(work, theirs)
        try:
            while batch := list(islice(items, _BATCH)):
                if not _send(ours, batch):  # it has failed, and says why
                    break
            else:
                _send(ours, [])
            answer = ours.recv(_MOST)
        finally:
            ours.close()
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
    if not answer:
        raise OSError(errno.EIO, "the process for a part of the work was killed")
    result, error = pickle.loads(answer)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _send(channel: socket.socket, message: Any) -> bool:
    """Returns whether anybody is there to get it."""
    try:
        channel.send(pickle.dumps(message, 5), socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _received(channel: socket.socket) -> Iterator[Any]:
    while message := channel.recv(_MOST):
        batch = pickle.loads(message)
        if not batch:
            return
        yield from batch
    raise EOFError("the process that has the items ended")


def _serve(work: Callable[[Iterator[Any]], Any], channel: socket.socket) -> NoReturn:
    try:
        signals.ignore()
        answer: tuple[Any, Exception | None]
        try:
            answer = work(_received(channel)), None
        except Exception as error:
            answer = None, error
        _send(channel, answer)
    finally:
        os._exit(0)
