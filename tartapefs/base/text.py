"""Text for people and programs: names, file types, times, sizes and numbers of things, each on one line.

A file name can hold any bytes but NUL and "/". Printed as it is, a newline in it forges a line of a log, an escape
sequence changes what the terminal shows, and a right-to-left override shows `gpj.exe` as `exe.jpg`. `printable` escapes
these with backslashes, as `ls -b` does. The result is one line, from which every byte of the name can be told.
"""

import os
import re
import stat
import unicodedata
from datetime import datetime, timedelta

# Categories with no glyph of their own: control, format (bidirectional marks), surrogate, private use, unassigned,
# line and paragraph separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", "K", "M", "G", "T", "P"))}
_LARGEST_FILE = 2**63 - 1  # bytes


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how os.fsdecode carries a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    match character:
        case "\\":
            return "\\\\"
        case "\n":
            return "\\n"
        case "\r":
            return "\\r"
        case "\t":
            return "\\t"
    if unicodedata.category(character) not in _INVISIBLE:
        return character
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable(name: bytes | str) -> str:
    r"""`name` on one line: backslash, control, bidirectional and undecodable parts escaped.

    >>> print(printable(b"two\nlines\\ \xff \x1b[31m"))
    two\nlines\\ \xff \x1b[31m
    """
    text = os.fsdecode(name)
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escape, text))


def on_one_line(text: str) -> str:
    """A text of several parts, in which names are `printable` already; what is not is made so."""
    return text if text.isprintable() else printable(text)


_TYPES = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
_EPOCH = datetime(1970, 1, 1)  # naive: all of it is UTC


def file_type(mode: int) -> str:
    """The type in `st_mode`, in words."""
    return _TYPES.get(stat.S_IFMT(mode), f"type {stat.S_IFMT(mode):o}")


def moment(ns: int) -> str:
    """A time in nanoseconds since 1970 as text in UTC; as seconds if Python's calendar does not reach it.

    >>> moment(1_700_000_000_000_000_001)
    '2023-11-14 22:13:20.000000001Z'
    """
    seconds, fraction = divmod(ns, 10**9)
    try:
        return f"{(_EPOCH + timedelta(seconds=seconds)).isoformat(' ')}.{fraction:09}Z"
    except OverflowError:
        return f"@{seconds}.{fraction:09}"


def size_text(count: float) -> str:
    """A size in bytes for people.

    >>> size_text(1536)
    '1.5 KiB'
    """
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """A number of things, by the name of one of them.

    >>> counted(1, "member"), counted(2000, "member")
    ('1 member', '2,000 members')
    """
    return f"{count:,} {noun}" + "s" * (count != 1)


def byte_count(text: str) -> int:
    """Parses a file size in bytes; K, M, G, T or P (or KiB and so on, in any case) stand for powers of 1024.

    Raises ValueError with the reason in one line.

    >>> byte_count("512"), byte_count("64K"), byte_count("5GiB")
    (512, 65536, 5368709120)
    """
    number = re.fullmatch(r"([0-9]{1,19})(?:([KMGTP])(?:IB)?)?", text.upper(), re.ASCII)
    if number is None:
        raise ValueError(f"{text!r} is not a number of bytes, such as 512, 64K or 5GiB")
    count = int(number[1]) * _UNITS[number[2] or ""]
    if count > _LARGEST_FILE:
        raise ValueError(f"{text!r} is more than a file can have")
    return count
