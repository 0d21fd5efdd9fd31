"""The adapter to FUSE: one folder that holds one read-only file, the archive.

Rule: a read is answered with exactly the bytes asked for, or fails whole with EIO. A good prefix is never an answer:
outside `direct_io` one short answer makes the kernel shrink the file, and cp, cat and rclone then exit 0 with a
truncated copy. Exceptions become errno in `ArchiveFS.errno_of` and nowhere else, and are logged there; no exception of
any kind reaches the binding.

The binding is fusepy. Its `FUSE` calls libfuse's `fuse_main_real`, whose threads Python does not know, so that each
callback makes and unmakes a thread state. `Session` stops short of that: it mounts by `fuse_setup`, and lets threads of
Python's run `fuse_loop`, whose state lasts as long as they do. It hands the request's own buffer to the player.
"""

import contextlib
import ctypes
import errno
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fuse

from tartapefs import layout
from tartapefs.activity import Activity
from tartapefs.display import printable
from tartapefs.errors import MountError, TapeError
from tartapefs.player import TapePlayer
from tartapefs.status import facts, in_short, process_of

log = logging.getLogger("tartapefs")

_ARCHIVE_INO = 2  # FUSE's own root is 1
_IO_SIZE = 128 * 1024  # bytes: the largest request that libfuse 2 passes on
_LINES_REMEMBERED = 1000  # of the log, so that none is repeated
_STATFS_BLOCK = 4096  # bytes; at 0 bsdtar loops for ever
XATTRS = "user.tartape."
_libfuse = fuse._libfuse


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How the archive is shown. `name`: of the file. `mode`: its permission bits, of which only r counts."""

    name: str = "archive.tar"
    mode: int = 0o400
    cached: bool = False  # the kernel's page cache and read-ahead, for programs that need mmap
    allow_other: bool = False
    audit_interval: float = 60  # seconds between two audits while the archive is open
    audit_share: float = 0.05  # of one core that they may take
    uid: int | None = None  # the owner that is shown; None for who mounts
    gid: int | None = None


class ArchiveFS(fuse.Operations):  # type: ignore[misc]  # fusepy has no types
    """The file operations, in terms of a player. Paths are bytes carried in Latin-1, one character each."""

    use_ns = True

    def __init__(self, player: TapePlayer, options: MountOptions) -> None:
        self._player = player
        self.readinto = player.readinto  # nothing stands between a request and the player
        self.activity = Activity()
        self._tape = player.tape
        self._entry = os.fsencode(options.name).decode("latin-1")
        self._logged: set[str] = set()
        self.ended = False  # unmounted: who still reads gets errors that are no news
        mode = options.mode & 0o444
        common = dict.fromkeys(("st_mtime", "st_ctime", "st_atime"), self._tape.recorded_ns)
        common |= {
            "st_uid": os.geteuid() if options.uid is None else options.uid,
            "st_gid": os.getegid() if options.gid is None else options.gid,
            "st_blksize": _IO_SIZE,
        }
        self._folder_attributes = common | {"st_mode": stat.S_IFDIR | mode | mode >> 2, "st_nlink": 2, "st_ino": 1}
        self._archive_attributes = common | {
            "st_mode": stat.S_IFREG | mode,
            "st_nlink": 1,
            "st_ino": _ARCHIVE_INO,
            "st_size": self._tape.total_size,
            "st_blocks": layout.blocks(self._tape.total_size),
        }

    def _is_archive(self, path: str) -> bool:
        """Whether `path` is the archive rather than the folder; raises ENOENT for anything else."""
        if path != "/" and path[1:] != self._entry:
            raise fuse.FuseOSError(errno.ENOENT)
        return path != "/"

    def _check_valid(self) -> None:
        if self._player.drift is not None:
            raise self._player.drift.again()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        if not self._is_archive(path):
            return self._folder_attributes
        self._check_valid()
        return self._archive_attributes

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", self._entry]

    def open(self, path: str, flags: int) -> int:
        self._check_valid()
        return self.activity.opened(process_of(fuse.fuse_get_context()[2]))

    def release(self, path: str, fh: int) -> int:
        self.activity.closed(fh)
        return 0

    @property
    def is_open(self) -> bool:
        """Whether any program has the archive open."""
        return bool(self.activity.readers)

    def statfs(self, path: str) -> dict[str, int]:
        return {
            "f_bsize": _STATFS_BLOCK,
            "f_frsize": _STATFS_BLOCK,
            "f_blocks": -(-self._tape.total_size // _STATFS_BLOCK),
            "f_files": 1,
            "f_namemax": 255,
        }

    def _xattrs(self, path: str) -> dict[str, str | int]:
        # The folder has those of the tape too: once it is invalid the archive cannot be looked up any more. Only it has
        # those that change all the time: who copies the archive with its attributes need not copy these.
        own = {} if self._is_archive(path) else in_short(self._player, self.activity)
        return facts(self._player) | own

    def listxattr(self, path: str) -> list[str]:
        return [XATTRS + name for name in self._xattrs(path)]

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        value = self._xattrs(path).get(name.removeprefix(XATTRS)) if name.startswith(XATTRS) else None
        if value is None:
            raise fuse.FuseOSError(errno.ENODATA)
        return str(value).encode()

    def errno_of(self, error: BaseException) -> int:
        """The errno that answers a request which raised `error`: what this class raised on purpose, or EIO.

        Raises nothing, whatever the log does: an exception that reached the binding would be answered with success.
        """
        if isinstance(error, fuse.FuseOSError):
            return error.errno or errno.EIO
        if self.ended:
            return errno.EIO
        with contextlib.suppress(BaseException):
            match error:
                case TapeError():
                    self._log(str(error))
                case OSError():
                    self._log(f"{printable(error.filename or 'the source')}: {error.strerror}; no drift: read it again")
                case _:
                    self._log(f"a defect in tartapefs; the request failed: {error!r}", error)
        return errno.EIO

    def _log(self, line: str, defect: BaseException | None = None) -> None:
        if line not in self._logged:  # a reader that tries again need not fill the log
            if len(self._logged) >= _LINES_REMEMBERED:
                self._logged.clear()
            self._logged.add(line)
            log.error("%s", line, exc_info=defect)


_libfuse.fuse_setup.restype = ctypes.c_void_p
_libfuse.fuse_loop.argtypes = (ctypes.c_void_p,)

_view_of_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.restype = ctypes.py_object
_view_of_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_WRITABLE = 0x200  # PyBUF_WRITE

_OPERATIONS = ("getattr", "readdir", "open", "release", "statfs", "getxattr", "listxattr")
# fusepy's type of `read` makes two pointer objects at each call, which nobody looks at.
_READ = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, fuse.c_off_t, ctypes.c_void_p)
_HANDLE_AT = fuse.fuse_file_info.fh.offset
_handle = ctypes.c_uint64.from_address


class Session(fuse.FUSE):  # type: ignore[misc]  # fusepy has no types
    """A mounted archive. `loop` serves requests until it is unmounted; call it from as many threads as should serve.

    Raises MountError, with what libfuse had to say, if it cannot be mounted.
    """

    def __init__(self, archive: ArchiveFS, mountpoint: str, source: str, options: MountOptions) -> None:
        # Not super().__init__: that one returns only after the mount has ended.
        self.operations = archive
        self.encoding = "latin-1"
        self.raw_fi = False
        self.use_ns = True
        self._callbacks = fuse.fuse_operations()
        types = dict(field[:2] for field in fuse.fuse_operations._fields_)
        for name in _OPERATIONS:
            setattr(self._callbacks, name, types[name](self._answering(getattr(self, name))))
        self._callbacks.read = ctypes.cast(_READ(self._reading()), types["read"])
        options_text = ",".join(_fuse_options(source, options))
        arguments = [os.fsencode(text) for text in ("tartapefs", "-f", "-o", options_text, mountpoint)]
        with _stderr_captured() as said:
            self._fuse = ctypes.c_void_p(
                _libfuse.fuse_setup(
                    len(arguments),
                    (ctypes.c_char_p * len(arguments))(*arguments),
                    ctypes.byref(self._callbacks),
                    ctypes.c_size_t(ctypes.sizeof(self._callbacks)),
                    ctypes.byref(ctypes.c_void_p()),  # where it was mounted
                    ctypes.byref(ctypes.c_int()),  # whether -s was among the arguments
                    None,
                )
            )
        if not self._fuse:
            raise MountError(mountpoint, "; ".join(said()) or "libfuse could not mount it")

    def loop(self) -> None:
        """Answers requests until the archive is unmounted."""
        _libfuse.fuse_loop(self._fuse)

    def _answering(self, operation: Callable[..., int | None]) -> Callable[..., int]:
        def answer(*arguments: Any) -> int:
            try:
                return operation(*arguments) or 0
            except BaseException as error:
                return -self.operations.errno_of(error)

        return answer

    def _reading(self) -> Callable[..., int]:
        readinto, errno_of = self.operations.readinto, self.operations.errno_of
        delivered = self.operations.activity.delivered

        def read(path: int, buffer: int, size: int, offset: int, info: int) -> int:
            try:
                count = readinto(_view_of_memory(buffer, size, _WRITABLE), offset)
                delivered(_handle(info + _HANDLE_AT).value, offset, count)
                return count
            except BaseException as error:
                return -errno_of(error)

        return read


def _fuse_options(source: str, options: MountOptions) -> Iterator[str]:
    # libfuse splits at commas and knows the backslash as their escape.
    yield "fsname=" + source.replace("\\", "\\\\").replace(",", "\\,")
    yield "subtype=tartapefs"
    yield "ro"
    yield "noexec"  # nosuid and nodev come by themselves
    yield "default_permissions"  # always: without it `allow_other` shows a 0400 file to everyone
    yield "use_ino"
    yield "attr_timeout=0"  # so that `stat` and `open` see at once that the tape became invalid
    yield "entry_timeout=0"
    if options.allow_other:
        yield "allow_other"
    if not options.cached:
        yield "direct_io"


@contextlib.contextmanager
def _stderr_captured() -> Iterator[Callable[[], list[str]]]:
    """What libfuse and fusermount write on descriptor 2 meanwhile, as lines, once the block has ended."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        lines: list[str] = []
        try:
            yield lambda: lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines += [printable(line) for line in file.read().splitlines() if line]
