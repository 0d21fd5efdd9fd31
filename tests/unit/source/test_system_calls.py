"""System calls: a path is opened below a folder by no link, and a `stat` is asked of its file system."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tartapefs.source import system_calls
from tartapefs.source.system_calls import FOLDER, LIST, READ, has_openat2, lstat_uncached, magic_of

Open = Callable[[int, bytes, int], int]


@pytest.fixture(params=["openat2", "open_by_component"])
def opened(request: pytest.FixtureRequest) -> Open:
    if request.param == "openat2" and not has_openat2():
        pytest.skip("this kernel has no openat2")
    return getattr(system_calls, request.param)  # type: ignore[no-any-return]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"outside")
    folder = tmp_path / "root"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_bytes(b"inside")
    (folder / "a" / "link").symlink_to("b/file")
    (folder / "a" / "to folder").symlink_to("b")
    (folder / "a" / "outwards").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "a" / "pipe")
    fd = os.open(folder, FOLDER)
    before = set(os.listdir("/proc/self/fd"))
    yield fd
    assert set(os.listdir("/proc/self/fd")) <= before  # none is left open
    os.close(fd)


def test_a_file_is_opened_below_the_folder(root: int, opened: Open) -> None:
    fd = opened(root, b"a/b/file", READ)
    assert os.read(fd, 10) == b"inside"
    os.close(fd)
    fd = opened(root, b"a/b", FOLDER)
    inner = os.open("file", READ, dir_fd=fd)
    assert os.read(inner, 10) == b"inside"
    os.close(inner)
    os.close(fd)


@pytest.mark.parametrize("flags", [READ, FOLDER])
@pytest.mark.parametrize(
    "path", [b"a/link", b"a/to folder", b"a/to folder/file", b"a/outwards", b"a/outwards/file"], ids=os.fsdecode
)
def test_no_link_is_followed(root: int, opened: Open, path: bytes, flags: int) -> None:
    with pytest.raises(OSError) as caught:
        opened(root, path, flags)
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)


def test_what_is_missing_is_an_error_with_its_name(root: int, opened: Open) -> None:
    for path in (b"missing", b"a/missing", b"a/b/missing"):
        with pytest.raises(FileNotFoundError):
            opened(root, path, READ)
    with pytest.raises(NotADirectoryError):
        opened(root, b"a/b/file/missing", READ)


def test_a_pipe_does_not_block(root: int, opened: Open) -> None:
    os.close(opened(root, b"a/pipe", READ))


@pytest.mark.skipif(not has_openat2(), reason="this kernel has no openat2")
def test_openat2_does_not_leave_the_folder(root: int) -> None:
    for path in (b"../outside/file", b"a/../../outside/file", b"/etc/passwd"):
        with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
            system_calls.openat2(root, path, READ)


def test_a_kernel_without_openat2_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_calls, "_SYS_OPENAT2", 1_000_000)
    assert not has_openat2()


@pytest.mark.parametrize("has_statx", [True, False])
def test_an_uncached_stat_is_that_of_the_system(
    root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_statx: bool
) -> None:
    """Of files, folders, links and open descriptors, to the nanosecond."""
    if not has_statx:
        monkeypatch.setattr(system_calls, "_statx", None)
    os.utime(tmp_path / "root" / "a" / "b" / "file", ns=(1_600_000_000_123_456_789, -1_000_000_001))
    for path in (b"a", b"a/b/file", b"a/link", b"a/pipe"):
        assert_same(lstat_uncached(root, path), os.lstat(path, dir_fd=root))
    assert_same(lstat_uncached(root), os.fstat(root))
    with pytest.raises(FileNotFoundError) as caught:
        lstat_uncached(root, b"missing")
    assert caught.value.filename == b"missing"


def assert_same(found: os.stat_result, expected: os.stat_result) -> None:
    for name in ("mode", "ino", "dev", "nlink", "uid", "gid", "size", "atime_ns", "mtime_ns", "ctime_ns"):
        assert getattr(found, f"st_{name}") == getattr(expected, f"st_{name}"), name


def test_the_type_of_a_file_system() -> None:
    fd = os.open("/proc", LIST)
    assert magic_of(fd) == 0x9FA0
    os.close(fd)
    assert magic_of(-1) == 0


def test_dirty_pages_are_those_of_files(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb", buffering=0) as file:
        file.write(b"x")
        assert system_calls.write_dirty_pages(file.fileno())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not system_calls.write_dirty_pages(ours.fileno())
