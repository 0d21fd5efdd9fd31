"""What the writer puts into an index, and when.

`packed`, written from the format's description, says what lies in it.
"""

import os
import stat
from contextlib import closing
from pathlib import Path

import pytest
from support.damaged_index import index_of
from support.pack_trees import counts, flat, large, query, recorded_tree, starts_of_packs
from support.packed import rows_of
from support.reference import Reference

from tartapefs import Tape, TapeBusyError, TapePlayer
from tartapefs.index.writer import IndexWriter

MOST, RUN = 32, 8  # members in a pack, in a leaf


def test_packs_are_full(root: Path, tape: Tape) -> None:
    """But for the last one; those of a sealed tape as far as whole leaves allow."""
    *full, last = counts(root)
    assert len(full) >= 2
    assert sum(full) + last == tape.member_count
    assert 0 < last <= MOST
    if tape.seal:
        assert all(MOST - RUN < count <= MOST for count in full)
        leaves = {start for (start,) in query(root, "SELECT start FROM leaf")}
        assert set(starts_of_packs(root)) <= leaves
    else:
        assert set(full) == {MOST}


def test_leaves_that_end_early_end_packs_early(tmp_path: Path) -> None:
    root = recorded_tree(tmp_path / "tree", large, True)
    assert set(counts(root)[:-1]) - {MOST}, "or the trees above are too plain"


def test_what_lies_in_the_index(root: Path, tape: Tape) -> None:
    """Member by member, what another reader of the same bytes finds; and `folders` is how many of them are folders."""
    members = tape.members()
    for start, count, folders, data in query(root, "SELECT start, count, folders, members FROM pack ORDER BY start"):
        rows = rows_of(start, count, data)
        for row, member in zip(rows, members, strict=False):
            _, folder, name, mode, size, mtime, mtime_nsec, ino, ctime, ctime_nsec, target, owner = row
            slash = b"/" if stat.S_ISDIR(mode) else b""
            assert (folder + name + slash, mode, size, target) == (member.name, member.mode, member.size, member.target)
            assert mtime * 10**9 + mtime_nsec == member.mtime_ns
            assert ctime * 10**9 + ctime_nsec == member.ctime_ns
            assert (ino, owner, member.owner) == (member.ino, b"", None)
            if row is rows[0]:
                assert member.start == start
            if row is rows[-1]:
                break
        assert sum(stat.S_ISDIR(row[3]) for row in rows) == folders
    assert next(members, None) is None


@pytest.mark.parametrize("count", [30, 31, 32, 62, 63, 64, 65])
@pytest.mark.parametrize("is_sealed", [False, True], ids=["bare", "sealed"])
def test_tapes_of_a_pack_more_or_less(tmp_path: Path, count: int, is_sealed: bool) -> None:
    """With the root's own, there is one member more than files."""
    root = recorded_tree(tmp_path / "tree", lambda root: flat(root, count), is_sealed)
    expected = Reference(root)
    assert counts(root) == [MOST] * ((count + 1) // MOST) + [(count + 1) % MOST] * ((count + 1) % MOST > 0)
    with Tape.discover(root) as tape, closing(TapePlayer(tape, root)) as player:
        assert tape.rows_are_sound()
        assert player.read(0, expected.size) == expected.read(0, expected.size)
        assert len(list(tape.members())) == tape.member_count == count + 1
        assert [member.name for member in tape.folders()] == [b"tree/"]


def test_what_a_member_costs(tmp_path: Path) -> None:
    """5,000 files with names of a camera."""

    def photos(root: Path) -> None:
        for number in range(5_000):
            if number % 1000 == 0:
                (folder := root / f"2024-{number // 1000:02}").mkdir()
            (folder / f"IMG_{number:06}.jpg").touch()

    root = recorded_tree(tmp_path / "tree", photos, False)
    with Tape.discover(root) as tape:
        assert index_of(root).stat().st_size / tape.member_count < 100, "bytes a member"
        assert [member.path for member in tape.folders()] == [b"", *(b"2024-%02d" % month for month in range(5))]
        assert tape.member_count == 5_006


def test_without_commit_the_old_index_stays(recorded: Path) -> None:
    """Whether the block ends or fails; and nothing else stays beside it."""
    index = index_of(recorded)
    before = index.read_bytes()
    with IndexWriter(os.fspath(index)) as writer:
        writer.add([])
    with pytest.raises(ZeroDivisionError), IndexWriter(os.fspath(index)):
        raise ZeroDivisionError
    assert index.read_bytes() == before
    assert os.listdir(index.parent) == [index.name]


def test_two_writers_of_one_index(recorded: Path) -> None:
    index = os.fspath(index_of(recorded))
    with IndexWriter(index), pytest.raises(TapeBusyError), IndexWriter(index):
        pass
    with IndexWriter(index):
        pass  # once the first has ended
