"""Compares a folder that was extracted from a copy of the archive with a sealed tape, by its index alone.

Rule: it compares what `tar` restores: type, permission bits, size, modification time in whole seconds, a link's target,
and contents by their digests; and it looks for files that the archive does not have. A hard link must be one, as for
`tar --compare`.
"""

import os
import stat
from collections.abc import Callable, Container, Iterator

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.archive.member import Member
from tartapefs.base.buffers import aligned, read_all
from tartapefs.base.errors import NOTHING, Difference, Fact, TapeIntegrityError
from tartapefs.base.text import file_type
from tartapefs.play.verified_blocks import damage
from tartapefs.source.drift import differences, target_of, unreadable
from tartapefs.source.folder import Source
from tartapefs.verify.content_scan import BodyRange, Extent, extents, map_in_order

_NS = 10**9
_REMEDY = "extract it again, from a copy that is good"

Progress = Callable[[int], None]


def verify_extracted(
    tape: Tape, extracted: Source, ignore: Container[str] = (), on_progress: Progress = lambda position: None
) -> Iterator[TapeIntegrityError]:
    """Yields all that differs in the folder `extracted`, nearly in the archive's order. Raises TapeFormatError.

    `ignore`: which of "mode" and "mtime" not to compare. `on_progress` is called with the offset in the archive.
    """
    comparison = _Comparison(tape, extracted, ignore)
    names = _Names(extracted)
    in_order = len(tape.generations) == 1  # so that the names of each folder are together
    for extent, found in map_in_order(comparison.differences, extents(tape, tape.block_size)):
        for error in found:
            yield TapeIntegrityError(error.member, error.differences, _REMEDY)
        for member, start, _ in extent.bodies:
            if start == 0 and in_order:
                yield from names.add(member)
        on_progress(extent.stop)
    for member in () if in_order else tape.latest_members():
        yield from names.add(member)
    yield from names.finish()


class _Comparison:
    """Compares extents with the folder; usable from many threads."""

    def __init__(self, tape: Tape, extracted: Source, ignore: Container[str]) -> None:
        self._tape, self._extracted, self._ignore = tape, extracted, ignore
        self._hash = hash_tree.hasher(tape.algorithm)

    def differences(self, extent: Extent) -> list[TapeIntegrityError]:
        found: list[TapeIntegrityError] = []
        for body in extent.bodies:
            member = body.member
            try:
                different = self._facts(member) if body.start == 0 else ()
                if different:
                    found.append(TapeIntegrityError(member.arc_path, different))
                if body.stop > body.start:
                    found += self._contents(body)
            except OSError as error:
                if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                    found.append(TapeIntegrityError(member.arc_path, [unreadable(error)]))
        return found

    def _facts(self, member: Member) -> tuple[Difference, ...]:
        if member.is_directory and self._tape.is_superseded(member):
            return ()
        try:
            now = self._extracted.lstat(member.path)
            target = target_of(member, now, self._extracted)
        except (FileNotFoundError, NotADirectoryError):
            return differences(member, None, b"", at_home=False)
        same_second = now.st_mtime_ns // _NS == member.mtime_ns // _NS
        ignored = [fact for fact in (Fact.MTIME, Fact.MODE) if fact in self._ignore]
        if same_second:
            ignored.append(Fact.MTIME)
        if stat.S_ISLNK(now.st_mode):
            ignored.append(Fact.MODE)  # a link has none
        return tuple(d for d in differences(member, now, target, at_home=False) if d.what not in ignored)

    def _contents(self, body: BodyRange) -> list[TapeIntegrityError]:
        member, block_size = body.member, self._tape.block_size
        fd = self._extracted.open(member.path)
        try:
            now = self._extracted.fstat(fd)
            if not stat.S_ISREG(now.st_mode) or now.st_size != member.size:
                return []  # its facts already say so
            first, stop = body.start // block_size, hash_tree.block_count(body.stop, block_size)
            recorded = self._tape.block_digests(member, first, stop)
            found = []
            for number in range(first, stop):
                offset = number * block_size
                block = aligned(min(block_size, member.size - offset))
                read_all(fd, block, offset)
                at = (number - first) * hash_tree.SIZE
                if self._hash(block) != recorded[at : at + hash_tree.SIZE]:
                    found.append(damage(member, number, block_size, "another"))
            return found
        finally:
            os.close(fd)


class _Names:
    """Finds names that the archive does not have: compares the names in each folder after its last member."""

    def __init__(self, extracted: Source) -> None:
        self._extracted = extracted
        self._open: list[tuple[Member, set[bytes]]] = []

    def add(self, member: Member) -> Iterator[TapeIntegrityError]:
        """Takes the next member in order; yields what is left over in the folders that ended before it."""
        while self._open and not member.name.startswith(self._open[-1][0].name):
            yield from self._close_folder()
        if self._open:
            self._open[-1][1].add(member.name.rstrip(b"/").rpartition(b"/")[2])
        if member.is_directory:
            self._open.append((member, set()))

    def finish(self) -> Iterator[TapeIntegrityError]:
        while self._open:
            yield from self._close_folder()

    def _close_folder(self) -> Iterator[TapeIntegrityError]:
        directory, names = self._open.pop()
        try:
            folder = self._extracted.folder(directory.path)
        except OSError:
            return  # its facts already say so
        try:
            for name in folder.names():
                if name not in names:
                    mode = folder.lstat(name).st_mode
                    path = os.fsdecode(directory.name + name)
                    yield TapeIntegrityError(path, [Difference(Fact.TYPE, NOTHING, file_type(mode))], "remove it")
        finally:
            folder.close()
