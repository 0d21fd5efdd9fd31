"""A member: the names that follow from its whole name, its type, its range, and its header against `tarfile`'s."""

import os
import stat
from types import SimpleNamespace

import pytest
from support import reference

from tartapefs import Member
from tartapefs.archive.member import path_of

FILE, FOLDER, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777


def member(name: bytes, mode: int = FILE, size: int = 0, target: bytes = b"", start: int = 1024) -> Member:
    return Member(start, name, mode, size, 5 * 10**9, 17, 6 * 10**9, target, None)


@pytest.mark.parametrize(
    ("name", "path", "arc_path"),
    [
        (b"data/", b"", "data"),
        (b"data/a", b"a", "data/a"),
        (b"data/a/", b"a", "data/a"),
        (b"data/a/b c", b"a/b c", "data/a/b c"),
        (b"data/caf\xe9", b"caf\xe9", "data/caf\udce9"),
    ],
)
def test_paths(name: bytes, path: bytes, arc_path: str) -> None:
    found = member(name, FOLDER if name.endswith(b"/") else FILE)
    assert (found.path, path_of(name), found.arc_path) == (path, path, arc_path)
    assert os.fsencode(found.arc_path) == name.rstrip(b"/")


@pytest.mark.parametrize(("size", "stop"), [(0, 1536), (1, 2048), (512, 2048), (513, 2560)])
def test_range(size: int, stop: int) -> None:
    assert member(b"data/a", size=size).stop == stop


@pytest.mark.parametrize("mode", [FILE, FOLDER, LINK])
def test_type(mode: int) -> None:
    found = member(b"data/a", mode)
    assert (found.is_file, found.is_directory, found.is_link) == (mode == FILE, mode == FOLDER, mode == LINK)


def test_order_is_that_of_paths() -> None:
    """A folder comes before what lies in it, and that before siblings whose names begin as the folder's."""
    names = [b"data/", b"data/a/", b"data/a/z", b"data/a b", b"data/a.b", b"data/b"]
    assert sorted(map(member, names[::-1]), key=lambda member: member.sort_key) == list(map(member, names))


def test_same_object() -> None:
    """All that is recorded of the object counts; where it lies in the archive, and its owner, do not."""
    one = member(b"data/a", size=5)
    assert one.same_object(one._replace(start=4096))
    changed = {"name": b"data/b", "mode": FILE | 1, "size": 6, "mtime_ns": 7, "ino": 18, "ctime_ns": 8, "target": b"x"}
    for field, value in changed.items():
        assert not one.same_object(one._replace(**{field: value})), field


@pytest.mark.parametrize(
    "made", [member(b"data/a", size=700), member(b"data/d/", FOLDER), member(b"data/l", LINK, target=b"a")]
)
def test_header(made: Member) -> None:
    found = SimpleNamespace(st_mode=made.mode, st_size=made.size, st_mtime_ns=made.mtime_ns)
    assert made.header() == reference.header(made.name, found, os.fsdecode(made.target), None)
