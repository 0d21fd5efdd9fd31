"""The source folder: the only module that opens what lies in it.

Rule: a path is opened below the root without following any symbolic link and without leaving the root, whoever swaps
components meanwhile; it is a regular file or nothing, and a pipe in its place never blocks. Nothing is kept open but
the root itself (as a place, not for reading), and whoever reads through it checks that its path still leads to it.

Linux 5.6 has one system call for this, `openat2`. (0 of 580,432 racing reads got outside, against 278,456 of 591,055
with `O_NOFOLLOW` on the last component alone.) Without it the path is walked component by component.

A `stat` of anything that does not lie on the root's own local file system is asked of the file system, each time:
elsewhere the kernel may answer from what it was told seconds ago.
"""

import ctypes
import errno
import fcntl
import os
import re
import signal
import stat
import struct
import sys
import time
from contextlib import suppress
from types import TracebackType

_NS = 10**9

_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)


_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_WRITE_AND_WAIT = 7  # SYNC_FILE_RANGE_WAIT_BEFORE | _WRITE | _WAIT_AFTER
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_OVERLAYFS, _TMPFS = 0x794C7630, 0x01021994  # as `fstatfs` names them
_LATE = {_TMPFS, _OVERLAYFS}  # where a hole is there before the times have moved; an overlay's layer may be a tmpfs
_LEASED_BY_A_SERVER = {0x6969, 0xFF534D42, 0xFE534D42}  # nfs, cifs, smb3: without a delegation no lease, writers or not
# ext4, xfs, btrfs, tmpfs, f2fs, zfs, bcachefs: nobody but this kernel changes what lies there, and it shows at once, by
# whatever descriptor. Of others (NFS, SMB, FUSE) a `stat` may be old: the kernel keeps what it was told for some time.
_LOCAL = {0xEF53, 0x58465342, 0x9123683E, _TMPFS, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E}
_BTRFS = 0x9123683E
NO_SUBVOLUME = 2  # the inode that btrfs shows in a snapshot for each subvolume in it (BTRFS_EMPTY_SUBVOL_DIR_OBJECTID)
_MADE_UP = {  # file systems without files
    0x9FA0: "procfs",
    0x62656572: "sysfs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0x73636673: "securityfs",
}
# Types of file systems whose files another machine or process changes, as /proc/self/mountinfo names them.
_FOREIGN = re.compile(rb"fuse(\..+)?|nfs4?|cifs|smb3|9p|ceph|afs|virtiofs|lustre|beegfs|gpfs|coda|orangefs|vboxsf")
_NAMES_ARE = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()

_statx = getattr(_libc, "statx", None)  # in glibc since 2018, in musl since 2024
if _statx is not None:
    _statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_EMPTY_PATH, _AT_STATX_FORCE_SYNC = 0x100, 0x800, 0x1000, 0x2000
_ASK = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC
_BASIC_STATS, _STATX_SIZE = 0x7FF, 256
# Of `struct statx`: nlink, uid, gid, mode, ino, size; atime, ctime, mtime, each in seconds and nanoseconds; device.
_STATX = struct.Struct("=16xIIIH2xQQ16xqI20xqI4xqI12xII")


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_BELOW = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
_HOW = {flags: _OpenHow(flags, 0, _BELOW) for flags in (_READ, _PLACE)}
_HOW_ADDRESS = {flags: ctypes.addressof(how) for flags, how in _HOW.items()}
_HOW_SIZE = ctypes.sizeof(_OpenHow)
_RACES, _LEASE_WAIT = 100, 0.001  # attempts to open at once, then seconds between two; the kernel ends it after 45 s


def _openat2(root: int, path: bytes, flags: int) -> int:
    attempt = 0
    while (fd := _syscall(_SYS_OPENAT2, root, path, _HOW_ADDRESS[flags], _HOW_SIZE)) < 0:
        error = ctypes.get_errno()
        if error not in (errno.EAGAIN, errno.EINTR):
            raise OSError(error, os.strerror(error), path)
        # EAGAIN: a rename raced with the walk, or a program has a lease on the file, which it is asked to return.
        if (attempt := attempt + 1) > _RACES:
            time.sleep(_LEASE_WAIT)
    return int(fd)


def _open_by_component(root: int, path: bytes, flags: int) -> int:
    folder = root
    try:
        *folders, last = path.split(b"/")
        for name in folders:
            above, folder = folder, os.open(name, _PLACE, dir_fd=folder)
            if above != root:
                os.close(above)
        return os.open(last, flags, dir_fd=folder)
    finally:
        if folder != root:
            os.close(folder)


def has_openat2() -> bool:
    """Whether this kernel has `openat2`, and no filter of system calls forbids it."""
    root = os.open("/", _PLACE)
    try:
        os.close(_openat2(root, b".", _READ))
    except OSError:
        return False
    finally:
        os.close(root)
    return True


def _file_system(fd: int) -> int:
    """The magic number of the file system that the file lies on; 0 if it has none to tell."""
    facts = (ctypes.c_long * 32)()
    return 0 if _libc.fstatfs(fd, facts) else facts[0] & 0xFFFF_FFFF


def _asked(fd: int, path: bytes = b"") -> os.stat_result:
    """The `lstat` of `path` below the folder `fd`, of `fd` itself for an empty one: what its file system says now."""
    if _statx is None:
        return os.lstat(path, dir_fd=fd) if path else os.fstat(fd)
    facts = ctypes.create_string_buffer(_STATX_SIZE)
    if _statx(fd, path, _ASK, _BASIC_STATS, facts):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    (nlink, uid, gid, mode, ino, size, atime, atime_ns, ctime, ctime_ns, mtime, mtime_ns, major, minor) = (
        _STATX.unpack_from(facts)
    )
    return os.stat_result(
        (mode, ino, os.makedev(major, minor), nlink, uid, gid, size, atime, mtime, ctime),
        {
            "st_atime_ns": atime * _NS + atime_ns,
            "st_mtime_ns": mtime * _NS + mtime_ns,
            "st_ctime_ns": ctime * _NS + ctime_ns,
        },
    )


def _fstat(fd: int, local: int | None) -> os.stat_result:
    """The `fstat` of a file, not an old one. On the device `local` none is: only this kernel changes what is there."""
    found = os.fstat(fd)
    return found if found.st_dev == local else _asked(fd)


def _lstat(fd: int, path: bytes, local: int | None) -> os.stat_result:
    """The `lstat` of `path` below the folder `fd`, not an old one either."""
    found = os.lstat(path, dir_fd=fd)
    return found if found.st_dev == local else _asked(fd, path)


def _settled(fd: int, local: int | None) -> os.stat_result | None:
    """The `fstat` of a file, taken while nobody writes it: every change of its bytes from then on moves its times.

    None if a program has the file open for writing, or mapped to store into it. Its `write` may be under way, which
    moved the times when it began; its stores may go to a page that is dirty already, which moves them no more. The
    kernel knows: it grants a lease for reading only on a file that nobody can write, and whoever opens it for writing
    then waits until the lease is returned, some microseconds later.

    Where there are no leases (on other users' files, on network file systems) the dirty pages are written back instead,
    which does nothing about a `write` under way.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # by default who waits for the lease sends SIGIO, which kills
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN and _file_system(fd) not in _LEASED_BY_A_SERVER:
            return None
        _write_back(fd)
        return _fstat(fd, local)
    try:
        return _fstat(fd, local)
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _write_back(fd: int) -> None:
    """Writes a regular file's dirty pages, which takes from every mapping the right to store without a fault.

    The next store through a mapping then moves the timestamps. `sync_file_range` does this without a commit of the
    journal (measured: a fifth of `fsync`'s time), but on overlayfs it does nothing at all. Of anything but a regular
    file nothing is written.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    if _file_system(fd) in (0, _OVERLAYFS) or _libc.sync_file_range(fd, 0, 0, _WRITE_AND_WAIT):
        os.fsync(fd)


Way = list[tuple[bytes, int, int]]  # of folders and a file below the last: absolute path, device, inode


class Folder:
    """One folder of the source, open for listing. Raises OSError as the system does."""

    def __init__(self, fd: int, local: int | None) -> None:
        self._fd = fd
        self._local = local

    def close(self) -> None:
        os.close(self._fd)

    def stat(self) -> os.stat_result:
        return _fstat(self._fd, self._local)

    def why_never_at_rest(self) -> str | None:
        """Why no two looks at it need agree, if that is so, for people."""
        file_system = _file_system(self._fd)
        if file_system in _MADE_UP:
            return f"lies on {_MADE_UP[file_system]}, where the kernel makes up what is read"
        if file_system == _BTRFS and self.stat().st_ino == NO_SUBVOLUME:
            return "stands for a subvolume that the snapshot does not hold; btrfs gives it the time of each look at it"
        return None

    def names(self) -> list[bytes]:
        """The names in it, in the archive's order."""
        encoding, errors = _NAMES_ARE
        return sorted([name.encode(encoding, errors) for name in os.listdir(self._fd)])

    def lstat(self, name: bytes) -> os.stat_result:
        found = os.lstat(name, dir_fd=self._fd)  # as `_lstat`, whose call would be a part of a scan that shows
        return found if found.st_dev == self._local else _asked(self._fd, name)

    def readlink(self, name: bytes) -> bytes:
        return os.readlink(name, dir_fd=self._fd)

    def folder(self, name: bytes) -> "Folder":
        return Folder(os.open(name, _LIST, dir_fd=self._fd), self._local)

    def is_readable(self, name: bytes) -> bool:
        return os.access(name, os.R_OK, dir_fd=self._fd, effective_ids=True)

    def settled(self, name: bytes) -> os.stat_result | None:
        """The `stat` of a file that every change to come moves the times of; None if a program may be writing it."""
        try:
            fd = os.open(name, _READ, dir_fd=self._fd)
        except BlockingIOError:  # a program has a lease for writing
            return None
        try:
            return _settled(fd, self._local)
        finally:
            os.close(fd)


class Source:
    """The folder at `root`, open as a place. Usable from many threads; raises OSError as the system does."""

    def __init__(self, root: str, openat2: bool | None = None) -> None:
        self.root = os.path.realpath(root)
        self._path = os.fsencode(self.root)
        self._locked = -1
        self._root = os.open(self._path, _PLACE)
        kind = _file_system(self._root)
        self._is_late = kind in _LATE
        self._local = os.fstat(self._root).st_dev if kind in _LOCAL else None
        # The device on which `os.fstat` gives what `fstat` does, for who cannot spare a call.
        self.plain = None if self._is_late else self._local
        self._place = _fstat(self._root, self._local)
        self._open = _openat2 if (has_openat2() if openat2 is None else openat2) else _open_by_component

    def close(self) -> None:
        # Forgotten first: if an interrupt comes, one stays open, and none is closed twice, which could be another's.
        open_ones, self._locked, self._root = (self._locked, self._root), -1, -1
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
        if hasattr(self, "_root"):
            self.close()

    @property
    def ino(self) -> int:
        return self._place.st_ino

    @property
    def descriptor(self) -> int:
        """Of the root, as a place: the only one that is kept."""
        return self._root

    def foreign_types(self) -> list[str]:
        """The types of file systems such as "nfs4" or "fuse.sshfs" on which the source lies, all or in part.

        They may answer from a cache, the kernel's or their own, and then a change is not seen at once.
        """
        escaped = re.sub(rb"[ \t\n\\]", lambda character: b"\\%03o" % ord(character[0]), self._path + b"/")
        found = set()
        with suppress(OSError):
            with open(f"/proc/self/fdinfo/{self._root}", "rb") as facts:
                (its_mount,) = (line.split()[1] for line in facts if line.startswith(b"mnt_id:"))
            with open("/proc/self/mountinfo", "rb") as mounts:
                for line in mounts:
                    before, _, after = line.partition(b" - ")
                    mount, _, _, _, place = before.split(b" ")[:5]
                    kind = after.partition(b" ")[0]
                    if (mount == its_mount or place.startswith(escaped)) and _FOREIGN.fullmatch(kind):
                        found.add(kind.decode())
        return sorted(found)

    def lock(self) -> None:
        """Keeps others that ask for this lock out until this is closed; raises BlockingIOError if one of them has it.

        Does nothing where the file system has no locks for folders (some network file systems), nor for a user who may
        not read the folder, and cannot record it.
        """
        try:
            self._locked = os.open(self.root, _LIST)
        except PermissionError:
            return
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise

    def is_in_place(self) -> bool:
        """Whether the root's path still leads to the folder that was opened."""
        try:
            found = _lstat(self._root, self._path, self._local)
            return found.st_ino == self._place.st_ino and found.st_dev == self._place.st_dev
        except (FileNotFoundError, NotADirectoryError):
            return False

    def open(self, path: bytes) -> int:
        """A descriptor to read the file at `path`, relative to the root. What it is, `fstat` tells."""
        if b"/" not in path:  # no way on which it could stray, and Python's own call is the faster one
            return os.open(path, _READ, dir_fd=self._root)
        return self._open(self._root, path, _READ)

    def load(self, path: bytes, start: int, size: int) -> None:
        """Has the kernel read this part of a file into its cache. What goes wrong shows when the file is read."""
        with suppress(OSError):
            fd = self.open(path)
            try:
                os.posix_fadvise(fd, start, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    def place(self, path: bytes) -> int:
        """A descriptor of the folder at `path`, relative to the root, to open files in.

        It saves the walk for the next files of the folder, and is for one request, not for longer: a name that leads
        elsewhere by the next request must be seen then. The caller closes it.
        """
        return self._open(self._root, path or b".", _PLACE)

    @staticmethod
    def open_in(place: int, name: bytes) -> int:
        """Like `open`, for the file `name` directly in a `place`."""
        return os.open(name, _READ, dir_fd=place)

    def is_local(self, found: os.stat_result) -> bool:
        """Whether what was found lies on the root's own file system, and only this kernel changes what is there."""
        return found.st_dev == self._local

    def fstat(self, fd: int) -> os.stat_result:
        """The `fstat` of a file of the source, which shows each change of the bytes that were read of it before."""
        found = _fstat(fd, self._local)
        return _fstat(fd, self._local) if self.wait_for_holes(fd, found.st_dev) else found

    def wait_for_holes(self, fd: int, device: int) -> bool:
        """Waits until no hole is being punched into a file, which lies on `device`; whether there could have been one.

        On tmpfs the bytes are gone before the times move, all under a lock that is taken to look for data, too.
        """
        is_late = self._is_late if device == self._place.st_dev else _file_system(fd) in _LATE
        if is_late:
            with suppress(OSError):  # it has no data
                os.lseek(fd, 0, os.SEEK_DATA)
        return is_late

    def lstat(self, path: bytes) -> os.stat_result:
        """The `lstat` of `path`, relative to the root, true at this moment; the root's own for an empty path."""
        try:
            return _lstat(self._root, path, self._local) if path else _fstat(self._root, self._local)
        except OSError as error:
            error.filename = os.path.join(self.root, os.fsdecode(path))
            raise

    def way_to(self, path: bytes) -> Way:
        """The root, by its own path, each folder on the way to the file at `path`, and the file: where they are now.

        Empty if one of them may change without this kernel's knowledge. Raises NotADirectoryError where there is no
        folder on the way, but a link to one.
        """
        places = [self._path]
        for name in path.split(b"/"):
            places.append(places[-1] + b"/" + name)
        found = [os.lstat(place) for place in places]
        if not all(stat.S_ISDIR(one.st_mode) for one in found[:-1]):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if any(one.st_dev != self._local for one in found):
            return []
        return [(place, one.st_dev, one.st_ino) for place, one in zip(places, found, strict=True)]

    @staticmethod
    def end_of(way: Way) -> os.stat_result | None:
        """The `lstat` of the last on the way, if all on it are still where they were; else None, or OSError."""
        for place, dev, ino in way:
            found = os.lstat(place)
            if found.st_ino != ino or found.st_dev != dev:
                return None
        return found

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(path, dir_fd=self._root)

    def settled(self, path: bytes) -> os.stat_result | None:
        """As `Folder.settled`, for the file at `path`, relative to the root."""
        fd = self.open(path)
        try:
            return _settled(fd, self._local)
        finally:
            os.close(fd)

    def folder(self, path: bytes = b"") -> Folder:
        """The folder at `path`, relative to the root, open for listing."""
        fd = self.open(path or b".")
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return Folder(fd, self._local)
