"""Writes the index that has one generation more than the one it replaces.

Rule: as for `writer`. What is there is copied, checked on the way, and kept as it is; rows are added to the copy.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

from tartapefs.archive import hash_tree, ustar
from tartapefs.archive.layout import FOOTER
from tartapefs.archive.member import Member
from tartapefs.base import forked_work
from tartapefs.base.errors import TapeBusyError, TapeFormatError
from tartapefs.index import name_filter, row_codec, schema
from tartapefs.index.reader import Index
from tartapefs.index.writer import (
    INSERT_GENERATION,
    INSERT_PACK,
    Check,
    IndexWriter,
    insert_digests,
    insert_name_filters,
)

_ADDED = "SELECT * FROM pack WHERE start >= ? ORDER BY start"


class IndexExtender(IndexWriter):
    """Builds an index of all that `before` has, and one generation more, and puts it in its place.

    Used as `IndexWriter`. Raises TapeBusyError also if there is another index by now.
    """

    def __init__(self, before: Index, processes: int = 1) -> None:
        super().__init__(before.index_path, before.facts.block_size, processes)
        self._version = schema.version_of(bool(before.facts.seal), True)
        self._before = before

    def _begin(self) -> None:
        """Copies the index that is there."""
        assert self._unfinished is not None
        self._unfinished.copy_target()
        with closing(Index(self._unfinished_path)) as copy:
            if not copy.is_same(self._before):
                raise TapeBusyError(self._path)

    def _add(self, members: Iterator[ustar.Facts]) -> tuple[str, str]:
        """As of `IndexWriter`; the digests are of all rows and headers, those that were there included."""
        digest, fingerprint = hashlib.sha256(), hashlib.sha256()
        with closing(Index(self._unfinished_path)) as copy:
            copy.hash_rows(digest.update, fingerprint.update)
        facts = self._before.facts
        if (digest.hexdigest(), fingerprint.hexdigest()) != (facts.rows_digest, facts.fingerprint):
            raise TapeFormatError(self._path, "its rows fail their digest")
        with self._transaction() as db:
            db.executemany(INSERT_PACK, self._rows(members, digest.update, fingerprint.update, facts.end))
        return digest.hexdigest(), fingerprint.hexdigest()

    def add(self, members: Iterable[ustar.Facts], check: Check | None = None) -> str:
        """Writes the members of the new generation, in order. Returns the fingerprint of the whole archive.

        With two `processes` a forked one checks what is there, and writes what this one takes from `members`. `check`:
        as of `IndexWriter`.
        """
        self.rows_digest, fingerprint = forked_work.run(self._add, iter(members), self._processes, 0, check)
        before = self._before
        with self._transaction() as db:
            for name, statement in schema.TABLES[self._version]:
                if name not in dict(schema.TABLES[before.version]):
                    db.execute(statement)
            if not schema.has_generations(before.version):
                db.executemany(INSERT_GENERATION, map(schema.generation_row, before.generations))
            if not schema.has_name_filters(before.version):
                insert_name_filters(db, before.name_filters())
        return fingerprint

    def add_digests_of(self, rows_of: Callable[[Iterator[Member]], Iterator[hash_tree.Row]]) -> None:
        """Writes the rows of the hash tree that `rows_of` makes of the members that were added."""
        with self._transaction() as db:
            insert_digests(db, rows_of(self._added(db.execute(_ADDED, (self._start,)))))

    @property
    def _start(self) -> int:
        return self._before.facts.end

    def _added(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[Member]:
        root = self._before.facts.root_name + b"/"
        for start, count, folders, members, _ in rows:
            yield from row_codec.unpack(root, start, count, folders, members, begins=start == self._start)[2]

    def commit(self, facts: dict[str, Any], at_home: bool = True) -> None:
        """As of `IndexWriter`; `facts` are of the whole archive."""
        count = facts["member_count"] - self._before.facts.member_count
        stop = facts["total_size"] - FOOTER
        added = schema.Generation(self._start, stop, count, facts["recorded_ns"], facts["fingerprint"])
        with self._transaction() as db:
            db.execute(INSERT_GENERATION, schema.generation_row(added))
            if count <= name_filter.MOST:
                keys = (member.sort_key for member in self._added(db.execute(_ADDED, (self._start,))))
                insert_name_filters(db, enumerate(name_filter.build(keys, count), self._start))
        super().commit(facts, at_home)
