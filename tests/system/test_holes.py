"""Holes that are punched into a file while it is read: zeros, where the recorded bytes were, that nobody may be given.

On tmpfs the bytes go page by page, and the times move when all of them have gone.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import cycle
from pathlib import Path

import pytest
from support.filesystems import filesystem_of, mounted

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.verify.seal import seal

pytestmark = pytest.mark.root
SIZE = 96 << 20
_REMOVE = "import mmap, sys\nwith open(sys.argv[1], 'r+b') as f: mmap.mmap(f.fileno(), 0).madvise(mmap.MADV_REMOVE)"
PUNCHERS = {
    "fallocate": lambda path: ["fallocate", "--punch-hole", "--length", str(SIZE), path],
    "madvise": lambda path: [sys.executable, "-c", _REMOVE, path],
}


ON_TMPFS = ["tmpfs", "overlay on tmpfs", "tmpfs in a folder"]


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on such a file system, with a `folder` in it."""
    kind = request.param
    with ExitStack() as stack:
        if kind == "tmpfs in a folder":
            folder = tmp_path / "data"
            (folder / "folder").mkdir(parents=True)
            stack.enter_context(mounted("-t", "tmpfs", "-o", "size=200m", "tmpfs", folder / "folder"))
        elif kind == "overlay on tmpfs":
            below = stack.enter_context(filesystem_of("tmpfs", tmp_path)).folder
            for part in ("lower", "upper", "work"):
                (below / part).mkdir()
            place = tmp_path / "overlay"
            place.mkdir()
            layers = f"lowerdir={below}/lower,upperdir={below}/upper,workdir={below}/work"
            stack.enter_context(mounted("-t", "overlay", "-o", layers, "overlay", place))
            folder = place / "data"
        else:
            folder = stack.enter_context(filesystem_of(kind, tmp_path)).folder / "data"
        (folder / "folder").mkdir(parents=True, exist_ok=True)
        yield folder


@pytest.mark.long(but=3)
@pytest.mark.parametrize("root", ON_TMPFS, indirect=True)
@pytest.mark.parametrize("size", [4096, 1 << 17], ids=["in small parts", "in large parts"])
@pytest.mark.parametrize("puncher", PUNCHERS)
def test_no_zeros_of_a_hole_are_served(root: Path, puncher: str, size: int) -> None:
    fill(root)
    TapeRecorder(root).commit()
    read_while(PUNCHERS[puncher](root / "folder" / "file"), root, size)


@pytest.mark.parametrize("root", ["ext4", "xfs", "btrfs"], indirect=True)
def test_nor_on_a_disk(root: Path) -> None:
    """Where the times move first."""
    fill(root)
    TapeRecorder(root).commit()
    read_while(PUNCHERS["fallocate"](root / "folder" / "file"), root, 1 << 17)


@pytest.mark.parametrize("root", ["tmpfs"], indirect=True)
@pytest.mark.parametrize("puncher", PUNCHERS)
def test_nor_by_a_sealed_tape(root: Path, puncher: str) -> None:
    fill(root)
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape, closing(TapePlayer(tape)) as player:
        seal(tape, player.source, player.at_home, "sha256")
    read_while(PUNCHERS[puncher](root / "folder" / "file"), root, 1 << 17)


def fill(root: Path) -> None:
    path = root / "folder" / "file"
    path.write_bytes(b"A" * SIZE)
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))


def read_while(command: list[object], root: Path, size: int) -> None:
    """Reads the file again and again while `command` punches it, until that is seen: what is given is right."""
    recorded = b"A" * size
    with Tape.discover(root) as tape, closing(TapePlayer(tape)) as player:
        body = tape.find("data/folder/file").start + 512
        process = subprocess.Popen([os.fspath(part) for part in command])  # type: ignore[call-overload]
        with process, pytest.raises(TapeIntegrityError):
            for at in cycle(range(0, SIZE, size)):
                assert player.read(body + at, size) == recorded
        assert process.returncode == 0
