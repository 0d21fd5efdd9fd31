"""The end of a mount: signals, unmounting by whatever program, killed daemons and what they leave behind."""

import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from support.daemon import daemon_of, daemons_of, foreground, is_mounted
from support.mounting import GONE, gone, refused
from support.mounting import mountpoint as mountpoint
from support.mounting import tape as tape
from support.programs import TARTAPEFS, run, wait_until

Mount = Callable[..., Path]
pytestmark = pytest.mark.fuse


@contextmanager
def opened(archive: Path) -> Iterator[int]:
    """A descriptor of the archive; to close it is an error too once the daemon has gone."""
    fd = os.open(archive, os.O_RDONLY)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


@contextmanager
def busy_reader(archive: Path) -> Iterator[list[int | None]]:
    """Reads the archive over and over meanwhile; gives, at the end, what ended it: an errno."""
    ended: list[int | None] = []
    started = threading.Event()

    def reads() -> None:
        with opened(archive) as fd:
            try:
                while os.pread(fd, 65536, 0):
                    started.set()
                ended.append(None)
            except OSError as error:
                ended.append(error.errno)

    thread = threading.Thread(target=reads, daemon=True)
    thread.start()
    assert started.wait(60)
    yield ended
    thread.join(10)
    assert not thread.is_alive()


def check_goes_down(process: subprocess.Popen[bytes], number: signal.Signals, mountpoint: Path) -> None:
    process.send_signal(number)
    assert process.wait(60) == 0
    assert process.stderr is not None
    assert process.stderr.read().splitlines() == [b"tartapefs: %b: unmounted" % os.fsencode(mountpoint)]
    assert not is_mounted(mountpoint)
    assert os.listdir(mountpoint) == []


SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)


@SIGNALS
def test_a_signal_unmounts_cleanly(tape: tuple[Path, bytes], mountpoint: Path, number: signal.Signals) -> None:
    """Exit 0, no mount, nothing said but that."""
    with foreground(tape[0], mountpoint) as process:
        check_goes_down(process, number, mountpoint)


def test_a_signal_while_the_archive_is_open(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """A reader that holds it open does not keep the daemon, and gets an error at its next read."""
    with foreground(tape[0], mountpoint) as process, opened(mountpoint / "archive.tar") as fd:
        check_goes_down(process, signal.SIGTERM, mountpoint)
        with pytest.raises(OSError) as caught:
            os.pread(fd, 512, 0)
        assert caught.value.errno in GONE


def test_a_signal_while_the_archive_is_read(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """A reader in the middle of it gets an error, and does not hang."""
    with foreground(tape[0], mountpoint) as process:
        with busy_reader(mountpoint / "archive.tar") as ended:
            check_goes_down(process, signal.SIGTERM, mountpoint)
        assert ended[0] in GONE


@pytest.mark.long(but=1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_the_daemon_in_the_background(
    tape: tuple[Path, bytes], mountpoint: Path, number: signal.Signals
) -> None:
    assert run("mount", tape[0], mountpoint).returncode == 0
    with busy_reader(mountpoint / "archive.tar") as ended:
        os.kill(daemon_of(mountpoint), number)
        wait_until(lambda: gone(mountpoint))
    assert ended[0] in GONE


def test_signals_at_any_moment(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """While it starts, mounts or serves: within seconds nothing is mounted, and nobody is left."""
    choose = random.Random(5)
    for _ in range(12):
        process = subprocess.Popen(
            [*TARTAPEFS, "mount", "-f", tape[0], mountpoint],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        time.sleep(choose.uniform(0.02, 0.2))  # any moment will do
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert b"Traceback" not in said
        assert not is_mounted(mountpoint), process.returncode


@pytest.mark.long(but=1)
@pytest.mark.root
@pytest.mark.parametrize("command", [["umount"], ["fusermount3", "-u"], ["umount", "-l"]], ids=" ".join)
def test_an_unmount_by_someone_else_ends_the_daemon(
    tape: tuple[Path, bytes], mountpoint: Path, command: list[str]
) -> None:
    with foreground(tape[0], mountpoint) as process:
        subprocess.run([*command, mountpoint], check=True)
        assert process.wait(60) == 0
        assert os.listdir(mountpoint) == []


def test_unmount(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """Once it returns the folder is what it was, and the daemon soon is gone."""
    assert run("mount", tape[0], mountpoint).returncode == 0
    result = run("unmount", mountpoint)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert os.listdir(mountpoint) == []
    wait_until(lambda: gone(mountpoint))


@pytest.mark.parametrize("place", ["mnt", "file", "missing", "mnt/", "/proc"])
def test_unmount_of_what_is_not_mounted(mountpoint: Path, tmp_path: Path, place: str) -> None:
    """Exit 5 and one line; another file system is left alone."""
    (tmp_path / "file").write_bytes(b"")
    refused(run("unmount", place, cwd=tmp_path), 5)
    assert os.path.ismount("/proc")


def test_unmount_while_it_is_read(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """Exit 5, and the archive stays; `--lazy` takes the name away and lets the reader end."""
    root, expected = tape
    assert run("mount", root, mountpoint).returncode == 0
    with (mountpoint / "archive.tar").open("rb", buffering=0) as file:
        assert str(mountpoint) in refused(run("unmount", mountpoint), 5)
        assert (mountpoint / "archive.tar").read_bytes() == expected
        result = run("unmount", "--lazy", mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        assert os.listdir(mountpoint) == []
        assert file.readall() == expected
    wait_until(lambda: gone(mountpoint))


def test_a_new_mount_outlives_the_old_daemon(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """A lazy unmount, a new mount at the same place, then the last reader of the old one ends."""
    root, expected = tape
    assert run("mount", root, mountpoint).returncode == 0
    old = daemon_of(mountpoint)
    with (mountpoint / "archive.tar").open("rb", buffering=0) as file:
        assert run("unmount", "--lazy", mountpoint).returncode == 0
        assert run("mount", root, mountpoint).returncode == 0
        assert file.readall() == expected
    wait_until(lambda: old not in daemons_of(mountpoint))
    assert (mountpoint / "archive.tar").read_bytes() == expected
    assert run("unmount", mountpoint).returncode == 0


@pytest.mark.long
def test_a_new_mount_outlives_the_end_of_an_old_daemon_by_a_signal(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """The same, with the old daemon told to end."""
    root, expected = tape
    assert run("mount", root, mountpoint).returncode == 0
    old = daemon_of(mountpoint)
    with opened(mountpoint / "archive.tar") as fd:
        assert run("unmount", "--lazy", mountpoint).returncode == 0
        assert run("mount", root, mountpoint).returncode == 0
        os.kill(old, signal.SIGTERM)
        wait_until(lambda: old not in daemons_of(mountpoint))
        with pytest.raises(OSError):
            os.pread(fd, 512, 0)
    assert (mountpoint / "archive.tar").read_bytes() == expected
    assert run("unmount", mountpoint).returncode == 0


def test_foreground_tells_by_its_exit_that_there_was_drift(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """Exit 1, and the line of the log on standard error."""
    root, _ = tape
    with foreground(root, mountpoint) as process:
        (root / "script.sh").write_text("changed")
        with pytest.raises(OSError):
            (mountpoint / "archive.tar").read_bytes()
        assert run("unmount", mountpoint).returncode == 0
        assert process.wait(60) == 1
        assert process.stderr is not None
        said = process.stderr.read()
        assert b"data/script.sh: " in said
        assert b"Traceback" not in said


@contextmanager
def replaced(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str, *programs: str) -> Iterator[None]:
    """For what is started meanwhile, these programs are `script`."""
    folder.mkdir()
    for program in programs:
        (folder / program).write_text(f"#!/bin/sh\n{script}\n")
        (folder / program).chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield


CANNOT_UNMOUNT = ["echo not today >&2; exit 1", "umount", "fusermount3", "fusermount"]


def test_an_unmount_that_fails_at_the_end_is_told(
    tape: tuple[Path, bytes], mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the foreground by exit code 5, and by one line."""
    with ExitStack() as stack:
        with replaced(monkeypatch, tmp_path / "bin", *CANNOT_UNMOUNT):
            process = stack.enter_context(foreground(tape[0], mountpoint))
        process.terminate()
        assert process.wait(60) == 5
        assert process.stderr is not None
        assert process.stderr.read() == f"tartapefs: {mountpoint}: not today\n".encode()
        assert errno_of_listing(mountpoint) == errno.ENOTCONN


def test_an_unmount_that_fails_at_the_end_is_logged(
    tape: tuple[Path, bytes], mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    with replaced(monkeypatch, tmp_path / "bin", *CANNOT_UNMOUNT):
        assert run("mount", tape[0], mountpoint, "--log", log).returncode == 0
    os.kill(daemon_of(mountpoint), signal.SIGTERM)
    wait_until(lambda: errno_of_listing(mountpoint) == errno.ENOTCONN)
    assert f"ERROR {mountpoint}: not today\n" in log.read_text()


def test_a_mount_that_cannot_be_read_is_none(
    tape: tuple[Path, bytes], mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has a look: one that waits for an answer of its own could not be killed meanwhile."""
    script = "echo \"stat: cannot statx '$2': Permission denied\" >&2; exit 1"
    with replaced(monkeypatch, tmp_path / "bin", script, "stat"):
        result = run("mount", tape[0], mountpoint)
    assert result.returncode == 5
    said = f"tartapefs: {mountpoint}: mounted, but cannot be read: Permission denied\n"
    assert result.stderr.replace("/archive.tar", "") == said
    assert not is_mounted(mountpoint)


def test_a_daemon_killed_while_it_looks_at_its_mount_is_gone(
    tape: tuple[Path, bytes], mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    with replaced(monkeypatch, tmp_path / "bin", f"touch {asked}; exec sleep 5", "stat"):
        process = subprocess.Popen([*TARTAPEFS, "mount", "-f", tape[0], mountpoint], stderr=subprocess.DEVNULL)
    wait_until(asked.exists)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert errno_of_listing(mountpoint) == errno.ENOTCONN


def errno_of_listing(folder: Path) -> int | None:
    try:
        os.listdir(folder)
    except OSError as error:
        return error.errno
    return None


@pytest.mark.long(but=1)
@pytest.mark.parametrize("how", ["mount", "unmount"])
def test_a_place_left_behind_by_a_killed_daemon(tape: tuple[Path, bytes], mountpoint: Path, how: str) -> None:
    """The next `mount` heals it, and `unmount` works on it."""
    root, expected = tape
    assert run("mount", root, mountpoint).returncode == 0
    os.kill(daemon_of(mountpoint), signal.SIGKILL)
    wait_until(lambda: errno_of_listing(mountpoint) == errno.ENOTCONN)
    if how == "mount":
        result = run("mount", root, mountpoint)
        assert result.returncode == 0, result.stderr
        assert (mountpoint / "archive.tar").read_bytes() == expected
    result = run("unmount", mountpoint)
    assert result.returncode == 0, result.stderr
    assert os.listdir(mountpoint) == []
