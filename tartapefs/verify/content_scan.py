"""Reads and hashes all contents of a tape, in parallel: for sealing and for `verify --deep`.

Rule: contents come through `Assembler.fill`, as everything that leaves a tape does, so each member is checked as it is
read. The archive is divided into extents of some megabytes, each of whole members or of whole blocks of one. Threads
read and hash extents; results come in the archive's order.
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
from tartapefs.archive.member import Member
from tartapefs.base.buffers import aligned
from tartapefs.base.errors import Difference, Fact, OutputError, TapeIntegrityError
from tartapefs.base.saved_state import SavedState
from tartapefs.play.assemble import Assembler
from tartapefs.play.verified_blocks import damage, with_differences
from tartapefs.source.drift import inspect, unreadable

_EXTENT_BYTES = 2 << 20  # about
_EXTENT_MEMBERS = 256
_SAVE_EVERY = 10.0  # seconds
THREADS = max(4, len(os.sched_getaffinity(0)))  # more than there are cores: on a slow disk they wait

Item = TypeVar("Item")
Result = TypeVar("Result")


class BodyRange(NamedTuple):
    """The bytes `[start, stop)` of a member's body, in whole blocks; empty for a member without a body."""

    member: Member
    start: int
    stop: int


class Extent(NamedTuple):
    """`[start, stop)` of the archive, and what lies in it of members' bodies."""

    start: int
    stop: int
    bodies: list[BodyRange]


def extents(tape: Tape, block_size: int, start: int = 0) -> Iterator[Extent]:
    """Divides the archive's members, from `start` on, into extents. An extent must have ended at `start`."""
    step = max(1, _EXTENT_BYTES // block_size) * block_size
    bodies: list[BodyRange] = []
    position = start
    for member in tape.members(start):
        body = member.body
        done = max(0, position - body)
        is_full = member.size > step or member.stop - position > _EXTENT_BYTES or len(bodies) >= _EXTENT_MEMBERS
        if bodies and is_full:
            yield Extent(position, member.start, bodies)
            bodies, position = [], member.start
        while member.size - done > step:
            yield Extent(position, body + done + step, [BodyRange(member, done, done + step)])
            done += step
            position = body + done
        bodies.append(BodyRange(member, done, member.size))
    if bodies:
        yield Extent(position, bodies[-1].member.stop, bodies)


def extent_of(body: BodyRange) -> Extent:
    """The extent of this range alone."""
    start = body.member.body
    return Extent(start + body.start, start + body.stop, [body])


def sampled_extents(tape: Tape, share: float, chance: random.Random) -> Iterator[Extent]:
    """Extents of single blocks, each block chosen with the probability `share`."""
    block_size = tape.block_size
    for member in tape.members():
        count = hash_tree.block_count(member.size, block_size)
        if count == 1:
            if chance.random() < share:
                yield extent_of(BodyRange(member, 0, member.size))
            continue
        for number in sorted(chance.sample(range(count), _sample_size(count, share, chance))):
            start = number * block_size
            yield extent_of(BodyRange(member, start, min(start + block_size, member.size)))


def _sample_size(count: int, share: float, chance: random.Random) -> int:
    """`share` of `count`, rounded up or down by chance, so that it is `share` in the mean."""
    whole, rest = divmod(count * share, 1)
    return min(count, int(whole) + (chance.random() < rest))


class BlockHasher:
    """Reads extents and hashes their blocks; usable from many threads."""

    def __init__(self, assembler: Assembler, algorithm: str, block_size: int) -> None:
        self._assembler = assembler
        self._hash = hash_tree.hasher(algorithm)
        self._block_size = block_size
        self._buffers: SimpleQueue[memoryview] = SimpleQueue()

    def digests(self, extent: Extent) -> bytes:
        """The digests of all blocks in it, joined. Raises what `Assembler.fill` raises."""
        size = extent.stop - extent.start
        buffer = aligned(max(size, _EXTENT_BYTES)) if self._buffers.empty() else self._buffers.get()
        if len(buffer) < size:
            buffer = aligned(size)
        try:
            view = buffer[:size]
            self._assembler.fill(view, extent.start, extent.stop)
            found = []
            for member, start, stop in extent.bodies:
                body = member.body - extent.start
                for at in range(body + start, body + stop, self._block_size):
                    found.append(self._hash(view[at : min(at + self._block_size, body + stop)]))
            return b"".join(found)
        finally:
            self._buffers.put(buffer)


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS
) -> Iterator[tuple[Item, Result]]:
    """Yields each item with `function(item)`, in order, computed by threads; raises the first error in that order."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > 2 * threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, rest in waiting:
                rest.cancel()


class VerificationState:
    """How far a comparison of all contents has come, and what it found; kept in the file at `path`, if one is given.

    Attributes: `position`, up to which offset of the archive contents have been compared; `found`, what differs. Raises
    OutputError for a file that is no such state or one of another tape, OutputBusyError while another comparison uses
    it, and OSError.
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

    def add(self, position: int, found: list[TapeIntegrityError]) -> None:
        """Notes what was found up to `position`; saves it every ten seconds."""
        self.position = position
        self.found += found
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
        """Removes the file, at the end: the next comparison starts again."""
        if self._state is not None:
            self._state.remove()

    def close(self) -> None:
        if self._state is not None:
            self._state.close()

    def __enter__(self) -> "VerificationState":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Verifier:
    """Compares contents with the digests of a sealed tape; usable from many threads.

    `assembler` must not itself compare bodies with their digests. Attributes: `blocks`, how many were read.
    """

    def __init__(self, tape: Tape, assembler: Assembler) -> None:
        self._tape, self._assembler = tape, assembler
        self._hasher = BlockHasher(assembler, tape.algorithm, tape.block_size)
        self.blocks = 0

    def verify(self, extents: Iterable[Extent]) -> Iterator[tuple[Extent, list[TapeIntegrityError]]]:
        """Yields each extent, in order, with all that differs in it. Raises TapeFormatError for a damaged index."""
        for extent, found in map_in_order(self._differences, extents):
            self.blocks += sum(
                hash_tree.block_count(body.stop - body.start, self._tape.block_size) for body in extent.bodies
            )
            yield extent, found

    def verify_member(self, member: Member) -> list[TapeIntegrityError]:
        """What differs in the first block of the member that does."""
        step = self._tape.block_size
        bodies = (BodyRange(member, start, min(start + step, member.size)) for start in range(0, member.size, step))
        return next(filter(None, (self._differences(extent_of(body)) for body in bodies)), [])

    def _differences(self, extent: Extent) -> list[TapeIntegrityError]:
        try:
            return self._damaged_blocks(extent, self._hasher.digests(extent))
        except (TapeIntegrityError, OSError) as error:
            if len(extent.bodies) == 1:
                return [_as_difference(extent.bodies[0].member, error)]
        # At least one member differs or cannot be read: look at each alone.
        found: list[TapeIntegrityError] = []
        for body in extent.bodies:
            if body.stop > body.start:
                found += self._differences(extent_of(body))
        return found

    def _damaged_blocks(self, extent: Extent, digests: bytes) -> list[TapeIntegrityError]:
        block_size, size = self._tape.block_size, hash_tree.SIZE
        found, position = [], 0
        for member, start, stop in extent.bodies:
            first, end = start // block_size, hash_tree.block_count(stop, block_size)
            if first == end:
                continue
            recorded = self._tape.block_digests(member, first, end)
            read = digests[position : position + (end - first) * size]
            position += len(read)
            if recorded == read:
                continue
            for number in range(first, end):
                at = (number - first) * size
                if recorded[at : at + size] != read[at : at + size]:
                    shown = inspect(member, self._assembler.source, self._assembler.at_home)
                    found.append(with_differences(damage(member, number, block_size), shown))
        return found


def _saved_difference(subject: str, recorded: str, found: str) -> Difference:
    what, _, part = subject.partition(" of ")
    return Difference(Fact(what), recorded, found, part)


def _as_difference(member: Member, error: TapeIntegrityError | OSError) -> TapeIntegrityError:
    if isinstance(error, TapeIntegrityError):
        return error
    return TapeIntegrityError(member.arc_path, [unreadable(error)])
