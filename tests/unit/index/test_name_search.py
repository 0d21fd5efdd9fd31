"""Names looked up by the first names of packs: each is found, in whichever generation, and damage is noticed."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.generations import Generations

from tartapefs import Tape, TapeFormatError, TapePlayer, TapeRecorder
from tartapefs.index import name_filter, name_search, row_codec
from tartapefs.index.name_search import NameSearch
from tartapefs.verify.seal import seal


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names that differ little, in four generations, in packs of three."""
    monkeypatch.setattr(row_codec, "MOST", 3)
    root = tmp_path / "data"
    root.mkdir()
    names = [
        f"{above}{last}" for above in ("", "a/", "a.b/", "a/b/") for last in ("c", "c.", "c-", "cc", "d", "é", "\n")
    ]
    for number in range(4):
        for name in names[number::4]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        os.utime(root, (0, 10**9 + number))
        TapeRecorder(root, append=number > 0).commit()
    return root


@pytest.fixture
def tape(root: Path) -> Iterator[Tape]:
    with Tape.discover(root) as tape:
        yield tape


def test_each_name(tape: Tape) -> None:
    latest = {member.name: member for member in tape.members()}
    assert len(tape.generations) == 4 and latest
    for _ in range(2):
        for name, member in latest.items():
            assert tape.find(name) == member


def test_names_that_are_missing(tape: Tape) -> None:
    names = {member.name.rstrip(b"/") for member in tape.members()}
    for name in names:
        for missing in (name + b"x", name[:-1], name + b"/c/c", name.replace(b"/", b"."), b"other/" + name):
            if missing.rstrip(b"/") not in names:
                with pytest.raises(KeyError):
                    tape.find(missing)


def test_few_names_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_search, "_MAX_PEEKED", 5)
    with Tape.discover(root) as tape:
        for member in tape.members():
            tape.find(member.name)
        assert len(tape._names._peeked) == 5


def test_as_the_oracle_has_them(root: Path, tape: Tape) -> None:
    expected = Generations(root)
    expected.append()
    assert {member.name for member in tape.members()} == set(expected.names[0])
    assert all(tape.find(name).name == name for name in expected.names[0])


def damaged(root: Path, statement: str) -> Tape:
    with closing(sqlite3.connect(root / ".tartape" / "index.db")) as database, database:
        database.execute(statement)
    return Tape.discover(root)


def test_a_row_that_fails_its_checksum(root: Path) -> None:
    with Tape.discover(root) as tape:
        first, second, *_ = tape.members(tape.generations[1].start)
    with damaged(root, f"UPDATE pack SET crc = crc + 1 WHERE start = {first.start}") as tape:
        assert tape.find("data")
        with pytest.raises(TapeFormatError):
            tape.find(second.name)


def test_a_row_on_the_way_that_fails_its_checksum(root: Path) -> None:
    """The first name in it decides where the search goes on."""
    with Tape.discover(root) as tape:
        stop = tape.generations[0].stop
        *_, last = tape.members(0, stop)
    on_the_way = f"(SELECT max(start) FROM pack WHERE start <= {stop // 2})"
    statement = f"UPDATE pack SET crc = crc + 1 WHERE start = {on_the_way}"
    with damaged(root, statement) as tape, pytest.raises(TapeFormatError):
        tape.find(last.name)


def test_rows_that_do_not_cover_an_offset(root: Path) -> None:
    with Tape.discover(root) as tape:
        first, second, *_ = tape.members(tape.generations[1].start)
    with damaged(root, f"DELETE FROM pack WHERE start = {first.start}") as tape, pytest.raises(TapeFormatError):
        tape.find(second.name)


def test_a_generation_that_lacks_a_name_is_not_searched(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first one, of which a missing name is decoded with every check."""
    searched = []
    pack_with = NameSearch.pack_with
    monkeypatch.setattr(NameSearch, "pack_with", lambda *args, **kw: searched.append(args[2]) or pack_with(*args, **kw))
    for number in range(200):
        with pytest.raises(KeyError):
            tape.find(f"data/missing {number}")
    assert searched.count(0) == 200
    assert len(searched) < 240


def test_generations_that_are_too_large_for_a_filter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_filter, "MOST", 8)
    (root / "more").mkdir()
    for number in range(9):
        (root / "more" / f"{number}").touch()
    TapeRecorder(root, append=True).commit()
    with Tape.discover(root) as tape:
        assert tape.find("data/more/8") and tape.find("data/a/b/c")
        with pytest.raises(KeyError):
            tape.find("data/more/9")
        assert tape.rows_are_sound()


@pytest.mark.parametrize("bits", [b"", b"\xff", bytes(100)])
def test_a_filter_of_another_size(root: Path, bits: bytes) -> None:
    """With a right checksum."""
    with closing(sqlite3.connect(root / ".tartape" / "index.db")) as database, database:
        for (place,) in database.execute("SELECT place FROM name_filter").fetchall():
            crc = name_search.schema.row_crc(place, blob=bits)
            database.execute("UPDATE name_filter SET bits = ?, crc = ? WHERE place = ?", (bits, crc, place))
    with Tape.discover(root) as tape, pytest.raises(TapeFormatError, match="filter"):
        tape.find("data/c")


def test_members_of_a_sealed_tape_belong_to_its_seal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with a right checksum, of another member than the one that was sealed."""
    monkeypatch.setattr(row_codec, "MOST", 9)
    with Tape.discover(root) as tape, closing(TapePlayer(tape)) as player:
        seal(tape, player.source, player.at_home, "sha256", 1 << 16)
    with closing(sqlite3.connect(root / ".tartape" / "index.db")) as database, database:
        rows = database.execute("SELECT start, count, folders, members FROM pack WHERE start > 0").fetchall()
        for start, count, folders, members in rows:
            other = members.replace(b"\0cc\0", b"\0cx\0")
            if other != members:
                crc = name_search.crc32(name_search.schema.pack_bytes(start, count, folders, other))
                database.execute("UPDATE pack SET members = ?, crc = ? WHERE start = ?", (other, crc, start))
    with pytest.raises(TapeFormatError), Tape.discover(root) as tape:
        tape.find("data/a/cx")
