"""Statistics of what a mount has delivered: which parts of the archive, how fast, how far each reader is.

Rule: a request costs one append to a deque, which CPython makes atomic. Requests are evaluated when a snapshot is
taken, or in a batch once there are many. Memory is bounded, whatever is read: by the length of a batch, the number of
ranges, and the number of samples of each open reader.

Coverage is a list of sorted ranges. If there are too many, the smallest gaps between them are closed, and the bytes in
these gaps are counted as `unsure`: the ranges may then contain bytes that were not delivered, at most so many.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain, count, islice
from operator import add, itemgetter, sub
from time import monotonic

MAX_RANGES = 4096
PART_SHIFT = 44  # bits of a handle that number it; those above are the number of the part that it reads
_BATCH = 8192  # requests: 1.6 MB
_SAMPLES = 64  # of a reader
_SAMPLES_A_BATCH = 16
_LAST_REQUESTS = 4  # requests of a reader, which may arrive in any order: the furthest is its position
_RATE_PERIOD = 10.0  # seconds over which a rate is the mean, if there are samples that far back
_IN_FLIGHT = 8 << 20  # bytes by which the requests of a sequential reader may overtake one another

Request = tuple[int, int, int, float]  # handle, offset, size (bytes), when (monotonic, seconds)
_size_of = itemgetter(2)


class Coverage:
    """The parts of the archive that were delivered, as sorted half-open `ranges` that do not touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.unsure = 0  # bytes within the ranges that may not have been delivered

    def include(self, starts: Iterable[int], stops: Iterable[int]) -> None:
        """Adds ranges, none of them empty, by their starts and stops.

        With starts and stops each sorted, the first n ranges end before the next begins exactly if the n-th stop is
        below the next start. So this only sorts plain numbers, four times as fast as a loop over ranges.
        """
        starts, stops = sorted(chain(self._starts, starts)), sorted(chain(self._stops, stops))
        gaps = list(map(sub, islice(starts, 1, None), stops))
        gaps_left = [at for at, gap in enumerate(gaps) if gap > 0]
        if len(gaps_left) >= MAX_RANGES:
            gaps_left.sort(key=gaps.__getitem__, reverse=True)
            self.unsure += sum(gaps[at] for at in gaps_left[MAX_RANGES - 1 :])
            gaps_left = sorted(gaps_left[: MAX_RANGES - 1])
        self._starts = starts[:1] + [starts[at + 1] for at in gaps_left]
        self._stops = [stops[at] for at in gaps_left] + stops[-1:]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._stops, strict=True))

    @property
    def size(self) -> int:
        """Bytes within the ranges; all but at most `unsure` of them were delivered."""
        return sum(self._stops) - sum(self._starts)


@dataclass(frozen=True, slots=True)
class Sample:
    """The progress of a reader at one time: `delivered` bytes, the last of which ended at `position`."""

    when: float  # monotonic, seconds
    delivered: int
    position: int


class ReaderProgress:
    """The progress of the reader behind an open handle.

    `pid`: of the process that opened it, 0 if unknown. `part`: the number, from 0, of the part that it reads.
    """

    def __init__(self, pid: int, part: int) -> None:
        self.pid = pid
        self.part = part
        self._samples = deque([Sample(monotonic(), 0, 0)], _SAMPLES)
        self._ends = deque[int]([], _LAST_REQUESTS)  # of its last requests

    @property
    def last(self) -> Sample:
        return self._samples[-1]

    def add(self, requests: Sequence[Request]) -> None:
        stride = -(-len(requests) // _SAMPLES_A_BATCH)
        delivered = self.last.delivered
        if not delivered:
            self._samples[0] = Sample(self.last.when, 0, requests[0][1])
        for at in range(0, len(requests), stride):
            some = requests[at : at + stride]
            delivered += sum(map(_size_of, some))
            self._ends.extend(offset + size for _, offset, size, _ in some[-_LAST_REQUESTS:])
            self._samples.append(Sample(some[-1][3], delivered, max(self._ends)))

    def rate(self, now: float) -> float:
        """Bytes a second over the last seconds."""
        before = self._before(now)
        return (self.last.delivered - before.delivered) / max(now - before.when, 1e-3)

    def seconds_left(self, now: float, stop: int) -> float | None:
        """Seconds until it has read up to `stop` at this rate; None if it does not read sequentially."""
        before, last, rate = self._before(now), self.last, self.rate(now)
        delivered = last.delivered - before.delivered
        in_order = abs(last.position - before.position - delivered) <= _IN_FLIGHT
        return (stop - last.position) / rate if in_order and rate > 0 else None

    def _before(self, now: float) -> Sample:
        return next((s for s in reversed(self._samples) if s.when <= now - _RATE_PERIOD), self._samples[0])


class ReadStatistics:
    """What one mount has delivered. Thread-safe; `delivered` never waits."""

    def __init__(self) -> None:
        self.readers: dict[int, ReaderProgress] = {}  # by handle; changes are atomic
        self._handles = count(1)
        self._requests: deque[Request] = deque()
        self._processing = threading.Lock()
        self._total = 0
        self._coverage = Coverage()

    def opened(self, pid: int, part: int = 0) -> int:
        """Returns a new handle of this part, opened by the process `pid`."""
        handle = part << PART_SHIFT | next(self._handles)
        self.readers[handle] = ReaderProgress(pid, part)
        return handle

    def closed(self, handle: int) -> None:
        self.readers.pop(handle, None)

    def delivered(self, handle: int, offset: int, size: int) -> None:
        """Counts a request that got `size` bytes at `offset` of the archive."""
        if size:  # there is nothing at the archive's end
            self._requests.append((handle, offset, size, monotonic()))
        if len(self._requests) >= _BATCH and self._processing.acquire(blocking=False):
            try:
                self._process()
            finally:
                self._processing.release()

    def snapshot(self) -> tuple[int, Coverage, list[ReaderProgress]]:
        """The bytes delivered, counting those delivered twice twice; the coverage; and the open readers."""
        with self._processing:
            self._process()
            return self._total, copy(self._coverage), list(self.readers.values())

    def _process(self) -> None:
        if not self._requests:
            return
        pop = self._requests.popleft  # only this thread does
        batch = [pop() for _ in range(len(self._requests))]
        _, offsets, sizes, _ = zip(*batch, strict=True)
        of_handle: dict[int, list[Request]] = defaultdict(list)
        for request in batch:
            of_handle[request[0]].append(request)
        for handle, requests in of_handle.items():
            if reader := self.readers.get(handle):
                reader.add(requests)
        self._total += sum(sizes)
        self._coverage.include(offsets, map(add, offsets, sizes))
