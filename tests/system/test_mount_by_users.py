"""Mounting and unmounting by a user who is not root, through fusermount3."""

import json
import os
import stat
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import daemons_of
from support.mounting import mountpoint as mountpoint
from support.mounting import refused
from support.mounting import tape as tape
from support.programs import wait_until
from support.reference import Reference
from support.users import NOBODY, User, unprivileged

Mount = Callable[..., Path]
MOUNTING = Path(__file__).parents[2] / "docs" / "mounting.md"
pytestmark = pytest.mark.fuse


def read_ahead(user: User, mountpoint: Path) -> int | None:
    """In bytes, as the owner is told."""
    result = user.tartapefs("status", mountpoint, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["read_ahead"]  # type: ignore[no-any-return]


class TestUnprivileged:
    pytestmark = unprivileged

    def test_mount_read_and_unmount(self, user: User) -> None:
        """Through fusermount3; the archive is the user's own, and closed even to root."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        archive = mountpoint / "archive.tar"
        result = user.tartapefs("record", data)
        assert result.returncode == 0, result.stderr
        reference = Reference(data)
        (user.folder / "expected.tar").write_bytes(reference.read(0, reference.size))
        result = user.tartapefs("mount", data, mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        assert user("cmp", archive, user.folder / "expected.tar").returncode == 0
        found = user("stat", "-c", "%u %g %f %s", archive).stdout.split()
        assert found == [str(NOBODY), str(NOBODY), f"{stat.S_IFREG | 0o400:x}", str(reference.size)]
        assert "Permission denied" in user.as_root("cat", archive).stderr
        assert "Permission denied" in user.as_root("stat", mountpoint).stderr
        other = user.as_root("setpriv", "--reuid=4242", "--regid=4242", "--clear-groups", "ls", mountpoint)
        assert "Permission denied" in other.stderr
        result = user.tartapefs("unmount", mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        assert user("ls", "-A", mountpoint).stdout == ""
        wait_until(lambda: not daemons_of(mountpoint))

    def test_root_enlarges_the_read_ahead(self, user: User) -> None:
        """As the documentation says, of an archive that root cannot look at."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        assert user.tartapefs("mount", data, mountpoint, "--record").returncode == 0
        (line,) = [line.strip() for line in MOUNTING.read_text().splitlines() if line.startswith("    echo 4096")]
        assert read_ahead(user, mountpoint) == 128 << 10
        assert user.as_root("sh", "-c", line.replace("MNT", str(mountpoint))).stderr == ""
        assert read_ahead(user, mountpoint) == 4 << 20
        assert user.tartapefs("unmount", mountpoint).returncode == 0

    @pytest.mark.wild
    @pytest.mark.needs("udevadm")
    def test_udev_enlarges_the_read_ahead(self, user: User) -> None:
        """The rule of the documentation, by a real udevd that has no other."""
        (rule,) = [line.strip() for line in MOUNTING.read_text().splitlines() if line.startswith("    SUBSYSTEM==")]
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        script = """
            mount -t tmpfs udev /run/udev && mkdir /run/udev/rules.d || exit
            mount -t tmpfs rules /lib/udev/rules.d || exit
            echo "$1" > /run/udev/rules.d/99-read-ahead.rules
            exec /lib/systemd/systemd-udevd
        """
        enter = ["nsenter", f"--mount=/proc/{user.holder.pid}/ns/mnt"]
        udevd = subprocess.Popen([*enter, "sh", "-c", textwrap.dedent(script), "sh", rule], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: user.as_root("udevadm", "control", "--ping").returncode == 0)
            assert user.tartapefs("mount", data, mountpoint, "--record").returncode == 0
            wait_until(lambda: read_ahead(user, mountpoint) == 4 << 20)
            assert user("cat", mountpoint / "archive.tar").returncode == 0
            assert read_ahead(user, mountpoint) == 4 << 20
            assert user.tartapefs("unmount", mountpoint).returncode == 0
        finally:
            udevd.terminate()
            udevd.wait(30)

    def test_names_that_are_hard_for_fusermount(self, user: User) -> None:
        """Commas, backslashes, spaces and newlines in the source's and the mount point's name."""
        data, mountpoint = user.folder / "a,allow_other,b\\c d\ne", user.folder / "mnt,x \\y\nz"
        user("mkdir", mountpoint)
        user("mv", user.folder / "data", data)
        assert user.tartapefs("record", data).returncode == 0
        result = user.tartapefs("mount", data, mountpoint)
        assert result.returncode == 0, result.stderr
        assert user("cat", mountpoint / "archive.tar").returncode == 0
        result = user.tartapefs("unmount", mountpoint)
        assert result.returncode == 0, result.stderr

    def test_busy_and_lazy(self, user: User) -> None:
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        assert user.tartapefs("mount", data, mountpoint, "--record").returncode == 0
        script = 'exec 3< "$1/archive.tar"; shift; "$@"'
        environment = [f"PYTHONPATH={user.packages}", "PYTHONDONTWRITEBYTECODE=1"]
        command = ["env", *environment, user.interpreter, "-m", "tartapefs", "unmount", mountpoint]
        refused(user("sh", "-c", script, "sh", mountpoint, *command), 5)
        result = user("sh", "-c", script, "sh", mountpoint, *command, "--lazy")
        assert (result.returncode, result.stderr) == (0, "")
        wait_until(lambda: not daemons_of(mountpoint))

    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("allowed", [False, True])
    def test_allow_other_is_for_the_administrator_to_allow(self, user: User, allowed: bool) -> None:
        """Without `user_allow_other` in fuse.conf: exit 5, and one line that names it."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        (user.folder / "fuse.conf").write_text("user_allow_other\n" if allowed else "# nothing\n")
        bound = user.as_root("mount", "--bind", user.folder / "fuse.conf", "/etc/fuse.conf")
        if bound.returncode:
            pytest.skip(f"/etc/fuse.conf cannot be replaced: {bound.stderr.strip()}")
        assert user.tartapefs("record", data).returncode == 0
        result = user.tartapefs("mount", data, mountpoint, "--allow-other", "--mode=0444")
        if allowed:
            assert result.returncode == 0, result.stderr
            assert user.as_root("cat", mountpoint / "archive.tar").returncode == 0
            assert user.tartapefs("unmount", mountpoint).returncode == 0
        else:
            assert "user_allow_other" in refused(result, 5)
            assert user("ls", "-A", mountpoint).stdout == ""

    def test_a_mount_point_of_someone_else(self, user: User) -> None:
        """fusermount3 refuses what the user may not write; its reason comes out in one line."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        os.chown(mountpoint, 0, 0)
        assert user.tartapefs("record", data).returncode == 0
        refused(user.tartapefs("mount", data, mountpoint), 5)

    def test_unmount_of_the_archive_of_someone_else(self, user: User) -> None:
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        assert user.tartapefs("mount", data, mountpoint, "--record").returncode == 0
        environment = [f"PYTHONPATH={user.packages}", "PYTHONDONTWRITEBYTECODE=1"]
        command = ["env", *environment, user.interpreter, "-m", "tartapefs", "unmount", mountpoint]
        other = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups"]
        refused(user.as_root(*other, *command), 5)
        assert user("ls", mountpoint).stdout == "archive.tar\n"
        assert user.tartapefs("unmount", mountpoint).returncode == 0

    def test_drift_is_seen(self, user: User) -> None:
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        log = user.folder / "drift.log"
        assert user.tartapefs("mount", data, mountpoint, "--record", "--log", log).returncode == 0
        user("touch", data / "more" / "program")
        assert "Input/output error" in user("cat", mountpoint / "archive.tar").stderr
        assert "data/more/program: mtime" in log.read_text()
        assert user.tartapefs("unmount", mountpoint).returncode == 0
