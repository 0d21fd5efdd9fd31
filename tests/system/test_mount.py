"""Mounting: what a mount is once the command returns, what is refused, and what the daemon logs."""

import errno
import os
import random
import select
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import daemon_of, daemons_of, force_unmount, foreground, resident
from support.mounting import gone, refused
from support.mounting import mountpoint as mountpoint
from support.mounting import tape as tape
from support.programs import TARTAPEFS, our_mounts, run, wait_until
from support.reference import Reference

Mount = Callable[..., Path]
pytestmark = pytest.mark.fuse


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


# While it serves


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
    for part in ("data/photos/512.bin: ", "recorded 512", "found 640", f'run "tartapefs record --force {root}"'):
        assert part in line


def test_log_lines_of_the_life_of_a_mount_are_one_line_each(tape: tuple[Path, bytes], tmp_path: Path) -> None:
    """Whatever the mount point is called."""
    mountpoint = tmp_path / "two\nlines"
    mountpoint.mkdir()
    command = [*TARTAPEFS, "-v", "mount", "-f", tape[0], mountpoint]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr
            # Before it says so, the daemon reads its archive itself, and an unmount finds it busy.
            said = []
            while not (said and said[-1].endswith(b": mounted\n")):
                said.append(process.stderr.readline())
                assert said[-1]
            assert run("unmount", mountpoint).returncode == 0
            said += process.communicate(timeout=60)[1].splitlines()
        finally:
            process.kill()
            force_unmount(mountpoint)
    assert [line for line in said if not line.startswith(b"tartapefs: ")] == []


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
