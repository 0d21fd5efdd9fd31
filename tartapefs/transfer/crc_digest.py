"""The CRC of an archive, made of segments: from any thread, in any order, each byte once.

Rule: a segment is a range of bytes and its CRC. Segments that meet become one, so there are as many as there are gaps.
They do not become one at `mark`, where the archive goes on otherwise once the tape is extended: what was saved is cut
back there, and nothing before it is read again.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tartapefs.base.crc import CrcAlgorithm, crc_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_MOST_SEGMENTS = 1 << 16  # some 10 MiB of memory, 3 MiB of a state


class CrcDigest:
    """The CRC of an archive of `total_size` bytes. `mark`: an offset at which what is saved can be cut back.

    Raises TapeError if the package for CRCs is not installed.
    """

    def __init__(self, algorithm: CrcAlgorithm, total_size: int, mark: int | None = None) -> None:
        self.total_size = total_size
        self._crc, self._mark = crc_of(algorithm), mark
        self._segments: list[tuple[int, int, int]] = []  # start, stop, CRC; in order
        self._lock = threading.Lock()

    def add(self, offset: int, data: "ReadableBuffer") -> None:
        """Takes those bytes of `data`, which begins at `offset` of the archive, that it does not have yet."""
        view = memoryview(data)
        stop = min(offset + len(view), self.total_size)
        cut = self._mark if self._mark is not None and offset < self._mark < stop else stop
        for low, high in (*self._gaps(offset, cut), *self._gaps(cut, stop)):
            piece = view[low - offset : high - offset]
            if not self.join(low, high, self._crc.update(piece, 0)):
                self.add(low, piece)  # another thread gave some of it meanwhile

    def join(self, start: int, stop: int, crc: int) -> bool:
        """Takes the CRC of the bytes `[start, stop)`, made elsewhere; returns False if it has some of them.

        A segment too many, where more than 65,536 would have gaps between them, is left out, and stays `missing`.
        """
        with self._lock:
            low = high = bisect_left(self._segments, (start,))
            before = self._segments[low - 1] if low else (0, 0, 0)
            after = self._segments[low] if low < len(self._segments) else (self.total_size, self.total_size, 0)
            if before[1] > start or after[0] < stop:
                return False
            if before[1] == start != self._mark and low:
                start, crc, low = before[0], self._crc.join(before[2], crc, stop - start), low - 1
            if after[0] == stop != self._mark and high < len(self._segments):
                stop, crc, high = after[1], self._crc.join(crc, after[2], after[1] - after[0]), high + 1
            if low < high or len(self._segments) < _MOST_SEGMENTS:
                self._segments[low:high] = [(start, stop, crc)]
            return True

    def _gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges within `[start, stop)` that no segment has, in order."""
        gaps = []
        with self._lock:
            at = bisect_left(self._segments, (start,))
            if at:
                start = max(start, self._segments[at - 1][1])
            while start < stop:
                low, high, _ = self._segments[at] if at < len(self._segments) else (stop, stop, 0)
                if start < low:
                    gaps.append((start, min(low, stop)))
                start, at = high, at + 1
        return gaps

    def missing(self) -> Iterator[tuple[int, int]]:
        yield from self._gaps(0, self.total_size)

    def hexdigest(self) -> str:
        """Raises ValueError while bytes are missing."""
        missing = self._gaps(0, self.total_size)
        if missing:
            raise ValueError(f"{len(missing)} ranges of bytes are missing, the first from {missing[0][0]}")
        whole = 0
        for start, stop, crc in self._segments:
            whole = self._crc.join(whole, crc, stop - start)
        return f"{whole:0{2 * self._crc.size}x}"

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {"segments": list(self._segments)}

    @staticmethod
    def cut_back(saved: dict[str, Any], mark: int) -> dict[str, Any]:
        """What `save` would have given of the segments that end at `mark` or before."""
        return {"segments": [segment for segment in saved["segments"] if segment[1] <= mark]}

    def load(self, saved: dict[str, Any]) -> None:
        """Continues from what `save` gave. Raises ValueError, KeyError or TypeError for anything else."""
        for start, stop, crc in saved["segments"]:
            if not (0 <= start < stop <= self.total_size and 0 <= crc < 1 << 8 * self._crc.size):
                raise ValueError("a segment outside the archive")
            if not self.join(start, stop, crc):
                raise ValueError("segments that overlap")
