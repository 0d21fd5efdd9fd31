"""Mounting by mount(8), with the real program: the forms, fstab, options, refusals, and users other than root."""

import json
import os
import re
import stat

import pytest
from support.machine import Machine
from support.programs import wait_until
from support.users import NOBODY

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("mount.fuse3", "nsenter", "setpriv", "findmnt")]
FORMS = ["tartapefs", "fuse.tartapefs", "fuse"]


def spec(form: str, source: object) -> str:
    return f"tartapefs#{source}" if form == "fuse" else str(source)


class TestByRoot:
    @pytest.mark.parametrize("form", FORMS)
    def test_all_forms(self, machine: Machine, form: str) -> None:
        """The archive can be read at once; findmnt shows the source's path and the type; umount ends it."""
        result = machine.root("mount", "-t", form, "-o", "ro", spec(form, machine.data), machine.mountpoint)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert machine.is_served(machine.root)
        (line,) = machine.mounted()
        source, fstype, options = line.split(" ")
        assert (source, fstype) == (str(machine.data), "fuse.tartapefs")
        assert {"ro", "nosuid", "nodev", "noexec", "default_permissions"} <= set(options.split(","))
        assert "Permission denied" in machine.user("cat", machine.mountpoint / "archive.tar").stderr
        assert machine.root("umount", machine.mountpoint).returncode == 0
        assert machine.mounted() == []
        wait_until(lambda: not machine.daemons())

    @pytest.mark.long(but=4)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("options", ["rw", "defaults", "ro,rw", "defaults,nofail,user", None])
    def test_who_asks_to_write_is_told(self, machine: Machine, form: str, options: str | None) -> None:
        """As `mount` tells of any medium that cannot be written: one line, and it is mounted read-only."""
        asked = ["-o", options] if options else []
        result = machine.root("mount", "-t", form, *asked, spec(form, machine.data), machine.mountpoint)
        line = f"tartapefs: {machine.mountpoint}: WARNING: source write-protected, mounted read-only\n"
        assert (result.returncode, result.stderr) == (0, line)
        assert machine.is_served(machine.root) and "ro," in machine.mounted()[0]

    def test_a_line_in_fstab_with_defaults(self, machine: Machine) -> None:
        machine.fstab(f"{machine.data} {machine.mountpoint} tartapefs defaults 0 0")
        result = machine.root("mount", "-a")
        assert (result.returncode, result.stderr.count("\n")) == (0, 1) and "mounted read-only" in result.stderr
        assert machine.root("mount", "-a").stderr == "" and machine.is_served(machine.root)

    @pytest.mark.long(but=3)
    @pytest.mark.parametrize(
        "option", ["private", "X-mount.mkdir", "sync", "nosymfollow", "lazytime", "group", "silent", "noiversion"]
    )
    def test_what_every_file_system_takes(self, machine: Machine, option: str) -> None:
        command = ["mount", "-t", "tartapefs", "-o", f"ro,{option}", machine.data, machine.mountpoint]
        result = machine.root(*command)
        assert (result.returncode, result.stderr) == (0, "") and machine.is_served(machine.root)

    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("form", FORMS)
    def test_options_by_their_usual_names(self, machine: Machine, form: str) -> None:
        os.rename(machine.data / ".tartape" / "index.db", machine.folder / "index.db")
        options = (
            f"ro,allow_other,uid={NOBODY},gid=4242,mode=0440,name=x.tar,index={machine.folder}/index.db,source_check=mtime"
            ",direct,audit_interval=5,nofail,_netdev,user,noauto,x-systemd.automount,x-foo=1,noatime"
        )
        result = machine.root("mount", "-t", form, "-o", options, spec(form, machine.data), machine.mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        found = machine.user("stat", "-c", "%u %g %f", machine.mountpoint / "x.tar").stdout.split()
        assert found == [str(NOBODY), "4242", f"{stat.S_IFREG | 0o440:x}"]
        assert machine.is_served(machine.user, "x.tar")
        other = ("setpriv", "--reuid=4243", "--regid=4243", "--clear-groups", "cat", machine.mountpoint / "x.tar")
        assert "Permission denied" in machine.root(*other).stderr

    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("form", FORMS)
    def test_bad_options(self, machine: Machine, form: str) -> None:
        """One line that names the option, and the exit code for an incorrect invocation."""
        for options, reason in (
            ("ro,colour=red", "unknown option: colour"),
            ("ro,record", "unknown option: record"),
            ("ro,mode=9", ".*'9' is not a mode in octal.*"),
            ("ro,uid=no-such-user", ".*'no-such-user' is not known on this machine"),
            ("ro,source_check=never", ".*never.*full.*mtime.*"),
        ):
            result = machine.root("mount", "-t", form, "-o", options, spec(form, machine.data), machine.mountpoint)
            assert result.returncode == 1
            (line,) = result.stderr.splitlines()
            assert re.fullmatch(f"tartapefs: {reason}", line)
            assert machine.mounted() == []

    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("form", FORMS)
    def test_what_cannot_be_mounted(self, machine: Machine, form: str) -> None:
        """No tape, a damaged one, no mount point: one line with the reason, and the exit code for a failed mount."""

        def reason(source: object, mountpoint: object) -> str:
            result = machine.root("mount", "-t", form, "-o", "ro", spec(form, source), mountpoint)
            assert result.returncode == 32
            (line,) = result.stderr.splitlines()
            assert line.startswith("tartapefs: ")
            return line

        assert "no such folder" in reason(machine.data, machine.folder / "nowhere")
        bare = machine.folder / "bare"
        bare.mkdir()
        assert f'no tape here; run "tartapefs record {bare}" first' in reason(bare, machine.mountpoint)
        assert list(bare.iterdir()) == []  # nothing was recorded by the way
        assert "no tape here" in reason(machine.folder / "gone", machine.mountpoint)
        elsewhere = machine.root("mount", "-t", "tartapefs", "-o", "ro,index=/no/where", bare, machine.mountpoint)
        assert f'/no/where: no tape here; run "tartapefs record {bare} --index /no/where" first' in elsewhere.stderr
        (machine.data / ".tartape" / "index.db").write_bytes(b"no index")
        assert "not a usable tape index" in reason(machine.data, machine.mountpoint)
        assert machine.mounted() == []

    @pytest.mark.long
    def test_the_flags_of_mount(self, machine: Machine) -> None:
        """-f looks, and mounts nothing; -s passes over unknown options; -n and -v change nothing."""

        def mount(*arguments: object) -> int:
            return machine.root("mount", "-t", "tartapefs", *arguments, machine.mountpoint).returncode

        assert mount("-f", "-o", "ro", machine.data) == 0
        assert machine.mounted() == []
        assert mount("-f", "-o", "ro", machine.folder) == 32
        assert mount("-f", "-o", "ro,colour=red", machine.data) == 1
        assert mount("-s", "-n", "-v", "-o", "ro,colour=red", machine.data) == 0
        assert machine.is_served(machine.root)

    def test_a_drifted_source_is_mounted_and_fails(self, machine: Machine) -> None:
        """The mount stays: an empty folder in its place could be taken for a deletion."""
        (machine.data / "new").touch()
        command = ("mount", "-t", "tartapefs", "-o", "ro", machine.data, machine.mountpoint)
        assert machine.root(*command).returncode == 0
        archive = machine.mountpoint / "archive.tar"
        assert "Input/output error" in machine.root("cat", archive).stderr
        status = machine.root("/usr/local/bin/tartapefs", "status", machine.mountpoint)
        assert status.returncode == 1
        assert "data: mtime changed" in status.stdout
        assert machine.mounted() != []

    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("name", ["a b,c", '\\ \t"\N{SNOWMAN}#'])
    def test_fstab(self, machine: Machine, form: str, name: str) -> None:
        """A line for `mount MNT` and `mount -a`, whatever the name; a second `mount -a` has nothing to do."""
        source = machine.folder / name
        machine.data.rename(source)
        assert machine.root("/usr/local/bin/tartapefs", "record", "--force", source).returncode == 0
        written = str(spec(form, source))
        for character in '\\ \t"':
            written = written.replace(character, f"\\{ord(character):03o}")
        options = "ro,nofail,_netdev,x-systemd.automount,x-systemd.idle-timeout=60"
        machine.fstab(f"{written} {machine.mountpoint} {form} {options} 0 0")
        for command in (("mount", machine.mountpoint), ("mount", "-a")):
            result = machine.root(*command)
            assert (result.returncode, result.stderr) == (0, "")
            shown = machine.root("findmnt", "-n", "-J", "-o", "SOURCE", "--mountpoint", machine.mountpoint)
            assert json.loads(shown.stdout)["filesystems"] == [{"source": str(source)}]
            if form != "fuse":  # where libmount cannot tell that the two are one
                again = machine.root("mount", "-a")
                assert (again.returncode, again.stderr) == (0, "")
            assert machine.root("umount", machine.mountpoint).returncode == 0

    def test_a_line_of_fstab_that_fails_does_so_with_its_reason(self, machine: Machine) -> None:
        machine.fstab(f"{machine.folder} {machine.mountpoint} tartapefs ro 0 0")
        result = machine.root("mount", "-a")
        assert result.returncode == 32
        assert "no tape here" in result.stderr

    def test_a_place_left_behind_by_a_killed_daemon(self, machine: Machine) -> None:
        command = ("mount", "-t", "tartapefs", "-o", "ro", machine.data, machine.mountpoint)
        assert machine.root(*command).returncode == 0
        (pid,) = machine.daemons()
        os.kill(pid, 9)
        wait_until(lambda: "not connected" in machine.root("ls", machine.mountpoint).stderr)
        result = machine.root(*command)
        assert result.returncode == 0, result.stderr
        assert machine.is_served(machine.root)


class TestByOthers:
    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("form", FORMS)
    def test_a_line_of_fstab_for_users(self, machine: Machine, form: str) -> None:
        """With the option user anybody mounts what is theirs; only who mounted reads and unmounts, not even root."""
        machine.fstab(f"{spec(form, machine.data)} {machine.mountpoint} {form} ro,noauto,user 0 0")
        result = machine.user("mount", machine.mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        assert machine.is_served(machine.user)
        assert "Permission denied" in machine.root("cat", machine.mountpoint / "archive.tar").stderr
        (line,) = machine.mounted()
        assert f"user_id={NOBODY}" in line
        other = ("setpriv", "--reuid=4242", "--regid=4242", "--clear-groups")
        assert machine.root(*other, "umount", machine.mountpoint).returncode != 0
        result = machine.user("umount", machine.mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        wait_until(lambda: not machine.daemons())

    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("form", ["tartapefs", "fuse.tartapefs"])
    def test_allow_other_is_for_the_administrator_to_allow(self, machine: Machine, form: str) -> None:
        (machine.folder / "fuse.conf").write_text("# nothing\n")
        assert machine.root("mount", "--bind", machine.folder / "fuse.conf", "/etc/fuse.conf").returncode == 0
        machine.fstab(f"{machine.data} {machine.mountpoint} {form} ro,noauto,user,allow_other,mode=444 0 0")
        result = machine.user("mount", machine.mountpoint)
        assert result.returncode == 32
        (line,) = result.stderr.splitlines()
        assert line.startswith("tartapefs: ")
        assert "user_allow_other" in line
        (machine.folder / "fuse.conf").write_text("user_allow_other\n")
        assert machine.user("mount", machine.mountpoint).returncode == 0
        assert machine.is_served(machine.root)
        assert machine.user("umount", machine.mountpoint).returncode == 0
