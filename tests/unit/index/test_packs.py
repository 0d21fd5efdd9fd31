"""Packs: what a tape says of its members does not depend on where one pack ends and the next one begins.

`packed`, written from the format's description, says what lies in the index.
"""

import hashlib
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.packed import checksum, edit, rows_of
from support.reference import Reference

from tartapefs import Member, Tape, TapeError, TapeFormatError, TapePlayer, TapeRecorder
from tartapefs.transfer.digests import Digests
from tartapefs.verify.seal import seal

BLOCK = 1 << 16  # of a sealed tape
MOST, RUN = 32, 8  # members in a pack, in a leaf


def flat(root: Path, count: int = 140) -> None:
    """Small files in one folder: but for the first pack, none has a folder in it."""
    for number in range(count):
        (root / f"{number:03}").write_bytes(b"x" * (number * 7 % 1100))


def deep(root: Path) -> None:
    """Folders, files and links in turns, so that packs begin and end in the middle of a folder, and between two."""
    for number in range(30):
        folder = root / f"a{number % 4}" / ("b" * (number % 3 + 1)) / f"c{number:02}"
        folder.mkdir(parents=True)
        for name in range(number % 6):
            (folder / f"file {name}").write_bytes(b"y" * (number * name))
        (folder / "link").symlink_to("../" * (number % 3) + "nowhere")


def large(root: Path) -> None:
    """Files of several blocks, which end the leaf that they are in, at uneven distances."""
    for number in range(140):
        (path := root / f"{number % 3}" / f"{number:03}").parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, 3 * BLOCK + 1 if number * number % 11 == 4 else number)


def few(root: Path) -> None:
    """Folders with a few files, a large one among them; three packs."""
    for number in range(66):
        (path := root / f"{number // 5}" / f"{number:02}").parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, BLOCK + 1 if number % 23 == 6 else number * 20)


TREES: dict[str, Callable[[Path], None]] = {"flat": flat, "deep": deep, "large": large, "few": few}


def index_of(root: Path) -> Path:
    return root / ".tartape" / "index.db"


def recorded(root: Path, build: Callable[[Path], None], is_sealed: bool) -> Path:
    root.mkdir(parents=True)
    build(root)
    TapeRecorder(root).commit()
    if is_sealed:
        with Tape.discover(root) as tape, closing(TapePlayer(tape, root)) as player:
            seal(tape, player.source, player.at_home, "sha256", BLOCK)
    return root


@pytest.fixture(scope="module", params=[f"{name}, {kind}" for name in TREES for kind in ("bare", "sealed")])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, _, kind = request.param.partition(", ")
    return recorded(tmp_path_factory.mktemp("packs") / "tree", TREES[name], kind == "sealed")


@pytest.fixture
def tape(root: Path) -> Iterator[Tape]:
    with Tape.discover(root) as tape:
        yield tape


def query(root: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(index_of(root))) as database:
        return database.execute(sql).fetchall()


def counts(root: Path) -> list[int]:
    return [count for (count,) in query(root, "SELECT count FROM pack ORDER BY start")]


def starts_of_packs(root: Path) -> list[int]:
    return [start for (start,) in query(root, "SELECT start FROM pack ORDER BY start")]


def is_sound(tape: Tape) -> bool:
    try:
        return tape.rows_are_sound()
    except TapeFormatError:
        return False


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
    root = recorded(tmp_path / "tree", large, True)
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


def test_members_at_every_border(root: Path) -> None:
    """The last byte of a pack and the first of the next: by jumps, each with a new tape, and one after the other."""
    expected = Reference(root)
    names, starts = list(expected.starts), list(expected.starts.values())
    with Tape.discover(root) as kept:
        assert [(member.name, member.start) for member in kept.members()] == list(expected.starts.items())
        for border in [*starts_of_packs(root)[1:], expected.size - 1024]:
            for offset in (border - 513, border - 512, border - 1, border, border + 1, border + 511, border + 512):
                wanted = max(at for at, start in enumerate(starts) if start <= offset)
                name = names[wanted] if offset < expected.size - 1024 else None
                with Tape.discover(root) as fresh:
                    for tape in (fresh, kept):
                        found = tape.member_at(offset)
                        assert (found and found.name) == name, offset


def test_members_of_ranges_across_borders(root: Path) -> None:
    with Tape.discover(root) as kept:
        members = list(kept.members())
        borders = [*starts_of_packs(root), kept.total_size - 1024]
        for border in borders:
            for start, stop in (
                (border - 1, border + 1),
                (border - 1, border),
                (border, border + 1),
                (border - 5000, border + 5000),
                (border, kept.total_size),
                (0, border),
                (0, border + 1),
                *((border, other) for other in borders),
            ):
                wanted = [member for member in members if member.start < stop and max(start, 0) < member.stop]
                if start >= stop:
                    wanted = []
                with Tape.discover(root) as fresh:
                    for tape in (fresh, kept):
                        assert list(tape.members(start, stop)) == wanted, (start, stop)


def test_find_every_member(root: Path, tape: Tape) -> None:
    for name, start in Reference(root).starts.items():
        assert tape.find(name).start == start
        with pytest.raises(KeyError):
            tape.find(name.rstrip(b"/") + b"\1")


def test_all_bytes(root: Path, tape: Tape) -> None:
    expected = Reference(root)
    with closing(TapePlayer(tape, root)) as player:
        assert player.read(0, expected.size) == expected.read(0, expected.size)
        for border in starts_of_packs(root)[1:]:
            assert player.read(border - 700, 1400) == expected.read(border - 700, 1400)


def test_folders(root: Path, tape: Tape) -> None:
    """The directories among the members, in order, whichever packs they lie in."""
    wanted = [member for member in tape.members() if member.is_directory]
    assert list(tape.folders()) == wanted
    assert [member.path for member in wanted] == [
        name.partition(b"/")[2].rstrip(b"/") for name in Reference(root).starts if name.endswith(b"/")
    ]


def plain_count(members: list[Member], start: int, stop: int) -> int:
    return sum(start <= member.start < stop for member in members)


def places(tape: Tape, members: list[Member]) -> list[int]:
    """Every start with its neighbours, and places before, after and at the end of all members."""
    around = {member.start + more for member in members for more in (-1, 0, 1)}
    return sorted(around | {-(1 << 62), tape.total_size - 1024, tape.total_size, 1 << 62})


def test_count_from_and_up_to_every_position(root: Path, tape: Tape) -> None:
    members = list(tape.members())
    for place in places(tape, members):
        assert tape.count(0, place) == plain_count(members, 0, place)
        assert tape.count(place, tape.total_size) == plain_count(members, place, tape.total_size)
        assert tape.count(place, place) == 0
        assert tape.count(place, place + 1) == plain_count(members, place, place + 1)


@pytest.mark.long
@pytest.mark.parametrize("is_sealed", [False, True], ids=["bare", "sealed"])
def test_count_between_all_pairs_of_positions(tmp_path: Path, is_sealed: bool) -> None:
    """None where the range is empty, or runs backwards."""
    root = recorded(tmp_path / "tree", few, is_sealed)
    assert len(counts(root)) >= 3
    with Tape.discover(root) as tape:
        members = list(tape.members())
        some = [place for place in places(tape, members) if place % 512 != 511]  # starts, and just behind them
        starts = [member.start for member in members]
        below = {place: sum(start < place for start in starts) for place in some}
        for start in some:
            for stop in some:
                assert tape.count(start, stop) == max(below[stop] - below[start], 0), (start, stop)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["bare", "sealed"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE member SET ino = ino + 1 WHERE number = {}",
        "UPDATE member SET mode = mode | 1 WHERE number = {}",
        "UPDATE member SET name = CAST(name || x'21' AS BLOB) WHERE number = {}",
        "DELETE FROM member WHERE number = {}",
        "UPDATE member SET size = size + 512 WHERE number = {}",
    ],
)
def test_a_change_at_a_border_is_found(tmp_path: Path, is_sealed: bool, statement: str) -> None:
    """In the last member of a pack, or the first of the next; with checksums that are right."""
    root = recorded(tmp_path / "tree", flat, is_sealed)
    good, first = index_of(root).read_bytes(), counts(root)[0]
    for number in (first, first + 1):
        index_of(root).write_bytes(good)
        edit(index_of(root), statement.format(number))
        with Tape.discover(root) as tape:
            assert not is_sound(tape)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["bare", "sealed"])
@pytest.mark.parametrize("change", ["DELETE FROM pack", "UPDATE pack SET start = start + 512"])
def test_packs_that_do_not_join(tmp_path: Path, is_sealed: bool, change: str) -> None:
    """Whichever is missing or elsewhere: who reads up to there, or jumps into the gap, is told so."""
    root = recorded(tmp_path / "tree", flat, is_sealed)
    good, starts = index_of(root).read_bytes(), starts_of_packs(root)
    for start in starts[1:-1]:
        index_of(root).write_bytes(good)
        with closing(sqlite3.connect(index_of(root))) as database, database:
            database.execute(f"{change} WHERE start = ?", (start,))
            for row in database.execute("SELECT start, count, folders, members FROM pack").fetchall():
                database.execute("UPDATE pack SET crc = ? WHERE start = ?", (checksum(*row), row[0]))
        with Tape.discover(root) as tape:
            before = tape.member_at(start - 1)
            assert before and before.stop == start
            with pytest.raises(TapeFormatError):
                list(tape.members())
            with pytest.raises(TapeFormatError):
                tape.member_at(start)
            assert not is_sound(tape)


@pytest.mark.parametrize("count", [30, 31, 32, 62, 63, 64, 65])
@pytest.mark.parametrize("is_sealed", [False, True], ids=["bare", "sealed"])
def test_tapes_of_a_pack_more_or_less(tmp_path: Path, count: int, is_sealed: bool) -> None:
    """With the root's own, there is one member more than files."""
    root = recorded(tmp_path / "tree", lambda root: flat(root, count), is_sealed)
    expected = Reference(root)
    assert counts(root) == [MOST] * ((count + 1) // MOST) + [(count + 1) % MOST] * ((count + 1) % MOST > 0)
    with Tape.discover(root) as tape, closing(TapePlayer(tape, root)) as player:
        assert tape.rows_are_sound()
        assert player.read(0, expected.size) == expected.read(0, expected.size)
        assert tape.count(0, tape.total_size) == tape.member_count == count + 1
        assert [member.name for member in tape.folders()] == [b"tree/"]


@pytest.mark.parametrize("name", TREES)
def test_a_tape_that_is_sealed_stays_the_same_recording(tmp_path: Path, name: str) -> None:
    """Its rows are cut otherwise; what is kept of digests begun before goes on all the same."""
    root, state = recorded(tmp_path / "tree", TREES[name], False), tmp_path / "state"
    with Tape.discover(root) as bare, closing(TapePlayer(bare, root)) as player:
        Digests(bare, ("sha256",), state=state).save()
        seal(bare, player.source, player.at_home, "sha256", BLOCK)
        with Tape.discover(root) as tape:
            assert tape.seal
            assert list(tape.members()) == list(bare.members())
            assert tape.rows_digest == bare.rows_digest
            Digests(tape, ("sha256",), state=state)
    (root / "another").touch()
    TapeRecorder(root, overwrite=True).commit()
    with Tape.discover(root) as tape, pytest.raises(TapeError, match="another recording"):
        Digests(tape, ("sha256",), state=state)


@pytest.mark.parametrize("value", ["", "0" * 63, "g" * 64, 7, None])
def test_a_digest_of_rows_before_the_seal_that_is_none(tmp_path: Path, value: object) -> None:
    root = recorded(tmp_path / "tree", few, True)
    change_fact(root, "unsealed_rows", value)
    with pytest.raises(TapeFormatError, match="missing or malformed"):
        Tape.discover(root)


def test_a_bare_tape_that_has_one(tmp_path: Path) -> None:
    root = recorded(tmp_path / "tree", few, False)
    change_fact(root, "unsealed_rows", "0" * 64)
    with pytest.raises(TapeFormatError, match="a seal, and no digests"):
        Tape.discover(root)


def change_fact(root: Path, fact: str, value: object) -> None:
    """With a digest of all facts that is right again."""
    with closing(sqlite3.connect(index_of(root))) as database, database:
        database.execute("INSERT OR REPLACE INTO tape VALUES (?, ?)", (fact, value))
        facts = dict(database.execute("SELECT fact, value FROM tape WHERE fact != 'facts_digest'"))
        digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
        database.execute("UPDATE tape SET value = ? WHERE fact = 'facts_digest'", (digest,))


def test_an_index_of_a_format_with_a_row_a_member_is_refused(tmp_path: Path) -> None:
    for is_sealed, version in ((False, 1), (True, 2)):
        root = recorded(tmp_path / str(version) / "tree", few, is_sealed)
        with closing(sqlite3.connect(index_of(root))) as database, database:
            database.execute(f"PRAGMA user_version={version}")
        with pytest.raises(TapeFormatError, match=f"its format is {version}, this tartapefs reads 3 and 4"):
            Tape.discover(root)
        TapeRecorder(root, overwrite=True).commit()  # which is the way out
        with Tape.discover(root) as tape:
            assert tape.rows_are_sound()


def test_what_a_member_costs(tmp_path: Path) -> None:
    """20,000 files with names of a camera."""

    def photos(root: Path) -> None:
        for number in range(20_000):
            if number % 1000 == 0:
                (folder := root / f"2024-{number // 1000:02}").mkdir()
            (folder / f"IMG_{number:06}.jpg").touch()

    root = recorded(tmp_path / "tree", photos, False)
    with Tape.discover(root) as tape:
        assert index_of(root).stat().st_size / tape.member_count < 100, "bytes a member"
        assert [member.path for member in tape.folders()] == [b"", *(b"2024-%02d" % month for month in range(20))]
        assert tape.count(0, tape.total_size) == 20_021
