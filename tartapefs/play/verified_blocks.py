"""Reads bodies of a sealed tape by whole blocks, and returns only bytes of blocks that have their digest.

Rule: a byte leaves here only as part of a block that this process hashed in its own memory and found equal to the
index's digest, whose path to the seal has been checked. A block that is requested in part is read whole, and stays in
a cache for the neighbouring reads as long as the file's timestamps are those at the time of its read. The caller
checks at each read whether the file is still the recorded one.

Hashing takes longer than reading from the page cache. So the helper process (`helper_process`) takes a part of each
request and, while a sequential reader consumes the answer, reads and hashes the next blocks. (Without digests nothing
is read ahead: a change after the check would be missed. Here the digests show that the bytes are the recorded ones,
and the file is checked when they are requested.) Threads would not help: only one runs Python code at a time,
and each block needs the interpreter lock several times.
"""

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from tartapefs.archive import hash_tree
from tartapefs.archive.member import Member
from tartapefs.base.buffers import aligned, read_all
from tartapefs.base.errors import Difference, Fact, TapeIntegrityError
from tartapefs.index.recording import Recording

_CACHE_BYTES = 3 << 20  # of blocks that were requested in part, or will be
_FREE_BUFFERS = 4
_NOT_SHOWN = "another, which timestamps do not show"

_Stamps = tuple[int, int, int, int]


class _Block:
    """A block in the cache. The holder of `lock` may fill it; `data` is None until its digest was found right.

    Blocks reuse buffers: returning memory to the system and taking it again costs more than reading and hashing.
    """

    __slots__ = ("_buffer", "_free", "data", "lock", "stamps")

    def __init__(self, stamps: _Stamps, free: list[memoryview]) -> None:
        self.stamps = stamps
        self.lock = threading.Lock()
        self.data: memoryview | None = None
        self._free = free
        self._buffer: memoryview | None = None

    def buffer(self, size: int) -> memoryview:
        if self._buffer is None:
            try:
                self._buffer = self._free.pop()
            except IndexError:
                self._buffer = aligned(size)
        if len(self._buffer) < size:
            self._buffer = aligned(size)
        return self._buffer[:size]

    def __del__(self) -> None:  # no thread copies from it any more
        if self._buffer is not None and len(self._free) < _FREE_BUFFERS:
            self._free.append(self._buffer)


class VerifiedBlocks:
    """Reads bodies of `tape`, which is sealed. Usable from many threads."""

    def __init__(self, tape: Recording) -> None:
        self._tape = tape
        self._block_size = tape.block_size
        self._hash = hash_tree.hasher(tape.algorithm)
        self._cache: dict[tuple[int, int], _Block] = {}
        self._free: list[memoryview] = []
        self._capacity = max(8, _CACHE_BYTES // tape.block_size)

    def read(
        self, fd: int, member: Member, part: memoryview, position: int, numbers: Iterable[int] | None = None
    ) -> None:
        """Fills `part` from `position` of the member's body on, from the file `fd`.

        `numbers`: the blocks to fill in; by default all that overlap `part`. Raises TapeIntegrityError if a block does
        not have its digest, and OSError if it cannot be read.
        """
        size, block_size = member.size, self._block_size
        stop = position + len(part)
        if size <= block_size and len(part) == size:  # most small files
            if os.preadv(fd, (part,), 0) < size:
                read_all(fd, part, 0)
            if self._hash(part) != self._tape.block_digests(member, 0, 1):
                raise damage(member, 0, block_size)
            return
        stamps = _stamps(fd)
        first, end = position // block_size, -(-stop // block_size)
        digests = self._tape.block_digests(member, first, end)
        locked_elsewhere: list[tuple[int, _Block, bytes]] = []
        for number in range(first, end) if numbers is None else numbers:
            low = number * block_size
            high = min(low + block_size, size)
            at = (number - first) * hash_tree.SIZE
            digest = digests[at : at + hash_tree.SIZE]
            block = self._cache.get((member.start, number))
            if block is None or block.stamps != stamps:
                if position <= low and high <= stop:
                    view = part[low - position : high - position]
                    read_all(fd, view, low)
                    if self._hash(view) != digest:
                        raise damage(member, number, block_size)
                    continue
                block = self._add(member, number, stamps)
            if block.data is None:
                if not block.lock.acquire(blocking=False):
                    locked_elsewhere.append((number, block, digest))
                    continue
                _fill(fd, member, number, block, digest, self._hash, block_size)
            _copy(block, low, part, position)
        for number, block, digest in locked_elsewhere:
            block.lock.acquire()
            _fill(fd, member, number, block, digest, self._hash, block_size)  # if the other thread could not
            _copy(block, number * block_size, part, position)

    def prefetch(self, fd: int, member: Member, numbers: range, is_stopped: Callable[[], bool]) -> None:
        """Reads and hashes these blocks into the cache, the last one first, until `is_stopped()`.

        Raises as `read` does.
        """
        digests, stamps = self._tape.block_digests(member, numbers.start, numbers.stop), _stamps(fd)
        for number in reversed(numbers):
            if is_stopped():
                return
            block = self._cache.get((member.start, number))
            if block is None or block.stamps != stamps:
                block = self._add(member, number, stamps)
                block.lock.acquire()
                at = (number - numbers.start) * hash_tree.SIZE
                _fill(fd, member, number, block, digests[at : at + hash_tree.SIZE], self._hash, self._block_size)

    def _add(self, member: Member, number: int, stamps: _Stamps) -> _Block:
        """Adds an empty block to the cache, and evicts the oldest one if the cache is full."""
        while len(self._cache) >= self._capacity:
            try:
                del self._cache[next(iter(self._cache))]
            except (KeyError, RuntimeError, StopIteration):
                break  # another thread evicts, too
        block = self._cache[member.start, number] = _Block(stamps, self._free)
        return block


def _stamps(fd: int) -> _Stamps:
    now = os.fstat(fd)
    return now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_size


def _fill(
    fd: int, member: Member, number: int, block: _Block, digest: bytes, hash_: hash_tree.Hash, block_size: int
) -> None:
    """Reads and checks a block whose lock this thread holds, unless it has its data by now; releases the lock."""
    try:
        if block.data is None:
            low = number * block_size
            data = block.buffer(min(block_size, member.size - low))
            read_all(fd, data, low)
            if hash_(data) != digest:
                raise damage(member, number, block_size)
            block.data = data
    finally:
        block.lock.release()


def _copy(block: _Block, low: int, part: memoryview, position: int) -> None:
    """Copies the bytes that `part`, from `position` of a body on, shares with `block`, which begins at `low` of it."""
    assert block.data is not None  # or an error was raised
    a, b = max(low, position), min(low + len(block.data), position + len(part))
    part[a - position : b - position] = block.data[a - low : b - low]


def damage(member: Member, number: int, block_size: int, found: str = _NOT_SHOWN) -> TapeIntegrityError:
    """The error to raise for block `number` of a member, whose contents do not have the recorded digest."""
    start, stop = number * block_size, min((number + 1) * block_size, member.size)
    return TapeIntegrityError(
        member.arc_path,
        [Difference(Fact.CONTENTS, "its digest", found, f"block {number} (bytes {start} to {stop} of its body)")],
        'put the recorded contents back, or run "tartapefs record --force --no-digest" and "tartapefs seal" to have'
        " what is there now",
    )


def with_differences(error: TapeIntegrityError, found: tuple[Difference, ...]) -> TapeIntegrityError:
    """The same damage, together with the differences `found` of the file's other facts."""
    if not found:
        return error
    damaged = [replace(d, found="another") for d in error.differences]
    return TapeIntegrityError(error.member, [*damaged, *found], error.remedy)
