"""Changes to a file, link or folder of a source, each as another program could make it.

Each takes the path of what it changes, unless it says otherwise.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Change = Callable[[Path], None]


@contextmanager
def times_kept(path: Path) -> Iterator[None]:
    """Gives the path its times back, as a program that hides a change would."""
    before = path.lstat()
    yield
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns), follow_symlinks=False)


def below(name: str, change: Callable[..., object], *arguments: object) -> Callable[[Path], object]:
    """The change, with these arguments, to what has this name below the root that it is given."""
    return lambda root: change(root / name, *arguments)


# Of a file


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path, start: int = 0, data: bytes = b"X") -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def overwrite_keeping_times(path: Path, start: int = 0, data: bytes = b"X") -> None:
    with times_kept(path):
        overwrite(path, start, data)


def replace(path: Path) -> None:
    """By another file of its size and mode."""
    path.with_name("new").write_bytes(b"x" * path.stat().st_size)
    path.with_name("new").chmod(path.stat().st_mode & 0o7777)
    path.with_name("new").rename(path)


def replace_by_copy(path: Path) -> None:
    subprocess.run(["cp", "-p", path, path.with_name("new")], check=True)
    path.with_name("new").rename(path)


def replace_by_copy_keeping_folder_times(path: Path) -> None:
    """As a restore from a backup would."""
    with times_kept(path.parent):
        replace_by_copy(path)


def replace_by_link_to_a_copy(path: Path) -> None:
    """The copy lies beside the root, two folders up, and the link has the times of the file."""
    subprocess.run(["cp", "-p", path, path.parents[2] / "outside"], check=True)
    with times_kept(path):
        path.unlink()
        path.symlink_to(path.parents[2] / "outside")


# Of a file or folder


def touch(path: Path) -> None:
    os.utime(path)


def touch_by_a_nanosecond(path: Path) -> None:
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def chmod(path: Path) -> None:
    path.chmod(0o600 if path.stat().st_mode & 0o077 else 0o644)


def chmod_and_back(path: Path) -> None:
    mode = path.stat().st_mode
    path.chmod(0o600)
    path.chmod(mode & 0o7777)


def chown(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    os.chown(path, 1234, 1234)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("renamed"))


def replace_by_file(path: Path) -> None:
    remove(path)
    path.write_bytes(b"a file now")


def replace_by_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def replace_by_socket(path: Path) -> None:
    remove(path)
    os.mknod(path, 0o140600)


def replace_by_link(path: Path) -> None:
    """To itself, under another name in its folder."""
    path.rename(path.with_name("moved away"))
    path.symlink_to("moved away")


def add_beside(path: Path) -> None:
    path.with_name("added").write_bytes(b"1")


# Of a folder


def add_file(path: Path) -> None:
    (path / "new").write_bytes(b"")


def add_file_keeping_times(path: Path) -> None:
    with times_kept(path):
        add_file(path)


def replace_folder_by_link(path: Path) -> None:
    """To itself, moved to beside the root, which is the folder above it."""
    path.rename(path.parents[1] / "moved")
    path.symlink_to(path.parents[1] / "moved")


def replace_folder_by_link_to_a_copy(path: Path) -> None:
    """The copy lies beside the root, which is the folder above it."""
    subprocess.run(["cp", "-a", path, path.parents[1] / "copy"], check=True)
    shutil.rmtree(path)
    path.symlink_to(path.parents[1] / "copy")


def replace_by_copy_of_folder(path: Path) -> None:
    subprocess.run(["cp", "-a", path, path.with_name("copy")], check=True)
    path.rename(path.with_name("moved"))
    path.with_name("copy").rename(path)


# Of a link


def retarget(path: Path, target: str = "another target") -> None:
    path.unlink()
    path.symlink_to(target)


def retarget_keeping_times(path: Path) -> None:
    with times_kept(path):
        retarget(path)
