"""Makes ustar headers. Pure, no I/O.

Source: POSIX.1-1988 ustar interchange format (IEEE Std 1003.1, pax, "ustar Interchange Format"), with two additions of
GNU tar. A number that its octal field cannot hold is written in base 256, big endian, two's complement, the first byte
0x80 for positive and 0xff for negative numbers. And before the header of a member whose target, or whose name, does not
fit, there is a header of type "K", or "L", whose body is the whole target, or name, and a NUL, to the byte as
`tar --format=gnu` writes them. The member's own header then has the first 100 bytes; it is of ustar all the same
(`docs/decisions/0029-long-names.md`).
"""

import stat
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple
from zlib import adler32

from tartapefs.archive.layout import BLOCK, block_count
from tartapefs.archive.names import LONGEST_TARGET, LONGEST_UNSPLIT, split_name


class Owner(NamedTuple):
    """The owner of a member, as written in its header. Of the names, raw bytes, the first 31 are written."""

    uid: int = 0
    gid: int = 0
    uname: bytes = b"root"
    gname: bytes = b"root"


SCRUBBED = Owner()

# The recorded facts of a member: name, mode, size, mtime_ns, inode, ctime_ns, target, owner; see `member.Member`.
Facts = tuple[bytes, int, int, int, int, int, bytes, Owner | None]


def _number(value: int, width: int) -> bytes:
    """`value` in a field of `width` bytes: octal digits and a NUL, or base 256 if those cannot hold it.

    >>> _number(0o644, 8), _number(-1, 4), _number(8**11, 12).hex()
    (b'0000644\\x00', b'\\xff\\xff\\xff\\xff', '800000000000000200000000')
    """
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    sign = b"\xff" if value < 0 else b"\x80"
    return sign + value.to_bytes(width - 1, "big", signed=True)


_TYPES = {stat.S_IFREG: b"0", stat.S_IFDIR: b"5", stat.S_IFLNK: b"2"}
_NS = 10**9
_OCTAL_11 = 8**11
_SPACES = 8 * ord(" ")  # the checksum counts its own field as spaces


def _sum(part: bytes) -> int:
    """The sum of at most 256 bytes: the low half of an Adler-32 from 0, whose modulus of 65521 it does not reach."""
    return adler32(part, 0) & 0xFFFF


# The fields before the checksum: name; mode and ids; size and mtime, as they are or as eleven digits in three parts.
_pack_before = struct.Struct("100s24s24s").pack
_pack_octal = struct.Struct("100s24s3s4s4sx3s4s4sx").pack
# A table lookup takes a third of the time of "%o".
_OCTAL_3 = [b"%03o" % n for n in range(8**3)]
_OCTAL_4 = [b"%04o" % n for n in range(8**4)]


@lru_cache(maxsize=256)
def _fixed(mode: int, owner: Owner | None, prefix: bytes) -> tuple[bytes, bytes, int]:
    """The fields that siblings share: mode and ids; all after the checksum; the sum of these and the spaces."""
    uid, gid, uname, gname = owner or SCRUBBED
    after = b"%b%bustar\x0000%b%b%b%b" % (
        _TYPES[mode & 0o170000],
        bytes(LONGEST_TARGET),
        uname[:31].ljust(32, b"\0"),
        gname[:31].ljust(32, b"\0"),
        bytes(16),  # devmajor, devminor
        prefix.ljust(167, b"\0"),
    )
    mode_and_ids = b"%07o\0" % (mode & 0o7777) + _number(uid, 8) + _number(gid, 8)
    return mode_and_ids, after, _sum(after[:256]) + _sum(after[256:]) + _SPACES


def _long(kind: bytes, text: bytes) -> bytes:
    """The header and the body by which GNU tar has a whole name (kind "L") or target ("K") before a member's header."""
    size = len(text) + 1
    before = _pack_before(b"././@LongLink", b"0000644\0" + 2 * b"0000000\0", _number(size, 12) + _number(0, 12))
    after = b"%bustar  \0%b%b" % (kind.ljust(101, b"\0"), 2 * b"root".ljust(32, b"\0"), bytes(183))
    header = b"%b%06o\0 %b" % (before, sum(before) + sum(after) + _SPACES, after)
    return header + text.ljust(block_count(size) * BLOCK, b"\0")


def headers(members: Iterable[Facts]) -> list[bytes]:
    """The header of each of these members: 512 bytes, or more if a name or target does not fit into those.

    Names are whole, a directory's slash included; modes are `st_mode` of regular files, directories and symbolic links;
    sizes 0 for directories and links; times are floored to seconds. None as owner is written as `SCRUBBED`. A regular
    file with a target is a hard link to that member.

    One loop, and not a function for each member: calls, and the fields that siblings share, are a third of the time.
    """
    made: list[bytes] = []
    before_them: list[tuple[int, bytes]] = []  # what goes before headers, with their numbers
    shared = None
    for name, mode, size, mtime_ns, _, _, target, owner in members:
        prefix = b""
        if len(name) > LONGEST_UNSPLIT:
            parts = split_name(name)
            if parts is None:
                before_them.append((len(made), _long(b"L", name)))
                name = name[:LONGEST_UNSPLIT]
            else:
                prefix, name = parts
        if shared != (mode, owner, prefix):
            shared = mode, owner, prefix
            mode_and_ids, after, its_sum = _fixed(*shared)
        mtime = mtime_ns // _NS
        if 0 <= size | mtime < _OCTAL_11:
            before = _pack_octal(
                name,
                mode_and_ids,
                _OCTAL_3[size >> 24],
                _OCTAL_4[size >> 12 & 0xFFF],
                _OCTAL_4[size & 0xFFF],
                _OCTAL_3[mtime >> 24],
                _OCTAL_4[mtime >> 12 & 0xFFF],
                _OCTAL_4[mtime & 0xFFF],
            )
        else:
            before = _pack_before(name, mode_and_ids, _number(size, 12) + _number(mtime, 12))
        checksum = (adler32(before, 0) & 0xFFFF) + its_sum
        if target:
            if len(target) > LONGEST_TARGET:
                before_them.append((len(made), _long(b"K", target)))
                target = target[:LONGEST_TARGET]
            checksum += _sum(target)
            its_type = after[:1]
            if its_type == b"0":  # a hard link
                its_type = b"1"
                checksum += 1
            its_after = its_type + target.ljust(LONGEST_TARGET, b"\0") + after[1 + LONGEST_TARGET :]
        else:
            its_after = after
        made.append(b"%b%b%b\0 %b" % (before, _OCTAL_3[checksum >> 9], _OCTAL_3[checksum & 0o777], its_after))
    for number, long in before_them:  # of a member with both, "L" comes first in this list, and last in the archive
        made[number] = long + made[number]
    return made
