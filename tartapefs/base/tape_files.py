"""Which files are part of a tape, so that no command may write to them.

Rule: files are compared by device and inode, not by path. Part of a tape are the index, every file below the source,
and every file of the source under another name: a hard link, or a bind mount. A new file in any other recorded folder
would be drift there, and is refused, too.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tartapefs.base import mountinfo
from tartapefs.base.errors import OutputError
from tartapefs.base.text import printable

TAPE_FOLDER = b".tartape"  # holds the index; no part of the archive if it lies directly in the root
INDEX_MARK = 0x54415045  # "TAPE", where file(1) looks for it in an SQLite file
_INDEX = f"{os.fsdecode(TAPE_FOLDER)}/index.db"  # of a recorded folder
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def default_index(root: str) -> str:
    """The path of the index of the folder at `root`, unless the user names another."""
    return os.path.join(root, _INDEX)


@dataclass(frozen=True, slots=True)
class TapeFiles:
    """The files that no output may be.

    root: path of the source folder.
    index: path of the index.
    holds: whether the file or folder with this `stat` is in the source, by whatever name.
    """

    root: str
    index: str
    holds: Callable[[os.stat_result], bool] = lambda found: False


def refuse_part(output: str, tape: TapeFiles) -> None:
    """Raises OutputError if the file at `output` is or would be part of `tape`, or of another one; and OSError."""
    path = os.path.realpath(output)
    with suppress(FileNotFoundError):
        found = os.stat(path)
        if is_index(path) or _identity(found) == _identity_at(tape.index):
            raise OutputError(output, "is the index of a tape")
        if stat.S_ISREG(found.st_mode) and (found.st_nlink > 1 or _is_mount_point(path)) and tape.holds(found):
            raise OutputError(output, f"is a file of {printable(tape.root)}, by another name")
    refuse_below(output, tape)


def refuse_below(output: str, tape: TapeFiles, in_tape_folder: bool = False) -> None:
    """Raises OutputError if a new file at `output` would change the source of `tape`, or another recorded folder.

    `in_tape_folder`: it may lie in the source's own folder for the index, which is no part of the archive.
    """
    source = [folder.identity for folder in _ancestors(os.path.realpath(tape.root))] if os.path.isdir(tape.root) else []
    devices = {device for device, _ in source[:1]}
    tape_folder = _identity_at(os.path.join(tape.root, os.path.dirname(_INDEX))) if in_tape_folder else None
    below = None
    for folder in _ancestors(os.path.dirname(os.path.realpath(output)), output):
        if folder.identity in source[:1]:
            if tape_folder is None or below != tape_folder:
                raise OutputError(output, f"lies in {folder.path}, the folder of the tape, and would change it")
        elif folder.is_recorded:
            raise OutputError(output, f"lies in {folder.path}, which is recorded, and would change it")
        elif (
            folder.is_mount_point
            and folder.stat.st_dev in devices
            and folder.identity not in source
            and tape.holds(folder.stat)
        ):
            raise OutputError(output, f"lies in {folder.path}, which is a folder of the tape by another name")
        below = folder.identity


class _Folder(NamedTuple):
    path: str  # for people
    stat: os.stat_result
    is_recorded: bool
    is_mount_point: bool

    @property
    def identity(self) -> tuple[int, int]:
        return _identity(self.stat)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _identity_at(path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        return _identity(os.stat(path))
    return None


def _ancestors(path: str, output: str | None = None) -> Iterator[_Folder]:
    """The folder at `path`, a real path, the folder that it lies in, and so on up to the root."""
    try:
        fd = os.open(path, _FOLDER)
    except OSError as error:
        error.filename = output
        raise
    try:
        is_root = False
        while not is_root:
            found, mount, is_recorded = os.fstat(fd), mountinfo.number_of(fd), is_index(_INDEX, fd)
            below, fd = fd, os.open("..", _FOLDER, dir_fd=fd)
            os.close(below)
            is_mount_point = mountinfo.number_of(fd) != mount
            is_root = os.path.samestat(found, os.fstat(fd)) and not is_mount_point
            yield _Folder(printable(path), found, is_recorded, is_mount_point)
            path = os.path.dirname(path)
    finally:
        os.close(fd)


def _is_mount_point(path: str) -> bool:
    file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        folder = os.open(os.path.dirname(path), _FOLDER)
        try:
            return mountinfo.number_of(file) != mountinfo.number_of(folder)
        finally:
            os.close(folder)
    finally:
        os.close(file)


def has_index_mark(head: bytes) -> bool:
    """Whether a file with these first 100 bytes is an SQLite file of ours (see "Database File Format" of SQLite)."""
    return head[:16] == b"SQLite format 3\0" and head[68:72] == INDEX_MARK.to_bytes(4, "big")


def is_index(path: str, folder: int | None = None) -> bool:
    """Whether the regular file at `path`, relative to `folder`, is an index of any version, damaged or not."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode) and has_index_mark(os.read(fd, 100))
        finally:
            os.close(fd)
    return False
