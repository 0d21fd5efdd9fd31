"""A mounted tape whose source drifts, and system calls of its daemon that fail."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.daemon import is_gone
from support.programs import wait_until
from support.reference import Reference


@dataclass
class Mounted:
    """A mounted tape, a descriptor of its archive, what the archive must hold, and the daemon's log."""

    root: Path
    archive: Path
    fd: int
    starts: dict[bytes, int]
    expected: bytes
    log: Path

    def read(self, member: str, shift: int = 0, size: int = 4096) -> bytes:
        return os.pread(self.fd, size, self.starts[os.fsencode(member)] + shift)

    def fails(self, action: Callable[[], object]) -> None:
        with pytest.raises(OSError) as caught:
            action()
        assert caught.value.errno == errno.EIO

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def state(self) -> str:
        return os.getxattr(self.archive.parent, "user.tartape.state").decode()

    def read_all(self, size: int = 3000) -> bytes:
        """What can be read in order, until an error that must be EIO, or the end."""
        data = b""
        try:
            while piece := os.pread(self.fd, size, len(data)):
                data += piece
        except OSError as error:
            assert error.errno == errno.EIO
        return data

    def holds_pages(self) -> bool:
        """Whether the kernel still has pages of the archive, which it drops in the moments after the first error."""
        for at in range(0, len(self.expected), 4096):
            with suppress(OSError):
                return bool(os.pread(self.fd, 1, at))
        return False

    def check_invalid_for_good(self, culprit: str) -> None:
        """stat, open and read of anything fail; the folder lists, and says what drifted; one line in the log."""
        self.fails(lambda: os.stat(self.archive))
        self.fails(lambda: os.open(self.archive, os.O_RDONLY))
        self.fails(lambda: os.fstat(self.fd))
        for at in (0, 1, len(self.expected) // 2, len(self.expected) - 1):
            self.fails(lambda at=at: os.pread(self.fd, 1, at))
        assert os.listdir(self.archive.parent) == ["archive.tar"]
        assert self.state().startswith(f"invalid: {culprit}: ")
        assert REMEDY in self.state()
        (line,) = self.lines()
        assert f" {culprit}: " in line
        assert REMEDY in line


@contextmanager
def opened(root: Path, archive: Path, log: Path) -> Iterator[Mounted]:
    reference = Reference(root)
    fd = os.open(archive, os.O_RDONLY)
    try:
        yield Mounted(root, archive, fd, reference.starts, reference.read(0, reference.size), log)
    finally:
        os.close(fd)


@contextmanager
def failing(pid: int, *options: object) -> Iterator[None]:
    """System calls of the process fail meanwhile, as strace is told."""
    command = ["strace", "-f", "-qq", "-o", "/dev/null", *map(os.fspath, options), "-p", str(pid)]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    try:
        tasks = [f"/proc/{pid}/task/{task}/status" for task in os.listdir(f"/proc/{pid}/task")]
        while not all(f"TracerPid:\t{tracer.pid}\n" in Path(task).read_text() for task in tasks):
            if tracer.poll() is not None:
                pytest.skip(f"strace cannot attach: {tracer.stderr.read().decode(errors='replace')}")
        yield
    finally:
        tracer.terminate()
        wait_until(lambda: tracer.poll() is not None or is_gone(pid))
        tracer.kill()  # it would wait for a traced process that has ended
        tracer.wait(60)
        tracer.stderr.close()


REMEDY = 'run "tartapefs record --force /'
