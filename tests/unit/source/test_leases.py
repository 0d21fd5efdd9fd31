"""Leases: a `stat` is taken only while no program can write the file."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tartapefs.source import file_systems, leases
from tartapefs.source.leases import stat_without_writers

SIZE = mmap.PAGESIZE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"x" * SIZE)
    return tmp_path / "file"


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_file_that_no_program_writes(path: Path, fd: int) -> None:
    """Readers do not count. The lease is returned: a program may open the file for writing at once."""
    with open(path, "rb"):
        assert stat_without_writers(fd, os.fstat(fd).st_dev) == os.fstat(fd)
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_a_file_that_is_open_for_writing(path: Path, fd: int) -> None:
    with open(path, "r+b"):
        assert stat_without_writers(fd, None) is None
    assert stat_without_writers(fd, None) == os.fstat(fd)


def test_a_file_that_is_mapped_for_writing(path: Path, fd: int) -> None:
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    with memory:
        assert stat_without_writers(fd, None) is None
    assert stat_without_writers(fd, None) == os.fstat(fd)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL, errno.ENOLCK])
def test_without_leases_dirty_pages_are_written(
    path: Path, fd: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    written, real = [], fcntl.fcntl

    def refuse(fd: int, command: int, *argument: int) -> object:
        if command == fcntl.F_SETLEASE:
            raise OSError(number, os.strerror(number))
        return real(fd, command, *argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(leases, "write_dirty_pages", lambda fd: not written.append("pages"))
    monkeypatch.setattr(os, "fsync", lambda fd: written.append("fsync"))
    monkeypatch.setattr(leases, "magic_of", lambda fd: 0xEF53)  # ext4
    with open(path, "r+b"):
        assert stat_without_writers(fd, None) == os.fstat(fd)
    assert written == ["pages"]
    monkeypatch.setattr(leases, "magic_of", lambda fd: 0x794C7630)  # overlayfs
    assert stat_without_writers(fd, None) is not None
    monkeypatch.setattr(leases, "write_dirty_pages", lambda fd: False)
    monkeypatch.setattr(leases, "magic_of", lambda fd: 0xEF53)
    assert stat_without_writers(fd, None) is not None
    assert written == ["pages", "fsync", "fsync"]


def test_a_server_that_gives_no_lease_tells_nothing_of_writers(
    path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of NFS has none without a delegation."""
    monkeypatch.setattr(file_systems, "magic_of", lambda fd: 0x6969)
    with open(path, "r+b"):
        assert stat_without_writers(fd, None) == os.fstat(fd)


def test_of_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("was written"))
    monkeypatch.setattr(leases, "write_dirty_pages", lambda fd: pytest.fail("was written"))
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert stat_without_writers(fd, None) == os.fstat(fd)
    finally:
        os.close(fd)
