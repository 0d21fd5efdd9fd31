"""Runs a function in a forked process, to use a second core in spite of the GIL.

Rule: a library forks its caller's process only if the caller allows it (`processes=2`), and only if that process has a
single thread; else another thread, which the child lacks, could hold a lock. The child ends before the call returns,
whatever happens. If its parent dies, the child ends, too: its items stop without the message that ends them.
"""

import errno
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any, NoReturn, TypeVar

from tartapefs.base import signals
from tartapefs.base.processes import fork

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_MIN_ITEMS = 2048  # from which on a second process is worth the fork
_BATCH = 256  # items in a message
_MAX_MESSAGE = 1 << 18  # bytes; the kernel takes 208 KiB


def check_processes(processes: int) -> None:
    """Raises ValueError unless the number of processes that a caller allows is 1 or 2."""
    if processes not in (1, 2):
        raise ValueError(f"processes is 1 or 2, not {processes!r}")


def pays(processes: int, item_count: int) -> bool:
    """Whether to fork a process for a part of the work: it is allowed, safe, and faster."""
    return processes > 1 and item_count >= _MIN_ITEMS and _is_safe_and_faster()


def _is_safe_and_faster() -> bool:
    """Whether this process has a single thread, and a second core."""
    try:
        return len(os.listdir("/proc/self/task")) == 1 and len(os.sched_getaffinity(0)) > 1
    except OSError:
        return False


def run(
    work: Callable[[Iterator[_Item]], _Result],
    items: Iterator[_Item],
    processes: int,
    min_items: int = _MIN_ITEMS,
    check: Callable[[list[_Item]], object] | None = None,
) -> _Result:
    """Calls `work(items)`, in a forked process if that pays; returns or raises what that does.

    `min_items`: how many of them are worth a process; 0 if other work is. 256 items must be at most 200 KiB when
    pickled. If no process can be forked, this one calls `work`. `check` is called with all items, some at a time, in
    both processes in turn, before `work` gets them. Raises what `items` or `check` raises, and OSError if the child was
    killed.
    """
    check = check or _no_check
    if processes > 1:
        first = list(islice(items, min_items))
        items = chain(first, items)
        if len(first) == min_items and _is_safe_and_faster():
            return _run_forked(work, items, check)
    return work(chain.from_iterable(_checked(_batches(items), check)))


def _no_check(items: list[Any]) -> None:
    pass


def _batches(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    while batch := list(islice(items, _BATCH)):
        yield batch


def _checked(
    batches: Iterator[list[_Item]], check: Callable[[list[_Item]], object], first: int = 0, step: int = 1
) -> Iterator[list[_Item]]:
    """All batches; each `step`th, from the one with the number `first` on, is checked by this process."""
    for number, batch in enumerate(batches):
        if number % step == first:
            check(batch)
        yield batch


def _run_forked(
    work: Callable[[Iterator[_Item]], _Result], items: Iterator[_Item], check: Callable[[list[_Item]], object]
) -> _Result:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            try:
                pid = fork()
            except OSError:
                return work(chain.from_iterable(_checked(_batches(items), check)))
            if pid == 0:
                ours.close()
                _serve(work, theirs, check)
        try:
            for batch in _checked(_batches(items), check, 1, 2):
                if not _send(ours, batch):  # the child failed; its answer says why
                    break
            else:
                _send(ours, [])
            answer = _answer(ours)
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
    """Returns whether the other end is still open."""
    try:
        channel.send(pickle.dumps(message, 5), socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _answer(channel: socket.socket) -> bytes:
    """What the child says at its end; nothing if it was killed."""
    with suppress(ConnectionResetError):  # it ended before it had read all: the kernel says so once, and first
        return channel.recv(_MAX_MESSAGE)
    return channel.recv(_MAX_MESSAGE)


def _received(channel: socket.socket) -> Iterator[list[Any]]:
    while message := channel.recv(_MAX_MESSAGE):
        batch = pickle.loads(message)
        if not batch:
            return
        yield batch
    raise EOFError("the process that has the items ended")


def _serve(
    work: Callable[[Iterator[Any]], Any], channel: socket.socket, check: Callable[[list[Any]], object]
) -> NoReturn:
    try:
        signals.ignore()
        answer: tuple[Any, Exception | None]
        try:
            answer = work(chain.from_iterable(_checked(_received(channel), check, 0, 2))), None
        except Exception as error:
            answer = None, error
        _send(channel, answer)
    finally:
        os._exit(0)
