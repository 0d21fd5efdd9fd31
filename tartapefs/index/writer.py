"""Writes an index, or leaves what was there.

Rule: at rest the index is a single file, and at every instant there is the old one, the new one, or none. The writer
builds it beside its place, syncs and renames it, and syncs the folder. `index.db.lock` keeps two recorders of it apart,
and tells the next one which unfinished index a killed one has left (see `saved_state`).
"""

import errno
import hashlib
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from types import TracebackType
from typing import Any, Self
from zlib import crc32

from tartapefs.archive import hash_tree, ustar
from tartapefs.archive.layout import BLOCK, span
from tartapefs.base import forked_work, outputs, signals, tape_files
from tartapefs.base.errors import OutputBusyError, TapeBusyError
from tartapefs.base.saved_state import SavedState
from tartapefs.index import row_codec, schema
from tartapefs.index.connections import connect

_LOCK = ".lock"  # is added to the name of an index that is being written
INSERT_PACK = "INSERT INTO pack VALUES (?, ?, ?, ?, ?)"
INSERT_GENERATION = "INSERT INTO generation VALUES (?, ?, ?, ?, ?)"
_PAGE_SIZE = 1 << 14  # bytes of SQLite's pages: of smaller ones, packs would leave a large part unused
Check = Callable[[list[ustar.Facts]], object]


class IndexWriter:
    """Builds the index at `path`, and puts it there all at once.

    `block_size`: of the digests of a tape that is being sealed, in bytes; 0 for a tape without. `generations`: those of
    the tape, if it has several.

    `with IndexWriter(path) as writer: writer.add(...); writer.commit(...)`: if `commit` has not returned, leaving the
    block keeps what was there before. Raises TapeBusyError while another writer of `path` is at work, and OSError
    (ENOSPC and the like) if the disk refuses.

    ino: of the file that is being written.
    rows_digest: of the rows of members, once they are added.
    """

    def __init__(
        self, path: str, block_size: int = 0, processes: int = 1, generations: Sequence[schema.Generation] = ()
    ) -> None:
        forked_work.check_processes(processes)
        self._generations = tuple(generations) if len(generations) > 1 else ()
        self._version = schema.version_of(bool(block_size), bool(self._generations))
        self._path = path
        self._block_size = block_size
        self._processes = processes
        self.rows_digest = hashlib.sha256().hexdigest()
        self._lock: SavedState | None = None
        self._unfinished: outputs.Unfinished | None = None

    def __enter__(self) -> Self:
        try:
            with signals.undisturbed():  # or an interrupt would leave files that nobody removes
                self._open()
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _open(self) -> None:
        try:
            self._lock = SavedState(self._path + _LOCK, "recording")
        except OutputBusyError:
            raise TapeBusyError(self._path) from None
        self._unfinished = outputs.Unfinished(self._path, self._lock.token)
        self._unfinished_path = self._unfinished.temporary
        self.ino = os.fstat(self._unfinished.fd).st_ino

    def _begin(self) -> None:
        """Makes the tables."""
        with self._transaction() as db:
            db.execute(f"PRAGMA application_id={tape_files.INDEX_MARK}")
            for _, statement in schema.TABLES[self._version]:
                db.execute(statement)
            if self._generations:
                db.executemany(INSERT_GENERATION, map(schema.generation_row, self._generations))

    def _end(self) -> None:
        """Removes the unfinished file, if there is one, and releases the lock."""
        with signals.undisturbed():
            if self._unfinished is not None:
                self._unfinished.discard()
            if self._lock is not None:
                self._lock.remove()
                self._lock.close()
            self._unfinished = self._lock = None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection to the unfinished file for one transaction: two processes write it, one after the other."""
        with disk_errors(self._path), closing(connect(self._unfinished_path, "mode=rw&nolock=1")) as db:
            for pragma in (f"page_size={_PAGE_SIZE}", "journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE"):
                db.execute(f"PRAGMA {pragma}")
            db.execute("BEGIN")
            yield db
            db.execute("COMMIT")

    def add(self, members: Iterable[ustar.Facts], check: Check | None = None) -> str:
        """Writes all members, in the order of the archive, from its first on.

        Returns their fingerprint: SHA-256 over all headers, 64 hex digits. Names and targets must fit into headers, of
        several blocks if the facts of the tape are to say so. If there are many, and two `processes` are allowed, a
        forked process writes what this one takes from `members`. `check` is called with some of them at a time, in both
        processes in turn; what it raises ends this.
        """
        self.rows_digest, fingerprint = forked_work.run(self._add, iter(members), self._processes, check=check)
        return fingerprint

    def _add(self, members: Iterator[ustar.Facts]) -> tuple[str, str]:
        """Writes members; returns the digests of their rows and of their headers."""
        digest, fingerprint = hashlib.sha256(), hashlib.sha256()
        with self._transaction() as db:
            rows = self._rows(members, digest.update, fingerprint.update)
            db.executemany(INSERT_PACK, rows)
        return digest.hexdigest(), fingerprint.hexdigest()

    def _rows(
        self,
        members: Iterator[ustar.Facts],
        add_row: Callable[[bytes], object],
        add_headers: Callable[[bytes], object],
        start: int = 0,
    ) -> Iterator[tuple[Any, ...]]:
        """The rows of members that begin at `start`, in bytes."""
        for some in self._packs(members):
            headers = b"".join(ustar.headers(some))
            add_headers(headers)
            beyond_first = len(headers) - BLOCK * len(some)  # bytes of headers beyond their first block
            folders = sum([facts[1] & 0o170000 == stat.S_IFDIR for facts in some])
            numbers, packed = (start, len(some), folders), row_codec.pack(some, beyond_first > 0)
            row = schema.pack_bytes(*numbers, packed)
            add_row(row)
            yield *numbers, packed, crc32(row)
            start += sum([span(facts[2]) for facts in some]) + beyond_first

    def _packs(self, members: Iterator[ustar.Facts]) -> Iterator[list[ustar.Facts]]:
        """Members in packs, none of which has members of two generations."""
        if not self._generations:
            yield from self._packs_of_one(members)
        for generation in self._generations:
            yield from self._packs_of_one(islice(members, generation.members))

    def _packs_of_one(self, members: Iterator[ustar.Facts]) -> Iterator[list[ustar.Facts]]:
        """Members in packs as full as they get; a pack of a sealed tape holds whole leaves (see `hash_tree`)."""
        some: list[ustar.Facts] = []
        if not self._block_size:
            while some := list(islice(members, row_codec.MOST)):
                yield some
            return
        in_leaf = 0
        for facts in members:
            some.append(facts)
            in_leaf += 1
            if hash_tree.ends_leaf(in_leaf, facts[2], self._block_size):
                in_leaf = 0
                if len(some) > row_codec.MOST - hash_tree.RUN:
                    yield some
                    some = []
        if some:
            yield some

    def add_digests(self, rows: Iterable[hash_tree.Row]) -> None:
        """Writes rows of the hash tree, those of each kind in the order of their keys."""
        with self._transaction() as db:
            insert_digests(db, rows)

    def supersede(self, starts: Iterable[int]) -> None:
        """Notes the headers at `starts`, of folders that a later generation has again."""
        with self._transaction() as db:
            rows = ((start, schema.row_crc(start)) for start in starts)
            db.executemany("INSERT INTO superseded VALUES (?, ?)", rows)

    def add_name_filters(self, rows: Iterable[tuple[int, bytes]]) -> None:
        """Writes blocks of the filters of names, each with its place."""
        with self._transaction() as db:
            insert_name_filters(db, rows)

    def commit(self, facts: dict[str, Any], at_home: bool = True) -> None:
        """Writes the facts of the tape, all of `TapeFacts` that the writer does not know, and puts the index in place.

        `at_home`: whether the recorded inodes and ctimes are those of the folder beside this index; False for a copy.
        """
        inodes = {"root_ino": schema.signed(facts["root_ino"]), "index_ino": schema.signed(self.ino) if at_home else 0}
        complete = facts | inodes | {"rows_digest": self.rows_digest}
        with self._transaction() as db:
            if schema.has_generations(self._version):
                complete["generations_digest"] = schema.generations_digest(
                    self._version, lambda table: db.execute(f"SELECT * FROM {table} ORDER BY 1")
                )
            version = self._version + schema.LONG_NAMES * bool(facts.get("long_names"))
            version += schema.HARD_LINKS * bool(facts.get("hard_links"))
            db.execute(f"PRAGMA user_version={version}")
            complete["facts_digest"] = schema.facts_digest(complete)
            db.execute("DELETE FROM tape")
            db.executemany("INSERT INTO tape VALUES (?, ?)", complete.items())
        assert self._unfinished is not None, "outside of the block"
        with signals.undisturbed():
            self._unfinished.commit(replace=True)
            self._end()


def unsealed_rows_digest(members: Iterator[ustar.Facts], generations: Sequence[schema.Generation]) -> str:
    """The digest of the rows that these members, of these generations, have in an index without digests of contents."""
    digest = hashlib.sha256()
    for _ in IndexWriter("", generations=generations)._rows(members, digest.update, lambda headers: None):
        pass
    return digest.hexdigest()


def insert_digests(db: sqlite3.Connection, rows: Iterable[hash_tree.Row]) -> None:
    """Writes rows of the hash tree. A node that is there, the last one of its level, is replaced."""
    execute = db.execute
    for kind, level, start, stop, digests in rows:
        if kind == "leaf":
            crc = schema.row_crc(start, stop, blob=digests)
            execute("INSERT INTO leaf VALUES (?, ?, ?, ?)", (start, stop, digests, crc))
        else:
            key = schema.node_key(level, start) if kind == "node" else start
            crc = schema.row_crc(key, blob=digests)
            execute(f"INSERT OR REPLACE INTO {kind} VALUES (?, ?, ?)", (key, digests, crc))


def insert_name_filters(db: sqlite3.Connection, rows: Iterable[tuple[int, bytes]]) -> None:
    """Writes blocks of the filters of names, each with its place."""
    checked = ((place, bits, schema.row_crc(place, blob=bits)) for place, bits in rows)
    db.executemany("INSERT INTO name_filter VALUES (?, ?, ?)", checked)


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turns what SQLite says of a failing disk into OSError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        number = errno.ENOSPC if "disk is full" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), path) from error
