"""What the kernel's page cache has of an archive is not read any more once there is drift, however it is read."""

import ctypes
import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.programs import run, wait_until
from support.reference import Reference

from tartapefs.mount import mount_table

KEPT = 200_000  # bytes that are in the page cache when the drift is found
MAPS = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(fd, int(sys.argv[2]), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
print(mapped[0], flush=True)
while sys.stdin.readline():
    print(mapped[0], flush=True)
"""


@pytest.fixture(params=["fusepy", "mfusepy"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARTAPEFS_BINDING", request.param)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    (root / "a").write_bytes(os.urandom(KEPT))
    (root / "b").write_bytes(os.urandom(1000))
    assert run("record", root).returncode == 0
    return root


def by_read(fd: int) -> bytes:
    return os.pread(fd, 4096, 0)


def by_sendfile(fd: int) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.sendfile(ours.fileno(), fd, 0, 4096)
        return theirs.recv(4096)


def by_splice(fd: int) -> bytes:
    out, into = os.pipe()
    try:
        os.splice(fd, into, 4096, offset_src=0)
        return os.read(out, 4096)
    finally:
        os.close(out)
        os.close(into)


def fails(way: Callable[[int], bytes], fd: int, expected: bytes) -> bool:
    """Whether this read fails; if not, its bytes are the right ones."""
    try:
        assert way(fd) == expected
    except OSError as error:
        return error.errno == errno.EIO
    return False


@pytest.mark.fuse
@pytest.mark.long(but=r"\[fusepy-cached|mfusepy-direct")
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("options", [("--direct",), ()], ids=["direct", "cached"])
def test_open_descriptors_fail_after_drift(large: Path, mount: Callable[..., Path], options: tuple[str, ...]) -> None:
    expected = Reference(large).read(0, KEPT)
    archive = mount(large, *options)
    with ExitStack() as stack:
        fds = []
        for way in (by_read, by_sendfile, by_splice):
            fds.append(os.open(archive, os.O_RDONLY))
            stack.callback(os.close, fds[-1])
            assert way(fds[-1]) == expected[:4096]
        assert os.sendfile(stack.enter_context(open(os.devnull, "wb")).fileno(), fds[1], 0, KEPT) == KEPT
        command = [sys.executable, "-c", MAPS, archive, str(KEPT)]
        maps = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        stack.enter_context(maps)
        assert maps.stdin and maps.stdout
        assert maps.stdout.readline() == f"{expected[0]}\n"
        (large / "b").write_bytes(b"other")
        end = archive.stat().st_size // mmap.PAGESIZE * mmap.PAGESIZE
        os.posix_fadvise(fds[0], end, 0, os.POSIX_FADV_DONTNEED)  # it was read ahead
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fds[0], 4096, end)
        for way, fd in zip((by_read, by_sendfile, by_splice), fds, strict=True):
            wait_until(lambda way=way, fd=fd: fails(way, fd, expected[:4096]))  # type: ignore[misc]
        maps.stdin.write("\n")
        assert maps.wait(30) == -signal.SIGBUS


def report(archive: Path) -> dict[str, Any]:
    return mount_table.status(mount_table.entry_of(os.fspath(archive.parent)))


def in_page_cache(fd: int, at: int) -> bool:
    """Whether the kernel has the byte `at` of this file in its page cache; does not read it."""
    page = at - at % mmap.PAGESIZE
    with mmap.mmap(fd, at + 1 - page, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=page) as mapped:
        address, found = ctypes.addressof(ctypes.c_char.from_buffer(mapped)), ctypes.c_ubyte()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), ctypes.byref(found)) == 0
    return bool(found.value & 1)


@pytest.mark.fuse
@pytest.mark.usefixtures("library")
def test_a_reader_that_pauses_before_the_end_gets_no_footer_of_before(large: Path, mount: Callable[..., Path]) -> None:
    """The kernel has read the footer ahead, but does not keep it for the hour, or longer, that the reader pauses.

    What is added in that hour is found when the reader gets there, although no audit ran meanwhile.
    """
    reference = Reference(large)
    expected = reference.read(0, reference.size)
    archive = mount(large, "--audit-interval", "86400")
    with archive.open("rb", buffering=0) as file:
        fd, footer = file.fileno(), len(expected) - 1024
        got = file.read(4096)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)  # where root has not enlarged the read-ahead
        wait_until(lambda: any(stop == len(expected) for _, stop in report(archive)["coverage"]["ranges"]))
        wait_until(lambda: not in_page_cache(fd, footer))  # in place of the hour
        assert in_page_cache(fd, 4096)
        (large / "new").touch()
        with pytest.raises(OSError, match="Input/output error"):
            while piece := file.read(4096):
                got += piece
    assert expected[:footer].startswith(got)


@pytest.mark.fuse
@pytest.mark.usefixtures("library")
def test_nothing_is_kept_from_one_open_to_the_next(large: Path, mount: Callable[..., Path]) -> None:
    """Nor is anything for programs that had it open before: each open drops all pages."""
    archive = mount(large)
    with archive.open("rb", buffering=0) as first:
        assert len(first.read(KEPT)) == KEPT
        assert in_page_cache(first.fileno(), 0)
        with archive.open("rb", buffering=0) as second:
            assert not in_page_cache(first.fileno(), 0)
            assert not in_page_cache(second.fileno(), 0)


@pytest.mark.fuse
@pytest.mark.usefixtures("library")
def test_direct_keeps_nothing(large: Path, mount: Callable[..., Path]) -> None:
    with mount(large, "--direct").open("rb", buffering=0) as file:
        assert len(file.read(KEPT)) == KEPT
        assert not in_page_cache(file.fileno(), 0)


@pytest.mark.fuse
@pytest.mark.usefixtures("library")
def test_small_reads_are_few_requests(large: Path, mount: Callable[..., Path]) -> None:
    """And none for the archive's attributes."""
    archive = mount(large)
    with archive.open("rb", buffering=0) as file:
        while file.read(512):
            pass
        wait_until(lambda: report(archive)["coverage"]["size"] == report(archive)["size"])
        assert report(archive)["delivered"] < 2 * report(archive)["size"]
