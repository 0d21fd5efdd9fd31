"""What of a name and of a link's target fits into a ustar header, and what GNU tar does with what does not. Pure.

Rule: a name that the fields of a header hold, in one or split at a slash, is in the header alone. Before the header of
any other one GNU tar writes a block `L` with the whole name, and a block `K` with a target that is too long (see
`ustar`). So the bytes before a body follow from name and target: `layout.head_size`.
"""

LONGEST_UNSPLIT, LONGEST_PREFIX = 100, 155  # bytes of the fields for names
LONGEST_TARGET = 100  # bytes of the field for a link's target
LONGEST_SPLIT = 255  # bytes of a name in both fields
LONGEST_PATH = 4095  # bytes that a system call takes as a path, or gives as a link's target: no reader restores more


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """`name` as (prefix, name): split at the rightmost "/" that leaves at most 155 bytes before and 100 after it.

    A directory's closing slash belongs to its last part: names are not split there. None if the name does not fit.

    >>> split_name(b"a" * 100) == (b"", b"a" * 100)
    True
    >>> split_name(b"p" * 60 + b"/" + b"n" * 60) == (b"p" * 60, b"n" * 60)
    True
    >>> split_name(b"a" * 101)
    """
    if len(name) <= LONGEST_UNSPLIT:
        return b"", name
    if len(name) > LONGEST_SPLIT:
        return None
    cut = name.rfind(b"/", 0, min(LONGEST_PREFIX + 1, len(name) - 1))
    if cut < 1 or len(name) - cut - 1 > LONGEST_UNSPLIT:
        return None
    return name[:cut], name[cut + 1 :]


def why_too_long(name: bytes, target: bytes, long_names: bool) -> str | None:
    """Why an archive cannot hold a member with this name and target, in one line; None if it can.

    `long_names`: with blocks `L` and `K`.
    """
    if long_names:
        if len(name.rstrip(b"/")) > LONGEST_PATH:
            return f"the name in the archive has {len(name)} bytes, at most {LONGEST_PATH} can be restored"
        return None
    if len(target) > LONGEST_TARGET:
        return f"the link's target has {len(target)} bytes, at most {LONGEST_TARGET} fit"
    if split_name(name) is not None:
        return None
    if len(name) > LONGEST_SPLIT:
        return f"the name in the archive has {len(name)} bytes, at most {LONGEST_SPLIT} fit"
    return (
        f"the name in the archive has {len(name)} bytes and no slash that leaves"
        f" at most {LONGEST_PREFIX} before and {LONGEST_UNSPLIT} after it"
    )
