"""The index: the one SQLite file that fixes where every member of a tape lies. No other module knows SQL.

Rule for writing: at rest it is a single file, and at every instant there is the old one, or the new one, or none. It is
built beside its place, synced, renamed, and the folder synced. `index.db.lock` keeps two recorders of it apart, and
tells the next one which unfinished index a killed one has left (see `outputs`).

Rule for reading: an index is input from outside, and nothing in it is believed before it is checked. The schema must be
ours to the letter, so that no view, trigger or generated column can run; the tape's own facts carry a digest that is
checked at opening, each row a CRC-32 that is checked whenever the row is used, and all rows a digest that `verify`
checks. (Of 3,000 random bit flips in such a file SQLite's `integrity_check` missed 343.) Members must join without a
gap.

A sealed index also holds digests of all contents, and the tree of hashes that leads from them, and from the members,
to the seal (`merkle`). Of such a one no member and no digest is given out whose way up to the seal has not been checked
(but for folders that an audit asks for). It has a format of its own: who does not know of digests must not read it.

A row holds a pack of members (`packs`) and is keyed by the start of the first one, so that finding an offset is one
search of a b-tree at any scale. Members are in the order of their paths, so a search by name is a binary search by
start, and no second b-tree is needed.
"""

import errno
import hashlib
import json
import os
import re
import sqlite3
import stat
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from queue import SimpleQueue
from types import TracebackType
from typing import Any
from urllib.parse import quote
from zlib import crc32

from tartapefs.archive import hash_tree, ustar
from tartapefs.archive.layout import BLOCK, FOOTER, MAX_OFFSET, span
from tartapefs.archive.member import Headed, Member
from tartapefs.base import forked_work, hashes, outputs, signals, tape_files
from tartapefs.base.errors import OutputBusyError, TapeBusyError, TapeFormatError, TapeNotFoundError
from tartapefs.index import row_codec

FORMAT, SEALED_FORMAT = 3, 4
_SCHEMA = [
    (
        "pack",
        "CREATE TABLE pack (start INTEGER PRIMARY KEY, count INTEGER, folders INTEGER, members BLOB, crc INTEGER)",
    ),
    ("tape", "CREATE TABLE tape (fact TEXT PRIMARY KEY, value) WITHOUT ROWID"),
]
# Of a node, `place` is its level and its start in blocks: see `_node_place`. `stop` is where a leaf's last member ends.
_SEALED_SCHEMA = sorted(
    [
        *_SCHEMA,
        ("leaf", "CREATE TABLE leaf (start INTEGER PRIMARY KEY, stop INTEGER, digests BLOB, crc INTEGER)"),
        ("node", "CREATE TABLE node (place INTEGER PRIMARY KEY, digests BLOB, crc INTEGER)"),
        ("piece", "CREATE TABLE piece (start INTEGER PRIMARY KEY, digests BLOB, crc INTEGER)"),
    ]
)
_SCHEMA_OF = {FORMAT: _SCHEMA, SEALED_FORMAT: _SEALED_SCHEMA}
_PAGE_SIZE = 1 << 14  # bytes of SQLite's pages: of smaller ones, packs would leave a large part unused
_LEVEL_BITS = 54  # below them, the start of a node in blocks
_LOCK = ".lock"  # what is added to the name of an index that is being written
_PACKS = 8  # that are fetched at once by a reader that goes on where it stopped
_ROWS_KEPT = 8 * _PACKS  # that were fetched and not used yet, by as many readers
_PAGES_KEPT = 24  # of as many readers, or of one that goes back, or looks ahead
_PIECES_KEPT = 512  # rows of digests of large members, 2 KiB each
_ATTEMPTS = 100  # to open a file that others replace at the same time
_LONGEST_PATH = 504  # bytes: 512 less what SQLite may add
_CONNECTIONS = 4  # more readers at once than there are cores to run them gain nothing
_LONGEST_VALUE = 1 << 20
_LONGEST_ROW = row_codec.LONGEST + (1 << 10)  # bytes
_STEPS = 10_000  # of SQLite's machine, between two looks at how long a query takes
_pack_numbers = struct.Struct("<qHH").pack


@dataclass(frozen=True, slots=True)
class TapeFacts:
    """What an index says of the tape as a whole."""

    root_name: bytes
    fingerprint: str  # SHA-256 over all headers, 64 hex digits
    total_size: int  # bytes of the archive, footer included
    member_count: int
    recorded_ns: int  # since 1970
    excluded: tuple[str, ...]  # patterns; a callable is named by its repr
    left_out: int  # sockets, pipes, devices, and what could not be read
    owners_kept: bool
    root_ino: int  # of the source folder when recorded
    index_ino: int  # of the index file itself
    rows_digest: str  # SHA-256 over the facts of all rows, 64 hex digits
    # Of a sealed tape; of another one there are no such facts.
    seal: str = ""  # the second fingerprint: 64 hex digits
    algorithm: str = ""  # of `merkle.ALGORITHMS`
    block_size: int = 0  # bytes
    levels: int = 0  # of nodes
    unsealed_rows: str = ""  # the rows' digest before, when the packs were cut without regard to leaves
    # Of one that has no seal yet but is to have one, of blocks of this size.
    due_algorithm: str = ""
    due_block_size: int = 0


def _signed(ino: int) -> int:
    """An inode number as SQLite can store it: 64 bits, two's complement."""
    return ino if ino < 1 << 63 else ino - (1 << 64)


def _row(start: int, count: int, folders: int, members: bytes) -> bytes:
    """The bytes that a pack's checksum and the digest of all packs are taken over."""
    return _pack_numbers(start, count, folders) + members


def _node_place(level: int, start: int) -> int:
    return level << _LEVEL_BITS | start // BLOCK


def _row_crc(*numbers: int, digests: bytes) -> int:
    return crc32(digests + b"".join(number.to_bytes(8, "little") for number in numbers))


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()


def _connect(path: str, options: str) -> sqlite3.Connection:
    whole = os.fsencode(os.path.realpath(path))  # as SQLite, too, follows every link on the way
    if len(whole) > _LONGEST_PATH:
        reason = f"SQLite opens no path of more than {_LONGEST_PATH} bytes: keep the index elsewhere (--index)"
        raise OSError(errno.ENAMETOOLONG, reason, path)
    uri = f"file:{quote(whole)}?{options}"
    return sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)


class IndexWriter:
    """Builds the index at `path`, and puts it there all at once.

    `with IndexWriter(path) as writer: writer.add(...); writer.commit(...)`: without a `commit` that returned, leaving
    the block leaves what was there before. Raises TapeBusyError while another writer of `path` is at work, and OSError
    (ENOSPC and the like) where the disk refuses.
    """

    def __init__(self, path: str, block_size: int = 0, processes: int = 1) -> None:
        forked_work.check_processes(processes)
        self._path = path
        self._block_size = block_size
        self._processes = processes
        self._rows_digest = hashlib.sha256().hexdigest()
        self._lock: outputs.State | None = None
        self._unfinished: outputs.Unfinished | None = None

    def __enter__(self) -> "IndexWriter":
        try:
            with signals.undisturbed():  # or an interrupt would leave files that are nobody's
                self._open()
            with self._written() as db:
                version = SEALED_FORMAT if self._block_size else FORMAT
                db.execute(f"PRAGMA application_id={tape_files.INDEX_MARK}")
                db.execute(f"PRAGMA user_version={version}")
                for _, statement in _SCHEMA_OF[version]:
                    db.execute(statement)
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
            self._lock = outputs.State(self._path + _LOCK, "recording")
        except OutputBusyError:
            raise TapeBusyError(self._path) from None
        self._unfinished = outputs.Unfinished(self._path, self._lock.token)
        self._under_way = self._unfinished.path
        self.ino = os.fstat(self._unfinished.fd).st_ino

    def _end(self) -> None:
        """Removes what is under way, if anything is, and lets the next recorder in."""
        with signals.undisturbed():
            if self._unfinished is not None:
                self._unfinished.discard()
            if self._lock is not None:
                self._lock.remove()
                self._lock.close()
            self._unfinished = self._lock = None

    @contextmanager
    def _written(self) -> Iterator[sqlite3.Connection]:
        """The file under way, to write to; no connection is kept, as two processes write it one after the other."""
        with _disk_errors(self._path), closing(_connect(self._under_way, "mode=rw&nolock=1")) as db:
            for pragma in (f"page_size={_PAGE_SIZE}", "journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE"):
                db.execute(f"PRAGMA {pragma}")
            db.execute("BEGIN")
            yield db
            db.execute("COMMIT")

    def add(self, members: Iterable[ustar.Facts]) -> str:
        """Writes all members, in the order of the archive, from its first on.

        Returns their fingerprint: SHA-256 over all headers, 64 hex digits. Names and targets are to fit into one. If
        there are many, and two `processes` are allowed, a forked process writes what this one takes from `members`.
        """
        self._rows_digest, fingerprint = forked_work.run(self._add, iter(members), self._processes)
        return fingerprint

    def _add(self, members: Iterator[ustar.Facts]) -> tuple[str, str]:
        """Writes them, and returns the digests of their rows and of their headers."""
        digest, fingerprint = hashlib.sha256(), hashlib.sha256()
        with self._written() as db:
            rows = self._rows(members, digest.update, fingerprint.update)
            db.executemany("INSERT INTO pack VALUES (?, ?, ?, ?, ?)", rows)
        return digest.hexdigest(), fingerprint.hexdigest()

    def _rows(
        self,
        members: Iterator[ustar.Facts],
        add_row: Callable[[bytes], object],
        add_headers: Callable[[bytes], object],
    ) -> Iterator[tuple[Any, ...]]:
        start = 0
        for some in self._packs(members):
            add_headers(b"".join(ustar.headers(some)))
            folders = sum([facts[1] & 0o170000 == stat.S_IFDIR for facts in some])
            numbers, packed = (start, len(some), folders), row_codec.pack(some)
            row = _row(*numbers, packed)
            add_row(row)
            yield *numbers, packed, crc32(row)
            start += sum([span(facts[2]) for facts in some])

    def _packs(self, members: Iterator[ustar.Facts]) -> Iterator[list[ustar.Facts]]:
        """As many as fit into a pack each; of a sealed tape, whole leaves (see `merkle`)."""
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
        """Writes rows of the tree of hashes, those of each kind in the order of their keys."""
        with self._written() as db:
            execute = db.execute
            for kind, level, start, stop, digests in rows:
                if kind == "leaf":
                    crc = _row_crc(start, stop, digests=digests)
                    execute("INSERT INTO leaf VALUES (?, ?, ?, ?)", (start, stop, digests, crc))
                else:
                    place = _node_place(level, start) if kind == "node" else start
                    execute(f"INSERT INTO {kind} VALUES (?, ?, ?)", (place, digests, _row_crc(place, digests=digests)))

    def commit(self, facts: dict[str, Any], at_home: bool = True) -> None:
        """Writes the tape's own facts, those of `TapeFacts` but the index's own, and puts the index in place.

        `at_home`: whether the witnesses are of where the index now lies, and not of a place that it was copied from.
        """
        inodes = {"root_ino": _signed(facts["root_ino"]), "index_ino": _signed(self.ino) if at_home else 0}
        complete = facts | inodes | {"rows_digest": self._rows_digest}
        complete["facts_digest"] = _digest(complete)
        with self._written() as db:
            db.executemany("INSERT INTO tape VALUES (?, ?)", complete.items())
        assert self._unfinished is not None, "outside of the block"
        with signals.undisturbed():
            self._unfinished.commit(replace=True)
            self._end()


@contextmanager
def _disk_errors(path: str) -> Iterator[None]:
    """SQLite's words for a failing disk, as the OSError that they stand for."""
    try:
        yield
    except sqlite3.OperationalError as error:
        number = errno.ENOSPC if "disk is full" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), path) from error


@dataclass(slots=True)
class _Page:
    """Members that follow each other without a gap, and cover `[start, stop)`."""

    start: int
    stop: int
    starts: list[int]
    members: list[Member]
    digests: dict[int, bytes]  # of a sealed tape, by the starts of the members that have a body
    # The members that were asked for with their headers last, and which these are.
    _headed: tuple[int, int, list[Headed]] = (0, 0, [])

    def within(self, start: int, stop: int) -> list[Member]:
        """Those that overlap `[start, stop)`, which begins in this page and is not empty."""
        return self.members[bisect_right(self.starts, start) - 1 : bisect_left(self.starts, stop)]

    def headed(self, start: int, stop: int) -> list[Headed]:
        """As `within`, each with its header."""
        first, end = bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop)
        headed = self._headed  # one load: threads see the old ones or the new
        if headed[0] != first or headed[1] != end:
            members = self.members[first:end]
            headers = ustar.headers([member[1:] for member in members])
            headed = self._headed = first, end, list(zip(members, headers, strict=True))
        return headed[2]

    def has_start(self, position: int) -> bool:
        """Whether a member starts there; it lies in this page."""
        return self.starts[bisect_right(self.starts, position) - 1] == position


class Index:
    """An index, open for reading; usable from many threads. Raises TapeNotFoundError and TapeFormatError."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        # The one that was used last is used next: it has in memory what it read. Whoever has a turn finds one.
        self._connections: list[sqlite3.Connection] = []
        self._turns: SimpleQueue[None] = SimpleQueue()
        self._closed = True  # until all connections are open
        self._pages: tuple[_Page, ...] = ()
        self._rows: dict[int, tuple[tuple[Any, ...], int | None]] = {}  # by their starts, and where the next one starts
        self._pieces: dict[int, bytes] = {}
        self._checker: hash_tree.Checker | None = None
        self.stat = self._open_file()
        self._closed = False
        try:
            self.facts = self._read_facts()
            self._root = self.facts.root_name + b"/"
            self._end = self.facts.total_size - FOOTER  # of the last member
            self._limit_rows()
            if self.facts.seal:
                self._checker = self._make_checker(self.facts)
            self._check_ends()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Waits for lookups under way, then closes; later lookups raise ValueError."""
        if self._closed:
            return
        self._closed = True
        for _ in range(_CONNECTIONS):
            self._turns.get()
        self._close_connections()
        self._pages = ()
        self._turns.put(None)  # wakes whoever came meanwhile, one after the other

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the tape is closed")

    def _bad(self, reason: str) -> TapeFormatError:
        return TapeFormatError(self.path, reason)

    def _open_file(self) -> os.stat_result:
        """Checks the file, opens all connections to it, and returns its `stat`.

        SQLite opens paths alone, and resolves itself a link such as /proc/self/fd/N. So the path must lead to the very
        file that was checked once all are open. Otherwise another was put in its place: then all is done anew.
        """
        for _ in range(_ATTEMPTS):
            fd = self._open_path()  # stays open until the end, or its inode could be given to another file
            try:
                found = os.fstat(fd)
                failure = self._failure_to_connect(fd, found)
                if self._is_in_place(found):
                    if failure is not None:
                        raise failure
                    for _ in self._connections:
                        self._turns.put(None)
                    return found
                self._close_connections()
            except BaseException:
                self._close_connections()
                raise
            finally:
                os.close(fd)
        raise TapeBusyError(self.path)

    def _open_path(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise TapeNotFoundError(self.path, 'run "tartapefs record DIR" first') from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._bad("it is a symbolic link") from None
            raise

    def _failure_to_connect(self, fd: int, found: os.stat_result) -> TapeFormatError | OSError | None:
        """Checks the file `fd` and connects to what is at its path; returns why that failed, if it did."""
        try:
            self._check_file(fd, found)
            with self._refusing():
                for _ in range(_CONNECTIONS):
                    self._connections.append(_connect(self.path, "mode=ro&immutable=1"))
                    self._prepare(self._connections[-1])
        except (TapeFormatError, OSError) as error:
            return error
        return None

    def _is_in_place(self, checked: os.stat_result) -> bool:
        """Whether the path leads to the file that was checked, and did all the time: a rename moves its ctime."""
        try:
            found = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(found, checked) and found.st_ctime_ns == checked.st_ctime_ns

    def _close_connections(self) -> None:
        while self._connections:
            self._connections.pop().close()

    def _check_file(self, fd: int, found: os.stat_result) -> None:
        """What can be told of the file before SQLite sees it."""
        if not stat.S_ISREG(found.st_mode):
            raise self._bad("it is not a regular file")
        head = os.pread(fd, 105, 0)
        version = int.from_bytes(head[60:64], "big")
        if not tape_files.has_index_mark(head):
            raise self._bad("it is not an index of tartapefs")
        if version not in _SCHEMA_OF:
            raise self._bad(f"its format is {version}, this tartapefs reads {FORMAT} and {SEALED_FORMAT}")
        self._schema = _SCHEMA_OF[version]
        if head[18:20] != b"\1\1":
            raise self._bad("it is in a journal mode that an index never has")
        # The schema's own b-tree: one leaf of a few rows. SQLite reads all of it before any query, however much it is.
        if head[100:101] != b"\x0d" or int.from_bytes(head[103:105], "big") != len(self._schema):
            raise self._bad("its tables are not those of an index")
        for suffix in ("-wal", "-journal"):
            if os.path.lexists(self.path + suffix):
                raise self._bad(f"there is a file {os.path.basename(self.path) + suffix} beside it")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        connection.text_factory = bytes
        # The schema is read once for the connection, here; that it is ours is what all later queries rely on.
        schema = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        if schema != [(name.encode(), sql.encode()) for name, sql in self._schema]:
            raise self._bad("its tables are not those of an index")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What SQLite says of a damaged file, as the refusal of the index; of a disk, as the OSError that it met."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError, MemoryError) as error:  # an error's own text may not be UTF-8
            if isinstance(error, sqlite3.OperationalError) and "disk I/O error" in str(error):
                raise OSError(errno.EIO, os.strerror(errno.EIO), self.path) from error
            raise self._bad(f"SQLite says: {error}") from error

    def _query(self, sql: str, parameters: tuple[int, ...] = ()) -> list[tuple[Any, ...]]:
        self._turns.get()
        try:
            self._check_open()
            connection = self._connections.pop()
            try:
                with self._refusing():
                    # A scan of every row takes fewer steps than the file has bytes, unless its pages lead in circles.
                    steps, most = count(0, _STEPS), self.stat.st_size
                    connection.set_progress_handler(lambda: next(steps) > most, _STEPS)
                    return connection.execute(sql, parameters).fetchall()
            finally:
                self._connections.append(connection)
        finally:
            self._turns.put(None)

    def _read_facts(self) -> TapeFacts:
        rows = self._query("SELECT fact, value FROM tape LIMIT 32")
        if sum(len(value) for row in rows for value in row if isinstance(value, bytes)) > _LONGEST_VALUE:
            raise self._bad("its facts are too long")
        try:
            facts: dict[str, Any] = {
                key.decode(): value.decode() if isinstance(value, bytes) and key != b"root_name" else value
                for key, value in rows
            }
            if facts.pop("facts_digest", None) != _digest(facts):
                raise self._bad("the facts of the tape fail their digest")
            tape = TapeFacts(
                **facts
                | {
                    "excluded": _strings(json.loads(facts["excluded"])),
                    "owners_kept": bool(facts["owners_kept"]),
                    "root_ino": facts["root_ino"] % (1 << 64),
                    "index_ino": facts["index_ino"] % (1 << 64),
                }
            )
            digests = [tape.fingerprint, tape.rows_digest]
            if self._schema is _SEALED_SCHEMA:
                digests += tape.seal, tape.unsealed_rows
            if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
                raise ValueError("a digest has 64 hex digits")
            if (tape.due_algorithm, tape.due_block_size) != ("", 0):
                self._check_digest_facts(tape.due_algorithm, tape.due_block_size)
            if self._schema is _SEALED_SCHEMA:
                self._check_seal_facts(tape)
            elif any((tape.seal, tape.algorithm, tape.block_size, tape.levels, tape.unsealed_rows)):
                raise ValueError("a seal, and no digests")
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise self._bad(f"a fact of the tape is missing or malformed: {error}") from error
        integers = (tape.total_size, tape.member_count, tape.recorded_ns, tape.left_out, tape.root_ino)
        if not all(isinstance(value, int) and value >= 0 for value in integers):
            raise self._bad("a fact of the tape is out of range")
        if not (FOOTER + BLOCK <= tape.total_size <= MAX_OFFSET):
            raise self._bad(f"a total size of {tape.total_size} is out of range")
        if not isinstance(tape.root_name, bytes) or not row_codec.is_name(tape.root_name):
            raise self._bad("the root's name is malformed")
        return tape

    @staticmethod
    def _check_digest_facts(algorithm: str, block_size: int) -> None:
        """Raises ValueError and TypeError."""
        if algorithm not in hash_tree.ALGORITHMS:
            raise ValueError(f"no such algorithm: {algorithm!r}")
        if not hash_tree.SMALLEST_BLOCK <= block_size <= hash_tree.LARGEST_BLOCK or block_size % BLOCK:
            raise ValueError("the size of blocks is out of range")

    def _check_seal_facts(self, tape: TapeFacts) -> None:
        """Raises ValueError and TypeError."""
        self._check_digest_facts(tape.algorithm, tape.block_size)
        if not 0 < tape.levels <= hash_tree.MOST_LEVELS:
            raise ValueError("the number of levels is out of range")

    def _make_checker(self, facts: TapeFacts) -> hash_tree.Checker:
        hash_ = hash_tree.hasher(facts.algorithm)
        numbers = facts.total_size, facts.member_count, facts.block_size, facts.levels
        return hash_tree.Checker(hash_, *numbers, facts.seal, self._node)

    def _limit_rows(self) -> None:
        """From here on no value is longer than a row may be: what is fetched at once has at most 256 KiB."""
        for connection in self._connections:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_ROW)

    def _check_ends(self) -> None:
        """There is a first member, and the last one ends where the footer starts."""
        next(self.between(0, 1))
        (last,) = self.between(self._end - 1, self._end)
        if last.stop != self._end:
            raise self._bad("its members do not add up to its total size")

    def between(self, start: int, stop: int) -> Iterator[Member]:
        """The members that overlap `[start, stop)`, in order; the range is clamped to where members lie.

        No connection is held between two of them. Raises TapeFormatError where a row cannot be believed.
        """
        return chain.from_iterable(page.within(start, stop) for page, start in self._pages_from(start, stop))

    def headed(self, start: int, stop: int) -> Iterable[Headed]:
        """As `between`, each with its header."""
        for page in self._pages:  # one that is kept and has all: what a reader here and there has, as a rule
            if page.start <= start < stop <= page.stop:
                return page.headed(start, stop)
        return chain.from_iterable(page.headed(start, stop) for page, start in self._pages_from(start, stop))

    def headed_backwards(self, start: int, stop: int) -> Iterable[Headed]:
        """As `headed`, the last one first."""
        pages = self._pages_back(start, stop)
        return chain.from_iterable(reversed(page.headed(max(start, page.start), stop)) for page, stop in pages)

    def _pages_from(self, start: int, stop: int) -> Iterator[tuple["_Page", int]]:
        """Those with members that overlap `[start, stop)`, in order, and from where on each has those that follow."""
        start, stop = max(start, 0), min(stop, self._end)
        joins = False
        while start < stop:
            page = self._page(start, stop)
            if joins and not page.has_start(start):
                raise self._bad(f"its members do not join at offset {start}")
            yield page, start
            start, joins = page.stop, True

    def _pages_back(self, start: int, stop: int) -> Iterator[tuple["_Page", int]]:
        """As `_pages_from`, the last one first, and up to where each has those that precede."""
        start, stop = max(start, 0), min(stop, self._end)
        joins = False
        while start < stop:
            page = self._page(stop - 1, stop)
            if joins and page.stop != stop and not page.has_start(stop):
                raise self._bad(f"its members do not join at offset {stop}")
            yield page, stop
            stop, joins = page.start, True

    def _page(self, position: int, stop: int) -> "_Page":
        """The members of one row, the one at `position` among them: a page that is kept, or else a new one.

        Who reads on where a page ended will want the rows that follow, too, and who jumps those below `stop`. They are
        fetched at once, and decoded when they are asked for: whoever shares a request with another process needs no
        more than a part of it.
        """
        self._check_open()
        sequential = False
        for page in self._pages:
            if page.start <= position < page.stop:
                return page
            sequential = sequential or page.stop == position
        if sequential:
            stop = self.facts.total_size
        kept = self._rows.pop(position, None)
        row, following = kept or self._fetch(position, stop)
        starts, end, members = self._members(row)
        if following not in (None, end):
            raise self._bad(f"its members do not join at offset {end}")
        if not starts[0] <= position < end <= self._end:
            raise self._bad(f"no member covers offset {position}")
        page = _Page(starts[0], end, starts, members, {})
        if self._checker is not None:
            page = self._checked(page, position, stop, self._checker)
        self._pages = (page, *self._pages[: _PAGES_KEPT - 1])  # one store: threads see the old pages or the new
        return page

    def _fetch(self, position: int, stop: int) -> tuple[tuple[Any, ...], int | None]:
        """The row that `position` lies in, and where the next one starts if it was fetched, too.

        Those are kept that follow up to `stop`.
        """
        rows = self._query(
            "SELECT * FROM pack WHERE start >= (SELECT max(start) FROM pack WHERE start <= ?)"
            f" AND start < ? ORDER BY start LIMIT {_PACKS}",
            (position, stop),
        )
        if not rows:
            raise self._bad(f"no member covers offset {position}")
        if len(self._rows) + len(rows) > _ROWS_KEPT:
            self._rows = {}
        first, *others = zip(rows, [*(row[0] for row in rows[1:]), None], strict=True)
        self._rows.update({row[0]: (row, following) for row, following in others})
        return first

    def _checked(self, page: "_Page", position: int, stop: int, checker: hash_tree.Checker) -> "_Page":
        """Of a page of a sealed tape, the leaves between `position` and `stop`, which pack by pack are whole.

        Each must belong to the seal.
        """
        leaves = self._query(
            "SELECT * FROM leaf WHERE start >= (SELECT max(start) FROM leaf WHERE start <= ?)"
            f" AND start < ? ORDER BY start LIMIT {row_codec.MOST}",
            (position, min(stop, page.stop)),
        )
        if not leaves or not page.start <= leaves[0][0] <= position:
            raise self._bad(f"no digests cover offset {position}")
        low = end = leaves[0][0]
        first = at_member = bisect_left(page.starts, low)
        try:
            for start, leaf_stop, digests, crc in leaves:
                if start != end or _row_crc(start, leaf_stop, digests=digests) != crc:
                    raise self._bad(f"the digests at {start} fail their checksum")
                hashed, at = [], 0
                while end < leaf_stop:
                    member = page.members[at_member]
                    if member.start != end:
                        raise self._bad(f"its members do not join at offset {end}")
                    at_member += 1
                    hashed.append(member.header())
                    if member.size:
                        digest = digests[at : at + hash_tree.SIZE]
                        page.digests[end] = digest
                        hashed.append(digest)
                        at += hash_tree.SIZE
                    end = member.stop
                if (
                    end != leaf_stop
                    or at != len(digests)
                    or not checker.belongs(hash_tree.leaf_hash(checker.hash, start, leaf_stop, b"".join(hashed)), start)
                ):
                    raise self._bad(f"the members at {start} do not belong to its seal")
        except (TypeError, ValueError, AttributeError, OverflowError, IndexError, struct.error) as error:
            self._check_open()
            raise self._bad(f"the digests at {leaves[0][0]} are malformed: {error}") from error
        if end <= position:
            raise self._bad(f"no digests cover offset {position}")
        return _Page(low, end, page.starts[first:at_member], page.members[first:at_member], page.digests)

    def _node(self, level: int, start: int) -> tuple[int, bytes]:
        """The start and the digests of the node at `level` that a child at `start` belongs to, if to any."""
        rows = self._query(
            "SELECT * FROM node WHERE place <= ? ORDER BY place DESC LIMIT 1", (_node_place(level, start),)
        )
        try:
            ((place, digests, crc),) = rows
            if place >> _LEVEL_BITS != level or _row_crc(place, digests=digests) != crc:
                raise ValueError("a node fails its checksum")
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._bad(f"the digests above {start} are malformed: {error}") from error
        return (place & ((1 << _LEVEL_BITS) - 1)) * BLOCK, digests

    def facts_to_keep(self) -> dict[str, Any]:
        """The tape's own facts, as `IndexWriter.commit` takes them."""
        facts = self.facts
        return {
            "root_name": facts.root_name,
            "fingerprint": facts.fingerprint,
            "total_size": facts.total_size,
            "member_count": facts.member_count,
            "recorded_ns": facts.recorded_ns,
            "excluded": json.dumps(facts.excluded),
            "left_out": facts.left_out,
            "owners_kept": int(facts.owners_kept),
            "root_ino": facts.root_ino,
        }

    def digest_of(self, member: Member) -> bytes:
        """The digest of a member of a sealed tape that has a body: of its block, or of its blocks' digests."""
        for page in self._pages:
            if found := page.digests.get(member.start):
                return found
        page = self._page(member.start, member.start + 1)
        return page.digests[member.start]

    def block_digests(self, member: Member, first: int, stop: int) -> bytes:
        """The digests of the blocks `[first, stop)` of a member of a sealed tape, one after the other."""
        if member.size <= self.facts.block_size:
            return self.digest_of(member)
        found, number = b"", first
        while number < stop:
            low = number % hash_tree.FANOUT
            piece = self._piece(member, number // hash_tree.FANOUT)
            found += piece[low * hash_tree.SIZE : (low + stop - number) * hash_tree.SIZE]
            number += hash_tree.FANOUT - low
        return found

    def _piece(self, member: Member, number: int) -> bytes:
        """The digests of the `FANOUT` blocks, or less, of which `number` times as many lie before."""
        block_size = self.facts.block_size
        start = member.start + BLOCK + number * hash_tree.FANOUT * block_size
        if (found := self._pieces.get(start)) is not None:
            return found
        stop = min(start + hash_tree.FANOUT * block_size, member.start + BLOCK + member.size)
        rows = self._query("SELECT * FROM piece WHERE start = ?", (start,))
        try:
            ((_, digests, crc),) = rows
            if _row_crc(start, digests=digests) != crc:
                raise ValueError("they fail their checksum")
            if len(digests) != hash_tree.blocks(stop - start, block_size) * hash_tree.SIZE:
                raise ValueError("they are not as many as the blocks")
            assert self._checker is not None  # or the tape has no pieces
            if not self._checker.belongs(hash_tree.piece_hash(self._checker.hash, start, stop, digests), start):
                raise self._bad(f"the digests at {start} do not belong to its seal")
        except (TypeError, ValueError, OverflowError) as error:
            self._check_open()
            raise self._bad(f"the digests at {start} are malformed: {error}") from error
        if len(self._pieces) >= _PIECES_KEPT:
            self._pieces = {}
        self._pieces[start] = digests
        return bytes(digests)

    def count(self, start: int, stop: int) -> int:
        """How many members start in `[start, stop)`."""
        if start >= stop:
            return 0
        counted = self._query("SELECT sum(count) FROM pack WHERE start >= ? AND start < ?", (start, stop))[0][0] or 0
        if not isinstance(counted, int):
            raise self._bad("its numbers of members are no integers")
        return counted + self._rest(start) - self._rest(stop)

    def _rest(self, position: int) -> int:
        """How many members of the pack that starts before `position` start there or later."""
        for row in self._query("SELECT * FROM pack WHERE start < ? ORDER BY start DESC LIMIT 1", (position,)):
            starts, _, _ = self._members(row)
            return len(starts) - bisect_left(starts, position)
        return 0

    def folders(self) -> Iterator[Member]:
        """All directories, in order. No connection is held between two of them."""
        position = -1
        while rows := self._query(
            f"SELECT * FROM pack WHERE start > ? AND folders != 0 ORDER BY start LIMIT {_PACKS}", (position,)
        ):
            for row in rows:
                if row[0] <= position:
                    raise self._bad("its rows are in no order")
                position = row[0]
                _, _, members = self._members(row)
                yield from (member for member in members if member.is_directory)

    def _members(self, row: tuple[Any, ...]) -> tuple[list[int], int, list[Member]]:
        """What is in a row: the starts of its members, where the last one ends, the members; after every check."""
        start, count, folders, members, crc = row
        try:
            if crc32(_row(start, count, folders, members)) != crc:
                raise self._bad(f"the row at {start} fails its checksum")
            return row_codec.unpack(self._root, start, count, folders, members)
        except row_codec.MALFORMED as error:
            self._check_open()
            raise self._bad(f"the row at {start} is malformed: {error}") from error

    def is_sound(self) -> bool:
        """Whether there are as many rows as recorded, and all together still have the digest that was recorded."""
        digest, members_seen, position = hashlib.sha256(), 0, -1
        while rows := self._query(f"SELECT * FROM pack WHERE start > ? ORDER BY start LIMIT {_PACKS}", (position,)):
            for *row, _ in rows:
                if row[0] <= position:
                    raise self._bad("its rows are in no order")
                position = row[0]
                try:
                    digest.update(_row(*row))
                    members_seen += row[1]
                except row_codec.MALFORMED as error:
                    raise self._bad(f"the row at {position} is malformed: {error}") from error
        sound = members_seen == self.facts.member_count and digest.hexdigest() == self.facts.rows_digest
        return sound and (self._checker is None or self._has_all_digests(self._checker))

    def _has_all_digests(self, checker: hash_tree.Checker) -> bool:
        """Whether every member, digest and piece belongs to the seal, and nothing else lies in the tables."""
        children, pieces = 0, 0
        for member in self.between(0, self.facts.total_size):
            count = hash_tree.blocks(member.size, self.facts.block_size)
            if count > 1:
                whole = hashes.constructor(self.facts.algorithm)()
                for number in range(0, count, hash_tree.FANOUT):
                    whole.update(self._piece(member, number // hash_tree.FANOUT))
                    pieces += 1
                if whole.digest() != self.digest_of(member):
                    return False
        children = pieces + self._query("SELECT count(*) FROM leaf")[0][0]
        nodes = 0
        for _ in range(self.facts.levels):
            children = -(-children // hash_tree.FANOUT)
            nodes += children
        counted = [self._query(f"SELECT count(*) FROM {table}")[0][0] for table in ("piece", "node")]
        return counted == [pieces, nodes]


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("not a list of strings")
    return tuple(value)
