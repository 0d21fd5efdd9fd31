"""Leases: the `stat` of a file while no program can write it.

Rule: a program may have a file open for writing, or mapped to store into it. Its `write` may be under way, and moved
the times when it began; its stores may go to a page that is dirty already, and do not move them again. The kernel
knows: it grants a lease for reading only on a file that nobody can write, and a program that opens it for writing then
waits until the lease is returned, some microseconds later.
"""

import errno
import fcntl
import os
import signal
import stat

from tartapefs.source.file_systems import OVERLAYFS, fstat, may_refuse_leases
from tartapefs.source.system_calls import magic_of, write_dirty_pages


def stat_without_writers(fd: int, local: int | None) -> os.stat_result | None:
    """The `fstat` of a file that no program can write meanwhile: every later change of its bytes moves its times.

    `local`: as in `file_systems.fstat`. None if a program has the file open for writing, or mapped for it. If there are
    no leases (on other users' files, on network file systems), it writes the dirty pages back instead, which does
    nothing about a `write` under way.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # by default a writer that waits sends SIGIO, which kills
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN and not may_refuse_leases(fd):
            return None
        _write_back(fd)
        return fstat(fd, local)
    try:
        return fstat(fd, local)
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _write_back(fd: int) -> None:
    """Writes a regular file's dirty pages: then every mapping needs a fault to store, and that moves the timestamps.

    `sync_file_range` does this without a commit of the journal (measured: a fifth of `fsync`'s time), but on overlayfs
    it does nothing at all.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    if magic_of(fd) in (0, OVERLAYFS) or not write_dirty_pages(fd):
        os.fsync(fd)
