"""Checks whether this machine can mount archives.

Rule: each check examines one thing, changes nothing, and reports what it found; every finding that is not "ok" has a
remedy. A "problem" prevents this user from mounting; a "warning" prevents only some ways, such as mount(8) or mounts
for other users, or what a limit of the kernel forbids.
"""

import contextlib
import errno
import os
import re
import shlex
import shutil
import stat
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

from tartapefs.base.commands import command
from tartapefs.base.distribution import install_fuse
from tartapefs.base.text import printable
from tartapefs.mount import libfuse
from tartapefs.mount.mount_table import mounts
from tartapefs.source.system_calls import has_openat2

# What mount.fuse3 and libmount search, whatever the caller's PATH.
_PATH_OF_MOUNT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PATH_OF_HELPERS = "/sbin"
_TIMEOUT = 3  # seconds that a mounted archive gets to answer
_CAP_SYS_ADMIN = 1 << 21
_PAGES = 256  # of the largest request
_SYSCTLS = "/proc/sys/fs/fuse"
_OWN_PROFILE = "/proc/self/attr/apparmor/current"
_PROFILES = "/sys/kernel/security/apparmor/profiles"  # only root can read it


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
        return Finding("libfuse", "problem", printable(f"cannot be loaded: {error}"), install_fuse())
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
        found, remedy = f"there is no {name}", install_fuse()
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
    mountpoints = [entry.mountpoint for entry in mounts()]
    for mountpoint in mountpoints:
        if reason := _probe(mountpoint):
            remedy = command("unmount --lazy", mountpoint)
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


def _limit(name: str) -> int | None:
    """A number of the kernel's in /proc/sys/fs/fuse; None where it has none of this name."""
    with contextlib.suppress(OSError, ValueError), open(f"{_SYSCTLS}/{name}", encoding="ascii") as file:
        return int(file.read())
    return None


def _limits() -> Iterator[Finding]:
    """The kernel's limits on FUSE. Source: https://docs.kernel.org/admin-guide/sysctl/fs.html"""
    pages = _limit("max_pages_limit")  # since Linux 6.13
    if pages is not None and pages < _PAGES:
        found = f"requests have at most {pages} pages, so that reads are slower"
        yield Finding("max_pages_limit", "warning", found, f"sysctl fs.fuse.max_pages_limit={_PAGES}")
    for name in ("default_request_timeout", "max_request_timeout"):  # since Linux 6.16
        if seconds := _limit(name):
            found = f"the kernel ends the mount if a read takes {seconds} s, as from a source that hangs"
            yield Finding(name, "warning", found, f"sysctl fs.fuse.{name}=0")


def _confinement() -> Iterator[Finding]:
    """What AppArmor forbids: mounts by this process, as in containers, and by fusermount3 outside of usual folders."""
    profile = ""
    with contextlib.suppress(OSError), open(_OWN_PROFILE, encoding="ascii") as file:
        profile = file.read().strip("\n\0")
    if profile.endswith("(enforce)"):
        found = f"the profile {printable(profile.removesuffix(' (enforce)'))} may forbid to mount"
        yield Finding("AppArmor", "warning", found, "for a container, --security-opt apparmor=unconfined")
    loaded = ""
    with contextlib.suppress(OSError), open(_PROFILES, encoding="ascii") as file:
        loaded = file.read()
    if re.search(r"^(\S*/)?fusermount3 \(enforce\)$", loaded, re.MULTILINE):
        found = "its profile of fusermount3 lets users mount below home, /mnt, /media, /tmp and /run/user alone"
        yield Finding("AppArmor", "warning", found, "mount there, or add a line to /etc/apparmor.d/local/fusermount3")


def machine_findings() -> Iterator[Finding]:
    yield _kernel()
    yield _device()
    yield _rights()
    yield _library()
    yield _fusermount()
    yield _configuration()
    yield from _limits()
    yield from _confinement()
    yield from _mounts()
    yield from _mount8()
