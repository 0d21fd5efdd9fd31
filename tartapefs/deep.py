"""Reading all contents of a tape once, in parallel: what sealing, `verify --deep` and sampling share.

Rule: contents come through `Filler.fill`, as everything that leaves a tape does, so each member is checked as it is
read. The archive is divided into stretches of some megabytes, each of whole members or of whole blocks of one; threads
fill and hash them, and their results are given in the archive's order.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

from tartapefs import merkle
from tartapefs.fill import Filler
from tartapefs.layout import BLOCK
from tartapefs.member import Member
from tartapefs.tape import Tape

_AT_ONCE = 2 << 20  # bytes of a stretch, about
_MEMBERS_AT_ONCE = 256
THREADS = max(4, len(os.sched_getaffinity(0)))  # more than there are cores: on a slow disk they wait

Result = TypeVar("Result")


class Part(NamedTuple):
    """The bytes `[low, high)` of a member's body: whole blocks."""

    member: Member
    low: int
    high: int


class Stretch(NamedTuple):
    """`[start, stop)` of the archive, and the bodies that lie in it; parts of no bytes are of members without a body."""

    start: int
    stop: int
    parts: list[Part]


def stretches(tape: Tape, block_size: int, start: int = 0) -> Iterator[Stretch]:
    """All of the archive's members from `start` on, which is where a stretch ended."""
    step = max(1, _AT_ONCE // block_size) * block_size
    parts: list[Part] = []
    position = start
    for member in tape.members(start):
        body, low = member.start + BLOCK, max(0, position - member.start - BLOCK)
        if parts and (member.size > step or member.stop - position > _AT_ONCE or len(parts) >= _MEMBERS_AT_ONCE):
            yield Stretch(position, member.start, parts)
            parts, position = [], member.start
        while member.size - low > step:
            yield Stretch(position, body + low + step, [Part(member, low, low + step)])
            low += step
            position = body + low
        parts.append(Part(member, low, member.size))
    if parts:
        yield Stretch(position, parts[-1].member.stop, parts)


class Reader:
    """Fills and hashes stretches; usable from many threads."""

    def __init__(self, filler: Filler, algorithm: str, block_size: int) -> None:
        self._filler = filler
        self._hash = merkle.hasher(algorithm)
        self._block_size = block_size
        self._buffers: SimpleQueue[bytearray] = SimpleQueue()

    def digests(self, stretch: Stretch) -> bytes:
        """Those of all blocks in it, one after the other. Raises what `Filler.fill` raises."""
        size = stretch.stop - stretch.start
        buffer = bytearray(max(size, _AT_ONCE)) if self._buffers.empty() else self._buffers.get()
        if len(buffer) < size:
            buffer = bytearray(size)
        try:
            view = memoryview(buffer)[:size]
            self._filler.fill(view, stretch.start, stretch.stop)
            found = []
            for member, low, high in stretch.parts:
                body = member.start + BLOCK - stretch.start
                for at in range(body + low, body + high, self._block_size):
                    found.append(self._hash(view[at : min(at + self._block_size, body + high)]))
            return b"".join(found)
        finally:
            self._buffers.put(buffer)


def in_order(
    work: Callable[[Stretch], Result], them: Iterator[Stretch], threads: int = THREADS
) -> Iterator[tuple[Stretch, Result]]:
    """Each stretch with what `work` makes of it, in order, by many threads; raises what the first of them raised."""
    waiting: deque[tuple[Stretch, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for stretch in them:
                waiting.append((stretch, pool.submit(work, stretch)))
                if len(waiting) > 2 * threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, rest in waiting:
                rest.cancel()
