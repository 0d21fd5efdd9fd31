"""The file system: one folder that holds one read-only file, the archive, or its parts or shards.

Rule: a read is answered with exactly the bytes asked for, or fails whole with EIO. A good prefix is never an answer:
without `direct_io` one short answer makes the kernel shrink the file, and cp, cat and rclone then exit 0 with a
truncated copy. Exceptions become errno in `ArchiveFS.errno_of` and nowhere else, and are logged there; no exception of
any kind reaches what calls these operations, which `libfuse` binds to the library.
"""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from tartapefs.api.files import Files
from tartapefs.archive import layout
from tartapefs.base.errors import TapeError
from tartapefs.base.naming import ARCHIVE_NAME
from tartapefs.base.processes import process_of
from tartapefs.base.text import printable
from tartapefs.mount.hold import Hold
from tartapefs.mount.read_statistics import ReadStatistics
from tartapefs.mount.status import facts, summary
from tartapefs.play.engine import TapePlayer

log = logging.getLogger("tartapefs")

IO_SIZE = 1 << 20  # bytes: the largest request, 256 pages, that kernels allow; programs choose their buffers by it
_ATTRIBUTES_KEPT = 100
_LINES_REMEMBERED = 1000  # of the log, so that no line is repeated
_STATFS_BLOCK = 4096  # bytes; at 0 bsdtar loops for ever
XATTRS = "user.tartape."


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How the archive is shown. `name`: the file's name. `mode`: its permission bits, of which only r counts.

    `part_size`: bytes of each of the parts that are shown in its place; `shard_size`: the most of each of the shards.
    """

    name: str = ARCHIVE_NAME
    part_size: int | None = None
    shard_size: int | None = None
    mode: int = 0o400
    direct: bool = False  # each read(2) is a request; else the kernel's page cache reads ahead and answers
    allow_other: bool = False
    audit_interval: float = 60  # seconds between two audits while the archive is open
    audit_share: float = 0.05  # of one core that audits may use
    uid: int | None = None  # the owner shown; None for the user who mounts
    gid: int | None = None
    scrub_share: float = 0  # of one core that the scrub may use; 0 for no scrub
    holds: bool = False  # a read that meets drift waits until the mount ends; implies `direct`
    on_drift_run: str | None = None  # a line for /bin/sh, at the first drift

    @property
    def uses_page_cache(self) -> bool:
        """Whether reads are answered from the kernel's page cache. A reader that waits there cannot be interrupted."""
        return not (self.direct or self.holds)


class Refusal(OSError):
    """An errno that an operation answers on purpose; it is not logged."""

    def __init__(self, number: int) -> None:
        super().__init__(number, os.strerror(number))


def _times(ns: int) -> dict[str, int]:
    return dict.fromkeys(("st_mtime", "st_ctime", "st_atime"), ns)


class ArchiveFS:
    """The file operations, in terms of a player. Paths are bytes carried in Latin-1, one character each.

    Raises ValueError as `Files` does.
    """

    def __init__(self, player: TapePlayer, options: MountOptions) -> None:
        self._player = player
        self.readinto = player.readinto  # no call in between
        self.statistics = ReadStatistics()
        self.hold: Hold | None = None  # of reads that meet drift; the session sets it
        self.caller: Callable[[], int] = lambda: 0  # the thread whose request is answered; `libfuse` sets it
        self._tape = player.tape
        self.size = player.tape.total_size  # bytes of the archive
        self.files = Files(player.tape, options.name, options.part_size, options.shard_size)
        self._logged: set[str] = set()
        self.ended = False  # unmounted: errors of the remaining readers are not logged
        mode = options.mode & 0o444
        common = {
            "st_uid": os.geteuid() if options.uid is None else options.uid,
            "st_gid": os.getegid() if options.gid is None else options.gid,
            "st_blksize": IO_SIZE,
        }
        self._folder_attributes = common | _times(self._tape.recorded_ns)
        self._folder_attributes |= {"st_mode": stat.S_IFDIR | mode | mode >> 2, "st_nlink": 2, "st_ino": 1}
        self._attributes = lru_cache(_ATTRIBUTES_KEPT)(self._attributes_of)  # a `stat` asks for them twice
        self._file_attributes = common | {"st_mode": stat.S_IFREG | mode, "st_nlink": 1}

    def _find(self, path: str) -> int | None:
        """The number of the file at `path`, None for the folder; raises ENOENT for anything else."""
        if path == "/":
            return None
        if (at := self.files.find(path[1:].encode("latin-1"))) is None:
            raise Refusal(errno.ENOENT)
        return at

    def _check_valid(self) -> None:
        if self._player.drift is not None:
            raise self._player.drift.again()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        attributes = self._attributes(path)
        if path != "/":
            self._check_valid()
        return attributes

    def _attributes_of(self, path: str) -> dict[str, int]:
        if (at := self._find(path)) is None:
            return self._folder_attributes
        bytes_of_it = self.files.extent(at).size
        size = {"st_size": bytes_of_it, "st_blocks": layout.block_count(bytes_of_it)}
        return self._file_attributes | _times(self.files.recorded_ns(at)) | size | {"st_ino": self.files.inode(at)}

    def readdir(self, offset: int) -> Iterator[tuple[bytes, int, int, int]]:
        """The entries of the folder from the one at `offset` on: name, inode, mode, and the offset of the next."""
        folder, file = self._folder_attributes, self._file_attributes
        for at in range(offset - 2, self.files.count):
            if at < 0:
                yield b"." * (at + 3), folder["st_ino"], folder["st_mode"], at + 3
            else:
                yield os.fsencode(self.files.name_of(at)), self.files.inode(at), file["st_mode"], at + 3

    def open(self, path: str, flags: int) -> int:
        self._check_valid()
        return self.statistics.opened(process_of(self.caller()), self._find(path) or 0)

    def release(self, path: str, fh: int) -> int:
        self.statistics.closed(fh)
        if not self.is_open:  # so that removed files of the source free their space
            self._player.rest()
        return 0

    @property
    def is_served_by_one(self) -> bool:
        """Whether several threads would only wait for each other (for the GIL)."""
        return self._player.is_bound_by_python

    @property
    def is_open(self) -> bool:
        """Whether any program has the archive open."""
        return bool(self.statistics.readers)

    def reading_processes(self) -> set[int]:
        """The pids of the processes that have the archive open; 0 stands for unknown ones."""
        opened = {reader.pid for reader in self.statistics.readers.copy().values()}
        return opened | {read.pid for read in self.hold.reads()} if self.hold else opened

    def statfs(self, path: str) -> dict[str, int]:
        return {
            "f_bsize": _STATFS_BLOCK,
            "f_frsize": _STATFS_BLOCK,
            "f_blocks": -(-self._tape.total_size // _STATFS_BLOCK),
            "f_files": self.files.count,
            "f_namemax": 255,
        }

    def _xattrs(self, path: str) -> dict[str, str | int]:
        # The folder has the tape's attributes too: an invalid archive cannot be looked up. The folder alone has those
        # that change all the time, so that copies of the archive with its attributes do not get them.
        at = self._find(path)
        own = {} if at is not None else summary(self._player, self.statistics, self.hold)
        return facts(self._player, self.files, at) | own

    def listxattr(self, path: str) -> list[str]:
        return [XATTRS + name for name in self._xattrs(path)]

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        value = self._xattrs(path).get(name.removeprefix(XATTRS)) if name.startswith(XATTRS) else None
        if value is None:
            raise Refusal(errno.ENODATA)
        return str(value).encode()

    def errno_of(self, error: BaseException) -> int:
        """The errno that answers a request which raised `error`: what this class raised on purpose, or EIO.

        Raises nothing, even if logging fails: libfuse's module would answer an exception with success.
        """
        if isinstance(error, Refusal):
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
        if line not in self._logged:  # a reader that retries must not fill the log
            if len(self._logged) >= _LINES_REMEMBERED:
                self._logged.clear()
            self._logged.add(line)
            log.error("%s", line, exc_info=defect)
