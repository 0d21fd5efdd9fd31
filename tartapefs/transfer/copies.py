"""Copies of an archive: how far one agrees with the tape, and completing it.

Rule: a copy is good up to its first wrong byte, and a transfer continues from there. `compare` reads every byte of the
copy and of the tape. `sample` compares samples: every header, which follows from the index alone; a block at each
stride of a body; the holes of the file; and the whole end. At the first sample that differs it searches, by halves,
from the last one that agrees. That finds the first wrong byte if everything behind it is wrong, as after a transfer
that broke off. Damage that lies between two samples is missed.

The end that is compared as a whole is as long as what `extend` may lose in a power failure: it syncs each time it has
added as much.
"""

import errno
import heapq
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

from tartapefs.api.tape import Tape
from tartapefs.archive.layout import BLOCK, FOOTER
from tartapefs.archive.names import LONGEST_UNSPLIT
from tartapefs.base import outputs
from tartapefs.base.buffers import aligned
from tartapefs.index.recording import Recording
from tartapefs.play.engine import TapePlayer
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.index_diff import first_difference

Progress = Callable[[int, int], None]  # (position in the archive, bytes of it passed so far)

STRIDE = 64 << 20  # bytes between two samples of one body
TAIL = 64 << 20  # bytes at a copy's end that are compared as a whole, and the most that `extend` leaves unsynced
_SAMPLE = 4096  # bytes
_MOST_RUNS = 1000  # of zeros, in a report
_SHORTEST_RUN = BLOCK  # bytes


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a copy agrees with the tape.

    Attributes, in bytes: `size` of the copy; `total_size` of the archive; `good`, the length of the longest prefix that
    agrees, to continue from; `wrong`, the offset of the first wrong byte that was seen, at or after `good`, or None;
    `zeros`, runs `[start, stop)` of zeros where the tape has something else, which `compare` alone looks for; `exact`:
    every byte was compared, at least up to the first wrong one; `compared`, how many bytes were. `generation`: the
    number, from 1, of the generation that the archive ended with when the copy was complete; None for any other copy.
    """

    size: int
    total_size: int
    good: int
    wrong: int | None
    zeros: tuple[tuple[int, int], ...]
    exact: bool
    compared: int
    generation: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.good == self.size == self.total_size

    def is_copy_of(self, tape: Recording) -> bool:
        """Whether it begins with the name that the archive of `tape` begins with. If not, it is some other file."""
        name = tape.facts.root_name + b"/"
        return self.good >= min(self.size, LONGEST_UNSPLIT if len(name) <= LONGEST_UNSPLIT else BLOCK + len(name))

    @property
    def beyond(self) -> int:
        """How many bytes the copy has beyond the archive's end."""
        return max(0, self.size - self.total_size)


class Copy:
    """The copy at `path`, or on the descriptor `path`. A stream is read once, in order.

    `writable`: requires a regular file, and locks it; raises OutputBusyError if another program holds the lock.
    `create`: creates it if it does not exist. Raises OSError as the system does.

    Attributes: `is_stream`, whether it has no offsets.
    """

    def __init__(self, path: str | int, writable: bool = False, create: bool = False) -> None:
        self._path = path
        flags = os.O_RDWR if writable else os.O_RDONLY
        self._fd = os.dup(path) if isinstance(path, int) else outputs.open_existing(path, flags, create)
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
        """The size now, in bytes. A stream has none."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Puts the copy's name into errors of the system calls in the block, which have only its descriptor."""
        try:
            yield
        except OSError as error:
            error.filename = self._path if isinstance(self._path, str) else "standard input"
            raise

    def read(self, offset: int, size: int) -> bytes:
        """Reads the bytes `[offset, offset + size)`, fewer only at the end; of a stream, the next ones."""
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
        """Yields the file's holes in `[start, stop)`; none if the file system does not report them."""
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
        """Cuts it to `size` bytes, and syncs."""
        with self._named():
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)

    def extend(self, player: TapePlayer, on_progress: Progress) -> None:
        """Appends what is missing, and syncs.

        After an interruption, also by a power failure, all but the last `TAIL` bytes of the copy are good. Raises what
        `TapePlayer.readinto` raises, and OSError (ENOSPC and the like).
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


def compare(player: TapePlayer, copy: Copy, start: int = 0, on_progress: Progress = _nothing) -> Agreement:
    """Compares every byte of `copy` from `start` on, and finds all runs of zeros.

    Of a stream, reads and counts at most `TAIL` bytes beyond the archive's end. Raises what `TapePlayer.read` raises.
    """
    total, position, wrong = player.tape.total_size, start, None
    zeros = _ZeroRuns()
    while position < total:
        found = copy.read(position, min(CHUNK, total - position))
        if not found:
            break
        wanted = player.read(position, len(found))
        if found != wanted:
            if wrong is None:
                wrong = position + first_difference(found, wanted)
            zeros.find(position, found, wanted)
        position += len(found)
        on_progress(position, position - start)
    size = position
    if not copy.is_stream:
        size = copy.size
    else:
        while size < total + TAIL and (more := copy.read(size, CHUNK)):  # it may have no end
            size += len(more)
    good = position if wrong is None else wrong
    return _with_generation(
        player.tape, copy, Agreement(size, total, good, wrong, zeros.runs(), True, position - start)
    )


def _with_generation(tape: Recording, copy: Copy, found: Agreement) -> Agreement:
    """Tells whether the copy was complete before the tape was extended: then it is good up to its footer.

    A search that takes its zeros for those of a transfer that broke off ends too early if zeros precede the footer.
    """
    for number, generation in enumerate(tape.generations[:-1], 1):
        if (found.wrong, found.size) == (generation.stop, generation.stop + FOOTER):
            if copy.is_stream:
                is_footer = any(start <= generation.stop and stop == found.size for start, stop in found.zeros)
            else:
                is_footer = not any(copy.read(generation.stop, FOOTER))
            if is_footer:
                return replace(found, good=generation.stop, zeros=(), generation=number)
    return found


class _ZeroRuns:
    """Collects runs of zeros in a copy where the tape has something else."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []

    def find(self, offset: int, found: bytes, wanted: bytes) -> None:
        # Runs at an edge may be a part of a longer one.
        for match in re.finditer(rb"\A\0+|\0{%d,}|\0+\Z" % _SHORTEST_RUN, found):
            low, high = match.span()
            if wanted.count(0, low, high) < high - low:
                self._add(offset + low, offset + high)

    def _add(self, start: int, stop: int) -> None:
        if self._runs and self._runs[-1][1] >= start:
            self._runs[-1] = self._runs[-1][0], stop
        elif len(self._runs) < 2 * _MOST_RUNS:
            self._runs.append((start, stop))

    def runs(self) -> tuple[tuple[int, int], ...]:
        return tuple((start, stop) for start, stop in self._runs if stop - start >= _SHORTEST_RUN)[:_MOST_RUNS]


def sample(
    tape: Tape, player: TapePlayer | None, copy: Copy, start: int = 0, on_progress: Progress = _nothing
) -> Agreement:
    """Compares samples of `copy` from `start` on, as the module says. Without a `player`, headers and footer alone.

    A copy that ends at most `TAIL` bytes after `start` is compared as a whole. Raises what `TapePlayer.read` raises,
    and TapeFormatError for a damaged index.
    """
    if player is not None and min(copy.size, tape.total_size) - start <= TAIL:
        return compare(player, copy, start, on_progress)
    return _SampledComparison(tape, player, copy, start, on_progress).run()


class _SampledComparison:
    def __init__(self, tape: Tape, player: TapePlayer | None, copy: Copy, start: int, on_progress: Progress) -> None:
        self._tape, self._player, self._copy = tape, player, copy
        self._start, self._on_progress = start, on_progress
        self._size = copy.size
        self._limit = min(self._size, tape.total_size)
        self._compared = 0

    def run(self) -> Agreement:
        agreed = not_zero = self._start  # where samples agree up to, and where those do that are not all zeros
        good, wrong = self._limit, None
        for start, stop, header in self._samples():
            self._on_progress(start, start - self._start)
            wanted = self._wanted(start, stop) if header is None else header[: stop - start]
            at = self._difference(start, wanted)
            if at is None:
                agreed = stop
                if any(wanted):
                    not_zero = stop
                continue
            is_zero = not any(self._copy.read(at, stop - at))
            good, wrong = self._first_wrong(min(not_zero if is_zero else agreed, at), at, is_zero)
            break
        found = Agreement(self._size, self._tape.total_size, good, wrong, (), False, self._compared)
        return _with_generation(self._tape, self._copy, found)

    def _wanted(self, start: int, stop: int) -> bytes:
        assert self._player is not None  # without one there are no samples of bodies
        return self._player.read(start, stop - start)

    def _difference(self, start: int, wanted: bytes) -> int | None:
        """The offset of the first byte from `start` on that is not as `wanted`, or None."""
        found = self._copy.read(start, len(wanted))
        self._compared += len(wanted)
        return None if found == wanted else start + first_difference(found, wanted)

    def _samples(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Yields `(start, stop, header)` in order; the header is None if the player has to read the recorded bytes."""
        if self._player is None:
            yield from self._in_members(self._limit)
            return
        tail = self._limit - TAIL
        yield from heapq.merge(self._in_members(tail), self._in_holes(tail), key=lambda found: found[0])
        for start in range(tail, self._limit, CHUNK):
            yield start, min(start + CHUNK, self._limit), None

    def _in_members(self, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
        """Every header and, with a player, a block at each stride of a body; without one, the footer."""
        for member in self._tape.members(self._start, limit):
            if member.start >= self._start:
                yield member.start, min(member.body, self._limit), member.header()
            if self._player is not None:
                body = member.body
                first = body + (max(0, self._start - body) // STRIDE + 1) * STRIDE
                for start in range(first, min(body + member.size, limit), STRIDE):
                    yield start, min(start + _SAMPLE, self._limit), None
        if self._player is None and limit > self._tape.total_size - 2 * BLOCK:
            yield max(self._start, self._tape.total_size - 2 * BLOCK), limit, bytes(2 * BLOCK)

    def _in_holes(self, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
        """The start, the middle and the end of each hole."""
        for low, high in self._copy.holes(self._start, limit):
            middle, last = (low + high) // 2, max(low, high - _SAMPLE)
            for start in sorted({low, middle, last}):
                yield start, min(start + _SAMPLE, high), None

    def _first_wrong(self, low: int, wrong: int, is_zero: bool) -> tuple[int, int]:
        """The good prefix's length and the first wrong byte; bytes agree below `low`, and the one at `wrong` does not.

        `is_zero`: the copy has zeros there. Then samples where both have zeros tell nothing, and the good prefix is
        taken to end before them.
        """
        if self._player is None:
            return low, wrong
        high = wrong
        while high - low > CHUNK:
            middle = (low + high) // 2
            at = self._difference(middle, self._wanted(middle, middle + _SAMPLE))
            if at is not None:
                high = wrong = at
            elif is_zero and not any(self._copy.read(middle, _SAMPLE)):
                high = middle
            else:
                low = middle + _SAMPLE
        at = self._difference(low, self._wanted(low, high)) if low < high else None
        return (high, wrong) if at is None else (at, at)
