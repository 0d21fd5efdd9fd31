"""Folders whose archives have several parts."""

import os
from pathlib import Path

PART = 5 << 20  # the smallest that S3 takes
FILE = 1_500_000
EARLIER = 1_600_000_000  # s; so that no recording waits for the clock


def make(root: Path, count: int = 15, size: int = FILE) -> Path:
    """A folder of `count` files; its archive has five parts."""
    root.mkdir()
    add(root, *(f"{number:02}" for number in range(count)), size=size)
    return root


def add(root: Path, *names: str, size: int = FILE) -> None:
    """Adds files to the folder; old ones, but the folder is as new as it is."""
    for name in names:
        (root / name).write_bytes(os.urandom(size))
        os.utime(root / name, (EARLIER, EARLIER))
