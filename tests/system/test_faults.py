"""Sources that fail, stall or give little at a time, and daemons with little memory or few descriptors.

The promise: EIO or the right bytes; the size unchanged; the daemon alive, and readable again once the fault is gone,
since an error of the disk is no drift. With TARTAPEFS_LONG=1 in the environment the large tape has a million members.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from long import soak
from support.daemon import daemon_of, descriptors, helper_of, is_gone, is_mounted, resident, waits_for_fuse
from support.drifting import Mounted, failing, opened
from support.programs import TARTAPEFS, run, umount, wait_until
from support.reference import Reference, header

from tartapefs.archive.layout import BLOCK, FOOTER, span
from tartapefs.archive.member import Member
from tartapefs.index.writer import IndexWriter

LONG = os.environ.get("TARTAPEFS_LONG") == "1"
Mount = Callable[..., Path]
pytestmark = pytest.mark.fuse
MIB = 1 << 20


def make_source(root: Path) -> None:
    some = random.Random(13)
    for folder in ("first", "second/deep", "third"):
        (root / folder).mkdir(parents=True)
        for number, size in enumerate((0, 1, 512, 5000, 70_000, 300_001)):
            (root / folder / f"{number}.bin").write_bytes(some.randbytes(size))
        (root / folder / "link").symlink_to("1.bin")


@pytest.fixture
def mounted(tmp_path: Path, mount: Mount, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    root, log = tmp_path / "data", tmp_path / "faults.log"
    make_source(root)
    assert run("record", root).returncode == 0
    with opened(root, mount(root, "--direct", "--log", log), log) as made:
        if len(os.sched_getaffinity(0)) > 1:
            os.kill(helper_of(daemon_of(made.archive.parent)), signal.SIGKILL)  # what fails is to be the daemon's
        yield made


def tries(mounted: Mounted, seed: int, count: int) -> int:
    """Reads at random; each is right or EIO. How many were EIO, or ended before the page that is.

    The page cache gives a read the pages before the first that failed: it is short, by read(2), and never empty.
    """
    some = random.Random(seed)
    failed = 0
    for _ in range(count):
        at, size = some.randrange(len(mounted.expected)), some.choice((100, 4096, 100_000))
        try:
            data, expected = os.pread(mounted.fd, size, at), mounted.expected[at : at + size]
            assert data and data == expected[: len(data)]
            failed += len(data) < len(expected)
        except OSError as error:
            assert error.errno == errno.EIO
            failed += 1
        assert os.fstat(mounted.fd).st_size == len(mounted.expected)
    return failed


def check_as_if_nothing_had_happened(mounted: Mounted, pid: int) -> None:
    """The same daemon, the same size, a valid tape, all bytes right, and the log speaks of no drift."""
    assert daemon_of(mounted.archive.parent) == pid
    assert os.stat(mounted.archive).st_size == len(mounted.expected)
    assert mounted.state() == "valid"
    assert mounted.read_all(100_000) == mounted.expected
    assert not [line for line in mounted.lines() if "record --force" in line]


# System calls that fail

FAILING_CALLS = {
    "read": ("preadv,preadv2,pread64", ("EIO", "EINTR", "ENOMEM")),
    "open": ("openat,openat2", ("EIO", "EMFILE", "ENFILE", "ENOMEM", "EACCES", "ESTALE")),
    "stat": ("newfstatat,fstat,statx", ("EIO", "ENOMEM", "ESTALE")),
    "readlink": ("readlinkat,readlink", ("EIO", "ENOMEM")),
}


@pytest.mark.long(but=1)
@pytest.mark.needs("strace")
@pytest.mark.parametrize(("call", "error"), [(c, e) for c, (_, errors) in FAILING_CALLS.items() for e in errors])
def test_system_calls_that_fail_now_and_then(mounted: Mounted, call: str, error: str) -> None:
    """From the Nth of a thread on, and then each so many: every read is right or EIO."""
    pid = daemon_of(mounted.archive.parent)
    calls, failed = FAILING_CALLS[call][0], 0
    for seed, when in enumerate(("1+3", "2+7", "5+2") if LONG else ("1+3",)):
        with failing(pid, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}"):
            failed += tries(mounted, seed, 60)
    assert failed or error == "EINTR"
    check_as_if_nothing_had_happened(mounted, pid)
    print(f"{failed} failed reads")


@pytest.mark.needs("strace")
def test_each_system_call_of_one_read_fails_in_turn(mounted: Mounted) -> None:
    """A read of two files in one folder, and the Nth call of each kind on the way fails."""
    pid = daemon_of(mounted.archive.parent)
    start = mounted.starts[b"data/first/4.bin"]
    size = 120_000
    expected = mounted.expected[start : start + size]
    failed: dict[str, int] = {}
    for call in ("preadv2", "openat", "openat2", "newfstatat"):
        for number in range(1, 20):
            with failing(pid, "-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={number}"):
                try:
                    assert os.pread(mounted.fd, size, start) == expected
                    break  # not so many calls
                except OSError as error:
                    assert error.errno == errno.EIO
                    failed[call] = number
            assert os.pread(mounted.fd, size, start) == expected
    assert sum(failed.values()) > 6
    check_as_if_nothing_had_happened(mounted, pid)
    print(f"failed calls: {failed}")


@pytest.mark.long(but=1)
@pytest.mark.parametrize("threads", [1, 8])
def test_few_descriptors(mounted: Mounted, threads: int) -> None:
    """Whatever cannot be opened is EIO; with enough descriptors again all is well."""
    pid = daemon_of(mounted.archive.parent)
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
    free = [fd for fd in range(100) if fd not in used]
    before = len(descriptors(pid))
    failed: dict[int, int] = {}
    for more in (*range(8), 60):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[more], hard))
        results: list[int] = []
        readers = [
            threading.Thread(target=lambda seed=seed, results=results: results.append(tries(mounted, seed, 40)))
            for seed in range(threads)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert len(results) == threads
        failed[more] = sum(results)
    assert failed[0]
    assert not failed[60]  # all hands at once, each with a folder and a file
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    check_as_if_nothing_had_happened(mounted, pid)
    assert len(descriptors(pid)) == before
    print(f"failed by free descriptors: {failed}")


# A disk that fails


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@pytest.mark.long
@pytest.mark.root
@pytest.mark.needs("mkfs.ext4", "losetup")
def test_a_disk_that_loses_its_end(tmp_path: Path, mount: Mount) -> None:
    """Sectors that cannot be read are EIO, and those that can are right; when they are back, so are the bytes."""
    image, place, log = tmp_path / "image", tmp_path / "disk", tmp_path / "faults.log"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", image], check=True, capture_output=True)
    attach = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
    if attach.returncode:
        pytest.skip(f"no loop device: {attach.stderr.strip()}")
    try:
        root = place / "data"
        some = random.Random(4)
        for number in range(40):
            folder = root / f"folder {number % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.bin").write_bytes(some.randbytes(some.randrange(500_000)))
        assert run("record", root).returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        drop_caches()
        good = image.read_bytes()
        archive = mount(root, "--log", log)
        failed = []
        with opened(root, archive, log) as mounted:
            pid = daemon_of(archive.parent)
            for left in (20, 14, 9, 6, 3, 1):
                drop_caches()
                os.truncate(image, left * MIB)
                failed.append(tries(mounted, left, 100))
                put_back(image, good)
                drop_caches()
                check_as_if_nothing_had_happened(mounted, pid)
        assert sum(failed) > 10
        assert run("unmount", archive.parent).returncode == 0
        print(f"failed reads by what was left of the disk: {failed}")
    finally:
        umount(place)


def put_back(image: Path, good: bytes) -> None:
    """Into the same file, which a loop device has open."""
    with image.open("r+b") as file:
        file.write(good)


# A source that is itself served by a program, which gives little, fails or stalls

FLAKY = """
import errno, os, random, sys, time
import fuse

class Flaky(fuse.Operations):
    use_ns = True
    def __init__(self, root, control):
        self.root, self.control, self.calls = root, control, 0
        self.hung = open(control + ".hung", "a", buffering=1)
    def mode(self):
        with open(self.control) as file:
            return file.read().split()
    def getattr(self, path, fh=None):
        try:
            found = os.lstat(self.root + path)
        except OSError as error:
            raise fuse.FuseOSError(error.errno)
        names = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size")
        return {name: getattr(found, name) for name in names} | {
            "st_mtime": found.st_mtime_ns, "st_ctime": found.st_ctime_ns, "st_atime": found.st_atime_ns}
    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self.root + path)]
    def readlink(self, path):
        return os.readlink(self.root + path)
    def open(self, path, flags):
        return os.open(self.root + path, os.O_RDONLY)
    def release(self, path, fh):
        os.close(fh)
    def read(self, path, size, offset, fh):
        self.calls += 1
        match self.mode():
            case ["short"]:
                size = random.randint(1, size)
            case ["tiny"]:
                size = min(size, 1 + self.calls % 3000)
            case ["failing", every] if self.calls % int(every) == 0:
                raise fuse.FuseOSError(errno.EIO)
            case ["hanging", name] if path.endswith(name):
                print(path, file=self.hung)
                while self.mode()[:1] == ["hanging"]:
                    time.sleep(0.02)
        return os.pread(fh, size, offset)

fuse.FUSE(Flaky(sys.argv[1], sys.argv[3]), sys.argv[2], foreground=True, direct_io=True, use_ino=True, ro=True,
          attr_timeout=0, entry_timeout=0, fsname="flaky")
"""


class Flaky:
    """A folder behind a file system that behaves as `set` says: ok, short, tiny, failing N, hanging NAME."""

    def __init__(self, root: Path, control: Path, mounted: Mounted) -> None:
        self.root, self._control, self.mounted = root, control, mounted

    def set(self, mode: str) -> None:
        new = self._control.with_suffix(".new")
        new.write_text(mode)
        new.replace(self._control)

    @property
    def hung(self) -> int:
        """How many reads have hung."""
        return len(Path(f"{self._control}.hung").read_text().splitlines())


@pytest.fixture
def flaky(tmp_path: Path, mount: Mount) -> Iterator[Flaky]:
    behind, place, control, log = tmp_path / "behind", tmp_path / "place", tmp_path / "control", tmp_path / "faults.log"
    root = behind / "data"
    make_source(root)
    place.mkdir()
    control.write_text("ok")
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FLAKY, behind, place, control],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: server.poll() is not None or os.path.ismount(place))
        seen = place / "data"
        result = run("record", seen, "--index", tmp_path / "index.db")
        assert result.returncode == 0, result.stderr
        archive = mount(seen, "--direct", "--index", tmp_path / "index.db", "--log", log)
        with opened(root, archive, log) as mounted:
            made = Flaky(seen, control, mounted)
            yield made
            made.set("ok")
        if is_mounted(archive.parent):
            assert run("unmount", archive.parent).returncode == 0
    finally:
        control.write_text("ok")
        subprocess.run(["umount", "-l", place], check=False, capture_output=True)
        server.terminate()
        server.wait(60)


@pytest.mark.long(but=1)
@pytest.mark.root
@pytest.mark.parametrize("mode", ["short", "tiny"])
def test_a_source_that_gives_little_at_a_time(flaky: Flaky, mode: str) -> None:
    """What one system call reads in part is read on: no read fails, and none is short."""
    flaky.set(mode)
    assert tries(flaky.mounted, 5, 60) == 0
    assert flaky.mounted.read_all(100_000) == flaky.mounted.expected


@pytest.mark.long(but=1)
@pytest.mark.root
@pytest.mark.parametrize("every", [1, 2, 3, 7, 20])
def test_a_source_that_fails_now_and_then(flaky: Flaky, every: int) -> None:
    pid = daemon_of(flaky.mounted.archive.parent)
    flaky.set(f"failing {every}")
    assert tries(flaky.mounted, every, 80) > 0
    flaky.set("ok")
    check_as_if_nothing_had_happened(flaky.mounted, pid)


READER = (
    "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); "
    "sys.stdout.buffer.write(os.pread(fd, int(sys.argv[3]), int(sys.argv[2])))"
)


def reader(archive: Path, at: int, size: int) -> subprocess.Popen[bytes]:
    """A process of its own: a thread that hangs would take this one along."""
    return subprocess.Popen(
        [sys.executable, "-c", READER, archive, str(at), str(size)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.long(but=1)
@pytest.mark.root
@pytest.mark.parametrize("hanging", [1, 3])
def test_a_file_whose_reads_hang(flaky: Flaky, hanging: int) -> None:
    """Other reads go on while a thread is free; what hung ends with the right bytes."""
    mounted = flaky.mounted
    at = mounted.starts[b"data/second/deep/4.bin"] + BLOCK
    other = mounted.starts[b"data/third/4.bin"] + BLOCK
    flaky.set("hanging deep/4.bin")
    stuck = [reader(mounted.archive, at + number, 1000) for number in range(hanging)]
    try:
        wait_until(lambda: flaky.hung == hanging)
        for shift in range(0, 50_000, 5000):
            free = reader(mounted.archive, other + shift, 5000)
            assert free.communicate(timeout=60)[0] == mounted.expected[other + shift : other + shift + 5000]
        assert [process.poll() for process in stuck] == [None] * hanging
        flaky.set("ok")
        for number, process in enumerate(stuck):
            assert process.communicate(timeout=60)[0] == mounted.expected[at + number : at + number + 1000]
    finally:
        flaky.set("ok")
        for process in stuck:
            process.communicate(timeout=60)
    check_as_if_nothing_had_happened(mounted, daemon_of(mounted.archive.parent))


@pytest.mark.root
def test_sigterm_while_reads_hang(flaky: Flaky) -> None:
    """The archive is unmounted at once; the process itself is gone as soon as the system lets go of its reads."""
    mounted = flaky.mounted
    pid = daemon_of(mounted.archive.parent)
    flaky.set("hanging deep/4.bin")
    at = mounted.starts[b"data/second/deep/4.bin"] + BLOCK
    stuck = [reader(mounted.archive, at, 1000) for _ in range(5)]  # more than there are threads
    try:
        wait_until(lambda: flaky.hung and all(waits_for_fuse(process.pid) for process in stuck))
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_mounted(mounted.archive.parent))
        flaky.set("ok")
        wait_until(lambda: is_gone(pid))
        for process in stuck:
            data, _ = process.communicate(timeout=60)
            assert data in (b"", mounted.expected[at : at + 1000])
            assert bool(data) == (process.returncode == 0)
    finally:
        flaky.set("ok")
        for process in stuck:
            process.communicate(timeout=60)


@pytest.mark.long
@pytest.mark.needs("strace")
def test_sigterm_while_slow_reads_are_under_way(mounted: Mounted) -> None:
    """A read that can be interrupted does not keep the daemon at all."""
    pid = daemon_of(mounted.archive.parent)
    at = mounted.starts[b"data/third/4.bin"] + BLOCK
    with failing(pid, "-e", "trace=preadv,preadv2", "-e", "inject=preadv,preadv2:delay_enter=60000000"):
        stuck = reader(mounted.archive, at, 1000)
        archive = os.fspath(mounted.archive)
        wait_until(lambda: archive in descriptors(stuck.pid) and waits_for_fuse(stuck.pid))
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_mounted(mounted.archive.parent))
        wait_until(lambda: is_gone(pid))
    data, _ = stuck.communicate(timeout=60)
    assert data == b""
    assert stuck.returncode == 1


# Memory


@pytest.mark.long
def test_memory_and_descriptors_are_constant(tmp_path: Path, mount: Mount) -> None:
    """The short run of soak.py."""
    root = tmp_path / "data"
    soak.make_source(root)
    assert run("record", root).returncode == 0
    reference = Reference(root)
    archive = mount(root, "--audit-interval", "1")
    seen = soak.soak_mount(archive, reference.read(0, reference.size), 5, 0.5)
    assert seen.reads
    assert not seen.failures(bound=4)
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("samples", "wrong", "said"),
    [
        ([(1, 100, 11), (2, 100, 12), (20, 100, 11)], [], "descriptors were not constant"),
        ([(1, 0, 11), (2, 20 * MIB, 11), (20, 25 * MIB, 11)], [], "memory grew by 5.0 MiB"),
        ([(1, 100, 11)], ["wrong bytes at 5"], "wrong bytes"),
        ([(1, 0, 11), (2, 20 * MIB, 11), (20, 21 * MIB, 11)], [], None),
    ],
)
def test_what_a_soak_is_failed_for(samples: list[tuple[float, int, int]], wrong: list[str], said: str | None) -> None:
    failures = soak.Soak(samples, wrong=wrong).failures(bound=4)
    assert bool(failures) == (said is not None)
    assert said is None or said in failures[0]


class LargeTape:
    """A tape of very many members, of which a thousand exist; its index is made without a recorder.

    Its folders are real and as recorded. That most files are not there is seen if they are read, or read ahead.
    """

    FOLDERS = 1000

    def __init__(self, root: Path, index: Path, count: int) -> None:
        self.root, self.index = root, index
        some = random.Random(17)
        per_folder = count // self.FOLDERS
        real = {(number, some.randrange(per_folder)): some.randbytes(some.randrange(1, 5000)) for number in range(1000)}
        for number in range(self.FOLDERS):
            (root / f"d{number:04}").mkdir(parents=True)
        for (folder, file), content in real.items():
            (root / f"d{folder:04}" / f"f{file:06}").write_bytes(content)
        self.probes: list[tuple[int, bytes]] = []  # starts of real members, and their header and body
        with IndexWriter(os.fspath(index)) as writer:
            writer.add(member[1:] for member in self._members(per_folder, real))
            writer.commit(
                {
                    "root_name": os.fsencode(root.name),
                    "fingerprint": "0" * 64,
                    "total_size": self.stop + FOOTER,
                    "member_count": 1 + self.FOLDERS * (1 + per_folder),
                    "recorded_ns": time.time_ns(),
                    "excluded": json.dumps([]),
                    "left_out": 0,
                    "owners_kept": 0,
                    "root_ino": root.stat().st_ino,
                }
            )

    def _members(self, per_folder: int, real: dict[tuple[int, int], bytes]) -> Iterator[Member]:
        top = os.fsencode(self.root.name) + b"/"
        at = 0
        found = self.root.stat()
        yield Member(0, top, found.st_mode, 0, found.st_mtime_ns, found.st_ino, found.st_ctime_ns, b"", None)
        at += BLOCK
        mode = stat.S_IFREG | 0o644
        for number in range(self.FOLDERS):
            path = self.root / f"d{number:04}"
            name, found = top + b"d%04d/" % number, path.stat()
            yield Member(at, name, found.st_mode, 0, found.st_mtime_ns, found.st_ino, found.st_ctime_ns, b"", None)
            at += BLOCK
            for file in range(per_folder):
                member = Member(at, b"%bf%06d" % (name, file), mode, file % 3000, file, file, file, b"", None)
                content = real.get((number, file))
                if content is not None:
                    found = (path / f"f{file:06}").stat()
                    member = member._replace(
                        mode=found.st_mode, size=found.st_size, mtime_ns=found.st_mtime_ns,
                        ino=found.st_ino, ctime_ns=found.st_ctime_ns,
                    )  # fmt: skip
                    self.probes.append((at, header(member.name, found) + content))
                yield member
                at += span(member.size)
        self.stop = at


@contextmanager
def memory_group(limit: int) -> Iterator[tuple[Path, Callable[[], int]]]:
    """A control group that may use `limit` bytes: its file of processes, and what it used at most."""
    names = {
        Path("/sys/fs/cgroup"): ("memory.max", "memory.peak"),
        Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    }
    for above, (most, peak) in names.items():  # noqa: B007
        group = above / f"tartapefs-test-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            if (group / most).exists():
                (group / most).write_text(str(limit))
                break
            group.rmdir()
    else:
        pytest.skip("no control group for memory can be made here")
    try:
        yield group / "cgroup.procs", lambda: int((group / peak).read_text())
    finally:
        end = time.monotonic() + 10
        while True:
            try:
                group.rmdir()
                break
            except OSError:
                assert time.monotonic() < end, "the control group is still in use"
                time.sleep(0.05)


@pytest.mark.long
@pytest.mark.root
def test_a_large_tape_in_little_memory(tmp_path: Path) -> None:
    """A daemon that may use 128 MiB serves a tape of a million members; every read is right."""
    count = 1_000_000 if LONG else 200_000
    tape = LargeTape(tmp_path / "data", tmp_path / "index.db", count)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    drop_caches()
    with memory_group(128 * MIB) as (processes, peak):
        command = [*TARTAPEFS, "mount", "--direct", tape.root, mountpoint, "--index", tape.index]
        result = subprocess.run(
            ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', processes, *command],
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        try:
            pid = daemon_of(mountpoint)
            assert str(pid) in processes.read_text().split()  # and its helper
            some = random.Random(1)
            fd = os.open(mountpoint / "archive.tar", os.O_RDONLY)
            try:
                assert os.fstat(fd).st_size == tape.stop + FOOTER
                for start, expected in some.sample(tape.probes, len(tape.probes)):
                    shift = some.choice((0, 0, 1, 512, 513))
                    assert os.pread(fd, len(expected) - shift, start + shift) == expected[shift:]
                assert os.pread(fd, 2000, tape.stop) == bytes(FOOTER)  # after an audit of all folders
                assert os.getxattr(mountpoint, "user.tartape.state") == b"valid"
            finally:
                os.close(fd)
            memory, most = resident(pid), resident(pid, "VmHWM")
            assert most < 100 * MIB
            assert peak() <= 128 * MIB
        finally:
            ended = run("unmount", mountpoint)
        assert ended.returncode == 0, ended.stderr
        wait_until(lambda: is_gone(pid))
        print(
            f"{count:,} members: index of {tape.index.stat().st_size / MIB:.0f} MiB, {len(tape.probes):,} reads;"
            f" resident {memory / MIB:.1f} MiB, at most {most / MIB:.1f} MiB, group's peak {peak() / MIB:.1f} MiB"
        )
    tape.index.unlink()
