"""A tape of any number of members, most of which exist in its index alone: `synthetic.py FOLDER MEMBERS` makes one.

Rule: whatever is probed is real, and checked like any other member. All folders are real, for they are audited; so are
the first files of each, together some `REAL`, and every file of the folder at 99% of the tape. The rest are rows. The
fingerprint, which no reader looks at, is not computed.
"""

import hashlib
import json
import os
import random
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tartapefs import Tape
from tartapefs.archive.layout import BLOCK, FOOTER, span
from tartapefs.archive.member import path_key
from tartapefs.archive.ustar import Facts
from tartapefs.index import name_filter
from tartapefs.index.schema import Generation
from tartapefs.index.writer import IndexWriter

REAL = 10_000
SIZE = 4096  # of each file
_FILES = 999  # in each folder: with it, a thousand members
_FOLDER_SPAN = BLOCK + _FILES * span(SIZE)


@dataclass(frozen=True, slots=True)
class Synthetic:
    """The tape of about `members` (at least 1,000) members in the folder `place`."""

    place: Path
    members: int

    @property
    def root(self) -> Path:
        return self.place / "tape"

    @property
    def index(self) -> Path:
        return self.place / "index.db"

    @property
    def folders(self) -> int:
        return self.members // (_FILES + 1)

    @property
    def last_folder(self) -> int:
        """The number of the one at 99% of the tape."""
        return self.folders * 99 // 100

    def real(self, folder: int) -> int:
        """How many of the folder's files are real: the first ones."""
        return _FILES if folder == self.last_folder else min(_FILES, max(1, REAL // self.folders))

    def start(self, folder: int, file: int) -> int:
        """Where in the archive the header of this file lies."""
        return BLOCK + folder * _FOLDER_SPAN + BLOCK + file * span(SIZE)

    def make(self) -> None:
        """Writes the real files and the index, unless they are there already."""
        if self.index.exists():
            return
        for folder in range(self.folders):
            place = self.root / _folder_name(folder)
            place.mkdir(parents=True, exist_ok=True)
            for file in range(self.real(folder)):
                (place / _file_name(file)).write_bytes(os.urandom(SIZE))
        with IndexWriter(os.fspath(self.index)) as writer:
            writer.add(self._members())
            writer.commit(
                {
                    "root_name": os.fsencode(self.root.name),
                    "fingerprint": hashlib.sha256().hexdigest(),
                    "total_size": BLOCK + self.folders * _FOLDER_SPAN + FOOTER,
                    "member_count": 1 + self.folders * (_FILES + 1),
                    "recorded_ns": time.time_ns(),
                    "excluded": json.dumps([]),
                    "left_out": 0,
                    "owners_kept": 0,
                    "root_ino": self.root.stat().st_ino,
                }
            )

    def _members(self) -> Iterator[Facts]:
        name = os.fsencode(self.root.name) + b"/"
        yield _facts(name, os.lstat(self.root))
        for folder in range(self.folders):
            place = self.root / _folder_name(folder)
            below = name + os.fsencode(place.name) + b"/"
            seen = os.lstat(place)
            yield _facts(below, seen)
            real = self.real(folder)
            for file in range(_FILES):
                if file < real:
                    seen = os.lstat(place / _file_name(file))
                yield _facts(below + os.fsencode(_file_name(file)), seen)


@dataclass(frozen=True, slots=True)
class SyntheticGenerations:
    """An index alone, in the folder `place`, of `generations` generations with about `members` members in all.

    Each generation has files of every folder, so that its names lie among those of all others.
    """

    place: Path
    members: int
    generations: int

    @property
    def index(self) -> Path:
        return self.place / "index.db"

    @property
    def folders(self) -> int:
        return self.members // (_FILES + 1)

    def name(self, folder: int, file: int) -> str:
        return f"tape/{_folder_name(folder)}/{_file_name(file)}"

    def random_name(self, some: random.Random) -> str:
        return self.name(some.randrange(self.folders), some.randrange(_FILES))

    def make(self) -> None:
        """Writes the index, unless it is there already."""
        if self.index.exists():
            return
        self.place.mkdir(parents=True, exist_ok=True)
        found: list[Generation] = []
        for number in range(self.generations):
            files = self.folders * len(range(number, _FILES, self.generations))
            folders = 0 if number else 1 + self.folders
            start = found[-1].stop if found else 0
            stop = start + files * span(SIZE) + folders * BLOCK
            found.append(Generation(start, stop, files + folders, 10**18, f"{number:064x}"))
        with IndexWriter(os.fspath(self.index), generations=found) as writer:
            writer.add(chain.from_iterable(map(self._members, range(self.generations))))
            for number, generation in enumerate(found[1:], 1):
                keys = (path_key(facts[0]) for facts in self._members(number))
                writer.add_name_filters(enumerate(name_filter.build(keys, generation.members), generation.start))
            writer.commit(
                {
                    "root_name": b"tape",
                    "fingerprint": found[-1].fingerprint,
                    "total_size": found[-1].stop + FOOTER,
                    "member_count": sum(generation.members for generation in found),
                    "recorded_ns": 10**18,
                    "excluded": json.dumps([]),
                    "left_out": 0,
                    "owners_kept": 0,
                    "root_ino": 1,
                }
            )

    def _members(self, generation: int) -> Iterator[Facts]:
        """Those of one generation; the first has all folders."""
        if generation == 0:
            yield b"tape/", stat.S_IFDIR | 0o755, 0, 10**18, 1, 10**18, b"", None
        for folder in range(self.folders):
            if generation == 0:
                name = f"tape/{_folder_name(folder)}/".encode()
                yield name, stat.S_IFDIR | 0o755, 0, 10**18, folder, 10**18, b"", None
            for file in range(generation, _FILES, self.generations):
                name = self.name(folder, file).encode()
                yield name, stat.S_IFREG | 0o644, SIZE, 10**18, 1000 * folder + file, 10**18, b"", None


def _folder_name(folder: int) -> str:
    return f"{folder:06}"


def _file_name(file: int) -> str:
    return f"IMG_{file:06}.jpg"


def _facts(name: bytes, seen: os.stat_result) -> Facts:
    """Those of a member like what was `seen`: itself, or for a row alone, the last real file before it."""
    size = seen.st_size if stat.S_ISREG(seen.st_mode) else 0
    return name, seen.st_mode, size, seen.st_mtime_ns, seen.st_ino, seen.st_ctime_ns, b"", None


if __name__ == "__main__":
    tape = Synthetic(Path(sys.argv[1]), int(sys.argv[2]))
    tape.make()
    with Tape.from_index(tape.index) as made:
        size = tape.index.stat().st_size
        print(f"{made.member_count:,} members, {size / made.member_count:.1f} bytes of index each")
