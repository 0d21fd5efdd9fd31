"""Chooses how to serve a read: in this thread, with threads, or with the helper process.

Rule: a request is divided only while it is being served. Nothing is read before it is requested, so every byte is
checked between its request and its answer; and every part is filled by the same `Filler`, with the same checks. (A
caller of `expect` makes a request.) One request at a time is divided: concurrent requests have a thread each, which is
parallelism enough.

Many small members are slow for three reasons. On a fast source it is Python's own work, which the interpreter lock
serializes: the helper process takes a part. On a remote source (a network file system) it is waiting, which threads do
concurrently. On a disk whose files are not in the page cache, threads have the kernel prefetch into it what a
sequential reader will request next; these bytes are read, and checked, when they are requested.

Large members of a sealed tape are bound by hashing, of which the helper process takes a part, too.
"""

import contextlib
import mmap
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

from tartapefs.archive.layout import BLOCK, MAX_OFFSET
from tartapefs.archive.member import Headed, Member
from tartapefs.base import processes
from tartapefs.base.errors import TapeError
from tartapefs.play.assemble import Filler
from tartapefs.play.helper_process import HelperProcess

_FEWEST_MEMBERS = 4  # members: a smaller request is not worth two wake-ups of the helper
_FEWEST_BLOCKS = 2  # whole ones, of a request of a sealed tape that the helper shares
_THREADS = 32  # that wait for a slow source concurrently
_SMALLEST_PART = 1 << 13  # bytes for one of them
_SLOW_MEMBER, _SLOW_BYTE = 150e-6, 2e-9  # seconds; a source that takes longer than both together is slow
_FEWEST_WAITS = 8  # for the source, in one fill: waits for the interpreter lock are up to five a member
_PROBE = 1 << 15  # bytes that tell whether the source is slow
_SLOW_REQUESTS = 128  # to divide before the source is measured again
_FROM_DISK = 0.25  # of the bytes of a request: if the disk had to be read for more, the page cache is cold
_COLD_REQUESTS = 8  # without a disk read, until the page cache counts as warm
_PREFETCH = 4 << 20  # bytes after a request that the kernel should have in its page cache
_FILES_PER_THREAD = 128  # few threads, which leave the interpreter to the reader


class ReadStrategy:
    """Fills buffers as `filler` does, with threads or the helper where that is faster. Usable from many threads."""

    def __init__(self, filler: Filler) -> None:
        self._filler = filler
        self._dividing = threading.Lock()  # held by the thread that may divide its request
        self._helper: HelperProcess | None = None
        self.is_bound_by_python = False  # the last request: threads would only wait for each other
        self._density = 0.0  # member boundaries per byte of the last request
        self._expected = -1  # where the last request ended
        self._suspected = False  # the last undivided request took long
        self._slow_requests = 0  # still to divide among threads
        self._cold_requests = 0  # still to prefetch for
        self._prefetched = 0  # the offset in the archive up to which that was done
        self._read = 0  # blocks from disks, by all threads, in units of 512 bytes
        self._threads = _Threads(_THREADS)
        self._block_size = filler.tape.block_size  # 0 if it is not sealed
        self._request_begun: tuple[int, int, int] | None = None  # the helper's: memory offset, start, stop
        self.first_summed = MAX_OFFSET  # in the last expected range, start of the first file that has a sum

    @property
    def has_helper(self) -> bool:
        return self._helper is not None

    @property
    def _is_fast(self) -> bool:
        return not (self._slow_requests or self._cold_requests)

    def fork_helper(self, memory: mmap.mmap) -> None:
        """Forks the helper, which can fill buffers in `memory`; does without if no process can be forked.

        Call it while this process has a single thread.
        """
        with contextlib.suppress(OSError):
            self._helper = HelperProcess(self._filler, memory)

    def close(self) -> None:
        """Ends the helper, and the threads once they are done."""
        self._threads.close()
        if self._helper is not None:
            self._helper.close()
            self._helper = self._request_begun = None

    def __del__(self) -> None:
        self._threads.close()

    def expect(self, view: memoryview, start: int, sums: memoryview) -> None:
        """Has the helper, if there is one, begin to fill `view`, from `start` of the archive on.

        The caller's next `fill` must be for this range. Then `first_summed` is the start of the first file whose MD5
        sum is in `sums`, at `helper_process.sum_offset`. `view` and `sums` lie in the helper's memory.
        """
        if self._helper is not None and self._is_fast:
            self._request_begun = self._helper.memory_offset(view), start, start + len(view)
            self._helper.begin(*self._request_begun, sums=self._helper.memory_offset(sums))

    def fill(self, view: memoryview, start: int, stop: int) -> None:
        """Fills `view` with the bytes `[start, stop)` of the archive; raises what `Filler.fill` raises."""
        self.first_summed, is_small = MAX_OFFSET, stop - start < 2 * _SMALLEST_PART
        if self._request_begun is not None and self._finish_begun(view, start, stop):
            return
        self.is_bound_by_python = not is_small and self._helper_pays(start, stop) and self._is_fast
        if is_small or not self._dividing.acquire(blocking=False):
            self._filler.fill(view, start, stop)
            return
        try:
            self._fill(view, start, stop)
            self._expected = stop
        finally:
            self._dividing.release()

    def _finish_begun(self, view: memoryview, start: int, stop: int) -> bool:
        """Fills `view` together with the helper if `expect` had it begin; returns whether it had."""
        helper = self._helper
        if helper is None or self._request_begun != (helper.memory_offset(view), start, stop):
            return False
        self._request_begun = None
        with self._dividing:
            self._fill_with_helper(helper, view, start, stop)
            self.first_summed = helper.first_filled
            self._expected = stop
        return True

    def _fill(self, view: memoryview, start: int, stop: int) -> None:
        size, helper = stop - start, self._helper
        if helper is not None and self._block_size and size >= _FEWEST_BLOCKS * self._block_size:
            offset = helper.memory_offset(view)
            if offset >= 0 and self._share_blocks(helper, offset, view, start, stop):
                return
        if self._cold_requests > 0 and start == self._expected:
            self._prefetch(start, stop + _PREFETCH)
        if self._slow_requests > 0:
            self._divide_among_threads(view, start, stop)
        elif helper is not None and self._helper_pays(start, stop) and (offset := helper.memory_offset(view)) >= 0:
            self._share_members(helper, offset, view, start, stop)
        elif (start != self._expected or self._suspected) and size > 2 * _PROBE:
            # Measures a source that may be slow with a few bytes first.
            self._fill_measured(view[:_PROBE], start, start + _PROBE)
            self._expected = start + _PROBE
            self._fill(view[_PROBE:], start + _PROBE, stop)
        else:
            self._fill_measured(view, start, stop)

    def _helper_pays(self, start: int, stop: int) -> bool:
        """Whether a helper is worth its wake-ups, if the request is like the last one."""
        return self._helper is not None and (stop - start) * self._density >= _FEWEST_MEMBERS

    def _fill_measured(self, view: memoryview, start: int, stop: int, members: Iterable[Headed] | None = None) -> int:
        """Fills as `Filler.fill` does, and measures whether the source is slow or the page cache cold.

        The cache is cold if the kernel read from a disk. The source is slow if two requests in a row took long and
        this thread waited for it. On a busy machine everything takes long, but threads wait only for their turn.
        """
        before = resource.getrusage(resource.RUSAGE_THREAD)
        begun = time.monotonic()
        count = self._filler.fill(view, start, stop, members)
        size = stop - start
        takes_long = time.monotonic() - begun > _SLOW_MEMBER * count + _SLOW_BYTE * size
        after = resource.getrusage(resource.RUSAGE_THREAD)
        self._density = (count - 1) / size
        waited = after.ru_nvcsw - before.ru_nvcsw >= max(count / 2, _FEWEST_WAITS)
        if (after.ru_inblock - before.ru_inblock) * BLOCK > _FROM_DISK * size:
            self._cold_requests = _COLD_REQUESTS
        elif takes_long and waited and self._suspected:
            self._slow_requests = _SLOW_REQUESTS
        # With a cold cache it waits, too: for the prefetch.
        self._suspected = takes_long and waited and self._cold_requests == 0
        return count

    def _prefetch(self, start: int, stop: int) -> None:
        """Has the kernel prefetch the part of the range that it was not told before."""
        read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        self._cold_requests = _COLD_REQUESTS if read != self._read else self._cold_requests - 1
        self._read = read
        if start <= self._prefetched <= stop:
            start = self._prefetched
        self._prefetched = stop
        # A damaged row raises when it is requested.
        with contextlib.suppress(TapeError):
            files = [member for member in self._filler.tape.members(start, stop) if member.size]
            for at in range(0, len(files), _FILES_PER_THREAD):
                self._threads.start(partial(self._prefetch_files, files[at : at + _FILES_PER_THREAD], start, stop))

    def _prefetch_files(self, files: list[Member], start: int, stop: int) -> None:
        for member in files:
            body = member.start + BLOCK
            first = max(0, start - body)
            self._filler.source.prefetch(member.path, first, min(member.size, stop - body) - first)

    def _share_members(self, helper: HelperProcess, offset: int, view: memoryview, start: int, stop: int) -> None:
        """Fills `view` together with the helper, member by member."""
        helper.begin(offset, start, stop)
        self._fill_with_helper(helper, view, start, stop)

    def _fill_with_helper(self, helper: HelperProcess, view: memoryview, start: int, stop: int) -> None:
        try:
            ours = self._fill_measured(view, start, stop, helper.our_members(self._filler.tape.headed(start, stop)))
        finally:
            theirs = helper.end()
        if theirs < 0:
            self._filler.fill(view, start, stop)
        else:
            self._density = (ours + theirs - 1) / (stop - start)

    def _share_blocks(self, helper: HelperProcess, offset: int, view: memoryview, start: int, stop: int) -> bool:
        """Fills `view` together with the helper, block by block, if it has several blocks of one member.

        The neighbouring requests need the blocks at its ends, too: the helper fills all of these and caches them; it
        has most of the others hashed already. Returns whether the request was of this kind.
        """
        blocks = self._filler.blocks(start, stop)
        if blocks is None or len(blocks.whole) < _FEWEST_BLOCKS:
            return False
        first, last = blocks.start - start, blocks.stop - start
        helper.begin(offset + first, blocks.start, blocks.stop, in_blocks=True)
        try:
            self._filler.fill_blocks(view[first:last], blocks, helper.our_blocks(blocks.whole))
            if first > 0:
                self._filler.fill(view[:first], start, blocks.start)
            if blocks.stop < stop:
                self._filler.fill(view[last:], blocks.stop, stop)
        finally:
            theirs = helper.end()
        if theirs < 0:
            self._filler.fill(view, start, stop)
        self._suspected = False
        return True

    def _divide_among_threads(self, view: memoryview, start: int, stop: int) -> None:
        """Fills `view` by threads: many members one by one, by the next free thread; few large ones in equal parts.

        Raises the error that is first in the archive's order.
        """
        self._slow_requests -= 1
        size, filler, lock = stop - start, self._filler, threading.Lock()
        thread_count = min(_THREADS, size // _SMALLEST_PART)
        if size * self._density >= 2 * thread_count:
            parts = thread_count * [(start, stop, iter(filler.tape.headed(start, stop)))]
        else:
            cuts = pairwise(start + size * number // thread_count for number in range(thread_count + 1))
            parts = [(a, b, iter(filler.tape.headed(a, b))) for a, b in cuts]
        iterators = [_SharedMembers(members, lock) for _, _, members in parts]
        work = [
            partial(filler.fill, view[a - start : b - start], a, b, iterator)
            for (a, b, _), iterator in zip(parts, iterators, strict=True)
        ]
        counts, failures = self._threads.run(work)
        if failures:
            raise failures[min(failures, key=lambda number: iterators[number].start)]
        self._density = (sum(counts) - 1) / size


class _SharedMembers:
    """An iterator over members that several threads share, one for each. `start`: of the last member it returned."""

    def __init__(self, members: Iterator[Headed], lock: threading.Lock) -> None:
        self.start = 0
        self._members = members
        self._lock = lock

    def __iter__(self) -> "_SharedMembers":
        return self

    def __next__(self) -> Headed:
        with self._lock:
            member, header = next(self._members)
        self.start = member.start
        return member, header


class _Threads:
    """A pool of threads, started with the first work; they end with the process, whatever they wait for.

    If not all can be started, there are fewer; if none can, the caller does the work.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._started = 0
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def start(self, function: Callable[[], None]) -> None:
        """Has a thread call `function`, which must raise nothing, in its turn."""
        with contextlib.suppress(OSError):
            while self._started < self._count:
                processes.start_thread(self._serve)
                self._started += 1
        if self._started:
            self._work.put(function)
        else:
            function()

    def run(self, functions: Sequence[Callable[[], int]]) -> tuple[list[int], dict[int, BaseException]]:
        """Waits for all functions; returns their results, and by number the exceptions of those that failed."""
        results = [0] * len(functions)
        failures: dict[int, BaseException] = {}
        ended = threading.Semaphore(0)

        def call(number: int) -> None:
            try:
                results[number] = functions[number]()
            except BaseException as error:
                failures[number] = error
            ended.release()

        for number in range(len(functions)):
            self.start(partial(call, number))
        for _ in functions:
            ended.acquire()
        return results, failures

    def close(self) -> None:
        """Ends the threads after the work queued so far; more work starts new ones."""
        for _ in range(self._started):
            self._work.put(None)
        self._started = 0

    def _serve(self) -> None:
        while work := self._work.get():
            work()
            del work  # which has the source open
