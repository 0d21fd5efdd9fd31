"""A folder that grows night after night, and what was read of it to send its archive."""

import os
import random
from pathlib import Path

from support.daemon import bytes_read, daemon_of

NIGHTS = os.environ.get("TARTAPEFS_NIGHTS")


def add(root: Path, chance: random.Random, night: int, when: str) -> None:
    """Some photos in a folder of the night, and one in a folder that was there."""
    folder = root / f"night {night:02}"
    folder.mkdir(exist_ok=True)
    for number in range(chance.randint(1, 5)):
        (folder / f"{when} {number}.jpg").write_bytes(chance.randbytes(chance.randint(0, 400_000)))
    (root / "photos" / f"{night:02} {when}.jpg").write_bytes(chance.randbytes(1000))


def read_for(mountpoint: Path) -> int:
    """What daemon and helper have read so far, in bytes."""
    daemon = daemon_of(mountpoint)
    helpers = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    return bytes_read(daemon) + sum(bytes_read(int(helper)) for helper in helpers)
