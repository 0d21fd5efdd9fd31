"""The source folder: what it opens, what it refuses, and whether it is still the one that was opened.

Races with programs that swap its parts are in tests/system/test_escape.py.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tartapefs.source import folder as folder_module
from tartapefs.source.file_systems import local_device
from tartapefs.source.folder import Folder, Source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_bytes(b"content")
    (root / "a" / "link").symlink_to("b/file")
    (root / "a" / "to folder").symlink_to("b")
    (root / "top").write_bytes(b"top")
    return root


@pytest.fixture(params=[None, False], ids=["as on this kernel", "by component"])
def source(root: Path, request: pytest.FixtureRequest) -> Iterator[Source]:
    before = set(os.listdir("/proc/self/fd"))
    with Source(os.fspath(root), use_openat2=request.param) as source:
        yield source
    assert set(os.listdir("/proc/self/fd")) <= before


def content(fd: int) -> bytes:
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def test_files_are_opened_by_their_paths(source: Source) -> None:
    assert content(source.open(b"top")) == b"top"
    assert content(source.open(b"a/b/file")) == b"content"
    folder = source.folder_descriptor(b"a/b")
    try:
        assert content(source.open_in(folder, b"file")) == b"content"
    finally:
        os.close(folder)
    folder = source.folder_descriptor(b"")
    try:
        assert content(source.open_in(folder, b"top")) == b"top"
    finally:
        os.close(folder)


@pytest.mark.parametrize("path", [b"a/link", b"a/to folder/file"])
def test_links_are_refused(source: Source, path: bytes) -> None:
    with pytest.raises(OSError) as caught:
        source.open(path)
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    with pytest.raises(OSError):
        source.folder_descriptor(b"a/to folder")
    with pytest.raises(OSError):
        source.folder(b"a/to folder")


def test_its_path_may_lead_elsewhere(source: Source, root: Path) -> None:
    """What was opened stays what is read; whoever reads checks the path."""
    assert source.is_at_its_path()
    root.rename(root.with_name("moved"))
    assert not source.is_at_its_path()
    root.mkdir()
    assert not source.is_at_its_path()
    assert content(source.open(b"top")) == b"top"
    root.rmdir()
    root.with_name("moved").rename(root)
    assert source.is_at_its_path()


def test_a_link_to_the_root_is_resolved_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("data")
    with Source(os.fspath(tmp_path / "link")) as source:
        assert source.root == os.path.realpath(root)
        assert source.ino == root.stat().st_ino
        (tmp_path / "link").unlink()
        assert source.is_at_its_path()


def test_one_at_a_time_has_the_lock(source: Source, root: Path) -> None:
    source.lock()
    with Source(os.fspath(root)) as other, pytest.raises(BlockingIOError):
        other.lock()
    source.close()
    with Source(os.fspath(root)) as other:
        other.lock()


def test_an_lstat_is_of_what_has_the_name(source: Source, root: Path) -> None:
    for path in (b"top", b"a", b"a/link", b"a/b/file"):
        assert source.lstat(path) == os.lstat(root / os.fsdecode(path))
    assert source.lstat(b"") == os.stat(root)
    assert source.readlink(b"a/link") == b"b/file"
    with pytest.raises(FileNotFoundError) as caught:
        source.lstat(b"a/missing")
    assert caught.value.filename == os.fspath(root / "a" / "missing")
    with pytest.raises(FileNotFoundError):  # no file system has it, so it is not there
        source.lstat(b"a/" + b"n" * 2000)


def test_a_resolved_path_knows_each_of_its_parts(source: Source, root: Path) -> None:
    resolved = source.resolve(b"a/b/file")
    paths = [root, root / "a", root / "a" / "b", root / "a" / "b" / "file"]
    if local_device(source.descriptor) is None:
        assert resolved == []
        return
    assert resolved == [(os.fsencode(path), path.stat().st_dev, path.stat().st_ino) for path in paths]
    assert source.lstat_resolved(resolved) == (root / "a" / "b" / "file").stat()
    (root / "a").rename(root / "moved")
    with pytest.raises(FileNotFoundError):
        source.lstat_resolved(resolved)
    (root / "a" / "b").mkdir(parents=True)
    os.link(root / "moved" / "b" / "file", root / "a" / "b" / "file")
    assert source.lstat_resolved(resolved) is None  # the file is the same; its folder is another


def test_what_others_may_change_unseen_is_not_resolved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module.file_systems, "local_device", lambda fd: None)
    with Source(os.fspath(root)) as source:
        assert source.resolve(b"a/b/file") == []
        assert not source.is_local(os.stat(root))
        assert source.plain_device is None


def test_no_hole_is_waited_for_but_where_times_are_late(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for is_late in (True, False):
        monkeypatch.setattr(folder_module.file_systems, "has_late_times", lambda fd, is_late=is_late: is_late)
        with Source(os.fspath(root)) as source:
            fd = source.open(b"top")
            try:
                device = os.fstat(fd).st_dev
                assert source.wait_for_holes(fd, device) == source.wait_for_holes(fd, device + 1) == is_late
                assert source.fstat(fd) == os.fstat(fd)
            finally:
                os.close(fd)


def test_a_closed_source_is_closed_once(root: Path) -> None:
    """A second close must not close what has the number by then."""
    source = Source(os.fspath(root))
    source.close()
    fd = os.open(root / "top", os.O_RDONLY)  # the lowest free number, which is most likely that of the root
    try:
        source.close()
        assert os.read(fd, 10) == b"top"
    finally:
        os.close(fd)


def test_a_folder_lists_names_in_the_order_of_the_archive(source: Source, root: Path) -> None:
    """By their bytes, whatever these are."""
    names = [b"\xff", "\N{LATIN SMALL LETTER E WITH ACUTE}".encode(), b"a", b"a b", b"a-", b"a0", b"B"]
    for name in names:
        (root / "a" / "b" / os.fsdecode(name)).touch()
    folder = source.folder(b"a/b")
    try:
        assert folder.names() == sorted([*names, b"file"])
    finally:
        folder.close()


def test_a_folder_opens_what_lies_in_it(source: Source, root: Path) -> None:
    folder = source.folder(b"a")
    try:
        assert folder.stat() == os.stat(root / "a")
        assert folder.lstat(b"link") == os.lstat(root / "a" / "link")
        assert folder.readlink(b"link") == b"b/file"
        assert folder.is_readable(b"b") and not folder.is_readable(b"missing")
        assert folder.why_unstable() is None
        inner = folder.folder(b"b")
        assert isinstance(inner, Folder)
        assert inner.stat_without_writers(b"file") == os.stat(root / "a" / "b" / "file")
        assert source.stat_without_writers(b"a/b/file") == os.stat(root / "a" / "b" / "file")
        with open(root / "a" / "b" / "file", "ab"):
            assert inner.stat_without_writers(b"file") is source.stat_without_writers(b"a/b/file") is None
        inner.close()
        with pytest.raises(OSError):
            folder.folder(b"to folder")
    finally:
        folder.close()


def test_a_file_is_no_folder(source: Source) -> None:
    with pytest.raises(NotADirectoryError):
        source.folder(b"a/b/file")
    with pytest.raises(FileNotFoundError):
        source.folder(b"a/missing")
    source.prefetch(b"a/b/file", 0, 100)
    source.prefetch(b"a/missing", 0, 100)  # its errors show when it is read
