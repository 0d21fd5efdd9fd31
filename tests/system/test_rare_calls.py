"""System calls that would write to an archive, and rarer ways to read: sendfile, splice, direct I/O, file handles."""

import ctypes
import errno
import fcntl
import os
import random
import select
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.programs import run
from support.reference import Reference

Mount = Callable[..., Path]


@pytest.fixture
def archive(tree: Path, mount: Mount) -> Path:
    assert run("record", tree).returncode == 0
    return mount(tree)


@pytest.fixture
def expected(tree: Path) -> bytes:
    reference = Reference(tree)
    return reference.read(0, reference.size)


@pytest.fixture
def fd(archive: Path) -> Iterator[int]:
    opened = os.open(archive, os.O_RDONLY)
    yield opened
    os.close(opened)


def call(name: str, *arguments: Any) -> int:
    """A function of libc by its name; raises OSError."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result = int(function(*(os.fsencode(a) if isinstance(a, os.PathLike) else a for a in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def errno_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "allowed"


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            made.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


def test_rarer_calls_that_would_write_are_refused(archive: Path, expected: bytes, fd: int, tree: Path) -> None:
    """With EROFS; those that the kernel judges by the descriptor alone, which is not open for writing, with EBADF."""
    folder, new = archive.parent, archive.parent / "new"
    at, null = -100, ctypes.c_void_p()
    acl = b"\2\0\0\0" + b"\1\0\7\0\xff\xff\xff\xff\4\0\0\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff"
    attempts: dict[str, Callable[[], object]] = {
        "open a temporary file": lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR),
        "create and truncate": lambda: os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC),
        "create to read": lambda: os.open(new, os.O_RDONLY | os.O_CREAT),
        "open all ways to write": lambda: os.open(archive, os.O_RDWR | os.O_TRUNC | os.O_APPEND | os.O_SYNC),
        "open directly to write": lambda: os.open(archive, os.O_WRONLY | os.O_DIRECT),
        "exchange": lambda: call("renameat2", at, archive, at, folder / "archive.tar", 2),
        "rename without replacing": lambda: call("renameat2", at, archive, at, new, 1),
        "rename to a whiteout": lambda: call("renameat2", at, archive, at, new, 4),
        "replace": lambda: os.replace(archive, new),
        "link of a descriptor": lambda: call("linkat", at, Path(f"/proc/self/fd/{fd}"), at, new, 0x400),
        "mknod of a device": lambda: os.mknod(new, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        "bind a socket": lambda: listen(new),
        "fchmod": lambda: os.fchmod(fd, 0o777),
        "fchown": lambda: os.fchown(fd, 0, 0),
        "lchown": lambda: os.lchown(archive, 0, 0),
        "chown of the folder": lambda: os.chown(folder, 0, 0),
        "futimens": lambda: os.utime(fd),
        "utimensat of a link": lambda: call("utimensat", at, archive, null, 0x100),
        "setxattr of the folder": lambda: os.setxattr(folder, "user.tartape.state", b"valid"),
        "setxattr to replace": lambda: os.setxattr(archive, "user.tartape.state", b"valid", os.XATTR_REPLACE),
        "setxattr of an attribute trusted": lambda: os.setxattr(archive, "trusted.x", b"1"),
        "setxattr of a capability": lambda: os.setxattr(archive, "security.capability", b"\1\0\0\2" + bytes(16)),
        "setxattr of rights": lambda: os.setxattr(archive, "system.posix_acl_access", acl),
        "fsetxattr": lambda: os.setxattr(fd, "user.x", b"1"),
        "removexattr of the folder": lambda: os.removexattr(folder, "user.tartape.state"),
        "fremovexattr": lambda: os.removexattr(fd, "user.tartape.state"),
        "mkdir below": lambda: os.mkdir(new, 0o777),
        "rmdir of nothing": lambda: os.rmdir(folder / "archive.tar"),
    }
    by_descriptor: dict[str, Callable[[], object]] = {
        "write": lambda: os.write(fd, b"x"),
        "pwrite": lambda: os.pwrite(fd, b"x", 0),
        "pwritev": lambda: os.pwritev(fd, [b"x"], 0),
        "fallocate": lambda: os.posix_fallocate(fd, 0, 4096),
        "punch a hole": lambda: call("fallocate", fd, 3, ctypes.c_int64(0), ctypes.c_int64(4096)),
        "copy_file_range": lambda: copied_into(fd, tree),
        "sendfile": lambda: sent_into(fd, tree),
    }
    results = {name: errno_of(attempt) for name, attempt in attempts.items()}
    assert results == dict.fromkeys(attempts, "EROFS")
    results = {name: errno_of(attempt) for name, attempt in by_descriptor.items()}
    assert results == dict.fromkeys(by_descriptor, "EBADF")
    assert errno_of(lambda: os.ftruncate(fd, 0)) in ("EINVAL", "EBADF")
    for request in (0x40086602, 0x401C5820):  # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR
        assert errno_of(lambda request=request: fcntl.ioctl(fd, request, bytes(28))) != "allowed"  # type: ignore[misc]
    for place in (archive, folder):
        for mode in (os.W_OK, os.R_OK | os.W_OK):
            assert not os.access(place, mode)
    assert os.listdir(folder) == ["archive.tar"]
    assert archive.read_bytes() == expected


def copied_into(fd: int, tree: Path) -> None:
    with (tree / "script.sh").open("rb") as file:
        os.copy_file_range(file.fileno(), fd, 5)


def sent_into(fd: int, tree: Path) -> None:
    with (tree / "script.sh").open("rb") as file:
        os.sendfile(fd, file.fileno(), 0, 5)


@pytest.mark.root
def test_a_remount_to_write_changes_nothing(archive: Path, expected: bytes) -> None:
    """Root may take the kernel's own refusal away; ours stays."""
    done = subprocess.run(["mount", "-i", "-o", "remount,rw", archive.parent], capture_output=True)
    if done.returncode:
        return  # refused: as good
    attempts: list[Callable[[], object]] = [
        lambda: os.open(archive, os.O_RDWR | os.O_TRUNC),
        lambda: os.truncate(archive, 0),
        lambda: os.unlink(archive),
        lambda: os.mkdir(archive.parent / "new"),
        lambda: os.open(archive.parent / "new", os.O_CREAT | os.O_RDWR),
        lambda: os.rename(archive, archive.parent / "new"),
        lambda: os.chmod(archive, 0o777),
        lambda: os.setxattr(archive, "user.x", b"1"),
    ]
    assert "allowed" not in [errno_of(attempt) for attempt in attempts]
    assert os.listdir(archive.parent) == ["archive.tar"]
    assert archive.read_bytes() == expected


def test_bytes_by_sendfile(fd: int, expected: bytes) -> None:
    choose = random.Random(5)
    with tempfile.TemporaryFile() as out:
        for _ in range(20):
            start, count = choose.randrange(len(expected)), choose.randrange(1, 200_000)
            out.seek(0)
            out.truncate()
            sent = 0
            while sent < min(count, len(expected) - start):
                got = os.sendfile(out.fileno(), fd, start + sent, count - sent)
                assert got > 0
                sent += got
            out.seek(0)
            assert out.read() == expected[start : start + count]
        assert os.sendfile(out.fileno(), fd, len(expected), 10) == 0


def test_bytes_by_copy_file_range(fd: int, expected: bytes) -> None:
    """Or EXDEV, where the kernel copies within one file system only; never other bytes."""
    with tempfile.TemporaryFile() as out:
        copied = 0
        try:
            while got := os.copy_file_range(fd, out.fileno(), 1 << 20, copied, copied):
                copied += got
        except OSError as error:
            assert error.errno == errno.EXDEV and copied == 0
            return
        out.seek(0)
        assert out.read() == expected


def test_bytes_by_splice(fd: int, expected: bytes) -> None:
    """Through a pipe, from any offset."""
    read, write = os.pipe()
    try:
        for start in (0, 1, 511, 513, 100_000, len(expected) - 700):
            got = os.splice(fd, write, 60_000, offset_src=start)
            assert got > 0
            assert os.read(read, 1 << 20) == expected[start : start + got]
        assert os.splice(fd, write, 10, offset_src=len(expected)) == 0
    finally:
        os.close(read)
        os.close(write)


def test_bytes_by_direct_reads(archive: Path, expected: bytes) -> None:
    """`O_DIRECT`, aligned or not: no more than any reader gets here."""
    fd = os.open(archive, os.O_RDONLY | os.O_DIRECT)
    try:
        for start, count in ((0, 4096), (512, 131072), (1, 1000)):
            assert os.pread(fd, count, start) == expected[start : start + count]
    finally:
        os.close(fd)


def test_other_ways_to_wait_and_to_lock(archive: Path, fd: int, expected: bytes) -> None:
    """Polls are ready at once, locks exclude each other, a lock to write needs a descriptor to write."""
    assert select.select([fd], [], [], 30)[0] == [fd]
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(5000) == [(fd, select.POLLIN)]
    assert errno_of(lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "EBADF"
    fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 5)
    other = os.open(archive, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert errno_of(lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "EAGAIN"
        assert os.pread(other, 4096, 300) == expected[300:4396]
    finally:
        os.close(other)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert call("syncfs", fd) == 0
    assert os.lseek(fd, len(expected) + 10**6, os.SEEK_SET) == len(expected) + 10**6
    assert os.read(fd, 10) == b""
    assert errno_of(lambda: os.lseek(fd, -1, os.SEEK_SET)) == "EINVAL"
    assert errno_of(lambda: os.lseek(fd, len(expected), os.SEEK_HOLE)) == "ENXIO"
    assert os.lseek(fd, 0, os.SEEK_SET) == 0
    assert os.read(fd, 1000) == expected[:1000]


class Handle(ctypes.Structure):
    """`struct file_handle`."""

    _fields_ = (("size", ctypes.c_uint), ("kind", ctypes.c_int), ("bytes", ctypes.c_ubyte * 128))


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize("binding", ["fusepy", "mfusepy"])
def test_a_file_handle_outlives_the_cache_of_the_kernel(
    tree: Path, expected: bytes, mount: Mount, binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS servers keep it: they open the archive by it, whatever the kernel has forgotten meanwhile."""
    monkeypatch.setenv("TARTAPEFS_BINDING", binding)
    assert run("record", tree).returncode == 0
    archive = mount(tree)
    libc, handle, volume = ctypes.CDLL(None), Handle(128), ctypes.c_int()
    assert libc.name_to_handle_at(-100, os.fsencode(archive), ctypes.byref(handle), ctypes.byref(volume), 0) == 0
    Path("/proc/sys/vm/drop_caches").write_text("2")
    place = os.open(archive.parent, os.O_RDONLY)
    try:
        fd = libc.open_by_handle_at(place, ctypes.byref(handle), os.O_RDONLY)
        assert fd >= 0, "stale"
        with open(fd, "rb") as file:
            assert file.read() == expected
    finally:
        os.close(place)
