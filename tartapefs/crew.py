"""Who fills a request: one thread, or several hands at once where that is faster.

Rule: a request is divided only while it is being answered. Nothing is read before it is asked for, so that every byte
is checked between the moment at which it was asked for and the moment at which it leaves; and the parts are made by the
same `Filler`, each as if it were a request of its own. One request at a time is divided: where several are to be
answered at once, each has a thread of its own, and these are hands enough.

Three things are slow about many small members. Where the source is fast it is Python's own work, of which one process
does one piece at a time: a helper process, forked from this one, fills the second part, in memory that both share.
Where the source is far (a network file system) it is waiting, which threads do at the same time. Where it lies on a
disk, and in no cache, threads have the kernel load into its own cache what a reader that goes on will ask for next;
these bytes are read, and checked, when they are asked for.

Large members of a sealed tape are bound by hashing. The helper takes whole blocks of a request, and hashes those that
come next while nothing is asked for: that is no exception from the rule but in its words, since a block that has its
digest is the recorded one, and the file is still looked at when the block is asked for.

A helper that fails says only that it did: the part is then filled here, which finds the same and raises it.
"""

import contextlib
import ctypes
import mmap
import os
import resource
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import NoReturn

from tartapefs import apart
from tartapefs.errors import TapeError
from tartapefs.fill import Filler
from tartapefs.layout import BLOCK
from tartapefs.member import Member
from tartapefs.tape import Tape

_HELPED = 16  # members in a request, from which on a helper is worth two wake-ups
_TRIAL = 64  # requests, one of which is filled in the way that was slower, with a helper or without
_LEAST, _STEP = 0.2, 0.01  # of a request, for each side; how it is moved
_BLOCKS_SHARED, _BLOCK_STEP = 4, 0.02  # in a request of a sealed tape; how the helper's part is moved
_BLOCKS_AHEAD = 3  # that are read and hashed ahead at once, before it is looked whether anything is asked for
_THREADS = 16  # that wait for a slow source at once
_PART = 1 << 13  # bytes, the smallest part for one of them
_SLOW_MEMBER, _SLOW_BYTE = 150e-6, 2e-9  # seconds; a source that takes longer than both together is slow
_FEWEST_WAITS = 4  # of a thread for the source, in one fill, so that one that was late by chance is not slow
_PROBE = 1 << 15  # bytes that tell whether the source is slow
_SLOW_REQUESTS = 128  # to be divided before the source is looked at again
_FROM_DISK = 0.25  # of the bytes of a request: if a disk had to be read for as many, it is cold
_COLD_REQUESTS = 8  # for which nothing has to be read, before a disk is cold no more
_AHEAD = 4 << 20  # bytes that the kernel should have in its cache beyond what was asked for
_AT_ONCE = 128  # members that one thread has loaded: few threads, which leave the interpreter to the reader

_JOB = struct.Struct("=qqq")  # place in the shared memory, start, stop
_DONE, _FAILED = b"D", b"F"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)


class Crew:
    """Fills buffers as `filler` does, with several hands where that is faster. Usable from many threads."""

    def __init__(self, filler: Filler) -> None:
        self._filler = filler
        self._divides = threading.Lock()  # held by whoever may divide its request
        self._helper: _Helper | None = None
        self._density = 0.0  # members a byte in the last request
        self._our_share = 0.5  # of a request that the helper has a part in
        self._requests = 0  # that it could have a part in
        self._pace = {False: 0.0, True: 0.0}  # seconds a member of late, without its help and with it
        self._expected = -1  # where the last request ended
        self._suspected = False  # whether the last that was not divided took long
        self._slow_requests = 0  # still to be divided among threads
        self._cold_requests = 0  # still to be prepared for
        self._loaded = 0  # how far that has been done
        self._read = 0  # blocks from disks, by all threads
        self._threads = _Threads(_THREADS)
        self._block_size = filler.tape.block_size  # 0 if it is not sealed
        self._our_blocks = 0.5  # of the whole blocks in a request, how many are hashed here

    def fork_helper(self, memory: mmap.mmap) -> None:
        """Forks the helper, which can fill buffers that lie in `memory`.

        To be called while this process has one thread alone, and before any other is started.
        """
        self._helper = _Helper(self._filler, memory)

    def close(self) -> None:
        """Ends the helper. The threads wait for work, and end with the process."""
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    def fill(self, view: memoryview, start: int, stop: int) -> None:
        """Fills `view` with the bytes `[start, stop)` of the archive; raises what `Filler.fill` raises."""
        if stop - start < 2 * _PART or not self._divides.acquire(blocking=False):
            self._filler.fill(view, start, stop)
            return
        try:
            self._fill(view, start, stop)
            self._expected = stop
        finally:
            self._divides.release()

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
        elif helper is not None and size * self._density >= _HELPED and (place := helper.place_of(view)) >= 0:
            self._share_if_faster(helper, place, view, start, stop)
        elif (start != self._expected or self._suspected) and size > 2 * _PROBE:
            # Of a source that may be slow a little, before as much as is asked for.
            self._observed(view[:_PROBE], start, start + _PROBE)
            self._expected = start + _PROBE
            self._fill(view[_PROBE:], start + _PROBE, stop)
        else:
            self._observed(view, start, stop)

    def _observed(self, view: memoryview, start: int, stop: int) -> None:
        """Fills, and notes how.

        What the kernel had to read from a disk says that it is cold. What takes long is observed again: the source is
        slow if this thread waited for it. On a machine that is busy everything takes long, but threads wait for nothing
        but their turn.
        """
        before = resource.getrusage(resource.RUSAGE_THREAD)
        begun = time.monotonic()
        count, size = self._filler.fill(view, start, stop), stop - start
        takes_long = time.monotonic() - begun > _SLOW_MEMBER * count + _SLOW_BYTE * size
        after = resource.getrusage(resource.RUSAGE_THREAD)
        self._density = count / size
        waited = after.ru_nvcsw - before.ru_nvcsw >= max(count / 2, _FEWEST_WAITS)
        if (after.ru_inblock - before.ru_inblock) * BLOCK > _FROM_DISK * size:
            self._cold_requests = _COLD_REQUESTS
        elif takes_long and waited and self._suspected:
            self._slow_requests = _SLOW_REQUESTS
        # Of a cold disk it waits, too: for what is being loaded.
        self._suspected = takes_long and waited and self._cold_requests == 0

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

    def _share_if_faster(self, helper: "_Helper", place: int, view: memoryview, start: int, stop: int) -> None:
        """With the helper or without, whichever was faster of late: where cores are busy two wake-ups cost more."""
        self._requests += 1
        shared = (self._pace[True] <= self._pace[False]) != (self._requests % _TRIAL == 0)
        begun = time.monotonic()
        if shared:
            self._share(helper, place, view, start, stop)
        else:
            self._observed(view, start, stop)
        pace = (time.monotonic() - begun) / (self._density * (stop - start))
        self._pace[shared] += (pace - self._pace[shared]) / (4 if self._pace[shared] else 1)

    def _share(self, helper: "_Helper", place: int, view: memoryview, start: int, stop: int) -> None:
        """The first part here, the rest by the helper, who is given so much that both end at the same time."""
        own = int((stop - start) * self._our_share)
        helper.begin(place + own, start + own, stop)
        try:
            self._observed(view[:own], start, start + own)
        finally:
            filled = helper.end()
        self._our_share = _moved(self._our_share, _STEP, _LEAST, helper.was_late)
        if not filled:
            self._filler.fill(view[own:], start + own, stop)

    def _share_blocks(self, helper: "_Helper", place: int, view: memoryview, start: int, stop: int) -> bool:
        """Of a sealed tape, a request for several blocks of one member, with the helper; whether that is what it is.

        The helper takes whole blocks in the middle. Of those at the ends the neighbouring requests want a part as well:
        they are kept here.
        """
        block_size = self._block_size
        first, last = self._filler.whole_blocks(start, stop)
        cut = first + round((last - first) // block_size * self._our_blocks) * block_size
        if last - first < (_BLOCKS_SHARED - 2) * block_size or cut >= last:
            return False
        helper.begin(place + cut - start, cut, last)
        try:
            if start < cut:
                self._filler.fill(view[: cut - start], start, cut)
            if last < stop:
                self._filler.fill(view[last - start :], last, stop)
        finally:
            filled = helper.end()
        self._our_blocks = _moved(self._our_blocks, _BLOCK_STEP, 0, helper.was_late)
        if not filled:
            self._filler.fill(view[cut - start : last - start], cut, last)
        self._suspected = False
        return True

    def _divide(self, view: memoryview, start: int, stop: int) -> None:
        """In equal parts, by threads; of what they raise, the first part's."""
        self._slow_requests -= 1
        size = stop - start
        parts = min(_THREADS, size // _PART)
        cuts = [start + size * number // parts for number in range(parts + 1)]
        self._threads.run([partial(self._filler.fill, view[a - start : b - start], a, b) for a, b in pairwise(cuts)])


def _moved(share: float, step: float, least: float, helper_was_late: bool) -> float:
    """Our share of the next request: more than `share` if the helper had too much of this one, else less."""
    return min(max(share + (step if helper_was_late else -step), least), 1 - _LEAST)


class _Threads:
    """Threads that end with the process, whatever they wait for; started with the first work."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def start(self, function: Callable[[], None]) -> None:
        """Has it called by one of them, in its turn; it raises nothing."""
        while self._count:
            threading.Thread(target=self._serve, daemon=True).start()
            self._count -= 1
        self._work.put(function)

    def run(self, functions: Sequence[Callable[[], object]]) -> None:
        """Calls all of them, and returns once all have returned; raises what the first of them raised, if any did."""
        failures: list[BaseException | None] = [None] * len(functions)
        ended = threading.Semaphore(0)

        def call(number: int) -> None:
            try:
                functions[number]()
            except BaseException as error:
                failures[number] = error
            ended.release()

        for number in range(len(functions)):
            self.start(partial(call, number))
        for _ in functions:
            ended.acquire()
        for failure in failures:
            if failure is not None:
                raise failure

    def _serve(self) -> None:
        while True:
            self._work.get()()


class _Helper:
    """A process that fills one range at a time, in memory that this process and it share.

    It ends when this process does, however that ends: its end of the pair is closed then.
    """

    def __init__(self, filler: Filler, memory: mmap.mmap) -> None:
        self._start = _address(memory)
        self._stop = self._start + len(memory)
        self.was_late = False
        self._ours, theirs = socket.socketpair()
        self._pid = apart.fork()
        if self._pid == 0:
            _help(filler, theirs.detach(), memoryview(memory))
        theirs.close()

    def place_of(self, view: memoryview) -> int:
        """Where in the shared memory `view` lies; -1 if it does not."""
        address = _address(view)
        return address - self._start if self._start <= address < self._stop else -1

    def begin(self, place: int, start: int, stop: int) -> None:
        """Asks for `[start, stop)` at this place; `end` is to be called next, whatever happens."""
        with contextlib.suppress(OSError):  # it is gone: `end` says so
            self._ours.send(_JOB.pack(place, start, stop))

    def end(self) -> bool:
        """Waits until it is done, and returns whether the bytes are where they were asked for.

        Then `was_late` says whether there was anything to wait for.
        """
        self.was_late = False
        with contextlib.suppress(OSError):  # it is gone
            try:
                return self._ours.recv(1, socket.MSG_DONTWAIT) == _DONE
            except BlockingIOError:
                self.was_late = True
                return self._ours.recv(1) == _DONE
        return False

    def close(self) -> None:
        """Ends the process; waits a second for that, unless it waits for a source that does not answer."""
        self._ours.close()
        with contextlib.suppress(ChildProcessError):
            for _ in range(100):
                if os.waitpid(self._pid, os.WNOHANG) != (0, 0):
                    break
                time.sleep(0.01)


def _address(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _help(filler: Filler, channel: int, memory: memoryview) -> NoReturn:
    """The helper's life. It has the source's root and `channel` open, and an index of its own.

    SQLite's connections must not be used in two processes; an index that was replaced meanwhile is another tape's.
    """
    try:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # it ends when its parent does
        signal.set_wakeup_fd(-1)
        os.chdir("/")
        low, high = sorted((channel, filler.source.descriptor))
        os.closerange(0, low)
        os.closerange(low + 1, high)
        os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))
        tape = Tape.from_index(filler.tape.index_path)
        if tape.is_same(filler.tape):
            own = Filler(tape, filler.source, filler.at_home, strict=filler.strict)
            last, last_stop, stride = 0, 0, -1
            while job := os.read(channel, _JOB.size):
                place, start, stop = _JOB.unpack(job)
                try:
                    own.fill(memory[place : place + stop - start], start, stop)
                    os.write(channel, _DONE)
                except (TapeError, OSError):
                    os.write(channel, _FAILED)
                if tape.seal and stop - last_stop == stride:  # twice as far: a reader that goes on
                    _hash_ahead(own, channel, start + stride, stop + stride)
                stride, last_stop = stop - last_stop, stop
                # A reader that goes on will ask for as much, as far ahead: its rows, at least, can be at hand.
                ahead, margin = start - last, (stop - start) // 32
                for _ in tape.members(start + ahead - margin, stop + ahead + margin):
                    pass
                last = start
    finally:
        os._exit(0)


def _hash_ahead(filler: Filler, channel: int, start: int, stop: int) -> None:
    """Reads and hashes the blocks that are likely to be asked for next, until something is asked for."""
    start, stop = filler.whole_blocks(start, stop) if 0 <= start < stop <= filler.tape.total_size else (0, 0)
    step = _BLOCKS_AHEAD * filler.tape.block_size
    scratch = memoryview(bytearray(step))
    with contextlib.suppress(TapeError, OSError):  # whoever asks for it meets the same
        for at in range(start, stop, step):
            if select.select([channel], [], [], 0)[0]:
                return
            end = min(at + step, stop)
            filler.read_ahead(scratch[: end - at], at, end)
