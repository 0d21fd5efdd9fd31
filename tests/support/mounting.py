"""What tests of mounting share: a recorded folder, a place to mount it, and how a refusal looks."""

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import daemons_of, force_unmount, is_mounted
from support.programs import run
from support.reference import Reference

# By the page cache, as it is by default, and with each read reaching the checks; `make test` has the default alone.
BOTH_MODES = pytest.mark.parametrize("options", [("--direct",), ()], ids=["direct", "cached"])

# What a descriptor of an archive says once its daemon has gone.
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV)


@pytest.fixture
def tape(tree: Path) -> tuple[Path, bytes]:
    """A recorded folder, and the archive that it must have."""
    assert run("record", tree).returncode == 0
    reference = Reference(tree)
    return tree, reference.read(0, reference.size)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; whatever is mounted there is unmounted at the end."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    force_unmount(folder)


def refused(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line with which a command was refused."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tartapefs: ")
    return lines[0]


def gone(mountpoint: Path) -> bool:
    return not is_mounted(mountpoint) and not daemons_of(mountpoint)
