"""Reading all contents of a tape once, in parallel: what sealing and `verify --deep` share.

Rule: contents come through `Filler.fill`, as everything that leaves a tape does, so each member is checked as it is
read. The archive is divided into stretches of some megabytes, each of whole members or of whole blocks of one; threads
fill and hash them, and their results are given in the archive's order.
"""

import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.archive.layout import BLOCK
from tartapefs.archive.member import Member
from tartapefs.base.buffers import aligned
from tartapefs.base.errors import Difference, Fact, OutputError, TapeIntegrityError
from tartapefs.base.saved_state import SavedState
from tartapefs.play.assemble import Filler
from tartapefs.play.verified_blocks import damage, with_differences
from tartapefs.source.drift import inspect, unreadable

_AT_ONCE = 2 << 20  # bytes of a stretch, about
_MEMBERS_AT_ONCE = 256
_SAVE_EVERY = 10.0  # seconds
THREADS = max(4, len(os.sched_getaffinity(0)))  # more than there are cores: on a slow disk they wait

Item = TypeVar("Item")
Result = TypeVar("Result")


class Part(NamedTuple):
    """The bytes `[low, high)` of a member's body: whole blocks."""

    member: Member
    low: int
    high: int


class Stretch(NamedTuple):
    """`[start, stop)` of the archive, and the bodies that lie in it; of members without a body parts of no bytes."""

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
        self._hash = hash_tree.hasher(algorithm)
        self._block_size = block_size
        self._buffers: SimpleQueue[memoryview] = SimpleQueue()

    def digests(self, stretch: Stretch) -> bytes:
        """Those of all blocks in it, one after the other. Raises what `Filler.fill` raises."""
        size = stretch.stop - stretch.start
        buffer = aligned(max(size, _AT_ONCE)) if self._buffers.empty() else self._buffers.get()
        if len(buffer) < size:
            buffer = aligned(size)
        try:
            view = buffer[:size]
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
    work: Callable[[Item], Result], them: Iterator[Item], threads: int = THREADS
) -> Iterator[tuple[Item, Result]]:
    """Each item with what `work` makes of it, in order, by many threads; raises what the first of them raised."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in them:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 2 * threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, rest in waiting:
                rest.cancel()


def sampled(tape: Tape, share: float, some: random.Random) -> Iterator[Stretch]:
    """Blocks that are chosen by chance, each one with the probability `share`."""
    block_size = tape.block_size
    for member in tape.members():
        count = hash_tree.blocks(member.size, block_size)
        if count == 1:
            if some.random() < share:
                yield stretch_of(Part(member, 0, member.size))
            continue
        for number in sorted(some.sample(range(count), _how_many(count, share, some))):
            low = number * block_size
            yield stretch_of(Part(member, low, min(low + block_size, member.size)))


def _how_many(count: int, share: float, some: random.Random) -> int:
    """`share` of `count`; of what is left of one, one with that probability."""
    whole, rest = divmod(count * share, 1)
    return min(count, int(whole) + (some.random() < rest))


def stretch_of(part: Part) -> Stretch:
    body = part.member.start + BLOCK
    return Stretch(body + part.low, body + part.high, [part])


class DeepState:
    """How far a comparison of all contents has come, and what it found, in a state if the path of one is given.

    `position`: up to where in the archive contents have been compared. Raises OutputError for a file that is no such
    state or one of another tape, OutputBusyError while another comparison has it, and OSError.
    """

    def __init__(self, tape: Tape, path: str | None) -> None:
        self.position = 0
        self.found: list[TapeIntegrityError] = []
        self._seal = tape.seal
        self._saved = time.monotonic()
        self._state: SavedState | None = None
        if path is not None:
            self._state = SavedState(path, "verification")
            try:
                self._load(self._state, tape.total_size)
            except BaseException:
                self._state.close()
                raise

    def _load(self, state: SavedState, total_size: int) -> None:
        records = list(state.records())
        state.check_whole()
        for saved in map(json.loads, records):
            if saved["seal"] != self._seal or not 0 <= saved["position"] <= total_size:
                raise OutputError(state.path, "is the state of another tape; remove it to begin anew")
            self.position = saved["position"]
            self.found = [
                TapeIntegrityError(member, [_saved_difference(*facts) for facts in differences], remedy)
                for member, differences, remedy in saved["found"]
            ]

    def passed(self, position: int, wrong: list[TapeIntegrityError]) -> None:
        self.position = position
        self.found += wrong
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        if self._state is None:
            return
        found = [
            (error.member, [(d.subject, d.recorded, d.found) for d in error.differences], error.remedy)
            for error in self.found
        ]
        self._state.replace(json.dumps({"seal": self._seal, "position": self.position, "found": found}).encode())
        self._saved = time.monotonic()

    def remove(self) -> None:
        """To be called at the end: the next comparison begins anew."""
        if self._state is not None:
            self._state.remove()

    def close(self) -> None:
        if self._state is not None:
            self._state.close()

    def __enter__(self) -> "DeepState":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Verifier:
    """Compares contents with the digests of a sealed tape; usable from many threads.

    `filler` is one that does not hold bodies to their digests. `blocks` counts those that were read.
    """

    def __init__(self, tape: Tape, filler: Filler) -> None:
        self._tape, self._filler = tape, filler
        self._reader = Reader(filler, tape.algorithm, tape.block_size)
        self.blocks = 0

    def all(self, them: Iterable[Stretch]) -> Iterator[tuple[Stretch, list[TapeIntegrityError]]]:
        """Each stretch, in order, with all that is not as recorded in it. Raises TapeFormatError for a bad index."""
        for stretch, found in in_order(self._differences, iter(them)):
            self.blocks += sum(hash_tree.blocks(part.high - part.low, self._tape.block_size) for part in stretch.parts)
            yield stretch, found

    def member(self, member: Member) -> list[TapeIntegrityError]:
        """What is not as recorded in the contents of one member."""
        if not member.size:
            return []
        step = self._tape.block_size
        lows = range(0, member.size, step)
        parts = (Part(member, low, min(low + step, member.size)) for low in lows)
        return next(filter(None, (self._differences(stretch_of(part)) for part in parts)), [])

    def _differences(self, stretch: Stretch) -> list[TapeIntegrityError]:
        try:
            return self._wrong_blocks(stretch, self._reader.digests(stretch))
        except (TapeIntegrityError, OSError) as error:
            if len(stretch.parts) == 1:
                return [_as_difference(stretch.parts[0].member, error)]
        # One of them at least: so each by itself.
        found: list[TapeIntegrityError] = []
        for part in stretch.parts:
            if part.high > part.low:
                found += self._differences(stretch_of(part))
        return found

    def _wrong_blocks(self, stretch: Stretch, digests: bytes) -> list[TapeIntegrityError]:
        block_size = self._tape.block_size
        found, at = [], 0
        for member, low, high in stretch.parts:
            first, stop = low // block_size, hash_tree.blocks(high, block_size)
            size = (stop - first) * hash_tree.SIZE
            if not size:
                continue
            recorded = self._tape.block_digests(member, first, stop)
            if recorded != digests[at : at + size]:
                for number in range(first, stop):
                    place = (number - first) * hash_tree.SIZE
                    if recorded[place : place + hash_tree.SIZE] != digests[at + place : at + place + hash_tree.SIZE]:
                        shown = inspect(member, self._filler.source, self._filler.at_home)
                        found.append(with_differences(damage(member, number, block_size), shown))
            at += size
        return found


def _saved_difference(subject: str, recorded: str, found: str) -> Difference:
    what, _, part = subject.partition(" of ")
    return Difference(Fact(what), recorded, found, part)


def _as_difference(member: Member, error: TapeIntegrityError | OSError) -> TapeIntegrityError:
    if isinstance(error, TapeIntegrityError):
        return error
    return TapeIntegrityError(member.arc_path, [unreadable(error)])
