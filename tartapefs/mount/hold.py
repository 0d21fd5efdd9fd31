"""Reads that met drift and wait, where they would get an error: `mount --on-drift hold`.

Rule: a held read occupies no thread. It is a request that has not been answered yet, known by its number. The kernel
has its reader wait, and sends an INTERRUPT when the reader gets a signal: the answer is EINTR then, and EIO once the
mount ends.

The kernel sends no INTERRUPT for a read that no thread waits for in person, such as one by aio, but does not let the
process end before it is answered. So `watch` looks for processes that were killed.
"""

import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tartapefs.base import processes

_INTERVAL = 1.0  # seconds between two looks at whether held readers, and the mount, are still there
_REMEMBERED = 4096  # interrupts of reads that are not held; of these, far fewer are under way


@dataclass(frozen=True, slots=True)
class HeldRead:
    """`pid`: of the process that reads, 0 where that is not known; `size` bytes at `offset` of the archive."""

    pid: int
    offset: int
    size: int
    since: float  # monotonic, seconds


class Hold:
    """The reads that are held. `answer(number, errno)` fails the request of this number. Usable from many threads."""

    def __init__(self, answer: Callable[[int, int], None]) -> None:
        self._answer = answer
        self._reads: dict[int, HeldRead] = {}
        self._interrupted = deque[int]([], _REMEMBERED)  # before they were held, if they ever are
        self._has_ended = False
        self._lock = threading.Lock()

    def reads(self) -> list[HeldRead]:
        """What is held now, the first first."""
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
        """Lets go of the request of this number, or does not hold it when it comes to that."""
        with self._lock:
            if self._reads.pop(number, None) is None:
                self._interrupted.append(number)
                return
        self._answer(number, errno.EINTR)

    def watch(self, is_mounted: Callable[[], bool], ended: threading.Event) -> None:
        """Until `ended`, lets go of the reads of processes that were killed; of all once `is_mounted` says no."""
        while not ended.wait(_INTERVAL):
            reads = dict(self._reads)
            killed = set(filter(processes.is_ending, {read.pid for read in reads.values()}))
            for number, read in reads.items():
                if read.pid in killed:
                    self.interrupt(number)
            if self._reads and not is_mounted():
                self.end()

    def end(self) -> None:
        """Lets go of all, and holds no more."""
        with self._lock:
            self._has_ended = True
            numbers = list(self._reads)
            self._reads.clear()
        for number in numbers:
            self._answer(number, errno.EIO)
