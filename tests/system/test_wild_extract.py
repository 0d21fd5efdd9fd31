"""Members taken out of a copy onto file systems that have no hard links, no links at all, or no modes."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.filesystems import mounted
from support.programs import run, wait_until
from support.seals import MIXED, flip, index_of, make, sealed, whole

pytestmark = [pytest.mark.wild, pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("mkfs.exfat", "mount.exfat-fuse")]


@pytest.fixture
def exfat(tmp_path: Path) -> Iterator[Path]:
    image, folder = tmp_path / "exfat.img", tmp_path / "exfat"
    folder.mkdir()
    image.touch()
    os.truncate(image, 64 << 20)
    subprocess.run(["mkfs.exfat", image], check=True, capture_output=True)
    with mounted("-o", "loop", "-t", "exfat-fuse", image, folder):
        yield folder
    image.unlink()


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy and an index, and nothing else of the folder that they were made from."""
    root = make(tmp_path / "data", MIXED)
    (root / "link").unlink()
    sealed(root)
    (tmp_path / "copy.tar").write_bytes(whole(root))
    shutil.move(index_of(root), tmp_path / "index.db")
    shutil.move(root, tmp_path / "moved")
    return tmp_path


def same_content(one: Path, other: Path) -> bool:
    return subprocess.run(["diff", "-r", one, other, "-x", ".tartape"], capture_output=True).returncode == 0


def test_exfat(kept: Path, exfat: Path) -> None:
    """All of it, without hard links; what is there stays, unless it is to be replaced; nothing unfinished is left."""
    extract: Callable[..., subprocess.CompletedProcess[str]] = lambda *options: run(  # noqa: E731
        "extract", "x", kept / "copy.tar", "data", "--index", kept / "index.db", "-C", exfat, *options
    )
    result = extract()
    assert result.returncode == 0, result.stderr
    assert same_content(exfat / "data", kept / "moved")
    result = extract()
    assert result.returncode != 0 and "data/folder 000/00000" in result.stderr and "exists" in result.stderr
    assert extract("--force").returncode == 0
    flip(kept / "copy.tar", (kept / "copy.tar").stat().st_size // 2)
    assert extract("--force").returncode == 1
    assert same_content(exfat / "data", kept / "moved")
    wait_until(lambda: not list(exfat.rglob("*.part")))
