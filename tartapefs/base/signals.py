"""Signals: which ones end a process, and the blocks of code that none interrupts.

Rule: a handler may raise anywhere but in an `undisturbed` block. A program that is only starting or ending has nothing
to clean up: then a signal ends it at once, without a message.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # those that ask a process to end


def handle(handler: Callable[[int, FrameType | None], object]) -> None:
    """Sets `handler` for the signals that ask this process to end, but for those that its parent ignores (nohup)."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_once() -> None:
    """Lets these signals end the process at once, with the exit code that a shell gives: 130 for SIGINT."""
    handle(lambda number, frame: os._exit(128 + number))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Blocks all signals in a `with` block; their handlers run at its end.

    Only for this thread: if the process has others, the kernel gives a signal to one of them, and its handler runs at
    once, in the main thread.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ignore() -> None:
    """Ignores these signals, in a forked process that ends with its parent and not before."""
    for number in (*ENDING, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
