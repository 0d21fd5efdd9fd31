"""A folder that grows, at random: additions, appends, appends that are killed, mounts and reads, in any order.

The archive before, without its footer, is a prefix of each that follows, and whatever is read equals what the oracle
made. TARTAPEFS_SEED has another course; TARTAPEFS_LONG=1 makes ten of them in place of two.
"""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from support.generations import Generations
from support.programs import done, our_mounts, run, under_strace

from tartapefs import Tape, TapePlayer

FOOTER = 1024
STEPS = 40
COURSES = 10 if os.environ.get("TARTAPEFS_LONG") == "1" else 2
CALLS = ["newfstatat", "getdents64", "openat", "read", "pread64", "pwrite64", "copy_file_range", "fsync", "flock",
         "rename", "unlink", "linkat", "close", "mmap"]  # fmt: skip

pytestmark = [pytest.mark.fuse, pytest.mark.needs("strace"), pytest.mark.timeout(900)]


class Course:
    """The folder at `root`, what its archives have to be, and the archive that is mounted at `mountpoint`."""

    def __init__(self, root: Path, mountpoint: Path, chance: random.Random, *options: str) -> None:
        self.root, self.mountpoint, self.chance = root, mountpoint, chance
        self.index = root / ".tartape" / "index.db"
        self.folders, self.clock, self.counts = [root], 10**9, dict.fromkeys(STEPS_OF_A_COURSE, 0)
        root.mkdir()
        mountpoint.mkdir()
        self.add()
        done(run("record", root, *options))
        self.expected = Generations(root)
        self.archive = self.mounted = self.expected.append()
        self.mount()

    def add(self) -> None:
        for _ in range(self.chance.randint(1, 8)):
            folder = self.chance.choice(self.folders)
            place = folder / "".join(self.chance.choice("ab-.~ \x7f") for _ in range(self.chance.randint(1, 4)))
            if place.name in (".", "..") or os.path.lexists(place):
                continue
            kind = self.chance.randrange(4)
            if kind == 0:
                place.mkdir()
                self.folders.append(place)
            elif kind == 1:
                place.symlink_to("target")
            else:
                place.write_bytes(self.chance.randbytes(self.chance.choice((0, 1, 511, 512, 513, 3000, 70_000))))
            self.clock += 1
            os.utime(folder, (0, self.clock))

    def append(self) -> None:
        done(run("record", "--append", self.root))
        self.appended()

    def interrupt(self) -> None:
        """An append that is killed, or ended, on the way into one of its system calls."""
        number, call = self.chance.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)), self.chance.choice(CALLS)
        inject = f"inject={call}:signal={number.name}:when={self.chance.randint(1, 40)}"
        before = self.index.read_bytes()
        command = [*under_strace("-e", f"trace={call}", "-e", inject), "record", "--append", self.root]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        if self.index.read_bytes() != before:
            self.appended()

    def appended(self) -> None:
        before, self.archive = self.archive, self.expected.append()
        assert self.archive.startswith(before[:-FOOTER])

    def mount(self) -> None:
        if str(self.mountpoint) in our_mounts():
            done(run("unmount", self.mountpoint))
        done(run("mount", self.root, self.mountpoint, "--allow-additions"))
        self.mounted = self.archive

    def read(self) -> None:
        with (self.mountpoint / "archive.tar").open("rb") as file:
            for _ in range(self.chance.randint(1, 20)):
                at, size = self.chance.randrange(len(self.mounted)), self.chance.choice((1, 512, 4096, 100_000))
                assert os.pread(file.fileno(), size, at) == self.mounted[at : at + size]

    def play(self) -> None:
        """The tape as it is now, whole; and the names of its members."""
        with Tape.discover(self.root) as tape, closing(TapePlayer(tape, allow_additions=True)) as player:
            assert player.read(0, tape.total_size) == self.archive
            assert [member.name for member in tape.members()] == [
                name for names in self.expected.names for name in names
            ]
            assert tape.rows_are_sound() and tape.has_fingerprint()
            for _ in range(10):
                name = self.chance.choice(self.chance.choice(self.expected.names))
                assert tape.find(name).name == name

    def go(self) -> None:
        for _ in range(STEPS):
            step = self.chance.choice(list(STEPS_OF_A_COURSE))
            self.counts[step] += 1
            STEPS_OF_A_COURSE[step](self)
        self.append()
        self.play()
        assert os.listdir(self.root / ".tartape") == ["index.db"]
        done(run("verify", self.root))
        done(run("unmount", self.mountpoint))


STEPS_OF_A_COURSE: dict[str, Callable[[Course], None]] = {
    step.__name__: step
    for step in (Course.add, Course.append, Course.interrupt, Course.mount, Course.read, Course.play)
}


@pytest.mark.matrix(but=r"0-False|1-True")
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("number", range(COURSES))
def test_a_course(tmp_path: Path, number: int, sealed: bool) -> None:
    seed = f"{os.environ.get('TARTAPEFS_SEED', 'growing')} {number} {sealed}"
    options = ["--digest", "sha256"] if sealed else []
    course = Course(tmp_path / "data", tmp_path / "mnt", random.Random(seed), *options)
    try:
        course.go()
    finally:
        if str(course.mountpoint) in our_mounts():
            run("unmount", course.mountpoint)
    print(seed, len(course.expected.names), "generations", course.counts)
