"""The member: what the recorder writes, the index holds, the player reads and events speak of."""

import os
import stat
from typing import NamedTuple

from tartapefs.archive import layout, ustar

RECORDABLE = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})  # kinds that have a place in an archive


def path_of(name: bytes) -> bytes:
    """Where below the source folder that lies which has this whole name in the archive; empty for the folder itself."""
    return name[name.index(b"/") + 1 :].rstrip(b"/")


class Member(NamedTuple):
    """One archived object, as recorded: what its header says, and the witness that drift is judged by.

    A plain tuple since one is made for every member that is read: a frozen dataclass takes four times as long.
    """

    start: int  # bytes, of its header
    name: bytes  # the whole name in the archive, a directory's slash included
    mode: int  # st_mode: type and permission bits
    size: int  # bytes of the body; 0 for directories and links
    mtime_ns: int
    ino: int
    ctime_ns: int
    target: bytes  # of a symbolic link, else empty
    owner: ustar.Owner | None  # None: scrubbed

    @property
    def stop(self) -> int:
        return self.start + layout.span(self.size)

    @property
    def arc_path(self) -> str:
        """The name in the archive without a directory's slash, as `os.fsdecode` gives it."""
        return os.fsdecode(self.name.rstrip(b"/"))

    @property
    def path(self) -> bytes:
        """The path below the source folder; empty for the folder itself."""
        return path_of(self.name)

    @property
    def sort_key(self) -> list[bytes]:
        """What members of an archive are in the order of."""
        return self.name.rstrip(b"/").split(b"/")

    def same_object(self, other: "Member") -> bool:
        """Whether all facts are the same that are recorded of what lies in the source, at home."""
        return self[1:8] == other[1:8]

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    def header(self) -> bytes:
        """The 512 bytes of its header. Raises ValueError where the name does not fit."""
        return ustar.headers((self[1:],))[0]


Headed = tuple[Member, bytes]  # with its header
