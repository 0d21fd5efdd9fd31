"""Decides how to serve the next read, from what the reads before it cost: pure, without I/O or a clock of its own.

Rule: the policy only chooses. `ReadStrategy` measures, and executes the choice; each choice gives the same bytes with
the same checks, so a wrong one costs time alone.

Three observations count. Many members per byte: Python's own work bounds the read, so the helper process shares it. A
read that takes long while its thread waits, twice in a row: the source is slow, so threads wait concurrently. Bytes
that came from a disk: the page cache is cold, so the kernel should prefetch.
"""

from enum import Enum

from tartapefs.archive.layout import BLOCK, MAX_OFFSET

SMALLEST_PART = 1 << 13  # bytes of a request for one thread
PROBE = 1 << 15  # bytes that tell whether the source is slow
PREFETCH = 4 << 20  # bytes after a request that the kernel should have in its page cache
THREADS = 32  # that wait for a slow source concurrently
SLOW_REQUESTS = 128  # to divide among threads before the source is measured again
COLD_REQUESTS = 8  # without a disk read, until the page cache counts as warm
FEWEST_BLOCKS = 2  # whole ones, of a request of a sealed tape that the helper shares
_FEWEST_MEMBERS = 4  # a request with fewer is not worth two wake-ups of the helper
_SLOW_MEMBER, _SLOW_BYTE = 150e-6, 2e-9  # seconds; a source that takes longer than both together is slow
_FEWEST_WAITS = 8  # for the source, in one request: waits for the interpreter lock are up to five a member
_FROM_DISK = 0.25  # of the bytes of a request: if the disk had to be read for more, the page cache is cold


class Decision(Enum):
    """How to serve a request."""

    ALONE = "in this thread, measured"
    PROBE = "its first `PROBE` bytes in this thread, measured; then decide again for the rest"
    MEMBERS = "together with the helper process, member by member"
    BLOCKS = "together with the helper process, block by block of one member"
    THREADS = "by threads"


class ReadPolicy:
    """Decides for each request. One thread at a time may call its methods; others may read its attributes.

    `block_size`: of a sealed tape, in bytes; 0 if it is not sealed. Attributes: `smallest_in_blocks`, the bytes of the
    smallest request that may be shared block by block; `slow_requests` and `cold_requests`, the numbers of requests
    still to divide among threads, and to prefetch for.
    """

    def __init__(self, block_size: int) -> None:
        self.smallest_in_blocks = FEWEST_BLOCKS * block_size or MAX_OFFSET
        self.slow_requests = 0
        self.cold_requests = 0
        self._density = 0.0  # member boundaries per byte of the last request
        self._expected = -1  # where the last request ended
        self._is_suspected = False  # the last measured request took long, and waited
        self._prefetched = 0  # the offset in the archive up to which the kernel was told to prefetch
        self._disk_blocks = 0  # that this process had read from disks at the last prefetch

    def has_many_members(self, size: int) -> bool:
        """Whether a request of `size` bytes is worth the helper's wake-ups, if it is like the last one."""
        return size * self._density >= _FEWEST_MEMBERS

    def decide(self, start: int, stop: int, has_helper: bool, whole_blocks: int = 0) -> Decision:
        """How to serve `[start, stop)` of the archive.

        `has_helper`: a helper can fill the request's buffer. `whole_blocks`: how many whole blocks of one member of a
        sealed tape the request has.
        """
        if has_helper and whole_blocks >= FEWEST_BLOCKS:
            return Decision.BLOCKS
        if self.slow_requests > 0:
            return Decision.THREADS
        if has_helper and (stop - start) * self._density >= _FEWEST_MEMBERS:
            return Decision.MEMBERS
        if (start != self._expected or self._is_suspected) and stop - start > 2 * PROBE:
            return Decision.PROBE
        return Decision.ALONE

    def prefetch(self, start: int, stop: int, disk_blocks: int) -> tuple[int, int] | None:
        """The range that the kernel should prefetch now, without what it was told before; None if the reader jumped.

        `disk_blocks`: what this process has read from disks so far, in blocks of 512 bytes.
        """
        if start != self._expected:
            return None
        self.cold_requests = COLD_REQUESTS if disk_blocks != self._disk_blocks else self.cold_requests - 1
        self._disk_blocks = disk_blocks
        stop += PREFETCH
        if start <= self._prefetched <= stop:
            start = self._prefetched
        self._prefetched = stop
        return start, stop

    def threads(self, size: int) -> tuple[int, bool]:
        """Into how many parts to divide `size` bytes, and whether the threads share all members one by one instead."""
        count = min(THREADS, size // SMALLEST_PART)
        return count, size * self._density >= 2 * count

    def measured(self, start: int, stop: int, members: int, seconds: float, waits: int, disk_blocks: int) -> None:
        """Takes note of `[start, stop)`, which this thread has filled from `members` members, in `seconds`.

        `waits`: how often the thread slept; `disk_blocks`: how many blocks of 512 bytes came from a disk for it. On a
        busy machine everything takes long, but threads wait only for their turn.
        """
        size = stop - start
        is_slow = seconds > _SLOW_MEMBER * members + _SLOW_BYTE * size and waits >= max(members / 2, _FEWEST_WAITS)
        if disk_blocks * BLOCK > _FROM_DISK * size:
            self.cold_requests = COLD_REQUESTS
        elif is_slow and self._is_suspected:
            self.slow_requests = SLOW_REQUESTS
        # With a cold page cache it waits, too: for the prefetch.
        self._is_suspected = is_slow and self.cold_requests == 0
        self._density = (members - 1) / size
        self._expected = stop

    def shared(self, start: int, stop: int, members: int) -> None:
        """Takes note of `[start, stop)`, which this thread and the helper have filled from `members` members."""
        self._density = (members - 1) / (stop - start)
        self._expected = stop

    def shared_blocks(self, stop: int) -> None:
        """Takes note of a request up to `stop` that this thread and the helper have filled block by block."""
        self._is_suspected = False
        self._expected = stop

    def divided(self, start: int, stop: int, members: int) -> None:
        """Takes note of `[start, stop)`, which threads have filled from `members` members."""
        self.slow_requests -= 1
        self.shared(start, stop, members)
