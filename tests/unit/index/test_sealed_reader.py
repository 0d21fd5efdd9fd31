"""The digests in an index: none that was damaged or forged leads to bytes that do not belong to the seal."""

import contextlib
import os
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.packed import change_fact, digests_crc, edit
from support.seals import BLOCK, flip, index_of, playing, sealed, whole

from tartapefs import (
    Tape,
    TapeError,
    TapeFormatError,
    TapeIntegrityError,
    TapePlayer,
    TapeRecorder,
    UnexpectedTapeError,
)
from tartapefs.verify.seal import seal


def forge(index: Path, sql: str, *values: object) -> None:
    """Changes rows of the tables of digests, with checksums that are right again."""
    with closing(sqlite3.connect(index, isolation_level=None)) as database:
        assert database.execute(sql, values).rowcount
        for table, key in (("leaf", "start"), ("piece", "start"), ("node", "place")):
            for row in database.execute(f"SELECT * FROM {table}").fetchall():
                *numbers, digests, _ = row
                crc = digests_crc(*numbers, digests=digests)
                database.execute(f"UPDATE {table} SET crc = ? WHERE {key} = ?", (crc, row[0]))


CHANGED = "CAST(substr({0}, 1, 32 * {1}) || ? || substr({0}, 32 * {1} + 33) AS BLOB)"


@pytest.mark.parametrize("table", ["leaf", "piece", "node"])
def test_another_digest_in_the_index(mixed: Path, table: str) -> None:
    """In any row, at any place, with a checksum that is right: what depends on it is not served."""
    good, expected = index_of(mixed).read_bytes(), whole(mixed)
    key = "place" if table == "node" else "start"
    with closing(sqlite3.connect(index_of(mixed))) as database:
        rows = database.execute(f"SELECT {key}, length(digests) / 32 FROM {table}").fetchall()
    assert rows
    for where, count in rows:
        for at in range(count):
            forge(
                index_of(mixed),
                f"UPDATE {table} SET digests = {CHANGED.format('digests', at)} WHERE {key} = ?",
                os.urandom(32),
                where,
            )
            with pytest.raises(TapeFormatError), playing(mixed) as player:
                assert player.read(0, len(expected)) == expected
            with contextlib.suppress(TapeFormatError), Tape.discover(mixed) as tape:
                assert not tape.rows_are_sound()
            index_of(mixed).write_bytes(good)


@pytest.mark.parametrize("table", ["leaf", "piece", "node"])
def test_digests_too_many(mixed: Path, table: str) -> None:
    forge(index_of(mixed), f"UPDATE {table} SET digests = CAST(digests || zeroblob(32) AS BLOB)")
    with pytest.raises(TapeFormatError), playing(mixed) as player:
        player.read(0, player.tape.total_size)


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM leaf WHERE start > 0",
        "DELETE FROM leaf WHERE start = 0",
        "DELETE FROM leaf WHERE start = (SELECT max(start) FROM leaf)",
        "DELETE FROM leaf WHERE start = (SELECT min(start) FROM leaf WHERE start > 0)",
        "DELETE FROM piece",
        "DELETE FROM node",
        "UPDATE leaf SET stop = stop + 512",
        "UPDATE leaf SET stop = NULL",
        "UPDATE leaf SET digests = digests || zeroblob(32)",
        "UPDATE leaf SET digests = 'text'",
        "UPDATE leaf SET crc = crc + 1",
        "UPDATE piece SET digests = NULL",
        "UPDATE piece SET digests = digests || zeroblob(32)",
        "UPDATE piece SET crc = 1",
        "UPDATE node SET place = place + (1 << 54)",
        "UPDATE node SET digests = 7",
        "UPDATE node SET crc = 'x'",
        "INSERT INTO piece VALUES (77, x'00', 0)",
        "INSERT INTO node VALUES (77, x'00', 0)",
    ],
)
def test_tables_of_digests_that_make_no_sense(mixed: Path, sql: str) -> None:
    with closing(sqlite3.connect(index_of(mixed), isolation_level=None)) as database:
        assert database.execute(sql).rowcount
    is_refused = False
    try:
        with playing(mixed) as player:
            is_refused = not player.tape.rows_are_sound()
            assert player.read(0, player.tape.total_size) == whole(mixed)
    except TapeFormatError:
        is_refused = True
    assert is_refused


def test_bits_that_flip_in_the_index(mixed: Path) -> None:
    good, expected, some = index_of(mixed).read_bytes(), whole(mixed), random.Random(5)
    used = [at for at in range(len(good)) if any(good[max(at - 16, 0) : at + 16])]  # most of a page is free
    refused = 0
    for _ in range(int(os.environ.get("TARTAPEFS_BIT_FLIPS", "300"))):
        changed = bytearray(good)
        changed[some.choice(used)] ^= 1 << some.randrange(8)
        index_of(mixed).write_bytes(changed)
        try:
            with playing(mixed) as player:
                assert player.read(0, player.tape.total_size) == expected
        except TapeError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("algorithm", "md5"),
        ("algorithm", None),
        ("block_size", 1 << 15),
        ("block_size", (1 << 16) + 1),
        ("block_size", "x"),
        ("levels", 0),
        ("levels", 99),
        ("levels", 2),
        ("seal", "0" * 64),
        ("seal", "short"),
    ],
)
def test_facts_of_a_seal_that_make_no_sense(mixed: Path, fact: str, value: object) -> None:
    change_fact(index_of(mixed), fact, value)
    with pytest.raises(TapeFormatError):
        Tape.discover(mixed)


def test_a_forger_who_makes_every_digest_anew(mixed: Path) -> None:
    """Nothing but the seal, kept elsewhere, tells this tape from the other."""
    with Tape.discover(mixed) as tape:
        kept, fingerprint = tape.seal, tape.fingerprint
    flip(mixed / "folder 000" / "00008", 9)
    forged = sealed(mixed)
    assert forged != kept
    with playing(mixed, expect=forged) as player:
        player.read(0, player.tape.total_size)
    with Tape.discover(mixed) as tape:
        assert tape.expect(fingerprint) == "fingerprint", "which covers no contents"
        with pytest.raises(UnexpectedTapeError, match=kept):
            TapePlayer(tape, mixed, expect=kept)


def test_an_index_that_is_changed_under_a_player(mixed: Path) -> None:
    """Whatever the index becomes after it was opened: the bytes that belong to the seal, or an error."""
    expected = whole(mixed)
    small = mixed / "folder 000" / "00005"
    with Tape.discover(mixed) as tape, closing(TapePlayer(tape, mixed, expect=tape.seal)) as player:
        assert player.read(0, 512) == expected[:512]
        flip(small, 9)
        other = mixed.parent / "other.db"
        TapeRecorder(mixed, other).commit()
        with Tape.discover(mixed, other) as bare, closing(TapePlayer(bare, mixed)) as reader:
            seal(bare, reader.source, reader.at_home, "blake3", BLOCK)
        index_of(mixed).write_bytes(other.read_bytes())  # the same file, with all that a forger can make right
        start = expected.index(b"data/folder 000/00005")
        with pytest.raises(TapeError):
            player.read(start, 5000)


def test_the_first_fingerprint_is_compared_before_the_footer(mixed: Path) -> None:
    """Of a tape without digests a mount cannot look at all rows at once; who reads to the end is told in the end."""
    TapeRecorder(mixed, overwrite=True).commit()
    expected = whole(mixed)
    with Tape.discover(mixed) as tape:
        fingerprint = tape.fingerprint
    with playing(mixed, expect=fingerprint) as player:
        assert player.read(0, len(expected)) == expected
    edit(index_of(mixed), f"UPDATE member SET mode = {0o120755} WHERE name = x'6c696e6b'")
    with playing(mixed, expect=fingerprint) as player:
        player.read(0, 512)
        with pytest.raises(TapeIntegrityError, match="the index changed"):
            player.audit()
