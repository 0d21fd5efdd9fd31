"""Restores members from a copy of the archive: reads their ranges alone, and checks them by the tape's digests.

Rule: a member's name only ever shows contents with its digests. Each slice of a member is checked in memory before any
byte of it is written, and a file gets its name once all its slices were right (`destination`).

Several threads read and check. Once the restorer is left none of them writes, so one that then waits for a server is
not waited for.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Self

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.archive.member import Member
from tartapefs.base.buffers import aligned, read_all
from tartapefs.base.errors import Difference, Fact, OtherNameError, TapeError, TapeIntegrityError
from tartapefs.play.thread_pool import map_in_threads
from tartapefs.play.verified_blocks import damage
from tartapefs.verify.destination import Destination
from tartapefs.verify.ranged_requests import CopyReader, Slice, requests

_REMEDY = "the copy is damaged here, or of another archive; take another one"
_BATCH = 4096  # members whose requests are planned together


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of a member.

    was_there: a file or link with these contents was there, and was not read from the copy.
    error: why it was not restored: the copy differs, another file has its name, or it is a hard link and what has its
    contents was not restored; else None.
    """

    member: Member
    was_there: bool = False
    error: TapeIntegrityError | FileExistsError | OtherNameError | None = None


class _Request(NamedTuple):
    """Neighbours to read, maybe none; what became of members that need no request."""

    slices: list[Slice]
    known: list[Restored]


class Restorer:
    """Writes members of `tape` below the folder `destination`, from `copy`, in so many threads.

    `offset`: where in the archive `copy` begins, in bytes. `overwrite`: replaces existing files. `unchecked`: takes a
    tape without digests, whose contents nothing is compared with; else raises TapeError for one.

    A context manager: folders get their modes and times at its end.

    done: how many bytes of the archive were dealt with so far.
    """

    def __init__(
        self,
        tape: Tape,
        copy: CopyReader,
        destination: str,
        offset: int = 0,
        overwrite: bool = False,
        threads: int = 1,
        unchecked: bool = False,
    ) -> None:
        if not tape.seal and not unchecked:
            raise TapeError(f"{tape.index_path}: has no digests to check a copy with", 'run "tartapefs seal" first')
        self._tape, self._copy, self._offset, self._threads = tape, copy, offset, threads
        self._hash = hash_tree.hasher(tape.algorithm) if tape.seal else None
        self._block_size = tape.block_size if tape.seal else hash_tree.BLOCK_SIZE
        self._destination = Destination(tape, destination, overwrite)
        self.done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(*([OSError] if kind else [])):
            self._destination.close()

    def restore(self, members: Iterable[Member]) -> Iterator[list[Restored]]:
        """Restores members, a folder before what lies in it; yields what became of them, some at a time.

        With several threads the order is another one; hard links come last, since they need the others. Goes on after a
        member that is wrong in the copy, or whose name is taken. Raises CopyError and OSError, and ends: what was
        yielded until then is complete.
        """
        hard_links: list[Member] = []
        for some in (_without_hard_links(members, hard_links), hard_links):
            for count, restored in map_in_threads(self._serve, self._requests(some), self._threads):
                self.done += count
                yield restored

    def _requests(self, members: Iterable[Member]) -> Iterator[_Request]:
        members = iter(members)
        while batch := list(islice(members, _BATCH)):
            known, wanted = [], []
            for member in batch:
                restored = self._without_request(member)
                if restored is None:
                    wanted.append(member)
                else:
                    known.append(restored)
            yield _Request([], known)
            for slices in requests(wanted, self._copy.gap, self._block_size):
                yield _Request(slices, [])

    def _without_request(self, member: Member) -> Restored | None:
        """What becomes of a member, if nothing has to be read for that; makes the folder that it is, or lies in."""
        start, stop = member.start - self._offset, member.body + member.size - self._offset
        if not 0 <= start < self._copy.size:
            return Restored(member, error=_wrong(member, "this member", "nothing"))
        if stop > self._copy.size:
            return Restored(member, error=_wrong(member, "all of this member", "an end"))
        with _named(member):
            if member.is_directory:
                self._destination.add_folder(member)
                return None
            try:
                is_there = self._destination.look(member, self._has_contents if self._hash else None)
            except FileExistsError as error:
                error.filename = member.arc_path
                return Restored(member, error=error)
            except OtherNameError as error:
                return Restored(member, error=error)
        return Restored(member, was_there=True) if is_there else None

    def _has_contents(self, member: Member, fd: int) -> bool:
        """Whether a file of the member's size has its contents."""
        for number in range(hash_tree.block_count(member.size, self._block_size)):
            offset = number * self._block_size
            block = aligned(min(self._block_size, member.size - offset))
            try:
                read_all(fd, block, offset)
            except OSError:
                return False
            if self._wrong_block(member, number, block) is not None:
                return False
        return True

    def _serve(self, request: _Request) -> tuple[int, list[Restored]]:
        """Reads a request, and writes what is right of it; returns how many bytes of the archive that is, or was."""
        slices, restored = request
        count = sum(each.stop - each.start for each in slices)
        count += sum(each.member.stop - each.member.start for each in restored)
        slices = [each for each in slices if not self._destination.is_dropped(each.member)]
        if not slices or self._destination.is_closed:
            return count, restored
        start, stop = slices[0].start, slices[-1].stop
        memory = aligned(stop - start)
        self._copy.readinto(memory, start - self._offset)
        for each in slices:
            try:
                with _named(each.member):
                    if self._take(each, memory[each.start - start : each.stop - start]):
                        restored.append(Restored(each.member))
            except (TapeIntegrityError, FileExistsError, OtherNameError) as error:
                if self._destination.drop(each.member):
                    restored.append(Restored(each.member, error=error))
        return count, restored

    def _take(self, part: Slice, view: memoryview) -> bool:
        """Checks and writes a slice; returns whether the member is complete now. Raises TapeIntegrityError, OSError."""
        member = part.member
        if part.start == member.start:
            header, view = view[: member.body - member.start], view[member.body - member.start :]
            if header != member.header():
                raise _wrong(member, "its header", "another")
        if member.is_directory:
            return True
        offset = max(part.start - member.body, 0)
        if (number := self._wrong_block(member, offset // self._block_size, view)) is not None:
            found = damage(member, number, self._block_size, "another in the copy")
            raise TapeIntegrityError(member.arc_path, found.differences, _REMEDY)
        return self._destination.write(member, offset, view)

    def _wrong_block(self, member: Member, first: int, view: memoryview) -> int | None:
        """The number of a block that has another digest; `view` has blocks of the body from `first` on."""
        if self._hash is None or not view:
            return None
        size, count = self._block_size, hash_tree.block_count(len(view), self._block_size)
        digests = self._tape.block_digests(member, first, first + count)
        for at in range(count):
            digest = self._hash(view[at * size : (at + 1) * size])
            if digest != digests[at * hash_tree.SIZE : (at + 1) * hash_tree.SIZE]:
                return first + at
        return None


def _without_hard_links(members: Iterable[Member], hard_links: list[Member]) -> Iterator[Member]:
    """Yields the members but hard links, which it puts into the list."""
    for member in members:
        if member.is_hard_link:
            hard_links.append(member)
        else:
            yield member


@contextmanager
def _named(member: Member) -> Iterator[None]:
    """Has errors of the system name the member, not what they know of it: descriptors, temporary names."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = member.arc_path, None
        raise


def _wrong(member: Member, recorded: str, found: str) -> TapeIntegrityError:
    return TapeIntegrityError(member.arc_path, [Difference(Fact.COPY, recorded, found)], _REMEDY)
