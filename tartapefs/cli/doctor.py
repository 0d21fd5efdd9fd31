"""The command that checks whether this machine can mount an archive, and says what to do if not: doctor.

Rule: each check examines one thing, changes nothing, and reports what it found; every finding that is not "ok" has a
remedy. A "problem" prevents this user from mounting; a "warning" prevents only some ways, such as mount(8) or mounts
for other users. The self-test runs the commands as a user would, with index and mount point in a temporary folder.
"""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain

import click

from tartapefs.api.tape import Tape
from tartapefs.base.errors import TapeError
from tartapefs.base.naming import ARCHIVE_NAME
from tartapefs.base.text import printable
from tartapefs.cli.common import DRIFT, json_option, path, print_json
from tartapefs.cli.progress import progress
from tartapefs.mount import libfuse
from tartapefs.play.engine import TapePlayer
from tartapefs.play.playback import CHUNK
from tartapefs.source.system_calls import has_openat2

# What mount.fuse3 and libmount search, whatever the caller's PATH.
_PATH_OF_MOUNT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PATH_OF_HELPERS = "/sbin"
_TIMEOUT = 3  # seconds that a mounted archive gets to answer
_CAP_SYS_ADMIN = 1 << 21
_INSTALL = "install fuse3 (Debian, Fedora, Arch and Alpine have it by this name)"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    `check`: what was checked. `status`: ok, warning or problem. `found`: the result, for people. `remedy`: what to do;
    empty only if ok.
    """

    check: str
    status: str
    found: str
    remedy: str = ""


def _kernel() -> Finding:
    release = os.uname().release
    if has_openat2():
        return Finding("kernel", "ok", f"Linux {release}, with openat2")
    found = f"Linux {release} without openat2: members are opened component by component, which is slower"
    return Finding("kernel", "warning", found, "Linux 5.6 has it; in a container, its seccomp profile must allow it")


def _device() -> Finding:
    device = "/dev/fuse"
    remedies = {
        errno.ENOENT: "modprobe fuse; for a container, --device /dev/fuse",
        errno.EACCES: f"chmod 0666 {device}, as udev does; or mount as root",
        errno.EPERM: f"for a container, --device {device}",
    }
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Finding(device, "problem", error.strerror or "", remedies.get(error.errno or 0, "modprobe fuse"))
    if os.stat(device).st_rdev != os.makedev(10, 229):
        return Finding(device, "problem", "is something else", f"rm {device} && mknod -m 0666 {device} c 10 229")
    return Finding(device, "ok", "can be opened")


def _own_status(line: str) -> int:
    """Reads a hexadecimal number of this process from /proc/self/status, see proc(5)."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
        return int(status.read().partition(f"\n{line}:")[2].split()[0], 16)


def _rights() -> Finding:
    if _own_status("CapBnd") & _CAP_SYS_ADMIN:
        return Finding("rights", "ok", "root may mount here")
    return Finding("rights", "problem", "not even root may mount here", "for a container, --cap-add SYS_ADMIN")


def _loaded_library() -> str:
    """Path of the libfuse that this process has loaded; empty if none."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        found = re.search(r"/\S*/libfuse\d?\.so\S*", maps.read())
    return found[0] if found else ""


def _library() -> Finding:
    try:
        libfuse.load()
    except ImportError as error:
        return Finding("libfuse", "problem", printable(f"cannot be loaded: {error}"), _INSTALL)
    return Finding("libfuse", "ok", _loaded_library() or "is loaded")


def _no_setuid(program: str) -> tuple[str, str] | None:
    """Tells why the setuid bit of this program has no effect, and the remedy; None if it has an effect."""
    found = os.stat(program)
    if not found.st_mode & stat.S_ISUID or found.st_uid != 0:
        return "is not setuid root", f"chown root {program} && chmod u+s {program}"
    if os.statvfs(program).f_flag & os.ST_NOSUID:
        return "lies on a file system that is mounted nosuid", "mount that without nosuid"
    if _own_status("NoNewPrivs"):
        return "cannot become root, since no_new_privs is set", "start without that; a container, a service may set it"
    return None


def _fusermount() -> Finding:
    """Checks the setuid program by which libfuse mounts for users: fusermount3 for libfuse 3, else fusermount."""
    name = "fusermount" if "libfuse.so" in _loaded_library() else "fusermount3"
    program = shutil.which(name)
    if program is None:
        found, remedy = f"there is no {name}", "install fuse3"
        if other := shutil.which("fusermount3"):
            remedy = f"ln -s fusermount3 {os.path.dirname(other)}/{name}"
    elif reason := _no_setuid(program):
        found, remedy = f"{program} {reason[0]}", f"{reason[1]}, or use a user namespace"
    else:
        return Finding("fusermount3", "ok", f"{program}, setuid root")
    if os.geteuid() and _own_status("CapAmb") & _CAP_SYS_ADMIN and program is not None:
        return Finding("fusermount3", "ok", f"{program}, which this user's right to mount is passed on to")
    bad = "problem" if os.geteuid() else "warning"
    return Finding("fusermount3", bad, f"{found}, so that nobody but root can mount", remedy)


def _configuration() -> Finding:
    name, allowed = "/etc/fuse.conf", False
    with contextlib.suppress(OSError), open(name, encoding="utf-8", errors="replace") as file:
        allowed = any(line.strip() == "user_allow_other" for line in file)
    if allowed:
        return Finding(name, "ok", "every user may use --allow-other")
    if os.geteuid() == 0:
        return Finding(name, "ok", "only root may use --allow-other")
    return Finding(name, "warning", "you may not use --allow-other", "have root write a line user_allow_other into it")


def _probe(mountpoint: str) -> str:
    """Tells why a mounted archive does not answer; empty if it does.

    Another process calls stat, since a daemon that hangs would block this one.
    """
    process = subprocess.Popen(
        ["stat", "--", mountpoint], env=os.environ | {"LC_ALL": "C"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _, message = process.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()  # takes effect once the daemon answers, so do not wait for it
        return f"does not answer within {_TIMEOUT} seconds"
    return "its daemon is gone" if os.strerror(errno.ENOTCONN).encode() in message else ""


def _mounts() -> Iterator[Finding]:
    try:
        from tartapefs.mount.mount_table import mounts
    except Exception:
        return  # no libfuse, which another check reports
    mountpoints = [entry.mountpoint for entry in mounts()]
    for mountpoint in mountpoints:
        if reason := _probe(mountpoint):
            remedy = f"tartapefs unmount --lazy {printable(shlex.quote(mountpoint))}"
            yield Finding("mounts", "problem", f"{printable(mountpoint)}: {reason}", remedy)
    yield Finding("mounts", "ok", f"{len(mountpoints)} in this mount namespace")


def _mount8() -> Iterator[Finding]:
    for program, search, kind, link_folder in (
        ("tartapefs", _PATH_OF_MOUNT, "fuse.tartapefs", "/usr/local/bin"),
        ("mount.tartapefs", _PATH_OF_HELPERS, "tartapefs", "/sbin"),
    ):
        if found := shutil.which(program, path=search):
            yield Finding("mount(8)", "ok", f"finds {found}")
        else:
            here = os.path.join(sysconfig.get_path("scripts"), program)
            missing = f"does not find {program} in {search}, which it needs for the type {kind}"
            yield Finding("mount(8)", "warning", missing, f"ln -s {shlex.quote(here)} {link_folder}/")


def _machine_findings() -> Iterator[Finding]:
    yield _kernel()
    yield _device()
    yield _rights()
    yield _library()
    yield _fusermount()
    yield _configuration()
    yield from _mounts()
    yield from _mount8()


def _run(*command: str) -> str:
    """Runs a command, and returns its standard output. Raises ChildProcessError with the last line that it printed."""
    result = subprocess.run(
        command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, errors="backslashreplace"
    )
    if result.returncode:
        *_, message = ["", *(result.stdout + result.stderr).splitlines()]
        raise ChildProcessError(message.removeprefix("tartapefs: ") or f"{command[0]} ended with {result.returncode}")
    return result.stdout


def _tartapefs(*arguments: str) -> str:
    return _run(sys.executable, "-m", "tartapefs", *arguments)


def _read_with_tarfile(archive: str, tape: Tape, player: TapePlayer) -> str:
    """Reads the mounted archive with `tarfile`; compares members with the recording, contents with the player's."""
    with tarfile.open(archive) as tar, progress("reading it back", tape.total_size, True, tape) as update:
        for member in tape.members():
            update(member.start, member.start)
            found = tar.next()
            if found is None or os.fsencode(found.name) != member.name.rstrip(b"/") or found.size != member.size:
                raise ChildProcessError(f"{printable(member.name)} is not where it was recorded")
            contents = tar.extractfile(found) if found.isreg() else None
            while contents and (data := contents.read(CHUNK)):
                if data != player.read(found.offset_data + contents.tell() - len(data), len(data)):
                    raise ChildProcessError(f"{printable(member.name)} has other contents")
                update(position := found.offset_data + contents.tell(), position)
        if tar.next() is not None:
            raise ChildProcessError("there are more members than recorded")
    return f"{tape.member_count:,} members, as recorded"


def _compare_with_tar(archive: str, folder_above: str) -> str:
    if "GNU tar" not in _run("tar", "--version"):
        raise ChildProcessError("the program tar is not GNU tar")
    _run("tar", "--compare", "--numeric-owner", "-f", archive, "-C", folder_above)
    return "no difference from the folder"


def _temporary_folder() -> str | None:
    try:
        return os.path.realpath(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def _self_test(directory: str) -> Iterator[Finding]:
    """Records, mounts, reads back twice and unmounts, without writing to the folder."""
    if _temporary_folder() is None:
        yield Finding(
            "temporary folder", "problem", "there is none that you can write", "set TMPDIR to one that you can"
        )
        return
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tartapefs-doctor-"))
        index, mountpoint = os.path.join(scratch, "index.db"), os.path.join(scratch, "mnt")
        archive = os.path.join(mountpoint, ARCHIVE_NAME)
        os.mkdir(mountpoint)

        def record() -> str:
            facts = json.loads(_tartapefs("record", "--json", "--keep-owners", "--index", index, "--", directory))
            return f"{facts['member_count']:,} members, {facts['total_size']:,} bytes"

        def mount() -> str:
            _tartapefs("mount", "--index", index, "--", directory, mountpoint)
            stack.callback(clean_up)
            return f"at {mountpoint}"

        def read() -> str:
            with Tape.discover(directory, index) as tape, contextlib.closing(TapePlayer(tape, directory)) as player:
                return _read_with_tarfile(archive, tape, player)

        def compare() -> str:
            return _compare_with_tar(archive, os.path.dirname(os.path.realpath(directory)))

        def unmount(*options: str) -> str:
            _tartapefs("unmount", *options, "--", mountpoint)
            return "nothing is left"

        def clean_up() -> None:
            with contextlib.suppress(OSError):  # usually it is unmounted already
                unmount("--lazy")

        def archive_state() -> str:
            """The state of the archive in parentheses, if it is invalid."""
            with contextlib.suppress(OSError):
                state = os.getxattr(mountpoint, "user.tartape.state").decode()
                return "" if state == "valid" else f" ({state})"
            return ""

        for check, step, needed, remedy in (
            ("record", record, True, "see what it says; tartapefs record has options to leave things out"),
            ("mount", mount, True, "see the checks above"),
            ("tarfile", read, False, "try a folder that nobody writes to; if it fails there too, report it"),
            ("GNU tar", compare, False, "try a folder that nobody writes to; if it fails there too, report it"),
            ("unmount", unmount, False, f"tartapefs unmount --lazy {mountpoint}"),
        ):
            try:
                yield Finding(check, "ok", step())
            except (TapeError, OSError, tarfile.TarError) as error:
                yield Finding(check, "problem", str(error) + archive_state(), remedy)
                if needed:
                    return


@click.command()
@click.argument("directory", metavar="[DIR]", type=path, required=False)
@json_option
def doctor(directory: str | None, as_json: bool) -> None:
    """Check whether this machine can mount archives.

    Says what to do if not; the exit code is 1 then. With DIR it also runs a self-test: it records DIR, mounts it, reads
    it back with Python's tarfile and with GNU tar, compares, and unmounts. It writes nothing to DIR.
    """
    if directory is not None:
        if not os.path.isdir(directory):
            raise click.BadParameter(f"{printable(directory)} is not a folder", param_hint="DIR")
        root, scratch = os.path.realpath(directory), _temporary_folder()
        if scratch is not None and os.path.commonpath((root, scratch)) == root:
            raise click.BadParameter(f"the temporary folder {scratch} lies in it: set TMPDIR", param_hint="DIR")
    findings = []
    for finding in chain(_machine_findings(), _self_test(directory) if directory is not None else ()):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.status:8}{finding.check:16}{finding.found}")
            if finding.remedy:
                click.echo(f"{'':24}remedy: {finding.remedy}")
    usable = all(finding.status != "problem" for finding in findings)
    if as_json:
        print_json({"usable": usable, "findings": list(map(asdict, findings))})
    if not usable:
        raise SystemExit(DRIFT)
