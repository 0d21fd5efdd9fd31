"""File systems that show a folder through FUSE, while it is changed behind their backs."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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


SIZE = 300_000
OLD, NEW = b"A" * SIZE, b"B" * SIZE
YEARS_AGO = (10**18, 10**18)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    root = tmp_path / "real" / "data"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "file").write_bytes(OLD)
    (root / "folder" / "link").symlink_to("here")
    (root / "small").write_bytes(b"small")
    (root / "z-folder").mkdir()
    for path in (root / "folder" / "file", root / "folder", root / "z-folder", root):
        os.utime(path, ns=YEARS_AGO)
    return root


def rewritten(root: Path) -> None:
    with (root / "folder" / "file").open("r+b") as file:
        file.write(NEW)


def rewritten_with_its_time(root: Path) -> None:
    rewritten(root)
    os.utime(root / "folder" / "file", ns=YEARS_AGO)


def replaced(root: Path) -> None:
    shutil.copytree(root / "folder", root.parent / "folder", symlinks=True)
    rewritten_with_its_time(root.parent)
    (root.parent / "folder" / "file").rename(root / "folder" / "file")
    os.utime(root / "folder", ns=YEARS_AGO)


def folder_replaced(root: Path) -> None:
    shutil.copytree(root / "folder", root.parent / "folder", symlinks=True)
    rewritten_with_its_time(root.parent)
    (root / "folder").rename(root.parent / "folder before")
    (root.parent / "folder").rename(root / "folder")
    for path in (root / "folder", root):
        os.utime(path, ns=YEARS_AGO)


def grown(root: Path) -> None:
    with (root / "folder" / "file").open("ab") as file:
        file.write(b"more")


def removed(root: Path) -> None:
    (root / "folder" / "file").unlink()


def mode_changed(root: Path) -> None:
    (root / "folder" / "file").chmod(0o600)


def link_changed(root: Path) -> None:
    (root / "folder" / "link").unlink()
    (root / "folder" / "link").symlink_to("away")


def added(root: Path) -> None:
    (root / "z-folder" / "new").write_bytes(b"new")


def folder_mode_changed(root: Path) -> None:
    (root / "z-folder").chmod(0o700)


CHANGES = {
    rewritten: "data/folder/file",
    rewritten_with_its_time: "data/folder/file",
    replaced: "data/folder/file",
    folder_replaced: "data/folder/file",
    grown: "data/folder/file",
    removed: "data/folder/file",
    mode_changed: "data/folder/file",
    link_changed: "data/folder/link",
    added: "data/z-folder",
    folder_mode_changed: "data/z-folder",
}
