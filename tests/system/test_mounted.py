"""The mounted folder: what is promised to whoever reads it, each promise on a real mount."""

import errno
import fcntl
import mmap
import os
import random
import shutil
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.daemon import daemon_of, descriptors, helper_of, is_mounted, open_in, resident
from support.mounting import BOTH_MODES
from support.programs import run, wait_until
from support.reference import Reference

Mount = Callable[..., Path]
pytestmark = pytest.mark.fuse
NOBODY = 65534


def record(root: Path, *options: object) -> None:
    result = run("record", root, *options)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def tape(tree: Path) -> tuple[Path, bytes]:
    """A recorded folder, and the archive that it must have."""
    record(tree)
    reference = Reference(tree)
    return tree, reference.read(0, reference.size)


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, Reference, bytes]:
    """A recorded folder of two files, `a` of 300,000 bytes and `b` of 100,000, and what it must read as."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "a").write_bytes(random.Random(1).randbytes(300_000))
    (root / "b").write_bytes(random.Random(2).randbytes(100_000))
    record(root)
    reference = Reference(root)
    return root, reference, reference.read(0, reference.size)


@pytest.fixture
def descriptor() -> Iterator[Callable[[Path], int]]:
    """`descriptor(path)` opens for reading; closed at the end."""
    opened: list[int] = []

    def open_(path: Path) -> int:
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    yield open_
    for fd in opened:
        os.close(fd)


# Bytes


@pytest.mark.long(but="cached")
@BOTH_MODES
def test_exactly_the_bytes_asked_for(
    tape: tuple[Path, bytes], mount: Mount, descriptor: Callable[[Path], int], options: tuple[str, ...]
) -> None:
    """At every block's start, one before and one after it, for all kinds of sizes, to the end and beyond it."""
    root, expected = tape
    fd = descriptor(mount(root, *options))
    size = len(expected)
    starts = {at + shift for at in range(0, size + 1, 512) for shift in (-1, 0, 1) if at + shift >= 0}
    # The large file's middle is like its ends.
    few = [at for at in starts if at < 4096 or at > size - 24 * 512 or at % 8192 < 2]
    for at in sorted(few):
        for count in (1, 511, 512, 513, 5000):
            assert os.pread(fd, count, at) == expected[at : at + count], (at, count)
    for at in (size - 1, size, size + 1, size + 10**12):
        assert os.pread(fd, 4096, at) == expected[at:]
    assert os.pread(fd, 0, 0) == b""
    for count in (131071, 131072, 131073, 2**20):
        assert os.pread(fd, count, 0) == expected[:count]
        assert os.pread(fd, count, 513) == expected[513 : 513 + count]


def test_one_request_carries_a_mebibyte(tmp_path: Path, mount: Mount, descriptor: Callable[[Path], int]) -> None:
    """Each answer is one write of the daemon; at 128 KiB a request these would be 128."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_bytes(random.Random(3).randbytes(17 << 20))
    record(tmp_path / "data")
    archive = mount(tmp_path / "data")
    fd = descriptor(archive)
    counts = Path(f"/proc/{daemon_of(archive.parent)}/io")

    def answers() -> int:
        return int(counts.read_text().partition("syscw: ")[2].split()[0])

    with mmap.mmap(-1, 1 << 20) as buffer:  # begins with a page, so that it has no more than 256
        before = answers()
        for at in range(16):
            assert os.preadv(fd, [buffer], at << 20) == 1 << 20
        assert 16 <= answers() - before < 24
    assert os.stat(archive).st_blksize == 1 << 20


@pytest.mark.long(but="cached")
@BOTH_MODES
def test_a_read_into_several_buffers(
    tape: tuple[Path, bytes], mount: Mount, descriptor: Callable[[Path], int], options: tuple[str, ...]
) -> None:
    root, expected = tape
    buffers = [bytearray(n) for n in (1, 700, 4096, 131072)]
    assert os.preadv(descriptor(mount(root, *options)), buffers, 100) == sum(map(len, buffers))
    assert b"".join(buffers) == expected[100 : 100 + sum(map(len, buffers))]


@BOTH_MODES
def test_a_read_over_the_boundary_of_a_good_and_a_bad_member_fails_whole(
    two_files: tuple[Path, Reference, bytes],
    mount: Mount,
    descriptor: Callable[[Path], int],
    options: tuple[str, ...],
) -> None:
    """Never the good prefix; and the file keeps its size as long as anyone can see it."""
    root, reference, _expected = two_files
    archive = mount(root, *options)
    fd = descriptor(archive)
    os.truncate(root / "b", 50_000)
    start = reference.starts[b"data/b"] - 4096
    with pytest.raises(OSError) as caught:
        os.pread(fd, 8192, start)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError) as caught:
        os.stat(archive)
    assert caught.value.errno == errno.EIO


PROGRAMS = {
    "cp": ["cp", "{archive}", "{copy}"],
    "cat": ["cat", "{archive}"],
    "dd": ["dd", "if={archive}", "of={copy}", "bs=64K"],
    "sha256sum": ["sha256sum", "{archive}"],
    "rclone": ["rclone", "copyto", "--retries=1", "--low-level-retries=1", "{archive}", "{copy}"],
    "tar": ["tar", "-xOf", "{archive}"],
}


@pytest.mark.long(but="cached")
@BOTH_MODES
@pytest.mark.parametrize("program", [pytest.param(name, marks=pytest.mark.needs(name)) for name in PROGRAMS])
def test_a_copy_of_a_drifted_archive_is_an_error(
    two_files: tuple[Path, Reference, bytes], mount: Mount, tmp_path: Path, program: str, options: tuple[str, ...]
) -> None:
    """A file truncated under the mount: every program that copies or sums says so by its exit status."""
    root, _reference, expected = two_files
    archive, copy = mount(root, *options), tmp_path / "copy"
    os.truncate(root / "b", 50_000)
    command = [part.format(archive=archive, copy=copy) for part in PROGRAMS[program]]
    environment = os.environ | {"RCLONE_CONFIG": str(tmp_path / "rclone.conf")}
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert done.returncode != 0, done
    got = copy.read_bytes() if copy.exists() else b""
    assert expected.startswith(got)


def test_each_read_reaches_the_checks(
    two_files: tuple[Path, Reference, bytes], mount: Mount, descriptor: Callable[[Path], int]
) -> None:
    """Directly, the page cache answers nothing: the same bytes of the same descriptor, before and after a change."""
    root, reference, expected = two_files
    fd = descriptor(mount(root, "--direct"))
    start = reference.starts[b"data/b"] + 512
    assert os.pread(fd, 4096, start) == expected[start : start + 4096]
    os.utime(root / "b")
    with pytest.raises(OSError) as caught:
        os.pread(fd, 4096, start)
    assert caught.value.errno == errno.EIO


def test_the_page_cache_allows_mmap(tape: tuple[Path, bytes], mount: Mount, descriptor: Callable[[Path], int]) -> None:
    root, expected = tape
    fd = descriptor(mount(root))
    with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        assert len(mapped) == len(expected)
        assert mapped[:] == expected


def test_a_second_reading_gives_the_same(tape: tuple[Path, bytes], mount: Mount) -> None:
    root, expected = tape
    archive = mount(root)
    assert archive.read_bytes() == expected
    assert archive.read_bytes() == expected


# Facts about the file


def test_there_is_one_entry(tape: tuple[Path, bytes], mount: Mount) -> None:
    folder = mount(tape[0]).parent
    assert os.listdir(folder) == ["archive.tar"]
    with os.scandir(folder) as entries:
        assert [(entry.name, entry.is_file(follow_symlinks=False)) for entry in entries] == [("archive.tar", True)]


@pytest.mark.long(but=2)
@pytest.mark.parametrize(
    "name",
    ["x", "two words,and a comma.tar", "архив.tar", os.fsdecode(b"\xff\xfe"), "a\nb", "-f", "n" * 255, "back\\slash"],
)
def test_the_entry_has_the_name_asked_for(tape: tuple[Path, bytes], mount: Mount, name: str) -> None:
    root, expected = tape
    folder = mount(root, f"--name={name}").parent
    assert os.listdir(folder) == [name]
    assert (folder / name).read_bytes() == expected


@pytest.mark.long(but=1)
@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "n" * 256])
def test_what_is_no_file_name_is_refused(tape: tuple[Path, bytes], tmp_path: Path, name: str) -> None:
    result = run("mount", tape[0], tmp_path, f"--name={name}")
    assert result.returncode == 2
    assert not is_mounted(tmp_path)


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    "name", [b"x", b"\xff\xfe", "ä".encode(), b"archive.tar ", b"ARCHIVE.TAR", b"n" * 255, b".tartape", b"a\nb"]
)
def test_nothing_else_is_found(tape: tuple[Path, bytes], mount: Mount, name: bytes) -> None:
    folder = os.fsencode(mount(tape[0]).parent)
    for operation in (os.stat, os.lstat, os.listdir, lambda path: os.open(path, os.O_RDONLY)):
        with pytest.raises(OSError) as caught:
            operation(folder + b"/" + name)
        assert caught.value.errno == errno.ENOENT


def test_it_belongs_to_who_mounted_it(tape: tuple[Path, bytes], mount: Mount) -> None:
    archive = mount(tape[0])
    for path in (archive, archive.parent):
        assert (path.stat().st_uid, path.stat().st_gid) == (os.geteuid(), os.getegid())
    assert archive.stat().st_mode == stat.S_IFREG | 0o400


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o444, 0o644])
def test_mode(tape: tuple[Path, bytes], mount: Mount, mode: int) -> None:
    """Of the mode asked for, reading is all that a read-only file has."""
    archive = mount(tape[0], "--mode", f"{mode:04o}")
    assert stat.S_IMODE(archive.stat().st_mode) == mode & 0o444


def test_size_and_blocks(tape: tuple[Path, bytes], mount: Mount) -> None:
    """st_blocks counts 512 bytes each; at 0 `tar -S` would take the archive for one hole."""
    root, expected = tape
    found = mount(root).stat()
    assert found.st_size == len(expected)
    assert found.st_blocks == -(-len(expected) // 512)
    assert found.st_blksize > 0


@pytest.mark.needs("tar")
def test_tar_of_the_archive_with_an_eye_for_holes(tmp_path: Path, mount: Mount) -> None:
    """`tar -S` of the mounted file holds the archive, zeros included."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "zeros").write_bytes(bytes(1 << 20))
    (root / "ones").write_bytes(b"\1" * 5000)
    with (root / "holes").open("wb") as file:
        file.truncate(3 << 20)
    record(root)
    reference = Reference(root)
    archive, outer = mount(root), tmp_path / "outer.tar"
    subprocess.run(["tar", "-S", "-cf", outer, "-C", archive.parent, archive.name], check=True)
    inner = subprocess.run(["tar", "-xOf", outer, archive.name], check=True, capture_output=True).stdout
    assert inner == reference.read(0, reference.size)


def test_statfs_has_a_block_size(tape: tuple[Path, bytes], mount: Mount) -> None:
    found = os.statvfs(mount(tape[0]).parent)
    assert found.f_bsize >= 512
    assert found.f_frsize >= 512
    assert found.f_blocks * found.f_frsize >= len(tape[1])
    assert found.f_bfree == found.f_bavail == 0
    assert found.f_flag & os.ST_RDONLY


@pytest.mark.needs("bsdtar")
def test_bsdtar_ends(tape: tuple[Path, bytes], mount: Mount, tmp_path: Path) -> None:
    """It took a block size of 0 for a reason to loop."""
    root, expected = tape
    (tmp_path / "expected.tar").write_bytes(expected)
    done = subprocess.run(["bsdtar", "-tf", mount(root)], capture_output=True, timeout=60)
    with tarfile.open(tmp_path / "expected.tar") as reference:
        assert len(done.stdout.splitlines()) == len(reference.getnames())
    assert done.returncode == 0


FACTS = ("st_size", "st_ino", "st_mtime_ns", "st_ctime_ns", "st_blocks", "st_mode", "st_nlink")


def facts(archive: Path, names: tuple[str, ...] = FACTS) -> dict[str, object]:
    found = archive.stat()
    return {name: getattr(found, name) for name in names}


def test_facts_are_the_same_on_every_mount(tape: tuple[Path, bytes], mount: Mount) -> None:
    """On two at once, on one after the other, and after a recording that found nothing new."""
    root, _expected = tape
    first = mount(root)
    before = facts(first)
    assert facts(mount(root)) == before
    assert facts(mount(root, "--direct")) == before
    assert run("unmount", first.parent).returncode == 0
    assert facts(mount(root)) == before
    record(root, "--force")
    assert facts(mount(root)) == before


def test_times_are_those_of_the_recording(tree: Path, mount: Mount) -> None:
    earliest = (tree / "script.sh").stat().st_ctime_ns
    record(tree)
    latest = (tree / ".tartape" / "index.db").stat().st_ctime_ns
    found = mount(tree).stat()
    assert found.st_mtime_ns == found.st_ctime_ns
    assert earliest <= found.st_mtime_ns <= latest + 10**9


def test_a_copy_at_another_place_has_the_same_archive(tape: tuple[Path, bytes], mount: Mount, tmp_path: Path) -> None:
    """Folder and index copied with their times: bytes, size and time of recording stay."""
    root, expected = tape
    elsewhere = tmp_path / "elsewhere" / root.name
    elsewhere.parent.mkdir()
    subprocess.run(["cp", "-a", root, elsewhere], check=True)
    here, there = mount(root), mount(elsewhere)
    names = ("st_size", "st_blocks", "st_mtime_ns", "st_ino")
    assert facts(there, names) == facts(here, names)
    assert there.read_bytes() == expected
    for name in ("fingerprint", "members", "recorded"):
        attribute = "user.tartape." + name
        assert os.getxattr(here, attribute) == os.getxattr(there, attribute)


def test_extended_attributes(tape: tuple[Path, bytes], mount: Mount) -> None:
    """They describe the tape, on the archive as on the folder."""
    root, _expected = tape
    archive = mount(root)
    fingerprint = run("info", root, "--json").stdout.partition('"fingerprint": "')[2][:64]
    members = len(Reference(root).starts)
    for path in (archive, archive.parent):
        found = {name: os.getxattr(path, name) for name in os.listxattr(path)}
        recorded = found.pop("user.tartape.recorded").decode()
        if path == archive.parent:  # how it fares, which the archive would only carry into copies of itself
            for name in ("pid", "size", "delivered", "covered", "readers", "position"):
                assert found.pop(f"user.tartape.{name}").isdigit()
        assert found == {
            "user.tartape.fingerprint": fingerprint.encode(),
            "user.tartape.state": b"valid",
            "user.tartape.name": b"archive.tar",
            "user.tartape.members": b"%d" % members,
            "user.tartape.source": os.fsencode(root),
        }
        assert recorded.startswith("20")
        with pytest.raises(OSError) as caught:
            os.getxattr(path, "user.tartape.nothing")
        assert caught.value.errno == errno.ENODATA


# Who may, and what nobody may


def mounted_for(tree: Path, public: Path, *options: str) -> Path:
    record(tree)
    result = run("mount", tree, public / "mnt", *options)
    assert result.returncode == 0, result.stderr
    return public / "mnt" / "archive.tar"


def as_nobody(*command: object) -> subprocess.CompletedProcess[str]:
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return subprocess.run([*user, *map(os.fspath, command)], capture_output=True, text=True, timeout=60)


@pytest.mark.root
@pytest.mark.needs("setpriv")
@pytest.mark.parametrize(
    ("options", "may_list", "may_read"),
    [
        (("--allow-other", "--mode=0444"), True, True),
        (("--allow-other", "--mode=0440"), False, False),
        (("--allow-other",), False, False),
        (("--mode=0444",), False, False),
        ((), False, False),
    ],
    ids=["all may", "group may", "owner may", "mode without allow-other", "default"],
)
def test_another_user_reads_what_both_options_allow(
    tree: Path, public: Path, options: tuple[str, ...], may_list: bool, may_read: bool
) -> None:
    """`--allow-other` alone shows a 0400 file to nobody else; `--mode` alone lets nobody else in."""
    archive = mounted_for(tree, public, *options)
    try:
        assert as_nobody("ls", public).stdout == "mnt\n"
        listed, read = as_nobody("ls", archive.parent), as_nobody("sha256sum", archive)
        assert (listed.returncode == 0) is may_list
        assert (read.returncode == 0) is may_read
        if may_read:
            own = subprocess.run(["sha256sum", archive], capture_output=True, text=True, check=True)
            assert read.stdout == own.stdout
        else:
            assert "Permission denied" in listed.stderr
            assert "Permission denied" in read.stderr
        assert archive.read_bytes()
    finally:
        assert run("unmount", archive.parent).returncode == 0


@pytest.mark.root
@pytest.mark.needs("setpriv")
def test_without_allow_other_the_folder_itself_is_closed(tree: Path, public: Path) -> None:
    archive = mounted_for(tree, public, "--mode=0444")
    try:
        assert "Permission denied" in as_nobody("stat", archive.parent).stderr
    finally:
        assert run("unmount", archive.parent).returncode == 0


def test_everything_that_would_write_is_refused(tape: tuple[Path, bytes], mount: Mount, tmp_path: Path) -> None:
    """With EROFS, as on any file system that is mounted read-only, for root too."""
    root, expected = tape
    archive = mount(root)
    folder, new = archive.parent, archive.parent / "new"
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    attempts: dict[str, Callable[[], object]] = {
        "open to write": lambda: os.open(archive, os.O_WRONLY),
        "open to read and write": lambda: os.open(archive, os.O_RDWR),
        "open to append": lambda: os.open(archive, os.O_WRONLY | os.O_APPEND),
        "open and truncate": lambda: os.open(archive, os.O_RDONLY | os.O_TRUNC),
        "create": lambda: os.open(new, os.O_WRONLY | os.O_CREAT),
        "create exclusively": lambda: os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL),
        "unlink": lambda: os.unlink(archive),
        "rename": lambda: os.rename(archive, new),
        "mkdir": lambda: os.mkdir(new),
        "rmdir": lambda: os.rmdir(archive),
        "symlink": lambda: os.symlink("x", new),
        "link": lambda: os.link(archive, new),
        "mknod": lambda: os.mknod(new, stat.S_IFREG | 0o600),
        "mkfifo": lambda: os.mkfifo(new),
        "chmod": lambda: os.chmod(archive, 0o777),
        "chmod of the folder": lambda: os.chmod(folder, 0o777),
        "chown": lambda: os.chown(archive, os.geteuid(), os.getegid()),
        "truncate": lambda: os.truncate(archive, 0),
        "utime": lambda: os.utime(archive),
        "utime of the folder": lambda: os.utime(folder, (0, 0)),
        "setxattr": lambda: os.setxattr(archive, "user.x", b"1"),
        "setxattr of ours": lambda: os.setxattr(archive, "user.tartape.state", b"valid"),
        "removexattr": lambda: os.removexattr(archive, "user.tartape.state"),
    }
    results = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            results[name] = "allowed"
        except OSError as error:
            results[name] = errno.errorcode[error.errno or 0]
    assert results == dict.fromkeys(attempts, "EROFS")
    assert not os.access(archive, os.W_OK)
    assert os.listdir(folder) == ["archive.tar"]
    assert archive.read_bytes() == expected


def test_seeks_for_data_and_holes(tape: tuple[Path, bytes], mount: Mount, descriptor: Callable[[Path], int]) -> None:
    """All of it is data."""
    root, expected = tape
    fd = descriptor(mount(root))
    assert os.lseek(fd, 0, os.SEEK_DATA) == 0
    assert os.lseek(fd, 1000, os.SEEK_DATA) == 1000
    assert os.lseek(fd, 0, os.SEEK_HOLE) == len(expected)
    assert os.lseek(fd, 0, os.SEEK_END) == len(expected)
    with pytest.raises(OSError) as caught:
        os.lseek(fd, len(expected), os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO


@BOTH_MODES
def test_calls_that_mean_little_here_do_no_harm(
    tape: tuple[Path, bytes], mount: Mount, descriptor: Callable[[Path], int], options: tuple[str, ...]
) -> None:
    """fsync, locks, hints and ioctl neither hang nor break what follows."""
    root, expected = tape
    archive = mount(root, *options)
    fd, other = descriptor(archive), descriptor(archive)
    os.fsync(fd)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_UN)
    fcntl.lockf(fd, fcntl.LOCK_SH)
    fcntl.lockf(fd, fcntl.LOCK_UN)
    for request in (0x80086601, 0x5413):  # FS_IOC_GETFLAGS, TIOCGWINSZ
        with pytest.raises(OSError):
            fcntl.ioctl(fd, request, bytes(8))
    folder = os.open(archive.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    assert os.pread(fd, len(expected), 0) == expected
    assert os.pread(other, len(expected), 0) == expected


# Many at once


@pytest.mark.long(but="cached")
@BOTH_MODES
def test_many_readers_at_once(tape: tuple[Path, bytes], mount: Mount, options: tuple[str, ...]) -> None:
    """A hundred descriptors, sixteen threads, any position."""
    root, expected = tape
    archive = mount(root, *options)
    opened = [os.open(archive, os.O_RDONLY) for _ in range(100)]
    choose = random.Random(3)
    places = [(choose.choice(opened), choose.randrange(len(expected)), choose.randrange(1, 9000)) for _ in range(2000)]
    try:
        with ThreadPoolExecutor(16) as pool:
            results = pool.map(lambda place: os.pread(place[0], place[2], place[1]), places)
            for (_, at, count), data in zip(places, results, strict=True):
                assert data == expected[at : at + count]
    finally:
        for fd in opened:
            os.close(fd)


def source_files(pid: int, root: Path) -> list[str]:
    """Descriptors of files and folders below the source, without the index."""
    below = f"{root}/"
    return [path for path in descriptors(pid) if path.startswith(below) and not path.startswith(f"{root}/.tartape/")]


def test_an_idle_archive_holds_no_source_file_open(tape: tuple[Path, bytes], mount: Mount) -> None:
    """Neither before a read, nor after it, nor while somebody has the archive open."""
    root, expected = tape
    archive = mount(root)
    pid = daemon_of(archive.parent)
    assert source_files(pid, root) == []
    with archive.open("rb", buffering=0) as file:
        assert source_files(pid, root) == []
        assert file.readall() == expected
        assert source_files(pid, root) == []
    assert source_files(pid, root) == []


def test_an_active_archive_holds_few_source_files_open(tmp_path: Path, mount: Mount) -> None:
    """As many as requests are served at once, however many readers there are."""
    root = tmp_path / "data"
    root.mkdir()
    for number in range(400):
        (root / f"{number:03}").write_bytes(bytes([number % 251]) * 4000)
    record(root)
    reference = Reference(root)
    expected = reference.read(0, reference.size)
    archive = mount(root, "--direct")
    pid, most, stop = daemon_of(archive.parent), 0, threading.Event()
    wrong: list[int] = []

    def reads(seed: int) -> None:
        choose = random.Random(seed)
        with archive.open("rb", buffering=0) as file:
            while not stop.is_set():
                at = choose.randrange(len(expected))
                if os.pread(file.fileno(), 65536, at) != expected[at : at + 65536]:
                    wrong.append(at)

    readers = [threading.Thread(target=reads, args=(seed,)) for seed in range(16)]
    for reader in readers:
        reader.start()
    try:
        samples, end = 0, time.monotonic() + 20
        while (samples < 300 or most == 0) and time.monotonic() < end:
            most = max(most, len(source_files(pid, root)))
            samples += 1
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong
    assert 0 < most <= 16
    assert source_files(pid, root) == []


def test_reading_leaks_nothing(tape: tuple[Path, bytes], mount: Mount) -> None:
    """Descriptors and memory of the daemon after 2,000 reads are what they were after the first few hundred."""
    root, expected = tape
    archive = mount(root)
    pid = daemon_of(archive.parent)

    def reads(count: int) -> None:
        with archive.open("rb", buffering=0) as file, ThreadPoolExecutor(8) as pool:
            choose = random.Random(count)
            places = [choose.randrange(len(expected)) for _ in range(count)]
            for at, data in zip(places, pool.map(lambda at: os.pread(file.fileno(), 3000, at), places), strict=True):
                assert data == expected[at : at + 3000]

    reads(500)
    before, memory = len(descriptors(pid)), resident(pid)
    reads(2000)
    assert len(descriptors(pid)) <= before + 3  # connections to the index, which are pooled
    assert resident(pid) <= memory + (8 << 20)


def test_opening_and_failing_leak_nothing(tape: tuple[Path, bytes], mount: Mount) -> None:
    """500 opens, and 500 reads that fail."""
    root, expected = tape
    archive = mount(root)
    pid = daemon_of(archive.parent)
    with archive.open("rb", buffering=0) as file:
        file.read(1)
        before = len(descriptors(pid))
        for _ in range(500):
            os.close(os.open(archive, os.O_RDONLY))
        shutil.rmtree(root / "photos")
        for _ in range(500):
            with pytest.raises(OSError):
                os.pread(file.fileno(), len(expected), 0)
        assert len(descriptors(pid)) <= before + 3


def test_nothing_stays_open_without_readers(tmp_path: Path, mount: Mount) -> None:
    """A large file that is read in part is open as long as somebody has the archive open, and no longer."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "large").write_bytes(random.Random(1).randbytes(3 << 20))
    for number in range(300):  # many members, so that the helper has its part
        (root / f"small{number}").write_bytes(b"%d" % number)
    run("record", root)
    archive = mount(root, "--direct")
    pid = daemon_of(archive.parent)

    def opened() -> list[str]:
        return open_in(root, pid, helper_of(pid))

    expected = Reference(root)
    with open(archive, "rb", buffering=0) as one, open(archive, "rb", buffering=0) as other:
        for at in (700_000, 5000, 1_000_000):
            assert os.pread(one.fileno(), 4096, at) == expected.read(at, 4096)
        assert opened() == [f"{root}/large"]
        assert os.pread(other.fileno(), 4096, 9000) == expected.read(9000, 4096)
    wait_until(lambda: opened() == [])
    with open(archive, "rb", buffering=1 << 20) as file:
        assert file.read() == expected.read(0, expected.size)
        assert opened() == []
