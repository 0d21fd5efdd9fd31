"""The kernel's table of the mounts in a mount namespace: /proc/PID/mountinfo, see proc(5)."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple


class Mount(NamedTuple):
    """A mount, of any type.

    Attributes:
        number: its ID in the table
        device: `major:minor`, which no other file system has meanwhile
        mountpoint: an absolute path
        fstype: the type of its file system, such as "nfs4" or "fuse.sshfs"
        source: what is mounted, as the file system names it
        options: those of the file system, separated by commas
    """

    number: int
    device: str
    mountpoint: str
    fstype: str
    source: str
    options: str


def parsed(line: bytes) -> Mount:
    r"""Parses a line of the table, without its end.

    >>> parsed(rb"36 35 0:57 / /mnt/a\040b rw,nosuid shared:1 - fuse.sshfs host: rw,user_id=0").mountpoint
    '/mnt/a b'
    """
    before, _, after = line.partition(b" - ")  # any number of optional fields ends so
    number, _, device, _, mountpoint = before.split(b" ")[:5]
    fstype, source, options = after.split(b" ")[:3]
    return Mount(int(number), device.decode(), _unescaped(mountpoint), fstype.decode(), _unescaped(source),
                 os.fsdecode(options))  # fmt: skip


def _unescaped(field: bytes) -> str:
    """The kernel escapes space, tab, newline and backslash."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda digits: bytes((int(digits[1], 8),)), field))


def mounts(process: str = "self") -> Iterator[Mount]:
    """The mounts in the mount namespace of a process; of several at one path the last is on top. Raises OSError."""
    with open(f"/proc/{process}/mountinfo", "rb") as lines:
        for line in lines:
            yield parsed(line.rstrip(b"\n"))


def number_of(fd: int) -> int | None:
    """The number of the mount that the descriptor was opened through; None if /proc does not tell."""
    with suppress(OSError), open(f"/proc/self/fdinfo/{fd}", "rb") as facts:
        return next((int(line.split()[1]) for line in facts if line.startswith(b"mnt_id:")), None)
    return None
