"""The archive that a folder should have, made without the code under test: headers by `tarfile`, order by `os.walk`."""

import os
import stat
import subprocess
import tarfile
from bisect import bisect_right
from pathlib import Path

BLOCK = 512
_TYPES = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}


def split(name: bytes) -> tuple[bytes, bytes] | None:
    """(prefix, name) by trying every slash: the rightmost with at most 155 bytes before and 1 to 100 after it.

    None if the name does not fit.
    """
    if len(name) <= 100:
        return b"", name
    fitting = [
        (name[:cut], name[cut + 1 :])
        for cut, byte in enumerate(name)
        if byte == ord("/") and 1 <= cut <= 155 and 1 <= len(name) - cut - 1 <= 100
    ]
    return fitting[-1] if fitting and len(name) <= 255 else None


def long_blocks(kind: bytes, text: bytes) -> bytes:
    """What GNU tar has before the header of a member with a long target (kind "K") or name ("L")."""
    facts = {
        "name": "././@LongLink",
        "mode": 0o644,
        "size": len(text) + 1,
        "type": kind,
        "uname": "root",
        "gname": "root",
        "magic": tarfile.GNU_MAGIC,
    }
    made = tarfile.TarInfo._create_header(facts, tarfile.GNU_FORMAT, "ascii", "strict")
    return made + text + bytes(BLOCK - len(text) % BLOCK)


def header(
    name: bytes, found: os.stat_result, target: str = "", owner: tuple[int, int, str, str] | None = None
) -> bytes:
    """The header of a member, with what is before it if its name or its target is too long for ustar.

    A file with a target is a hard link.
    """
    uid, gid, uname, gname = owner or (0, 0, "root", "root")
    raw_target, fitting = os.fsencode(target), split(name)
    before = long_blocks(b"K", raw_target) if len(raw_target) > 100 else b""
    if fitting is None:
        before += long_blocks(b"L", name)
    prefix, rest = fitting or (b"", name[:100])
    facts = {
        "name": os.fsdecode(rest),
        "prefix": os.fsdecode(prefix),
        "mode": stat.S_IMODE(found.st_mode),
        "uid": uid,
        "gid": gid,
        "size": found.st_size if stat.S_ISREG(found.st_mode) and not target else 0,
        "mtime": found.st_mtime_ns // 10**9,
        "type": tarfile.LNKTYPE if stat.S_ISREG(found.st_mode) and target else _TYPES[stat.S_IFMT(found.st_mode)],
        "linkname": os.fsdecode(raw_target[:100]),
        "uname": uname,
        "gname": gname,
    }
    # GNU_FORMAT only decides that numbers too large for octal are written in base 256.
    return before + tarfile.TarInfo._create_header(facts, tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


class Reference:
    """The expected archive of the folder at `root`, readable at any offset however large it is.

    `starts`: where each member starts, by its name in the archive, a directory's slash included. `hard_links`: whether
    further names of a file are links to the first.
    """

    def __init__(self, root: Path, left_out: tuple[bytes, ...] = (), hard_links: bool = False) -> None:
        self._first: dict[tuple[int, int], bytes] | None = {} if hard_links else None
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
        if kind == stat.S_IFREG and self._first is not None:
            first = self._first.setdefault((found.st_dev, found.st_ino), name)
            target = os.fsdecode(first) if first != name else ""
        self._append(header(shown, found, target))
        if kind == stat.S_IFREG and not target:
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


def gnu_tar(root: Path, hard_links: bool = False) -> bytes:
    """GNU tar's own archive of the folder, with the two fields that it fills and the format leaves empty emptied."""
    dereference = [] if hard_links else ["--hard-dereference"]
    made = bytearray(
        subprocess.run(
            ["tar", "--format=ustar", "--sort=name", "--owner=root:0", "--group=root:0", *dereference, "-b1",
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


def blocks_of(archive: bytes) -> dict[tuple[bytes, bytes], bytes]:
    """The headers of kinds "K" and "L" in an archive, with their bodies, by kind and text."""
    found, at = {}, 0
    while archive[at : at + BLOCK].strip(b"\0"):
        kind, size = archive[at + 156 : at + 157], tarfile.nti(archive[at + 124 : at + 136])
        stop = at + BLOCK + -(-size // BLOCK) * BLOCK
        if kind in (b"K", b"L"):
            text = archive[at + BLOCK : at + BLOCK + size - 1]
            found[kind, text] = archive[at:stop]
        at = stop
    return found
