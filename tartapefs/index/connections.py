"""Connections to an index: the only code, with the writer, that calls SQLite.

Rule: an index is input from outside. The schema must be ours to the letter, so that no view, trigger or generated
column can run; SQLite sees the file only after its head was checked; each value and each query has a limit.
"""

import errno
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from queue import SimpleQueue
from typing import Any

from tartapefs.base import tape_files
from tartapefs.base.errors import RECORD_AGAIN, TapeBusyError, TapeFormatError, TapeNotFoundError
from tartapefs.index import schema

_LONGEST_PATH = 504  # bytes: 512 less what SQLite may add
_CONNECTIONS = 4  # more concurrent readers than there are cores to run them gain nothing
_ATTEMPTS = 100  # to open a file that others replace at the same time
_STEPS = 10_000  # of SQLite's virtual machine, between two checks of a query's limit
_MOVE_IT = f"move it away, and {RECORD_AGAIN}"  # a recording replaces no file that is no index


def connect(path: str, options: str) -> sqlite3.Connection:
    """A connection to the file at `path`. Raises OSError if the path is too long for SQLite."""
    real = os.fsencode(os.path.realpath(path))  # as SQLite, too, follows every link on the way
    if len(real) > _LONGEST_PATH:
        reason = f"SQLite opens no path of more than {_LONGEST_PATH} bytes: keep the index elsewhere (--index)"
        raise OSError(errno.ENAMETOOLONG, reason, path)
    quoted = "".join(f"%{byte:02x}" for byte in os.fsencode(real))  # all of it, and without the import of urllib
    uri = f"file:{quoted}?{options}"
    return sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)


class Connections:
    """A LIFO pool of read-only connections to the index at `path`; usable from many threads.

    A query takes the connection that was used last, whose cache is warm; the semaphore guarantees a free one.

    path: absolute.
    stat: of the file when it was opened.
    version: the index's format.

    Raises TapeNotFoundError, TapeFormatError, OSError, and TapeBusyError if others keep replacing the file.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._free: list[sqlite3.Connection] = []
        self._semaphore: SimpleQueue[None] = SimpleQueue()
        self._closed = True  # until all connections are open
        self.stat = self._open_file()
        self._closed = False

    def close(self) -> None:
        """Waits for queries in progress, then closes; later queries raise ValueError."""
        if self._closed:
            return
        self._closed = True
        for _ in range(_CONNECTIONS):
            self._semaphore.get()
        self._close_free()
        self._semaphore.put(None)  # wakes queries that wait, one after the other

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def check_open(self) -> None:
        """Raises ValueError once the pool is closed."""
        if self._closed:
            raise ValueError("the tape is closed")

    def malformed(self, reason: str, remedy: str = RECORD_AGAIN) -> TapeFormatError:
        """The error to raise if the index cannot be believed."""
        return TapeFormatError(self.path, reason, remedy)

    def limit_values(self, longest: int) -> None:
        """From now on queries refuse values of more than `longest` bytes."""
        for connection in self._free:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)

    def query(self, sql: str, parameters: tuple[int, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query. Raises TapeFormatError, OSError, and ValueError once the pool is closed."""
        self._semaphore.get()
        try:
            self.check_open()
            connection = self._free.pop()
            try:
                with self._sqlite_errors():
                    # A scan of every row takes fewer steps than the file has bytes, unless its pages lead in circles.
                    steps, most = count(0, _STEPS), self.stat.st_size
                    connection.set_progress_handler(lambda: next(steps) > most, _STEPS)
                    return connection.execute(sql, parameters).fetchall()
            finally:
                self._free.append(connection)
        finally:
            self._semaphore.put(None)

    def _open_file(self) -> os.stat_result:
        """Checks the file, opens all connections to it, and returns its `stat`.

        SQLite opens only paths, and resolves links such as /proc/self/fd/N itself. So once all connections are open,
        the path must still lead to the file that was checked; if it was replaced, everything is done again.
        """
        for _ in range(_ATTEMPTS):
            fd = self._open_path()  # stays open until the end, or its inode could be given to another file
            try:
                found = os.fstat(fd)
                failure = self._failure_to_connect(fd, found)
                if self._is_in_place(found):
                    if failure is not None:
                        raise failure
                    for _ in self._free:
                        self._semaphore.put(None)
                    return found
                self._close_free()
            except BaseException:
                self._close_free()
                raise
            finally:
                os.close(fd)
        raise TapeBusyError(self.path)

    def _open_path(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise TapeNotFoundError(self.path) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self.malformed("it is a symbolic link", _MOVE_IT) from None
            raise

    def _failure_to_connect(self, fd: int, found: os.stat_result) -> TapeFormatError | OSError | None:
        """Checks the file `fd` and connects to what is at its path; returns why that failed, if it did."""
        try:
            self._check_file(fd, found)
            with self._sqlite_errors():
                for _ in range(_CONNECTIONS):
                    self._free.append(connect(self.path, "mode=ro&immutable=1"))
                    self._prepare(self._free[-1])
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

    def _close_free(self) -> None:
        while self._free:
            self._free.pop().close()

    def _check_file(self, fd: int, found: os.stat_result) -> None:
        """Checks what can be checked before SQLite sees the file."""
        if not stat.S_ISREG(found.st_mode):
            raise self.malformed("it is not a regular file", _MOVE_IT)
        head = os.pread(fd, 105, 0)
        self.version = int.from_bytes(head[60:64], "big")
        if not tape_files.has_index_mark(head):
            raise self.malformed("it is not an index of tartapefs", _MOVE_IT)
        if self.version not in schema.TABLES:
            oldest, newest = min(schema.TABLES), max(schema.TABLES)
            raise self.malformed(f"its format is {self.version}, this tartapefs reads {oldest} to {newest}")
        if head[18:20] != b"\1\1":
            raise self.malformed("it is in a journal mode that an index never has")
        # The b-tree of the schema table is one leaf of a few rows. SQLite reads all of it before any query.
        if head[100:101] != b"\x0d" or int.from_bytes(head[103:105], "big") != len(schema.TABLES[self.version]):
            raise self.malformed("its tables are not those of an index")
        for suffix in ("-wal", "-journal"):
            if os.path.lexists(self.path + suffix):
                raise self.malformed(f"there is a file {os.path.basename(self.path) + suffix} beside it")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, schema.LONGEST_VALUE)
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        connection.text_factory = bytes
        # SQLite reads the schema once for the connection, here; all later queries rely on its being ours.
        tables = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        if tables != [(name.encode(), sql.encode()) for name, sql in schema.TABLES[self.version]]:
            raise self.malformed("its tables are not those of an index")

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        """Turns what SQLite says of a damaged file into TapeFormatError, and of a failing disk into OSError."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError, MemoryError) as error:  # an error's own text may not be UTF-8
            if isinstance(error, sqlite3.OperationalError) and "disk I/O error" in str(error):
                raise OSError(errno.EIO, os.strerror(errno.EIO), self.path) from error
            raise self.malformed(f"SQLite says: {error}") from error
