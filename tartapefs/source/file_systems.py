"""What is known of types of file systems: which of them show every change at once.

Rule: a `stat` of anything outside the root's own local file system is asked of its file system each time. The kernel
may answer from what a server or another process told it seconds ago.
"""

import os
import re
from contextlib import suppress

from tartapefs.base import mountinfo
from tartapefs.source.system_calls import lstat_uncached, magic_of

_BTRFS, _TMPFS, OVERLAYFS = 0x9123683E, 0x01021994, 0x794C7630
# ext4, xfs, btrfs, tmpfs, f2fs, zfs, bcachefs: only this kernel changes what lies there, and every change shows at
# once, through any descriptor. On others (NFS, SMB, FUSE) the kernel caches a `stat` for some time.
_LOCAL = {0xEF53, 0x58465342, _BTRFS, _TMPFS, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E}
_LATE_TIMES = {_TMPFS, OVERLAYFS}  # a hole is there before the times have moved; an overlay's layer may be a tmpfs
_LEASED_BY_A_SERVER = {0x6969, 0xFF534D42, 0xFE534D42}  # nfs, cifs, smb3: without a delegation no lease, writers or not
NO_SUBVOLUME = 2  # the inode that btrfs shows in a snapshot for each subvolume in it (BTRFS_EMPTY_SUBVOL_DIR_OBJECTID)
_WITHOUT_FILES = {
    0x9FA0: "procfs",
    0x62656572: "sysfs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0x73636673: "securityfs",
}
# Types of file systems whose files another machine or process changes, as /proc/self/mountinfo names them.
_FOREIGN = re.compile(r"fuse(\..+)?|nfs4?|cifs|smb3|9p|ceph|afs|virtiofs|lustre|beegfs|gpfs|coda|orangefs|vboxsf")


def local_device(fd: int) -> int | None:
    """The device that `fd` lies on, if only this kernel changes what is there; else None."""
    return os.fstat(fd).st_dev if magic_of(fd) in _LOCAL else None


def has_late_times(fd: int) -> bool:
    """Whether a hole that is punched into `fd` can be read before the file's times have moved."""
    return magic_of(fd) in _LATE_TIMES


def may_refuse_leases(fd: int) -> bool:
    """Whether the file system of `fd` refuses leases on files that nobody writes, too."""
    return magic_of(fd) in _LEASED_BY_A_SERVER


def fstat(fd: int, local: int | None) -> os.stat_result:
    """The `fstat` of a file as it is now. On the device `local` the kernel's own answer is that."""
    found = os.fstat(fd)
    return found if found.st_dev == local else lstat_uncached(fd)


def lstat(fd: int, path: bytes, local: int | None) -> os.stat_result:
    """The `lstat` of `path` below the folder `fd` as it is now."""
    found = os.lstat(path, dir_fd=fd)
    return found if found.st_dev == local else lstat_uncached(fd, path)


def why_unstable(fd: int, found: os.stat_result) -> str | None:
    """Why two looks at a folder, whose `fstat` is `found`, may differ without a change, as text; else None."""
    magic = magic_of(fd)
    if magic in _WITHOUT_FILES:
        return f"lies on {_WITHOUT_FILES[magic]}, where the kernel makes up what is read"
    if magic == _BTRFS and found.st_ino == NO_SUBVOLUME:
        return "stands for a subvolume that the snapshot does not hold; btrfs gives it the time of each look at it"
    return None


def foreign_types(root: int, path: str, one_file_system: bool = False) -> list[str]:
    """The types of file systems such as "nfs4" that the folder `root`, at `path`, lies on in whole or in part.

    `one_file_system`: only what the folder itself lies on.

    They may answer from a cache, the kernel's or their own; then a change does not show at once.
    """
    with suppress(OSError):
        number = mountinfo.number_of(root)
        return sorted({
            mount.fstype
            for mount in mountinfo.mounts()
            if (mount.number == number or (mount.mountpoint.startswith(f"{path}/") and not one_file_system))
            and _FOREIGN.fullmatch(mount.fstype)
        })  # fmt: skip
    return []
