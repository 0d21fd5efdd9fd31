"""What signals may do to a process, and when.

Rule: a handler may end what is under way anywhere but in an `undisturbed` block. A program that is only starting or
ending has nothing to clean up: there signals end it without a word.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # those that ask a process to end


def handle(handler: Callable[[int, FrameType | None], object]) -> None:
    """Has `handler` called for each signal that asks this process to end, unless its caller has it ignored (nohup)."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_once() -> None:
    """Has these signals end the process, with the exit code that a shell gives: 130 for SIGINT."""
    handle(lambda number, frame: os._exit(128 + number))


@contextmanager
def undisturbed() -> Iterator[None]:
    """A block that no signal's handler interrupts; what came meanwhile is handled at its end."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ignore() -> None:
    """For a forked process that ends when its parent does, and not before."""
    for number in (*ENDING, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
