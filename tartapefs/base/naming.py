"""Names of the archive: the usual one, names that contain facts of a recording, so that each has its own, and parts.

A part is named `archive.tar.00001` and so on, and a shard, which is an archive, `archive.00001.tar`. Rule: always five
digits, and no total, so that a name stays when the archive grows, and `cat archive.tar.*` joins the parts in order.
"""

import os
import re

from tartapefs.base.commands import complete
from tartapefs.base.text import printable

ARCHIVE_NAME = "archive.tar"  # unless the user names another
MOST_PARTS = 99_999
_LONGEST = 255  # bytes
_SUFFIX = ".tar"


def file_name(template: str, fingerprint: str, seal: str, root: str) -> str:
    """`template` with these values in place of `{fingerprint}`, `{seal}` and `{root}`.

    Raises ValueError, with the reason in one line, if other text is in braces, if the seal is used but empty, and if
    the result is not a file name.

    >>> file_name("{root}-{fingerprint}.tar", "0123abcd", "", "photos")
    'photos-0123abcd.tar'
    """
    known = {"{fingerprint}": fingerprint, "{seal}": seal, "{root}": root}

    def value(found: re.Match[str]) -> str:
        if found[0] not in known:
            raise ValueError(f"{printable(found[0])} is not a placeholder; {', '.join(known)} are")
        if not known[found[0]]:
            remedy = complete('run "tartapefs seal" first')
            raise ValueError(f"{found[0]} needs a tape with digests; {remedy}")
        return known[found[0]]

    name = re.sub(r"\{[^{}]*\}", value, template)
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{printable(name)!r} is not a file name")
    if (length := len(os.fsencode(name))) > _LONGEST:
        raise ValueError(f"{printable(name)!r} has {length} bytes; a file name has at most {_LONGEST}")
    return name


def part_name(name: str, number: int) -> str:
    """The name of part `number`, from 1, of the archive `name`.

    >>> part_name("archive.tar", 42)
    'archive.tar.00042'
    """
    return f"{name}.{number:05}"


def part_number(part: str, name: str) -> int | None:
    """The number of the part of this name of the archive `name`; None if it is no name of a part.

    >>> part_number("archive.tar.00042", "archive.tar"), part_number("archive.tar.042", "archive.tar")
    (42, None)
    """
    begin, _, digits = part.rpartition(".")
    return int(digits) or None if begin == name and re.fullmatch("[0-9]{5}", digits) else None


def shard_name(name: str, number: int) -> str:
    """The name of shard `number`, from 1, of the archive `name`.

    >>> shard_name("archive.tar", 42), shard_name("photos", 42)
    ('archive.00042.tar', 'photos.00042.tar')
    """
    return part_name(name.removesuffix(_SUFFIX), number) + _SUFFIX


def shard_number(shard: str, name: str) -> int | None:
    """The number of the shard of this name of the archive `name`; None if it is no name of a shard.

    >>> shard_number("archive.00042.tar", "archive.tar"), shard_number("archive.tar.00042", "archive.tar")
    (42, None)
    """
    return part_number(shard.removesuffix(_SUFFIX), name.removesuffix(_SUFFIX)) if shard.endswith(_SUFFIX) else None


def part_count(total: int, size: int) -> int:
    """How many parts of `size` bytes, the last one shorter, an archive of `total` bytes has.

    Raises ValueError, with the reason in one line, for a `size` below 1, and for more parts than there are names.
    """
    if size < 1:
        raise ValueError(f"a part has at least 1 byte, not {size}")
    if (count := -(-total // size)) > MOST_PARTS:
        least = -(-total // MOST_PARTS)
        raise ValueError(
            f"{count:,} parts of {size:,} bytes are more than {MOST_PARTS:,}; a part needs {least:,} bytes or more"
        )
    return count
