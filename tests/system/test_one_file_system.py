"""Folders in which other file systems are mounted, recorded without what these hold."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.filesystems import mounted
from support.mounting import mountpoint as mountpoint
from support.programs import run, umount
from support.recordings import assert_recorded, played
from support.seals import playing

from tartapefs import Tape, TapeIntegrityError, TapeRecorder
from tartapefs.play.audit import audit, verify
from tartapefs.play.inspection import Inspector
from tartapefs.source.folder import Source

pytestmark = pytest.mark.root
LEFT_OUT = (b"disk/within", b"disk/folder")


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder with a tmpfs in it, and a file of that mounted on one of its own."""
    root = tmp_path / "data"
    (root / "disk").mkdir(parents=True)
    (root / "z").mkdir()
    for name in ("a", "bound", "z/last"):
        (root / name).write_bytes(name.encode())
    with mounted("-t", "tmpfs", "-o", "mode=750", "tmpfs", root / "disk"):
        (root / "disk" / "folder").mkdir()
        for name in ("within", "folder/deep"):
            (root / "disk" / name).write_bytes(b"on another disk")
        with mounted("--bind", root / "disk" / "within", root / "bound"):
            yield root


def drift_of(root: Path) -> list[str]:
    with Tape.discover(root) as tape, Source(os.fspath(root)) as source:
        return [error.member for error in verify(Inspector(tape, source, at_home=True))]


def test_the_archive(root: Path) -> None:
    """It has what GNU tar's has: the mount point as an empty folder, the file that is mounted on a file."""
    TapeRecorder(root, one_file_system=True).commit()
    assert_recorded(root, LEFT_OUT)
    command = ["tar", "--one-file-system", "--sort=name", "--exclude=.tartape", "-cf", "-", "data"]
    theirs = subprocess.run(command, cwd=root.parent, check=True, capture_output=True).stdout
    listed = [
        subprocess.run(["tar", "-tf", "-"], input=it, capture_output=True).stdout for it in (played(root), theirs)
    ]
    assert listed[0] == listed[1] == b"data/\ndata/a\ndata/bound\ndata/disk/\ndata/z/\ndata/z/last\n"
    TapeRecorder(root, overwrite=True, one_file_system=False).commit()
    assert_recorded(root)


def test_what_lies_in_the_mount_may_change(root: Path, mountpoint: Path) -> None:
    """For a check of all, an audit, reads, a mount that records, and additions; a file that is mounted may not."""
    assert run("mount", "--record", "-x", root, mountpoint).returncode == 0
    try:
        archive = (mountpoint / "archive.tar").read_bytes()
        (root / "disk" / "new").write_bytes(b"another")
        (root / "disk" / "folder" / "deep").unlink()
        assert drift_of(root) == []
        with Tape.discover(root) as tape, Source(os.fspath(root)) as source:
            audit(Inspector(tape, source, at_home=True), lambda: None)
        assert (mountpoint / "archive.tar").read_bytes() == archive
    finally:
        assert run("unmount", mountpoint).returncode == 0
    result = run("record", "--append", root)
    assert result.returncode == 0, result.stderr
    with Tape.discover(root) as tape:
        assert {member.path for member in tape.members()} == {b"", b"a", b"bound", b"disk", b"z", b"z/last"}
        assert tape.one_file_system
    (root / "disk" / "within").write_bytes(b"changed")
    assert drift_of(root) == ["data/bound"]


def test_a_mount_that_goes_or_comes_is_drift(root: Path) -> None:
    """Where nothing was mounted when it was recorded, and where something was."""
    TapeRecorder(root, one_file_system=True).commit()
    with mounted("-t", "tmpfs", "tmpfs", root / "z"):
        assert set(drift_of(root)) == {"data/z", "data/z/last"}
        with playing(root) as player, pytest.raises(TapeIntegrityError):
            player.read(0, player.tape.total_size)
    umount(os.fspath(root / "disk"))
    try:
        assert drift_of(root) == ["data/disk"]
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root / "disk"], check=True)


def test_a_folder_where_the_mount_was(root: Path, tmp_path: Path) -> None:
    """In a copy of the folder the mount point is a folder like any other: names in it are additions."""
    TapeRecorder(root, one_file_system=True).commit()
    copy = tmp_path / "elsewhere" / "data"
    copy.parent.mkdir()
    subprocess.run(["cp", "-a", "-x", root, copy], check=True)
    with Tape.discover(copy) as tape, Source(os.fspath(copy)) as source:
        assert not tape.is_at_home(source.ino)
        assert list(verify(Inspector(tape, source, at_home=False))) == []
        (copy / "disk" / "new").touch()
        found = [error.member for error in verify(Inspector(tape, source, at_home=False))]
        assert found == ["data/disk", "data/disk/new"]


def test_the_option_is_kept(root: Path) -> None:
    """By --force, until it is dropped; and sealing keeps it."""
    assert run("record", "-x", root).returncode == 0
    assert json.loads(run("info", root, "--json").stdout)["one_file_system"] is True
    assert run("seal", root).returncode == 0
    assert "without what is mounted below" in run("info", root).stdout
    result = run("record", "--force", root)
    assert "as recorded before: --one-file-system, --digest" in result.stderr
    assert_recorded(root, LEFT_OUT)
    assert run("record", "--append", "-x", root).returncode == 2
    result = run("record", "--force", "--no-one-file-system", root)
    assert "no longer: --one-file-system" in result.stderr
    assert_recorded(root)


def test_a_mount_where_the_kernel_makes_up_what_is_read(tmp_path: Path) -> None:
    """It is refused, unless what lies in it is left out."""
    root = tmp_path / "data"
    (root / "proc").mkdir(parents=True)
    with mounted("-t", "proc", "proc", root / "proc"):
        assert run("record", root).returncode == 4
        assert run("record", "-x", root).returncode == 0
        assert drift_of(root) == []
        assert run("verify", root).returncode == 0
