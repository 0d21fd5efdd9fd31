"""What the service manager is told, heard on its socket; the units as text."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.daemon import force_unmount
from support.programs import TARTAPEFS, run, wait_until

from tartapefs.mount import sd_notify as notify


class Manager:
    """A service manager that listens at `address`, of the file system or abstract."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1) if address[0] == "@" else address)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        """The lines heard so far."""
        with suppress(BlockingIOError):
            while True:
                self.heard += self.socket.recv(65536, socket.MSG_DONTWAIT).decode().split("\n")
        return self.heard

    def hears(self, line: str) -> None:
        wait_until(lambda: any(line in each for each in self.listen()))

    def hears_nothing_for(self, seconds: float) -> bool:
        self.listen().clear()
        time.sleep(seconds)
        return self.listen() == []


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = os.fspath(tmp_path / "notify") if request.param == "path" else f"@tartapefs-tests-{os.getpid()}"
    manager = Manager(address)
    yield manager
    manager.socket.close()


@contextmanager
def service(
    manager: Manager, source: Path, mountpoint: Path, *options: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*TARTAPEFS, "mount", "--foreground", source, mountpoint, *options],
        env=os.environ | {"NOTIFY_SOCKET": manager.address} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill() if process.poll() is None else None
        process.communicate(timeout=30)
        force_unmount(mountpoint)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


@pytest.mark.fuse
def test_ready_means_readable(manager: Manager, tree: Path, mountpoint: Path) -> None:
    """READY=1 comes once the archive can be read, STOPPING=1 before it is unmounted."""
    run("record", tree)
    with service(manager, tree, mountpoint) as process:
        manager.hears("READY=1")
        assert (mountpoint / "archive.tar").read_bytes()
        manager.hears("STATUS=valid; delivered ")
        assert "WATCHDOG=1" not in manager.listen()
        process.terminate()
        assert process.wait(30) == 0
        assert "STOPPING=1" in manager.listen()


@pytest.mark.fuse
@pytest.mark.long
def test_drift_is_told_by_name(manager: Manager, tree: Path, mountpoint: Path) -> None:
    run("record", tree)
    with service(manager, tree, mountpoint) as process:
        manager.hears("READY=1")
        (tree / "photos" / "512.bin").write_bytes(b"another")
        with pytest.raises(OSError, match="Input/output error"):
            (mountpoint / "archive.tar").read_bytes()
        manager.hears("STATUS=invalid: data/photos/512.bin: size changed since recording")
        process.terminate()
        assert process.wait(30) == 1


@pytest.mark.fuse
def test_a_mount_in_the_background_tells_nothing(manager: Manager, tree: Path, mountpoint: Path) -> None:
    """The service is who called; whether and when that is ready is for it to say."""
    run("record", tree)
    environment = os.environ | {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "100000"}
    assert run("mount", tree, mountpoint, env=environment).returncode == 0
    time.sleep(0.5)
    assert run("unmount", mountpoint).returncode == 0
    assert manager.listen() == []


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.needs("bindfs")
def test_the_watchdog_is_told_only_while_requests_are_answered(tree: Path, tmp_path: Path, mountpoint: Path) -> None:
    """With every thread held by a source that hangs, the process lives but says nothing.

    Directly: readers of the page cache would wait for one request together.
    """
    manager = Manager(os.fspath(tmp_path / "notify"))
    source = tmp_path / "bound"
    source.mkdir()
    run("record", tree)
    bindfs = subprocess.Popen(["bindfs", "-f", "-o", "attr_timeout=0,entry_timeout=0", tree, source])
    readers = []
    try:
        wait_until(lambda: os.path.ismount(source))
        with service(manager, source, mountpoint, "--direct", WATCHDOG_USEC="600000") as process:
            manager.hears("READY=1")
            for _ in range(3):
                manager.heard.clear()
                manager.hears("WATCHDOG=1")
            bindfs.send_signal(signal.SIGSTOP)
            readers = [
                subprocess.Popen(["cat", mountpoint / "archive.tar"], stdout=subprocess.DEVNULL) for _ in range(8)
            ]
            wait_until(lambda: manager.hears_nothing_for(2))
            assert process.poll() is None
            bindfs.send_signal(signal.SIGCONT)
            manager.hears("WATCHDOG=1")
            process.terminate()
            process.wait(30)
    finally:
        bindfs.send_signal(signal.SIGCONT)
        for reader in readers:
            reader.wait(30)
        subprocess.run(["umount", "-l", source], check=False)
        bindfs.wait(30)
        manager.socket.close()


def test_the_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    assert notify.watchdog() == 3.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert notify.watchdog() == 3.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert notify.watchdog() is None
    monkeypatch.delenv("WATCHDOG_PID")
    for nothing in ("0", "", "soon"):
        monkeypatch.setenv("WATCHDOG_USEC", nothing)
        assert notify.watchdog() is None


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody-listens-here", "vsock:2:1234", "", "/" + "x" * 200])
def test_a_manager_that_does_not_listen_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.send("READY=1")


def said(command: list[object], journal: bool, **environment: str) -> list[str]:
    """What a command says on standard error, which is the journal according to JOURNAL_STREAM, or only seems to be."""
    reading, writing = socket.socketpair()
    with reading, writing:
        status = os.fstat(writing.fileno())
        stream = f"{status.st_dev}:{status.st_ino + (not journal)}"
        subprocess.run([*TARTAPEFS, *command], stderr=writing, env=os.environ | {"JOURNAL_STREAM": stream}, timeout=60)
        return reading.recv(65536).decode().splitlines()


def test_levels_in_the_journal_and_nowhere_else(tree: Path, tmp_path: Path) -> None:
    """Who runs the command from within a service, but with another standard error, gets none."""
    missing = tmp_path / "missing"
    (line,) = said(["info", missing], journal=True)
    assert line.startswith(f"<3>{missing}")
    (line,) = said(["info", missing], journal=False)
    assert line.startswith(f"tartapefs: {missing}")
    (line,) = said(["record", tree], journal=True)
    assert line.startswith("<6>recorded ")


def test_each_line_of_a_log_record_has_its_level() -> None:
    """A traceback, too."""
    formatter = notify.JournalFormatter()
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.LogRecord("tartapefs", logging.CRITICAL, "", 0, "it %s", ("ended",), sys.exc_info())
    lines = formatter.format(record).splitlines()
    assert lines[0] == "<2>it ended"
    assert lines[-1] == "<2>second"
    assert all(line.startswith("<2>") for line in lines)
    levels = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
    assert {level: int(notify.with_level("", level)[1]) for level in levels} == levels
