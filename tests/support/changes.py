"""Changes to a file or folder of a source, each as another program could make it."""

import os
import shutil
from pathlib import Path


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("moved away"))
    path.symlink_to("moved away")


def replace_by_file(path: Path) -> None:
    remove(path)
    path.write_bytes(b"a file now")


def replace_by_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def add_beside(path: Path) -> None:
    path.with_name("added").write_bytes(b"1")


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"X")
