"""The daemon's parts that need no mount: reasons, the log, descriptors, and what a mount that fails raises."""

import logging
import logging.handlers
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tartapefs import Tape, TapeRecorder
from tartapefs.base.errors import MountError, OutputError
from tartapefs.mount import background, daemon
from tartapefs.mount import status as reports
from tartapefs.mount.mount_table import MountEntry
from tartapefs.play.engine import TapePlayer

PLAYER: Any = SimpleNamespace(source=SimpleNamespace(root="/srv/data"))
OPTIONS: Any = SimpleNamespace()


@pytest.fixture
def player(tree: Path) -> Iterator[TapePlayer]:
    TapeRecorder(tree).commit()
    with Tape.discover(tree) as tape:
        player = TapePlayer(tape)
        yield player
        player.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MountError("/mnt", "is not empty"), "is not empty"),
        (MemoryError(), "there is not enough memory"),
        (OSError(24, "Too many open files"), "Too many open files"),
        (OSError("odd"), "odd"),
        (KeyError("x"), "KeyError('x')"),
    ],
)
def test_the_reason_of_an_error(error: BaseException, reason: str) -> None:
    assert daemon._reason(error) == reason


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(13, "Permission denied", "/dev/fuse\n"),
            r"/mnt: could not be mounted: /dev/fuse\n: Permission denied",
        ),
        (OSError(12, "Cannot allocate memory"), "/mnt: could not be mounted: Cannot allocate memory"),
        (MountError("/mnt", "is not empty"), "/mnt: is not empty"),
    ],
)
def test_a_mount_that_fails_raises_one_error_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(mountpoint: str, source: str) -> str:
        raise error

    monkeypatch.setattr(daemon, "check_mountpoint", fail)
    with pytest.raises(MountError) as caught:
        daemon.mount(PLAYER, "/mnt", OPTIONS, foreground=True, log_file=None)
    assert str(caught.value) == message


def test_a_machine_without_libfuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("libfuse is not installed")

    monkeypatch.setattr(daemon, "check_mountpoint", lambda mountpoint, source: mountpoint)
    monkeypatch.setattr(daemon, "load", fail)
    with pytest.raises(MountError, match="/mnt: libfuse is not installed"):
        daemon.mount(PLAYER, "/mnt", OPTIONS, foreground=True, log_file=None)


class TestLog:
    def test_in_the_foreground_it_goes_to_standard_error(self) -> None:
        assert isinstance(daemon._log_handler(PLAYER, None, foreground=True), logging.NullHandler)

    def test_in_the_background_it_goes_to_syslog(self) -> None:
        handler = daemon._log_handler(PLAYER, None, foreground=False)
        assert isinstance(handler, logging.handlers.SysLogHandler)
        assert handler.ident == "tartapefs: "
        handler.close()

    def test_a_file_is_appended_to(self, player: TapePlayer, tmp_path: Path) -> None:
        log = tmp_path / "log"
        log.write_text("before\n")
        handler = daemon._log_handler(player, str(log), foreground=False)
        assert isinstance(handler, logging.StreamHandler)
        with handler.stream:
            handler.handle(logging.LogRecord("tartapefs", logging.WARNING, "", 0, "caf\udce9", None, None))
        before, line = log.read_text().splitlines()
        assert before == "before"
        assert line.endswith(r" WARNING caf\udce9")

    def test_a_pipe_is_refused(self, player: TapePlayer, tmp_path: Path) -> None:
        """To open one waits for its reader."""
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(MountError, match="cannot be the log: is a pipe"):
            daemon._log_handler(player, str(tmp_path / "pipe"), foreground=False)

    def test_a_folder_that_is_not_there(self, player: TapePlayer, tmp_path: Path) -> None:
        with pytest.raises(MountError, match="cannot be the log: No such file or directory"):
            daemon._log_handler(player, str(tmp_path / "none" / "log"), foreground=False)

    @pytest.mark.parametrize("name", ["script.sh", ".tartape/index.db", "new"])
    def test_a_part_of_the_tape_is_refused(self, player: TapePlayer, tree: Path, name: str) -> None:
        with pytest.raises(OutputError):
            daemon._log_handler(player, str(tree / name), foreground=False)
        assert not (tree / "new").exists()
        assert (tree / "script.sh").read_text() == "#!/bin/sh\n"


def test_too_few_descriptors_are_found_before_the_mount() -> None:
    before = len(os.listdir("/proc/self/fd"))
    daemon._check_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = [descriptor for descriptor in range(1000) if descriptor not in used]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[8], hard))
        with pytest.raises(OSError, match="Too many open files"):
            daemon._check_descriptors()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_archive_that_cannot_be_read_is_not_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "failure_of", lambda path: "Input/output error")
    with pytest.raises(MountError, match=r"/mnt/archive.tar: mounted, but cannot be read: Input/output error"):
        daemon._check_readable("/mnt/archive.tar")


def test_a_mount_goes_without_a_socket_if_it_can_have_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: str, report: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(reports, "Server", fail)
    assert daemon._status_server([MountEntry("0:57", "/mnt", "/srv/data", 0)], dict) is None
    assert "no socket for `tartapefs status`: Read-only file system" in caplog.text
    assert daemon._status_server([], dict) is None


@pytest.mark.parametrize("is_open", [True, False])
def test_a_thread_that_serves_tells_that_it_has_ended(is_open: bool) -> None:
    """And why, if it failed; the pipe may be closed by then."""

    def fail(memory: memoryview) -> None:
        raise OSError(5, "Input/output error")

    reading, writing = os.pipe()
    if not is_open:
        os.close(writing)
    failures: list[BaseException] = []
    serving: Any = SimpleNamespace(loop=fail)
    daemon._loop(serving, memoryview(b""), writing, failures)
    ending: Any = SimpleNamespace(loop=lambda memory: None)
    daemon._loop(ending, memoryview(b""), writing, failures)
    if is_open:
        os.close(writing)
    assert os.read(reading, 10) == (b"EE" if is_open else b"")
    os.close(reading)
    assert [str(error) for error in failures] == ["[Errno 5] Input/output error"]
