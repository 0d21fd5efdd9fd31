"""Held reads: reads that met drift wait instead of failing (`mount --on-drift hold`).

Rule: a held read occupies no thread. It is an unanswered request, known by its number. The kernel lets its reader wait,
and sends an INTERRUPT when the reader gets a signal: the answer is EINTR then, and EIO once the mount ends.

The kernel sends no INTERRUPT for an asynchronous read (aio), since no thread waits for it, but does not let the process
end before it is answered. So `watch` looks for processes that were killed.
"""

import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tartapefs.base import processes

_CHECK_INTERVAL = 1.0  # seconds between two checks whether held readers, and the mount, are still there
_MAX_INTERRUPTED = 4096  # remembered interrupts of reads that are not held; far fewer reads are in progress


@dataclass(frozen=True, slots=True)
class HeldRead:
    """A read of `size` bytes at `offset` of the archive, by the process `pid`, 0 if that is unknown."""

    pid: int
    offset: int
    size: int
    since: float  # monotonic, seconds


class Hold:
    """The held reads; thread-safe. `answer(number, errno)` fails the request of this number."""

    def __init__(self, answer: Callable[[int, int], None]) -> None:
        self._answer = answer
        self._reads: dict[int, HeldRead] = {}
        self._interrupted = deque[int]([], _MAX_INTERRUPTED)  # numbers of requests that may be held later
        self._has_ended = False
        self._lock = threading.Lock()

    def reads(self) -> list[HeldRead]:
        """The reads held now, the oldest first."""
        return list(self._reads.values())

    def add(self, number: int, thread: int, offset: int, size: int) -> None:
        """Holds the request of this number, by which `thread` asks for `size` bytes at `offset`."""
        read = HeldRead(processes.process_of(thread), offset, size, time.monotonic())
        with self._lock:
            if self._has_ended:
                answer = errno.EIO
            elif number in self._interrupted or processes.is_ending(read.pid):
                answer = errno.EINTR
            else:
                self._reads[number] = read
                return
        self._answer(number, answer)

    def interrupt(self, number: int) -> None:
        """Answers the held request of this number with EINTR; if it is not held yet, it will not be."""
        with self._lock:
            if self._reads.pop(number, None) is None:
                self._interrupted.append(number)
                return
        self._answer(number, errno.EINTR)

    def watch(self, is_mounted: Callable[[], bool], ended: threading.Event) -> None:
        """Until `ended`, releases the reads of processes that were killed; all of them once `is_mounted` is false."""
        while not ended.wait(_CHECK_INTERVAL):
            reads = dict(self._reads)
            killed = set(filter(processes.is_ending, {read.pid for read in reads.values()}))
            for number, read in reads.items():
                if read.pid in killed:
                    self.interrupt(number)
            if self._reads and not is_mounted():
                self.end()

    def end(self) -> None:
        """Answers all held reads with EIO, and holds no more."""
        with self._lock:
            self._has_ended = True
            numbers = list(self._reads)
            self._reads.clear()
        for number in numbers:
            self._answer(number, errno.EIO)
