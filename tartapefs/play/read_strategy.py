"""Who fills a request: one thread, or several hands at once where that is faster.

Rule: a request is divided only while it is being answered. Nothing is read before it is asked for, so that every byte
is checked between the moment at which it was asked for and the moment at which it leaves; and the parts are made by the
same `Filler`, with the same checks. (Who calls `expect` has asked.) One request at a time is divided: where several are
to be answered at once, each has a thread of its own, and these are hands enough.

Three things are slow about many small members. Where the source is fast it is Python's own work, of which one process
does one piece at a time: a second process, the helper, takes a part. Where the source is far (a network file system) it
is waiting, which threads do at the same time. Where it lies on a disk, and in no cache, threads have the kernel load
into its own cache what a reader that goes on will ask for next; these bytes are read, and checked, when they are asked
for.

Large members of a sealed tape are bound by hashing, of which the helper takes a part, too.
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
from tartapefs.base import forked_work
from tartapefs.base.errors import TapeError
from tartapefs.play.assemble import Filler
from tartapefs.play.helper_process import Helper

_HELPED = 4  # members in a request, from which on a helper is worth two wake-ups
_BLOCKS_SHARED = 2  # whole ones in a request of a sealed tape
_THREADS = 32  # that wait for a slow source at once
_PART = 1 << 13  # bytes, the smallest part for one of them
_SLOW_MEMBER, _SLOW_BYTE = 150e-6, 2e-9  # seconds; a source that takes longer than both together is slow
_FEWEST_WAITS = 8  # of a thread for the source, in one fill: for Python it waits as well, up to five times a member
_PROBE = 1 << 15  # bytes that tell whether the source is slow
_SLOW_REQUESTS = 128  # to be divided before the source is looked at again
_FROM_DISK = 0.25  # of the bytes of a request: if a disk had to be read for as many, it is cold
_COLD_REQUESTS = 8  # for which nothing has to be read, before a disk is cold no more
_AHEAD = 4 << 20  # bytes that the kernel should have in its cache beyond what was asked for
_AT_ONCE = 128  # members that one thread has loaded: few threads, which leave the interpreter to the reader


class Crew:
    """Fills buffers as `filler` does, with several hands where that is faster. Usable from many threads."""

    def __init__(self, filler: Filler) -> None:
        self._filler = filler
        self._divides = threading.Lock()  # held by whoever may divide its request
        self._helper: Helper | None = None
        self.is_bound_by_python = False  # the last request, so that threads would only wait for each other
        self._density = 0.0  # in the last request, how many members began after another, a byte
        self._expected = -1  # where the last request ended
        self._suspected = False  # whether the last that was not divided took long
        self._slow_requests = 0  # still to be divided among threads
        self._cold_requests = 0  # still to be prepared for
        self._loaded = 0  # how far that has been done
        self._read = 0  # blocks from disks, by all threads
        self._threads = _Threads(_THREADS)
        self._block_size = filler.tape.block_size  # 0 if it is not sealed
        self._begun: tuple[int, int, int] | None = None  # what the helper is at: place, start, stop
        self.first_summed = MAX_OFFSET  # in the last range that was expected, where the files start that have sums

    @property
    def has_helper(self) -> bool:
        return self._helper is not None

    @property
    def _is_fast(self) -> bool:
        return not (self._slow_requests or self._cold_requests)

    def fork_helper(self, memory: mmap.mmap) -> None:
        """Forks the helper, which can fill buffers that lie in `memory`; goes without where there may be no process.

        To be called while this process has one thread alone, and before any other is started.
        """
        with contextlib.suppress(OSError):
            self._helper = Helper(self._filler, memory)

    def close(self) -> None:
        """Ends the helper, and the threads once they are done."""
        self._threads.close()
        if self._helper is not None:
            self._helper.close()
            self._helper = self._begun = None

    def __del__(self) -> None:
        self._threads.close()

    def expect(self, view: memoryview, start: int, sums: memoryview) -> None:
        """Has the helper, if there is one, begin to fill `view`, from `start` of the archive on.

        The caller's next call of `fill` is to be for this. Then `first_summed` says where the first file starts of
        those whose MD5 sums are in `sums`, at `helper.sum_at`. Both lie in the helper's memory.
        """
        if self._helper is not None and self._is_fast:
            self._begun = self._helper.place_of(view), start, start + len(view)
            self._helper.begin(*self._begun, sums=self._helper.place_of(sums))

    def fill(self, view: memoryview, start: int, stop: int) -> None:
        """Fills `view` with the bytes `[start, stop)` of the archive; raises what `Filler.fill` raises."""
        self.first_summed, is_small = MAX_OFFSET, stop - start < 2 * _PART
        if self._begun is not None and self._has_begun(view, start, stop):
            return
        self.is_bound_by_python = not is_small and self._is_helped(start, stop) and self._is_fast
        if is_small or not self._divides.acquire(blocking=False):
            self._filler.fill(view, start, stop)
            return
        try:
            self._fill(view, start, stop)
            self._expected = stop
        finally:
            self._divides.release()

    def _has_begun(self, view: memoryview, start: int, stop: int) -> bool:
        """Fills `view` with the helper, if it has begun to, and says whether it had."""
        helper = self._helper
        if helper is None or self._begun != (helper.place_of(view), start, stop):
            return False
        self._begun = None
        with self._divides:
            self._meet(helper, view, start, stop)
            self.first_summed = helper.first_filled
            self._expected = stop
        return True

    def _fill(self, view: memoryview, start: int, stop: int) -> None:
        size, helper = stop - start, self._helper
        if helper is not None and self._block_size and size >= _BLOCKS_SHARED * self._block_size:
            place = helper.place_of(view)
            if place >= 0 and self._share_blocks(helper, place, view, start, stop):
                return
        if self._cold_requests > 0 and start == self._expected:
            self._load(start, stop + _AHEAD)
        if self._slow_requests > 0:
            self._divide(view, start, stop)
        elif helper is not None and self._is_helped(start, stop) and (place := helper.place_of(view)) >= 0:
            self._share(helper, place, view, start, stop)
        elif (start != self._expected or self._suspected) and size > 2 * _PROBE:
            # Of a source that may be slow a little, before as much as is asked for.
            self._observed(view[:_PROBE], start, start + _PROBE)
            self._expected = start + _PROBE
            self._fill(view[_PROBE:], start + _PROBE, stop)
        else:
            self._observed(view, start, stop)

    def _is_helped(self, start: int, stop: int) -> bool:
        """Whether there is a helper that is worth its wake-ups, if the request is like the last one."""
        return self._helper is not None and (stop - start) * self._density >= _HELPED

    def _observed(self, view: memoryview, start: int, stop: int, members: Iterable[Headed] | None = None) -> int:
        """Fills as `Filler.fill` does, and notes how.

        What the kernel had to read from a disk says that it is cold. What takes long is observed again: the source is
        slow if this thread waited for it. On a machine that is busy everything takes long, but threads wait for nothing
        but their turn.
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
        # Of a cold disk it waits, too: for what is being loaded.
        self._suspected = takes_long and waited and self._cold_requests == 0
        return count

    def _load(self, start: int, stop: int) -> None:
        """Has the kernel load what it has not been told to load before."""
        read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        self._cold_requests = _COLD_REQUESTS if read != self._read else self._cold_requests - 1
        self._read = read
        if start <= self._loaded <= stop:
            start = self._loaded
        self._loaded = stop
        # An error is of a row that nobody has asked for yet; whoever asks for it meets the same.
        with contextlib.suppress(TapeError):
            files = [member for member in self._filler.tape.members(start, stop) if member.size]
            for at in range(0, len(files), _AT_ONCE):
                self._threads.start(partial(self._load_files, files[at : at + _AT_ONCE], start, stop))

    def _load_files(self, files: list[Member], start: int, stop: int) -> None:
        for member in files:
            body = member.start + BLOCK
            first = max(0, start - body)
            self._filler.source.load(member.path, first, min(member.size, stop - body) - first)

    def _share(self, helper: Helper, place: int, view: memoryview, start: int, stop: int) -> None:
        """With the helper, member by member."""
        helper.begin(place, start, stop)
        self._meet(helper, view, start, stop)

    def _meet(self, helper: Helper, view: memoryview, start: int, stop: int) -> None:
        try:
            ours = self._observed(view, start, stop, helper.our_members(self._filler.tape.headed(start, stop)))
        finally:
            theirs = helper.end()
        if theirs < 0:
            self._filler.fill(view, start, stop)
        else:
            self._density = (ours + theirs - 1) / (stop - start)

    def _share_blocks(self, helper: Helper, place: int, view: memoryview, start: int, stop: int) -> bool:
        """With the helper, block by block, if the request is for several of one member of a sealed tape.

        Of the blocks at its ends the neighbouring requests want a part as well: all these are the helper's, who keeps
        them, and has most of the others hashed already. Returns whether that is what it was.
        """
        blocks = self._filler.blocks(start, stop)
        if blocks is None or len(blocks.whole) < _BLOCKS_SHARED:
            return False
        first, last = blocks.start - start, blocks.stop - start
        helper.begin(place + first, blocks.start, blocks.stop, in_blocks=True)
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

    def _divide(self, view: memoryview, start: int, stop: int) -> None:
        """By threads: many members one by one, each by whoever is free; few large ones in equal parts.

        Of what the threads raise, what is first in the archive's order.
        """
        self._slow_requests -= 1
        size, filler, one_at_a_time = stop - start, self._filler, threading.Lock()
        hands = min(_THREADS, size // _PART)
        if size * self._density >= 2 * hands:
            parts = hands * [(start, stop, iter(filler.tape.headed(start, stop)))]
        else:
            cuts = pairwise(start + size * number // hands for number in range(hands + 1))
            parts = [(a, b, iter(filler.tape.headed(a, b))) for a, b in cuts]
        takers = [_Taker(members, one_at_a_time) for _, _, members in parts]
        work = [
            partial(filler.fill, view[a - start : b - start], a, b, taker)
            for (a, b, _), taker in zip(parts, takers, strict=True)
        ]
        counts, failures = self._threads.run(work)
        if failures:
            raise failures[min(failures, key=lambda number: takers[number].start)]
        self._density = (sum(counts) - 1) / size


class _Taker:
    """One of several threads that take members, each another one. `start`: of the last member that it took."""

    def __init__(self, members: Iterator[Headed], one_at_a_time: threading.Lock) -> None:
        self.start = 0
        self._members = members
        self._one_at_a_time = one_at_a_time

    def __iter__(self) -> "_Taker":
        return self

    def __next__(self) -> Headed:
        with self._one_at_a_time:
            member, header = next(self._members)
        self.start = member.start
        return member, header


class _Threads:
    """Threads that end with the process at the latest, whatever they wait for; started with the first work.

    There may be fewer than asked for, where no more can be started. If there are none, the caller does the work.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._started = 0
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def start(self, function: Callable[[], None]) -> None:
        """Has it called by one of them, in its turn; it raises nothing."""
        with contextlib.suppress(OSError):
            while self._started < self._count:
                forked_work.thread(self._serve)
                self._started += 1
        if self._started:
            self._work.put(function)
        else:
            function()

    def run(self, functions: Sequence[Callable[[], int]]) -> tuple[list[int], dict[int, BaseException]]:
        """What each of them returns, and, by their numbers, what those raised that failed; once all have ended."""
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
        """Each ends once it is done with what was asked of it before; more work would start others."""
        for _ in range(self._started):
            self._work.put(None)
        self._started = 0

    def _serve(self) -> None:
        while work := self._work.get():
            work()
            del work  # which has the source open
