"""The helper: a process, forked from this one, that fills a part of a request in memory that both share.

Rule: this process fills a request from the front and the helper from the back, until they meet. So both end together
however unlike the members are and however late the helper was woken, and nothing has to be guessed. The helper's part
is made by a `Filler` like ours, with every check; if it fails it says only that it did, and the part is filled here,
which finds the same and raises it.

While nothing is asked for, it prepares what a reader that goes on will ask for next, as far as that takes no look at
the source that would be too early: rows and headers, and the blocks of sealed tapes. A block that has its digest is the
recorded one, and the file is still looked at when the block is asked for.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import NoReturn, TypeVar

from tartapefs.archive.layout import BLOCK, MAX_OFFSET
from tartapefs.archive.member import Headed, Member
from tartapefs.base import forked_work, signals
from tartapefs.base.errors import TapeError
from tartapefs.index.recording import Recording
from tartapefs.play.assemble import Filler

# Place in the shared memory, start, stop, whether it is in one member, block by block; the place for sums, or -1.
_JOB = struct.Struct("=qqq?q")
_COUNT = struct.Struct("=q")  # the members that were filled, or -1
_LAST_WAIT = 1.0  # seconds, for the end of a helper
_POLLS = 20  # of a helper that is at its last member, before it is slept for
SUM = 16  # bytes of an MD5 sum

_Unit = TypeVar("_Unit", Headed, int)


def _start_of(unit: Headed) -> int:
    return unit[0].start


def sum_at(member: Member, start: int) -> int:
    """Where the sum of a member is, among those of a range that starts at `start`; negative if it starts before."""
    return (member.start - start) // BLOCK * SUM


class Helper:
    """A process that fills one range at a time, in memory that this process and it share.

    It ends when this process does, however that ends: its end of the pair is closed then. Raises OSError where there
    may be no other process.
    """

    def __init__(self, filler: Filler, memory: mmap.mmap) -> None:
        self._start = _address(memory)
        self._stop = self._start + len(memory)
        self._claims = _Claims()
        self.first_filled = MAX_OFFSET  # of the last range, where the first member starts that it filled
        self._ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._pid = forked_work.fork()
            except OSError:
                self._ours.close()
                raise
            if self._pid == 0:
                _help(filler, theirs.detach(), memoryview(memory), self._claims)

    def place_of(self, view: memoryview) -> int:
        """Where in the shared memory `view` lies; -1 if it does not."""
        address = _address(view)
        return address - self._start if self._start <= address < self._stop else -1

    def begin(self, place: int, start: int, stop: int, in_blocks: bool = False, sums: int = -1) -> None:
        """Asks for `[start, stop)` at this place; `end` is to be called next, whatever happens.

        `in_blocks`: it is in the body of one member, and is filled by blocks; those at its ends are the helper's.
        `sums`: where in the shared memory the MD5 sums of the files that it fills are wanted.
        """
        self._claims.begin()
        with contextlib.suppress(OSError):  # it is gone: `end` says so
            self._ours.send(_JOB.pack(place, start, stop, in_blocks, sums))

    def our_members(self, members: Iterable[Headed]) -> Iterator[Headed]:
        """Of the members of the range, in their order, those that are to be filled here."""
        return self._claims.from_the_front(members, _start_of)

    def our_blocks(self, numbers: Iterable[int]) -> Iterator[int]:
        """Of the numbers of blocks in the range, in their order, those of blocks that are to be filled here."""
        return self._claims.from_the_front(numbers, int)

    def end(self) -> int:
        """Waits until it is done, and returns how many members it filled; -1 if it failed, and nothing is certain."""
        self._claims.end()
        answer = b""
        with contextlib.suppress(OSError):  # it is gone
            answer = self._answer()
        count: int = _COUNT.unpack(answer)[0] if answer else -1
        self.first_filled = self._claims.first_from_the_back() if count >= 0 else MAX_OFFSET
        return count

    def _answer(self) -> bytes:
        for _ in range(_POLLS):
            with contextlib.suppress(BlockingIOError):
                return self._ours.recv(_COUNT.size, socket.MSG_DONTWAIT)
        return self._ours.recv(_COUNT.size)

    def close(self) -> None:
        """Ends the process, which holds the source open until then; waits a second, it may wait for a dead source."""
        self._ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):  # it is gone
            process = os.pidfd_open(self._pid)
            try:
                forked_work.await_end(process, _LAST_WAIT)
            finally:
                os.close(process)
        self._ours.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, os.WNOHANG)


def _address(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class _Claims:
    """Which units of a range are whose, in memory that two processes share: members, or blocks of one.

    Each claims a unit before it fills it, unless the other one has. In one and the same instant both may claim the one
    at which they meet: then both fill it, with the same bytes. None is left out: who has claimed one fills it.
    """

    def __init__(self) -> None:
        # The places of the units that were claimed last, from the front and from the back; how many ranges were begun.
        self._at = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def begin(self) -> None:
        self._at[0], self._at[1] = -1, MAX_OFFSET
        self._at[2] += 1

    def from_the_front(self, units: Iterable[_Unit], place_of: Callable[[_Unit], int]) -> Iterator[_Unit]:
        at = self._at
        for unit in units:
            place = place_of(unit)
            if at[1] <= place:
                return
            at[0] = place
            yield unit

    def from_the_back(self, units: Iterable[_Unit], place_of: Callable[[_Unit], int]) -> Iterator[_Unit]:
        at = self._at
        for unit in units:
            place = place_of(unit)
            if place <= at[0]:
                return
            at[1] = place
            yield unit

    def first_from_the_back(self) -> int:
        return self._at[1]

    def are_more_than(self, ranges: int) -> bool:
        """Whether more ranges were begun than these."""
        return self._at[2] > ranges

    def end(self) -> None:
        """All that is not claimed from the back is claimed from the front, whatever becomes of it."""
        self._at[0] = MAX_OFFSET


def _help(filler: Filler, channel: int, memory: memoryview, claims: _Claims) -> NoReturn:
    """The helper's life. It has the source's root and `channel` open, and an index of its own.

    SQLite's connections must not be used in two processes; an index that was replaced meanwhile is another tape's.
    """
    try:
        signals.ignore()
        os.chdir("/")
        forked_work.close_all_but(channel, filler.source.descriptor)
        tape = Recording.from_index(filler.tape.index_path)
        if tape.is_same(filler.tape):
            own = Filler(tape, filler.source, filler.at_home, strict=filler.strict)
            ranges, last_stop, last_step = 0, 0, -1
            while job := os.read(channel, _JOB.size):
                place, start, stop, in_blocks, sums = _JOB.unpack(job)
                ranges += 1
                view = memory[place : place + stop - start]
                count = _fill(own, claims, view, start, stop, in_blocks, memory[sums:] if sums >= 0 else None)
                os.write(channel, _COUNT.pack(count))
                # A reader that goes on will ask for as much, as far ahead, and for so many of us again.
                step, is_asked = stop - last_stop, partial(claims.are_more_than, ranges)
                with contextlib.suppress(TapeError, OSError):  # whoever asks for it meets the same
                    if in_blocks and step == last_step:  # twice as far
                        own.hash_ahead(start + step, stop + step, is_asked)
                    elif not in_blocks and start == last_stop:  # rows and headers
                        following = islice(tape.headed_backwards(start + step, stop + step), max(count, 0))
                        any(is_asked() for _ in following)
                last_stop, last_step = stop, step
    finally:
        os._exit(0)


def _fill(
    filler: Filler,
    claims: _Claims,
    view: memoryview,
    start: int,
    stop: int,
    in_blocks: bool,
    sums: memoryview | None,
) -> int:
    """Fills from the back what is not claimed from the front; returns how many members, or -1 if it cannot."""
    try:
        blocks = filler.blocks(start, stop) if in_blocks else None
        if blocks is None:
            members = claims.from_the_back(filler.tape.headed_backwards(start, stop), _start_of)
            return filler.fill(view, start, stop, members if sums is None else _summed(members, view, start, sums))
        ours = claims.from_the_back(reversed(blocks.whole), int)
        filler.fill_blocks(view, blocks, chain(blocks.ends, ours))
        return 1
    except (TapeError, OSError):
        return -1


def _summed(members: Iterable[Headed], view: memoryview, start: int, sums: memoryview) -> Iterator[Headed]:
    """Those `members`, which whoever takes them fills into `view`; each file's sum once it is there, if it is whole."""
    for member, header in members:
        yield member, header
        at, body = sum_at(member, start), member.start + BLOCK - start
        if member.is_file and at >= 0:
            sums[at : at + SUM] = hashlib.md5(view[body : body + member.size], usedforsecurity=False).digest()
