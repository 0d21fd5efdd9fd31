"""File systems that show a folder through FUSE, while it is changed behind their backs."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.programs import umount, wait_until

NEVER = "attr_timeout=86400,entry_timeout=86400"  # seconds for which the kernel keeps what it was told


@contextmanager
def shown(place: Path, *command: object) -> Iterator[Path]:
    """What `command`, which ends in the mount point `place` and stays in the foreground, shows there."""
    place.mkdir(exist_ok=True)
    with subprocess.Popen([os.fspath(part) for part in command], stdin=subprocess.DEVNULL) as process:  # type: ignore[call-overload]
        try:
            wait_until(lambda: os.path.ismount(place) or process.poll() is not None)
            assert process.poll() is None
            yield place
        finally:
            try:
                umount(place)
            finally:
                if os.path.ismount(place):
                    subprocess.run(["umount", "-l", place], check=True)
                process.wait(30)


def bound(folder: Path, place: Path, *options: str) -> object:
    """`folder` shown by bindfs at `place`; what the kernel is told of it, it keeps."""
    return shown(place, "bindfs", "-f", "-o", ",".join((NEVER, *options)), folder, place)


def warm(root: Path) -> None:
    """Has the kernel know all that is to be known below `root`."""
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            os.lstat(path)
            if os.path.islink(path):
                os.readlink(path)
