"""Who fills a request: one thread, or several hands at once where that is faster.

Rule: a request is divided only while it is being answered. Nothing is read before it is asked for, so that every byte
is checked between the moment at which it was asked for and the moment at which it leaves; and the parts are made by the
same `Filler`, each as if it were a request of its own.

Two things are slow about many small members. Where the source is fast it is Python's own work, of which one process
does one piece at a time: a helper process, forked from this one, fills the second half into memory that both share.
Where the source is slow (a cold disk, a network file system) it is waiting, which threads do at the same time.

A helper that fails says only that it did: the part is then filled here, which finds the same and raises it.
"""

import contextlib
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

from tartapefs.errors import TapeError
from tartapefs.fill import Filler
from tartapefs.tape import Tape

_HELPED = 16  # members in a request, from which on a helper is worth two wake-ups
_HELPER_BYTES = 1 << 20  # the most that it fills at once
_LEAST, _STEP, _LATE = 0.2, 0.01, 30e-6  # of a request, for each side; how it is moved; seconds waited for the helper
_BLOCKS_SHARED, _BLOCK_STEP = 4, 0.02  # in a request of a sealed tape; how the helper's part is moved
_THREADS = 16  # that wait for a slow source at once
_PART = 1 << 13  # bytes, the smallest part for one of them
_SLOW_MEMBER, _SLOW_BYTE = 150e-6, 2e-9  # seconds; a source that takes longer than both together is slow
_PROBE = 1 << 15  # bytes that tell whether the source is slow
_SLOW_REQUESTS = 128  # to be divided before the source is looked at again

_JOB = struct.Struct("=qq")  # start, stop
_DONE, _FAILED = b"D", b"F"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)


class Crew:
    """Fills buffers as `filler` does, with several hands where that is faster. Usable from many threads."""

    def __init__(self, filler: Filler) -> None:
        self._filler = filler
        self._helper: _Helper | None = None
        self._density = 0.0  # members a byte in the last request
        self._our_share = 0.5  # of a request that the helper has a part in
        self._expected = -1  # where the last request that was not divided ended
        self._suspected = False  # whether the last of those took long
        self._slow_requests = 0  # still to be divided among threads
        self._threads = _Threads(_THREADS)
        self._block_size = filler.tape.block_size
        self._our_blocks = 0.5  # of the whole blocks in a request, how many are hashed here

    def fork_helper(self) -> None:
        """Forks the helper, while this process has one thread alone: call it before any other thread is started."""
        self._helper = _Helper(self._filler)

    def close(self) -> None:
        """Ends the helper. The threads wait for work, and end with the process."""
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    def fill(self, view: memoryview, start: int, stop: int) -> None:
        """Fills `view` with the bytes `[start, stop)` of the archive; raises what `Filler.fill` raises."""
        size, helper = stop - start, self._helper
        if self._block_size and size >= _BLOCKS_SHARED * self._block_size and self._hashes_much(view, start, stop):
            return
        if self._slow_requests > 0 and size >= 2 * _PART:
            self._slow_requests -= 1
            self._divide(view, start, stop)
        elif helper is not None and size * self._density >= _HELPED and helper.free.acquire(blocking=False):
            try:
                self._share(helper, view, start, stop)
            finally:
                helper.free.release()
        else:
            self._alone(view, start, stop)

    def _alone(self, view: memoryview, start: int, stop: int) -> None:
        """By this thread; of a source that may be slow a little, before as much as is asked for."""
        if (start != self._expected or self._suspected) and stop - start > 2 * _PROBE:
            self._observed(view[:_PROBE], start, start + _PROBE)
            self._expected = start + _PROBE
            self.fill(view[_PROBE:], start + _PROBE, stop)
        else:
            self._observed(view, start, stop)
            self._expected = stop

    def _observed(self, view: memoryview, start: int, stop: int) -> None:
        """Fills, and notes how. What takes long is observed again: the source is slow if this thread waited for it.

        On a machine that is busy everything takes long, but threads wait for nothing but their turn.
        """
        waits = _waits() if self._suspected else 0
        begun = time.monotonic()
        count, size = self._filler.fill(view, start, stop), stop - start
        takes_long = time.monotonic() - begun > _SLOW_MEMBER * count + _SLOW_BYTE * size
        self._density = count / size
        if takes_long and self._suspected and _waits() - waits >= count / 2 and (count > 1 or not self._block_size):
            self._slow_requests = _SLOW_REQUESTS
        self._suspected = takes_long

    def _share(self, helper: "_Helper", view: memoryview, start: int, stop: int) -> None:
        """The first part here, the rest by the helper, who is given so much that both end at the same time."""
        middle = max(start + int((stop - start) * self._our_share), stop - _HELPER_BYTES)
        helper.begin(middle, stop)
        try:
            self._observed(view[: middle - start], start, middle)
            begun = time.monotonic()
        finally:
            filled = helper.end()
        is_late = time.monotonic() - begun > _LATE
        self._our_share = min(max(self._our_share + (_STEP if is_late else -_STEP), _LEAST), 1 - _LEAST)
        if filled:
            view[middle - start :] = helper.memory[: stop - middle]
        else:
            self._filler.fill(view[middle - start :], middle, stop)

    def _hashes_much(self, view: memoryview, start: int, stop: int) -> bool:
        """Of a sealed tape, a request for several blocks of one member, with the helper; whether that is what it is.

        The helper takes whole blocks in the middle. Of those at the ends the neighbouring requests want a part as well:
        they are kept here.
        """
        helper, block_size = self._helper, self._block_size
        first, last = self._filler.whole_blocks(start, stop)
        if helper is None or last - first < (_BLOCKS_SHARED - 2) * block_size:
            return False
        cut = first + round((last - first) // block_size * self._our_blocks) * block_size
        cut = max(cut, last - _HELPER_BYTES // block_size * block_size)
        if cut >= last or not helper.free.acquire(blocking=False):
            return False
        try:
            helper.begin(cut, last)
            try:
                if start < cut:
                    self._filler.fill(view[: cut - start], start, cut)
                if last < stop:
                    self._filler.fill(view[last - start :], last, stop)
                begun = time.monotonic()
            finally:
                filled = helper.end()
            step = _BLOCK_STEP if time.monotonic() - begun > _LATE else -_BLOCK_STEP
            self._our_blocks = min(max(self._our_blocks + step, 0), 1 - _LEAST)
            if filled:
                view[cut - start : last - start] = helper.memory[: last - cut]
            else:
                self._filler.fill(view[cut - start : last - start], cut, last)
            self._expected, self._suspected = stop, False
            return True
        finally:
            helper.free.release()

    def _divide(self, view: memoryview, start: int, stop: int) -> None:
        """In equal parts, by threads; of what they raise, the first part's."""
        size = stop - start
        parts = min(_THREADS, size // _PART)
        cuts = [start + size * number // parts for number in range(parts + 1)]
        self._threads.run([partial(self._filler.fill, view[a - start : b - start], a, b) for a, b in pairwise(cuts)])


def _waits() -> int:
    """How often this thread has gone to sleep of its own."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class _Threads:
    """Threads that end with the process, whatever they wait for; started with the first work."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._starting = threading.Lock()
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def run(self, functions: Sequence[Callable[[], object]]) -> None:
        """Calls all of them, and returns once all have returned; raises what the first of them raised, if any did."""
        with self._starting:
            while self._count:
                threading.Thread(target=self._serve, daemon=True).start()
                self._count -= 1
        failures: list[BaseException | None] = [None] * len(functions)
        ended = threading.Semaphore(0)

        def call(number: int) -> None:
            try:
                functions[number]()
            except BaseException as error:
                failures[number] = error
            ended.release()

        for number in range(len(functions)):
            self._work.put(partial(call, number))
        for _ in functions:
            ended.acquire()
        for failure in failures:
            if failure is not None:
                raise failure

    def _serve(self) -> None:
        while True:
            self._work.get()()


class _Helper:
    """A process that fills `memory` with one range at a time; `free` is held by whom it works for.

    It ends when this process does, however that ends: its end of the pair is closed then.
    """

    def __init__(self, filler: Filler) -> None:
        self.free = threading.Lock()
        self.memory = memoryview(mmap.mmap(-1, _HELPER_BYTES))
        self._ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            _help(filler, theirs.detach(), self.memory)
        theirs.close()

    def begin(self, start: int, stop: int) -> None:
        """Asks for `[start, stop)`, at most `_HELPER_BYTES`; `end` is to be called next, whatever happens."""
        with contextlib.suppress(OSError):  # it is gone: `end` says so
            self._ours.send(_JOB.pack(start, stop))

    def end(self) -> bool:
        """Waits until it is done, and returns whether `memory` holds what it was asked for."""
        try:
            return self._ours.recv(1) == _DONE
        except OSError:
            return False

    def close(self) -> None:
        """Ends the process; waits a second for that, unless it waits for a source that does not answer."""
        self._ours.close()
        with contextlib.suppress(ChildProcessError):
            for _ in range(100):
                if os.waitpid(self._pid, os.WNOHANG) != (0, 0):
                    break
                time.sleep(0.01)


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
                start, stop = _JOB.unpack(job)
                try:
                    own.fill(memory[: stop - start], start, stop)
                    os.write(channel, _DONE)
                except (TapeError, OSError):
                    os.write(channel, _FAILED)
                if tape.seal and stop - last_stop == stride:  # twice as far: a reader that goes on
                    _hash_ahead(own, channel, start + stride, stop + stride)
                stride, last_stop = stop - last_stop, stop
                # A reader that goes on will ask for as much, as far ahead: its rows, at least, can be at hand.
                ahead, margin = start - last, (stop - start) // 16
                for _ in tape.members(start + ahead - margin, stop + ahead + margin):
                    pass
                last = start
    finally:
        os._exit(0)


def _hash_ahead(filler: Filler, channel: int, start: int, stop: int) -> None:
    """Reads and hashes the blocks that are likely to be asked for next, until something is asked for."""
    start, stop = filler.whole_blocks(start, stop) if 0 <= start < stop <= filler.tape.total_size else (0, 0)
    block_size = filler.tape.block_size
    scratch = memoryview(bytearray(block_size))
    with contextlib.suppress(TapeError, OSError):  # whoever asks for it meets the same
        for at in range(start, stop, block_size):
            if select.select([channel], [], [], 0)[0]:
                return
            filler.read_ahead(scratch, at, at + block_size)
