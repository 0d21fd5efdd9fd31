"""The stream: the archive in order, from any byte on, as events.

Rule: the data of all events together is what `readinto` gives, in order. Members that a chunk holds whole are read in
one request, and handed out one by one; others alone, piece by piece. Where there are many, and this process may be
forked, a helper begins with the next chunk, and takes the MD5 sums of its files, while this one is handed out: what is
sent was read, and checked, at most a chunk before.
"""

import hashlib
import mmap
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, pairwise
from stat import S_ISREG

from tartapefs.archive.layout import BLOCK, span
from tartapefs.archive.member import Member
from tartapefs.base import forked_work
from tartapefs.base.buffers import aligned
from tartapefs.index.recording import Recording
from tartapefs.play import events
from tartapefs.play.helper_process import SUM, sum_at
from tartapefs.play.read_strategy import Crew

CHUNK = 1 << 20
_SUMS = CHUNK // BLOCK * SUM  # bytes, for the sums of as many members as a chunk may hold
_LARGE = 1 << 18  # bytes; MD5 takes 0.4 ms for so many, several times what a thread costs

_ReadInto = Callable[[memoryview, int], int]


def play(tape: Recording, crew: Crew, readinto: _ReadInto, position: int, chunk_size: int) -> Iterator[events.Event]:
    """From `position` to the archive's end, `data` of at most `chunk_size` bytes; raises what `readinto` raises.

    `readinto` is to have buffers filled by `crew`.
    """
    most = min(chunk_size, CHUNK)
    is_helped = tape.member_count >= forked_work.MANY and not crew.has_helper and forked_work.is_possible()
    if is_helped:
        memory = mmap.mmap(-1, 2 * (CHUNK + _SUMS))
        crew.fork_helper(memory)
        first, second = (memoryview(memory)[at : at + CHUNK + _SUMS] for at in (0, CHUNK + _SUMS))
        chunks = [(half[:most], half[CHUNK:]) for half in (first, second)]
    else:
        chunks = 2 * [(aligned(most), memoryview(b""))]
    try:
        for members, following in pairwise(chain([[]], _groups(tape, position, most), [[]])):
            stop = members[-1].stop if members else position
            some: Iterator[events.Event] = iter(())
            if len(members) == 1:
                chunk = chunks[0][0] if chunk_size == most else aligned(min(chunk_size, stop - position))
                some = _alone(members[0], position, chunk, readinto)
            elif members:
                chunk, sums = chunks[0]
                readinto(chunk[: stop - position], position)
                some = _together(members, position, chunk, sums, crew.first_summed)
            if is_helped and len(members) != 1 and len(following) > 1:
                chunks.reverse()
                crew.expect(chunks[0][0][: following[-1].stop - stop], stop, chunks[0][1])
            yield from some
            position = stop
        while position < tape.total_size:
            data = aligned(min(chunk_size, tape.total_size - position))
            readinto(data, position)
            position += len(data)
            yield events.FileData(bytes(data))
        yield events.TapeCompleted()
    finally:
        if is_helped:
            crew.close()


def _groups(tape: Recording, position: int, most: int) -> Iterator[list[Member]]:
    """The members from `position` on, in lists: those together of which `most` bytes hold all, others alone."""
    group: list[Member] = []
    for member in tape.members(position):
        if group and member.stop - position > most:
            yield group
            position, group = member.start, []
        group.append(member)
    if group:
        yield group


def _together(
    members: list[Member], position: int, chunk: memoryview, sums: memoryview, first_summed: int
) -> Iterator[events.Event]:
    """Members that `chunk` has from `position` on; `sums` has those of files that start at `first_summed` or later."""
    start = position
    for member in members:
        first, _, mode, size, _, _, _, _, _ = member
        body, stop = first + BLOCK, first + span(size)
        resumed, md5sum = position > first, None
        yield events.file_start(member, resumed)
        data = bytes(chunk[position - start : stop - start])
        if S_ISREG(mode) and position <= body:
            if first >= first_summed and not resumed:
                at = sum_at(member, start)
                md5sum = sums[at : at + SUM].hex()
            else:
                contents = memoryview(data)[body - position : body - position + size]
                md5sum = hashlib.md5(contents, usedforsecurity=False).hexdigest()
        position = stop
        yield events.file_data(data)
        yield events.file_end(member, stop, md5sum, not resumed)


def _alone(member: Member, position: int, chunk: memoryview, readinto: _ReadInto) -> Iterator[events.Event]:
    """A member from `position` on, in pieces of the size of `chunk`."""
    first, size = member.start, member.size
    body, stop = first + BLOCK, first + span(size)
    resumed = position > first
    md5: _HashedAside | hashlib._Hash | None = None
    if position <= body and member.is_file:
        md5 = hashlib.md5(usedforsecurity=False)
        if size >= _LARGE and len(chunk) >= _LARGE:
            with suppress(OSError):  # where no thread can be started, it is hashed here
                md5 = _HashedAside()
    try:
        yield events.file_start(member, resumed)
        while position < stop:
            part = chunk[: stop - position]
            readinto(part, position)
            data = bytes(part)
            if md5 is not None:
                md5.update(memoryview(data)[max(0, body - position) : max(0, body + size - position)])
            position += len(data)
            yield events.file_data(data)
        yield events.file_end(member, stop, md5.hexdigest() if md5 else None, not resumed)
    finally:
        if isinstance(md5, _HashedAside):
            md5.close()


class _HashedAside:
    """An MD5 as hashlib has them, taken by a thread while its owner goes on. Closed by its digest, or by `close`."""

    def __init__(self) -> None:
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._pieces: queue.Queue[memoryview] = queue.Queue(1)
        self._thread = forked_work.thread(self._hash)

    def _hash(self) -> None:
        while piece := self._pieces.get():
            self._md5.update(piece)

    def update(self, data: memoryview) -> None:
        if data:
            self._pieces.put(data)

    def hexdigest(self) -> str:
        self.close()
        return self._md5.hexdigest()

    def close(self) -> None:
        if self._thread.is_alive() and not sys.is_finalizing():  # Python is ending, and no thread goes on any more
            self._pieces.put(memoryview(b""))
            self._thread.join()
