"""The owner that a header names, by this machine's databases of users and groups."""

import grp
import os
import pwd
from functools import lru_cache

from tartapefs.archive import ustar


@lru_cache(maxsize=1024)
def owner_of(uid: int, gid: int) -> ustar.Owner:
    """The owner with the names of this user and this group, each empty if it has none, and cut to 31 bytes."""
    try:
        uname = pwd.getpwuid(uid).pw_name
    except KeyError:
        uname = ""
    try:
        gname = grp.getgrgid(gid).gr_name
    except KeyError:
        gname = ""
    return ustar.Owner(uid, gid, os.fsencode(uname)[:31], os.fsencode(gname)[:31])
