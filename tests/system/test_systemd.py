"""The units of systemd/ and those that are printed, under a real systemd: see systemd_lab.py."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.programs import run, wait_until
from support.reference import Reference
from support.systemd_lab import ODD, PROJECT, UID, USER, Lab, booted

from tartapefs.mount import units

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("systemctl", "dbus-daemon", "nsenter", "rsync")]
ACTIVE, MNT = "ActiveState", "/mnt/tape"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    folder.chmod(0o755)
    with booted(folder) as lab:
        yield lab


class Source:
    """A folder /srv/NAME of the lab, recorded; its archive; its instance of the template."""

    def __init__(self, lab: Lab, name: str, size: int = 300_001, record: bool = True) -> None:
        self.lab, self.path, self.root = lab, f"/srv/{name}", lab.folder / name
        (self.root / "photos").mkdir(parents=True)
        (self.root / "photos" / "1.bin").write_bytes(os.urandom(size))
        (self.root / "link").symlink_to("photos/1.bin")
        if record:
            lab.run("tartapefs", "record", self.path)
        reference = Reference(self.root)
        self.archive = reference.read(0, reference.size)
        self.unit = f"tartapefs@{units.escaped(self.path)}.service"
        self.mountpoint = f"/mnt/{units.escaped(self.path)}"

    def is_readable(self, mountpoint: str = "") -> bool:
        return read(self.lab, mountpoint or self.mountpoint) == self.archive


@pytest.fixture
def source(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Source]:
    source = Source(lab, request.node.name.removeprefix("test_"))
    yield source
    lab.systemctl("stop", source.unit, code=None)
    lab.systemctl("reset-failed")


def read(lab: Lab, mountpoint: str) -> bytes | str:
    """The archive that is mounted there, or what the system says of it."""
    result = lab.run("cat", f"{mountpoint}/archive.tar", code=None, text=False, errors=None)
    return result.stdout if result.returncode == 0 else result.stderr.decode()


def is_mounted(lab: Lab, mountpoint: str) -> bool:
    return lab.run("findmnt", "-t", "fuse.tartapefs", mountpoint, code=None).returncode == 0


def paths_required(lab: Lab, unit: str) -> list[str]:
    manager = "org.freedesktop.systemd1"
    bus = ["busctl", "--json=short"]
    asked = ["call", manager, "/org/freedesktop/systemd1", f"{manager}.Manager", "GetUnit", "s", unit]
    (place,) = json.loads(lab.run(*bus, *asked).stdout)["data"]
    asked = ["get-property", manager, place, f"{manager}.Unit", "RequiresMountsFor"]
    return json.loads(lab.run(*bus, *asked).stdout)["data"]  # type: ignore[no-any-return]


def main_pid(lab: Lab, unit: str, user: bool = False) -> int:
    return int(lab.show(unit, "MainPID", user=user)[0])


# As systemd reads them


def test_verify(lab: Lab) -> None:
    """systemd-analyze finds nothing to say, but does of a misspelt option."""
    lab.systemctl("daemon-reload")
    verify = ["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no"]
    system = ["mnt-tape.mount", "mnt-tape.automount", "tartapefs@srv-a.service"]
    timed = [
        f"{name}.{kind}" for name in ("tartapefs-copy@srv-a", "tartapefs-metrics") for kind in ("service", "timer")
    ]
    folder = "/etc/systemd/system/"
    result = lab.run(*verify, *(folder + name for name in system + timed))
    assert result.stderr == ""
    lab.systemctl("start", f"user@{UID}.service")
    assert lab.as_user(*verify, "--user", "/etc/systemd/user/tartapefs@srv-a.service").stderr == ""
    text = (PROJECT / "systemd" / "mnt-tape.mount").read_text()
    lab.write("/root/mnt-wrong.mount", text.replace("Options=", "Optoins=").replace(MNT, "/mnt/wrong"))
    assert "Optoins" in lab.run(*verify, "/root/mnt-wrong.mount", code=1).stderr


PRINTED = [
    [],
    ["--user"],
    ["--automount"],
    ["--options", "ro,name=x y.tar,mode=0444,allow_other,uid=5,index=/srv/a b.db"],
    ["--user", "--options", "ro,direct,audit_interval=5"],
    ["--automount", "--options", "ro,nofail,allow_other,name=x$$y.tar,x-foo=1"],
]


@pytest.mark.parametrize("options", PRINTED, ids=" ".join)
def test_verify_what_is_printed(lab: Lab, options: list[str]) -> None:
    """Systemd finds nothing to say of it, and a service has as few rights as the example."""
    lab.systemctl("start", f"user@{UID}.service")
    user = ["--user"] if "--user" in options else []
    run_ = lab.as_user if user else lab.run
    folder = run_("mktemp", "-d").stdout.strip()
    run_("tartapefs", "systemd-unit", *options, "/srv/a b", "/mnt/a tape", "--output", folder)
    names = run_("ls", folder).stdout.split()
    assert len(names) == (2 if "--automount" in options else 1)
    result = run_(
        "systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", *user, *(f"{folder}/{n}" for n in names)
    )
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("unit", "user", "figure"),
    [
        ("tartapefs@srv-a.service", False, r"exposure level of ([0-9.]+)"),
        ("tartapefs-copy@srv-a.service", False, r"copy's service is at ([0-9.]+)"),
        ("tartapefs@srv-a.service", True, r"user's service is at ([0-9.]+)"),
    ],
)
def test_security(lab: Lab, unit: str, user: bool, figure: str) -> None:
    """The figures that the documentation has."""
    documented = re.search(figure, " ".join((PROJECT / "docs" / "systemd.md").read_text().split()))
    assert documented
    lab.systemctl("start", f"user@{UID}.service")
    command = ["systemd-analyze", "security", "--no-pager", *(["--user"] if user else []), unit]
    report = (lab.as_user if user else lab.run)(*command).stdout
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", report)
    assert exposure, report
    assert float(exposure[1]) <= float(documented[1].rstrip("."))


# The service


@pytest.mark.long
def test_start_restart_stop(lab: Lab, source: Source) -> None:
    lab.systemctl("start", source.unit)
    assert source.is_readable()
    first = main_pid(lab, source.unit)
    delivered = f"valid; delivered {len(source.archive):,} bytes, 100% of the archive"
    wait_until(lambda: lab.show(source.unit, "StatusText") == [delivered])
    lab.systemctl("restart", source.unit)
    assert main_pid(lab, source.unit) != first
    assert source.is_readable()
    lab.systemctl("stop", source.unit)
    assert lab.show(source.unit, ACTIVE, "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    assert not is_mounted(lab, source.mountpoint)
    assert lab.run("ls", "-A", source.mountpoint).stdout == ""


def test_unmounted_by_hand(lab: Lab, source: Source) -> None:
    """Is an end like any other, and no failure to heal."""
    lab.systemctl("start", source.unit)
    lab.run("tartapefs", "unmount", source.mountpoint)
    wait_until(lambda: lab.show(source.unit, ACTIVE) == ["inactive"])
    assert lab.show(source.unit, "Result", "NRestarts") == ["success", "0"]


def test_killed(lab: Lab, source: Source) -> None:
    """It is started again, and heals the mount that was left behind."""
    lab.systemctl("start", source.unit)
    lab.systemctl("kill", "--signal=KILL", source.unit)
    wait_until(lambda: lab.show(source.unit, "NRestarts", ACTIVE, "SubState") == ["1", "active", "running"], 30)
    assert source.is_readable()
    assert len(lab.run("findmnt", "-n", "-t", "fuse.tartapefs", source.mountpoint).stdout.splitlines()) == 1
    healed = lab.journal("-u", source.unit, "-p", "4..4")
    assert f"{source.mountpoint}: was left behind by a daemon that is gone; unmounted it" in healed


@pytest.mark.long
def test_hangs(lab: Lab, source: Source) -> None:
    """The watchdog lets it be as long as it answers, and has it started again once it does not."""
    lab.write(f"/etc/systemd/system/{source.unit}.d/test.conf", "[Service]\nWatchdogSec=1\n")
    lab.systemctl("daemon-reload")
    lab.systemctl("start", source.unit)
    lab.run("sleep", "2.5")
    assert lab.show(source.unit, "NRestarts", ACTIVE) == ["0", "active"]
    lab.run("kill", "-STOP", str(main_pid(lab, source.unit)))
    wait_until(lambda: lab.show(source.unit, "NRestarts", ACTIVE, "SubState") == ["1", "active", "running"], 30)
    assert source.is_readable()
    assert "Watchdog timeout" in lab.journal("_PID=1")


def test_never_recorded(lab: Lab) -> None:
    """It does not start, says why in the journal, is not tried again, and above all records nothing."""
    source = Source(lab, "never-recorded", record=False)
    lab.systemctl("start", source.unit, code=1)
    assert lab.show(source.unit, ACTIVE, "Result", "ExecMainStatus") == ["failed", "exit-code", "3"]
    assert lab.show(source.unit, "NRestarts") == ["0"]
    assert f"{source.path}/.tartape/index.db: no tape here" in lab.journal("-u", source.unit, "-p", "3..3")
    assert not (source.root / ".tartape").exists()
    lab.systemctl("reset-failed")


def test_drift(lab: Lab, source: Source) -> None:
    """The mount stays, and fails; the status names the culprit; the exit status is not 0."""
    lab.systemctl("start", source.unit)
    (source.root / "photos" / "1.bin").write_bytes(b"another")
    assert "Input/output error" in read(lab, source.mountpoint)  # type: ignore[operator]
    culprit = "drift/photos/1.bin: size changed since recording"
    wait_until(lambda: f"invalid: {culprit}" in lab.show(source.unit, "StatusText")[0])
    assert f'Status: "invalid: {culprit}' in lab.systemctl("status", source.unit)
    assert lab.show(source.unit, ACTIVE, "SubState", "NRestarts") == ["active", "running", "0"]
    assert is_mounted(lab, source.mountpoint)
    assert culprit in lab.journal("-u", source.unit, "-p", "3..3")
    lab.systemctl("stop", source.unit)
    assert lab.show(source.unit, ACTIVE, "Result", "ExecMainStatus") == ["failed", "exit-code", "1"]
    assert "the folder is no longer as recorded" in lab.journal("-u", source.unit, "-p", "3..3")
    assert lab.show(source.unit, "NRestarts") == ["0"]


def test_its_options(lab: Lab, source: Source) -> None:
    settings = "[Service]\nEnvironment=MOUNTPOINT=/mnt/elsewhere 'OPTIONS=--name data.tar --mode 0444'\n"
    lab.write(f"/etc/systemd/system/{source.unit}.d/test.conf", settings)
    lab.systemctl("daemon-reload")
    lab.systemctl("start", source.unit)
    assert lab.run("stat", "-c%A", "/mnt/elsewhere/data.tar").stdout == "-r--r--r--\n"


# A user's own


@pytest.mark.long
def test_user(lab: Lab, source: Source) -> None:
    """As a normal user: started, killed and healed, stopped."""
    lab.run("chown", "-R", f"{USER}:", source.path)
    lab.systemctl("start", f"user@{UID}.service")
    lab.as_user("tartapefs", "record", "--force", source.path)
    mountpoint = f"/run/user/{UID}/tape/{units.escaped(source.path)}"
    lab.as_user("systemctl", "--user", "start", source.unit)
    assert lab.as_user("sha256sum", f"{mountpoint}/archive.tar").stdout
    lab.as_user("cp", f"{mountpoint}/archive.tar", f"{source.path}.copy", code=1)  # /srv is root's
    lab.as_user("cp", f"{mountpoint}/archive.tar", f"/home/{USER}/copy.tar")
    assert lab.run("cat", f"/home/{USER}/copy.tar", text=False, errors=None).stdout == source.archive
    assert "Permission denied" in read(lab, mountpoint)  # type: ignore[operator]
    lab.run("kill", "-KILL", str(main_pid(lab, source.unit, user=True)))
    restarted = ["1", "active", "running"]
    wait_until(lambda: lab.show(source.unit, "NRestarts", ACTIVE, "SubState", user=True) == restarted, 30)
    lab.as_user("cmp", f"{mountpoint}/archive.tar", f"/home/{USER}/copy.tar")
    lab.as_user("systemctl", "--user", "stop", source.unit)
    assert lab.show(source.unit, ACTIVE, "Result", "ExecMainStatus", user=True) == ["inactive", "success", "0"]


# Mounted by mount(8)


@pytest.mark.long
def test_automount(lab: Lab, source: Source) -> None:
    """Mounted on first use, unmounted when idle, mounted again."""
    written = run("systemd-unit", "--automount", source.path, "/mnt/first use", "--output", lab.folder)
    assert written.returncode == 0, written.stderr
    name = r"mnt-first\x20use"
    for kind in ("mount", "automount"):
        lab.run("mv", f"/srv/{name}.{kind}", "/etc/systemd/system/")
    lab.write(f"/etc/systemd/system/{name}.automount.d/test.conf", "[Automount]\nTimeoutIdleSec=1\n")
    lab.systemctl("daemon-reload")
    lab.systemctl("start", f"{name}.automount")
    for _ in range(2):
        assert not is_mounted(lab, "/mnt/first use")
        assert source.is_readable("/mnt/first use")
        assert lab.show(f"{name}.mount", ACTIVE) == ["active"]
        wait_until(lambda: lab.show(f"{name}.mount", ACTIVE, "Result") == ["inactive", "success"], 30)
    lab.systemctl("stop", f"{name}.automount")


def test_mount_unit(lab: Lab, source: Source) -> None:
    """A unit that is for what lies there has it mounted before; a killed daemon is healed by a restart."""
    for name, text in units.automount(source.path, "/mnt/unit", "ro,name=a.tar").items():
        lab.write(f"/etc/systemd/system/{name}", text)
    user = "[Unit]\nRequiresMountsFor=/mnt/unit/a.tar\n"
    user += "[Service]\nType=oneshot\nExecStart=cmp /mnt/unit/a.tar /srv/m.tar"
    lab.write("/etc/systemd/system/for-the-archive.service", user)
    (lab.folder / "m.tar").write_bytes(source.archive)
    lab.systemctl("daemon-reload")
    lab.systemctl("start", "for-the-archive.service")
    assert lab.show("mnt-unit.mount", ACTIVE) == ["active"]
    lab.systemctl("kill", "--signal=KILL", "mnt-unit.mount")
    wait_until(lambda: "not connected" in lab.run("ls", "/mnt/unit", code=None).stderr)
    lab.systemctl("restart", "mnt-unit.mount")
    lab.systemctl("start", "for-the-archive.service")
    (source.root / "photos" / "1.bin").write_bytes(b"another")
    lab.systemctl("start", "for-the-archive.service", code=1)
    assert "photos/1.bin: size changed since recording" in lab.journal("-u", "mnt-unit.mount", "-p", "3..3")
    lab.systemctl("stop", "mnt-unit.mount")
    assert not is_mounted(lab, "/mnt/unit")


def test_mount_unit_that_fails(lab: Lab) -> None:
    source = Source(lab, "unit-that-fails", record=False)
    for name, text in units.automount(source.path, "/mnt/fails", "ro").items():
        lab.write(f"/etc/systemd/system/{name}", text)
    lab.systemctl("daemon-reload")
    lab.systemctl("start", "mnt-fails.mount", code=1)
    assert "no tape here" in lab.journal("-u", "mnt-fails.mount")
    assert not (source.root / ".tartape").exists()
    lab.systemctl("reset-failed")


# Paths


@pytest.mark.long
def test_odd_paths(lab: Lab) -> None:
    """Every byte of a path arrives, in a service and, if it can have it, in a mount unit."""
    names = {}
    for number, name in enumerate(ODD):
        source = Source(lab, f"odd{number}/{name}", size=10)
        where = f"/mnt/{name}"
        shown = name.replace("{HOME}", "(HOME)")  # in an archive's name braces stand for what is known of it
        printed = units.service(["/usr/local/bin/tartapefs"], source.path, where, ["--name", shown], user=False)
        for unit, text in printed.items():
            lab.write(f"/etc/systemd/system/{unit}", text)
            names[unit] = source, where, name, shown
    lab.systemctl("daemon-reload")
    lab.systemctl("start", "--", *names)
    for unit, (source, where, name, shown) in names.items():
        found = lab.run("cat", f"{where}/{shown}", text=False, errors=None).stdout
        assert found == source.archive, unit
        (required,) = paths_required(lab, unit)
        assert required == (source.path if name.isprintable() else os.path.dirname(source.path))
    lab.systemctl("stop", "--", *names)
    mounted = 0
    for source, _, name, _ in names.values():
        where = "/mnt/" + name.replace("$", "S")
        try:
            pair = units.automount(source.path, where, "ro")
        except ValueError:
            continue
        for unit, text in pair.items():
            lab.write(f"/etc/systemd/system/{unit}", text)
        lab.systemctl("daemon-reload")
        lab.systemctl("start", "--", next(iter(pair)))
        assert read(lab, where) == source.archive, lab.journal("-n", "10")
        lab.systemctl("stop", "--", next(iter(pair)))
        mounted += 1
    assert mounted == len(ODD) - 3  # newline, tab, escape


# The timer


@pytest.mark.long
def test_copy(lab: Lab) -> None:
    """The timer starts it; killed on its way it goes on; complete it has nothing to do; zeros of a failed read go."""
    source = Source(lab, "copied", size=8 << 20)
    copies = lab.folder / "copies"
    copies.mkdir()
    unit, timer = "tartapefs-copy@srv-copied.service", "tartapefs-copy@srv-copied.timer"

    def options(text: str) -> None:
        settings = f"[Service]\nEnvironment=TO=/srv/copies 'OPTIONS={text}'\n"
        lab.write(f"/etc/systemd/system/{unit}.d/test.conf", settings)
        lab.systemctl("daemon-reload")

    def sent() -> int:
        """Bytes that the last run sent."""
        said = re.findall(r"Literal data: ([\d,]+) bytes", lab.journal("-u", unit))
        return int(said[-1].replace(",", ""))

    options("--bwlimit=2M")
    lab.write(f"/etc/systemd/system/{timer}.d/test.conf", "[Timer]\nOnActiveSec=1ms\nAccuracySec=1ms\n")
    lab.systemctl("daemon-reload")
    lab.systemctl("start", timer)
    wait_until(lambda: any(copy.stat().st_size > 1 << 20 for copy in copies.iterdir()), 30)
    (copy,) = copies.iterdir()
    lab.systemctl("kill", "--signal=KILL", unit)
    wait_until(lambda: lab.show(unit, ACTIVE) == ["failed"])
    part = copy.stat().st_size
    assert 1 << 20 < part < len(source.archive)
    lab.systemctl("stop", timer)
    fingerprint = lab.run("tartapefs", "info", source.path).stdout.partition("fingerprint")[2].split()[0]
    assert copy.name == f"{fingerprint}.tar"
    options("--stats")
    lab.systemctl("start", unit)
    assert copy.read_bytes() == source.archive
    assert sent() < len(source.archive) - part + (64 << 10), "it goes on, but for a block"
    lab.systemctl("start", unit)
    assert sent() == 0
    # Reads that fail make rsync write zeros; the size is right in the end, but the next run is not deceived.
    with open(copy, "r+b") as file:
        file.truncate(part)
    moved = source.root / "photos" / "1.bin"
    before = moved.parent.stat()
    moved.rename(lab.folder / "away")
    lab.systemctl("start", unit, code=1)
    assert lab.show(unit, "ExecMainStatus") == ["23"]
    (lab.folder / "away").rename(moved)
    os.utime(moved.parent, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.write_bytes(source.archive[:part].ljust(len(source.archive), b"\0"))
    lab.run("tartapefs", "record", "--force", source.path)  # a new change time, and the same fingerprint
    lab.systemctl("restart", source.unit)
    lab.systemctl("start", unit)
    assert copy.read_bytes() == source.archive
    assert list(copies.iterdir()) == [copy]
    lab.systemctl("stop", source.unit)


@pytest.mark.long
def test_boot(tmp_path: Path) -> None:
    """What was recorded is mounted before who needs it, by a service, a unit, or fstab; nothing is recorded."""
    folder = tmp_path / "srv"
    folder.mkdir()
    archives = {}
    for name in ("service", "unit", "fstab", "never"):
        (folder / name).mkdir()
        (folder / name / "file").write_bytes(os.urandom(10_000))
        if name != "never":
            assert run("record", folder / name).returncode == 0
        reference = Reference(folder / name)
        archives[name] = reference.read(0, reference.size)
    for unit, text in units.automount("/srv/unit", "/mnt/srv-unit", "ro").items():
        (folder / unit).write_text(text)
    for name, needs in {
        "service": "Requires=tartapefs@srv-service.service\nAfter=tartapefs@srv-service.service",
        "unit": "RequiresMountsFor=/mnt/srv-unit",
        "fstab": "",
    }.items():
        copying = f"[Service]\nType=oneshot\nExecStart=cp /mnt/srv-{name}/archive.tar /srv/{name}.tar\n"
        (folder / f"copy-{name}.service").write_text(
            f"[Unit]\n{needs}\n{copying}[Install]\nWantedBy=multi-user.target\n"
        )
    prepare = """
    mv /srv/*.service /srv/*.mount /srv/*.automount /etc/systemd/system/
    systemctl enable -q tartapefs@srv-service.service tartapefs@srv-never.service "mnt-srv\\\\x2dunit.automount"
    systemctl enable -q copy-service.service copy-unit.service copy-fstab.service
    options=ro,nofail,x-systemd.automount,x-systemd.idle-timeout=2
    echo "/srv/fstab /mnt/srv-fstab tartapefs $options 0 0" > /etc/fstab
    """
    with booted(folder, prepare) as lab:
        for name in ("service", "unit", "fstab"):
            assert (folder / f"{name}.tar").read_bytes() == archives[name], lab.journal("-u", f"copy-{name}")
        assert lab.show("tartapefs@srv-never.service", ACTIVE) == ["failed"]
        assert lab.show(r"mnt-srv\x2dunit.automount", ACTIVE) == ["active"]
        assert lab.show(r"mnt-srv\x2dfstab.automount", ACTIVE) == ["active"]
        wait_until(lambda: lab.show(r"mnt-srv\x2dfstab.mount", ACTIVE, "Result") == ["inactive", "success"], 30)
        assert read(lab, "/mnt/srv-fstab") == archives["fstab"]
    assert not (folder / "never" / ".tartape").exists()


def test_the_lab_leaves_nothing(tmp_path: Path) -> None:
    """No process, cgroup or mount, though an archive is mounted inside and has a reader."""
    folder = tmp_path / "srv"
    folder.mkdir(mode=0o755)
    with booted(folder) as lab:
        source = Source(lab, "left")
        lab.systemctl("start", source.unit)
        cgroup = lab.cgroup
        reading = f"exec <{source.mountpoint}/archive.tar; sleep 1000"
        reader = subprocess.Popen(["nsenter", "-t", str(lab.init), "-m", "-p", "sh", "-c", reading])
        wait_until(lambda: lab.run("pgrep", "-x", "sleep", code=None).returncode == 0)
        pids = [int(line) for path in cgroup.rglob("cgroup.procs") for line in path.read_text().split()]
        assert len(pids) > 3
    reader.wait(60)
    assert not cgroup.exists()
    assert os.fspath(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    wait_until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()])


@pytest.mark.long
def test_drift_starts_another_unit_and_holds_until_the_service_stops(lab: Lab, source: Source) -> None:
    """By a printed unit, whose options are mount(8)'s. The mount has the fingerprint's name."""
    where, noted, said, go = "/mnt/held", "/srv/held-noted", "/srv/held-said", "/srv/held-go"
    lab.write("/etc/systemd/system/note.service", f"[Service]\nType=oneshot\nExecStart=touch {noted}\n")
    command = 'systemctl --no-block start note.service && test "$TARTAPEFS_MOUNTPOINT" = ' + where
    options = f"on_drift=hold,on_drift_run={command.replace(chr(34), chr(92) + chr(34))},name={{fingerprint}}.tar"
    lab.run("tartapefs", "systemd-unit", source.path, where, "--options", options, "--output", "/etc/systemd/system")
    lab.systemctl("daemon-reload")
    unit = "tartapefs-mnt-held.service"
    lab.systemctl("start", unit)
    script = (
        f"exec < $(echo {where}/*.tar); touch {said}; until test -e {go}; do sleep 0.1; done; head -c 9999 2> {said}"
    )
    lab.run("systemd-run", "--unit=held-reader", "sh", "-c", script)
    wait_until(lambda: lab.run("test", "-e", said, code=None).returncode == 0)
    (source.root / "photos" / "1.bin").write_bytes(b"changed")
    lab.run("touch", go)
    wait_until(lambda: "1 held by that" in lab.show(unit, "StatusText")[0])
    wait_until(lambda: lab.run("test", "-e", noted, code=None).returncode == 0)
    lab.systemctl("stop", unit)
    wait_until(lambda: "Input/output error" in lab.run("cat", said).stdout)
    assert "failed with exit code" not in lab.journal("-u", unit)


def test_metrics_by_a_timer(lab: Lab, source: Source) -> None:
    """In the folder of the node exporter, put in place whole."""
    unit = "tartapefs-metrics.service"
    lab.run("mkdir", "-p", "/srv/metrics")
    lab.write(f"/etc/systemd/system/{unit}.d/test.conf", "[Service]\nEnvironment=FOLDER=/srv/metrics\n")
    lab.systemctl("daemon-reload")
    lab.systemctl("start", source.unit)
    lab.systemctl("start", unit)
    assert lab.run("ls", "/srv/metrics").stdout == "tartapefs.prom\n"
    text = lab.run("cat", "/srv/metrics/tartapefs.prom").stdout
    valid = f'tartapefs_valid{{mountpoint="{source.mountpoint}",source="{source.path}"}} 1'
    assert valid in text.splitlines() and text.endswith("# EOF\n")
