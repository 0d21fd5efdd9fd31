"""The 512-byte ustar header: facts of a member in, bytes out.

Source: POSIX.1-1988 ustar interchange format (IEEE Std 1003.1, pax, "ustar Interchange Format"), with one addition of
GNU tar: a number that its octal field cannot hold is written in base 256, big endian, two's complement, the first byte
0x80 for positive and 0xff for negative numbers. What still does not fit is refused by `split_name` and `check_target`.
"""

import stat
import struct
import zlib
from typing import NamedTuple

MAX_NAME = 255
MAX_TARGET = 100
_NAME, _PREFIX = 100, 155


class Owner(NamedTuple):
    """Who owns a member, as written in its header. Names are raw bytes of at most 31 in use."""

    uid: int = 0
    gid: int = 0
    uname: bytes = b"root"
    gname: bytes = b"root"


SCRUBBED = Owner()


def _number(value: int, width: int) -> bytes:
    """`value` in a field of `width` bytes: octal digits and a NUL, or base 256 where those cannot hold it.

    >>> _number(0o644, 8), _number(-1, 4), _number(8**11, 12).hex()
    (b'0000644\\x00', b'\\xff\\xff\\xff\\xff', '800000000000000200000000')
    """
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    sign = b"\xff" if value < 0 else b"\x80"
    return sign + value.to_bytes(width - 1, "big", signed=True)


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """`name` as (prefix, name): split at the rightmost "/" that leaves at most 155 bytes before and 100 after it.

    A directory's closing slash belongs to its last part and is no place to split. Raises ValueError with the reason
    where the name does not fit.

    >>> split_name(b"a" * 100) == (b"", b"a" * 100)
    True
    >>> split_name(b"p" * 60 + b"/" + b"n" * 60) == (b"p" * 60, b"n" * 60)
    True
    """
    if len(name) <= _NAME:
        return b"", name
    if len(name) > MAX_NAME:
        raise ValueError(f"the name in the archive has {len(name)} bytes, at most {MAX_NAME} fit")
    cut = name.rfind(b"/", 0, min(_PREFIX + 1, len(name) - 1))
    if cut < 1 or len(name) - cut - 1 > _NAME:
        raise ValueError(
            f"the name in the archive has {len(name)} bytes and no slash that leaves"
            f" at most {_PREFIX} before and {_NAME} after it"
        )
    return name[:cut], name[cut + 1 :]


def check_target(target: bytes) -> None:
    """Raises ValueError with the reason where the target of a symbolic link does not fit into a header."""
    if len(target) > MAX_TARGET:
        raise ValueError(f"the link's target has {len(target)} bytes, at most {MAX_TARGET} fit")


_FIELDS = struct.Struct("100s8s16s12s12s8s1s100s8s64s16s155s12x")
_TYPES = {stat.S_IFREG: b"0", stat.S_IFDIR: b"5", stat.S_IFLNK: b"2"}


def _owner_fields(owner: Owner) -> tuple[bytes, bytes]:
    ids = _number(owner.uid, 8) + _number(owner.gid, 8)
    return ids, owner.uname[:31].ljust(32, b"\0") + owner.gname[:31].ljust(32, b"\0")


_SCRUBBED_FIELDS = _owner_fields(SCRUBBED)


def header(name: bytes, mode: int, size: int, mtime: int, target: bytes = b"", owner: Owner | None = None) -> bytes:
    """The 512 bytes of one member's header.

    `name`: the whole name in the archive, a directory's slash included. `mode`: `st_mode` of a regular file, directory
    or symbolic link. `size`: bytes of the body, 0 for directories and links. `mtime`: seconds since 1970, floored.
    `owner`: None writes the scrubbed one. Raises ValueError where the name does not fit.
    """
    prefix, rest = split_name(name)
    ids, names = _SCRUBBED_FIELDS if owner is None else _owner_fields(owner)
    block = _FIELDS.pack(
        rest,
        b"%07o" % (mode & 0o7777),
        ids,
        _number(size, 12),
        _number(mtime, 12),
        b"        ",  # the checksum is taken over spaces in its place
        _TYPES[stat.S_IFMT(mode)],
        target,
        b"ustar\x0000",
        names,
        b"",  # devmajor and devminor: NUL
        prefix,
    )
    # Adler-32's low half, started at 0, is the sum of the bytes modulo 65521; half a header cannot reach that.
    checksum = (zlib.adler32(block[:256], 0) & 0xFFFF) + (zlib.adler32(block[256:], 0) & 0xFFFF)
    return b"%b%06o\0 %b" % (block[:148], checksum, block[156:])
