"""The member: one object of the archive, as the recorder found it and the index holds it."""

import heapq
import os
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tartapefs.archive import layout, ustar

RECORDABLE = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})  # the types of files that an archive can hold


def path_of(name: bytes) -> bytes:
    """The path below the source folder of the member with this whole name; empty for the folder itself."""
    return name[name.index(b"/") + 1 :].rstrip(b"/")


def path_key(name: bytes) -> bytes:
    """The key by which the members of a generation are sorted: their paths, of which a slash is the lowest byte."""
    return name.rstrip(b"/").replace(b"/", b"\0")


class Member(NamedTuple):
    """One object of the archive, as recorded: what its header says, and the metadata that tells drift.

    start, stop: the range of its header, body and padding, in bytes from the start of the archive.
    body: where its header ends and its body begins, likewise.
    name: the whole name in the archive, a directory's slash included.
    mode: `st_mode`, type and permission bits.
    size: bytes of the body; 0 for directories and links.
    mtime_ns, ctime_ns: nanoseconds since 1970.
    ino: the inode number.
    target: of a symbolic link; of a hard link, the whole name of the member that it is another name of; else empty.
    owner: as written in the header; None if owners are not recorded.
    arc_path: the name without a directory's slash, as `os.fsdecode` gives it.
    path: below the source folder; empty for the folder itself.
    sort_key: what members of an archive are sorted by.
    is_file, is_directory, is_link, is_hard_link: its type. A link is a symbolic one; a hard link is no file.

    A plain tuple since one is made for every member that is read: a frozen dataclass takes four times as long.
    """

    start: int
    name: bytes
    mode: int
    size: int
    mtime_ns: int
    ino: int
    ctime_ns: int
    target: bytes
    owner: ustar.Owner | None

    @property
    def body(self) -> int:
        return self.start + layout.head_size(self.name, self.target)

    @property
    def stop(self) -> int:
        return self.start + layout.span(self.size, layout.head_size(self.name, self.target))

    def segments(self) -> Iterator[layout.Segment]:
        """Its segments, in order."""
        return layout.segments(self.start, self.size, layout.head_size(self.name, self.target))

    @property
    def arc_path(self) -> str:
        """The name in the archive without a directory's slash, as `os.fsdecode` gives it."""
        return os.fsdecode(self.name.rstrip(b"/"))

    @property
    def path(self) -> bytes:
        """The path below the source folder; empty for the folder itself."""
        return path_of(self.name)

    @property
    def sort_key(self) -> bytes:
        """The key that the members of a generation are sorted by."""
        return path_key(self.name)

    def same_object(self, other: "Member") -> bool:
        """Whether both were recorded from the same object: all facts but start and owner agree."""
        return self[1:8] == other[1:8]

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode) and not self.target

    @property
    def is_hard_link(self) -> bool:
        return bool(self.target) and stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    def header(self) -> bytes:
        """The bytes of its header: 512, or more for a name or target that does not fit into those."""
        return ustar.headers((self[1:],))[0]


def latest_of(generations: Iterable[Iterator[Member]]) -> Iterator[Member]:
    """Merges members that are sorted by path in each generation; of those with the same path, yields the last one."""
    # Equal keys are in the order of their members' starts.
    latest: tuple[bytes, Member] | None = None
    for keyed in heapq.merge(*(((member.sort_key, member) for member in members) for members in generations)):
        if latest is not None and latest[0] != keyed[0]:
            yield latest[1]
        latest = keyed
    if latest is not None:
        yield latest[1]


Headed = tuple[Member, bytes]  # a member with its header
