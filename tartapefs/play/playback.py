"""Playback: the archive in order, from any byte on, as events.

Rule: the data of all events together is what `readinto` gives, in order. Members that fit into a chunk together are
read in one request, and yielded one by one; others alone, piece by piece. If the caller allows a second process,
and it pays, a helper begins with the next chunk, and takes the MD5 sums of its files, while this process yields the
current one: every byte was read, and checked, at most a chunk before it is yielded.
"""

import hashlib
import mmap
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, pairwise
from stat import S_ISREG

from tartapefs.archive.layout import BLOCK, head_size, span
from tartapefs.archive.member import Member
from tartapefs.base import forked_work, processes
from tartapefs.base.buffers import aligned
from tartapefs.index.recording import Recording
from tartapefs.play import events
from tartapefs.play.helper_process import MD5_SIZE, sum_offset
from tartapefs.play.read_strategy import ReadStrategy

CHUNK = 1 << 20
_SUMS = CHUNK // BLOCK * MD5_SIZE  # bytes: MD5 sums of as many members as a chunk may hold
_LARGE = 1 << 18  # bytes; MD5 takes 0.4 ms for so many, several times what a thread costs

_ReadInto = Callable[[memoryview, int], int]


def play(
    tape: Recording, strategy: ReadStrategy, readinto: _ReadInto, position: int, chunk_size: int, processes: int
) -> Iterator[events.Event]:
    """Yields the archive from `position` on, `data` of at most `chunk_size` bytes; raises what `readinto` raises.

    `readinto` must fill buffers by `strategy`. With two `processes` it may fork a helper, which ends with the iterator.
    """
    capacity = min(chunk_size, CHUNK)
    has_own_helper = not strategy.has_helper and forked_work.pays(processes, tape.member_count)
    if has_own_helper:
        memory = mmap.mmap(-1, 2 * (CHUNK + _SUMS))
        strategy.fork_helper(memory)
        first, second = (memoryview(memory)[at : at + CHUNK + _SUMS] for at in (0, CHUNK + _SUMS))
        chunks = [(half[:capacity], half[CHUNK:]) for half in (first, second)]
    else:
        chunks = 2 * [(aligned(capacity), memoryview(b""))]
    try:
        for members, following in pairwise(chain([[]], _groups(tape, position, capacity), [[]])):
            stop = members[-1].stop if members else position
            member_events: Iterator[events.Event] = iter(())
            if len(members) == 1:
                chunk = chunks[0][0] if chunk_size == capacity else aligned(min(chunk_size, stop - position))
                member_events = _play_one(members[0], position, chunk, readinto)
            elif members:
                chunk, sums = chunks[0]
                readinto(chunk[: stop - position], position)
                member_events = _play_group(members, position, chunk, sums, strategy.first_summed)
            if has_own_helper and len(members) != 1 and len(following) > 1:
                chunks.reverse()
                strategy.expect(chunks[0][0][: following[-1].stop - stop], stop, chunks[0][1])
            yield from member_events
            position = stop
        while position < tape.total_size:
            data = aligned(min(chunk_size, tape.total_size - position))
            readinto(data, position)
            position += len(data)
            yield events.FileData(bytes(data))
        yield events.TapeCompleted()
    finally:
        if has_own_helper:
            strategy.close()


def _groups(tape: Recording, position: int, capacity: int) -> Iterator[list[Member]]:
    """Groups the members from `position` on: those that fit into `capacity` bytes together, others alone."""
    group: list[Member] = []
    for member in tape.members(position):
        if group and member.stop - position > capacity:
            yield group
            position, group = member.start, []
        group.append(member)
    if group:
        yield group


def _play_group(
    members: list[Member], position: int, chunk: memoryview, sums: memoryview, first_summed: int
) -> Iterator[events.Event]:
    """Yields the members in `chunk`, from `position` on; `sums`: MD5 of files that start at `first_summed` or later."""
    start = position
    for member in members:
        first, name, mode, size, _, _, _, target, _ = member
        head = head_size(name, target)
        body, stop = first + head, first + span(size, head)
        resumed, md5sum = position > first, None
        yield events.file_start(member, resumed)
        data = bytes(chunk[position - start : stop - start])
        if S_ISREG(mode) and not target and position <= body:
            if first >= first_summed and not resumed:
                at = sum_offset(member, start)
                md5sum = sums[at : at + MD5_SIZE].hex()
            else:
                contents = memoryview(data)[body - position : body - position + size]
                md5sum = hashlib.md5(contents, usedforsecurity=False).hexdigest()
        position = stop
        yield events.file_data(data)
        yield events.file_end(member, stop, md5sum, not resumed)


def _play_one(member: Member, position: int, chunk: memoryview, readinto: _ReadInto) -> Iterator[events.Event]:
    """Yields one member from `position` on, in pieces of the size of `chunk`."""
    first, size, body, stop = member.start, member.size, member.body, member.stop
    resumed = position > first
    md5: _ThreadedMD5 | hashlib._Hash | None = None
    if position <= body and member.is_file:
        md5 = hashlib.md5(usedforsecurity=False)
        if size >= _LARGE and len(chunk) >= _LARGE:
            with suppress(OSError):  # if no thread can be started, this one hashes
                md5 = _ThreadedMD5()
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
        if isinstance(md5, _ThreadedMD5):
            md5.close()


class _ThreadedMD5:
    """An MD5 like hashlib's that a thread computes while the caller goes on. `hexdigest` and `close` end the thread."""

    def __init__(self) -> None:
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._pieces: queue.Queue[memoryview] = queue.Queue(1)
        self._thread = processes.start_thread(self._hash)

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
        if self._thread.is_alive() and not sys.is_finalizing():  # at Python's end no thread runs any more
            self._pieces.put(memoryview(b""))
            self._thread.join()
