"""A machine of one's own for tests of mount(8): a mount namespace in which programs, fstab and fuse.conf are replaced.

Nothing of the real machine is touched: what the tests install is seen in the namespace alone.
"""

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from system import test_mount
from system.test_mount import User

from support.daemon import daemons_of
from support.reference import Reference

_PROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()
# The programs that are installed, and the functions that they call.
SCRIPTS = dict(re.findall(r'^"?([\w.]+)"? = "(tartapefs\.\w+:\w+)"$', _PROJECT, re.MULTILINE))
# Its folder of administrators' programs is replaced by one of links, so that one can be added.
_SET_UP = """
set -e
mkdir sbin
mount --bind "$(realpath /sbin)" sbin
mount -t tmpfs -o mode=755 tmpfs "$(realpath /sbin)"
ln -s "$PWD"/sbin/* /sbin/
mount -t tmpfs -o mode=755 tmpfs /usr/local/bin
cp bin/tartapefs /usr/local/bin/
cp bin/mount.tartapefs /sbin/
mount --bind fstab /etc/fstab
"""

user = test_mount.user  # a fixture


class Machine:
    """What `user`, of test_mount, has, and `mount` finds tartapefs as after an installation. `data` is recorded."""

    def __init__(self, user: User) -> None:
        self.user = user
        self.folder, self.data, self.mountpoint = user.folder, user.folder / "data", user.folder / "mnt"
        (self.folder / "bin").mkdir()
        environment = f"PYTHONPATH={user.packages} PYTHONDONTWRITEBYTECODE=1"
        for name, entry in SCRIPTS.items():
            module, _, function = entry.partition(":")
            code = f"import sys; sys.argv[0] = {name!r}; from {module} import {function}; {function}()"
            program = self.folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec env {environment} {user.interpreter} -c {shlex.quote(code)} "$@"\n')
            program.chmod(0o755)
        (self.folder / "fstab").touch()
        self.root("sh", "-c", f"cd {self.folder}\n{_SET_UP}").check_returncode()
        result = user("tartapefs", "record", self.data)
        assert result.returncode == 0, result.stderr
        reference = Reference(self.data)
        self.archive = reference.read(0, reference.size)
        (self.folder / "expected.tar").write_bytes(self.archive)

    def root(self, *command: object) -> subprocess.CompletedProcess[str]:
        return self.user.as_root(*command)

    def fstab(self, *lines: str) -> None:
        (self.folder / "fstab").write_text("".join(line + "\n" for line in lines))

    def daemons(self) -> list[int]:
        """The processes that serve the mount point, without their helpers."""
        return daemons_of(self.mountpoint)

    def mounted(self) -> list[str]:
        """What findmnt says is mounted here: "SOURCE TYPE OPTIONS" of each, with its own escapes."""
        command = ("findmnt", "-n", "-r", "-o", "SOURCE,FSTYPE,OPTIONS", "--mountpoint", self.mountpoint)
        return self.root(*command).stdout.splitlines()

    def is_served(self, run: Callable[..., subprocess.CompletedProcess[str]], name: str = "archive.tar") -> bool:
        """Whether `run`, as root or as the user, reads the right archive."""
        return run("cmp", self.mountpoint / name, self.folder / "expected.tar").returncode == 0


@pytest.fixture
def machine(user: User) -> Machine:
    return Machine(user)
