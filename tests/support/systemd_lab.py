"""A real systemd for tests: PID 1 of namespaces of its own, on a machine whose PID 1 may be something else.

Its root is an overlay over this machine's, whose upper half is a tmpfs, so whatever happens inside leaves the machine
as it was. A folder of the test is /srv inside. `tartapefs` is installed inside, in /usr/local/bin, with mount.tartapefs
in /sbin; so are the units of systemd/. Needs root, Debian's packages systemd, dbus, dbus-user-session and
libpam-systemd, cgroup2, and overlayfs.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROJECT = Path(__file__).parents[2]
USER, UID = "alice", 1234
_START_LIMIT = 60  # seconds

# In namespaces of its own: builds the root below $STATE, an empty folder, prepares it, becomes systemd.
_BOOT = r"""
set -eu
root=$STATE/root
mount -t tmpfs -o mode=755 tmpfs "$STATE"
mkdir "$STATE/upper" "$STATE/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$STATE/upper,workdir=$STATE/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 none "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty autofs; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mknod -m 666 "$root/dev/fuse" c 10 229
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mkdir -p "$root$PROJECT" "$root/srv"
mount --bind "$PROJECT" "$root$PROJECT"
mount -o remount,bind,ro "$root$PROJECT"
mount --bind "$FOLDER" "$root/srv"
cd "$root"
mkdir .old
pivot_root . .old
exec chroot . sh -eu -c "$PREPARE"'
    umount -l /.old
    rmdir /.old
    mount --make-rshared /
    export container=other
    exec /lib/systemd/systemd --unit=multi-user.target --show-status=no'
"""

# Inside, before systemd: nothing that a test does not need, and what `make install` would do.
_PREPARE = r"""
    rm -rf /etc/systemd/system/*.wants /lib/systemd/system/multi-user.target.wants /etc/systemd/user/*.wants
    for unit in systemd-udevd.service systemd-udev-trigger.service systemd-resolved.service systemd-timesyncd.service \
            systemd-networkd.service systemd-hwdb-update.service systemd-firstboot.service systemd-sysusers.service \
            systemd-machine-id-commit.service systemd-pcrphase.service systemd-pcrphase-sysinit.service \
            systemd-journal-flush.service systemd-journal-catalog-update.service systemd-update-utmp.service \
            systemd-random-seed.service systemd-sysctl.service ldconfig.service getty.target \
            modprobe@.service tmp.mount dev-hugepages.mount dev-mqueue.mount \
            sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount kmod-static-nodes.service; do
        ln -sf /dev/null "/etc/systemd/system/$unit"
    done
    rm -f /etc/fstab
    ln -sf /dev/null /etc/tmpfiles.d/tmp.conf   # it empties /tmp, where this project may be
    : > /etc/machine-id
    for place in "$(dirname "$PROJECT")" "$(realpath "$PYTHON")"; do   # a user of the lab, too, runs this Python
        while [ "$place" != / ]; do chmod a+rx "$place"; place=$(dirname "$place"); done
    done
    mkdir -p /usr/local/bin
    printf "#!/bin/sh\nexec $PYTHON -m tartapefs \"\$@\"\n" > /usr/local/bin/tartapefs
    printf "#!/bin/sh\nexec $PYTHON -c \"from tartapefs.cli import mount_tartapefs; mount_tartapefs()\" \"\$@\"\n" \
        > /sbin/mount.tartapefs
    chmod 755 /usr/local/bin/tartapefs /sbin/mount.tartapefs
    cp "$PROJECT"/systemd/*.* /etc/systemd/system/
    cp "$PROJECT"/systemd/user/*.* /etc/systemd/user/
    useradd --uid "$UID_OF_USER" --create-home --shell /bin/sh "$NAME_OF_USER"
"""


class Lab:
    """`folder`: what is /srv inside. Everything else inside is gone afterwards."""

    def __init__(self, folder: Path, cgroup: Path) -> None:
        self.folder = folder
        self.cgroup = cgroup  # that all of it is in
        self.init = 0  # the process that is PID 1 inside

    def run(self, *command: object, code: int | None = 0, **options: object) -> subprocess.CompletedProcess[str]:
        """Runs a command inside, as root; fails unless it exits with `code`, if that is given."""
        inside = ["nsenter", "-t", str(self.init), "-m", "-p", "-C", "-u", "-i", "-r", "-w", "--"]
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        text = {"text": True, "errors": "surrogateescape", "capture_output": True, "timeout": 60, "env": environment}
        result = subprocess.run([*inside, *map(os.fspath, command)], **(text | options))  # type: ignore[call-overload]
        assert code is None or result.returncode == code, (
            f"{command}: {result.returncode}\n{result.stdout}{result.stderr}"
        )
        return result  # type: ignore[no-any-return]

    def systemctl(self, *arguments: object, code: int | None = 0) -> str:
        """What systemctl says on standard output."""
        return self.run("systemctl", *arguments, code=code).stdout.strip()

    def as_user(self, *command: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Runs a command inside as the user, whose own systemd it can reach."""
        runtime = f"/run/user/{UID}"
        environment = [
            f"XDG_RUNTIME_DIR={runtime}",
            f"DBUS_SESSION_BUS_ADDRESS=unix:path={runtime}/bus",
            f"HOME=/home/{USER}",
        ]
        ids = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--init-groups"]
        return self.run(*ids, "env", *environment, *command, code=code)

    def show(self, unit: str, *properties: str, user: bool = False) -> list[str]:
        """The values of properties of a unit."""
        command = [
            "systemctl",
            *(["--user"] if user else []),
            "show",
            *(f"-p{name}" for name in properties),
            "--",
            unit,
        ]
        lines = (self.as_user if user else self.run)(*command).stdout.splitlines()
        values = dict(line.split("=", 1) for line in lines)
        return [values[name] for name in properties]

    def journal(self, *arguments: object) -> str:
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "-o", "cat", *arguments).stdout

    def write(self, path: str, text: str) -> None:
        """Writes a file inside, such as a unit; its folder is made if need be."""
        self.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat > "$1"', "sh", path, input=text)


def _cgroups() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise RuntimeError("no cgroup2 is mounted")


def _child_of(pid: int) -> int | None:
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None
    return None


@contextmanager
def booted(folder: Path, prepare: str = "") -> Iterator[Lab]:
    """A lab that has booted. `prepare`: commands of a shell, run inside before. Leaves no process, cgroup or mount."""
    cgroup = Path(tempfile.mkdtemp(prefix="tartapefs-lab-", dir=_cgroups()))
    cgroup.chmod(0o755)  # a user's systemd has its own below
    lab = Lab(folder, cgroup)
    state, console_log = (folder.with_name(folder.name + suffix) for suffix in (".lab", ".console"))
    state.mkdir()
    environment = os.environ | {
        "STATE": os.fspath(state),
        "FOLDER": os.fspath(folder),
        "PREPARE": _PREPARE + prepare,
        "PROJECT": os.fspath(PROJECT),
        "PYTHON": sys.executable,
        "NAME_OF_USER": USER,
        "UID_OF_USER": str(UID),
    }
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--cgroup", "--uts", "--ipc"]
    command += ["--propagation", "private", "sh", "-c", _BOOT]
    into_cgroup = f'echo $$ > {shlex.quote(os.fspath(cgroup / "cgroup.procs"))} && exec "$@"'
    with open(console_log, "wb") as console:
        unshare = subprocess.Popen(
            ["sh", "-c", into_cgroup, "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env=environment,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + _START_LIMIT
        while True:
            assert unshare.poll() is None and time.monotonic() < end, console_log.read_text()
            lab.init = _child_of(unshare.pid) or 0
            if lab.init and Path(f"/proc/{lab.init}/comm").read_text() == "systemd\n":
                state_inside = lab.run("systemctl", "is-system-running", code=None).stdout.strip()
                if state_inside in ("running", "degraded"):
                    break
            time.sleep(0.05)
        yield lab
    finally:
        if lab.init:
            with suppress(ProcessLookupError):
                os.kill(lab.init, signal.SIGKILL)  # and with it all of its namespace; `unshare` reaps it
            unshare.wait(30)
        (cgroup / "cgroup.kill").write_text("1")
        unshare.wait(30)
        for place, _, _ in os.walk(cgroup, topdown=False):
            _remove_cgroup(Path(place))
        state.rmdir()


def _remove_cgroup(place: Path) -> None:
    """A cgroup whose last process has just been killed is busy for a moment."""
    for _ in range(500):
        with suppress(OSError):
            return place.rmdir()
        time.sleep(0.01)
    return place.rmdir()


ODD = [
    "two\nlines",
    "a b",
    " lead and trail ",
    "tab\t",
    "50%i%%f",
    "$HOME ${HOME} $$",
    "q\"uo'te",
    "back\\slash\\x41\\",
    "-dash",
    ".hidden",
    "a,b=c:d;e",
    "#comment",
    "caf\u00e9",
    "\x1b[31m",
]
