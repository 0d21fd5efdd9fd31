"""Drift: the one comparison that decides whether a member is still as recorded.

Rule: type, permission bits, modification time, a file's size and a link's target always count. Inode and change time
count only at home, that is, in the folder that was recorded: a copy has new ones. A hard link must lead to the same
file as the name of which it is another one; that file's size and contents are those of that member.
"""

import errno
import os
import stat

from tartapefs.archive.member import Member, path_of
from tartapefs.base.errors import NOTHING, RECORD_AGAIN, Difference, Fact, TapeIntegrityError
from tartapefs.base.text import file_type, moment, printable
from tartapefs.source.folder import Source

_ANOTHER = b"another file"  # no name of a member, which has a slash


def agrees(member: Member, found: os.stat_result, at_home: bool) -> bool:
    """Whether the `lstat` that was `found` is as recorded. It does not show a link's target: see `differences`."""
    return (
        found.st_mode == member.mode
        and found.st_mtime_ns == member.mtime_ns
        and (found.st_size == member.size or not member.is_file)
        and (not at_home or (found.st_ino == member.ino and found.st_ctime_ns == member.ctime_ns))
    )


def differences(member: Member, found: os.stat_result | None, target: bytes, at_home: bool) -> tuple[Difference, ...]:
    """Returns what differs from the recording of `member`, the most important first; empty if it agrees.

    `found`: its `lstat` now, None if nothing is there. `target`: that of a link now, as `target_of` gives it.
    """
    recorded_type = file_type(member.mode)
    if found is None:
        return (Difference(Fact.TYPE, recorded_type, NOTHING),)
    if stat.S_IFMT(found.st_mode) != stat.S_IFMT(member.mode):
        return (Difference(Fact.TYPE, recorded_type, file_type(found.st_mode)),)
    pairs = [
        (Fact.SIZE, member.size, found.st_size, str) if member.is_file else None,
        (Fact.TARGET, member.target, target, printable) if member.target else None,
        (Fact.MTIME, member.mtime_ns, found.st_mtime_ns, moment),
        (Fact.MODE, member.mode & 0o7777, found.st_mode & 0o7777, "{:04o}".format),
        (Fact.INODE, member.ino, found.st_ino, str) if at_home else None,
    ]
    result = tuple(
        Difference(what, show(recorded), show(now))  # type: ignore[operator]
        for what, recorded, now, show in filter(None, pairs)
        if recorded != now
    )
    if not result and at_home and member.ctime_ns != found.st_ctime_ns:  # every other change moves ctime too
        return (Difference(Fact.CTIME, moment(member.ctime_ns), moment(found.st_ctime_ns)),)
    return result


def target_of(member: Member, found: os.stat_result, source: Source) -> bytes:
    """The target of a link, with the `lstat` that was `found`, now; of a hard link the recorded one, or another.

    Raises OSError as the system does.
    """
    if stat.S_ISLNK(found.st_mode):
        return source.readlink(member.path)
    if not member.is_hard_link:
        return b""
    try:
        is_same = os.path.samestat(found, source.lstat(path_of(member.target)))
    except (FileNotFoundError, NotADirectoryError):
        is_same = False
    return member.target if is_same else _ANOTHER


def inspect(member: Member, source: Source, at_home: bool) -> tuple[Difference, ...]:
    """Returns the differences of `member` now, as `differences` does. Raises OSError if the source cannot be read."""
    path = member.path
    try:
        found = source.lstat(path)
        target = target_of(member, found, source)
    except (FileNotFoundError, NotADirectoryError):
        return differences(member, None, b"", at_home)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of readlink: the link was replaced since the lstat
            raise
        return (Difference(Fact.TYPE, file_type(member.mode), "another at each look"),)
    if agrees(member, found, at_home) and target == member.target:
        return ()
    return differences(member, found, target, at_home)


def unreadable(error: OSError) -> Difference:
    """The difference of a member that cannot be read."""
    return Difference(Fact.ACCESS, "readable", error.strerror or "an error")


def only_stamps(found: tuple[Difference, ...]) -> bool:
    """Whether only mtime, ctime or inode differ. If the contents have digests, these decide then."""
    return all(difference.what in (Fact.MTIME, Fact.CTIME, Fact.INODE) for difference in found)


def only_times(found: tuple[Difference, ...]) -> bool:
    """Whether only mtime or ctime differ. Of a folder, its names decide then."""
    return all(difference.what in (Fact.MTIME, Fact.CTIME) for difference in found)


def check_root(source: Source, root_name: str) -> None:
    """Raises TapeIntegrityError if the path of the source folder leads elsewhere now."""
    if not source.is_at_its_path():
        raise TapeIntegrityError(root_name, [Difference(Fact.SOURCE, source.root, "moved or gone")])


def drift(member: Member, found: tuple[Difference, ...]) -> TapeIntegrityError:
    """Returns the error to raise for these differences."""
    if [difference.what for difference in found] == [Fact.CTIME]:  # contents, size and mtime may well be as recorded
        return TapeIntegrityError(member.arc_path, found, f'{RECORD_AGAIN}, or read with "--source-check mtime"')
    return TapeIntegrityError(member.arc_path, found)
