"""Copies of an archive: how far one agrees with the tape, and completing it.

Rule: a copy is good up to its first wrong byte, and that is where a transfer goes on. `compare` reads every byte of the
copy and of the tape. `sample` looks at places: every header, which follows from the index alone; in bodies a block
at each stride; holes of the file; and the whole end. Where one is wrong it halves its way back to the last place that
agrees, which finds the first wrong byte if everything behind that is wrong, as after a transfer that broke off. It
misses a wrong stretch that lies between the places.

The end that is compared as a whole is as long as what `extend` may lose when the power fails: it has everything written
to the disk each time that it has added as much.
"""

import errno
import heapq
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from tartapefs.api.tape import Tape
from tartapefs.archive import ustar
from tartapefs.archive.layout import BLOCK
from tartapefs.base import outputs
from tartapefs.base.buffers import aligned
from tartapefs.play.engine import TapePlayer
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.index_diff import first_difference

Progress = Callable[[int, int], None]  # (position in the archive, bytes of it passed so far)

STRIDE = 64 << 20  # bytes between two places that are looked at in one body
TAIL = 64 << 20  # bytes at a copy's end that are compared as a whole, and the most that `extend` leaves unwritten
_PLACE = 4096  # bytes that are looked at in one place
_STRETCHES = 1000  # of zeros, at most, that are told
_SHORTEST = BLOCK  # a run of zeros that is worth telling


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a copy agrees with the tape; all in bytes."""

    size: int  # of the copy
    total_size: int  # of the archive
    good: int  # the copy's longest prefix that agrees: the number to go on from
    wrong: int | None  # the first wrong byte that was seen; at or after `good`
    zeros: tuple[tuple[int, int], ...]  # stretches `[start, stop)` of zeros where the tape has something else
    exact: bool  # every byte was compared, at least up to the first wrong one
    compared: int  # the bytes that were

    @property
    def is_complete(self) -> bool:
        return self.good == self.size == self.total_size

    @property
    def is_copy(self) -> bool:
        """Whether it begins with the name that this archive begins with: what does not is some other file."""
        return self.good >= min(self.size, ustar.LONGEST_UNSPLIT)

    @property
    def beyond(self) -> int:
        """The bytes of the copy beyond the archive's end."""
        return max(0, self.size - self.total_size)


class Copy:
    """The copy at `path`, or on the descriptor `path`. What cannot be sought in is read once, in order.

    `writable`: it must be a regular file, and is locked; OutputBusyError if another holds that lock. `create`: it is
    made if it is not there. Raises OSError as the system does.
    """

    def __init__(self, path: str | int, writable: bool = False, create: bool = False) -> None:
        self._path = path
        flags = os.O_RDWR if writable else os.O_RDONLY
        self._fd = os.dup(path) if isinstance(path, int) else outputs.going_on(path, flags, create)
        try:
            mode = os.fstat(self._fd).st_mode
            self.is_stream = isinstance(path, int) or not (stat.S_ISREG(mode) or stat.S_ISBLK(mode))
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if writable and isinstance(path, str):
                if not stat.S_ISREG(mode):
                    raise OSError(errno.EINVAL, "not a regular file", path)
                outputs.lock(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> "Copy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """The size now, in bytes; of a stream nobody knows it."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Names the copy in the errors of the system calls in the block, which know its descriptor alone."""
        try:
            yield
        except OSError as error:
            error.filename = self._path if isinstance(self._path, str) else "standard input"
            raise

    def read(self, offset: int, size: int) -> bytes:
        """The bytes `[offset, offset + size)`, fewer only at the end; of a stream the next ones, wherever they lie."""
        parts, missing = [], size
        with self._named():
            while missing:
                data = os.read(self._fd, missing) if self.is_stream else os.pread(self._fd, missing, offset)
                if not data:
                    break
                parts.append(data)
                missing, offset = missing - len(data), offset + len(data)
        return b"".join(parts)

    def holes(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The holes of the file in `[start, stop)`: never written, or given back. None where that cannot be told."""
        while start < stop:
            try:
                hole = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError:
                return
            if hole >= stop:
                return
            try:
                start = os.lseek(self._fd, hole, os.SEEK_DATA)
            except OSError:  # no data until the end
                start = stop
            yield hole, min(start, stop)

    def truncate(self, size: int) -> None:
        """Cuts it to `size` bytes, on the disk."""
        with self._named():
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)

    def extend(self, player: TapePlayer, on_progress: Progress) -> None:
        """Appends what is missing, and has it written to the disk.

        May be interrupted at any moment, by a power failure too: what is there then is good but for at most the last
        `TAIL` bytes. Raises what `TapePlayer.readinto` raises, and OSError (ENOSPC and the like).
        """
        buffer = aligned(CHUNK)
        begun = position = self.size
        synced = position
        while position < player.tape.total_size:
            data = buffer[: player.readinto(buffer, position)]
            with self._named():
                while data:
                    count = os.pwrite(self._fd, data, position)
                    data, position = data[count:], position + count
                if position - synced >= TAIL - CHUNK:
                    os.fdatasync(self._fd)
                    synced = position
            on_progress(position, position - begun)
        with self._named():
            os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that a comparison reads the disk


def _nothing(position: int, done: int) -> None:
    pass


def compare(
    player: TapePlayer, copy: Copy, start: int = 0, to_the_end: bool = True, on_progress: Progress = _nothing
) -> Agreement:
    """Compares every byte of `copy` from `start` on. `to_the_end`: goes on after a wrong one, to find all zeros.

    Of a stream, no more than `TAIL` bytes beyond the archive's end are read, and counted.
    Raises what `TapePlayer.read` raises.
    """
    total, position, wrong = player.tape.total_size, start, None
    zeros = _Zeros()
    while position < total and (wrong is None or to_the_end):
        found = copy.read(position, min(CHUNK, total - position))
        if not found:
            break
        wanted = player.read(position, len(found))
        if found != wanted:
            if wrong is None:
                wrong = position + first_difference(found, wanted)
            zeros.look(position, found, wanted)
        position += len(found)
        on_progress(position, position - start)
    size = position
    if not copy.is_stream:
        size = copy.size
    else:
        while size < total + TAIL and (more := copy.read(size, CHUNK)):  # it may have no end
            size += len(more)
    good = position if wrong is None else wrong
    return Agreement(size, total, good, wrong, zeros.stretches(), True, position - start)


class _Zeros:
    """Collects runs of zeros in a copy where the tape has something else."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []

    def look(self, offset: int, found: bytes, wanted: bytes) -> None:
        # Runs at an edge may be a part of a longer one.
        for match in re.finditer(rb"\A\0+|\0{%d,}|\0+\Z" % _SHORTEST, found):
            low, high = match.span()
            if wanted.count(0, low, high) < high - low:
                self.add(offset + low, offset + high)

    def add(self, start: int, stop: int) -> None:
        if self._runs and self._runs[-1][1] >= start:
            self._runs[-1] = self._runs[-1][0], stop
        elif len(self._runs) < 2 * _STRETCHES:
            self._runs.append((start, stop))

    def stretches(self) -> tuple[tuple[int, int], ...]:
        return tuple((start, stop) for start, stop in self._runs if stop - start >= _SHORTEST)[:_STRETCHES]


def sample(
    tape: Tape, player: TapePlayer | None, copy: Copy, start: int = 0, on_progress: Progress = _nothing
) -> Agreement:
    """Looks at `copy` in places, from `start` on, as the module says. Without a `player`, at its headers alone.

    Raises what `TapePlayer.read` raises, and TapeFormatError for a damaged index.
    """
    if player is not None and min(copy.size, tape.total_size) - start <= TAIL:
        return compare(player, copy, start, on_progress=on_progress)
    return _Sampling(tape, player, copy, start, on_progress).run()


class _Sampling:
    def __init__(
        self, tape: Tape, player: TapePlayer | None, copy: Copy, start: int, on_progress: Progress = _nothing
    ) -> None:
        self._tape, self._player, self._copy = tape, player, copy
        self._start, self._on_progress = start, on_progress
        self._size = copy.size
        self._limit = min(self._size, tape.total_size)
        self._compared = 0

    def run(self) -> Agreement:
        agreed = passed = self._start  # up to where bytes agree that are not all zeros, and up to where any agree
        good, wrong = self._limit, None
        zeros = _Zeros()
        zeros_from = -1
        for start, stop, header in self._places():
            found = self._copy.read(start, stop - start)
            wanted = self._wanted(start, stop) if header is None else header[: stop - start]
            self._compared += len(wanted)
            self._on_progress(start, start - self._start)
            if found == wanted:
                passed = stop
                if any(wanted):
                    if zeros_from >= 0:
                        zeros.add(zeros_from, self._end_of_zeros(zeros_from, start))
                        zeros_from = -1
                    agreed = stop
                continue
            at = start + first_difference(found, wanted)
            filled = not any(found[at - start :])  # with zeros: then it says nothing that zeros agree
            if wrong is None:
                good, wrong = self._first_wrong(min(agreed if filled else passed, at), at, filled)
            if any(found) and zeros_from >= 0:
                zeros.add(zeros_from, self._end_of_zeros(zeros_from, start))
                zeros_from = -1
            if not filled:
                agreed = stop
            elif zeros_from < 0:
                zeros_from = self._start_of_zeros(min(agreed, at), at)
        if zeros_from >= 0:
            zeros.add(zeros_from, self._end_of_zeros(zeros_from, self._limit))
        return Agreement(self._size, self._tape.total_size, good, wrong, zeros.stretches(), False, self._compared)

    def _wanted(self, start: int, stop: int) -> bytes:
        assert self._player is not None  # or there is no place in a body
        return self._player.read(start, stop - start)

    def _places(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Where to look, in order, each with the header that lies there or None for what the player has to say."""
        if self._player is None:
            yield from self._headers(self._limit)
            return
        tail = self._limit - TAIL
        yield from heapq.merge(self._headers(tail), self._in_holes(tail), key=lambda place: place[0])
        for start in range(tail, self._limit, CHUNK):
            yield start, min(start + CHUNK, self._limit), None

    def _headers(self, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
        for member in self._tape.members(self._start, limit):
            if member.start >= self._start:
                yield member.start, min(member.start + BLOCK, self._limit), member.header()
            if self._player is not None:
                body = member.start + BLOCK
                first = body + (max(0, self._start - body) // STRIDE + 1) * STRIDE
                for start in range(first, min(body + member.size, limit), STRIDE):
                    yield start, min(start + _PLACE, self._limit), None
        if self._player is None and limit > self._tape.total_size - 2 * BLOCK:
            yield max(self._start, self._tape.total_size - 2 * BLOCK), limit, bytes(2 * BLOCK)

    def _in_holes(self, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
        """The start, the middle and the end of each hole."""
        for low, high in self._copy.holes(self._start, limit):
            middle, last = (low + high) // 2, max(low, high - _PLACE)
            for start in sorted({low, middle, last}):
                yield start, min(start + _PLACE, high), None

    def _agrees(self, start: int, stop: int) -> int | None:
        """Whether the copy agrees in `[start, stop)`: the offset of the first wrong byte, or None."""
        found, wanted = self._copy.read(start, stop - start), self._wanted(start, stop)
        self._compared += len(wanted)
        return None if found == wanted else start + first_difference(found, wanted)

    def _first_wrong(self, low: int, wrong: int, filled: bool) -> tuple[int, int]:
        """The good prefix's length and the first wrong byte, between what agrees below `low` and a byte that is wrong.

        `filled`: with zeros. Then nothing is learnt where both have zeros, and the good prefix is taken to end before.
        """
        if self._player is None:
            return low, wrong
        high = wrong
        while high - low > CHUNK:
            middle = (low + high) // 2
            at = self._agrees(middle, middle + _PLACE)
            if at is not None:
                high = wrong = at
            elif filled and not any(self._copy.read(middle, _PLACE)):
                high = middle
            else:
                low = middle + _PLACE
        at = self._agrees(low, high) if low < high else None
        return (high, wrong) if at is None else (at, at)

    def _start_of_zeros(self, low: int, high: int) -> int:
        """Where the zeros begin that reach up to `high`: not below `low`."""
        while high - low > CHUNK:
            middle = (low + high) // 2
            if any(self._copy.read(middle, _PLACE)):
                low = middle
            else:
                high = middle
        return low + len(self._copy.read(low, high - low).rstrip(b"\0"))

    def _end_of_zeros(self, low: int, high: int) -> int:
        """Where the zeros end that begin at `low`: not above `high`."""
        while high - low > CHUNK:
            middle = (low + high) // 2
            if any(self._copy.read(middle, _PLACE)):
                high = middle + _PLACE
            else:
                low = middle
        data = self._copy.read(low, high - low)
        return low + len(data) - len(data.lstrip(b"\0"))
