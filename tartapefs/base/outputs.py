"""Every file that a command writes: how it is named, opened, put in place, continued and removed.

Rule: nothing is replaced or removed that another program or user may have made, and nothing before its replacement is
complete. (Nor is an output part of a tape: `tape_files` tells.)

- A new file gets a name that is free. It may be written as `Unfinished`, in the folder of its final path, under a name
  with 64 random bits, which no other program can have chosen; then it is synced and renamed.
- A file that exists and is not empty is replaced only if the user asked for that. To make or replace a file, no link is
  followed.
"""

import ctypes
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from tartapefs.base import signals
from tartapefs.base.commands import as_path, quoted
from tartapefs.base.errors import OutputBusyError, OutputError
from tartapefs.base.text import printable

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RANDOM = 8  # bytes of a token
_COPIED_AT_ONCE = 1 << 20  # bytes
_LONGEST_NAME = 255 - 2 * _RANDOM - len("..part")  # bytes of the final name that an unfinished file has in its own
_CWD, _RENAME_NOREPLACE = -100, 1  # of renameat2(2)

_libc = ctypes.CDLL(None, use_errno=True)


def open_device(output: str) -> int | None:
    """Opens `output` for writing if it is a device, a pipe or a descriptor of this process; else returns None.

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
    """Returns the size of the file at `output`, None if there is none.

    Raises OutputError for a link, for anything but a regular file, and, without `force`, for a file that is not empty.
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


def open_writable(output: str, flags: int) -> int:
    """Opens or makes the file as `os.open` does. If it is the user's own and read-only, the error says what helps."""
    try:
        return os.open(output, flags | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except PermissionError as error:
        with suppress(OSError):
            found = os.stat(output)
            if found.st_uid == os.geteuid() and not found.st_mode & stat.S_IWUSR:  # as `cp` from a mount leaves it
                error.strerror = f'{error.strerror}; run "chmod u+w {quoted(as_path(output))}" first'
        raise


def create(output: str) -> int:
    """Opens a new or empty file at `output` for writing, by no link."""
    with suppress(FileExistsError):
        return os.open(output, _NEW, 0o666)
    fd = open_writable(output, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        refuse_existing(output, force=False)
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove(output: str, fd: int) -> None:
    """Removes the file at `output`, if it is still the one of this descriptor."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(output), os.fstat(fd)):
            os.unlink(output)


def open_existing(output: str, flags: int = os.O_RDWR, create: bool = False) -> int:
    """Opens the file at `output` as it is, also by a link; with `create`, makes it if there is none.

    Raises OutputError for a link to nothing, and OSError.
    """
    try:
        return open_writable(output, flags)
    except FileNotFoundError:
        if not create:
            raise
    refuse_existing(output, force=True)
    return open_writable(output, flags | os.O_CREAT | os.O_EXCL)


def lock(fd: int, output: str, wait: bool = False) -> None:
    """Locks the file until it is closed. If it is locked, raises OutputBusyError, or with `wait` waits."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise OutputBusyError(output) from None


@contextmanager
def naming(output: str) -> Iterator[None]:
    """Adds the path to errors in the block, whose system calls know a descriptor alone."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or output
        raise


class Unfinished:
    """A file under a temporary name in the folder of `target`, until `commit` renames it or `discard` removes it.

    `token`: of a `SavedState` that is locked; a file that a killed process left under this name is removed, or with
    `resume` continued. `mode`: its permissions from the start; else it gets those of the file that it replaces. Raises
    OSError.

    target: its final path. temporary: its path until then. fd: its descriptor, -1 once it is closed.
    """

    def __init__(self, target: str, token: str | None = None, resume: bool = False, mode: int | None = None) -> None:
        self.target = target
        folder, name = os.path.split(os.fsencode(target))
        part = b"%b.%b.part" % (name[:_LONGEST_NAME], (token or new_token()).encode())
        self.temporary = os.fsdecode(os.path.join(folder, part))
        with signals.undisturbed():  # or an interrupt would leave a file that no run knows to be ours
            if token is not None and not resume:
                with suppress(FileNotFoundError):
                    os.unlink(self.temporary)
            try:
                self.fd = self._open(resume, 0o666 if mode is None else mode)
            except OSError as error:
                error.filename = target
                raise
            if mode is None:
                with suppress(OSError):
                    os.fchmod(self.fd, stat.S_IMODE(os.lstat(target).st_mode) & 0o777)

    def _open(self, resume: bool, mode: int) -> int:
        if resume:
            with suppress(FileNotFoundError):
                return os.open(self.temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        return os.open(self.temporary, _NEW, mode)

    def copy_target(self) -> None:
        """Writes to it what the file at `target` holds."""
        from shutil import copyfileobj  # here, since its import takes as long as many a command

        there = os.open(self.target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(there, "rb") as old, open(self.fd, "wb", closefd=False) as new:
            copyfileobj(old, new, _COPIED_AT_ONCE)

    def commit(self, replace: bool, sync: bool = True) -> None:
        """Renames it to `target`, with `sync` on disk; without `replace`, raises FileExistsError if there is a file."""
        if sync:
            with naming(self.target):
                os.fsync(self.fd)
        with signals.undisturbed():
            (os.rename if replace else _rename_new)(self.temporary, self.target)
            self.close()
            if sync:
                _sync_folder_of(self.target)

    def discard(self) -> None:
        """Removes it, unless it is renamed or closed."""
        if self.fd >= 0:
            with signals.undisturbed():
                with suppress(FileNotFoundError):  # a user removed the folder, and had the right to
                    os.unlink(self.temporary)
                self.close()

    def close(self) -> None:
        """Leaves it under its temporary name, to be resumed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def new_token() -> str:
    return os.urandom(_RANDOM).hex()


def _sync_folder_of(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _rename_new(old: str, new: str) -> None:
    """Renames unless `new` exists; checks that first if the file system cannot do both in one step."""
    rename = getattr(_libc, "renameat2", None)
    if rename is None or rename(_CWD, os.fsencode(old), _CWD, os.fsencode(new), _RENAME_NOREPLACE):
        error = errno.ENOSYS if rename is None else ctypes.get_errno()
        if error not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(error, os.strerror(error), new)
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        os.rename(old, new)
