"""The kernel's read-ahead of a mount, in a folder in the place of sysfs."""

import os
from pathlib import Path

import pytest
from support.programs import run

from tartapefs.mount import read_ahead


@pytest.fixture
def number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the device 0:57."""
    monkeypatch.setattr(read_ahead, "_path", lambda device: os.fspath(tmp_path / device))
    (tmp_path / "0:57").write_text("128\n")
    return tmp_path / "0:57"


def test_it_is_enlarged(number: Path) -> None:
    assert read_ahead.current("0:57") == 128 << 10
    assert read_ahead.enlarge("0:57") == 4 << 20
    assert number.read_text() == "4096"


def test_it_is_never_reduced(number: Path) -> None:
    number.write_text("8192\n")
    assert read_ahead.enlarge("0:57") == 8 << 20
    assert number.read_text() == "8192\n"


def test_a_user_is_told_what_there_is(number: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: str, mode: str = "r", **_: object) -> object:
        if mode != "r":
            raise PermissionError
        return Path(path).open(mode)

    monkeypatch.setattr(read_ahead, "open", opened, raising=False)
    assert read_ahead.enlarge("0:57") == 128 << 10
    assert number.read_text() == "128\n"


def test_a_device_that_is_not_there(number: Path) -> None:
    assert read_ahead.current("0:58") is None
    assert read_ahead.enlarge("0:58") is None
    number.write_text("much\n")
    assert read_ahead.enlarge("0:57") is None


def test_the_place_is_that_of_one_mount() -> None:
    assert read_ahead._path("0:57") == "/sys/class/bdi/0:57/read_ahead_kb"


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize("binding", ["fusepy", "mfusepy"])
def test_a_mount_by_root_reads_ahead(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binding: str) -> None:
    """And no other file system does: the number of the one that it lies on stays."""
    monkeypatch.setenv("TARTAPEFS_BINDING", binding)
    (tmp_path / "mnt").mkdir()
    before = [path.read_text() for path in sorted(Path("/sys/class/bdi").glob("*/read_ahead_kb"))]
    assert run("record", tree).returncode == 0
    assert run("mount", tree, tmp_path / "mnt").returncode == 0
    device = os.stat(tmp_path / "mnt").st_dev
    found = read_ahead.current(f"{os.major(device)}:{os.minor(device)}")
    assert run("unmount", tmp_path / "mnt").returncode == 0
    if not os.access("/sys/class/bdi", os.W_OK) or not before:
        pytest.skip("sysfs cannot be written here")
    assert found == 4 << 20
