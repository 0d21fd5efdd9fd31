"""The mount table: which archives are mounted, what each tells of itself, and how one is unmounted.

Rule: an entry is known by its device, which no other mount has meanwhile. Another program may unmount an archive at any
time: each function here takes that for a success, or says so in one line.
"""

import contextlib
import errno
import logging
import os
import shutil
import subprocess
from typing import Any, NamedTuple

from tartapefs.base import mountinfo, processes
from tartapefs.base.distribution import install_fuse
from tartapefs.base.errors import MountError
from tartapefs.base.text import printable
from tartapefs.mount import status as reports
from tartapefs.mount.operations import XATTRS

log = logging.getLogger("tartapefs")

_TYPE = "fuse.tartapefs"
_ENDS_SOON, _ENDS_WITHIN = 0.5, 5.0  # seconds in which a daemon ends once it is unmounted: most of them, and any


class MountEntry(NamedTuple):
    """An archive in the mount table."""

    device: str  # major:minor, which no other mount has meanwhile
    mountpoint: str
    source: str
    owner: int  # the user who mounted it


def mounts() -> list[MountEntry]:
    """The archives mounted in this process' mount namespace. Each call reads the table anew."""
    entries = []
    for mount in mountinfo.mounts():
        if mount.fstype == _TYPE:
            owner = next(int(o[8:]) for o in mount.options.split(",") if o.startswith("user_id="))
            entries.append(MountEntry(mount.device, mount.mountpoint, mount.source, owner))
    return entries


def entries_at(mountpoint: str) -> list[MountEntry]:
    """The archives mounted at this path, a real path; the last is on top."""
    return [entry for entry in mounts() if entry.mountpoint == mountpoint]


def entry_of(mountpoint: str) -> MountEntry:
    """The archive mounted at this path; of several the one on top. Raises MountError if there is none."""
    known = {entry.mountpoint: entry for entry in mounts()}  # of several mounts at one path the last, which is on top
    # By its parent folder first: a look at the mount point itself would wait for a daemon that may not answer.
    folder, name = os.path.split(os.path.abspath(mountpoint))
    where = os.path.join(os.path.realpath(folder), name)
    if where in known or (where := os.path.realpath(mountpoint)) in known:
        return known[where]
    raise MountError(mountpoint, "no archive of tartapefs is mounted here")


def check_mountpoint(mountpoint: str, source: str) -> str:
    where = os.path.realpath(mountpoint)
    hidden: list[str] = []
    try:
        if not os.path.isdir(where) and os.stat(where):
            raise MountError(mountpoint, "is not a folder")
        hidden = os.listdir(where)
    except FileNotFoundError:
        raise MountError(mountpoint, "no such folder") from None
    except OSError as error:
        left = entries_at(where)
        if error.errno != errno.ENOTCONN or not left:
            raise MountError(mountpoint, error.strerror or "cannot be used") from None
        _unmount(left[-1], lazy=True)
        log.warning("%s: was left behind by a daemon that is gone; unmounted it", printable(mountpoint))
    if entries_at(where):
        raise MountError(mountpoint, "an archive is mounted here already")
    if os.path.commonpath((where, source)) == source:
        raise MountError(mountpoint, "lies inside the recorded folder, which the mount would change")
    if hidden:  # libfuse 2 refuses it as well, libfuse 3 does not
        raise MountError(mountpoint, "is not empty")
    return where


def unmount(entry: MountEntry, lazy: bool = False) -> None:
    """Unmounts this archive; with `lazy`, programs may read on until they close it.

    Without `lazy` it waits a few seconds for the daemon to end, so that the source can be unmounted next. A daemon that
    goes on, since the archive is mounted elsewhere too, is logged with that path or namespace. Raises MountError with
    the message of umount(8) or fusermount.
    """
    pid = None if lazy else _daemon_of(entry)
    with contextlib.ExitStack() as stack:
        daemon = None
        if pid is not None:
            with contextlib.suppress(OSError):
                daemon = os.pidfd_open(pid)
                stack.callback(os.close, daemon)
        _unmount(entry, lazy)
        if daemon is None or processes.await_end(daemon, _ENDS_SOON):
            return
        elsewhere = _mounted_elsewhere(entry.device)
        if elsewhere is None and processes.await_end(daemon, _ENDS_WITHIN - _ENDS_SOON):
            return
    why = f"it is still mounted {elsewhere}" if elsewhere else "it takes longer than usual"
    log.warning(
        "%s: unmounted here, but its daemon, process %d, has the source in use until it ends: %s",
        printable(entry.mountpoint),
        pid,
        why,
    )


def _daemon_of(entry: MountEntry) -> int | None:
    """The pid of the daemon of this mount, if it is this user's and answers."""
    if entry.owner == os.geteuid():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int((reports.ask(entry.device) or {})["pid"])
    return None


def _mounted_elsewhere(device: str) -> str | None:
    """Where this device is mounted still, as far as this user may see: a path here, or another mount namespace."""
    for entry in mounts():
        if entry.device == device:
            return f"at {printable(entry.mountpoint)}"
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if any(mount.device == device for mount in mountinfo.mounts(process)):
                name = printable(processes.command_of(int(process)) or "?")
                return f"in the mount namespace of process {process} ({name})"
    return None


def _unmount(entry: MountEntry, lazy: bool) -> None:
    """Unmounts it; succeeds if another program has done so meanwhile."""
    try:
        _run_umount(entry.mountpoint, lazy)
    except MountError:
        if entry in mounts():
            raise


def unmount_own(entries: list[MountEntry]) -> MountError | None:
    """Unmounts these entries of this process' own, and no other mount that has taken their mount point by now.

    Returns the error if one is still mounted.
    """
    for entry in entries:
        if entry in mounts():
            try:
                _unmount(entry, lazy=True)  # a reader that never closes the archive must not keep the daemon
            except MountError as error:
                return error
    return None


def _run_umount(where: str, lazy: bool) -> None:
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), where]
    else:
        program = next(filter(shutil.which, ("fusermount3", "fusermount")), "fusermount3")
        command = [program, "-u", *(["-z"] if lazy else []), where]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise MountError(where, f"{command[0]} is not installed; {install_fuse()}") from None
    if result.returncode:
        raise MountError(where, "; ".join(result.stderr.split("\n")[:-1]) or f"{command[0]} failed")


def statuses() -> list[dict[str, Any]]:
    """`status` of each mounted archive; if it cannot be had, a `state` of "unknown: " and the reason."""
    found = []
    for entry in mounts():
        try:
            found.append(status(entry))
        except MountError as error:
            if entry in mounts():  # and not unmounted meanwhile
                found.append(_known(entry) | {"state": f"unknown: {error.reason}"})
    return found


def _known(entry: MountEntry) -> dict[str, Any]:
    return {"mountpoint": entry.mountpoint, "owner": entry.owner, "source": printable(entry.source)}


def status(entry: MountEntry) -> dict[str, Any]:
    """The state of this archive: `status.document`, and its `mountpoint`.

    If the daemon's socket is out of reach, only what its extended attributes tell. Raises MountError if its daemon does
    not answer.
    """
    try:
        # Only the owner can reach the socket.
        found = reports.ask(entry.device) if entry.owner == os.geteuid() else None
        if found is None and not (found := _attributes(entry.mountpoint)):
            raise MountError(entry.mountpoint, "it was unmounted meanwhile")
        return _known(entry) | found
    except OSError as error:
        raise MountError(entry.mountpoint, f"its daemon does not answer: {error.strerror or error}") from None
    except ValueError as error:
        raise MountError(entry.mountpoint, f"its daemon's answer is invalid: {error}") from None


def _attributes(mountpoint: str) -> dict[str, str | int]:
    names = [name for name in sorted(os.listxattr(mountpoint)) if name.startswith(XATTRS)]
    values = {name.removeprefix(XATTRS): os.getxattr(mountpoint, name).decode() for name in names}
    return {
        name: int(value) if value.isdecimal() and name not in ("fingerprint", "name", "seal") else value
        for name, value in values.items()
    }
