"""Names of the archive: the usual one, and names that contain facts of a recording, so that each has its own."""

import os
import re

from tartapefs.base.text import printable

ARCHIVE_NAME = "archive.tar"  # unless the user names another
_LONGEST = 255  # bytes


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
            raise ValueError(f"{printable(found[0])} stands for nothing in a name; {', '.join(known)} do")
        if not known[found[0]]:
            raise ValueError(f'{found[0]} needs a tape with digests; run "tartapefs seal" first')
        return known[found[0]]

    name = re.sub(r"\{[^{}]*\}", value, template)
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{printable(name)!r} is not a file name")
    if (length := len(os.fsencode(name))) > _LONGEST:
        raise ValueError(f"{printable(name)!r} has {length} bytes; a file name has at most {_LONGEST}")
    return name
