"""File systems to test on, each new and on a loop file of its own."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.programs import umount

SIZE = 320 << 20  # bytes, sparse: what mkfs.xfs asks for at least
_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "ext4-seconds": ["mkfs.ext4", "-q", "-F", "-I", "128"],  # no room for more than seconds in such an inode
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


@dataclass(frozen=True)
class Filesystem:
    """`folder` is a folder on it. `sees_dirty_stores`: a store to a page that was written back moves the timestamps."""

    name: str
    folder: Path
    sees_dirty_stores: bool
    whole_seconds: bool


@contextmanager
def mounted(*command: object) -> Iterator[None]:
    """`mount` with these arguments, the last of which is the mount point; strictly unmounted after the block."""
    result = subprocess.run(["mount", *map(os.fspath, command)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"cannot mount: {result.stderr.strip()}")
    try:
        yield
    finally:
        umount(os.fspath(command[-1]))


@contextmanager
def loop(name: str, place: Path) -> Iterator[Path]:
    """A new file system of this kind, in a file in `place`; gives where it is mounted. Skips without loop devices."""
    image, folder = place / f"{name}.img", place / f"{name}.mnt"
    folder.mkdir()
    image.touch()
    os.truncate(image, SIZE)
    try:
        subprocess.run([*_MKFS[name], image], check=True, capture_output=True)
        with mounted("-o", "loop", "-t", name.partition("-")[0], image, folder):
            yield folder
    finally:
        image.unlink()


@contextmanager
def filesystem_of(name: str, place: Path) -> Iterator[Filesystem]:
    with ExitStack() as stack:
        if name == "tmpfs":
            folder = place / "tmpfs"
            folder.mkdir()
            stack.enter_context(mounted("-t", "tmpfs", "-o", "size=512m", "tmpfs", folder))
        elif name == "overlay":
            below = stack.enter_context(loop("ext4", place))
            for part in ("lower", "upper", "work"):
                (below / part).mkdir()
            layers = f"lowerdir={below}/lower,upperdir={below}/upper,workdir={below}/work"
            folder = place / "overlay"
            folder.mkdir()
            stack.enter_context(mounted("-t", "overlay", "-o", layers, "overlay", folder))
        else:
            folder = stack.enter_context(loop(name, place))
        (folder / "tests").mkdir()
        yield Filesystem(name, folder / "tests", name != "tmpfs", name == "ext4-seconds")


KINDS = [  # parameters for a fixture
    pytest.param(name, marks=[pytest.mark.root, *([pytest.mark.needs(programs)] if programs else [])])
    for name, programs in {
        "ext4": "mkfs.ext4",
        "ext4-seconds": "mkfs.ext4",
        "xfs": "mkfs.xfs",
        "btrfs": "mkfs.btrfs",
        "tmpfs": "",
        "overlay": "mkfs.ext4",
    }.items()
]


def is_on_a_local_disk(path: Path) -> bool:
    """Whether it lies on a file system of which large files are kept open."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True).stdout.strip()
    return kind in ("ext2/ext3", "xfs", "btrfs", "tmpfs", "f2fs", "zfs", "bcachefs")
