"""What signals may do to a process, and when.

Rule: a handler may end what is under way anywhere but in an `undisturbed` block.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # those that ask a process to end


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
