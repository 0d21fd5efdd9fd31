"""Containers by Podman, with the options that docs/mounting.md has: `make podman`, which installs it.

Not among the other tests, since Podman is large, and does not run everywhere that they do.
"""

import os
import re
import resource
import shlex
import subprocess
from pathlib import Path

import pytest
from support.machine import Machine, root_folder
from support.programs import wait_until
from support.users import NOBODY

pytestmark = [pytest.mark.podman, pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("podman", "newuidmap")]
DOCUMENTED = (Path(__file__).parents[2] / "docs" / "mounting.md").read_text()
OPTIONS = re.findall(r"^    (?:docker|podman) run (.*) -v ", DOCUMENTED, re.MULTILINE)
BEGIN = "export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin; mkdir -p /tmp/mnt; "


class Podman:
    """Containers whose root folder has the machine's programs; nothing of them is kept outside of the test's folder."""

    def __init__(self, machine: Machine, rootless: bool = False) -> None:
        self.machine, self.folder, self.rootless = machine, machine.folder, rootless
        # crun takes no part in cgroups of both versions; what is unmounted here is so in this namespace alone.
        machine.root("sh", "-c", "umount /sys/fs/cgroup/unified 2>/dev/null")
        self.root = root_folder(machine)
        self.outside = self.folder / "outside"
        self.index = self.folder / "index"
        for folder in (self.outside, self.index, self.folder / "home", self.folder / "run"):
            folder.mkdir(0o755)
            os.chown(folder, NOBODY, NOBODY)
        for name in ("/etc/subuid", "/etc/subgid"):
            (self.folder / "ids").write_text("nobody:200000:65536\n")
            machine.root("sh", "-c", f"touch {name}; mount --bind {self.folder}/ids {name}").check_returncode()

        if rootless:  # it makes files and folders there
            own = [self.root, *(self.root / name for name in ("dev", "etc", "proc", "tmp"))]
            machine.root("chown", f"{NOBODY}:{NOBODY}", *own).check_returncode()

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        stored = ["--cgroup-manager=cgroupfs", "--events-backend=file"]
        places = {"--root": "home/storage", "--runroot": "run/podman", "--tmpdir": "run/libpod"}
        stored += [f"{option}={self.folder / place}" for option, place in places.items()]
        run = self.machine.user if self.rootless else self.machine.root
        environment = [f"HOME={self.folder}/home", f"XDG_RUNTIME_DIR={self.folder}/run"]
        return run("env", "-C", "/", *environment, "podman", *stored, *arguments)

    def run(self, *options: str, script: str) -> subprocess.CompletedProcess[str]:
        """The script by the container's root, after these options of `podman run`."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        limits = [f"--ulimit=nofile={most}:{most}", "--ulimit=nproc=1000:1000"]  # Podman would raise them
        data = self.machine.data
        fixed = ["--network=none", "-v", f"{data}:{data}:ro", "-v", f"{self.index}:/index"]
        return self("run", *limits, *fixed, *options, "--rootfs", self.root, "sh", "-euc", BEGIN + script)


@pytest.fixture
def podman(machine: Machine) -> Podman:
    return Podman(machine)


def served(machine: Machine) -> str:
    """A script that records, mounts, compares and unmounts; the source cannot be written."""
    return f"""
        ! touch {machine.data}/new 2>/dev/null
        tartapefs record --index /index/db {machine.data}
        tartapefs mount --index /index/db {machine.data} /tmp/mnt
        cmp /tmp/mnt/archive.tar {machine.folder}/expected.tar
        tartapefs unmount /tmp/mnt
    """


def test_with_the_documented_options(machine: Machine, podman: Podman) -> None:
    (line,) = OPTIONS
    assert "--device /dev/fuse --cap-add SYS_ADMIN" in line
    result = podman.run("--rm", *shlex.split(line), script=served(machine) + f"tartapefs doctor {machine.data}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "problem" not in result.stdout


@pytest.mark.parametrize(
    ("options", "named"), [("--cap-add SYS_ADMIN", "--device /dev/fuse"), ("--device /dev/fuse", "--cap-add SYS_ADMIN")]
)
def test_without_one_of_them(machine: Machine, podman: Podman, options: str, named: str) -> None:
    """One line, a remedy from doctor, and everything works but mounting."""
    script = f"""
        tartapefs record --index /index/db {machine.data} 2>/dev/null
        tartapefs play --index /index/db {machine.data} | cmp - {machine.folder}/expected.tar
        tartapefs doctor || true
        tartapefs mount --index /index/db {machine.data} /tmp/mnt
    """
    result = podman.run("--rm", *shlex.split(options), script=script)
    assert result.returncode == 5
    assert len(result.stderr.splitlines()) == 1
    assert f"for a container, {named}" in result.stdout


@pytest.mark.parametrize("has_rights", [True, False])
@pytest.mark.parametrize("no_new_privs", [True, False])
def test_a_user_of_the_container(machine: Machine, podman: Podman, has_rights: bool, no_new_privs: bool) -> None:
    """Podman gives the user the right to mount; where there is only root's, as by Docker, it takes fusermount3."""
    options = ["--rm", "--device=/dev/fuse", "--cap-add=SYS_ADMIN", f"--user={NOBODY}:{NOBODY}"]
    if no_new_privs:
        options.append("--security-opt=no-new-privileges")
    script = "tartapefs doctor || true; " + served(machine)
    if not has_rights:
        script = shlex.join(["setpriv", "--ambient-caps=-all", "--inh-caps=-all", "sh", "-euc", script])
    result = podman.run(*options, script=script)
    if has_rights or not no_new_privs:
        assert result.returncode == 0, result.stdout + result.stderr
        assert "problem" not in result.stdout
    else:
        assert result.returncode == 5, result.stdout + result.stderr
        assert "cannot become root, since no_new_privs is set" in result.stdout


def test_seen_outside(machine: Machine, podman: Podman) -> None:
    """Where its place is on a volume that is shared, until it is stopped; killed and started again it heals itself."""
    machine.root("sh", "-c", 'mount --bind "$1" "$1" && mount --make-rshared "$1"', "sh", podman.outside)
    volume = f"type=bind,src={podman.outside},dst=/outside,bind-propagation=rshared"
    archive = podman.outside / "tape" / "archive.tar"
    script = f"""
        test -e /index/db || tartapefs record --index /index/db {machine.data}
        mkdir -p /outside/tape || true
        exec tartapefs mount --foreground --index /index/db {machine.data} /outside/tape
    """
    options = ["--detach", "--name=seen", "--device=/dev/fuse", "--cap-add=SYS_ADMIN", "--mount", volume]
    try:
        result = podman.run(*options, script=script)
        assert result.returncode == 0, result.stderr

        def is_seen() -> bool:
            return machine.root("cmp", archive, machine.folder / "expected.tar").returncode == 0

        wait_until(is_seen)
        assert podman("kill", "--signal=KILL", "seen").returncode == 0
        wait_until(lambda: "not connected" in machine.root("ls", archive.parent).stderr)
        assert podman("start", "seen").returncode == 0
        wait_until(is_seen)
        assert podman("stop", "seen").returncode == 0
        assert podman("wait", "seen").stdout == "0\n"
        assert machine.root("ls", "-A", archive.parent).stdout == ""
    finally:
        podman("rm", "--force", "seen")


def test_mounted_on_the_host(machine: Machine, podman: Podman) -> None:
    """A container that was there before sees it, as the page of the cookbook says."""
    page = (Path(__file__).parents[2] / "docs" / "cookbook" / "containers.md").read_text()
    (volume,) = re.findall(r"^podman run --mount (\S+)", page, re.MULTILINE)
    machine.root("sh", "-c", 'mount --bind "$1" "$1" && mount --make-rshared "$1"', "sh", podman.outside)
    (podman.outside / "data").mkdir()
    options = ["--detach", "--name=reader", "--mount", volume.replace("/srv/tapes", str(podman.outside))]
    try:
        result = podman.run(*options, script="exec sleep 1000")
        assert result.returncode == 0, result.stderr
        result = machine.root("tartapefs", "mount", machine.data, podman.outside / "data")
        assert result.returncode == 0, result.stderr
        expected = machine.folder / "expected.tar"
        wait_until(lambda: podman("exec", "reader", "cmp", "/tapes/data/archive.tar", expected).returncode == 0)
        assert machine.root("tartapefs", "unmount", podman.outside / "data").returncode == 0
        assert podman("exec", "reader", "ls", "-A", "/tapes/data").stdout == ""
    finally:
        podman("rm", "--force", "--time=0", "reader")


def test_not_seen_outside_and_drift(machine: Machine, podman: Podman) -> None:
    """As a volume is by default. What has changed the exit code of the container tells."""
    script = f"""
        tartapefs record --index /index/db {machine.data}
        exec tartapefs mount --foreground --index /index/db {machine.data} /outside
    """
    volume = ["-v", f"{podman.outside}:/outside"]
    options = ["--detach", "--name=unseen", "--device=/dev/fuse", "--cap-add=SYS_ADMIN", *volume]
    try:
        result = podman.run(*options, script=script)
        assert result.returncode == 0, result.stderr
        inside = ["exec", "unseen", "cmp", "/outside/archive.tar", machine.folder / "expected.tar"]
        wait_until(lambda: podman(*inside).returncode == 0)
        assert machine.root("ls", "-A", podman.outside).stdout == ""
        (machine.data / "new").touch()
        assert "Input/output error" in podman("exec", "unseen", "cat", "/outside/archive.tar").stderr
        assert podman("stop", "unseen").returncode == 0
        assert podman("wait", "unseen").stdout == "1\n"
        assert "the folder is no longer as recorded" in podman("logs", "unseen").stderr
    finally:
        podman("rm", "--force", "unseen")


def test_rootless(machine: Machine) -> None:
    """A user's own container has the same options, and is seen by nobody else."""
    podman = Podman(machine, rootless=True)
    script = served(machine) + f"tartapefs doctor {machine.data}"
    result = podman.run("--rm", "--device=/dev/fuse", "--cap-add=SYS_ADMIN", script=script)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "problem" not in result.stdout
