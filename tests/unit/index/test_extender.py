"""The index with one generation more: what was there is kept to the byte, and replaced when all is there."""

import hashlib
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.packed import sign_facts

from tartapefs import Tape, TapeBusyError, TapeRecorder
from tartapefs.archive import ustar
from tartapefs.index.extender import IndexExtender
from tartapefs.source.folder import Source
from tartapefs.verify.seal import seal

NEW: list[ustar.Facts] = [
    (b"data/zzz%03d" % number, 0o100644, 600, 10**18, number, 0, b"", None) for number in range(300)
]


def index_of(tree: Path) -> Path:
    return tree / ".tartape" / "index.db"


def facts(tape: Tape, fingerprint: str) -> dict[str, Any]:
    return tape.facts.to_keep() | {
        "fingerprint": fingerprint,
        "total_size": tape.total_size + len(NEW) * 1536,
        "member_count": tape.member_count + len(NEW),
        "recorded_ns": 5,
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_were_there_are_kept(tree: Path, processes: int) -> None:
    TapeRecorder(tree).commit()
    with closing(sqlite3.connect(index_of(tree))) as database:
        before = database.execute("SELECT * FROM pack ORDER BY start").fetchall()
    with Tape.discover(tree) as tape:
        with IndexExtender(tape, processes) as writer:
            fingerprint = writer.add(NEW)
            writer.supersede([0])
            writer.commit(facts(tape, fingerprint))
        members, end = list(tape.members()), tape.facts.end
    with Tape.discover(tree) as extended:
        assert [g.members for g in extended.generations] == [len(members), len(NEW)]
        assert [g.stop for g in extended.generations] == [end, extended.facts.end]
        assert list(extended.members()) == members + list(extended.members(end))
        assert [member[1:] for member in extended.members(end)] == NEW
        assert extended.is_superseded(members[0]) and list(extended.superseded()) == [0]
        assert extended.rows_are_sound() and extended.has_fingerprint()
        assert extended.version == 13
    with closing(sqlite3.connect(index_of(tree))) as database:
        assert database.execute("SELECT * FROM pack ORDER BY start").fetchall()[: len(before)] == before


def without_filters(index: Path) -> None:
    """Makes it an index of the first format with generations, which had no filters of names."""
    with closing(sqlite3.connect(index, isolation_level=None)) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.execute("DROP TABLE name_filter")
        database.execute(f"PRAGMA user_version={version - 8}")
        tables = (f"SELECT * FROM {table} ORDER BY start" for table in ("generation", "superseded"))
        forms = (b"%d %d %d %b %d\n", b"%d %d\n")
        rows = (form % row for sql, form in zip(tables, forms, strict=True) for row in database.execute(sql))
        digest = hashlib.sha256(b"".join(rows)).hexdigest()
        database.execute("UPDATE tape SET value = ? WHERE fact = 'generations_digest'", (digest,))
        sign_facts(database)
        database.execute("VACUUM")


@pytest.mark.parametrize("then", ["append", "seal"])
def test_an_index_without_filters_is_read_and_gets_them(tree: Path, then: str) -> None:
    TapeRecorder(tree).commit()
    for name in ("second", "third"):
        (tree / name).write_text(name)
        TapeRecorder(tree, append=True).commit()
    inode = index_of(tree).stat().st_ino
    without_filters(index_of(tree))
    assert index_of(tree).stat().st_ino == inode  # it is at home still
    with Tape.discover(tree) as tape:
        assert tape.version == 5 and tape.rows_are_sound() and tape.has_fingerprint()
        assert all(tape.find(member.name) for member in tape.members())
        with pytest.raises(KeyError):
            tape.find(b"data/none")
        before = list(tape.members())
        if then == "seal":
            seal(tape, Source(tree), True, "sha256")
    if then == "append":
        (tree / "fourth").write_text("fourth")
        TapeRecorder(tree, append=True).commit()
    with Tape.discover(tree) as tape:
        assert tape.version == (13 if then == "append" else 14) and tape.rows_are_sound()
        assert list(tape.members())[: len(before)] == before
        assert all(tape.find(member.name) for member in tape.members())
        starts = [generation.start for generation in tape.generations[1:]]
        assert [place for place, _ in tape.name_filters()] == starts


def test_without_a_commit_nothing_changes(tree: Path) -> None:
    TapeRecorder(tree).commit()
    before = index_of(tree).read_bytes()
    with Tape.discover(tree) as tape, IndexExtender(tape) as writer:
        writer.add(NEW)
    assert index_of(tree).read_bytes() == before
    assert os.listdir(tree / ".tartape") == ["index.db"]


def test_an_index_that_was_replaced_meanwhile(tree: Path, tmp_path: Path) -> None:
    TapeRecorder(tree).commit()
    with Tape.discover(tree) as tape:
        (tree / "another").touch()
        TapeRecorder(tree, overwrite=True).commit()
        before = index_of(tree).read_bytes()
        with pytest.raises(TapeBusyError), IndexExtender(tape):
            pass
    assert index_of(tree).read_bytes() == before
    assert os.listdir(tree / ".tartape") == ["index.db"]


def test_one_writer_at_a_time(tree: Path, tmp_path: Path) -> None:
    TapeRecorder(tree).commit()
    with Tape.discover(tree) as tape, IndexExtender(tape):  # noqa: SIM117
        with pytest.raises(TapeBusyError):
            IndexExtender(tape).__enter__()
    shutil.rmtree(tree / ".tartape")
