"""Names that forge lines or drive terminals, and users who look at what is not theirs."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import daemons_of
from support.programs import run
from support.reference import Reference
from support.users import User, unprivileged

Mount = Callable[..., Path]
NOBODY = 65534

# Names that forge lines, drive terminals, turn the direction of text, or are no text.
NAMES = {
    "newline": b"two\nlines",
    "escape": b"\x1b[2J\x1b]0;title\x07",
    "bidirectional": "\u202egpj.exe\u2066".encode(),
    "separator": "a\u2028b\u0085c".encode(),
    "invalid": b"\xff\xfe\xc3(",
    "return": b"over\rwritten",
    "quotes": b'"}\n{"valid": true, \'x',
    "backslash": b"\\n\\x1b",
}


# Names


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A recorded folder, of a hostile name itself, of files and folders with hostile names."""
    root = tmp_path / os.fsdecode(NAMES["newline"] + NAMES["escape"])
    for name in NAMES.values():
        (root / os.fsdecode(b"in " + name)).mkdir(parents=True)
        (root / os.fsdecode(b"in " + name) / os.fsdecode(name)).write_bytes(name)
    assert run("record", root).returncode == 0
    return root


def plain_lines(text: str) -> list[str]:
    """The lines of `text`, each of which shows everything that is in it."""
    lines = text.split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() for line in lines), ascii(text)
    return lines


def test_drift_of_hostile_names_is_one_line_each(hostile: Path) -> None:
    """In `verify`, as text and as JSON, and in the message of a play that ends at it."""
    for name in NAMES.values():
        (hostile / os.fsdecode(b"in " + name) / os.fsdecode(name)).write_bytes(b"something longer: " + name)
    verified = run("verify", hostile)
    assert verified.returncode == 1
    assert len(plain_lines(verified.stdout)) == len(NAMES)
    assert len(plain_lines(verified.stderr)) == 1
    as_json = run("verify", "--json", hostile)
    assert as_json.stdout.replace("\n", "").isascii()
    found = json.loads(as_json.stdout)
    assert found["valid"] is False
    assert len(found["drift"]) == len(NAMES)
    played = run("play", hostile, errors="replace")
    assert played.returncode == 1
    assert len(plain_lines(played.stderr)) == 1


def test_added_hostile_names_are_one_line_each(hostile: Path) -> None:
    for name in NAMES.values():
        (hostile / os.fsdecode(b"new " + name)).write_bytes(b"")
    verified = run("verify", hostile)
    assert len(plain_lines(verified.stdout)) == len(NAMES) + 1  # and the folder that they are in


def test_hostile_names_that_do_not_fit_are_one_line_each(tmp_path: Path) -> None:
    """All offenders of a recording, and what it left out."""
    root = tmp_path / "data"
    root.mkdir()
    for name in NAMES.values():
        (root / os.fsdecode(b"x" * 110 + name)).write_bytes(b"")
        os.mkfifo(root / os.fsdecode(b"pipe " + name))
    recorded = run("-v", "record", root)
    assert recorded.returncode == 4
    assert len(plain_lines(recorded.stderr)) == len(NAMES) + 2  # how many, and what would help
    for name in NAMES.values():
        (root / os.fsdecode(b"x" * 110 + name)).unlink()
    recorded = run("-v", "record", root)
    assert recorded.returncode == 0
    plain_lines(recorded.stderr)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("kind", NAMES)
def test_a_mount_names_hostile_drift_in_one_line(hostile: Path, tmp_path: Path, mount: Mount, kind: str) -> None:
    """In its log, its extended attributes and its status, as text and as JSON."""
    log = tmp_path / "log"
    archive = mount(hostile, "--log", log)
    (hostile / os.fsdecode(b"in " + NAMES[kind]) / os.fsdecode(NAMES[kind])).write_bytes(b"something longer")
    with pytest.raises(OSError):
        archive.read_bytes()
    (line,) = [line for line in plain_lines(log.read_text()) if "size changed" in line]
    assert "recorded" in line
    state = os.getxattr(archive.parent, "user.tartape.state").decode()
    assert state.isprintable()
    assert state.startswith("invalid: ")
    assert os.getxattr(archive.parent, "user.tartape.source").decode().isprintable()
    status = run("status", archive.parent)
    assert status.returncode == 1
    assert len(plain_lines(status.stdout)) == 15  # a line for each fact
    as_json = run("status", "--json", archive.parent)
    assert json.loads(as_json.stdout)["state"] == state
    assert as_json.stdout.replace("\n", "").isascii()


# Other users


@pytest.mark.long(but=1)
@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.needs("setpriv")
@pytest.mark.parametrize(("group", "may_read"), [(0, True), (NOBODY, False)])
def test_the_group_reads_what_the_mode_says(tree: Path, public: Path, group: int, may_read: bool) -> None:
    """0440 with `--allow-other`: whoever is in the group of who mounted, and nobody else."""
    assert run("record", tree).returncode == 0
    assert run("mount", tree, public / "mnt", "--allow-other", "--mode=0440").returncode == 0
    try:
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={group}", "--clear-groups", "cat"]
        done = subprocess.run([*command, public / "mnt" / "archive.tar"], capture_output=True, timeout=20)
        reference = Reference(tree)
        assert done.stdout == (reference.read(0, reference.size) if may_read else b"")
        assert (done.returncode == 0) is may_read
    finally:
        assert run("unmount", public / "mnt").returncode == 0


@pytest.mark.fuse
class TestUnprivileged:
    pytestmark = unprivileged

    def test_a_mount_gives_nobody_what_they_may_not_read(self, user: User) -> None:
        """Root recorded the folder; a user mounts it who may not read one of the files: all but its bytes comes out.

        Directly: the page cache has whole pages or none.
        """
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        secret = b"the secret of the source. " * 400
        (data / "more" / "secret").write_bytes(secret)
        (data / "more" / "secret").chmod(0o600)
        assert run("record", data).returncode == 0
        reference = Reference(data)
        start = reference.starts[b"data/more/secret"] + 512
        result = user.tartapefs("mount", "--direct", data, mountpoint)
        assert result.returncode == 0, result.stderr
        archive = mountpoint / "archive.tar"
        for at in (start, start + 5000, start - 512 * 3):
            done = user("dd", f"if={archive}", "bs=4096", "count=1", "iflag=skip_bytes", f"skip={at}", "status=none")
            assert done.returncode == 1
            assert done.stdout == ""
            assert "Input/output error" in done.stderr
        header = user("dd", f"if={archive}", "bs=512", "count=1", f"skip={start // 512 - 1}", "status=none")
        assert header.stdout == reference.read(start - 512, 512).decode()
        assert secret[:10].decode() not in user("cat", archive).stdout
        assert user("cat", data / "more" / "secret").returncode == 1
        assert user.tartapefs("unmount", mountpoint).returncode == 0

    def test_the_daemon_lends_nothing_to_others(self, user: User) -> None:
        """What it has open, and its memory, are closed to another user, who may not read the index either."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        assert user.tartapefs("mount", data, mountpoint, "--record").returncode == 0
        (pid,) = [pid for pid in daemons_of(mountpoint) if os.path.exists(f"/proc/{pid}/fd")]
        daemon = f"/proc/{pid}"
        other = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups"]
        for what in ("fd", "map_files", "root/", "cwd/"):
            assert "Permission denied" in user.as_root(*other, "ls", f"{daemon}/{what}").stderr, what
        assert "Permission denied" in user.as_root(*other, "head", "-c1", f"{daemon}/mem").stderr
        assert user.tartapefs("unmount", mountpoint).returncode == 0
