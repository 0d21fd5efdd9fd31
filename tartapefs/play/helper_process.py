"""The helper process: forked from this one, it fills a part of a request in memory that both share.

Rule: this process fills a request from the front and the helper from the back, until they meet. So both end together,
however unlike the members are and however late the helper wakes up, without a guessed cut. The helper fills its part
with an `Assembler` of its own, with every check; if it fails, it reports only that it did, and this process fills the
whole request, meets the same failure and raises it.

Between requests it prepares what a sequential reader will request next, as far as that needs no early check of the
source: rows and headers, and the blocks of sealed tapes. A block that has its digest is the recorded one, and the file
is still checked when the block is requested.
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
from tartapefs.base import processes, signals
from tartapefs.base.errors import TapeError
from tartapefs.index.recording import Recording
from tartapefs.play.assemble import Assembler

# Offset in the shared memory, start, stop, whether to fill one member by blocks, offset of the MD5 sums or -1.
_JOB = struct.Struct("=qqq?q")
_COUNT = struct.Struct("=q")  # the number of members filled, or -1
_CLOSE_TIMEOUT = 1.0  # seconds
_POLLS = 20  # for the answer, before a sleep: the helper is at its last member
MD5_SIZE = 16  # bytes of an MD5 sum

_Unit = TypeVar("_Unit", Headed, int)


def _start_of(unit: Headed) -> int:
    return unit[0].start


def sum_offset(member: Member, start: int) -> int:
    """The offset of the member's MD5 sum among those of a range from `start` on; negative if it starts before."""
    return (member.start - start) // BLOCK * MD5_SIZE


class HelperProcess:
    """A process that fills one range at a time, in memory that this process and it share.

    It ends when this process does, however that ends: the kernel then closes this end of the socket pair. Raises
    OSError if no process can be forked.
    """

    def __init__(self, assembler: Assembler, memory: mmap.mmap) -> None:
        self._start = _address(memory)
        self._stop = self._start + len(memory)
        self._claims = _Claims()
        self.first_filled = MAX_OFFSET  # start of the first member that it filled in the last range
        self._ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._pid = processes.fork()
            except OSError:
                self._ours.close()
                raise
            if self._pid == 0:
                _serve(assembler, theirs.detach(), memoryview(memory), self._claims)

    def memory_offset(self, view: memoryview) -> int:
        """The offset of `view` in the shared memory, in bytes; -1 if it lies elsewhere."""
        address = _address(view)
        return address - self._start if self._start <= address < self._stop else -1

    def begin(self, memory_offset: int, start: int, stop: int, in_blocks: bool = False, sums: int = -1) -> None:
        """Requests `[start, stop)`, at `memory_offset` of the shared memory; the caller must call `end` next.

        `in_blocks`: the range is in the body of one member; fill it by blocks, those at its ends by the helper.
        `sums`: the offset in the shared memory for the MD5 sums of the files that the helper fills; -1 for none.
        """
        self._claims.begin()
        with contextlib.suppress(OSError):  # it has ended: `end` reports it
            self._ours.send(_JOB.pack(memory_offset, start, stop, in_blocks, sums))

    def our_members(self, members: Iterable[Headed]) -> Iterator[Headed]:
        """Claims and yields the members to fill in this process, in their order."""
        return self._claims.claim_from_front(members, _start_of)

    def our_blocks(self, numbers: Iterable[int]) -> Iterator[int]:
        """Claims and yields the numbers of the blocks to fill in this process, in their order."""
        return self._claims.claim_from_front(numbers, int)

    def end(self) -> int:
        """Waits for the helper; returns how many members it filled, or -1 if it failed and its part is undefined."""
        self._claims.end()
        answer = b""
        with contextlib.suppress(OSError):  # it has ended
            answer = self._answer()
        count: int = _COUNT.unpack(answer)[0] if answer else -1
        self.first_filled = self._claims.first_from_back() if count >= 0 else MAX_OFFSET
        return count

    def _answer(self) -> bytes:
        for _ in range(_POLLS):
            with contextlib.suppress(BlockingIOError):
                return self._ours.recv(_COUNT.size, socket.MSG_DONTWAIT)
        return self._ours.recv(_COUNT.size)

    def close(self) -> None:
        """Ends the process, which has the source open; waits a second at most, since a dead source may block it."""
        self._ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):  # it has ended
            process = os.pidfd_open(self._pid)
            try:
                processes.await_end(process, _CLOSE_TIMEOUT)
            finally:
                os.close(process)
        self._ours.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, os.WNOHANG)


def _address(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class _Claims:
    """Which process fills which units of a range (members, or blocks of one), in memory that both share.

    Each claims a unit before it fills it, unless the other one has. Both may claim the unit at which they meet, in a
    race: then both fill it, with the same bytes. No unit is left out: a process fills what it claims.
    """

    def __init__(self) -> None:
        # The keys of the last units claimed from the front and from the back; the number of ranges begun.
        self._at = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def begin(self) -> None:
        self._at[0], self._at[1] = -1, MAX_OFFSET
        self._at[2] += 1

    def claim_from_front(self, units: Iterable[_Unit], key_of: Callable[[_Unit], int]) -> Iterator[_Unit]:
        at = self._at
        for unit in units:
            key = key_of(unit)
            if at[1] <= key:
                return
            at[0] = key
            yield unit

    def claim_from_back(self, units: Iterable[_Unit], key_of: Callable[[_Unit], int]) -> Iterator[_Unit]:
        at = self._at
        for unit in units:
            key = key_of(unit)
            if key <= at[0]:
                return
            at[1] = key
            yield unit

    def first_from_back(self) -> int:
        return self._at[1]

    def are_more_than(self, ranges: int) -> bool:
        """Whether more ranges were begun than these."""
        return self._at[2] > ranges

    def end(self) -> None:
        """Claims from the front all that is not claimed from the back, so that the helper stops."""
        self._at[0] = MAX_OFFSET


def _serve(assembler: Assembler, channel: int, memory: memoryview, claims: _Claims) -> NoReturn:
    """Runs the helper until `channel` closes. It has the source's root and `channel` open, and its own index.

    Two processes must not share SQLite's connections; if the index was replaced meanwhile, the helper ends.
    """
    try:
        signals.ignore()
        os.chdir("/")
        processes.close_all_but(channel, assembler.source.descriptor)
        tape = Recording.from_index(assembler.tape.index_path)
        if tape.is_same(assembler.tape):
            own = Assembler(
                tape,
                assembler.source,
                assembler.at_home,
                strict=assembler.strict,
                allow_additions=assembler.allow_additions,
            )
            ranges, last_stop, last_step = 0, 0, -1
            while job := os.read(channel, _JOB.size):
                offset, start, stop, in_blocks, sums = _JOB.unpack(job)
                ranges += 1
                view = memory[offset : offset + stop - start]
                count = _fill(own, claims, view, start, stop, in_blocks, memory[sums:] if sums >= 0 else None)
                os.write(channel, _COUNT.pack(count))
                # A sequential reader will request as much, as far ahead, with as many members for the helper.
                step, is_asked = stop - last_stop, partial(claims.are_more_than, ranges)
                with contextlib.suppress(TapeError, OSError):  # the request for it meets the same
                    if in_blocks and step == last_step:  # twice as far
                        own.hash_ahead(start + step, stop + step, is_asked)
                    elif not in_blocks and start == last_stop:  # rows and headers
                        following = islice(tape.headed_backwards(start + step, stop + step), max(count, 0))
                        any(is_asked() for _ in following)
                last_stop, last_step = stop, step
    finally:
        os._exit(0)


def _fill(
    assembler: Assembler,
    claims: _Claims,
    view: memoryview,
    start: int,
    stop: int,
    in_blocks: bool,
    sums: memoryview | None,
) -> int:
    """Fills from the back what is not claimed from the front; returns how many members, or -1 on failure."""
    try:
        blocks = assembler.blocks(start, stop) if in_blocks else None
        if blocks is None:
            members = claims.claim_from_back(assembler.tape.headed_backwards(start, stop), _start_of)
            return assembler.fill(
                view, start, stop, members if sums is None else _with_md5_sums(members, view, start, sums)
            )
        ours = claims.claim_from_back(reversed(blocks.whole), int)
        assembler.fill_blocks(view, blocks, chain(blocks.ends, ours))
        return 1
    except (TapeError, OSError):
        return -1


def _with_md5_sums(members: Iterable[Headed], view: memoryview, start: int, sums: memoryview) -> Iterator[Headed]:
    """Yields `members`, which the caller fills into `view`; after each file that is there whole, stores its MD5 sum."""
    for member, header in members:
        yield member, header
        at, body = sum_offset(member, start), member.body - start
        if member.is_file and at >= 0:
            sums[at : at + MD5_SIZE] = hashlib.md5(view[body : body + member.size], usedforsecurity=False).digest()
