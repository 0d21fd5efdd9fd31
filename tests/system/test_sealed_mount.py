"""Sealed tapes through a mount: no byte that is not the recorded one, whatever timestamps say; and the scrub."""

import errno
import json
import mmap
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import bytes_read, daemon_of, helper_of
from support.mounting import BOTH_MODES
from support.programs import run, wait_until
from support.seals import BLOCK, flip, index_of, make, sealed, whole

Mount = Callable[..., Path]
pytestmark = pytest.mark.fuse
EVERY = 1 if os.environ.get("TARTAPEFS_LONG") == "1" else 9


def read_all(archive: Path, size: int, start: int = 0) -> tuple[bytes, int | None]:
    """What can be read in order, and the errno that ended it."""
    data = b""
    with archive.open("rb", buffering=0) as file:
        file.seek(start)
        try:
            while piece := os.read(file.fileno(), size):
                data += piece
        except OSError as error:
            return data, error.errno
    return data, None


def state(archive: Path) -> str:
    return os.getxattr(archive.parent, "user.tartape.state").decode()


@pytest.mark.long(but="cached")
@BOTH_MODES
def test_every_byte_flipped_is_an_error_through_the_mount(
    tmp_path: Path, mount: Mount, options: tuple[str, ...]
) -> None:
    root = make(tmp_path / "data", [1, 30, 5])
    sealed(root)
    expected = whole(root)
    places = [(path, at) for path in root.rglob("0*") if path.is_file() for at in range(path.stat().st_size)]
    for path, at in places[::EVERY]:
        flip(path, at)
        archive = mount(root, "--source-check", "mtime", *options)
        data, error = read_all(archive, 1)
        assert error == errno.EIO
        assert expected.startswith(data)
        assert len(data) <= expected.index(os.fsencode(os.path.relpath(path, root.parent)) + b"\0") + 512 + at
        assert "timestamps do not show" in state(archive)
        assert run("unmount", archive.parent).returncode == 0
        flip(path, at)


@pytest.mark.long(but="cached-4096")
@pytest.mark.parametrize("size", [4096, 100_000, 1 << 20])
@BOTH_MODES
def test_a_sealed_archive_reads_as_any_other(tmp_path: Path, mount: Mount, size: int, options: tuple[str, ...]) -> None:
    root = make(tmp_path / "data", [BLOCK * 75 + 3, *[4096] * 400, BLOCK * 40])
    sealed(root)
    archive = mount(root, *options)
    if size > 4096:
        assert read_all(archive, size) == (whole(root), None)
    some, expected = random.Random(size), whole(root)
    with archive.open("rb", buffering=0) as file:
        for _ in range(200):
            at = some.randrange(len(expected))
            assert os.pread(file.fileno(), size, at) == expected[at : at + size]
    facts = json.loads(run("status", archive.parent, "--json").stdout)
    assert facts["seal"] == json.loads(run("info", root, "--json").stdout)["seal"]


@pytest.mark.long(but="small file-direct|large file-cached")
@pytest.mark.parametrize("mode", ["direct", "cached"])
@pytest.mark.parametrize("where", ["a small file", "a large file"])
def test_the_helper_is_held_to_digests_too(tmp_path: Path, mount: Mount, where: str, mode: str) -> None:
    """Parts of requests that the second process fills: of many small files, and of one that is large.

    Through the page cache a reader is told while it is still on the way there.
    """
    root = make(tmp_path / "data", [BLOCK * 100, *[3000] * 600])
    sealed(root)
    expected = whole(root)
    path, at = root / "folder 049" / "00540", 2999
    if where == "a large file":  # in the block at which one request ends and the next begins: it is the helper's
        path = root / "folder 000" / "00000"
        at = (5 << 20) // BLOCK * BLOCK - BLOCK + 5
    flip(path, at)
    archive = mount(root, "--source-check", "mtime", *(["--direct"] if mode == "direct" else []))
    assert helper_of(daemon_of(archive.parent))
    data, error = read_all(archive, 1 << 20)
    hit = expected.index(os.fsencode(os.path.relpath(path, root.parent)) + b"\0") + 512 + at
    assert error == errno.EIO
    assert expected.startswith(data)
    assert hit - (1 << 20 if mode == "direct" else 8 << 20) <= len(data) <= hit
    assert os.path.relpath(path, root.parent) in state(archive)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("changed", ["contents", "timestamps alone"])
def test_what_changes_after_it_was_read_ahead(tmp_path: Path, mount: Mount, changed: str) -> None:
    """The second process has hashed the next bytes; the file becomes another before they are asked for."""
    root = make(tmp_path / "data", [BLOCK * 100])
    sealed(root)
    expected, path = whole(root), root / "folder 000" / "00000"
    archive = mount(root, "--direct", "--source-check", "mtime")
    helper = helper_of(daemon_of(archive.parent))
    before = bytes_read(helper)
    with archive.open("rb", buffering=0) as file:
        for at in (0, 1, 2):  # from the second on, the third and so on are read ahead
            assert os.pread(file.fileno(), 1 << 20, at << 20) == expected[at << 20 : at + 1 << 20]
        wait_until(lambda: bytes_read(helper) > before + (1 << 20))  # its shares of the three are 0.5 MB
        recorded = path.stat().st_mtime_ns
        if changed != "timestamps alone":
            with path.open("r+b") as source:
                source.seek((3 << 20) + 9000)
                source.write(b"another")
        os.utime(path, ns=(recorded, recorded + 1))
        if changed == "contents":
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(file.fileno(), 1 << 20, 3 << 20)
        else:
            assert os.pread(file.fileno(), 1 << 20, 3 << 20) == expected[3 << 20 : 4 << 20]


@pytest.mark.long(but="cached")
@BOTH_MODES
def test_readers_that_go_on_and_jump(tmp_path: Path, mount: Mount, options: tuple[str, ...]) -> None:
    """What was read ahead for one is not taken for what another wants: ranges within it, across its end, at its end."""
    root = make(tmp_path / "data", [BLOCK * 90 + 77, *[3000] * 900, BLOCK * 50])
    sealed(root)
    expected, some = whole(root), random.Random(3)
    with mount(root, *options).open("rb", buffering=0) as file:
        at, size = 0, 1 << 20
        for _ in range(400):
            match some.randrange(8):
                case 0:
                    at = some.randrange(len(expected))
                case 1:
                    at = max(0, at - some.randrange(size))
                case 2:
                    size = some.choice((1 << 20, 300_000, 65_537, 1 << 16))
            assert os.pread(file.fileno(), size, at) == expected[at : at + size]
            at = at + size if at + size < len(expected) else 0


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_store_that_moves_no_timestamp(in_memory: Path, mount: Mount) -> None:
    """On tmpfs, through a mapping: every fact that `stat` knows is as recorded, at home, inode and ctime included."""
    root = make(in_memory / "data", [5000, 100])
    sealed(root)
    path = root / "folder 000" / "00000"
    before = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        assert memory[700] is not None  # the page is there now, and a store to it moves nothing
        memory[700] ^= 1
    after = path.stat()
    for fact in ("st_mtime_ns", "st_ctime_ns", "st_ino", "st_size", "st_mode"):
        assert getattr(after, fact) == getattr(before, fact), fact
    archive = mount(root)
    _, error = read_all(archive, 4096)
    assert error == errno.EIO
    assert "00000: the contents of block 0 (bytes 0 to 5000 of its body) changed" in state(archive)
    assert "timestamps do not show" in state(archive)


def test_a_tape_that_was_copied_is_as_strong(tmp_path: Path, mount: Mount) -> None:
    root = make(tmp_path / "data", [9000, 300_000])
    sealed(root)
    copy = Path(shutil.copytree(root, tmp_path / "elsewhere" / "data", symlinks=True))
    flip(copy / "folder 000" / "00001", 250_000)
    archive = mount(copy)
    data, error = read_all(archive, 10_000)
    assert error == errno.EIO
    assert whole(root).startswith(data)


def test_touched_files_are_read_unless_strict(tmp_path: Path, mount: Mount) -> None:
    root = make(tmp_path / "data", [9000, 300_000])
    sealed(root)
    expected = whole(root)
    os.utime(root / "folder 000" / "00001")
    assert read_all(mount(root), 10_000) == (expected, None)
    strict = mount(root, "--strict")
    assert read_all(strict, 10_000)[1] == errno.EIO
    assert "mtime changed" in state(strict)


def test_mount_expects_and_says_what(tmp_path: Path, mount: Mount) -> None:
    root = make(tmp_path / "data", [9000])
    made = sealed(root)
    fingerprint = json.loads(run("info", root, "--json").stdout)["fingerprint"]
    for value, says in ((made, "covers contents"), (fingerprint, "no contents")):
        (tmp_path / says).mkdir()
        result = run("mount", root, tmp_path / says, "--expect", value)
        assert (result.returncode, says in result.stderr) == (0, True), result.stderr
        assert run("unmount", tmp_path / says).returncode == 0
    flip(root / "folder 000" / "00000", 5)
    sealed(root)
    result = run("mount", root, tmp_path / "covers contents", "--expect", made)
    assert (result.returncode, "not the tape that was expected" in result.stderr) == (1, True)


def test_an_index_that_is_changed_on_disk_under_a_mount(tmp_path: Path, mount: Mount) -> None:
    """A forger writes another sealed index over the one that is mounted, with every checksum and digest made anew."""
    root = make(tmp_path / "data", [9000] * 1000)
    made = sealed(root)
    expected = whole(root)
    archive = mount(root, "--expect", made)
    flip(root / "folder 080" / "00880", 77)
    other = Path(shutil.copytree(root, tmp_path / "forged" / "data", symlinks=True, ignore=lambda *_: {".tartape"}))
    sealed(other)
    with index_of(root).open("r+b") as file:
        file.write(index_of(other).read_bytes())
    data, error = read_all(archive, 1 << 20)
    assert error == errno.EIO
    assert expected.startswith(data)


def test_the_scrub_finds_what_nobody_reads(tmp_path: Path, mount: Mount) -> None:
    root = make(tmp_path / "data", [9000, BLOCK * 30])
    sealed(root)
    archive = mount(root, "--scrub-share", "100")

    def scrubbed() -> dict[str, int]:
        found: dict[str, int] = json.loads(run("status", archive.parent, "--json").stdout).get("scrub", {})
        return found

    wait_until(lambda: scrubbed().get("passes") == 1)
    assert scrubbed()["position"] == len(whole(root)) - 1024
    assert "1 time to the end" in run("status", archive.parent).stdout
    assert run("unmount", archive.parent).returncode == 0
    flip(root / "folder 000" / "00001", BLOCK * 20)
    archive = mount(root, "--source-check", "mtime", "--scrub-share", "50")
    wait_until(lambda: run("status", archive.parent).returncode == 1)
    assert "00001: the contents of block 20 " in state(archive)
