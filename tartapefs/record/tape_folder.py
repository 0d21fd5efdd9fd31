"""The folder for the index within the recorded one.

Rule: the recorded folder keeps its modification time, which is recorded, when this folder is made or removed.
"""

import os
import stat

from tartapefs.base import signals
from tartapefs.base.tape_files import TAPE_FOLDER, default_index
from tartapefs.source.folder import Source


def exists(source: Source) -> bool:
    """Whether it is there. Raises NotADirectoryError if something else has its name."""
    try:
        found = source.lstat(TAPE_FOLDER)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(20, "is in the way of the index and not a folder", default_index(source.root))
    return True


def make(source: Source) -> None:
    """Makes it. Raises OSError if this user may not, or may not set the time of the recorded folder back."""
    before = source.lstat(b"")
    os.utime(source.root, ns=(before.st_atime_ns, before.st_mtime_ns))  # fails, if it does, before anything changes
    with signals.undisturbed():
        os.mkdir(_path(source))
        os.utime(source.root, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(source: Source) -> None:
    """Removes it if it is there and empty."""
    before = source.lstat(b"")
    with signals.undisturbed():
        try:
            os.rmdir(_path(source))
        except OSError:
            return  # it was never made, or another program has put something there
        os.utime(source.root, ns=(before.st_atime_ns, before.st_mtime_ns))


def _path(source: Source) -> str:
    return os.path.join(source.root, os.fsdecode(TAPE_FOLDER))
