"""The archive that a folder should have which is recorded again and again, made without the code under test."""

import os
import stat
from pathlib import Path

from support.reference import BLOCK, header


class Generations:
    """The expected archive of the folder at `root`: `record` makes the first generation, `append` the others.

    `hard_links`: whether further names of a file are links to the first, in the same generation or one before. `names`:
    of the members of each generation, in order. `ends`: where each ends, in bytes.
    """

    def __init__(self, root: Path, hard_links: bool = False) -> None:
        self._first: dict[tuple[int, int], bytes] | None = {} if hard_links else None
        self._root = os.fsencode(root.resolve())
        self._latest: dict[bytes, tuple[int, int]] = {}  # of each path: mode, and mtime in whole seconds
        self._members = bytearray()
        self.names: list[list[bytes]] = []
        self.ends: list[int] = []

    def append(self) -> bytes:
        """The archive after what is new now was added."""
        names = list(self._new(self._root, os.path.basename(self._root)))
        if names:
            self.names.append(names)
            self.ends.append(len(self._members))
        return self.archive

    @property
    def archive(self) -> bytes:
        return bytes(self._members) + bytes(2 * BLOCK)

    def _new(self, path: bytes, name: bytes):  # type: ignore[no-untyped-def]
        found = os.lstat(path)
        is_folder = stat.S_ISDIR(found.st_mode)
        shown = name + b"/" if is_folder else name
        facts = (found.st_mode, found.st_mtime_ns // 10**9)
        if self._latest.get(name) not in ((facts,) if is_folder else (facts, self._latest.get(name, 0))):
            self._latest[name] = facts
            target = os.readlink(os.fsdecode(path)) if stat.S_ISLNK(found.st_mode) else ""
            if stat.S_ISREG(found.st_mode) and self._first is not None:
                first = self._first.setdefault((found.st_dev, found.st_ino), name)
                target = os.fsdecode(first) if first != name else ""
            self._members += header(shown, found, target)
            if stat.S_ISREG(found.st_mode) and not target:
                self._members += Path(os.fsdecode(path)).read_bytes() + bytes(-found.st_size % BLOCK)
            yield shown
        if is_folder:
            for entry in sorted(os.listdir(path)):
                if shown + entry != os.path.basename(self._root) + b"/.tartape":
                    yield from self._new(path + b"/" + entry, shown + entry)
