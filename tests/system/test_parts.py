"""The archive in parts, on a real mount: names, bytes, attributes, drift, status, and folders of many parts."""

import ctypes
import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import daemon_of, resident
from support.generations import Generations
from support.programs import done, run, wait_until
from support.reference import Reference, gnu_tar

pytestmark = pytest.mark.fuse

Mount = Callable[..., Path]


@pytest.fixture(params=["fusepy", "mfusepy"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARTAPEFS_BINDING", request.param)


@pytest.fixture
def recorded_tree(tree: Path) -> Path:
    done(run("record", tree))
    return tree


def cut(archive: bytes, size: int, folder: Path) -> dict[str, bytes]:
    """The parts as split(1) makes them, by their names."""
    folder.mkdir()
    command = ["split", "-b", str(size), "--numeric-suffixes=1", "-a", "5", "-", "archive.tar."]
    subprocess.run(command, input=archive, cwd=folder, check=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def errno_of(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.matrix(but=r"-(300|4096)-|\[fusepy.*cached")
@pytest.mark.long(but=4)
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("options", [(), ("--direct",)], ids=["cached", "direct"])
@pytest.mark.parametrize("size", [300, 4096, 5000, 100_000, 314_159])
def test_parts_are_the_archive_cut(
    recorded_tree: Path, mount: Mount, tmp_path: Path, size: int, options: tuple[str, ...]
) -> None:
    """Each byte at any offset, smaller than a block or not, a multiple of a block or a page or not."""
    archive = gnu_tar(recorded_tree)[: Reference(recorded_tree).size]
    folder = mount(recorded_tree, "--part-size", str(size), *options).parent
    expected = cut(archive, size, tmp_path / "cut")
    assert sorted(os.listdir(folder)) == sorted(expected)
    some = random.Random(size)
    for name in some.sample(sorted(expected), min(20, len(expected))):
        descriptor, part = os.open(folder / name, os.O_RDONLY), expected[name]
        for _ in range(20):
            at, count = some.randint(0, size + 10), some.choice([1, 511, 512, 4096, 70_000])
            assert os.pread(descriptor, count, at) == part[at : at + count]
        os.close(descriptor)
    assert contents(folder) == expected
    command = 'cat "$0"/archive.tar.* | tar -x -C "$1" && dd if="$2" bs=1 skip=7 count=100 status=none'
    (tmp_path / "out").mkdir()
    last = max(expected)
    read = subprocess.run(
        ["sh", "-c", command, folder, tmp_path / "out", folder / last], check=True, capture_output=True
    )
    assert read.stdout == expected[last][7:107]
    compared = ["diff", "-r", "--no-dereference", "--exclude=.tartape", recorded_tree, tmp_path / "out" / "data"]
    subprocess.run(compared, check=True)


@pytest.mark.needs("7z")
def test_7z_joins_them(recorded_tree: Path, mount: Mount, tmp_path: Path) -> None:
    folder = mount(recorded_tree, "--part-size", "65536").parent
    subprocess.run(["7z", "x", f"-o{tmp_path / 'out'}", folder / "archive.tar.00001"], check=True, capture_output=True)
    found = tmp_path / "out" / "data" / "photos"
    assert contents(found / "2024") == contents(recorded_tree / "photos" / "2024")
    assert (found / "513.bin").read_bytes() == (recorded_tree / "photos" / "513.bin").read_bytes()


def test_attributes(recorded_tree: Path, mount: Mount) -> None:
    """As of the one file, but for size and inode; and where in the archive a part lies."""
    archive = mount(recorded_tree)
    whole, size = archive.stat(), archive.stat().st_size
    folder = mount(recorded_tree, "--part-size", "100001", "--mode", "0444", "--uid", "1", "--gid", "2").parent
    parts = [path.stat() for path in sorted(folder.iterdir())]
    assert [part.st_size for part in parts] == [100_001, 100_001, 100_001, size - 300_003]
    assert [part.st_blocks for part in parts] == [-(-part.st_size // 512) for part in parts]
    assert [part.st_ino for part in parts] == [2, 3, 4, 5] and whole.st_ino == 2
    assert {part.st_mtime_ns for part in parts} == {part.st_ctime_ns for part in parts} == {whole.st_mtime_ns}
    common = {(part.st_nlink, part.st_blksize, part.st_mode, part.st_uid, part.st_gid) for part in parts}
    assert common == {(1, whole.st_blksize, stat.S_IFREG | 0o444, 1, 2)}
    names = {
        name: os.getxattr(folder / "archive.tar.00003", name) for name in os.listxattr(folder / "archive.tar.00003")
    }
    assert names["user.tartape.start"] == b"200002" and names["user.tartape.stop"] == b"300003"
    assert names["user.tartape.name"] == b"archive.tar.00003" and names["user.tartape.state"] == b"valid"
    assert os.getxattr(folder, "user.tartape.parts") == b"4" and os.statvfs(folder).f_files == 4
    for other in ("archive.tar", "archive.tar.00000", "archive.tar.00005", "archive.tar.1", "archive.tar.000001"):
        assert errno_of((folder / other).stat) == errno.ENOENT


def test_one_part_is_the_archive(recorded_tree: Path, mount: Mount) -> None:
    """Under the name of the first: it may grow."""
    folder = mount(recorded_tree, "--part-size", "1P", "--name", "{root} ü.tar").parent
    reference = Reference(recorded_tree)
    assert contents(folder) == {"data ü.tar.00001": reference.read(0, reference.size)}


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--part-size", "0"], 2, "has at least 1"),
        (["--part-size", "x"], 2, "not a number of bytes"),
        (["--part-size", "1"], 2, "more than 99,999; a part needs 4 bytes or more"),
        (["--part-size", "5000", "--name", "n" * 250], 2, "256 bytes"),
    ],
)
def test_refused(recorded_tree: Path, tmp_path: Path, options: list[str], code: int, says: str) -> None:
    """In one line, before anything is mounted; the smallest size that works is named."""
    (tmp_path / "mnt").mkdir()
    result = run("mount", recorded_tree, tmp_path / "mnt", *options)
    assert (result.returncode, result.stdout) == (code, "")
    assert says in result.stderr.splitlines()[-1]
    assert os.listdir(tmp_path / "mnt") == []


def test_the_size_that_a_refusal_names_works(recorded_tree: Path, mount: Mount) -> None:
    folder = mount(recorded_tree, "--part-size", "4", "--record").parent
    reference = Reference(recorded_tree)
    assert len(os.listdir(folder)) == -(-reference.size // 4)
    assert (folder / "archive.tar.70000").read_bytes() == reference.read(4 * 69_999, 4)


@pytest.mark.parametrize("options", [(), ("--direct",)], ids=["cached", "direct"])
def test_drift_fails_every_part(recorded_tree: Path, mount: Mount, options: tuple[str, ...]) -> None:
    """Also those that are open, and what the kernel has of them."""
    folder = mount(recorded_tree, "--part-size", "50000", *options).parent
    names = sorted(os.listdir(folder))
    opened = [os.open(folder / name, os.O_RDONLY) for name in names[:-1]]
    assert [len(os.pread(descriptor, 4096, 0)) for descriptor in opened] == [4096] * len(opened)
    with open(recorded_tree / "photos" / "2024" / "large.bin", "r+b") as file:
        file.write(b"other")
    assert errno_of(lambda: (folder / names[1]).read_bytes()) == errno.EIO
    wait_until(lambda: all(errno_of(lambda: os.pread(fd, 1, 0)) == errno.EIO for fd in opened))  # noqa: B023
    assert {errno_of((folder / name).stat) for name in names} == {errno.EIO}
    assert {errno_of(lambda: os.open(folder / name, os.O_RDONLY)) for name in names} == {errno.EIO}  # noqa: B023
    assert sorted(os.listdir(folder)) == names
    assert run("status", folder).returncode == 1
    for descriptor in opened:
        os.close(descriptor)


@pytest.mark.long(but="cached|direct-1024")
@pytest.mark.parametrize("in_last", [500, 1024, 2000])
@pytest.mark.parametrize("options", [(), ("--direct",)], ids=["cached", "direct"])
def test_the_footer_needs_an_audit_whichever_parts_it_is_in(
    recorded_tree: Path, mount: Mount, options: tuple[str, ...], in_last: int
) -> None:
    """What comes before it can be read after a file was added; then the addition is looked for."""
    size = (Reference(recorded_tree).size - in_last) // 3
    folder = mount(recorded_tree, "--part-size", str(size), *options).parent
    *_, middle, before, last = sorted(folder.iterdir())
    (recorded_tree / "empty-folder" / "added").touch()
    assert len(middle.read_bytes()) == size
    if in_last >= 1024:
        assert len(before.read_bytes()) == size
    else:
        assert errno_of(before.read_bytes) == errno.EIO
    assert errno_of(last.read_bytes) == errno.EIO


def test_status_is_in_terms_of_the_archive(recorded_tree: Path, mount: Mount) -> None:
    """A reader says which part it has; what one program has read of several parts is told apart."""
    folder = mount(recorded_tree, "--part-size", "50000").parent
    with (
        open(folder / "archive.tar.00002", "rb", buffering=0) as one,
        open(folder / "archive.tar.00004", "rb") as other,
    ):
        one.read(4096)
        other.seek(5000)
        other.read(1)
        status = json.loads(done(run("status", folder, "--json")))
        assert (status["name"], status["parts"], status["part_size"]) == ("archive.tar", 7, 50_000)
        readers = {reader["part"]: reader for reader in status["readers"]}
        assert readers["archive.tar.00002"]["reached"] == 50_000 + 4096 <= readers["archive.tar.00002"]["position"]
        assert readers["archive.tar.00004"]["reached"] == 150_000 + other.raw.tell()
        assert all(start % 50_000 % 4096 == 0 for start, _ in status["coverage"]["ranges"])
        assert {start // 50_000 for start, _ in status["coverage"]["ranges"]} == {1, 3}
        assert "in archive.tar.00002" in done(run("status", folder))
    subprocess.run(["cat", *sorted(folder.iterdir())], check=True, stdout=subprocess.DEVNULL)
    size = Reference(recorded_tree).size
    assert json.loads(done(run("status", folder, "--json")))["coverage"]["ranges"] == [[0, size]]


def test_a_held_reader_of_a_part(recorded_tree: Path, mount: Mount) -> None:
    folder = mount(recorded_tree, "--part-size", "50000", "--on-drift", "hold").parent
    with open(folder / "archive.tar.00003", "rb", buffering=0) as part:
        part.read(1000)
        with open(recorded_tree / "photos" / "2024" / "large.bin", "r+b") as file:
            file.write(b"other")
        child = subprocess.Popen(["dd", "bs=1000", "status=none"], stdin=part, stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: json.loads(run("status", folder, "--json").stdout)["held"])
            (held,) = json.loads(run("status", folder, "--json").stdout)["held"]
            assert (held["pid"], held["position"]) == (child.pid, 101_000)
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(30) == -signal.SIGTERM


def test_mount8_and_units_know_them(recorded_tree: Path, tmp_path: Path) -> None:
    assert "--part-size=4GiB" in done(
        run("systemd-unit", recorded_tree, tmp_path / "mnt", "--options", "ro,part_size=4GiB")
    )
    pair = done(run("systemd-unit", recorded_tree, tmp_path / "mnt", "--automount", "--options", "ro,part_size=4GiB"))
    assert "Options=ro,part_size=4GiB" in pair
    (tmp_path / "mnt").mkdir()
    helper = [sys.executable, "-c", "from tartapefs.__main__ import mount_tartapefs; mount_tartapefs()"]
    subprocess.run([*helper, recorded_tree, tmp_path / "mnt", "-o", "ro,part_size=100000"], check=True)
    assert len(os.listdir(tmp_path / "mnt")) == 4
    done(run("unmount", tmp_path / "mnt"))


def facts(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {path.name: ((s := path.stat()).st_size, s.st_mtime_ns, s.st_ino) for path in folder.iterdir()}


def test_an_append_changes_the_last_part_and_adds_others(tree: Path, mount: Mount) -> None:
    """The others keep size, time and inode through three generations, in a new mount each time."""
    expected, before, seen = Generations(tree), dict[str, tuple[int, int, int]](), set[int]()
    archive = b""
    for generation in range(3):
        (tree / f"added {generation}").write_bytes(os.urandom(120_000))
        done(run("record", tree, *(["--append"] if generation else [])))
        earlier, archive = archive, expected.append()
        folder = mount(tree, "--part-size", "50000").parent
        now = facts(folder)
        parts = contents(folder)
        assert b"".join(parts[name] for name in sorted(parts)) == archive
        same = [name for at, name in enumerate(sorted(before)) if (at + 1) * 50_000 <= len(earlier) - 1024]
        assert {name: now[name] for name in same} == {name: before[name] for name in same}
        (recorded_now,) = {mtime for name, (_, mtime, _) in now.items() if name not in same}
        assert recorded_now not in seen, "what has changed looks as it did"
        assert recorded_now == folder.stat().st_mtime_ns
        seen |= {mtime for _, mtime, _ in now.values()}
        before = now
        done(run("unmount", folder))


class Directory:
    """A folder by opendir(3), whose entries Python's own functions only give from the first on."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(None, use_errno=True)
        self._c.opendir.restype = self._c.readdir.restype = ctypes.c_void_p
        self._c.telldir.restype = ctypes.c_long
        self._handle = ctypes.c_void_p(self._c.opendir(os.fsencode(path)))

    def read(self) -> bytes | None:
        found = self._c.readdir(self._handle)
        return ctypes.string_at(found + 19) if found else None  # `d_name` of `struct dirent`

    def tell(self) -> int:
        return int(self._c.telldir(self._handle))

    def seek(self, position: int) -> None:
        self._c.seekdir(self._handle, ctypes.c_long(position))

    def close(self) -> None:
        self._c.closedir(self._handle)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("count", [2000, pytest.param(99_999, marks=pytest.mark.long)])
def test_many_parts(tmp_path: Path, mount: Mount, count: int) -> None:
    """Listed in many requests, from any position on; the last one is read; the daemon keeps nothing for each."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "holes").touch()
    os.truncate(root / "holes", count * 512 - 2 * 512 - 1024)
    done(run("record", root))
    folder = mount(root, "--part-size", "512").parent
    (folder / "archive.tar.00001").read_bytes()
    daemon = daemon_of(folder)
    before = resident(daemon)
    names = [b".", b"..", *(b"archive.tar.%05d" % number for number in range(1, count + 1))]
    opened = Directory(folder)
    positions = []
    for name in names:
        positions.append(opened.tell())
        assert opened.read() == name
    assert opened.read() is None
    for at in (count, 2, count // 2, 0, count + 1):
        opened.seek(positions[at])
        assert [opened.read() for _ in names[at : at + 100]] == names[at : at + 100]
    opened.close()
    assert resident(daemon) - before < 2_000_000, "it keeps something for each entry"
    assert (folder / f"archive.tar.{count:05}").read_bytes() == bytes(512)
    assert (folder / "archive.tar.00002").read_bytes() == Reference(root).read(512, 512)
