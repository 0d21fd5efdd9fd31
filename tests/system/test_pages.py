"""What the kernel's page cache has of an archive is not read any more once there is drift, however it is read."""

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.programs import run, wait_until
from support.reference import Reference

from tartapefs.mount import session as binding
from tartapefs.mount.session import Session

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
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("cached", [(), ("--cached",)], ids=["direct", "cached"])
def test_open_descriptors_fail_after_drift(large: Path, mount: Callable[..., Path], cached: tuple[str, ...]) -> None:
    expected = Reference(large).read(0, KEPT)
    archive = mount(large, *cached)
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
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fds[0], 4096, archive.stat().st_size - 4096)
        for way, fd in zip((by_read, by_sendfile, by_splice), fds, strict=True):
            wait_until(lambda way=way, fd=fd: fails(way, fd, expected[:4096]))  # type: ignore[misc]
        maps.stdin.write("\n")
        assert maps.wait(30) == -signal.SIGBUS


class Served:
    """A session that is mounted nowhere: the test is its kernel, which gets answers and notices."""

    def __init__(self) -> None:
        self.kernel, self._device = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self.kernel.settimeout(30)
        self.may_end, self.is_read = threading.Event(), threading.Event()
        self.session = Session.__new__(Session)
        archive = SimpleNamespace(
            readinto=self._readinto,
            is_served_by_one=False,
            statistics=SimpleNamespace(delivered=lambda *_: None),
            errno_of=lambda error: errno.EIO,
        )
        self.session.__dict__ |= {
            "_archive": archive,
            "_device": self._device.fileno(),
            "_pass_on": lambda address, length: None,
            "_serving": 0,
            "_serving_lock": threading.Lock(),
            "_files": {},
            "_under_way": set(),
            "_drop_lock": threading.Lock(),
            "hold": None,
        }
        self._thread = threading.Thread(target=self.session.loop, args=(memoryview(bytearray(binding.MEMORY)),))
        self._thread.start()

    def _readinto(self, buffer: memoryview, offset: int) -> int:
        self.is_read.set()
        self.may_end.wait(30)
        raise OSError

    def request(self, opcode: int, number: int, file: int, handle: int) -> None:
        request = struct.pack("=IIQQIIIIQQIIQII", 80, opcode, number, file, 0, 0, 0, 0, handle, 0, 4096, 0, 0, 0, 0)
        self.kernel.send(request)

    def close(self) -> None:
        self.may_end.set()
        self.kernel.shutdown(socket.SHUT_WR)
        self._thread.join(30)
        self.kernel.close()
        self._device.close()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


def dropping(served: Served, ended: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=served.session.drop_pages, args=(ended,))
    thread.start()
    return thread


NOTICE = struct.pack("=IiQQqq", 40, 2, 0, 77, 0, -1)  # linux/fuse.h: fuse_out_header, fuse_notify_inval_inode_out


def test_pages_are_dropped_after_the_reads_under_way(served: Served) -> None:
    """Before, the kernel would wait for their pages, and the daemon for the kernel."""
    served.request(15, 1, 77, 5)
    assert served.is_read.wait(30)
    thread = dropping(served, threading.Event())
    thread.join(0.2)
    assert thread.is_alive()
    served.may_end.set()
    assert served.kernel.recv(100) == struct.pack("=IiQ", 16, -errno.EIO, 1)
    assert served.kernel.recv(100) == NOTICE
    thread.join(30)
    assert not thread.is_alive()


def test_a_session_that_ends_drops_nothing_while_a_read_is_under_way(served: Served) -> None:
    served.request(15, 1, 77, 5)
    assert served.is_read.wait(30)
    ended = threading.Event()
    thread = dropping(served, ended)
    ended.set()
    thread.join(30)
    assert not thread.is_alive()
    served.session.drop_no_more(30)
    served.may_end.set()
    assert served.kernel.recv(100) == struct.pack("=IiQ", 16, -errno.EIO, 1)
    served.kernel.setblocking(False)
    with pytest.raises(BlockingIOError):
        served.kernel.recv(100)


def test_files_that_nobody_has_open_are_not_dropped(served: Served) -> None:
    served.may_end.set()
    for number, (opcode, file, handle) in enumerate([(15, 76, 4), (15, 77, 5), (15, 77, 6), (18, 76, 4), (18, 77, 5)]):
        served.request(opcode, number, file, handle)
        if opcode == 15:
            served.kernel.recv(100)
    wait_until(lambda: set(served.session._files) == {6})
    dropping(served, threading.Event()).join(30)
    assert served.kernel.recv(100) == NOTICE
