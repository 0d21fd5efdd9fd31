"""Makes 512-byte ustar headers. Pure, no I/O.

Source: POSIX.1-1988 ustar interchange format (IEEE Std 1003.1, pax, "ustar Interchange Format"), with one addition of
GNU tar: a number that its octal field cannot hold is written in base 256, big endian, two's complement, the first byte
0x80 for positive and 0xff for negative numbers. `split_name` and `check_target` refuse what still does not fit.
"""

import stat
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple
from zlib import adler32

MAX_NAME = 255  # bytes
MAX_TARGET = 100  # bytes of a symbolic link's target
LONGEST_UNSPLIT, _MAX_PREFIX = 100, 155  # bytes of the fields for names


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


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """`name` as (prefix, name): split at the rightmost "/" that leaves at most 155 bytes before and 100 after it.

    A directory's closing slash belongs to its last part: names are not split there. Raises ValueError with the reason
    if the name does not fit.

    >>> split_name(b"a" * 100) == (b"", b"a" * 100)
    True
    >>> split_name(b"p" * 60 + b"/" + b"n" * 60) == (b"p" * 60, b"n" * 60)
    True
    """
    if len(name) <= LONGEST_UNSPLIT:
        return b"", name
    if len(name) > MAX_NAME:
        raise ValueError(f"the name in the archive has {len(name)} bytes, at most {MAX_NAME} fit")
    cut = name.rfind(b"/", 0, min(_MAX_PREFIX + 1, len(name) - 1))
    if cut < 1 or len(name) - cut - 1 > LONGEST_UNSPLIT:
        raise ValueError(
            f"the name in the archive has {len(name)} bytes and no slash that leaves"
            f" at most {_MAX_PREFIX} before and {LONGEST_UNSPLIT} after it"
        )
    return name[:cut], name[cut + 1 :]


def check_target(target: bytes) -> None:
    """Raises ValueError with the reason if the target of a symbolic link does not fit into a header."""
    if len(target) > MAX_TARGET:
        raise ValueError(f"the link's target has {len(target)} bytes, at most {MAX_TARGET} fit")


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
        bytes(MAX_TARGET),
        uname[:31].ljust(32, b"\0"),
        gname[:31].ljust(32, b"\0"),
        bytes(16),  # devmajor, devminor
        prefix.ljust(167, b"\0"),
    )
    mode_and_ids = b"%07o\0" % (mode & 0o7777) + _number(uid, 8) + _number(gid, 8)
    return mode_and_ids, after, _sum(after[:256]) + _sum(after[256:]) + _SPACES


def headers(members: Iterable[Facts]) -> list[bytes]:
    """The 512 bytes of the header of each of these members.

    Names are whole, a directory's slash included; modes are `st_mode` of regular files, directories and symbolic links;
    sizes 0 for directories and links; times are floored to seconds. None as owner is written as `SCRUBBED`.

    Raises ValueError if a name does not fit.

    One loop, and not a function for each member: calls, and the fields that siblings share, are a third of the time.
    """
    made, shared = [], None
    for name, mode, size, mtime_ns, _, _, target, owner in members:
        prefix = b""
        if len(name) > LONGEST_UNSPLIT:
            prefix, name = split_name(name)
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
            checksum += _sum(target)
            its_after = after[:1] + target.ljust(MAX_TARGET, b"\0") + after[1 + MAX_TARGET :]
        else:
            its_after = after
        made.append(b"%b%b%b\0 %b" % (before, _OCTAL_3[checksum >> 9], _OCTAL_3[checksum & 0o777], its_after))
    return made
