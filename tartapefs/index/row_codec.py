"""Encodes a pack, members that follow each other, as the bytes of one row of the index, and decodes it. Pure, no I/O.

Rule: `unpack` trusts nothing. What it returns could have been recorded: every fact is in its range, and every name lies
below the root. For anything else it raises one of `MALFORMED`.

A row for each member cost more to write and read than its facts. In a pack each fact is a column, which single calls
take apart, check and put together (`docs/decisions/0011-packs.md`).
"""

import re
import stat
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import add

from tartapefs.archive import ustar
from tartapefs.archive.layout import BLOCK, MAX_OFFSET, head_size, span
from tartapefs.archive.member import RECORDABLE, Member
from tartapefs.archive.names import LONGEST_PATH, LONGEST_TARGET, LONGEST_UNSPLIT, split_name

MOST = 32  # members in a pack: to read one takes unpacking all
LONGEST = 1 << 15  # bytes of a pack; names, targets and owners have at most 500 a member
LONGEST_WITH_LONG_NAMES = 1 << 19  # likewise; a folder, a target, a last name and an owner have some 9,000 a member
MALFORMED = (ValueError, TypeError, IndexError, OverflowError, struct.error)

_NS = 10**9
_FILE, _FOLDER, _LINK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK
_NO_NAMES = frozenset((b"", b".", b".."))

# The numbers of folders and owners; for each folder, how many bytes it shares with the one before, 255 at most; for
# each member: size, mtime in seconds and nanoseconds, inode, ctime likewise, mode, the number of its folder and of its
# owner (1 is the first, 0 the scrubbed one). Then strings with NULs in between: last names, targets of links, the bytes
# that folders do not share, owners. To the number of owners `_LONG` is added if a header has more than one block.
_HEAD = struct.Struct("<BB")
_LONG = 0x80
_FACTS = struct.Struct("<QqIQqIHBB")
_SIZES = struct.Struct(f"<Q{_FACTS.size - 8}x")
_pack_facts = _FACTS.pack
_tuple_new = tuple.__new__  # as a named tuple's own constructor, in two thirds of the time


def is_name(name: bytes) -> bool:
    """Whether `name` is one component of a path: no slash, no NUL, not empty, "." or ".."."""
    return name not in _NO_NAMES and b"/" not in name and b"\0" not in name


def pack(members: Sequence[ustar.Facts], has_long: bool = False) -> bytes:
    """Encodes at most `MOST` members in at most `LONGEST` bytes, or `LONGEST_WITH_LONG_NAMES`.

    `has_long`: a header of theirs has more than one block. The members' starts are not encoded: they follow from the
    first one, the sizes, and the names.
    """
    folders: dict[bytes, int] = {}  # to their numbers
    owners: dict[ustar.Owner | None, int] = {None: 0}
    names, facts, previous, folder = [], [], None, 0
    for name, mode, size, mtime_ns, ino, ctime_ns, _, owner in members:
        above, _, last = name.rpartition(b"/")
        if not last:  # a folder's slash
            above, _, last = above.rpartition(b"/")
        if above != previous:
            previous = above
            folder = folders.setdefault(above and above + b"/", len(folders))
        owner_number = owners.setdefault(owner, len(owners)) if owner else 0
        mtime, ctime = mtime_ns // _NS, ctime_ns // _NS
        facts.append(_pack_facts(size, mtime, mtime_ns % _NS, ino, ctime, ctime_ns % _NS, mode, folder, owner_number))
        names.append(last)
    targets = [its_facts[6] for its_facts in members]
    shared, rests = _front_coded(folders)
    written = [b"%d:%d:%b:%b" % owner for owner in owners if owner is not None]
    strings = b"\0".join([*names, *targets, *rests, *written])
    return b"".join([_HEAD.pack(len(folders), len(written) | _LONG * has_long), shared, *facts, strings])


def _front_coded(folders: Iterable[bytes]) -> tuple[bytes, list[bytes]]:
    """For each folder, how many bytes it shares with the one before, up to a slash or 255; and the rest of it."""
    before, shared, rests = b"", bytearray(), []
    for folder in folders:
        common = min(len(before), 255)
        while not folder.startswith(before[:common]):
            common = before.rfind(b"/", 0, common - 1) + 1
        shared.append(common)
        rests.append(folder[common:])
        before = folder
    return bytes(shared), rests


def unpack(
    root: bytes, start: int, count: int, folder_count: int, data: bytes, begins: bool = False
) -> tuple[list[int], int, list[Member]]:
    """Decodes a pack whose first member starts at `start`; returns the starts, where the last one ends, the members.

    There must be `count` members, `folder_count` of which are folders; `root` is the name that all begin with, its
    slash included. `begins`: the pack begins a generation, whose first member may be the root. Raises `MALFORMED`.
    """
    folder_total, owner_total = _HEAD.unpack_from(data)
    has_long = owner_total >= _LONG
    owner_total %= _LONG
    facts_start = _HEAD.size + folder_total
    facts_stop = facts_start + count * _FACTS.size
    strings = data[facts_stop:].split(b"\0")
    if not 0 < count <= MOST or len(strings) != 2 * count + folder_total + owner_total:
        raise ValueError("it is not as long as it says")
    columns = zip(*_FACTS.iter_unpack(data[facts_start:facts_stop]), strict=True)
    sizes, mtimes, mtime_nsecs, inos, ctimes, ctime_nsecs, modes, in_folder, owned_by = columns
    names, targets, rests = strings[:count], strings[count : 2 * count], strings[2 * count :]
    starts = list(accumulate([(size + 2 * BLOCK - 1) & -BLOCK for size in sizes], initial=start))  # `layout.span`
    stop = starts.pop()
    if start % BLOCK or stop > MAX_OFFSET or max(mtime_nsecs) >= _NS or max(ctime_nsecs) >= _NS:
        raise ValueError("a number is out of its range")
    if not _NO_NAMES.isdisjoint(names) or b"/" in b"".join(names):
        raise ValueError("a name does not lead down")
    folders = _folders(root, data[_HEAD.size : facts_start], rests[:folder_total])
    above = [folders[number] for number in in_folder]
    names = list(map(add, above, names))
    has_root = start == 0 or (begins and above[0] == b"")
    if has_root != (names[0] == root[:-1]) or b"" in above[has_root:]:
        raise ValueError("the root, and nothing else, comes first and lies in no folder")
    if has_root and modes[0] & 0o170000 != _FOLDER:
        raise ValueError("the root is no folder")
    longest_name = max(map(len, names))  # without a folder's slash
    if folder_count or any(targets) or any(mode & 0o170000 != _FILE for mode in set(modes)):
        _check_kinds(modes, sizes, targets, folder_count, LONGEST_PATH if has_long else LONGEST_TARGET)
        _check_hard_links(root, names, modes, sizes, targets)
        names = [name + b"/" if mode & _FOLDER else name for name, mode in zip(names, modes, strict=True)]
    if has_long or longest_name >= LONGEST_UNSPLIT:
        heads = list(map(head_size, names, targets))
        if has_long != (max(heads) > BLOCK) or longest_name > LONGEST_PATH:
            raise ValueError("a name is too long")
        *starts, stop = accumulate(map(span, sizes, heads), initial=start)
        if stop > MAX_OFFSET:
            raise ValueError("a number is out of its range")
    mtimes_ns = [second * _NS + nsec for second, nsec in zip(mtimes, mtime_nsecs, strict=True)]
    ctimes_ns = [second * _NS + nsec for second, nsec in zip(ctimes, ctime_nsecs, strict=True)]
    owners = _owners(owned_by, rests[folder_total:]) if owner_total or any(owned_by) else [None] * count
    facts = zip(starts, names, modes, sizes, mtimes_ns, inos, ctimes_ns, targets, owners, strict=True)
    return starts, stop, [_tuple_new(Member, fact) for fact in facts]


def peek(
    root: bytes, start: int, count: int, folder_count: int, data: bytes, begins: bool = False
) -> tuple[bytes, int]:
    """The first member's name, without a folder's slash, and where the last member ends, of a pack as for `unpack`.

    A small part of the work of `unpack`, and of its checks, if every header has one block. Raises `MALFORMED`.
    """
    if data[1] & _LONG:
        _, stop, members = unpack(root, start, count, folder_count, data, begins)
        return members[0].name.rstrip(b"/"), stop
    facts_start, facts_stop = _facts_range(count, data)
    number = data[facts_start + _FACTS.size - 2]
    strings = data[facts_stop:].split(b"\0", 2 * count + number + 1)
    shared = data[_HEAD.size : _HEAD.size + number + 1]
    above = _folders(root, shared, strings[2 * count : 2 * count + number + 1])[number]
    if not above and not ((start == 0 or begins) and strings[0] == root[:-1]):
        raise ValueError("the root, and nothing else, comes first and lies in no folder")
    if not is_name(strings[0]):
        raise ValueError("a name does not lead down")
    if split_name(name := above + strings[0]) is None:
        raise ValueError("a name is too long")
    sizes = _SIZES.iter_unpack(data[facts_start:facts_stop])
    return name, start + sum([(size + 2 * BLOCK - 1) & -BLOCK for (size,) in sizes])


def may_have(count: int, data: bytes, last: bytes) -> bool:
    """Whether a pack as for `unpack` has a string equal to `last`: without, no member has it as last part of its name.

    Raises `MALFORMED`.
    """
    strings = data[_facts_range(count, data)[1] :]
    return strings.startswith(last + b"\0") or b"\0%b\0" % last in strings


def _facts_range(count: int, data: bytes) -> tuple[int, int]:
    """Where in a pack the facts of its members lie."""
    start = _HEAD.size + data[0]
    stop = start + count * _FACTS.size
    if not 0 < count <= MOST or stop > len(data):
        raise ValueError("it is not as long as it says")
    return start, stop


def _folders(root: bytes, shared: bytes, rests: list[bytes]) -> list[bytes]:
    """The names of the folders of members, with their slashes; that of the root's own folder is empty."""
    folders, folder = [], b""
    for common, rest in zip(shared, rests, strict=True):
        folder = folder[:common] + rest
        if folder and not (
            folder.startswith(root) and folder.endswith(b"/") and _NO_NAMES.isdisjoint(folder[:-1].split(b"/"))
        ):
            raise ValueError("a folder does not lead down")
        folders.append(folder)
    return folders


def _check_kinds(
    modes: tuple[int, ...], sizes: tuple[int, ...], targets: list[bytes], folder_count: int, longest_target: int
) -> None:
    kinds = [mode & 0o170000 for mode in modes]
    if (
        not RECORDABLE.issuperset(kinds)
        or any(size for kind, size in zip(kinds, sizes, strict=True) if kind != _FILE)
        or any(bool(target) != (kind == _LINK) for kind, target in zip(kinds, targets, strict=True) if kind != _FILE)
    ):
        raise ValueError("a member is of no kind, or has what its kind does not")
    if kinds.count(_FOLDER) != folder_count:
        raise ValueError("there are not as many folders as it says")
    if max(map(len, targets)) > longest_target:
        raise ValueError("a link's target is too long")


def _check_hard_links(
    root: bytes, names: list[bytes], modes: tuple[int, ...], sizes: tuple[int, ...], targets: list[bytes]
) -> None:
    for name, mode, size, target in zip(names, modes, sizes, targets, strict=True):
        if target and mode & 0o170000 == _FILE:
            is_below = target.startswith(root) and _NO_NAMES.isdisjoint(target.split(b"/"))
            if size or not is_below or target == name:
                raise ValueError("a hard link has a body, or does not lead to another name below the root")


def _owners(owned_by: tuple[int, ...], fields: list[bytes]) -> list[ustar.Owner | None]:
    owners = [None, *map(_parse_owner, fields)]
    return [owners[number] for number in owned_by]


def _parse_owner(field: bytes) -> ustar.Owner:
    match = re.fullmatch(rb"([0-9]{1,10}):([0-9]{1,10}):([^:]{0,31}):([^:]{0,31})", field)
    if match is None:
        raise ValueError("no owner")
    return ustar.Owner(int(match[1]), int(match[2]), match[3], match[4])
