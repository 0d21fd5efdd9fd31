"""The scan: one depth-first pass over the source, in the archive's order.

Rule: a directory comes before its content, its content directly follows, siblings are sorted by their bytes. Memory
is bounded by the folders on the way down: each holds the names that are still to come, and one descriptor. Nothing is
followed; what cannot be read is collected and the pass goes on; what changes under it is drift.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tartapefs.display import file_type, moment
from tartapefs.errors import Difference, Problem, SourceUnreadableError, TapeIntegrityError
from tartapefs.source import TAPE_FOLDER, Folder, Source

Exclude = str | Iterable[str] | Callable[[str], bool]
_KIND = 0o170000  # of the mode: what `stat.S_IFMT` gives, without a call
_READABLE_FILE = stat.S_IFREG | stat.S_IRUSR
_KIND_AND_READABLE = _KIND | stat.S_IRUSR
IsLeftOut = Callable[[bytes, bool], bool]  # (path below the root, whether it is a directory)


# What the scan found: path relative to the root, empty for the root itself; stat; target of a symbolic link, else
# empty. A plain tuple, since one is made for every member.
Found = tuple[bytes, os.stat_result, bytes]
OnFile = Callable[[Folder, bytes, bytes, os.stat_result], os.stat_result | None]  # (its folder, name, path, stat)


class _Level(NamedTuple):
    folder: Folder
    path: bytes
    stat: os.stat_result
    names: Iterator[bytes]


class Scan:
    """Iterate over it once for everything below the source; then `unreadable` and `left_out` tell what is not there.

    `unreadable`: paths that this user cannot read. `left_out`: how many sockets, pipes and devices there are.
    `on_file` is called for every regular file that changed after `since` (ns) and gives its `stat`, as the caller wants
    it taken, or None to leave it out.
    """

    def __init__(self, source: Source, exclude: IsLeftOut | None, on_file: OnFile, since: int) -> None:
        self._source = source
        self._exclude = exclude
        self._on_file = on_file
        self._since = since
        self._euid = os.geteuid()
        self.unreadable: list[Problem] = []
        self.left_out = 0

    def __iter__(self) -> Iterator[Found]:
        try:
            levels = [self._enter(self._source.folder(), b"")]
        except OSError as error:
            raise SourceUnreadableError([Problem(self._source.root, error.strerror or "")]) from None
        euid, since, all_are_in = self._euid, self._since, self._exclude is None
        try:
            yield b"", levels[0].stat, b""
            while levels:
                level = levels[-1]
                lstat, above = level.folder.lstat, level.path
                for name in level.names:
                    path = above + name
                    try:
                        seen = lstat(name)
                    except OSError as error:
                        self._gone_or_unreadable(path, error)
                        continue
                    # The common case by itself, without a call: a file of this user's that has been at rest.
                    if (
                        seen.st_mode & _KIND_AND_READABLE == _READABLE_FILE
                        and seen.st_uid == euid
                        and seen.st_ctime_ns <= since
                        and seen.st_mtime_ns <= since
                        and all_are_in
                    ):
                        yield path, seen, b""
                        continue
                    found = self._look(level, name, path, seen)
                    if found is None:
                        continue
                    if stat.S_ISDIR(seen.st_mode):
                        try:
                            below = self._enter(level.folder.folder(name), path + b"/")
                        except OSError as error:
                            self._gone_or_unreadable(path, error)
                            continue
                        levels.append(below)
                        yield path, below.stat, b""
                        break
                    yield found
                else:
                    self._leave(levels.pop())
        finally:
            for level in levels:
                level.folder.close()

    def _enter(self, folder: Folder, path: bytes) -> _Level:
        try:
            before = folder.stat()  # so that what is added while it is listed shows
            return _Level(folder, path, before, iter(folder.names()))
        except BaseException:
            folder.close()
            raise

    def _leave(self, level: _Level) -> None:
        after = level.folder.stat()
        level.folder.close()
        if after.st_mtime_ns != level.stat.st_mtime_ns:
            times = moment(level.stat.st_mtime_ns), moment(after.st_mtime_ns)
            raise changed(level.path.rstrip(b"/"), Difference("mtime", *times))

    def _look(self, level: _Level, name: bytes, path: bytes, found: os.stat_result) -> Found | None:
        kind = found.st_mode & _KIND
        if (kind == stat.S_IFDIR and path == TAPE_FOLDER) or self._leaves_out(path, kind == stat.S_IFDIR):
            return None
        try:
            if kind == stat.S_IFREG:
                # The owner's permission is decided by the mode alone; for others an ACL may say more.
                owned = found.st_uid == self._euid and found.st_mode & stat.S_IRUSR
                if not owned and not level.folder.is_readable(name):
                    raise PermissionError(errno.EACCES, "")
                if found.st_ctime_ns <= self._since and found.st_mtime_ns <= self._since:
                    return path, found, b""
                settled = self._on_file(level.folder, name, path, found)
                if settled is None:
                    return None
                if not stat.S_ISREG(settled.st_mode):
                    raise changed(path, Difference("type", file_type(kind), file_type(settled.st_mode)))
                return path, settled, b""
            if kind == stat.S_IFLNK:
                return path, found, level.folder.readlink(name)
            if kind == stat.S_IFDIR:
                return path, found, b""
            self.left_out += 1
        except OSError as error:
            self._gone_or_unreadable(path, error)
        return None

    def _leaves_out(self, path: bytes, is_directory: bool) -> bool:
        return self._exclude is not None and self._exclude(path, is_directory)

    def _gone_or_unreadable(self, path: bytes, error: OSError) -> None:
        if isinstance(error, FileNotFoundError) or error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise changed(path, Difference("type", "as listed", "nothing, or another")) from error
        if not self._leaves_out(path, False):
            self.unreadable.append(Problem(os.fsdecode(path), os.strerror(error.errno or 0)))


def changed(path: bytes, difference: Difference) -> TapeIntegrityError:
    """The drift of something that changed while it was being recorded."""
    return TapeIntegrityError(
        os.fsdecode(path) or ".", [difference], "it changed during the recording: record again once it is at rest"
    )


def exclusion(exclude: Exclude) -> tuple[IsLeftOut, list[str]]:
    """The test whether a path is left out, and what the index says of it."""
    if callable(exclude):
        test = exclude
        return lambda path, is_directory: bool(test(os.fsdecode(path))), [f"function {_name(test)}"]
    import pathspec  # here, since most recordings exclude nothing

    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    try:
        spec = pathspec.GitIgnoreSpec.from_lines(patterns)
    except (ValueError, re.error) as error:
        raise ValueError(f"a malformed pattern: {error}") from None

    def matches(path: bytes, is_directory: bool) -> bool:
        return spec.match_file(os.fsdecode(path) + "/" * is_directory)

    return matches, patterns


def _name(function: Callable[[str], bool]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
