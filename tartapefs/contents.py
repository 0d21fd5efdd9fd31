"""Bodies of a sealed tape: read by whole blocks, of which none is given out that does not have its digest.

Rule: a byte leaves here only as part of a block that was hashed in this process's own memory and found equal to the
digest that the index gives, whose way up to the seal has been checked. What was asked for of a block in part is read
whole, and the block kept for the neighbouring reads, as long as the file's timestamps stay as they were when it was
read. Whether the file is still the one recorded is for the caller to see, at each read.
"""

import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from tartapefs import merkle
from tartapefs.errors import Difference, TapeIntegrityError
from tartapefs.member import Member
from tartapefs.tape import Tape

_KEPT_BYTES = 4 << 20  # of blocks that were asked for in part
_UNSEEN = "another, which timestamps do not show"
_SHARED = 1 << 18  # bytes of whole blocks, from which on a second thread is worth waking


class Contents:
    """Reads bodies of `tape`, which is sealed. Usable from many threads."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._block_size = tape.block_size
        self._hash = merkle.hasher(tape.algorithm)
        self._kept: dict[tuple[int, int], tuple[tuple[int, ...], bytearray]] = {}
        self._most_kept = max(4, _KEPT_BYTES // tape.block_size)
        self._second = _Second()

    def __del__(self) -> None:
        if hasattr(self, "_second"):
            self._second.close()

    def read(self, fd: int, member: Member, part: memoryview, position: int) -> None:
        """Fills `part` from `position` of the member's body on, out of the file `fd`.

        Raises TapeIntegrityError where a block does not have its digest, and OSError where it cannot be read.
        """
        size, block_size = member.size, self._block_size
        stop = position + len(part)
        first, end = position // block_size, -(-stop // block_size)
        digests = self._tape.block_digests(member, first, end)
        # Of these blocks only the first and the last can be wanted in part.
        whole_first = first if position == first * block_size else first + 1
        whole_end = end if stop == min(end * block_size, size) else end - 1
        for number in {first, end - 1}:
            if not whole_first <= number < whole_end:
                low, high = number * block_size, min((number + 1) * block_size, size)
                block = self._block(fd, member, number, high - low, digests[(number - first) * merkle.SIZE :])
                a, b = max(low, position), min(high, stop)
                part[a - position : b - position] = memoryview(block)[a - low : b - low]
        if whole_first >= whole_end:
            return
        read = partial(self._read_whole, fd, member, part, position, digests, first)
        middle = (whole_first + whole_end + 1) // 2
        if (whole_end - whole_first) * block_size > _SHARED and self._second.begin(partial(read, middle, whole_end)):
            try:
                read(whole_first, middle)
            finally:
                failure = self._second.end()
            if failure is not None:
                raise failure
        else:
            read(whole_first, whole_end)

    def _read_whole(
        self,
        fd: int,
        member: Member,
        part: memoryview,
        position: int,
        digests: bytes,
        first: int,
        low: int,
        high: int,
    ) -> None:
        """Blocks `[low, high)`, all of which lie in `part`, each read into it and hashed there."""
        block_size, hash_, size = self._block_size, self._hash, merkle.SIZE
        for number in range(low, high):
            at = number * block_size
            view = part[at - position : min(at + block_size, member.size) - position]
            read_all(fd, view, at)
            which = (number - first) * size
            if hash_(view) != digests[which : which + size]:
                raise damage(member, number, block_size)

    def _block(self, fd: int, member: Member, number: int, size: int, digests: bytes) -> bytearray:
        """A whole block, checked: one that is kept, or else read and kept."""
        key, now = (member.start, number), os.fstat(fd)
        stamps = now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_size
        if (kept := self._kept.get(key)) is not None and kept[0] == stamps:
            return kept[1]
        block = bytearray(size)
        read_all(fd, memoryview(block), number * self._block_size)
        if self._hash(block) != digests[: merkle.SIZE]:
            raise damage(member, number, self._block_size)
        while len(self._kept) >= self._most_kept:
            try:
                del self._kept[next(iter(self._kept))]
            except (KeyError, RuntimeError, StopIteration):
                break  # another thread was at it
        self._kept[key] = stamps, block
        return block


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
        'put the recorded contents back, or run "tartapefs record --force" to record again',
    )


def as_shown(error: TapeIntegrityError, found: tuple[Difference, ...]) -> TapeIntegrityError:
    """The same damage, of a file of which `found` is not as recorded either."""
    if not found:
        return error
    damaged = [Difference(d.what, d.recorded, "another") for d in error.differences]
    return TapeIntegrityError(error.member, [*damaged, *found], error.remedy)


class _Second:
    """A second thread, for one piece of work at a time; hashing and reading let both run."""

    def __init__(self) -> None:
        self._free = threading.Lock()
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._started = False

    def begin(self, work: Callable[[], None]) -> bool:
        """Has the work begun, unless the thread has other work; then `end` is to be called, whatever happens."""
        if not self._free.acquire(blocking=False):
            return False
        if not self._started:
            self._started = True
            threading.Thread(target=self._serve, daemon=True).start()
        self._work.put(work)
        return True

    def end(self) -> BaseException | None:
        """Waits until it is done, and gives what it raised."""
        try:
            return self._done.get()
        finally:
            self._free.release()

    def close(self) -> None:
        """Ends the thread, once it has nothing to do."""
        self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException as error:
                self._done.put(error)
            else:
                self._done.put(None)
