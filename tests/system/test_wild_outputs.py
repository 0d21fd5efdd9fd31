"""What commands write to a file system that knows no owners, no links, and no files without a name: exFAT, by FUSE."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.programs import run
from support.reference import Reference

pytestmark = [pytest.mark.wild, pytest.mark.fuse, pytest.mark.root]

NOBODY = 65534


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """All files there are nobody's, whoever makes them."""
    image, place = tmp_path / "image", tmp_path / "exfat"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(40 << 20)
    subprocess.run(["mkfs.exfat", image], check=True, capture_output=True)
    device = subprocess.run(
        ["losetup", "-f", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["mount.exfat-fuse", "-o", f"uid={NOBODY}", device, place], check=True, capture_output=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.needs("mkfs.exfat", "mount.exfat-fuse", "losetup")
def test_what_is_written_there(place: Path, tmp_path: Path) -> None:
    """Indexes, states, sums and copies: made, replaced, and nothing else left."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_bytes(os.urandom(3 << 20))
    archive = Reference(data)
    commands = [
        ["record", data, "--index", place / "i.db"],
        ["record", data, "--index", place / "i.db", "--force", "--digest", "sha256"],
        ["verify", data, "--index", place / "i.db", "--deep", "--state", place / "v"],
        ["digest", data, "--index", place / "i.db", "--state", place / "s", "--sums", place / "sums"],
        ["digest", data, "--index", place / "i.db", "--state", place / "s", "--sums", place / "sums", "--force"],
        ["play", data, "--index", place / "i.db", "-o", place / "out"],
        ["play", data, "--index", place / "i.db", "-o", place / "out", "--force"],
    ]
    for command in commands:
        result = run(*command)
        assert result.returncode == 0, (command, result.stderr)
    assert (place / "out").read_bytes() == archive.read(0, archive.size)
    assert sorted(os.listdir(place)) == ["i.db", "out", "s", "sums"]
