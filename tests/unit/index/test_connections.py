"""The index as a file from outside: whatever is in it, it is refused or gives the recorded archive."""

import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.damaged_index import (
    PAGE,
    Damage,
    assert_no_lookup_is_wrong,
    assert_refused,
    assert_verify_says_so,
    chain,
    changed,
    execute,
    giant,
    index_of,
    interior,
    patched,
    read_whole,
    replanted,
)
from support.pack_trees import few, recorded_tree
from support.programs import run
from support.reference import Reference

from tartapefs import Tape, TapeFormatError, TapeNotFoundError, TapeRecorder
from tartapefs.base.errors import TapeBusyError
from tartapefs.index.reader import Index
from tartapefs.source.folder import Source
from tartapefs.verify.seal import seal


def content(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data) and None


def truncated(keep: Callable[[int], int]) -> Damage:
    return lambda path: os.truncate(path, keep(path.stat().st_size))


def other_database(path: Path) -> None:
    path.unlink()
    execute(path, "CREATE TABLE pack (start INTEGER PRIMARY KEY)")


def link_to_itself_elsewhere(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_in_its_place(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def beside(suffix: str) -> Damage:
    return lambda path: Path(f"{path}{suffix}").write_bytes(b"x" * 100) and None


def write_ahead_mode(path: Path) -> None:
    execute(path, "PRAGMA journal_mode=WAL")
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


FILES: dict[str, Damage] = {
    "text": content(b"this is no index\n" * 400),
    "empty": content(b""),
    "zero bytes": content(bytes(8192)),
    "one byte": content(b"S"),
    "SQLite's magic alone": content(b"SQLite format 3\0"),
    "other database": other_database,
    "wrong application": changed("PRAGMA application_id=1"),
    "newer version": changed("PRAGMA user_version=5"),
    "version of sealed ones": changed("PRAGMA user_version=4"),
    "older version": changed("PRAGMA user_version=1"),
    "older version of sealed ones": changed("PRAGMA user_version=2"),
    "version 0": changed("PRAGMA user_version=0"),
    "largest version": patched(60, b"\xff\xff\xff\xff"),
    "write-ahead log": write_ahead_mode,
    "with -wal": beside("-wal"),
    "with -journal": beside("-journal"),
    "symbolic link": link_to_itself_elsewhere,
    "folder": folder_in_its_place,
    "pipe": pipe_in_its_place,
    "truncated to 100 bytes": truncated(lambda size: 100),
    "truncated to half": truncated(lambda size: size // 2),
    "truncated by a page": truncated(lambda size: size - PAGE),
    "truncated by a byte": truncated(lambda size: size - 1),
    "page size of 0": patched(16, b"\0\0"),
    "text in UTF-16": patched(56, b"\0\0\0\2"),
}


TREES: dict[str, Damage] = {
    "root its own child": replanted(lambda root, new, old: [interior([(root, 2**55)], root)]),
    "root its own last child": replanted(lambda root, new, old: [interior([(new, 0)], root)]),
    "two pages name each other": replanted(
        lambda root, new, old: [interior([(new + 1, 2**55)], new + 1), interior([(root, 2**55)], root)]
    ),
    "rows twice": replanted(lambda root, new, old: [interior([(new, 2**54)], new)]),
    "rows again and again": chain(1, 200),
    "rows without end": chain(8, 200),
    "deeper than any": chain(30, 1),
    "page beyond the file": replanted(lambda root, new, old: [interior([(new + 9, 2**55)], new + 9)]),
    "page the largest": replanted(lambda root, new, old: [interior([(2**32 - 1, 2**55)], 2**32 - 1)]),
    "page none": replanted(lambda root, new, old: [interior([(0, 2**55)], 0)]),
    "page of the schema": replanted(lambda root, new, old: [interior([(1, 2**55)], 1)]),
    "page of an index": replanted(lambda root, new, old: [b"\x0a" + old[1:]]),
    "page of zeros": replanted(lambda root, new, old: [bytes(PAGE)]),
    "page of ones": replanted(lambda root, new, old: [b"\xff" * PAGE]),
    "page without rows": replanted(lambda root, new, old: [b"\x0d" + bytes(4) + b"\x40" + bytes(PAGE - 6)]),
    "cells outside the page": replanted(lambda root, new, old: [old[:8] + b"\xff" * 8 + old[16:]]),
    "all cells one": replanted(lambda root, new, old: [old[:8] + old[8:10] * 3 + old[14:]]),
    "more cells than fit": replanted(lambda root, new, old: [old[:3] + b"\xff\xff" + old[5:]]),
    "keys in no order": replanted(lambda root, new, old: [old[:8] + old[12:14] + old[10:12] + old[8:10] + old[14:]]),
    "value of 1 GB": giant(circular=False),
    "value of 1 GB in one page": giant(circular=True),
}


SCHEMAS: dict[str, Damage] = {
    "text not UTF-8": changed(
        "PRAGMA writable_schema=ON", "UPDATE sqlite_master SET sql = CAST(x'435245415445d2ff' AS TEXT)"
    ),
    "name not UTF-8": changed(
        "PRAGMA writable_schema=ON", "UPDATE sqlite_master SET name = CAST(x'd2ff' AS TEXT), sql = 'CREATE nothing'"
    ),
    "name that drives a terminal": changed(
        "PRAGMA writable_schema=ON", "UPDATE sqlite_master SET name = char(10, 27) || '[2J', sql = 'CREATE nothing'"
    ),
    "both tables one": changed(
        "PRAGMA writable_schema=ON",
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'tape')",
    ),
    "table in the schema's page": changed("PRAGMA writable_schema=ON", "UPDATE sqlite_master SET rootpage = 1"),
    "table nowhere": changed("PRAGMA writable_schema=ON", "UPDATE sqlite_master SET rootpage = 0"),
    "table beyond the file": changed("PRAGMA writable_schema=ON", "UPDATE sqlite_master SET rootpage = 99999"),
    "virtual table": changed(
        "PRAGMA writable_schema=ON",
        "INSERT INTO sqlite_master VALUES ('table', 'more', 'more', 0, 'CREATE VIRTUAL TABLE more USING fts5(x)')",
    ),
    "statistics": changed("ANALYZE"),
    "extra table": changed("CREATE TABLE more (x)"),
    "extra view": changed("CREATE VIEW more AS SELECT 1"),
    "extra trigger": changed("CREATE TRIGGER more AFTER INSERT ON pack BEGIN SELECT 1; END"),
    "extra index": changed("CREATE INDEX more ON pack (count)"),
    "extra column": changed("ALTER TABLE pack ADD COLUMN more"),
    "generated column": changed("ALTER TABLE pack ADD COLUMN more AS (start + 1)"),
    "no packs": changed("DROP TABLE pack"),
    "no facts": changed("DROP TABLE tape"),
    "view of packs": changed("ALTER TABLE pack RENAME TO p", "CREATE VIEW pack AS SELECT * FROM p"),
    "schema as text, otherwise right": changed(
        "PRAGMA writable_schema=ON", "UPDATE sqlite_master SET sql = replace(sql, 'members BLOB', 'members TEXT')"
    ),
}


FILE_DAMAGES = {f"{kind}: {what}": damage for kind, damages in (("file", FILES), ("tree", TREES), ("schema", SCHEMAS))
                for what, damage in damages.items()}  # fmt: skip


@pytest.mark.long(but=60)
@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_bad_files_are_refused(damageable: Path, damage: str) -> None:
    """With TapeFormatError, at opening or when the bad row is used; never with another error, never believed."""
    assert_refused(damageable, FILE_DAMAGES[damage])


@pytest.mark.long(but=6)
@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_bad_files_are_refused_whoever_looks(
    damageable: Path, damage: str, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_no_lookup_is_wrong(damageable, FILE_DAMAGES[damage])
    assert_verify_says_so(program, damageable, capsys)


@pytest.mark.parametrize("what", ["folder", "index", "folder is a file"])
def test_missing_index(tmp_path: Path, what: str) -> None:
    """TapeNotFoundError, which is also a FileNotFoundError, and says what to do."""
    root = tmp_path / "data"
    if what == "folder is a file":
        root.write_bytes(b"")
    elif what == "index":
        (root / ".tartape").mkdir(parents=True)
    for open_tape, remedy in (
        (lambda: Tape.discover(root), f'no tape here; run "tartapefs record {root}" first'),
        (lambda: Tape.from_index(index_of(root)), "no tape here; name the index of a recorded folder"),
    ):
        with pytest.raises(TapeNotFoundError, match=re.escape(remedy)) as caught:
            open_tape()
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.path == str(index_of(root))


@pytest.mark.parametrize("and_back", [False, True], ids=["", "and_back"])
@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize("number", range(4))
def test_index_is_replaced_while_it_is_opened(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, number: int, sealed: bool, and_back: bool
) -> None:
    """Before SQLite opens its path for any of the connections: all are of one recording, the file's `stat` too."""
    place, newer, away = index_of(recorded), recorded.parent / "newer.db", recorded.parent / "away.db"
    TapeRecorder(recorded, newer, exclude="b").commit()
    if sealed:
        with Tape.from_index(newer) as tape, Source(os.fspath(recorded)) as source:
            seal(tape, source, True, "sha256")
    calls, connect = iter(range(100)), sqlite3.connect

    def connect_late(*arguments: Any, **options: Any) -> sqlite3.Connection:
        if next(calls) != number:
            return connect(*arguments, **options)
        os.rename(place, away)
        os.rename(newer, place)
        connection = connect(*arguments, **options)
        if and_back:
            os.rename(place, newer)
            os.rename(away, place)
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_late)
    with closing(Index(os.fspath(place))) as index:
        found = [db.execute("SELECT value FROM tape WHERE fact = 'fingerprint'") for db in index._connections._free]
        assert [rows.fetchall() for rows in found] == 4 * [[(index.facts.fingerprint.encode(),)]]
        assert bool(index.facts.excluded) == (not and_back)
        assert os.path.samestat(index._connections.stat, os.stat(place))


def test_index_that_goes_while_it_is_opened(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no tape, or one that is replaced again and again: which is said, without end of trying."""
    place, connect = index_of(recorded), sqlite3.connect

    def replaced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        shutil.copy(place, recorded.parent / "copy")
        os.rename(recorded.parent / "copy", place)
        return connect(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", replaced)
    with pytest.raises(TapeBusyError):
        Tape.discover(recorded)

    def removed(*arguments: Any, **options: Any) -> sqlite3.Connection:
        os.unlink(place)
        return connect(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", removed)
    with pytest.raises(TapeNotFoundError):
        Tape.discover(recorded)


@pytest.mark.parametrize("program", [["info"], ["verify"], ["record", "--force"]], ids=lambda program: program[0])
def test_path_that_sqlite_does_not_open(recorded: Path, tmp_path: Path, program: list[str]) -> None:
    """Of more than 504 bytes: that is said, with what to do, and nothing is left there."""
    folder = tmp_path / ("x" * 200) / ("y" * 130)  # so that a name fits that the writer makes of it
    folder.mkdir(parents=True)
    place = folder / ("z" * (505 - len(os.fsencode(folder)) - 1))
    shutil.copy(index_of(recorded), place)
    result = run(*program, recorded, "--index", place)
    assert result.returncode == (4 if program[0] == "record" else 1)
    assert "504 bytes" in result.stderr and "--index" in result.stderr
    assert os.listdir(folder) == [place.name]
    fits = place.rename(folder / "index.db")
    assert run(*program, recorded, "--index", fits).returncode == 0


def test_index_is_never_written(recorded: Path) -> None:
    """Opened read-only and immutable: no byte, time or neighbour of it changes."""
    folder = recorded / ".tartape"
    before = (index_of(recorded).read_bytes(), os.stat(index_of(recorded)).st_mtime_ns, os.stat(folder).st_mtime_ns)
    read_whole(recorded)
    assert before == (
        index_of(recorded).read_bytes(),
        os.stat(index_of(recorded)).st_mtime_ns,
        os.stat(folder).st_mtime_ns,
    )
    assert os.listdir(folder) == ["index.db"]


@pytest.mark.parametrize("name", ["a?mode=rwc", "per%20cent%00", "#hash", "new\nline", "caf\udce9", "semi;colon", " "])
def test_index_path_of_odd_characters(recorded: Path, tmp_path: Path, name: str) -> None:
    """A path is a path, whatever it would mean in an address of SQLite's."""
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(index_of(recorded), folder / name)
    with Tape.from_index(folder / name) as tape:
        assert len(list(tape.members())) == tape.member_count
    assert os.listdir(folder) == [name]


def test_an_index_of_a_format_with_a_row_a_member_is_refused(tmp_path: Path) -> None:
    for is_sealed, version in ((False, 1), (True, 2)):
        root = recorded_tree(tmp_path / str(version) / "tree", few, is_sealed)
        with closing(sqlite3.connect(index_of(root))) as database, database:
            database.execute(f"PRAGMA user_version={version}")
        with pytest.raises(TapeFormatError, match=f"its format is {version}, this tartapefs reads 3 to 34"):
            Tape.discover(root)
        TapeRecorder(root, overwrite=True).commit()  # which is the way out
        with Tape.discover(root) as tape:
            assert tape.rows_are_sound()


def test_random_bit_flips(tmp_path: Path) -> None:
    """Of 300 flipped bits, each is refused or changes no byte of the archive."""
    root = tmp_path / "data"
    for at in range(12):
        (root / f"folder {at}" / "deeper").mkdir(parents=True)
        for number in range(20):
            (root / f"folder {at}" / "deeper" / f"{number}").write_bytes(b"%d" % number * (at + 1))
    (root / "link").symlink_to("nowhere")
    TapeRecorder(root).commit()
    path = index_of(root)
    good = path.read_bytes()
    expected = Reference(root).read(0, 1 << 30)
    assert read_whole(root) == expected
    chance = random.Random(20240229)
    used = [at for at, byte in enumerate(good) if byte]  # most of a page may be empty
    bits = [chance.randrange(len(good) * 8) for _ in range(100)] + [chance.randrange(100 * 8) for _ in range(100)]
    bits += [chance.choice(used) * 8 + chance.randrange(8) for _ in range(100)]
    outcomes = {"refused": 0, "right": 0}
    for bit in bits:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            assert read_whole(root) == expected, f"bit {bit} makes other bytes"
            outcomes["right"] += 1
        except TapeFormatError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 50
    assert outcomes["right"] > 0  # a bit in unused space
