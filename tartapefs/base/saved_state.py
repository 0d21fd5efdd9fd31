"""Saved state: a file that keeps the progress of a command, so that the next run resumes.

Rule: its first line says what it is; it belongs to the user who runs the command; each record has a checksum. Any other
file at its path is refused. It is locked while it is open. It has a random token, from which the names of unfinished
files follow: so the next run knows which ones a killed run left, and removes these and no others. The lock between two
recorders is such a state, too.
"""

import errno
import json
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from types import TracebackType
from typing import Self

from tartapefs.base import outputs
from tartapefs.base.errors import OutputError

_NO_TMPFILE = (errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)  # or of a system without /proc
_HEAD = b"tartapefs state 1: %b\n"
_RECORD = struct.Struct("<Q32s")  # bytes of the record that follow, their SHA-256
_LONGEST_RECORD = 1 << 28  # bytes


class SavedState:
    """The file at `path` that keeps the progress of a `kind` of work, locked until it is closed; made if need be.

    Raises OutputError if the file there is no such state of this user; OutputBusyError while another process has it
    locked, or with `wait` waits; and OSError.

    token: 16 hex digits that it got when it was made.
    """

    def __init__(self, path: str, kind: str, wait: bool = False) -> None:
        self.path, self._kind = path, kind
        self._head = _HEAD % kind.encode()
        self._fd = self._open(wait)
        try:
            self.token = self._read_token()
        except BaseException:
            self.close()
            raise

    def _open(self, wait: bool) -> int:
        while True:
            fd = self._open_path()
            try:
                self._refuse_others(fd)
                outputs.lock(fd, self.path, wait)
                with suppress(FileNotFoundError):  # the process before may have replaced or removed it
                    if os.path.samestat(os.lstat(self.path), os.fstat(fd)):
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _open_path(self) -> int:
        while True:
            try:
                return outputs.open_writable(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                self._make()
            except IsADirectoryError:
                raise OutputError(self.path, "is not a regular file") from None
            except OSError as error:
                if error.errno == errno.ELOOP:
                    outputs.refuse_existing(self.path, force=True)
                raise

    def _make(self) -> None:
        """Makes the file with its head in one step, unless another process is faster."""
        head = self._head + _record(json.dumps({"token": outputs.new_token()}).encode())
        with suppress(FileExistsError):
            try:
                _create_whole(self.path, head)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    error.filename = self.path
                    raise
                with outputs.Unfinished(self.path) as new_file:
                    _write(new_file.fd, head, 0)
                    new_file.commit(replace=False)

    def _refuse_others(self, fd: int) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OutputError(self.path, "is not a regular file")
        if found.st_uid != os.geteuid() and found.st_uid != self._owner_of_new():
            raise OutputError(self.path, f"belongs to the user {found.st_uid}; remove it if it is not in use any more")

    def _owner_of_new(self) -> int:
        """The owner that the file system gives to a new file: not always this user (root on NFS, FAT)."""
        with outputs.Unfinished(self.path) as new_file:
            return os.fstat(new_file.fd).st_uid

    def _read_token(self) -> str:
        if os.pread(self._fd, len(self._head), 0) != self._head:
            raise OutputError(self.path, f"is not a file that a {self._kind} saves; move or remove it")
        self._end = len(self._head)
        try:
            return str(json.loads(next(self._records(self._end)))["token"])
        except (StopIteration, ValueError, KeyError, TypeError):
            raise OutputError(self.path, "is damaged; remove it to begin anew") from None
        finally:
            self._start = self._end

    def _records(self, position: int) -> Iterator[bytes]:
        while len(head := os.pread(self._fd, _RECORD.size, position)) == _RECORD.size:
            size, checksum = _RECORD.unpack(head)
            if size > _LONGEST_RECORD:
                return
            content = _read(self._fd, size, position + _RECORD.size)
            if len(content) != size or sha256(content).digest() != checksum:
                return
            position += _RECORD.size + size
            self._end = max(self._end, position)
            yield content

    def records(self) -> Iterator[bytes]:
        """The records that were added, up to one that is damaged, or incomplete since a process was killed."""
        return self._records(self._start)

    def check_whole(self) -> None:
        """Raises OutputError if there are bytes behind what `records` returned: for states that are replaced."""
        if os.fstat(self._fd).st_size != self._end:
            raise OutputError(self.path, "is damaged; remove it to begin anew")

    def add(self, content: bytes) -> None:
        """Adds a record behind those that `records` returned; it is in the file when this returns."""
        with outputs.naming(self.path):
            os.ftruncate(self._fd, self._end)
            self._end += _write(self._fd, _record(content), self._end)

    def clear(self) -> None:
        """Removes all records."""
        os.ftruncate(self._fd, self._start)
        self._end = self._start

    def replace(self, content: bytes) -> None:
        """Replaces all records by this one, on disk; they stay until it is there."""
        with outputs.naming(self.path), outputs.Unfinished(self.path, self.token) as new_file:
            outputs.lock(new_file.fd, self.path)
            head = os.pread(self._fd, self._start, 0)
            self._end = _write(new_file.fd, head + _record(content), 0)
            other = os.dup(new_file.fd)
            try:
                new_file.commit(replace=True)
                self._fd, other = other, self._fd
            finally:
                os.close(other)

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _create_whole(path: str, content: bytes) -> None:
    """Makes a small file that gets its name once it has its content. Raises FileExistsError."""
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666, dir_fd=folder)
        try:
            _write(fd, content, 0)
            # Seen from a folder: else Python would call link(2), which gives another name to the link in /proc.
            os.link(f"/proc/self/fd/{fd}", os.path.basename(path), dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(fd)
    finally:
        os.close(folder)


def _record(content: bytes) -> bytes:
    return _RECORD.pack(len(content), sha256(content).digest()) + content


def _write(fd: int, data: bytes, position: int) -> int:
    left = memoryview(data)
    while left:
        count = os.pwrite(fd, left, position)
        left, position = left[count:], position + count
    return len(data)


def _read(fd: int, size: int, position: int) -> bytes:
    """The bytes, fewer only at the end of the file."""
    parts = []
    while size and (data := os.pread(fd, size, position)):
        parts.append(data)
        size, position = size - len(data), position + len(data)
    return b"".join(parts)
