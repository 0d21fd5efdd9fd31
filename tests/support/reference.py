"""The archive that a folder should have, made without the code under test: headers by `tarfile`, order by `os.walk`."""

import os
import stat
import subprocess
import tarfile
from bisect import bisect_right
from pathlib import Path

BLOCK = 512
_TYPES = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}


def split(name: bytes) -> tuple[bytes, bytes]:
    """(prefix, name) by trying every slash: the rightmost with at most 155 bytes before and 1 to 100 after it."""
    if len(name) <= 100:
        return b"", name
    fitting = [
        (name[:cut], name[cut + 1 :])
        for cut, byte in enumerate(name)
        if byte == ord("/") and cut <= 155 and 1 <= len(name) - cut - 1 <= 100
    ]
    return fitting[-1]


def header(
    name: bytes, found: os.stat_result, target: str = "", owner: tuple[int, int, str, str] | None = None
) -> bytes:
    uid, gid, uname, gname = owner or (0, 0, "root", "root")
    prefix, rest = split(name)
    facts = {
        "name": os.fsdecode(rest),
        "prefix": os.fsdecode(prefix),
        "mode": stat.S_IMODE(found.st_mode),
        "uid": uid,
        "gid": gid,
        "size": found.st_size if stat.S_ISREG(found.st_mode) else 0,
        "mtime": found.st_mtime_ns // 10**9,
        "type": _TYPES[stat.S_IFMT(found.st_mode)],
        "linkname": target,
        "uname": uname,
        "gname": gname,
    }
    # GNU_FORMAT only decides that numbers too large for octal are written in base 256.
    return tarfile.TarInfo._create_header(facts, tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


class Reference:
    """The expected archive of the folder at `root`, readable at any offset however large it is.

    `starts`: where each member starts, by its name in the archive, a directory's slash included.
    """

    def __init__(self, root: Path, left_out: tuple[bytes, ...] = ()) -> None:
        self.starts: dict[bytes, int] = {}
        self._segments: list[tuple[int, bytes | None, bytes, int]] = []  # start, bytes or None, path of a body, length
        self._left_out = left_out
        self.size = 0
        self._add(os.fsencode(root.resolve()), os.fsencode(root.resolve().name))
        self._append(bytes(2 * BLOCK))
        self._keys = [segment[0] for segment in self._segments]

    def _append(self, data: bytes | None, path: bytes = b"", length: int = 0) -> None:
        length = len(data) if data is not None else length
        if length:
            self._segments.append((self.size, data, path, length))
            self.size += length

    def _add(self, path: bytes, name: bytes) -> None:
        found = os.lstat(path)
        kind = stat.S_IFMT(found.st_mode)
        if kind not in _TYPES or name.partition(b"/")[2] in (b".tartape", *self._left_out):
            return
        shown = name + b"/" if kind == stat.S_IFDIR else name
        self.starts[shown] = self.size
        target = os.readlink(os.fsdecode(path)) if kind == stat.S_IFLNK else ""
        self._append(header(shown, found, target))
        if kind == stat.S_IFREG:
            self._append(None, path, found.st_size)
            self._append(bytes(-found.st_size % BLOCK))
        elif kind == stat.S_IFDIR:
            for entry in sorted(os.listdir(path)):
                self._add(path + b"/" + entry, shown + entry)

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        stop = min(offset + size, self.size)
        at = bisect_right(self._keys, offset) - 1
        while offset < stop:
            start, data, path, length = self._segments[at]
            count = min(stop, start + length) - offset
            if data is None:
                with open(path, "rb") as file:
                    file.seek(offset - start)
                    parts.append(file.read(count))
            else:
                parts.append(data[offset - start : offset - start + count])
            offset += count
            at += 1
        return b"".join(parts)

    def boundaries(self) -> list[int]:
        """Every start of a segment, and the end of the archive."""
        return [*self._keys, self.size]


def gnu_tar(root: Path) -> bytes:
    """GNU tar's own archive of the folder, with the two fields that it fills and the format leaves empty emptied."""
    made = bytearray(
        subprocess.run(
            ["tar", "--format=ustar", "--sort=name", "--owner=root:0", "--group=root:0", "--hard-dereference", "-b1",
             "--exclude=.tartape", "-cf", "-", root.name],
            cwd=root.parent, check=True, capture_output=True,
        ).stdout
    )  # fmt: skip
    at = 0
    while made[at : at + BLOCK].strip(b"\0"):
        head = made[at : at + BLOCK]
        head[329:345] = bytes(16)  # devmajor, devminor
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        made[at : at + BLOCK] = head
        size = int(head[124:135], 8)
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return bytes(made)
