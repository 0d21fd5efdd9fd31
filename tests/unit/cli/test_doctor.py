"""`tartapefs doctor`: on a machine that works, and on one where each thing in turn is broken."""

import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.machine import Machine
from support.programs import run, wait_until
from support.reference import Reference
from support.users import User

from tartapefs import Tape, TapePlayer, TapeRecorder
from tartapefs.cli.doctor import _read_with_tarfile

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("nsenter", "setpriv", "fusermount3", "tar")]
SELF_TEST = ["record", "mount", "tarfile", "GNU tar", "unmount"]
Findings = dict[str, dict[str, str]]


def doctor(run: Callable[..., subprocess.CompletedProcess[str]], *arguments: object) -> tuple[int, Findings]:
    """The exit code, and the findings by their check; of several for one check the worst."""
    result = run("/usr/local/bin/tartapefs", "doctor", "--json", *arguments)
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["usable"] == (result.returncode == 0)
    order = ["ok", "warning", "problem"]
    findings = sorted(report["findings"], key=lambda finding: order.index(finding["status"]))
    assert all(finding["found"] and (finding["status"] == "ok") == (not finding["remedy"]) for finding in findings)
    return result.returncode, {finding["check"]: finding for finding in findings}


def bad(findings: Findings) -> dict[str, str]:
    return {name: finding["status"] for name, finding in findings.items() if finding["status"] != "ok"}


def facts(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """What would tell of a change; not the time of the last access, which reading moves."""
    found = [(path, path.lstat()) for path in sorted([folder, *folder.rglob("*")])]
    return [(f"{path}", now.st_ino, now.st_mode, now.st_size, now.st_ctime_ns) for path, now in found]


def test_a_machine_that_works(machine: Machine) -> None:
    """Every check is ok, for root and for a user but what only the administrator can allow."""
    code, findings = doctor(machine.root)
    assert (code, bad(findings)) == (0, {})
    expected = ["kernel", "/dev/fuse", "rights", "libfuse", "fusermount3", "/etc/fuse.conf", "mounts", "mount(8)"]
    assert set(expected) == set(findings)
    (machine.folder / "fuse.conf").write_text("# nothing\n")
    machine.root("mount", "--bind", machine.folder / "fuse.conf", "/etc/fuse.conf").check_returncode()
    code, findings = doctor(machine.user)
    assert (code, bad(findings)) == (0, {"/etc/fuse.conf": "warning"})
    assert "user_allow_other" in findings["/etc/fuse.conf"]["remedy"]
    (machine.folder / "fuse.conf").write_text("mount_max = 3\n user_allow_other \n")
    assert bad(doctor(machine.user)[1]) == {}


def test_text_has_a_line_for_each_finding_and_one_for_each_remedy(machine: Machine) -> None:
    machine.root("umount", "/usr/local/bin")
    result = machine.root(machine.folder / "bin" / "tartapefs", "doctor")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert sum(line.startswith("ok ") for line in lines) == 8
    (at,) = [number for number, line in enumerate(lines) if line.startswith("warning ")]
    assert "mount(8)" in lines[at]
    assert lines[at + 1].strip().startswith("remedy: ln -s ")
    assert len(lines) == 10


class TestSelfTest:
    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("who", ["root", "user"])
    def test_it_passes_and_writes_nothing_to_the_folder(self, machine: Machine, who: str) -> None:
        before = facts(machine.data)
        run = machine.root if who == "root" else machine.user
        (machine.folder / "scratch").mkdir()
        os.chmod(machine.folder / "scratch", 0o777)
        code, findings = doctor(lambda *command: run("env", f"TMPDIR={machine.folder}/scratch", *command), machine.data)
        assert (code, [name for name in findings if name in SELF_TEST]) == (0, SELF_TEST)
        assert facts(machine.data) == before
        assert list((machine.folder / "scratch").iterdir()) == []

    @pytest.mark.long
    def test_of_a_folder_that_nobody_can_write(self, machine: Machine) -> None:
        """Without a recording in it, on a disk that is read-only."""
        subprocess.run(["rm", "-r", machine.data / ".tartape"], check=True)
        machine.root("mount", "--bind", machine.data, machine.data).check_returncode()
        machine.root("mount", "-o", "remount,bind,ro", machine.data).check_returncode()
        try:
            assert doctor(machine.user, machine.data)[0] == 0
        finally:
            machine.root("umount", machine.data).check_returncode()

    @pytest.mark.long
    def test_what_cannot_be_recorded(self, machine: Machine) -> None:
        (machine.data / ("x" * 101)).touch()
        code, findings = doctor(machine.root, machine.data)
        assert (code, bad(findings)) == (1, {"record": "problem"})
        assert "mount" not in findings

    @pytest.mark.long
    def test_what_cannot_be_mounted(self, machine: Machine) -> None:
        machine.root("mount", "--bind", "/dev/null", "/dev/fuse").check_returncode()
        code, findings = doctor(machine.root, machine.data)
        assert (code, bad(findings)) == (1, {"/dev/fuse": "problem", "mount": "problem"})
        assert findings["record"]["status"] == "ok"

    @pytest.mark.long
    @pytest.mark.parametrize("trouble", ["touch $DATA/new", "exit 1", "echo bsdtar; exit 0", "rm $0; exit 0"])
    def test_a_tar_that_finds_a_difference(self, machine: Machine, trouble: str) -> None:
        """Another program, one that fails, none any more, and a change meanwhile, which is named; all is cleaned up."""
        fake = machine.folder / "fake"
        (fake / "scratch").mkdir(parents=True)
        (fake / "tar").write_text(f'#!/bin/sh\nDATA={machine.data}\n{trouble}\nexec /usr/bin/tar "$@"\n')
        (fake / "tar").chmod(0o755)
        environment = ("env", f"PATH={fake}", f"TMPDIR={fake}/scratch")
        links = ["umount", "sh", "env", "rm", "touch", "stat"]
        machine.root("ln", "-s", *(f"/usr/bin/{name}" for name in links), fake).check_returncode()
        code, findings = doctor(lambda *command: machine.root(*environment, *command), machine.data)
        assert code == 1
        assert findings["GNU tar"]["status"] == "problem"
        assert ("data: mtime changed" in findings["GNU tar"]["found"]) == ("touch" in trouble)
        assert findings["unmount"]["status"] == "ok"
        assert list((fake / "scratch").iterdir()) == []

    @pytest.mark.long
    @pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143)])
    def test_an_interrupt_leaves_nothing(self, machine: Machine, name: str, code: int) -> None:
        fake = machine.folder / "fake"
        (fake / "scratch").mkdir(parents=True)
        (fake / "tar").write_text(f"#!/bin/sh\nkill -{name} $PPID\nsleep 1\n")
        (fake / "tar").chmod(0o755)
        environment = ("env", f"PATH={fake}:{os.environ['PATH']}", f"TMPDIR={fake}/scratch")
        result = machine.root(*environment, "/usr/local/bin/tartapefs", "doctor", machine.data)
        assert result.returncode == code
        assert "tarfile" in result.stdout
        assert list((fake / "scratch").iterdir()) == []
        assert str(fake) not in machine.root("cat", "/proc/self/mountinfo").stdout

    def test_wrong_folders(self, tmp_path: Path) -> None:
        assert run("doctor", tmp_path / "none").returncode == 2
        result = run("doctor", tmp_path, env=os.environ | {"TMPDIR": str(tmp_path)})
        assert result.returncode == 2
        assert "TMPDIR" in result.stderr


class TestReadingBack:
    """The comparison with what `tarfile` finds tells each kind of wrong archive."""

    @pytest.fixture
    def recorded(self, tree: Path) -> Iterator[tuple[bytes, dict[bytes, int], Callable[[bytes], str]]]:
        TapeRecorder(tree).commit()
        reference = Reference(tree)
        with Tape.discover(tree) as tape:
            player = TapePlayer(tape, tree)

            def read(archive: bytes) -> str:
                wrong = tree.parent / "wrong.tar"
                wrong.write_bytes(archive)
                return _read_with_tarfile(str(wrong), tape, player)

            yield reference.read(0, reference.size), reference.starts, read
            player.close()

    def test_the_right_one(self, recorded: tuple[bytes, dict[bytes, int], Callable[[bytes], str]]) -> None:
        archive, starts, read = recorded
        assert read(archive) == f"{len(starts)} members, as recorded"

    @pytest.mark.parametrize("wrong", ["byte", "end", "name", "size", "less", "more", "cut"])
    def test_a_wrong_one(self, recorded: tuple[bytes, dict[bytes, int], Callable[[bytes], str]], wrong: str) -> None:
        archive, starts, read = recorded
        body = starts[b"data/photos/5000.bin"] + 512
        last = max(starts.values())
        match wrong:
            case "byte":
                archive = archive[:body] + bytes([archive[body] ^ 1]) + archive[body + 1 :]
            case "end":
                archive = archive[: body + 4999] + bytes([archive[body + 4999] ^ 1]) + archive[body + 5000 :]
            case "name":
                archive = archive.replace(b"data/photos/511.bin", b"data/photos/512.bin")
            case "size":  # one byte less, in as many blocks
                header = bytearray(archive[body - 512 : body])
                header[124:135] = b"%011o" % 4999
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
                archive = archive[: body - 512] + header + archive[body:]
            case "less":
                archive = archive[:last] + bytes(1024)
            case "more":
                archive = archive[:-1024] + archive[last:]
            case "cut":
                archive = archive[: body + 100]
        with pytest.raises((OSError, tarfile.TarError)):
            read(archive)


class TestBroken:
    """Each thing in turn; the remedy, where it is a command, is run and helps."""

    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("how", ["none", "closed", "file"])
    def test_the_device(self, machine: Machine, how: str) -> None:
        match how:
            case "none":
                machine.root("sh", "-c", "mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3").check_returncode()
            case "closed":
                machine.root("chmod", "600", "/dev/fuse").check_returncode()
            case "file":
                machine.root("mount", "--bind", machine.folder / "fstab", "/dev/fuse").check_returncode()
                (machine.folder / "fstab").chmod(0o666)
        code, findings = doctor(machine.user)
        assert code == 1
        assert bad(findings)["/dev/fuse"] == "problem"

    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("how", ["none", "no setuid", "nosuid", "no_new_privs"])
    def test_fusermount(self, machine: Machine, how: str) -> None:
        """A problem for users, no more than a warning for root; and a user cannot mount then."""
        where = machine.root("realpath", "/usr/bin/fusermount3").stdout.strip()
        before: list[object] = []
        match how:
            case "none":
                machine.root("mount", "--bind", "/dev/null", where).check_returncode()
            case "no setuid":
                machine.root("cp", where, machine.folder / "copy").check_returncode()
                machine.root("mount", "--bind", machine.folder / "copy", where).check_returncode()
            case "nosuid":
                machine.root("mount", "--bind", where, where).check_returncode()
                machine.root("mount", "-o", "remount,bind,nosuid", where).check_returncode()
            case "no_new_privs":
                before = ["setpriv", "--no-new-privs"]
        code, findings = doctor(lambda *command: machine.user(*before, *command))
        assert (code, bad(findings)["fusermount3"]) == (1, "problem")
        code, findings = doctor(lambda *command: machine.root(*before, *command))
        assert (code, bad(findings)) == (0, {"fusermount3": "warning"})
        mount = ("/usr/local/bin/tartapefs", "mount", machine.data, machine.mountpoint)
        assert machine.user(*before, *mount).returncode == 5

    def test_no_right_to_mount(self, machine: Machine) -> None:
        """As in a container that was not given it."""
        without = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
        code, findings = doctor(lambda *command: machine.root(*without, *command))
        assert (code, bad(findings)) == (1, {"rights": "problem"})
        mount = ("/usr/local/bin/tartapefs", "mount", machine.data, machine.mountpoint)
        result = machine.root(*without, *mount)
        assert result.returncode == 5
        assert len(result.stderr.splitlines()) == 1

    def test_no_library(self, machine: Machine) -> None:
        """Every other check is made, and every command but those on mounts works."""
        script = "for file in /usr/lib/*/libfuse*.so.* /lib/*/libfuse*.so.*; do mount --bind /dev/null $file; done"
        machine.root("sh", "-c", script)
        code, findings = doctor(machine.root)
        assert (code, bad(findings)["libfuse"]) == (1, "problem")
        assert findings["libfuse"]["remedy"] == "apt install fuse3"
        assert {"kernel", "/dev/fuse", "fusermount3", "mount(8)"} <= set(findings)
        assert machine.root("/usr/local/bin/tartapefs", "verify", machine.data).returncode == 0

    @pytest.mark.long
    def test_a_mount_whose_daemon_was_killed(self, machine: Machine) -> None:
        assert machine.root("mount", "-t", "tartapefs", "-o", "ro", machine.data, machine.mountpoint).returncode == 0
        assert bad(doctor(machine.root)[1]) == {}
        (pid,) = machine.daemons()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "not connected" in machine.root("ls", machine.mountpoint).stderr)
        code, findings = doctor(machine.root)
        assert (code, bad(findings)) == (1, {"mounts": "problem"})
        assert str(machine.mountpoint) in findings["mounts"]["found"]
        assert machine.root("sh", "-c", findings["mounts"]["remedy"]).returncode == 0
        assert bad(doctor(machine.root)[1]) == {}

    @pytest.mark.long
    def test_a_mount_whose_daemon_hangs(self, machine: Machine) -> None:
        assert machine.root("mount", "-t", "tartapefs", "-o", "ro", machine.data, machine.mountpoint).returncode == 0
        (pid,) = machine.daemons()
        os.kill(pid, signal.SIGSTOP)
        try:
            code, findings = doctor(machine.root)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (code, bad(findings)) == (1, {"mounts": "problem"})
        assert "does not answer" in findings["mounts"]["found"]

    def test_what_mount_does_not_find(self, machine: Machine) -> None:
        """Whatever the PATH of who asks."""
        machine.root("umount", "/usr/local/bin").check_returncode()
        machine.root("rm", "/sbin/mount.tartapefs").check_returncode()
        here = machine.folder / "bin"
        command = ("env", f"PATH={here}:/usr/bin:/bin", here / "tartapefs", "doctor", "--json")
        report = json.loads(machine.root(*command).stdout)
        found = [finding for finding in report["findings"] if finding["check"] == "mount(8)"]
        assert [finding["status"] for finding in found] == ["warning", "warning"]
        assert [finding["remedy"].split()[-1] for finding in found] == ["/usr/local/bin/", "/sbin/"]


def test_a_user_without_anything(user: User) -> None:
    """The program as `python -m tartapefs`, before an administrator has done anything: usable, with warnings."""
    result = user.tartapefs("doctor", "--json")
    assert result.returncode == 0, result.stdout
    assert {f["check"] for f in json.loads(result.stdout)["findings"] if f["status"] == "warning"} >= {"mount(8)"}
