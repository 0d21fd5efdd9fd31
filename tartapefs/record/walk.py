"""The walk: one depth-first pass over the source, in the archive's order.

Rule: a directory comes before its content, which directly follows it; siblings are sorted by their bytes. Memory is
bounded by the folders on the way down: each holds the names that are still to come, and one descriptor. No link is
followed. What cannot be read is collected, and the walk goes on; what changes during the walk is drift.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import NamedTuple

from tartapefs.archive import ustar
from tartapefs.archive.member import path_of
from tartapefs.base.errors import Difference, Fact, Problem, SourceUnreadableError, TapeIntegrityError
from tartapefs.base.tape_files import TAPE_FOLDER
from tartapefs.base.text import file_type, moment
from tartapefs.record.summary import Summary
from tartapefs.source.exclusion import IsExcluded
from tartapefs.source.file_systems import NO_SUBVOLUME
from tartapefs.source.folder import Folder, Source

_KIND = 0o170000  # of the mode: what `stat.S_IFMT` gives, without a call
_READABLE_FILE = stat.S_IFREG | stat.S_IRUSR
_KIND_AND_READABLE = _KIND | stat.S_IRUSR
_NEVER = 1 << 94  # ns, beyond every time: seconds have 64 bits
OwnerOf = Callable[[int, int], ustar.Owner]  # (user, group)

Seen = tuple[int, int, int, int, int, int, int]  # the fields of a `stat` that `seen_of` gives
seen_of: Callable[[os.stat_result], Seen] = attrgetter(
    "st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_ino", "st_ctime_ns"
)
OnFile = Callable[[Folder, bytes, bytes, Seen], Seen | None]  # (its folder, name, path, its first `stat`)


class _Level(NamedTuple):
    folder: Folder
    name: bytes  # in the archive, with its slash
    mtime_ns: int
    device: int
    names: Iterator[bytes]


class Walk:
    """An iterable over the facts of everything in the source, to be iterated over once.

    `root`: what all names in the archive begin with, a slash included. `owner_of` gives the owner to write for a user
    and a group; without it headers name no owners. `on_file` is called for every regular file that changed after
    `since` (ns), and returns the `stat` to record, or None to leave the file out; without it all are recorded as seen.
    `one_file_system`: a folder on another file system than the root is a member without what lies in it, and its times
    may change. `hard_links`: further names of a file are links to the first, for which each such file is remembered.

    Attributes, complete after the iteration: `unreadable`, the paths that this user cannot read; `unstable`, the
    folders of which each look shows another state; `left_out`, the number of sockets, pipes and devices; `closed`, the
    names of the folders that are members without what lies in them; `summary`.
    """

    def __init__(
        self,
        source: Source,
        root: bytes,
        exclude: IsExcluded | None,
        owner_of: OwnerOf | None,
        on_file: OnFile | None,
        since: int,
        one_file_system: bool,
        hard_links: bool,
    ) -> None:
        self._source = source
        self._root = root
        self._exclude = exclude
        self._owner_of = owner_of
        self._on_file = on_file
        self._since = since if on_file else _NEVER
        self._euid = os.geteuid()
        self._one_file_system = one_file_system
        self._device = -1  # of the folder that was entered last
        self.unreadable: list[Problem] = []
        self.unstable: list[Problem] = []
        self.left_out = 0
        self.closed: set[bytes] = set()
        is_local = source.is_local(source.lstat(b""))
        self.summary = Summary(os.fsencode(source.root) if is_local else None, root)
        self._first_names: dict[tuple[int, int], bytes] | None = {} if hard_links else None  # by device and inode

    def __iter__(self) -> Iterator[ustar.Facts]:
        """One long function, fast for the common case: a file of this user that did not change lately."""
        levels: list[_Level] = []
        euid, since, owner_of, all_are_in = self._euid, self._since, self._owner_of, self._exclude is None
        summary, other_owners = self.summary, 0
        try:
            try:
                root = self._enter(levels, self._source.folder(), self._root)
            except OSError as error:
                raise SourceUnreadableError([Problem(self._source.root, error.strerror or "")]) from None
            if root is not None:
                yield root
            while levels:
                level = levels[-1]
                above, lstat = level.name, level.folder.lstat
                for last in level.names:
                    name, target = above + last, b""
                    try:
                        seen = seen_of(at_first := lstat(last))
                    except OSError as error:
                        self._note_error(path_of(name), error)
                        continue
                    mode, uid, gid, size, mtime_ns, ino, ctime_ns = seen
                    if not (
                        mode & _KIND_AND_READABLE == _READABLE_FILE
                        and uid == euid
                        and ctime_ns <= since
                        and mtime_ns <= since
                        and all_are_in
                    ):
                        found = self._examine(level.folder, last, path_of(name), seen)
                        if found is None:
                            continue
                        (mode, uid, gid, size, mtime_ns, ino, ctime_ns), target = found
                        if stat.S_ISDIR(mode):
                            try:
                                folder = self._enter(levels, level.folder.folder(last), name + b"/")
                            except OSError as error:
                                self._note_error(path_of(name), error)
                                continue
                            if folder is None:
                                continue
                            yield folder
                            break
                        size = 0 if target else size
                    if at_first.st_nlink > 1 or at_first.st_blocks << 9 < size:
                        summary.add_odd_file(at_first, size)
                        if at_first.st_nlink > 1 and not target and self._first_names is not None:
                            target = self._first_name(name, at_first.st_dev, ino)
                            size = 0 if target else size
                    if uid or gid:
                        other_owners += 1
                    yield name, mode, size, mtime_ns, ino, ctime_ns, target, owner_of and owner_of(uid, gid)
                else:
                    self._leave(levels.pop())
        finally:
            summary.other_owners += 0 if owner_of else other_owners
            for level in levels:
                level.folder.close()

    def _first_name(self, name: bytes, device: int, ino: int) -> bytes:
        """The first name of the file with this further `name`; empty if this is the first."""
        assert self._first_names is not None
        first = self._first_names.setdefault((device, ino), name)
        return b"" if first is name else first

    def _enter(self, levels: list[_Level], folder: Folder, name: bytes) -> ustar.Facts | None:
        """Adds the level of a folder, and returns its own facts; None if it is unstable."""
        try:
            found = folder.stat()  # before its names, so that what is added meanwhile shows
            mode, uid, gid, _, mtime_ns, ino, ctime_ns = seen_of(found)
            is_closed = self._one_file_system and folder.is_beyond(found)
            if is_closed:
                self.closed.add(name)
            elif (found.st_dev != self._device or ino == NO_SUBVOLUME) and (why := folder.why_unstable()):
                path = os.fsdecode(path_of(name)) or "."
                self.unstable.append(Problem(path, f"{why}; leave it out (--exclude)"))
                folder.close()
                return None
            self._device = found.st_dev
            self.summary.file_systems += bool(levels) and found.st_dev != levels[-1].device
            self.summary.other_owners += bool(uid or gid) and self._owner_of is None
            names = [] if is_closed else folder.names()
            levels.append(_Level(folder, name, mtime_ns, found.st_dev, iter(names)))
        except BaseException:
            folder.close()
            raise
        return name, mode, 0, mtime_ns, ino, ctime_ns, b"", self._owner_of and self._owner_of(uid, gid)

    def _leave(self, level: _Level) -> None:
        mtime_ns = level.folder.stat().st_mtime_ns
        level.folder.close()
        if mtime_ns != level.mtime_ns and level.name not in self.closed:
            raise changed(path_of(level.name), Difference(Fact.MTIME, moment(level.mtime_ns), moment(mtime_ns)))

    def _examine(self, folder: Folder, name: bytes, path: bytes, seen: Seen) -> tuple[Seen, bytes] | None:
        """Examines what is not the common case; returns its `stat` and a link's target, or None to leave it out."""
        mode, uid, _, _, mtime_ns, _, ctime_ns = seen
        kind = mode & _KIND
        if (kind == stat.S_IFDIR and path == TAPE_FOLDER) or self._is_left_out(path, kind == stat.S_IFDIR):
            return None
        try:
            if kind == stat.S_IFREG:
                # For the owner the mode alone decides; for others an ACL may grant more.
                if not (uid == self._euid and mode & stat.S_IRUSR) and not folder.is_readable(name):
                    raise PermissionError(errno.EACCES, "")
                if ctime_ns <= self._since and mtime_ns <= self._since:
                    return seen, b""
                assert self._on_file is not None
                settled = self._on_file(folder, name, path, seen)
                if settled is None:
                    return None
                if not stat.S_ISREG(settled[0]):
                    raise changed(path, Difference(Fact.TYPE, file_type(kind), file_type(settled[0])))
                return settled, b""
            if kind == stat.S_IFLNK:
                return seen, folder.readlink(name)
            if kind == stat.S_IFDIR:
                return seen, b""
            self.left_out += 1
        except OSError as error:
            self._note_error(path, error)
        return None

    def _is_left_out(self, path: bytes, is_directory: bool) -> bool:
        return self._exclude is not None and self._exclude(path, is_directory)

    def _note_error(self, path: bytes, error: OSError) -> None:
        if isinstance(error, FileNotFoundError) or error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise changed(path, Difference(Fact.TYPE, "as listed", "nothing, or another")) from error
        if not self._is_left_out(path, False):
            self.unreadable.append(Problem(os.fsdecode(path), os.strerror(error.errno or 0)))


def changed(path: bytes, difference: Difference) -> TapeIntegrityError:
    """The error for a member that changed while it was being recorded."""
    return TapeIntegrityError(
        os.fsdecode(path) or ".", [difference], "it changed during the recording: record again once it is at rest"
    )
