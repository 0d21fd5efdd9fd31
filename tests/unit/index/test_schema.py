"""The facts of a tape: any that could not have been recorded is refused. Keys and checksums of rows."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.damaged_index import (
    Damage,
    assert_no_lookup_is_wrong,
    assert_refused,
    assert_verify_says_so,
    changed,
    consistent,
    index_of,
)
from support.pack_trees import few, recorded_tree
from support.packed import change_fact

from tartapefs import Tape, TapeFormatError
from tartapefs.archive.layout import MAX_OFFSET
from tartapefs.index import schema

SET = "UPDATE tape SET value = {1} WHERE fact = '{0}'"


FACTS: dict[str, Damage] = {
    "digest wrong": changed("UPDATE tape SET value = value + 512 WHERE fact = 'total_size'"),
    "digest missing": changed("DELETE FROM tape WHERE fact = 'facts_digest'"),
    "fact missing": consistent("DELETE FROM tape WHERE fact = 'member_count'"),
    "all missing": changed("DELETE FROM tape"),
    "fact too many": consistent("INSERT INTO tape VALUES ('more', 1)"),
    **{
        f"digests due {what}": consistent(
            f"INSERT INTO tape VALUES ('due_algorithm', {name}), ('due_block_size', {size})"
        )
        for what, name, size in (
            ("of no algorithm", "''", 1 << 17),
            ("of an unknown one", "'md5'", 1 << 17),
            ("of null", "NULL", 0),
            ("of a number", 0, 0),
            ("of blocks of nothing", "'sha256'", 0),
            ("of odd blocks", "'sha256'", 100_000),
            ("of large blocks", "'sha256'", 1 << 21),
            ("of blocks of a text", "'sha256'", "'65536'"),
        )
    },
    "fact that drives a terminal": consistent("INSERT INTO tape VALUES (char(10, 27) || '[2J', 1)"),
    "size negative": consistent(SET.format("total_size", -1)),
    "size zero": consistent(SET.format("total_size", 0)),
    "size of a footer": consistent(SET.format("total_size", 1024)),
    "size too large": consistent("UPDATE tape SET value = value + 512 WHERE fact = 'total_size'"),
    "size too small": consistent("UPDATE tape SET value = value - 512 WHERE fact = 'total_size'"),
    "size odd": consistent("UPDATE tape SET value = value + 1 WHERE fact = 'total_size'"),
    "size the largest": consistent(SET.format("total_size", 2**63 - 1)),
    "size a text": consistent("UPDATE tape SET value = value || '' WHERE fact = 'total_size'"),
    "size a fraction": consistent("UPDATE tape SET value = value + 0.0 WHERE fact = 'total_size'"),
    "size null": consistent(SET.format("total_size", "NULL")),
    "count negative": consistent(SET.format("member_count", -1)),
    "count a text": consistent(SET.format("member_count", "'8'")),
    "recorded a text": consistent(SET.format("recorded_ns", "'now'")),
    "recorded before 1970": consistent(SET.format("recorded_ns", -1)),
    "root's name another": consistent(SET.format("root_name", "x'61'")),
    "root's name with a slash": consistent(SET.format("root_name", "x'612f62'")),
    "root's name above": consistent(SET.format("root_name", "x'2e2e'")),
    "root's name with NUL": consistent(SET.format("root_name", "x'6100'")),
    "root's name empty": consistent(SET.format("root_name", "x''")),
    "root's name a number": consistent(SET.format("root_name", 5)),
    "fingerprint a number": consistent(SET.format("fingerprint", 5)),
    "fingerprint no digest": consistent(SET.format("fingerprint", "'of nothing'")),
    "fingerprint with control characters": consistent(SET.format("fingerprint", "printf('%064d', 0) || char(10)")),
    "excluded no JSON": consistent(SET.format("excluded", "'['")),
    "excluded a number": consistent(SET.format("excluded", "'5'")),
    "excluded a text": consistent(SET.format("excluded", "'\"abc\"'")),
    "excluded of numbers": consistent(SET.format("excluded", "'[1, 2]'")),
    "excluded null": consistent(SET.format("excluded", "NULL")),
    "excluded nested without end": consistent(SET.format("excluded", f"'{'[' * 200_000}'")),
    "size the smallest": consistent(SET.format("total_size", -(2**63))),
    "size no block": consistent(SET.format("total_size", 1535)),
    "left out negative": consistent(SET.format("left_out", -1)),
    "inode a text": consistent(SET.format("root_ino", "'x'")),
    "inode of the index null": consistent(SET.format("index_ino", "NULL")),
    "digest of rows too short": consistent(SET.format("rows_digest", "'00'")),
    "digest of rows no text": consistent(SET.format("rows_digest", "x'ff'")),
    "value of a megabyte": consistent(SET.format("fingerprint", "CAST(zeroblob(1000000) AS TEXT)")),
    "fact's name no text": changed("INSERT INTO tape VALUES (x'ff', 1)"),
    "value not UTF-8": changed(SET.format("fingerprint", "CAST(x'ff' AS TEXT)")),
}


@pytest.mark.long(but=25)
@pytest.mark.parametrize("damage", FACTS)
def test_bad_facts_are_refused(damageable: Path, damage: str) -> None:
    """With TapeFormatError, at opening or when the bad row is used; never with another error, never believed."""
    assert_refused(damageable, FACTS[damage])


@pytest.mark.long(but=4)
@pytest.mark.parametrize("damage", FACTS)
def test_bad_facts_are_refused_whoever_looks(
    damageable: Path, damage: str, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_no_lookup_is_wrong(damageable, FACTS[damage])
    assert_verify_says_so(program, damageable, capsys)


@pytest.mark.parametrize("damage", ["size too large", "size too small", "size odd", "root's name another"])
def test_tape_that_does_not_fit_its_facts_is_not_opened(damageable: Path, damage: str) -> None:
    FACTS[damage](index_of(damageable))
    with pytest.raises(TapeFormatError):
        Tape.discover(damageable)


@pytest.mark.parametrize("count", [0, 1, 7, 9, 2**62])
def test_count_of_members_that_does_not_add_up(recorded: Path, count: int) -> None:
    """Found at the latest by the check of all rows."""
    consistent(SET.format("member_count", count))(index_of(recorded))
    try:
        tape = Tape.discover(recorded)
    except TapeFormatError:
        return
    with tape:
        assert not tape.rows_are_sound()


@pytest.mark.parametrize("value", ["", "0" * 63, "g" * 64, 7, None])
def test_a_digest_of_rows_before_the_seal_that_is_none(tmp_path: Path, value: object) -> None:
    root = recorded_tree(tmp_path / "tree", few, True)
    change_fact(index_of(root), "unsealed_rows", value)
    with pytest.raises(TapeFormatError, match="missing or malformed"):
        Tape.discover(root)


def test_a_bare_tape_that_has_one(tmp_path: Path) -> None:
    root = recorded_tree(tmp_path / "tree", few, False)
    change_fact(index_of(root), "unsealed_rows", "0" * 64)
    with pytest.raises(TapeFormatError, match="a seal, and no digests"):
        Tape.discover(root)


@given(st.integers(1, 12), st.integers(0, MAX_OFFSET // 512 - 1).map(lambda block: block * 512))
def test_keys_of_nodes(level: int, start: int) -> None:
    """They are in the order of levels, then of starts, and fit into SQLite's integers."""
    key = schema.node_key(level, start)
    assert schema.split_node_key(key) == (level, start)
    assert 0 < key < schema.node_key(level + 1, 0) <= 2**63 - 1
    assert key < schema.node_key(level, start + 512)


@pytest.mark.parametrize("ino", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_inodes_as_sqlite_can_store_them(ino: int) -> None:
    assert -(2**63) <= schema.signed(ino) < 2**63
    assert schema.signed(ino) % 2**64 == ino
