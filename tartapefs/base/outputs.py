"""Every file that a command writes: how it is named, opened, put in place, continued and removed.

Rule: nothing is replaced or removed that somebody else may have made, and nothing before what replaces it is complete.
(What is part of a tape is no place for an output either: `tape_files` tells.)

- What is new gets a name that is free. While it is being written it may stand beside its place, as `Unfinished`, under
  a name with 64 random bits, which nobody else can have chosen; then it is synced, and renamed.
- What exists and is not empty is replaced only where the user asked for that. A link is never followed to a file that
  is to be made or replaced.
- A `State` keeps what was reached, so that the next run can go on. Its first line says what it is; it belongs to the
  user who runs the command; each record has a checksum. Any other file in its place is refused. It is locked while it
  is open, and it has a random token, from which the names of unfinished files follow: so the next run knows which ones
  a killed one has left, and removes these and no others. The lock between two recorders is such a state, too.
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from types import TracebackType
from typing import Self

from tartapefs.base import signals
from tartapefs.base.errors import OutputBusyError, OutputError
from tartapefs.base.text import printable

_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RANDOM = 8  # bytes of a token
_LONGEST_NAME = 255 - 2 * _RANDOM - len("..part")  # bytes that an unfinished file has of its place's name
_CWD, _RENAME_NOREPLACE = -100, 1  # of renameat2(2)
_NO_TMPFILE = (errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)  # or of a system without /proc
_HEAD = b"tartapefs state 1: %b\n"
_RECORD = struct.Struct("<Q32s")  # bytes of the record that follow, their SHA-256
_LONGEST_RECORD = 1 << 28  # bytes

_libc = ctypes.CDLL(None, use_errno=True)


# New files, and files that go on


def descriptor(output: str) -> int | None:
    """A descriptor to write to where `output` is no file: a device, a pipe, a descriptor of this process. Else None.

    Raises IsADirectoryError, and OSError as the system does.
    """
    if match := re.fullmatch(r"/dev/(?:fd/([0-9]+)|stdout|stderr)|/proc/self/fd/([0-9]+)", output):
        number = match[1] or match[2] or {"/dev/stdout": "1", "/dev/stderr": "2"}[output]
        return os.dup(int(number))
    try:
        mode = os.stat(output).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode):
        return None
    return os.open(output, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)


def refuse_existing(output: str, force: bool, remedy: str = '"--force" replaces it') -> int | None:
    """The size of the file at `output`; None if there is none. Raises OutputError for a link and what is no file.

    Also where it has anything in it, unless `force` allows to replace that.
    """
    try:
        found = os.lstat(output)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        raise OutputError(output, f"is a symbolic link; name what it leads to: {printable(os.path.realpath(output))}")
    if not stat.S_ISREG(found.st_mode):
        raise OutputError(output, "is not a regular file")
    if found.st_size and not force:
        raise OutputError(output, f"is there already; {remedy}")
    return found.st_size


def new(output: str) -> int:
    """A descriptor to write the file at `output`, which is made for this, or is empty. No link is followed."""
    with suppress(FileExistsError):
        return os.open(output, _NEW, 0o666)
    fd = os.open(output, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        refuse_existing(output, force=False)
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove(output: str, fd: int) -> None:
    """Removes the file of this descriptor, if it is still the one at `output`."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(output), os.fstat(fd)):
            os.unlink(output)


def going_on(output: str, flags: int = os.O_RDWR, create: bool = False) -> int:
    """A descriptor of the file at `output` as it is, or of one that is made for this. A link to a file is followed.

    Raises OutputError for a link to nothing, and OSError.
    """
    try:
        return os.open(output, flags | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        if not create:
            raise
    refuse_existing(output, force=True)
    return os.open(output, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def lock(fd: int, output: str, wait: bool = False) -> None:
    """Keeps others that lock this file out until it is closed. Raises OutputBusyError, or with `wait` waits."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise OutputBusyError(output) from None


@contextmanager
def _naming(output: str) -> Iterator[None]:
    """Names the output in the errors of the system calls in the block, which know a descriptor alone."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or output
        raise


class Unfinished:
    """A file beside its `place`, under a name of its own, until `commit` puts it there or `discard` removes it.

    `token`: of a `State` that is locked; what a killed process has left under this name is removed, or with `goes_on`
    kept and continued. `mode`: its permissions from its first moment on; else it gets those of the file that it is to
    replace. Raises OSError.
    """

    def __init__(self, place: str, token: str | None = None, goes_on: bool = False, mode: int | None = None) -> None:
        self.place = place
        folder, name = os.path.split(os.fsencode(place))
        part = b"%b.%b.part" % (name[:_LONGEST_NAME], (token or _token()).encode())
        self.path = os.fsdecode(os.path.join(folder, part))
        with signals.undisturbed():  # or an interrupt would leave a file that nobody knows to be ours
            if token is not None and not goes_on:
                with suppress(FileNotFoundError):
                    os.unlink(self.path)
            try:
                self.fd = self._open(goes_on, 0o666 if mode is None else mode)
            except OSError as error:
                error.filename = place
                raise
            if mode is None:
                with suppress(OSError):
                    os.fchmod(self.fd, stat.S_IMODE(os.lstat(place).st_mode) & 0o777)

    def _open(self, goes_on: bool, mode: int) -> int:
        if goes_on:
            with suppress(FileNotFoundError):
                return os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        return os.open(self.path, _NEW, mode)

    def commit(self, replace: bool, sync: bool = True) -> None:
        """Puts it in place, with `sync` on the disk; raises FileExistsError if it is not to replace what is there."""
        if sync:
            with _naming(self.place):
                os.fsync(self.fd)
        with signals.undisturbed():
            (os.rename if replace else _rename_new)(self.path, self.place)
            self.close()
            if sync:
                _sync_folder_of(self.place)

    def discard(self) -> None:
        """Removes it, unless it is in place or closed."""
        if self.fd >= 0:
            with signals.undisturbed():
                with suppress(FileNotFoundError):  # somebody removed the folder, and had the right to
                    os.unlink(self.path)
                self.close()

    def close(self) -> None:
        """Leaves it as it is, to be continued."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _token() -> str:
    return secrets.token_hex(_RANDOM)


def _sync_folder_of(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _make_whole(path: str, content: bytes) -> None:
    """Makes a small file that has no name before it has its content. Raises FileExistsError."""
    folder = os.open(os.path.dirname(path) or ".", _PLACE)
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


def _rename_new(old: str, place: str) -> None:
    """Renames unless `place` is taken; where the file system cannot tell in one step, it is looked at before."""
    rename = getattr(_libc, "renameat2", None)
    if rename is None or rename(_CWD, os.fsencode(old), _CWD, os.fsencode(place), _RENAME_NOREPLACE):
        error = errno.ENOSYS if rename is None else ctypes.get_errno()
        if error not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(error, os.strerror(error), place)
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), place)
        os.rename(old, place)


# States


class State:
    """The file at `path` that keeps what a `kind` of work has reached, locked until it is closed; made if need be.

    `token`: 16 hex digits that it got when it was made. Raises OutputError if the file there is not such a one, of this
    user; OutputBusyError while another has it, or with `wait` waits; and OSError.
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
                lock(fd, self.path, wait)
                with suppress(FileNotFoundError):  # its last owner may have replaced or removed it before we had it
                    if os.path.samestat(os.lstat(self.path), os.fstat(fd)):
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _open_path(self) -> int:
        while True:
            try:
                return os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except FileNotFoundError:
                self._make()
            except IsADirectoryError:
                raise OutputError(self.path, "is not a regular file") from None
            except OSError as error:
                if error.errno == errno.ELOOP:
                    refuse_existing(self.path, force=True)
                raise

    def _make(self) -> None:
        """Makes the file, which has its head from the first moment on; another process may be faster."""
        head = self._head + _record(json.dumps({"token": _token()}).encode())
        with suppress(FileExistsError):
            try:
                _make_whole(self.path, head)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    error.filename = self.path
                    raise
                with Unfinished(self.path) as new_file:
                    _write(new_file.fd, head, 0)
                    new_file.commit(replace=False)

    def _refuse_others(self, fd: int) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OutputError(self.path, "is not a regular file")
        if found.st_uid != os.geteuid() and found.st_uid != self._owner_of_new():
            raise OutputError(self.path, f"belongs to the user {found.st_uid}; remove it if it is not in use any more")

    def _owner_of_new(self) -> int:
        """Who the file system says has made what this process makes: not always this user (root on NFS, FAT)."""
        with Unfinished(self.path) as new_file:
            return os.fstat(new_file.fd).st_uid

    def _read_token(self) -> str:
        if os.pread(self._fd, len(self._head), 0) != self._head:
            raise OutputError(self.path, f"is no file that a {self._kind} keeps; move or remove it")
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
        """All that was added, up to what was being added when a process was killed, or is damaged."""
        return self._records(self._start)

    def check_whole(self) -> None:
        """Raises OutputError if there is anything behind what `records` has given: for states that are replaced."""
        if os.fstat(self._fd).st_size != self._end:
            raise OutputError(self.path, "is damaged; remove it to begin anew")

    def add(self, content: bytes) -> None:
        """Adds a record behind those that `records` has given; in the file before this returns."""
        with _naming(self.path):
            os.ftruncate(self._fd, self._end)
            self._end += _write(self._fd, _record(content), self._end)

    def clear(self) -> None:
        """Forgets all records."""
        os.ftruncate(self._fd, self._start)
        self._end = self._start

    def replace(self, content: bytes) -> None:
        """Has this record in place of all others, on the disk; those stay until it is there."""
        with _naming(self.path), Unfinished(self.path, self.token) as new_file:
            lock(new_file.fd, self.path)
            head = os.pread(self._fd, self._start, 0)
            self._end = _write(new_file.fd, head + _record(content), 0)
            kept = os.dup(new_file.fd)
            try:
                new_file.commit(replace=True)
                self._fd, kept = kept, self._fd
            finally:
                os.close(kept)

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
