"""The index: the SQLite file that says where every member of a tape lies, open for reading.

Rule: an index is input from outside, and nothing in it is believed before it is checked. The facts of the tape carry a
digest that is checked at opening, each row a CRC-32 that is checked whenever the row is used, and all rows a digest
that `verify` checks. (Of 3,000 random bit flips in such a file SQLite's `integrity_check` missed 343.) Members must
join without a gap. On a sealed tape, all members but those of `folders` are also checked against the seal.

A row holds a pack of members (`row_codec`) and is keyed by the start of the first one, so that finding an offset is one
search of a b-tree at any scale. The members of a generation are in the order of their paths, so a search by name is a
binary search by start in each, and no second b-tree is needed.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any
from zlib import crc32

from tartapefs.archive import hash_tree, ustar
from tartapefs.archive.layout import MAX_OFFSET
from tartapefs.archive.member import Headed, Member, latest_of
from tartapefs.base.errors import TapeFormatError
from tartapefs.index import name_filter, row_codec, schema
from tartapefs.index.connections import Connections
from tartapefs.index.name_search import NameSearch
from tartapefs.index.page import Page
from tartapefs.index.sealed_reader import SealedReader

_BATCH = 8  # packs that a sequential reader fetches at once
_MAX_ROWS = 8 * _BATCH  # fetched and not used yet, by several readers
_MAX_PAGES = 24  # in the cache, for several readers, or one that goes back or looks ahead


class Index:
    """An index, open for reading; usable from many threads. Raises TapeNotFoundError and TapeFormatError.

    Every lookup raises TapeFormatError if the index is damaged, and ValueError once it is closed.

    index_path: absolute.
    facts: what the index says of the tape as a whole.
    version: of the index's format.
    generations: of the tape, in order.
    """

    def __init__(self, path: str) -> None:
        self._pages: tuple[Page, ...] = ()  # the latest first
        self._rows: dict[int, tuple[tuple[Any, ...], int | None]] = {}  # by their starts; and where the next one starts
        self._sealed: SealedReader | None = None
        self._connections = Connections(path)
        self.index_path, self.version = self._connections.path, self._connections.version
        try:
            self.facts = self._read_facts()
            self._root = self.facts.root_name + b"/"
            self._end = self.facts.end
            self.generations = self._read_generations()
            self._begins = frozenset(generation.start for generation in self.generations)
            self._names = NameSearch(self._connections, self._root, self._begins)
            self._connections.limit_values(schema.longest_row(self.facts.long_names))
            if self.facts.seal:
                self._sealed = SealedReader(self._connections, self.facts)
            self._check_ends()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Waits for lookups in progress, then closes; later lookups raise ValueError."""
        self._connections.close()
        self._pages = ()

    def members(self, start: int = 0, stop: int | None = None) -> Iterator[Member]:
        """The members that overlap the bytes `[start, stop)` of the archive, in order; all by default.

        No connection is held between two of them.
        """
        end = self._end if stop is None else stop
        return chain.from_iterable(page.within(low, end) for page, low in self._pages_from(start, end))

    def members_backwards(self, start: int, stop: int) -> Iterator[Member]:
        """As `members`, the last one first."""
        pages = self._pages_back(start, stop)
        return chain.from_iterable(reversed(page.within(max(start, page.start), high)) for page, high in pages)

    def headed(self, start: int, stop: int) -> Iterable[Headed]:
        """As `members`, each with its header."""
        for page in self._pages:  # a cached page that has all of them, as for most random reads
            if page.start <= start < stop <= page.stop:
                return page.headed(start, stop)
        return chain.from_iterable(page.headed(low, stop) for page, low in self._pages_from(start, stop))

    def headed_backwards(self, start: int, stop: int) -> Iterable[Headed]:
        """As `headed`, the last member first."""
        pages = self._pages_back(start, stop)
        return chain.from_iterable(reversed(page.headed(max(start, page.start), high)) for page, high in pages)

    def folders(self) -> Iterator[Member]:
        """The members that are directories, in order, without those that a later generation has again.

        No connection is held between two of them.
        """
        for row in self._rows_in_order("folders != 0"):
            _, _, members = self._unpack(row)
            yield from (member for member in members if member.is_directory and not self.is_superseded(member))

    def is_superseded(self, folder: Member) -> bool:
        """Whether a later generation has the same folder again, so that this header says nothing of it any more."""
        if len(self.generations) == 1 or folder.start >= self.generations[-1].start:
            return False
        rows = self._connections.query("SELECT * FROM superseded WHERE start = ?", (folder.start,))
        return bool(list(self._checked_superseded(rows)))

    def latest_members(self) -> Iterator[Member]:
        """The members in the order of their paths; of a folder that several generations have, the last.

        For one that reads them all, as `members_of`.
        """
        if len(self.generations) == 1:
            return self.members_of(self.generations[0])
        return latest_of(map(self.members_of, self.generations))

    def members_of(self, generation: schema.Generation) -> Iterator[Member]:
        """The members of a generation, in order. Nothing is cached, and nothing compared with the seal."""
        for row in self._rows_in_order("true", generation.start, generation.stop):
            yield from self._unpack(row)[2]

    def block_digests(self, member: Member, first: int, stop: int) -> bytes:
        """The digests of the blocks `[first, stop)` of a member of a sealed tape, one after the other."""
        if self._sealed is None or member.size <= self.facts.block_size:
            return self._digest_of(member)
        return self._sealed.block_digests(member, first, stop)

    def rows_are_sound(self) -> bool:
        """Whether there are as many members as recorded, and all rows together still have the recorded digest."""
        if self._rows_digest() != (self.facts.rows_digest, self.facts.member_count):
            return False
        if not self._generations_are_sound():
            return False
        return self._sealed is None or self._sealed.has_all_digests(self.members(), self._digest_of)

    def rows_digest_before(self, stop: int) -> str:
        """What the digest of all rows was when the members ended at `stop`, where a generation ends."""
        return self._rows_digest(stop)[0]

    def _rows_digest(self, stop: int = MAX_OFFSET) -> tuple[str, int]:
        """The digest of the rows that start before `stop`, and how many members they say they have."""
        digest, member_count = hashlib.sha256(), 0
        for *row, _ in self._rows_in_order(stop=stop):
            try:
                digest.update(schema.pack_bytes(*row))
                member_count += row[1]
            except row_codec.MALFORMED as error:
                raise self._malformed(f"the row at {row[0]} is malformed: {error}") from error
        return digest.hexdigest(), member_count

    def superseded(self) -> Iterator[int]:
        """The starts of the headers, of folders, that a later generation has again."""
        if len(self.generations) > 1:
            yield from self._checked_superseded(self._all_rows("superseded"))

    def name_filters(self) -> Iterator[tuple[int, bytes]]:
        """The blocks of later generations' filters of names, each with its place; made if the index has none."""
        if schema.has_name_filters(self.version):
            yield from ((row[0], self._names.checked_block(row)) for row in self._all_rows("name_filter"))
            return
        for generation in self.generations[1:]:
            if generation.members <= name_filter.MOST:
                keys = (member.sort_key for member in self.members(generation.start, generation.stop))
                yield from enumerate(name_filter.build(keys, generation.members), generation.start)

    def _checked_superseded(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[int]:
        for start, crc in rows:
            if schema.row_crc(start) != crc:
                raise self._malformed(f"what supersedes the folder at {start} fails its checksum")
            yield start

    def tree_builder(self) -> hash_tree.Builder:
        """What extends the hash tree of a sealed tape by another generation."""
        assert self._sealed is not None
        return self._sealed.builder()

    def hash_rows(self, add_row: Callable[[bytes], object], add_headers: Callable[[bytes], object]) -> None:
        """Calls `add_row` with the bytes of each row of members, in order, and `add_headers` with their headers."""
        for row in self._rows_in_order():
            _, _, members = self._unpack(row)
            add_row(schema.pack_bytes(*row[:4]))
            add_headers(b"".join(ustar.headers([member[1:] for member in members])))

    def _generations_are_sound(self) -> bool:
        """Whether the rows of both tables on generations have the recorded digest."""
        if len(self.generations) == 1:
            return True
        try:
            return schema.generations_digest(self.version, self._all_rows) == self.facts.generations_digest
        except row_codec.MALFORMED:  # a value is no number
            return False

    def _all_rows(self, table: str) -> Iterator[tuple[Any, ...]]:
        key, _ = schema.GENERATION_TABLES[table]
        sql, position = f"SELECT * FROM {table} WHERE {key} > ? ORDER BY {key} LIMIT {_MAX_ROWS}", -1
        while rows := self._connections.query(sql, (position,)):
            yield from rows
            position = rows[-1][0]

    def is_same(self, other: "Index") -> bool:
        """Whether both were read from one and the same index."""
        return self.facts == other.facts

    def is_at_home(self, root_ino: int) -> bool:
        """Whether folder and index are the very ones of the recording, so that inodes and ctimes can be compared.

        `root_ino`: of the source folder now.
        """
        return self.facts.root_ino == root_ino and self.facts.index_ino == self._connections.stat.st_ino

    def _malformed(self, reason: str) -> TapeFormatError:
        return self._connections.malformed(reason)

    def _read_facts(self) -> schema.TapeFacts:
        rows = self._connections.query("SELECT fact, value FROM tape LIMIT 32")
        if sum(len(value) for row in rows for value in row if isinstance(value, bytes)) > schema.LONGEST_VALUE:
            raise self._malformed("its facts are too long")
        try:
            return schema.parse_facts(rows, self.version)
        except ValueError as error:
            raise self._malformed(str(error)) from error

    def _read_generations(self) -> tuple[schema.Generation, ...]:
        facts = self.facts
        if not schema.has_generations(self.version):
            return (schema.Generation(0, facts.end, facts.member_count, facts.recorded_ns, facts.fingerprint),)
        try:
            return schema.parse_generations(self._all_rows("generation"), facts)
        except ValueError as error:
            raise self._malformed(str(error)) from error

    def _check_ends(self) -> None:
        """Raises TapeFormatError unless there is a first member, and the last one ends where the footer starts."""
        next(self.members(0, 1))
        (last,) = self.members(self._end - 1, self._end)
        if last.stop != self._end:
            raise self._malformed("its members do not add up to its total size")

    def _pages_from(self, start: int, stop: int) -> Iterator[tuple[Page, int]]:
        """The pages with members that overlap `[start, stop)`, in order, and from where on each has those that follow.

        The range is clamped to the members.
        """
        start, stop = max(start, 0), min(stop, self._end)
        joins = False
        while start < stop:
            page = self._page(start, stop)
            if joins and not page.has_start(start):
                raise self._malformed(f"its members do not join at offset {start}")
            yield page, start
            start, joins = page.stop, True

    def _pages_back(self, start: int, stop: int) -> Iterator[tuple[Page, int]]:
        """As `_pages_from`, the last page first, and up to where each has those that precede."""
        start, stop = max(start, 0), min(stop, self._end)
        joins = False
        while start < stop:
            page = self._page(stop - 1, stop)
            if joins and page.stop != stop and not page.has_start(stop):
                raise self._malformed(f"its members do not join at offset {stop}")
            yield page, stop
            stop, joins = page.start, True

    def _page(self, position: int, stop: int) -> Page:
        """The page that `position` lies in, from the cache or new.

        A reader that goes on where a page ended will want the rows that follow, too, and one that jumps those below
        `stop`. They are fetched at once, and decoded when they are asked for: a reader that shares a request with
        another process needs only a part of them.
        """
        self._connections.check_open()
        sequential = False
        for page in self._pages:
            if page.start <= position < page.stop:
                return page
            sequential = sequential or page.stop == position
        if sequential:
            stop = self.facts.total_size
        fetched = self._rows.pop(position, None)
        row, following = fetched or self._fetch(position, stop)
        starts, end, members = self._unpack(row)
        if following not in (None, end):
            raise self._malformed(f"its members do not join at offset {end}")
        if not starts[0] <= position < end <= self._end:
            raise self._malformed(f"no member covers offset {position}")
        page = Page(starts[0], end, starts, members, {})
        if self._sealed is not None:
            page = self._sealed.checked(page, position, stop)
        self._pages = (page, *self._pages[: _MAX_PAGES - 1])  # one store: threads see the old pages or the new
        return page

    def _fetch(self, position: int, stop: int) -> tuple[tuple[Any, ...], int | None]:
        """The row that `position` lies in, and where the next one starts, or None if that was not fetched.

        Keeps the rows that follow up to `stop`, a batch at most.
        """
        rows = self._connections.query(
            "SELECT * FROM pack WHERE start >= (SELECT max(start) FROM pack WHERE start <= ?)"
            f" AND start < ? ORDER BY start LIMIT {_BATCH}",
            (position, stop),
        )
        if not rows:
            raise self._malformed(f"no member covers offset {position}")
        if len(self._rows) + len(rows) > _MAX_ROWS:
            self._rows = {}
        first, *others = zip(rows, [*(row[0] for row in rows[1:]), None], strict=True)
        self._rows.update({row[0]: (row, following) for row, following in others})
        return first

    def _rows_in_order(
        self, condition: str = "true", start: int = 0, stop: int = MAX_OFFSET
    ) -> Iterator[tuple[Any, ...]]:
        """The rows that start in `[start, stop)` and for which the SQL `condition` holds.

        No connection is held between two of them.
        """
        sql = f"SELECT * FROM pack WHERE start > ? AND start < ? AND {condition} ORDER BY start LIMIT {_BATCH}"
        position = start - 1
        while rows := self._connections.query(sql, (position, stop)):
            for row in rows:
                if row[0] <= position:
                    raise self._malformed("its rows are in no order")
                position = row[0]
                yield row

    def _unpack(self, row: tuple[Any, ...]) -> tuple[list[int], int, list[Member]]:
        """The starts of a row's members, where the last one ends, and the members, after every check."""
        start, count, folders, members, crc = row
        try:
            if crc32(schema.pack_bytes(start, count, folders, members)) != crc:
                raise self._malformed(f"the row at {start} fails its checksum")
            return row_codec.unpack(self._root, start, count, folders, members, start in self._begins)
        except row_codec.MALFORMED as error:
            self._connections.check_open()
            raise self._malformed(f"the row at {start} is malformed: {error}") from error

    def _digest_of(self, member: Member) -> bytes:
        """The digest of a member of a sealed tape that has a body: of its block, or of its blocks' digests."""
        for page in self._pages:
            if found := page.digests.get(member.start):
                return found
        return self._page(member.start, member.start + 1).digests[member.start]
