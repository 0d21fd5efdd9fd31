"""The source folder: the only module that opens what lies in it.

Rule: a path is opened below the root without following any symbolic link and without leaving the root, even while
other programs swap its components. It is a regular file or nothing; opening a pipe never blocks. Only the root stays
open, by a descriptor that cannot read; before each use of it, its path is checked to still lead to it.
"""

import errno
import fcntl
import os
import stat
import sys
from contextlib import suppress
from types import TracebackType

from tartapefs.source import file_systems, leases
from tartapefs.source.file_systems import fstat, lstat
from tartapefs.source.system_calls import (
    FOLDER,
    LIST,
    READ,
    has_openat2,
    lstat_uncached,
    open_by_component,
    openat2,
)

_NAMES_ARE = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()

# A path as it was resolved: of each folder from the root on, and of the file, absolute path, device and inode.
ResolvedPath = list[tuple[bytes, int, int]]


class Folder:
    """One folder of the source, open for listing. Raises OSError as the system does.

    `local`: the device whose files this kernel alone changes, or None; `root_device`: that of the root.
    """

    def __init__(self, fd: int, local: int | None, root_device: int) -> None:
        self._fd = fd
        self._local = local
        self._root_device = root_device

    def close(self) -> None:
        os.close(self._fd)

    def stat(self) -> os.stat_result:
        return fstat(self._fd, self._local)

    def is_beyond(self, found: os.stat_result) -> bool:
        """Whether the folder, whose `stat` was `found`, lies on another file system than the root."""
        return found.st_dev != self._root_device

    def why_unstable(self) -> str | None:
        """Why two looks at the folder may differ without a change, as text; else None."""
        return file_systems.why_unstable(self._fd, self.stat())

    def names(self, one_file_system: bool = False) -> list[bytes]:
        """The names in it, in the archive's order. `one_file_system`: none if it lies on another than the root."""
        if one_file_system and self.is_beyond(self.stat()):
            return []
        encoding, errors = _NAMES_ARE
        return sorted([name.encode(encoding, errors) for name in os.listdir(self._fd)])

    def lstat(self, name: bytes) -> os.stat_result:
        found = os.lstat(name, dir_fd=self._fd)  # as `file_systems.lstat`, a call of which would slow a recording
        return found if found.st_dev == self._local else lstat_uncached(self._fd, name)

    def readlink(self, name: bytes) -> bytes:
        return os.readlink(name, dir_fd=self._fd)

    def folder(self, name: bytes) -> "Folder":
        return Folder(os.open(name, LIST, dir_fd=self._fd), self._local, self._root_device)

    def is_readable(self, name: bytes) -> bool:
        return os.access(name, os.R_OK, dir_fd=self._fd, effective_ids=True)

    def stat_without_writers(self, name: bytes) -> os.stat_result | None:
        """The `stat` of a file whose every later change moves its times; None if a program may be writing it."""
        try:
            fd = os.open(name, READ, dir_fd=self._fd)
        except BlockingIOError:  # a program has a lease for writing
            return None
        try:
            return leases.stat_without_writers(fd, self._local)
        finally:
            os.close(fd)


class Source:
    """The source folder at `root`. Usable from many threads; raises OSError as the system does.

    root: its real path.
    ino: its inode.
    descriptor: of the root; the only one that stays open, but for the lock's.
    plain_device: the device whose files `os.fstat` shows as `fstat` does, for loops that cannot spare a call; or None.
    """

    def __init__(self, root: str, use_openat2: bool | None = None) -> None:
        self.root = os.path.realpath(root)
        self._path = os.fsencode(self.root)
        self._lock_fd = -1
        self.descriptor = os.open(self._path, FOLDER)
        self._has_late_times = file_systems.has_late_times(self.descriptor)
        self._local = file_systems.local_device(self.descriptor)
        self.plain_device = None if self._has_late_times else self._local
        found = fstat(self.descriptor, self._local)
        self.ino, self._device = found.st_ino, found.st_dev
        self._open = openat2 if (has_openat2() if use_openat2 is None else use_openat2) else open_by_component

    def close(self) -> None:
        # Forgotten first: if an interrupt comes, one stays open, and none is closed twice, which could be another's.
        open_ones, self._lock_fd, self.descriptor = (self._lock_fd, self.descriptor), -1, -1
        for fd in open_ones:
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self.close()

    def foreign_types(self, one_file_system: bool = False) -> list[str]:
        """The types of file systems such as "nfs4" or "fuse.sshfs" on which the source lies in whole or in part.

        `one_file_system`: only what the root lies on.
        """
        return file_systems.foreign_types(self.descriptor, self.root, one_file_system)

    def lock(self) -> None:
        """Locks the folder until this is closed; raises BlockingIOError if another process has locked it.

        Does nothing if the file system has no locks for folders (some network file systems), nor for a user who may not
        read the folder, and cannot record it.
        """
        try:
            self._lock_fd = os.open(self.root, LIST)
        except PermissionError:
            return
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise

    def is_at_its_path(self) -> bool:
        """Whether the root's path still leads to the folder that was opened."""
        try:
            found = lstat(self.descriptor, self._path, self._local)
            return found.st_ino == self.ino and found.st_dev == self._device
        except (FileNotFoundError, NotADirectoryError):
            return False

    def open(self, path: bytes) -> int:
        """A descriptor to read the file at `path`, relative to the root. `fstat` tells what it is."""
        if b"/" not in path:  # there is no folder that could be a link, and Python's own call is the faster one
            return os.open(path, READ, dir_fd=self.descriptor)
        return self._open(self.descriptor, path, READ)

    def prefetch(self, path: bytes, start: int, size: int) -> None:
        """Has the kernel read this part of a file into its cache. Errors show when the file is read."""
        with suppress(OSError):
            fd = self.open(path)
            try:
                os.posix_fadvise(fd, start, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    def folder_descriptor(self, path: bytes) -> int:
        """A descriptor of the folder at `path`, relative to the root, for `open_in`. The caller closes it.

        It saves the walk for the folder's next files. Use it for one request only: the next one must see if the path
        leads elsewhere.
        """
        return self._open(self.descriptor, path or b".", FOLDER)

    @staticmethod
    def open_in(folder: int, name: bytes) -> int:
        """Like `open`, for the file `name` directly in the folder of this descriptor."""
        return os.open(name, READ, dir_fd=folder)

    def is_local(self, found: os.stat_result) -> bool:
        """Whether `found` lies on the root's own file system, and only this kernel changes what is there."""
        return found.st_dev == self._local

    def fstat(self, fd: int) -> os.stat_result:
        """The `fstat` of a file of the source, which shows each change of the bytes that were read of it before."""
        found = fstat(fd, self._local)
        return fstat(fd, self._local) if self.wait_for_holes(fd, found.st_dev) else found

    def wait_for_holes(self, fd: int, device: int) -> bool:
        """Waits until no hole is being punched into a file on `device`; returns whether one could have been.

        On tmpfs the bytes are gone before the times move, all under a lock that is taken to look for data, too.
        """
        has_late_times = self._has_late_times if device == self._device else file_systems.has_late_times(fd)
        if has_late_times:
            with suppress(OSError):  # it has no data
                os.lseek(fd, 0, os.SEEK_DATA)
        return has_late_times

    def lstat(self, path: bytes) -> os.stat_result:
        """The `lstat` of `path`, relative to the root, as it is now; the root's own for an empty path."""
        try:
            return lstat(self.descriptor, path, self._local) if path else fstat(self.descriptor, self._local)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # on this file system nothing can have that name
                error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            error.filename = os.path.join(self.root, os.fsdecode(path))
            raise error

    def resolve(self, path: bytes) -> ResolvedPath:
        """Resolves the path of a file, relative to the root, to identities that `lstat_resolved` compares.

        Empty if one of them may change without this kernel's knowledge. Raises NotADirectoryError if a link leads to a
        folder on the path.
        """
        paths = [self._path]
        for name in path.split(b"/"):
            paths.append(paths[-1] + b"/" + name)
        found = [os.lstat(each) for each in paths]
        if not all(stat.S_ISDIR(one.st_mode) for one in found[:-1]):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if any(one.st_dev != self._local for one in found):
            return []
        return [(each, one.st_dev, one.st_ino) for each, one in zip(paths, found, strict=True)]

    @staticmethod
    def lstat_resolved(resolved: ResolvedPath) -> os.stat_result | None:
        """The `lstat` of the file, if each path still leads to the same folder or file; else None, or OSError."""
        for path, dev, ino in resolved:
            found = os.lstat(path)
            if found.st_ino != ino or found.st_dev != dev:
                return None
        return found

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(path, dir_fd=self.descriptor)

    def stat_without_writers(self, path: bytes) -> os.stat_result | None:
        """As `Folder.stat_without_writers`, for the file at `path`, relative to the root."""
        fd = self.open(path)
        try:
            return leases.stat_without_writers(fd, self._local)
        finally:
            os.close(fd)

    def folder(self, path: bytes = b"") -> Folder:
        """The folder at `path`, relative to the root, open for listing."""
        fd = self.open(path or b".")
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return Folder(fd, self._local, self._device)
