"""Where namespaces and rights are the point: a namespace of a user's own, and a root folder as a container has it."""

import shlex
import subprocess

import pytest
from support.machine import Machine, root_folder
from support.programs import wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("unshare", "nsenter", "setpriv", "chroot")]
# What a container's root has by default; CAP_SYS_ADMIN is not among it.
DEFAULT = "chown,dac_override,fowner,fsetid,kill,setgid,setuid,setpcap,net_bind_service,net_raw,sys_chroot,mknod"


def in_namespace(machine: Machine, script: str) -> subprocess.CompletedProcess[str]:
    """The script by the user as root of a user namespace; $1 is the folder, $2 the mount point."""
    return machine.user("unshare", "-rm", "sh", "-euc", script, "sh", machine.data, machine.mountpoint)


class TestUserNamespace:
    def test_mount_read_and_unmount(self, machine: Machine) -> None:
        """Without fusermount3: root of the namespace mounts; nobody outside sees it."""
        where = machine.root("realpath", "/usr/bin/fusermount3").stdout.strip()
        machine.root("mount", "--bind", "/dev/null", where).check_returncode()
        script = f"""
            tartapefs mount "$1" "$2"
            cmp "$2/archive.tar" {machine.folder}/expected.tar
            stat -c '%u %a' "$2/archive.tar"
            findmnt -n -o FSTYPE,OPTIONS "$2"
            nsenter --mount=/proc/$PPID/ns/mnt ls -A "$2" || true
            tartapefs unmount "$2"
            ls -A "$2"
        """
        result = in_namespace(machine, script)
        assert (result.returncode, machine.mounted()) == (0, []), result.stderr
        owner, shown = result.stdout.splitlines()
        assert owner == "0 400"
        assert shown.startswith("fuse.tartapefs ro,nosuid,nodev,noexec")
        wait_until(lambda: not machine.daemons())

    @pytest.mark.parametrize("form", ["tartapefs", "fuse.tartapefs"])
    def test_mount8(self, machine: Machine, form: str) -> None:
        script = f"""
            mount -t {form} -o ro "$1" "$2"
            cmp "$2/archive.tar" {machine.folder}/expected.tar
            umount "$2"
        """
        result = in_namespace(machine, script)
        assert (result.returncode, result.stderr) == (0, "")
        wait_until(lambda: not machine.daemons())

    def test_doctor(self, machine: Machine) -> None:
        result = in_namespace(machine, 'tartapefs doctor "$1"')
        assert (result.returncode, result.stderr) == (0, ""), result.stdout
        assert "problem" not in result.stdout

    def test_a_user_who_is_not_root_of_it(self, machine: Machine) -> None:
        """Without fusermount3 nobody else mounts: exit code 5 and one line, with nothing left behind."""
        where = machine.root("realpath", "/usr/bin/fusermount3").stdout.strip()
        machine.root("mount", "--bind", "/dev/null", where).check_returncode()
        result = machine.user("unshare", "-cm", "tartapefs", "mount", machine.data, machine.mountpoint)
        assert result.returncode == 5
        assert len(result.stderr.splitlines()) == 1
        assert machine.daemons() == []


class Container:
    """That root folder, processes of its own, and only some rights."""

    def __init__(self, machine: Machine, device: bool, rights: str) -> None:
        self.machine, self.rights, self.root = machine, rights, root_folder(machine)
        if device:
            script = "touch $1/dev/fuse && mount --bind /dev/fuse $1/dev/fuse"
            machine.root("sh", "-c", script, "sh", self.root).check_returncode()

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        limited = ["setpriv", f"--bounding-set=-all,{self.rights}", f"--inh-caps=-all,{self.rights}"]
        inside = shlex.join(["chroot", str(self.root), *limited, "sh", "-euc", script])
        inner = f"mount -t proc proc {self.root}/proc; exec {inside}"
        return self.machine.root("unshare", "-mpf", "sh", "-c", inner)


class TestContainer:
    SCRIPT = "export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin; mkdir /tmp/mnt; "

    def container(self, machine: Machine, device: bool = True, more: str = ",+sys_admin") -> Container:
        rights = ",".join(f"+{name}" for name in DEFAULT.split(",")) + more
        return Container(machine, device, rights)

    def test_with_the_device_and_the_right(self, machine: Machine) -> None:
        """As with `--device /dev/fuse --cap-add SYS_ADMIN`."""
        script = f"""
            tartapefs mount {machine.data} /tmp/mnt
            cmp /tmp/mnt/archive.tar {machine.folder}/expected.tar
            tartapefs unmount /tmp/mnt
            tartapefs doctor {machine.data}
        """
        result = self.container(machine).run(self.SCRIPT + script)
        assert (result.returncode, result.stderr) == (0, ""), result.stdout
        wait_until(lambda: not machine.daemons())

    @pytest.mark.parametrize("missing", ["device", "right"])
    @pytest.mark.long
    def test_without(self, machine: Machine, missing: str) -> None:
        """One line with a reason, doctor names the option that is missing, and everything but mounting works."""
        container = self.container(machine, missing != "device", ",+sys_admin" if missing != "right" else "")
        result = container.run(self.SCRIPT + f"tartapefs mount {machine.data} /tmp/mnt")
        assert result.returncode == 5
        assert len(result.stderr.splitlines()) == 1
        result = container.run("/usr/local/bin/tartapefs doctor")
        assert result.returncode == 1
        assert {"device": "--device /dev/fuse", "right": "--cap-add SYS_ADMIN"}[missing] in result.stdout
        result = container.run(f"/usr/local/bin/tartapefs play {machine.data} | cmp - {machine.folder}/expected.tar")
        assert (result.returncode, result.stderr) == (0, "")
