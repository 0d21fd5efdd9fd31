"""The tape: a recorded folder, as its index describes it. Nothing here looks at the source."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self

from tartapefs.archive import layout
from tartapefs.archive.layout import Segment
from tartapefs.archive.member import Headed, Member
from tartapefs.base import naming
from tartapefs.base.errors import OffsetError, TapeNotFoundError, UnexpectedTapeError
from tartapefs.base.tape_files import default_index
from tartapefs.base.text import printable
from tartapefs.index.reader import Index


class Recording:
    """A recorded folder. `Tape.discover(folder)` and `Tape.from_index(index)` make one.

    Works with and without `with`, from many threads, and on a read-only file system. Every lookup raises
    TapeFormatError where the index turns out to be damaged, and ValueError once the tape is closed.
    """

    def __init__(self, index: Index, directory: str | None) -> None:
        self._index = index
        self.index_path = index.path
        self.directory = directory  # where the source is expected; None if only the index is known
        facts = index.facts
        self.root_name = os.fsdecode(facts.root_name)
        self.fingerprint = facts.fingerprint  # SHA-256 over all headers, 64 hex digits
        # SHA-256 over all that is recorded of all members, 64 hex digits; when sealed it stays what it was.
        self.rows_digest = facts.unsealed_rows or facts.rows_digest
        self.root_ino = facts.root_ino  # of the source folder when recorded
        self.total_size = facts.total_size  # bytes of the archive, footer included
        self.member_count = facts.member_count
        self.recorded_ns = facts.recorded_ns  # since 1970
        self.excluded = facts.excluded
        self.left_out = facts.left_out  # sockets, pipes, devices, and what could not be read
        self.owners_kept = facts.owners_kept
        self.seal = facts.seal  # the second fingerprint, over contents too, 64 hex digits; "" if there are no digests
        self.algorithm = facts.algorithm  # of the digests: "blake3" or "sha256", or "" for none
        # What digests it is still to get, if it was recorded to have some: `sealer.seal` makes them.
        self.due_algorithm, self.due_block_size = facts.due_algorithm, facts.due_block_size
        self.block_size = facts.block_size  # bytes of a body that have a digest of their own; 0 if there are none

    @classmethod
    def discover(cls, directory: str | os.PathLike[str], index_path: str | os.PathLike[str] | None = None) -> Self:
        """The tape of the folder at `directory`. Raises TapeNotFoundError and TapeFormatError."""
        root = os.path.realpath(directory)
        try:
            return cls(Index(os.fspath(index_path) if index_path else default_index(root)), root)
        except TapeNotFoundError as error:
            command = f"tartapefs record {printable(os.fspath(directory))}"
            if index_path:
                command += f" --index {printable(os.fspath(index_path))}"
            raise TapeNotFoundError(error.path, f'run "{command}" first') from None

    @classmethod
    def from_index(cls, index_path: str | os.PathLike[str]) -> Self:
        """The tape whose index is at `index_path`. Raises TapeNotFoundError and TapeFormatError."""
        path = os.path.abspath(index_path)
        directory = os.path.dirname(os.path.dirname(path))
        return cls(Index(path), directory if default_index(directory) == path else None)

    def close(self) -> None:
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def members(self, start: int = 0, stop: int | None = None) -> Iterator[Member]:
        """The members that overlap the bytes `[start, stop)` of the archive, in order; all by default."""
        return self._index.between(start, self.total_size if stop is None else stop)

    def headed(self, start: int, stop: int) -> Iterable[Headed]:
        """As `members`, each with its header."""
        return self._index.headed(start, stop)

    def headed_backwards(self, start: int, stop: int) -> Iterable[Headed]:
        """As `headed`, the last member first."""
        return self._index.headed_backwards(start, stop)

    def count(self, start: int, stop: int) -> int:
        """How many members start in the bytes `[start, stop)` of the archive."""
        return self._index.count(start, stop)

    def folders(self) -> Iterator[Member]:
        """The members that are directories, in order."""
        return self._index.folders()

    def children(self, folder: Member) -> Iterator[Member]:
        """The members that lie directly in `folder`, in order."""
        position = folder.stop
        while position >= 0:
            here, position = position, -1
            for member in self.members(here):
                if not member.name.startswith(folder.name):
                    return
                yield member
                if member.is_directory:
                    position = self._end_of(member)
                    break

    def _end_of(self, folder: Member) -> int:
        """Where the last member below `folder` ends: found by steps that grow, then by halves."""
        low, high, step = folder.stop, self.total_size - layout.FOOTER, 1
        while low < high:
            (member,) = self.members(at := min(low + step, (low + high) // 2), at + 1)
            if member.name.startswith(folder.name):
                low, step = member.stop, 4 * step
            else:
                high = member.start
        return low

    def member_at(self, offset: int) -> Member | None:
        """The member that `offset` (0 to `total_size` - 1) lies in, None for the footer. Raises OffsetError."""
        if not 0 <= offset < self.total_size:
            raise OffsetError(offset, self.total_size)
        return next(self.members(offset, offset + 1), None)

    def segment_at(self, offset: int) -> Segment:
        """The segment that `offset` lies in. Raises OffsetError."""
        member = self.member_at(offset)
        if member is None:
            return layout.footer(self.total_size)
        return next(s for s in layout.segments(member.start, member.size) if offset < s.stop)

    def find(self, arc_path: str | bytes) -> Member:
        """The member of this name in the archive, with or without a directory's slash. Raises KeyError.

        Members are in the order of their paths, so this is a binary search by offset.
        """
        wanted = os.fsencode(arc_path).rstrip(b"/").split(b"/")
        low, high = 0, self.total_size - layout.FOOTER
        while low < high:
            (member,) = self.members(middle := (low + high) // 2, middle + 1)
            parts = member.name.rstrip(b"/").split(b"/")
            if parts == wanted:
                return member
            if parts < wanted:
                low = member.stop
            else:
                high = member.start
        raise KeyError(arc_path)

    def expect(self, value: str) -> Literal["fingerprint", "seal"]:
        """Which of the two digests of this tape `value` is; raises UnexpectedTapeError if neither.

        Where it is the seal, every member and every byte that is read from now on belongs to it, whatever becomes of
        the index. Where it is the fingerprint, what is read was not compared with it: `has_fingerprint` does that.
        """
        if value == self.seal:
            return "seal"
        if value == self.fingerprint:
            return "fingerprint"
        raise UnexpectedTapeError(self.index_path, value, self.fingerprint, self.seal)

    def has_fingerprint(self, on_member: Callable[[], None] = lambda: None) -> bool:
        """Whether the headers of all members have the fingerprint together. Reads the whole index."""
        digest = hashlib.sha256()
        for member in self.members():
            digest.update(member.header())
            on_member()
        return digest.hexdigest() == self.fingerprint

    def file_name(self, template: str) -> str:
        """A file name with `{fingerprint}`, `{seal}` and `{root}` of this tape, as `naming.file_name` makes it."""
        return naming.file_name(template, self.fingerprint, self.seal, self.root_name)

    def facts_to_keep(self) -> dict[str, Any]:
        """What the index that replaces this one says of the tape too, as `IndexWriter.commit` takes it."""
        return self._index.facts_to_keep()

    def block_digests(self, member: Member, first: int, stop: int) -> bytes:
        """Of a sealed tape: the digests of the member's blocks `[first, stop)`, one after the other."""
        return self._index.block_digests(member, first, stop)

    def is_same(self, other: "Recording") -> bool:
        """Whether both were read from one and the same index."""
        return self._index.facts == other._index.facts

    def is_at_home(self, root_ino: int) -> bool:
        """Whether folder and index are the very ones of the recording, so that inodes and ctimes can be compared.

        `root_ino`: of the source folder now.
        """
        facts = self._index.facts
        return facts.root_ino == root_ino and facts.index_ino == self._index.stat.st_ino

    def rows_are_sound(self) -> bool:
        """Whether the members are as many as recorded, and all together still have the digest that was recorded."""
        return self._index.is_sound()
