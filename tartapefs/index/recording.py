"""A recording: an index with the path of its folder. Does not open the folder."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from types import TracebackType
from typing import Literal, Self

from tartapefs.archive import layout
from tartapefs.archive.layout import Segment
from tartapefs.archive.member import Member, latest_of, path_key
from tartapefs.base import commands, naming
from tartapefs.base.errors import OffsetError, TapeNotFoundError, UnexpectedTapeError
from tartapefs.base.tape_files import default_index
from tartapefs.index.reader import Index
from tartapefs.index.schema import Generation


class Recording(Index):
    """An index that is opened by its own path or its folder's, and searched by name and offset.

    Its attributes are those of `api.Tape`.
    """

    def __init__(self, index_path: str, directory: str | None) -> None:
        super().__init__(index_path)
        facts = self.facts
        self.directory = directory  # where the source is expected; None if only the index is known
        self.root_name = os.fsdecode(facts.root_name)
        self.fingerprint = facts.fingerprint
        self.rows_digest = facts.unsealed_rows or facts.rows_digest  # sealing keeps it
        self.root_ino = facts.root_ino
        self.total_size = facts.total_size
        self.member_count = facts.member_count
        self.recorded_ns = facts.recorded_ns
        self.excluded = facts.excluded
        self.left_out = facts.left_out
        self.owners_kept = facts.owners_kept
        self.long_names = facts.long_names
        self.hard_links = facts.hard_links
        self.one_file_system = facts.one_file_system
        self.seal = facts.seal
        self.algorithm = facts.algorithm
        self.block_size = facts.block_size
        self.due_algorithm, self.due_block_size = facts.due_algorithm, facts.due_block_size

    @classmethod
    def discover(cls, directory: str | os.PathLike[str], index_path: str | os.PathLike[str] | None = None) -> Self:
        """Opens the tape of the folder at `directory`. Raises TapeNotFoundError and TapeFormatError."""
        root = os.path.realpath(directory)
        try:
            return cls(os.fspath(index_path) if index_path else default_index(root), root)
        except TapeNotFoundError as error:
            of_it = commands.of_tape(os.fspath(directory), os.fspath(index_path) if index_path else None)
            error.remedy = f'run "{" ".join(map(commands.quoted, ("tartapefs", "record", *of_it)))}" first'
            raise

    @classmethod
    def from_index(cls, index_path: str | os.PathLike[str]) -> Self:
        """Opens the tape whose index is at `index_path`. Raises TapeNotFoundError and TapeFormatError."""
        path = os.path.abspath(index_path)
        directory = os.path.dirname(os.path.dirname(path))
        return cls(path, directory if default_index(directory) == path else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def children(self, folder: Member) -> Iterator[Member]:
        """The members that lie directly in `folder`, in order; of a folder that several generations have, the last."""
        if len(self.generations) == 1:
            yield from self._children(folder.name, folder.stop, folder.start, self.generations[0].stop)
            return
        runs = (
            self._children(folder.name, self._after(folder.name, generation), generation.start, generation.stop)
            for generation in self.generations
        )
        yield from latest_of(runs)

    def _children(self, folder: bytes, position: int, start: int, stop: int) -> Iterator[Member]:
        """The members from `position` on, in the generation `[start, stop)`, that lie directly in `folder`.

        A folder below it that the generation has without its own header is none of them.
        """
        while position >= 0:
            here, position = position, -1
            for member in self.members(here, stop):
                if not member.name.startswith(folder):
                    return
                if b"/" not in member.name[len(folder) :].rstrip(b"/"):
                    yield member
                    below = member.name
                else:
                    below = member.name[: member.name.index(b"/", len(folder)) + 1]
                if below.endswith(b"/"):
                    position = self._end_of(below, member.stop, stop)
                    break

    def ranges(self, begin: bytes) -> list[tuple[int, int]]:
        """Where in the archive the members lie whose `sort_key` begins with `begin`, in bytes: a range a generation."""
        found = ((self._first_from(begin, each), self._first_beyond(begin, each)) for each in self.generations)
        return [(start, stop) for start, stop in found if start < stop]

    def _after(self, folder: bytes, generation: Generation) -> int:
        """Where in the generation the members below `folder` begin, if it has some."""
        return self._first_from(path_key(folder) + b"\0", generation)

    def _first_beyond(self, begin: bytes, generation: Generation) -> int:
        """Where in the generation the first member lies whose key is behind all that begin with `begin`."""
        begin = begin.rstrip(b"\xff")
        return self._first_from(begin[:-1] + bytes([begin[-1] + 1]), generation) if begin else generation.stop

    def _first_from(self, key: bytes, generation: Generation) -> int:
        """Where in the generation the first member with this key or a later one lies: a binary search."""
        low, high = generation.start, generation.stop
        while low < high:
            (member,) = self.members(middle := (low + high) // 2, middle + 1)
            if member.sort_key < key:
                low = member.stop
            else:
                high = member.start
        return low

    def _end_of(self, folder: bytes, low: int, high: int) -> int:
        """Where in `[low, high)` the last member below `folder` ends: a search by growing steps, then by halves."""
        step = 1
        while low < high:
            (member,) = self.members(at := min(low + step, (low + high) // 2), at + 1)
            if member.name.startswith(folder):
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
        return next(s for s in member.segments() if offset < s.stop)

    def find(self, arc_path: str | bytes) -> Member:
        """The member with this name in the archive, with or without a directory's slash. Raises KeyError.

        Of a folder that several generations have, the last. The members of a generation are in the order of their
        paths, so this is a binary search by offset in each that may have it, from the latest back.
        """
        wanted = path_key(os.fsencode(arc_path))
        if b"\0" in os.fsencode(arc_path):
            raise KeyError(arc_path)
        for generation in self._names.generations_with(wanted, self.generations):
            # The pack of the first one is decoded, with every check, before anything is said to be missing.
            pack = self._names.pack_with(wanted, generation.start, generation.stop, is_last=generation.start == 0)
            if pack:
                for member in self.members(*pack):
                    if path_key(member.name) == wanted:
                        return member
        raise KeyError(arc_path)

    def expect(self, value: str) -> Literal["fingerprint", "seal"]:
        """Tells which of the two digests of this tape `value` is. Raises UnexpectedTapeError if neither.

        If it is the seal, every member and every byte that is read from now on belongs to it, even if the index is
        damaged later. If it is the fingerprint, reads do not compare with it: `has_fingerprint` does.
        """
        if value == self.seal:
            return "seal"
        if value == self.fingerprint:
            return "fingerprint"
        raise UnexpectedTapeError(self.index_path, value, self.fingerprint, self.seal, self._why_another(value))

    def _why_another(self, value: str) -> str:
        """Why the tape is not the one with this fingerprint or seal, if it may be because it was appended to."""
        count = len(self.generations)
        for number, generation in enumerate(self.generations[:-1], 1):
            if generation.fingerprint == value:
                what = f"the archive up to byte {generation.stop:,}"
                return f"that is generation {number} of {count}, {what}: more was appended since"
        if self.seal and count > 1:
            return (
                f"it has {count} generations, and another seal since each was appended; if that is not why,"
                f" find out who recorded it anew, or changed it"
            )
        return ""

    def shared_with(self, fingerprint: str, rows: Collection[str | None]) -> int | None:
        """Up to which byte the archive of the recording with these digests is this one's; None for any other one.

        `fingerprint`: of headers, which do not tell contents of the same second apart; `rows`: what its `rows_digest`
        was, or `facts.rows_digest`: those of a sealed tape are others before it was sealed.
        """
        if fingerprint == self.fingerprint and self.rows_digest in rows:
            return self.total_size
        for count, generation in enumerate(self.generations[:-1], 1):
            if generation.fingerprint == fingerprint:
                is_same = any(digest in rows for digest in self._rows_digests(self.generations[:count]))
                return generation.stop if is_same else None
        return None

    def _rows_digests(self, generations: Sequence[Generation]) -> Iterator[str]:
        """The digest of all rows when there were these generations; of a sealed tape, also before it was sealed."""
        yield self.rows_digest_before(generations[-1].stop)
        if self.seal:
            from tartapefs.index.writer import unsealed_rows_digest  # which other readers need not load

            members = chain.from_iterable(map(self.members_of, generations))
            yield unsealed_rows_digest((member[1:] for member in members), generations)

    def has_fingerprint(self, on_member: Callable[[], None] = lambda: None) -> bool:
        """Whether the headers of all members have the recorded fingerprint. Reads the whole index."""
        digest = hashlib.sha256()
        for member in self.members():
            digest.update(member.header())
            on_member()
        return digest.hexdigest() == self.fingerprint

    def file_name(self, template: str) -> str:
        """A file name with `{fingerprint}`, `{seal}` and `{root}` of this tape, as `naming.file_name` makes it."""
        return naming.file_name(template, self.fingerprint, self.seal, self.root_name)
