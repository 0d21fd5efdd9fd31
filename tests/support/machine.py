"""A machine of one's own for tests of mount(8): a mount namespace in which programs, fstab and fuse.conf are replaced.

Nothing of the real machine is touched: what the tests install is seen in the namespace alone.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.daemon import daemons_of
from support.reference import Reference
from support.users import User

_PROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()
# The programs that are installed, and the functions that they call.
SCRIPTS = dict(re.findall(r'^"?([\w.]+)"? = "(tartapefs\.\w+:\w+)"$', _PROJECT, re.MULTILINE))
# Its folder of administrators' programs is replaced by one of links, so that one can be added. Archives that other
# tests have mounted, some of them broken on purpose, are none of its own.
_SET_UP = r"""
set -e
findmnt --raw --noheadings --output TARGET --types fuse.tartapefs | while read -r mountpoint; do
    umount --lazy --internal-only --no-canonicalize "$(printf %b "$mountpoint")" || true  # it is gone
done
mkdir sbin
mount --bind "$(realpath /sbin)" sbin
mount -t tmpfs -o mode=755 tmpfs "$(realpath /sbin)"
ln -s "$PWD"/sbin/* /sbin/
mount -t tmpfs -o mode=755 tmpfs /usr/local/bin
cp bin/tartapefs /usr/local/bin/
cp bin/mount.tartapefs /sbin/
mount --bind fstab /etc/fstab
"""


class Machine:
    """What `user` has, and `mount` finds tartapefs as after an installation. `data` is recorded."""

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


def root_folder(machine: Machine) -> Path:
    """A root folder of its own with the machine's programs in it, and with /dev empty but for the least."""
    root = machine.folder / "container"
    root.mkdir()
    prefix = os.path.dirname(os.path.dirname(machine.user.interpreter))
    script = f"""
        set -e
        mount -t tmpfs tmpfs {root}
        cd {root}
        mkdir -p dev proc tmp
        for name in bin sbin lib lib64; do
            if [ -L /$name ]; then cp -P /$name .
            elif [ -d /$name ]; then mkdir $name; mount --bind /$name $name; fi
        done
        for place in /usr /usr/local/bin {prefix if not prefix.startswith("/usr") else ""} \
            {machine.folder} {machine.user.packages}; do
            mkdir -p .$place; mount --bind $place .$place
        done
        mkdir etc; cp /etc/passwd /etc/group /etc/ld.so.cache etc/
        chmod 1777 tmp
        for name in null zero urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done
    """
    result = machine.root("sh", "-c", script)
    assert result.returncode == 0, result.stderr
    return root
