"""Bodies of a sealed tape: read by whole blocks, of which none is given out that does not have its digest.

Rule: a byte leaves here only as part of a block that was hashed in this process's own memory and found equal to the
digest that the index gives, whose way up to the seal has been checked. What was asked for of a block in part is read
whole, and the block kept for the neighbouring reads, as long as the file's timestamps stay as they were when it was
read. Whether the file is still the one recorded is for the caller to see, at each read.

Hashing takes longer than reading what the system has in memory. So the helper process (`helper`) takes a part of each
request and, while a reader that goes on takes what it asked for, reads and hashes the blocks that come next. (Without
digests nothing is read ahead: a change after the look would be missed. Here the bytes themselves are known to be the
recorded ones, and the file is looked at when they are asked for.) Threads would wait for each other: one of Python's
runs at a time, and each block has it change hands some times.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterable

from tartapefs.archive import hash_tree
from tartapefs.archive.member import Member
from tartapefs.base.buffers import aligned
from tartapefs.base.errors import Difference, TapeIntegrityError
from tartapefs.index.recording import Recording

_KEPT_BYTES = 3 << 20  # of blocks that were asked for in part, or will be
_BUFFERS_KEPT = 4
_UNSEEN = "another, which timestamps do not show"

_Stamps = tuple[int, int, int, int]


class _Block:
    """A block that is kept, or about to be. Who holds `lock` may fill it; `data` is there once its digest was right.

    Buffers go from one block to the next: memory that is given back to the system and taken again costs more than what
    is done with it.
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

    def __del__(self) -> None:  # nobody copies from it any more
        if self._buffer is not None and len(self._free) < _BUFFERS_KEPT:
            self._free.append(self._buffer)


class Contents:
    """Reads bodies of `tape`, which is sealed. Usable from many threads."""

    def __init__(self, tape: Recording) -> None:
        self._tape = tape
        self._block_size = tape.block_size
        self._hash = hash_tree.hasher(tape.algorithm)
        self._kept: dict[tuple[int, int], _Block] = {}
        self._free: list[memoryview] = []
        self._most_kept = max(8, _KEPT_BYTES // tape.block_size)

    def read(
        self, fd: int, member: Member, part: memoryview, position: int, numbers: Iterable[int] | None = None
    ) -> None:
        """Fills `part` from `position` of the member's body on, out of the file `fd`.

        `numbers`: of the blocks that are to be filled in; all that overlap `part` by default. Raises TapeIntegrityError
        where a block does not have its digest, and OSError where it cannot be read.
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
        others_have: list[tuple[int, _Block, bytes]] = []
        for number in range(first, end) if numbers is None else numbers:
            low = number * block_size
            high = min(low + block_size, size)
            at = (number - first) * hash_tree.SIZE
            digest = digests[at : at + hash_tree.SIZE]
            block = self._kept.get((member.start, number))
            if block is None or block.stamps != stamps:
                if position <= low and high <= stop:
                    view = part[low - position : high - position]
                    read_all(fd, view, low)
                    if self._hash(view) != digest:
                        raise damage(member, number, block_size)
                    continue
                block = self._keep(member, number, stamps)
            if block.data is None:
                if not block.lock.acquire(blocking=False):
                    others_have.append((number, block, digest))
                    continue
                _fill(fd, member, number, block, digest, self._hash, block_size)
            _copy(block, low, part, position)
        for number, block, digest in others_have:
            block.lock.acquire()
            _fill(fd, member, number, block, digest, self._hash, block_size)  # if the other one could not
            _copy(block, number * block_size, part, position)

    def keep(self, fd: int, member: Member, numbers: range, ends: Callable[[], bool]) -> None:
        """Reads and hashes these blocks, the last one first, and keeps them for who will ask for them; until `ends()`.

        Raises as `read` does.
        """
        digests, stamps = self._tape.block_digests(member, numbers.start, numbers.stop), _stamps(fd)
        for number in reversed(numbers):
            if ends():
                return
            block = self._kept.get((member.start, number))
            if block is None or block.stamps != stamps:
                block = self._keep(member, number, stamps)
                block.lock.acquire()
                at = (number - numbers.start) * hash_tree.SIZE
                _fill(fd, member, number, block, digests[at : at + hash_tree.SIZE], self._hash, self._block_size)

    def _keep(self, member: Member, number: int, stamps: _Stamps) -> _Block:
        """A new block, to be filled; another one goes for it."""
        while len(self._kept) >= self._most_kept:
            try:
                del self._kept[next(iter(self._kept))]
            except (KeyError, RuntimeError, StopIteration):
                break  # another thread was at it
        block = self._kept[member.start, number] = _Block(stamps, self._free)
        return block


def _stamps(fd: int) -> _Stamps:
    now = os.fstat(fd)
    return now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_size


def _fill(
    fd: int, member: Member, number: int, block: _Block, digest: bytes, hash_: hash_tree.Hash, block_size: int
) -> None:
    """Reads and checks a block whose lock is held, unless it is there by now, and lets it go."""
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
    """What `part`, which begins at `position` of a body, wants of a block, which begins at `low` of it."""
    assert block.data is not None  # or an error was raised
    a, b = max(low, position), min(low + len(block.data), position + len(part))
    part[a - position : b - position] = block.data[a - low : b - low]


class EndedEarlyError(OSError):
    """A file has fewer bytes than were asked for."""


def read_all(fd: int, view: memoryview, position: int) -> None:
    """Fills `view` from `position` of the file on. Raises OSError, EndedEarlyError among them."""
    got = 0
    while got < len(view):
        count = os.preadv(fd, (view[got:],), position + got)
        if count == 0:
            raise EndedEarlyError(errno.EIO, "the file ended early")
        got += count


def damage(member: Member, number: int, block_size: int, found: str = _UNSEEN) -> TapeIntegrityError:
    """What to raise for block `number` of a member, whose digest is another now."""
    start, stop = number * block_size, min((number + 1) * block_size, member.size)
    where = f"block {number} (bytes {start} to {stop} of its body)"
    return TapeIntegrityError(
        member.arc_path,
        [Difference(f"the contents of {where}", "its digest", found)],
        'put the recorded contents back, or run "tartapefs record --force --no-digest" and "tartapefs seal" to have'
        " what is there now",
    )


def as_shown(error: TapeIntegrityError, found: tuple[Difference, ...]) -> TapeIntegrityError:
    """The same damage, of a file of which `found` is not as recorded either."""
    if not found:
        return error
    damaged = [Difference(d.what, d.recorded, "another") for d in error.differences]
    return TapeIntegrityError(error.member, [*damaged, *found], error.remedy)
