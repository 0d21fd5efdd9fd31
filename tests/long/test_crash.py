"""Recorders and daemons that are killed, stopped, raced or out of disk: what was good stays good, and work goes on.

With TARTAPEFS_LONG=1 in the environment a recorder is killed at 200 points instead of 60, and a daemon 100 times
instead of 10.
"""

import errno
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.daemon import daemon_of, force_unmount, is_gone, is_mounted, waits_for_fuse
from support.generations import Generations
from support.programs import TARTAPEFS, our_mounts, run, umount, under_strace, wait_until
from support.reference import Reference

from tartapefs import Tape, TapeNotFoundError, TapePlayer, TapeRecorder

LONG = os.environ.get("TARTAPEFS_LONG") == "1"
OLD_NS = 1_600_000_000_123_456_789
# The system calls that change anything, or that say so, and how many of each are tried at most.
CHANGES = {
    "utimensat": 3, "mkdir": 2, "linkat": 1, "flock": 2, "pwrite64": 1000, "fsync": 3, "rename": 1, "unlink": 2,
    "write": 2,
}  # fmt: skip
LOOKS = "newfstatat,getdents64,openat,close"


def whole(root: Path) -> bytes:
    reference = Reference(root)
    return reference.read(0, reference.size)


def played(root: Path, allow_additions: bool = False) -> bytes:
    with Tape.discover(root) as tape:
        player = TapePlayer(tape, root, allow_additions=allow_additions)
        try:
            return player.read(0, tape.total_size)
        finally:
            player.close()


def make_tree(root: Path, files: int = 300) -> None:
    """Files that changed long ago, as far as can be, so that a recorder has no clock to wait for."""
    for number in range(files):
        folder = root / f"folder {number % 20:02}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"a file with a name of some length, number {number}").write_bytes(b"%d" % number)
    (root / "link").symlink_to("folder 00")
    for path in (*root.rglob("*"), root):
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)


# Killed recorders


class Victim:
    """A folder, with a tape or without, whose recorder is killed again and again."""

    def __init__(self, root: Path, had_tape: bool) -> None:
        self.root, self.had_tape = root, had_tape
        self.index = root / ".tartape" / "index.db"
        self.points = 0
        self.root_touched: list[str] = []
        self.expected = b""

    def prepare(self) -> None:
        """The next recording is of another archive than the tape that may be there."""
        (self.root / "folder 00" / "changing").write_bytes(os.urandom(700))
        if self.had_tape:
            TapeRecorder(self.root, overwrite=True).commit()
            (self.root / "folder 00" / "changing").write_bytes(os.urandom(900))
        elif self.index.parent.exists():
            self.index.unlink(missing_ok=True)
            self.index.parent.rmdir()
        os.utime(self.root, ns=(OLD_NS, OLD_NS))
        self.old = self.index.read_bytes() if self.had_tape else None
        self.expected = whole(self.root)

    def check(self, code: int, where: str) -> None:
        """After a recording that was killed, or was not: the old index, the new one, or none; and the next one works.

        Without a tape before, one instant can move the root's own time: after the folder for the index was made, and
        before the time is put back. That it is this instant is checked by the index's folder being there, and empty.
        """
        self.points += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), where
        new = False
        try:
            with Tape.discover(self.root) as tape:
                new = self.index.read_bytes() != self.old
                assert tape.rows_are_sound(), where
        except TapeNotFoundError:
            assert not self.had_tape, where
            assert code != 0, where
        else:
            assert new or self.had_tape, where
            assert new or code != 0, where
            if new:
                assert played(self.root) == self.expected, where
        left = set(os.listdir(self.index.parent)) if self.index.parent.exists() else set()
        unfinished = {name for name in left if re.fullmatch(r"index\.db\.(lock|[0-9a-f]{16}\.part)", name)}
        assert left <= {"index.db"} | unfinished and len(unfinished) <= 2, where
        if self.root.stat().st_mtime_ns != OLD_NS:
            assert self.index.parent.exists(), where
            assert not left, where
            self.root_touched.append(where)
        expected = whole(self.root)
        mtime_ns = self.root.stat().st_mtime_ns
        TapeRecorder(self.root, overwrite=True).commit()
        assert os.listdir(self.index.parent) == ["index.db"], where
        assert played(self.root) == expected, where
        assert self.root.stat().st_mtime_ns == mtime_ns, where


@pytest.fixture(params=[False, True], ids=["no tape before", "a tape before"])
def victim(tmp_path: Path, request: pytest.FixtureRequest) -> Victim:
    root = tmp_path / "data"
    make_tree(root)
    return Victim(root, request.param)


def killed_at(root: Path, calls: str, number: int, *options: str) -> int:
    """The exit code of a recorder that is killed on the way into the `number`th of these system calls."""
    inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:signal=SIGKILL:when={number}"]
    return subprocess.run(
        [*under_strace(*options, *inject), "record", "--force", root],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    ).returncode  # fmt: skip


@pytest.mark.needs("strace")
def test_a_recorder_killed_at_each_change(victim: Victim, record_property: Callable[[str, object], None]) -> None:
    """On the way into every system call that changes anything: the old index, the new one or none, and no litter."""
    for call, most in CHANGES.items():
        for number in range(1, most + 1, 1 if LONG or most < 10 else 6):
            victim.prepare()
            code = killed_at(victim.root, call, number)
            victim.check(code, f"at {call} {number}")
            if code == 0:
                break
    assert victim.points >= 8
    assert victim.root_touched == ([] if victim.had_tape else ["at utimensat 2"])
    record_property("points", victim.points)
    print(f"{victim.points} points; the root's time was moved {victim.root_touched}")


@pytest.mark.needs("strace")
def test_a_recorder_killed_while_it_looks(victim: Victim, record_property: Callable[[str, object], None]) -> None:
    """On the way into system calls that look at the source."""
    paths = [victim.root / "folder 07", victim.root / ".tartape" / "index.db.lock", victim.root]
    options = [option for path in paths for option in ("-P", os.fspath(path))]
    for number in range(1, 41 if LONG else 6):
        victim.prepare()
        code = killed_at(victim.root, LOOKS, number, *options)
        victim.check(code, f"at look {number}")
        if code == 0:
            break
    record_property("points", victim.points)
    print(f"{victim.points} points; the root's time was moved {victim.root_touched}")


def test_a_recorder_killed_at_any_time(victim: Victim, record_property: Callable[[str, object], None]) -> None:
    """At a moment that no system call marks."""
    some = random.Random(5)
    command = [*TARTAPEFS, "record", "--force", os.fspath(victim.root)]
    times = []
    for _ in range(3):
        victim.prepare()
        begun = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.monotonic() - begun)
    usual = min(times)
    for _ in range(45 if LONG else 8):
        victim.prepare()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        delay = usual * some.uniform(0.4, 1)
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        victim.check(process.wait(60), f"after {delay:.3f} s")
    record_property("points", victim.points)
    print(f"{victim.points} points; the root's time was moved {victim.root_touched}")


@pytest.mark.needs("strace")
@pytest.mark.matrix(but=1)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_append_that_ends_at_each_change(tmp_path: Path, number: signal.Signals) -> None:
    """On the way into every system call that changes anything: the old index, or the new one; and the next goes on."""
    root = tmp_path / "data"
    make_tree(root)
    index, expected, points = root / ".tartape" / "index.db", Generations(root), 0
    TapeRecorder(root).commit()
    archive = expected.append()
    for call, most in CHANGES.items():
        for at in range(1, most + 1, 1 if LONG or most < 10 else 6):
            (root / "folder 00" / f"{call} {at}").write_bytes(os.urandom(700))
            os.utime(root / "folder 00", ns=(OLD_NS, OLD_NS + points * 10**9))
            before, archive_before = index.read_bytes(), archive
            inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal={number.name}:when={at}"]
            command = [*under_strace(*inject), "record", "--append", root]
            code = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode
            archive = expected.append()
            assert archive.startswith(archive_before[:-1024])
            assert code in (0, -number if number == signal.SIGKILL else 128 + number), (call, at)
            expected_now = archive_before if index.read_bytes() == before else archive
            assert played(root, allow_additions=True) == expected_now, (call, at)
            if code != -signal.SIGKILL:
                assert os.listdir(root / ".tartape") == ["index.db"], (call, at)
            assert root.stat().st_mtime_ns == OLD_NS
            assert run("record", "--append", root).returncode == 0
            assert os.listdir(root / ".tartape") == ["index.db"], (call, at)
            assert played(root) == archive, (call, at)
            points += 1
            if code == 0 and index.read_bytes() != before and most > 10:
                break
    assert points >= 15


# Out of disk


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=0", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        umount(place)


@pytest.mark.root
@pytest.mark.parametrize("had_tape", [False, True])
@pytest.mark.parametrize("free", [0, 4, 8, 16, 40, 80, 160, 400])
def test_a_disk_too_small(tmp_path: Path, free: int, had_tape: bool) -> None:
    """With so many KiB free: the old index or none, nothing beside it, the root's time as before, and it says why."""
    with small_disk(tmp_path / "disk", "3m") as disk:
        root = disk / "data"
        make_tree(root, 600)
        if had_tape:
            TapeRecorder(root).commit()
            (root / "folder 00" / "one more").touch()
            os.utime(root, ns=(OLD_NS, OLD_NS))
        old = (root / ".tartape" / "index.db").read_bytes() if had_tape else None
        space = os.statvfs(disk)
        (disk / "ballast").write_bytes(bytes(space.f_bavail * space.f_frsize - free * 1024))
        result = run("record", "--force", root)
        assert "Traceback" not in result.stderr
        if result.returncode == 0:
            assert free > 40
            assert played(root) == whole(root)
        else:
            assert free < 400
            assert "No space left on device" in result.stderr
            index = root / ".tartape" / "index.db"
            assert (index.read_bytes() if index.exists() else None) == old
            assert index.parent.exists() == had_tape
            (disk / "ballast").unlink()
            assert run("record", "--force", root).returncode == 0
            assert played(root) == whole(root)
        assert os.listdir(root / ".tartape") == ["index.db"]
        assert root.stat().st_mtime_ns == OLD_NS


# Several recorders at once


def start_recorders(root: Path, count: int, *options: Sequence[str]) -> list[tuple[int, str]]:
    """Exit codes and messages of recorders that were started at once, so many with each of these options."""
    processes = [
        subprocess.Popen(
            [*TARTAPEFS, "record", *some, root],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for some in [*options] * count
    ]  # fmt: skip
    said = [process.communicate(timeout=60)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize("options", [(), ("--force",)], ids=["first", "forced"])
def test_recorders_that_race(tmp_path: Path, options: tuple[str, ...]) -> None:
    """One records, and the others record too or are refused; what is left is one whole index, and nothing beside it."""
    root = tmp_path / "data"
    make_tree(root)
    for turn in range(15 if LONG else 5):
        if not options and turn:
            (root / ".tartape" / "index.db").unlink()
            (root / ".tartape").rmdir()
        os.utime(root, ns=(OLD_NS, OLD_NS))
        ended = start_recorders(root, 2 + turn % 3, options)
        codes = [code for code, _ in ended]
        assert set(codes) <= {0, 4}, ended
        assert codes.count(0) == 1 if not options else 0 in codes, ended
        assert os.listdir(root / ".tartape") == ["index.db"]
        assert played(root) == whole(root)
        assert root.stat().st_mtime_ns == OLD_NS


@pytest.mark.parametrize("other", ["--append", "--force"])
def test_appends_that_race(tmp_path: Path, other: str) -> None:
    """With each other, or with one that records anew: one whole index of one or the other, and nothing beside it."""
    root = tmp_path / "data"
    make_tree(root)
    assert run("record", root).returncode == 0
    growing = Generations(root)
    growing.append()
    for turn in range(15 if LONG else 5):
        (root / "folder 00" / f"new {turn}").write_bytes(b"new")
        os.utime(root / "folder 00", ns=(OLD_NS, OLD_NS + turn * 10**9))
        anew = Generations(root)
        expected = [growing.append(), *([anew.append()] if other == "--force" else [])]
        ended = start_recorders(root, 1 + turn % 2, ["--append"], [other])
        codes = [code for code, _ in ended]
        assert set(codes) <= {0, 4} and 0 in codes, ended
        assert os.listdir(root / ".tartape") == ["index.db"]
        assert played(root) in expected
        assert root.stat().st_mtime_ns == OLD_NS
        if played(root) != expected[0]:
            growing = anew


@pytest.mark.needs("strace")
@pytest.mark.parametrize("slow", ["flock", "pwrite64", "fsync", "rename"])
@pytest.mark.parametrize("other", ["--append", "--force"])
def test_appends_that_race_at_the_worst_moment(tmp_path: Path, slow: str, other: str) -> None:
    """One is slow in one call while the other runs: one of them, or both after each other, and never half of one."""
    root = tmp_path / "data"
    make_tree(root)
    assert run("record", root).returncode == 0
    growing = Generations(root)
    growing.append()
    (root / "folder 00" / "new").write_bytes(b"new")
    os.utime(root / "folder 00", ns=(OLD_NS, OLD_NS + 10**9))
    expected = [growing.append(), Generations(root).append()]
    inject = ["-e", f"trace={slow}", "-e", f"inject={slow}:delay_enter=1500000:when=1"]
    log = tmp_path / "calls.log"
    process = subprocess.Popen(
        [*under_strace(*inject, log=log), "record", "--append", root],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: log.exists() and slow in log.read_text())  # the call is written before it is slowed
    result = run("record", other, root)
    _, said = process.communicate(timeout=60)
    ended = [(process.returncode, said), (result.returncode, result.stderr)]
    codes = [code for code, _ in ended]
    assert set(codes) <= {0, 4} and 0 in codes, ended
    assert os.listdir(root / ".tartape") == ["index.db"]
    assert root.stat().st_mtime_ns == OLD_NS
    assert played(root) in expected


@pytest.mark.needs("strace")
@pytest.mark.parametrize("slow", ["mkdir", "utimensat", "flock", "rename"])
def test_recorders_that_race_at_the_worst_moment(tmp_path: Path, slow: str) -> None:
    """One recorder is slow in one call while the other runs: each records or is refused, and the root's time stays."""
    root = tmp_path / "data"
    make_tree(root)
    inject = ["-e", f"trace={slow}", "-e", f"inject={slow}:delay_enter=1500000"]
    log = tmp_path / "calls.log"
    process = subprocess.Popen(
        [*under_strace(*inject, log=log), "record", root],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: log.exists() and slow in log.read_text())  # the call is written before it is slowed
    other = run("record", root)
    _, said = process.communicate(timeout=60)
    ended = [(process.returncode, said), (other.returncode, other.stderr)]
    codes = [code for code, _ in ended]
    assert set(codes) <= {0, 4}, ended
    assert codes.count(0) == 1, ended
    assert os.listdir(root / ".tartape") == ["index.db"]
    assert root.stat().st_mtime_ns == OLD_NS
    assert played(root) == whole(root)


# Killed daemons


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "mnt"
    place.mkdir()
    yield place
    while is_mounted(place):
        force_unmount(place)


def big_tree(root: Path, files: int = 40) -> bytes:
    """Records a folder of `files` MiB, and returns its archive."""
    some = random.Random(3)
    root.mkdir()
    for number in range(files):
        (root / f"{number:03}.bin").write_bytes(some.randbytes((1 << 20) - some.randrange(2000)))
    assert run("record", root).returncode == 0
    return whole(root)


def reads(archive: Path, expected: bytes, ended: threading.Event, wrong: list[int]) -> None:
    """Reads here and there until the daemon is gone.

    A read that meets its end may be short, by read(2): the pages before the first that failed. It is never empty.
    """
    some = random.Random()
    with suppress(OSError):
        fd = os.open(archive, os.O_RDONLY)
        try:
            while not ended.is_set():
                at = some.randrange(len(expected))
                data = os.pread(fd, 30_000, at)
                if not data or data != expected[at : at + len(data)]:
                    wrong.append(at)
        finally:
            os.close(fd)


@pytest.mark.fuse
def test_a_killed_daemon_is_mounted_again_and_copies_go_on(tmp_path: Path, mountpoint: Path) -> None:
    """`mount` heals the place that it left, and dd resumes where its copy ends: equal in the end."""
    root, copy = tmp_path / "data", tmp_path / "copy"
    expected = big_tree(root)
    archive = mountpoint / "archive.tar"
    some = random.Random(9)
    wrong: list[int] = []
    whole_copies = 0
    copy.touch()
    for _ in range(100 if LONG else 10):
        result = run("mount", root, mountpoint)
        assert result.returncode == 0, result.stderr
        pid = daemon_of(mountpoint)
        ended = threading.Event()
        readers = [threading.Thread(target=reads, args=(archive, expected, ended, wrong)) for _ in range(2)]
        for reader in readers:
            reader.start()
        at = copy.stat().st_size
        copying = subprocess.Popen(
            ["dd", f"if={archive}", f"of={copy}", "bs=16K", "iflag=skip_bytes", "oflag=seek_bytes",
             f"skip={at}", f"seek={at}", "conv=notrunc"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(some.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        code = copying.wait(60)
        ended.set()
        for reader in readers:
            reader.join(20)
            assert not reader.is_alive()
        assert not wrong
        with pytest.raises(OSError) as caught:
            os.stat(archive)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        if code == 0:
            assert copy.read_bytes() == expected
            copy.write_bytes(b"")
            whole_copies += 1
        else:
            size = copy.stat().st_size
            with copy.open("rb") as file:
                file.seek(at)
                assert file.read() == expected[at:size]
    result = run("mount", root, mountpoint)
    assert result.returncode == 0, result.stderr
    at = copy.stat().st_size
    subprocess.run(
        ["dd", f"if={archive}", f"of={copy}", "bs=64K", "iflag=skip_bytes", "oflag=seek_bytes",
         f"skip={at}", f"seek={at}", "conv=notrunc", "status=none"],
        check=True, timeout=60,
    )  # fmt: skip
    assert copy.read_bytes() == expected
    assert our_mounts().count(os.fspath(mountpoint)) == 1
    assert run("unmount", mountpoint).returncode == 0
    print(f"{whole_copies + 1} copies")


# Stopped daemons

CONNECTIONS = Path("/sys/fs/fuse/connections")


@contextmanager
def control() -> Iterator[Path]:
    """Where the kernel lists its FUSE connections."""
    mounted = not os.listdir(CONNECTIONS)
    if mounted:
        subprocess.run(["mount", "-t", "fusectl", "none", CONNECTIONS], check=True)
    try:
        yield CONNECTIONS
    finally:
        if mounted:
            subprocess.run(["umount", CONNECTIONS], check=True)


def minor_of(mountpoint: Path) -> str:
    """The number of its connection, without asking the daemon."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[4] == os.fspath(mountpoint):
            return fields[2].partition(":")[2]
    raise AssertionError("not mounted")


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize("way_out", ["abort", "umount -f", "umount -l", "unmount --lazy", "continue", "kill"])
def test_a_stopped_daemon_and_the_way_out(tmp_path: Path, mountpoint: Path, way_out: str) -> None:
    """A reader of a stopped daemon waits until the connection is aborted, or the daemon goes on or is killed."""
    root = tmp_path / "data"
    expected = big_tree(root, 2)
    assert run("mount", "--direct", root, mountpoint).returncode == 0
    pid = daemon_of(mountpoint)
    archive = mountpoint / "archive.tar"
    reading = 'import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); print(flush=True); sys.stdin.readline(); ' \
              'sys.stdout.buffer.write(os.pread(fd, 5000, 0))'  # fmt: skip
    reader = subprocess.Popen(
        [sys.executable, "-c", reading, archive],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert reader.stdin is not None
    assert reader.stdout is not None
    try:
        reader.stdout.readline()
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: "\nState:\tT" in Path(f"/proc/{pid}/status").read_text())
        reader.stdin.write(b"\n")
        reader.stdin.flush()
        wait_until(lambda: waits_for_fuse(reader.pid))
        match way_out:
            case "abort":
                with control() as connections:
                    (connections / minor_of(mountpoint) / "abort").write_text("1")
            case "umount -f":
                subprocess.run(["umount", "-f", mountpoint], timeout=60, capture_output=True)
            case "umount -l":
                assert subprocess.run(["umount", "-l", mountpoint], timeout=60, capture_output=True).returncode == 0
                assert not is_mounted(mountpoint)
                assert reader.poll() is None
                os.kill(pid, signal.SIGKILL)
            case "unmount --lazy":
                assert run("unmount", "--lazy", mountpoint, timeout=60).returncode == 0
                assert not is_mounted(mountpoint)
                assert reader.poll() is None
                os.kill(pid, signal.SIGKILL)
            case "continue":
                os.kill(pid, signal.SIGCONT)
            case _:
                os.kill(pid, signal.SIGKILL)
        data, said = reader.communicate(timeout=60)
        if way_out == "continue":
            assert data == expected[:5000]
        else:
            assert reader.returncode == 1
            assert data == b""
            assert b"ConnectionAbortedError" in said
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            wait_until(lambda: is_gone(pid))
            result = run("mount", root, mountpoint)
            assert result.returncode == 0, result.stderr
        assert archive.read_bytes() == expected
        assert run("unmount", mountpoint).returncode == 0
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        if reader.poll() is None:
            reader.kill()
            reader.communicate(timeout=60)
