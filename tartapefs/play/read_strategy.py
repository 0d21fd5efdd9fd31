"""Serves a read as `ReadPolicy` decides: in this thread, with threads, or with the helper process.

Rule: a request is divided only while it is being served. Nothing is read before it is requested, so every byte is
checked between its request and its answer; and every part is filled by the same `Assembler`, with the same checks. (A
caller of `expect` makes a request.) One request at a time is divided: concurrent requests have a thread each, which is
parallelism enough; on a slow source they wait for their turn to be divided.

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
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import assert_never

from tartapefs.archive.layout import MAX_OFFSET
from tartapefs.archive.member import Headed, Member
from tartapefs.base.errors import TapeError
from tartapefs.play.assemble import Assembler, Blocks
from tartapefs.play.helper_process import HelperProcess
from tartapefs.play.read_policy import PROBE, SMALLEST_PART, THREADS, Decision, ReadPolicy
from tartapefs.play.thread_pool import SharedMembers, ThreadPool

_PATIENCE = 0.5  # seconds that a request of a slow source waits for its turn; a request before it may hang
_FILES_PER_THREAD = 128  # to prefetch: few threads, which leave the interpreter to the reader


class ReadStrategy:
    """Fills buffers as `assembler` does, with threads or the helper where that is faster. Usable from many threads.

    Attributes: `is_bound_by_python`, whether the last request was, so that threads would only wait for each other;
    `first_summed`, in the last expected range, the start of the first file that has a sum.
    """

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler
        self._policy = ReadPolicy(assembler.tape.block_size)
        self._dividing = threading.Lock()  # held by the thread that may divide its request
        self._helper: HelperProcess | None = None
        self._threads = ThreadPool(THREADS)
        self._request_begun: tuple[int, int, int] | None = None  # the helper's: memory offset, start, stop
        self.is_bound_by_python = False
        self.first_summed = MAX_OFFSET

    @property
    def has_helper(self) -> bool:
        return self._helper is not None

    @property
    def _is_fast(self) -> bool:
        return not (self._policy.slow_requests or self._policy.cold_requests)

    def fork_helper(self, memory: mmap.mmap) -> None:
        """Forks the helper, which can fill buffers in `memory`; does without if no process can be forked.

        Call it while this process has a single thread.
        """
        with contextlib.suppress(OSError):
            self._helper = HelperProcess(self._assembler, memory)

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
        """Fills `view` with the bytes `[start, stop)` of the archive; raises what `Assembler.fill` raises."""
        self.first_summed, is_small = MAX_OFFSET, stop - start < 2 * SMALLEST_PART
        if self._request_begun is not None and self._finish_begun(view, start, stop):
            return
        has_many = not is_small and self._helper is not None and self._policy.has_many_members(stop - start)
        self.is_bound_by_python = has_many and self._is_fast
        # All threads wait for one request of a slow source, then for the next: sooner than each for one of them.
        patience = _PATIENCE if self._policy.slow_requests > 0 else 0
        if is_small or not self._dividing.acquire(timeout=patience):
            self._assembler.fill(view, start, stop)
            return
        try:
            self._fill(view, start, stop)
        finally:
            self._dividing.release()

    def _finish_begun(self, view: memoryview, start: int, stop: int) -> bool:
        """Fills `view` together with the helper if `expect` had it begin; returns whether it had."""
        helper = self._helper
        if helper is None or self._request_begun != (helper.memory_offset(view), start, stop):
            return False
        self._request_begun = None
        with self._dividing:
            self._finish_with_helper(helper, view, start, stop)
            self.first_summed = helper.first_filled
        return True

    def _fill(self, view: memoryview, start: int, stop: int) -> None:
        policy, helper, size = self._policy, self._helper, stop - start
        offset, blocks, whole_blocks = -1, None, 0
        if helper is not None and (size >= policy.smallest_in_blocks or policy.has_many_members(size)):
            offset = helper.memory_offset(view)
            if offset >= 0 and size >= policy.smallest_in_blocks:
                blocks = self._assembler.blocks(start, stop)
                whole_blocks = len(blocks.whole) if blocks is not None else 0
        decision = policy.decide(start, stop, offset >= 0, whole_blocks)
        if policy.cold_requests > 0 and decision is not Decision.BLOCKS:
            self._prefetch(start, stop)
        match decision:
            case Decision.ALONE:
                self._fill_measured(view, start, stop)
            case Decision.PROBE:
                self._fill_measured(view[:PROBE], start, start + PROBE)
                self._fill(view[PROBE:], start + PROBE, stop)
            case Decision.MEMBERS:
                assert helper is not None
                helper.begin(offset, start, stop)
                self._finish_with_helper(helper, view, start, stop)
            case Decision.BLOCKS:
                assert helper is not None
                assert blocks is not None
                self._share_blocks(helper, offset, blocks, view, start, stop)
            case Decision.THREADS:
                self._divide_among_threads(view, start, stop)
            case _:
                assert_never(decision)

    def _fill_measured(self, view: memoryview, start: int, stop: int, members: Iterable[Headed] | None = None) -> int:
        """Fills as `Assembler.fill` does, and tells the policy what that cost."""
        before = resource.getrusage(resource.RUSAGE_THREAD)
        begun = time.monotonic()
        count = self._assembler.fill(view, start, stop, members)
        seconds = time.monotonic() - begun
        after = resource.getrusage(resource.RUSAGE_THREAD)
        waits, disk_blocks = after.ru_nvcsw - before.ru_nvcsw, after.ru_inblock - before.ru_inblock
        self._policy.measured(start, stop, count, seconds, waits, disk_blocks)
        return count

    def _prefetch(self, start: int, stop: int) -> None:
        """Has the kernel prefetch the files that the policy names."""
        found = self._policy.prefetch(start, stop, resource.getrusage(resource.RUSAGE_SELF).ru_inblock)
        if found is None:
            return
        # A damaged row raises when it is requested.
        with contextlib.suppress(TapeError):
            files = [member for member in self._assembler.tape.members(*found) if member.size]
            for at in range(0, len(files), _FILES_PER_THREAD):
                self._threads.start(partial(self._prefetch_files, files[at : at + _FILES_PER_THREAD], *found))

    def _prefetch_files(self, files: list[Member], start: int, stop: int) -> None:
        for member in files:
            body = member.body
            first = max(0, start - body)
            self._assembler.source.prefetch(member.path, first, min(member.size, stop - body) - first)

    def _finish_with_helper(self, helper: HelperProcess, view: memoryview, start: int, stop: int) -> None:
        """Fills `view` together with the helper, which has begun, member by member."""
        try:
            ours = self._fill_measured(view, start, stop, helper.our_members(self._assembler.tape.headed(start, stop)))
        finally:
            theirs = helper.end()
        if theirs < 0:
            self._assembler.fill(view, start, stop)
        else:
            self._policy.shared(start, stop, ours + theirs)

    def _share_blocks(
        self, helper: HelperProcess, offset: int, blocks: Blocks, view: memoryview, start: int, stop: int
    ) -> None:
        """Fills `view` together with the helper, block by block.

        The neighbouring requests need the blocks at its ends, too: the helper fills all of these and caches them; it
        has most of the others hashed already.
        """
        first, last = blocks.start - start, blocks.stop - start
        helper.begin(offset + first, blocks.start, blocks.stop, in_blocks=True)
        try:
            self._assembler.fill_blocks(view[first:last], blocks, helper.our_blocks(blocks.whole))
            if first > 0:
                self._assembler.fill(view[:first], start, blocks.start)
            if blocks.stop < stop:
                self._assembler.fill(view[last:], blocks.stop, stop)
        finally:
            theirs = helper.end()
        if theirs < 0:
            self._assembler.fill(view, start, stop)
        self._policy.shared_blocks(stop)

    def _divide_among_threads(self, view: memoryview, start: int, stop: int) -> None:
        """Fills `view` by threads: many members one by one, by the next free thread; few large ones in equal parts.

        Raises the error that is first in the archive's order.
        """
        size, assembler, lock = stop - start, self._assembler, threading.Lock()
        count, one_by_one = self._policy.threads(size)
        if one_by_one:
            parts = count * [(start, stop, iter(assembler.tape.headed(start, stop)))]
        else:
            cuts = pairwise(start + size * number // count for number in range(count + 1))
            parts = [(a, b, iter(assembler.tape.headed(a, b))) for a, b in cuts]
        iterators = [SharedMembers(members, lock) for _, _, members in parts]
        work = [
            partial(assembler.fill, view[a - start : b - start], a, b, iterator)
            for (a, b, _), iterator in zip(parts, iterators, strict=True)
        ]
        counts, failures = self._threads.run(work)
        if failures:
            raise failures[min(failures, key=lambda number: iterators[number].start)]
        self._policy.divided(start, stop, sum(counts))
