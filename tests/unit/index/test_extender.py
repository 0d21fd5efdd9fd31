"""The index with one generation more: what was there is kept to the byte, and replaced when all is there."""

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tartapefs import Tape, TapeBusyError, TapeRecorder
from tartapefs.archive import ustar
from tartapefs.index.extender import IndexExtender

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
        assert extended.version == 5
    with closing(sqlite3.connect(index_of(tree))) as database:
        assert database.execute("SELECT * FROM pack ORDER BY start").fetchall()[: len(before)] == before


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
