"""Audits by the daemon, and copies of a recorded folder, through mounts and commands."""

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import foreground
from support.programs import run, wait_until
from support.recordings import COPIES, copied, player_of, record

FOOTER = 1024
PHOTOS = "data/photos"
pytestmark = pytest.mark.fuse


BY_CTIME: dict[str, Callable[[Path], object]] = {
    "mode of a file and back": lambda root: ((root / "script.sh").chmod(0o700), (root / "script.sh").chmod(0o755)),
    "hard link of a file added": lambda root: os.link(root / "script.sh", root.parent / "other"),
    "owner of a file": lambda root: os.chown(root / "script.sh", os.geteuid(), os.getegid()),
    "extended attribute": lambda root: os.setxattr(root / "script.sh", "user.note", b"x"),
}


def state_of(archive: Path) -> str:
    return os.getxattr(archive.parent, "user.tartape.state").decode()


def test_cat_fails(tree: Path, mount: Callable[..., Path]) -> None:
    """A file is added in a folder that `cat` has copied already, while it waits for the reader of its pipe."""
    (tree / "zz").write_bytes(os.urandom(3_000_000))
    expected = record(tree)
    archive = mount(tree)
    with subprocess.Popen(["cat", archive], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as cat:
        assert cat.stdout and cat.stderr
        got = cat.stdout.read(400_000)  # everything but the last file
        (tree / "empty-folder" / "new").touch()
        got += cat.stdout.read()
        assert b"Input/output error" in cat.stderr.read()
    assert cat.returncode == 1
    assert len(got) < len(expected)
    assert expected.startswith(got)
    assert state_of(archive).startswith("invalid: data/empty-folder: ")


def test_the_background_audit_finds_what_nobody_reads(tree: Path, tmp_path: Path, mount: Callable[..., Path]) -> None:
    """The archive is open, and not read: state, log, `status` and every later read tell of the added file's folder."""
    record(tree)
    log = tmp_path / "drift.log"
    archive = mount(tree, "--audit-interval", "0.2", "--log", log)
    with archive.open("rb") as opened:
        before = run("status", archive.parent)
        assert before.returncode == 0
        assert "valid" in before.stdout
        (tree / "photos" / "new").touch()
        wait_until(lambda: state_of(archive) != "valid")
        with pytest.raises(OSError) as caught:
            os.pread(opened.fileno(), 1, 0)
        assert caught.value.errno == errno.EIO
    assert state_of(archive).startswith(f"invalid: {PHOTOS}: mtime changed")
    after = run("status", archive.parent)
    assert after.returncode == 1
    assert f"invalid: {PHOTOS}: mtime changed" in after.stdout
    as_json = run("status", archive.parent, "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["state"] == state_of(archive)
    (line,) = log.read_text().splitlines()
    assert f" {PHOTOS}: mtime changed" in line


def test_the_audit_at_mount(tree: Path, mount: Callable[..., Path]) -> None:
    """What was added between recording and mounting is found although nobody opens the archive."""
    record(tree)
    (tree / "photos" / "new").touch()
    archive = mount(tree)
    wait_until(lambda: state_of(archive).startswith(f"invalid: {PHOTOS}: "))


@pytest.mark.fuse
def test_a_foreground_daemon_tells_of_drift_that_an_audit_found(tree: Path, tmp_path: Path) -> None:
    """Nobody reads a byte; it exits with 1 when it is told to end."""
    record(tree)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    (tree / "photos" / "new").touch()
    with foreground(tree, mountpoint) as daemon:
        wait_until(lambda: state_of(mountpoint / "archive.tar") != "valid")
    assert daemon.returncode == 1


def test_the_option_on_the_command_line(tree: Path, mount: Callable[..., Path]) -> None:
    """The line of `play` and of `verify` names it; `play`, `verify` and `mount` take it."""
    expected = record(tree)
    BY_CTIME["hard link of a file added"](tree)
    for command in ("play", "verify"):
        failed = run(command, tree, text=False, errors=None)
        assert failed.returncode == 1
        assert b'--source-check mtime"' in failed.stderr + failed.stdout
        assert run(command, "--source-check", "mtime", tree, text=False, errors=None).returncode == 0
    assert run("play", "--source-check", "mtime", tree, text=False, errors=None).stdout == expected
    archive = mount(tree, "--source-check", "mtime")
    assert archive.read_bytes() == expected
    assert run("status", archive.parent).returncode == 0


@pytest.mark.parametrize("command", COPIES)
def test_a_copy_plays(old_tree: Path, mount: Callable[..., Path], command: list[str]) -> None:
    """A tape that was copied with its folder has the same bytes, by the library and through a mount."""
    expected = record(old_tree)
    copy = copied(command, old_tree)
    with player_of(copy) as player:
        assert not player.at_home
        assert player.read(0, len(expected)) == expected
        player.audit()
    assert mount(copy).read_bytes() == expected


@pytest.mark.long(but=1)
@pytest.mark.parametrize("command", COPIES)
def test_info_says_which_checks_apply(old_tree: Path, command: list[str]) -> None:
    """At home inode and change time too; in a copy neither."""
    record(old_tree)
    copy = copied(command, old_tree)
    for folder, at_home in ((old_tree, True), (copy, False)):
        facts = json.loads(run("info", "--json", folder).stdout)
        assert facts["at_home"] is at_home
        assert ("not inode and ctime" in facts["checks"]) is not at_home
        assert facts["checks"].startswith("type, size, mtime, mode, link target")
        shown = run("info", folder).stdout
        assert facts["checks"] in shown
