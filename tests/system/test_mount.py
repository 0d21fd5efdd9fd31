"""Mounting and unmounting: the life of the process that serves an archive, from the command line."""

import errno
import os
import random
import select
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from support.daemon import daemon_of, daemons_of, force_unmount, foreground, is_mounted, resident
from support.programs import TARTAPEFS, our_mounts, run, wait_until
from support.reference import Reference
from support.users import NOBODY, User, unprivileged

Mount = Callable[..., Path]
pytestmark = pytest.mark.fuse
# What a descriptor of an archive says once its daemon has gone.
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV)


@pytest.fixture
def tape(tree: Path) -> tuple[Path, bytes]:
    """A recorded folder, and the archive that it must have."""
    assert run("record", tree).returncode == 0
    reference = Reference(tree)
    return tree, reference.read(0, reference.size)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; whatever is mounted there is unmounted at the end."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    force_unmount(folder)


def refused(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line with which a command was refused."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tartapefs: ")
    return lines[0]


def gone(mountpoint: Path) -> bool:
    return not is_mounted(mountpoint) and not daemons_of(mountpoint)


# Coming up


def test_the_archive_can_be_read_once_mount_returns(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """Five times, without any waiting."""
    root, expected = tape
    for _ in range(5):
        result = run("mount", root, mountpoint)
        assert (mountpoint / "archive.tar").read_bytes() == expected
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert run("unmount", mountpoint).returncode == 0
        assert os.listdir(mountpoint) == []
    wait_until(lambda: gone(mountpoint))


def test_the_daemon_has_left_the_terminal(tape: tuple[Path, bytes], mountpoint: Path, mount: Mount) -> None:
    """A session of its own, `/` as its folder, and nothing of the caller's as standard input, output or error."""
    pid = daemon_of(mount(tape[0]).parent)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {"/dev/null"}


def test_the_daemon_keeps_no_descriptor_of_its_caller(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """Such as a shell's lock file or pipe: who waits for the end of a pipe must not wait for the unmount."""
    reading, writing = os.pipe()
    try:
        assert run("mount", tape[0], mountpoint, pass_fds=[writing]).returncode == 0
        os.close(writing)
        ready, _, _ = select.select([reading], [], [], 30)
        assert ready, "the daemon still holds the pipe"
        assert os.read(reading, 1) == b""
    finally:
        os.close(reading)
        assert run("unmount", mountpoint).returncode == 0


def test_a_caller_without_standard_descriptors(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    """As some init systems start programs; nothing of the daemon's own may take the places 0, 1 and 2."""
    root, expected = tape
    command = [*TARTAPEFS, "mount", root, mountpoint]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=True, timeout=30)
    assert (mountpoint / "archive.tar").read_bytes() == expected
    assert run("unmount", mountpoint).returncode == 0


def test_foreground_stays_and_serves(tape: tuple[Path, bytes], mountpoint: Path) -> None:
    root, expected = tape
    with foreground(root, mountpoint) as process:
        assert (mountpoint / "archive.tar").read_bytes() == expected
        assert process.poll() is None
        assert daemon_of(mountpoint) == process.pid


def test_relative_paths(tape: tuple[Path, bytes], mountpoint: Path, tmp_path: Path) -> None:
    """Source, mount point, index and log stay what they were for the caller, though the daemon changes its folder."""
    root, expected = tape
    shutil.move(root / ".tartape" / "index.db", tmp_path / "moved.db")
    options = ["--index", "moved.db", "--log", "drift.log"]
    result = run("mount", root.name, mountpoint.name, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    archive = mountpoint / "archive.tar"
    assert archive.read_bytes() == expected
    (root / "script.sh").write_text("changed")
    with pytest.raises(OSError):
        archive.read_bytes()
    assert "data/script.sh" in (tmp_path / "drift.log").read_text()
    assert run("unmount", os.path.join(".", mountpoint.name, ""), cwd=tmp_path).returncode == 0


NAMES = {
    "newline": b"two\nlines",
    "invalid UTF-8": b"\xff\xfe",
    "space": b"two words",
    "comma": b"a,suid,allow_other,b",
    "backslash": b"back\\slash",
    "octal escape": b"a\\040b",
    "tab": b"a\tb",
    "carriage return": b"a\rb",
    "non-ASCII": "dätä \u65e5\u672c".encode(),
    "dash": b"-f",
}


@pytest.mark.long(but=1)
@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_any_name_of_source_and_mount_point(tmp_path: Path, name: bytes) -> None:
    """Mounts, reads, refuses a second mount in words, unmounts."""
    root, mountpoint = tmp_path / "from" / os.fsdecode(name), tmp_path / "to" / os.fsdecode(name)
    if b"\r" in name:
        mountpoint = tmp_path / "to" / "plain"  # the check for mounts left behind goes by lines
    root.mkdir(parents=True)
    mountpoint.mkdir(parents=True)
    (root / "x").write_bytes(b"content")
    assert run("record", root).returncode == 0
    reference = Reference(root)
    try:
        result = run("mount", root, mountpoint)
        assert result.returncode == 0, result.stderr
        assert (mountpoint / "archive.tar").read_bytes() == reference.read(0, reference.size)
        refused(run("mount", root, mountpoint), 5)
        result = run("unmount", mountpoint)
        assert result.returncode == 0, result.stderr
        refused(run("unmount", mountpoint), 5)
    finally:
        force_unmount(mountpoint)


def test_a_mount_point_behind_a_link(tape: tuple[Path, bytes], mountpoint: Path, tmp_path: Path) -> None:
    root, expected = tape
    link = tmp_path / "link"
    link.symlink_to(mountpoint)
    assert run("mount", root, link).returncode == 0
    assert (mountpoint / "archive.tar").read_bytes() == expected
    assert run("unmount", link).returncode == 0
    wait_until(lambda: gone(mountpoint))


@pytest.mark.long
def test_two_mounts_of_one_tape_and_one_of_another(tape: tuple[Path, bytes], tmp_path: Path, mount: Mount) -> None:
    """Each lives by itself: unmounting one, or drift of one, is nothing to the others."""
    root, expected = tape
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").write_bytes(b"something else")
    assert run("record", other).returncode == 0
    reference = Reference(other)
    content = reference.read(0, reference.size)
    first, second, third = mount(root), mount(root), mount(other)
    assert [path.read_bytes() for path in (first, second, third)] == [expected, expected, content]
    assert run("unmount", first.parent).returncode == 0
    assert second.read_bytes() == expected
    (root / "script.sh").write_text("changed")
    with pytest.raises(OSError):
        second.read_bytes()
    assert third.read_bytes() == content


# Refusals before anything is mounted


def test_a_folder_without_a_tape(tree: Path, mountpoint: Path) -> None:
    """Exit 3 and the command to run."""
    line = refused(run("mount", tree, mountpoint), 3)
    assert f"tartapefs record {tree}" in line
    assert gone(mountpoint)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "overwritten"])
def test_a_damaged_index(tape: tuple[Path, bytes], mountpoint: Path, damage: str) -> None:
    """Exit 3, and the path of the index."""
    index = tape[0] / ".tartape" / "index.db"
    content = index.read_bytes()
    damaged = {
        "empty": b"",
        "garbage": bytes(len(content)),
        "cut": content[: len(content) // 2],
        "overwritten": content[:100] + b"\xa5" * 400 + content[500:],
    }[damage]
    index.chmod(0o600)
    index.write_bytes(damaged)
    assert str(index) in refused(run("mount", tape[0], mountpoint), 3)
    assert gone(mountpoint)


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    "place", ["missing", "a file", "not empty", "the source", "inside the source", "a link into the source"]
)
def test_a_place_that_cannot_be_mounted_on(tape: tuple[Path, bytes], tmp_path: Path, place: str) -> None:
    """Exit 5, one line that names the place, nothing mounted and nothing changed."""
    root, _ = tape
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_bytes(b"x")
    (tmp_path / "link").symlink_to(root / "empty-folder")
    where = {
        "missing": tmp_path / "missing",
        "a file": tmp_path / "file",
        "not empty": tmp_path / "full",
        "the source": root,
        "inside the source": root / "empty-folder",
        "a link into the source": tmp_path / "link",
    }[place]
    assert str(where) in refused(run("mount", root, where), 5)
    assert str(where) in refused(run("mount", "-f", root, where, timeout=60), 5)
    assert os.path.realpath(where) not in our_mounts()
    assert not daemons_of(where)
    assert not (tmp_path / "missing").exists()
    assert run("verify", root).returncode == 0


def test_a_place_that_is_mounted_already(tape: tuple[Path, bytes], mount: Mount) -> None:
    root, expected = tape
    archive = mount(root)
    daemon = daemon_of(archive.parent)
    for options in ((), ("-f",)):
        refused(run("mount", root, archive.parent, *options, timeout=60), 5)
    assert archive.read_bytes() == expected
    assert daemon_of(archive.parent) == daemon


def test_a_log_that_cannot_be_written_is_refused(tape: tuple[Path, bytes], mountpoint: Path, tmp_path: Path) -> None:
    """At once, and by name: not when there is something to say and nobody to hear it."""
    log = tmp_path / "missing" / "drift.log"
    result = run("mount", tape[0], mountpoint, "--log", log)
    if result.returncode == 0:
        run("unmount", mountpoint)
    assert result.returncode in (2, 5)
    assert "drift.log" in result.stderr
    assert gone(mountpoint)


def test_a_log_that_cannot_be_written_any_more_does_not_end_the_archive_early(
    tape: tuple[Path, bytes], mountpoint: Path, tmp_path: Path
) -> None:
    """Drift is EIO, whether or not it can be logged; an empty answer would be the end of the file."""
    root, expected = tape
    folder = tmp_path / "logs"
    folder.mkdir()
    assert run("mount", root, mountpoint, "--log", folder / "drift.log").returncode == 0
    shutil.rmtree(folder)
    start = Reference(root).starts[b"data/script.sh"]
    with (mountpoint / "archive.tar").open("rb", buffering=0) as file:
        (root / "script.sh").write_text("changed")
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                os.pread(file.fileno(), 1000, start)
            assert caught.value.errno == errno.EIO
    assert run("unmount", mountpoint).returncode == 0
    assert len(expected) > start


# Recording first


def test_record_first(tree: Path, mountpoint: Path) -> None:
    """`--record` makes a tape where there is none, and leaves alone one that there is."""
    assert run("mount", tree, mountpoint, "--record").returncode == 0
    reference = Reference(tree)
    assert (mountpoint / "archive.tar").read_bytes() == reference.read(0, reference.size)
    assert run("unmount", mountpoint).returncode == 0
    index = tree / ".tartape" / "index.db"
    before = index.stat()
    assert run("mount", tree, mountpoint, "--record").returncode == 0
    after = index.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert run("unmount", mountpoint).returncode == 0


def test_record_first_of_what_cannot_be_recorded(tree: Path, mountpoint: Path) -> None:
    """Exit 4 as of `record`, nothing mounted, nothing written."""
    (tree / "long").symlink_to("x" * 101)
    result = run("mount", tree, mountpoint, "--record")
    assert result.returncode == 4
    assert "long" in result.stderr
    assert gone(mountpoint)
    assert not (tree / ".tartape" / "index.db").exists()


# Going down


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


def test_drift_is_logged_to_a_file(tape: tuple[Path, bytes], mountpoint: Path, tmp_path: Path) -> None:
    """One line, however often it is read: path, recorded, found, remedy."""
    root, _ = tape
    log = tmp_path / "drift.log"
    assert run("mount", root, mountpoint, "--log", log).returncode == 0
    with (root / "photos" / "512.bin").open("ab") as file:
        file.write(b"x" * 128)
    for _ in range(5):
        with pytest.raises(OSError):
            (mountpoint / "archive.tar").read_bytes()
    assert run("unmount", mountpoint).returncode == 0
    (line,) = log.read_text().splitlines()
    for part in ("data/photos/512.bin: ", "recorded 512", "found 640", 'run "tartapefs record --force"'):
        assert part in line


def test_log_lines_of_the_life_of_a_mount_are_one_line_each(tape: tuple[Path, bytes], tmp_path: Path) -> None:
    """Whatever the mount point is called."""
    mountpoint = tmp_path / "two\nlines"
    mountpoint.mkdir()
    process = subprocess.Popen(
        [*TARTAPEFS, "-v", "mount", "-f", tape[0], mountpoint],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_until(lambda: is_mounted(mountpoint))
        assert run("unmount", mountpoint).returncode == 0
        said = process.communicate(timeout=60)[1].splitlines()
        assert [line for line in said if not line.startswith(b"tartapefs: ")] == []
    finally:
        process.kill()
        process.wait()
        force_unmount(mountpoint)


@pytest.mark.long
def test_many_readers_and_the_memory_of_the_daemon(tmp_path: Path, mount: Mount) -> None:
    """32 at once: right bytes, and memory that does not grow with what they read."""
    root = tmp_path / "data"
    root.mkdir()
    for number in range(300):
        (root / f"{number:03}").write_bytes(random.Random(number).randbytes(number * 61))
    assert run("record", root).returncode == 0
    reference = Reference(root)
    expected = reference.read(0, reference.size)
    archive = mount(root)
    pid, wrong = daemon_of(archive.parent), []

    def reads(seed: int) -> None:
        choose = random.Random(seed)
        with archive.open("rb", buffering=0) as file:
            for _ in range(60):
                at, count = choose.randrange(len(expected)), choose.choice((1, 512, 4096, 131072, 1 << 20))
                if os.pread(file.fileno(), count, at) != expected[at : at + count]:
                    wrong.append(at)

    memory = []
    for _ in range(2):
        threads = [threading.Thread(target=reads, args=(seed,)) for seed in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        memory.append(resident(pid))
    assert not wrong
    assert memory[1] < memory[0] + (8 << 20)
    assert resident(pid, "VmHWM") < 150 << 20


# As a user who is not root


class TestUnprivileged:
    pytestmark = unprivileged

    def test_mount_read_and_unmount(self, user: User) -> None:
        """Through fusermount3; the archive is the user's own, and closed even to root."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        archive = mountpoint / "archive.tar"
        result = user.tartapefs("record", data)
        assert result.returncode == 0, result.stderr
        reference = Reference(data)
        (user.folder / "expected.tar").write_bytes(reference.read(0, reference.size))
        result = user.tartapefs("mount", data, mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        assert user("cmp", archive, user.folder / "expected.tar").returncode == 0
        found = user("stat", "-c", "%u %g %f %s", archive).stdout.split()
        assert found == [str(NOBODY), str(NOBODY), f"{stat.S_IFREG | 0o400:x}", str(reference.size)]
        assert "Permission denied" in user.as_root("cat", archive).stderr
        assert "Permission denied" in user.as_root("stat", mountpoint).stderr
        other = user.as_root("setpriv", "--reuid=4242", "--regid=4242", "--clear-groups", "ls", mountpoint)
        assert "Permission denied" in other.stderr
        result = user.tartapefs("unmount", mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        assert user("ls", "-A", mountpoint).stdout == ""
        wait_until(lambda: not daemons_of(mountpoint))

    def test_names_that_are_hard_for_fusermount(self, user: User) -> None:
        """Commas, backslashes, spaces and newlines in the source's and the mount point's name."""
        data, mountpoint = user.folder / "a,allow_other,b\\c d\ne", user.folder / "mnt,x \\y\nz"
        user("mkdir", mountpoint)
        user("mv", user.folder / "data", data)
        assert user.tartapefs("record", data).returncode == 0
        result = user.tartapefs("mount", data, mountpoint)
        assert result.returncode == 0, result.stderr
        assert user("cat", mountpoint / "archive.tar").returncode == 0
        result = user.tartapefs("unmount", mountpoint)
        assert result.returncode == 0, result.stderr

    def test_busy_and_lazy(self, user: User) -> None:
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        assert user.tartapefs("mount", data, mountpoint, "--record").returncode == 0
        script = 'exec 3< "$1/archive.tar"; shift; "$@"'
        environment = [f"PYTHONPATH={user.packages}", "PYTHONDONTWRITEBYTECODE=1"]
        command = ["env", *environment, user.interpreter, "-m", "tartapefs", "unmount", mountpoint]
        refused(user("sh", "-c", script, "sh", mountpoint, *command), 5)
        result = user("sh", "-c", script, "sh", mountpoint, *command, "--lazy")
        assert (result.returncode, result.stderr) == (0, "")
        wait_until(lambda: not daemons_of(mountpoint))

    @pytest.mark.long(but=1)
    @pytest.mark.parametrize("allowed", [False, True])
    def test_allow_other_is_for_the_administrator_to_allow(self, user: User, allowed: bool) -> None:
        """Without `user_allow_other` in fuse.conf: exit 5, and one line that names it."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        (user.folder / "fuse.conf").write_text("user_allow_other\n" if allowed else "# nothing\n")
        bound = user.as_root("mount", "--bind", user.folder / "fuse.conf", "/etc/fuse.conf")
        if bound.returncode:
            pytest.skip(f"/etc/fuse.conf cannot be replaced: {bound.stderr.strip()}")
        assert user.tartapefs("record", data).returncode == 0
        result = user.tartapefs("mount", data, mountpoint, "--allow-other", "--mode=0444")
        if allowed:
            assert result.returncode == 0, result.stderr
            assert user.as_root("cat", mountpoint / "archive.tar").returncode == 0
            assert user.tartapefs("unmount", mountpoint).returncode == 0
        else:
            assert "user_allow_other" in refused(result, 5)
            assert user("ls", "-A", mountpoint).stdout == ""

    def test_a_mount_point_of_someone_else(self, user: User) -> None:
        """fusermount3 refuses what the user may not write; its reason comes out in one line."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        os.chown(mountpoint, 0, 0)
        assert user.tartapefs("record", data).returncode == 0
        refused(user.tartapefs("mount", data, mountpoint), 5)

    def test_unmount_of_the_archive_of_someone_else(self, user: User) -> None:
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        assert user.tartapefs("mount", data, mountpoint, "--record").returncode == 0
        environment = [f"PYTHONPATH={user.packages}", "PYTHONDONTWRITEBYTECODE=1"]
        command = ["env", *environment, user.interpreter, "-m", "tartapefs", "unmount", mountpoint]
        other = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups"]
        refused(user.as_root(*other, *command), 5)
        assert user("ls", mountpoint).stdout == "archive.tar\n"
        assert user.tartapefs("unmount", mountpoint).returncode == 0

    def test_drift_is_seen(self, user: User) -> None:
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        log = user.folder / "drift.log"
        assert user.tartapefs("mount", data, mountpoint, "--record", "--log", log).returncode == 0
        user("touch", data / "more" / "program")
        assert "Input/output error" in user("cat", mountpoint / "archive.tar").stderr
        assert "data/more/program: mtime" in log.read_text()
        assert user.tartapefs("unmount", mountpoint).returncode == 0
