"""The rows of an index: members, ranges and folders are the recorded ones wherever packs begin, or refused."""

import sqlite3
import stat
import struct
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from pathlib import Path

import pytest
from support import packed
from support.damaged_index import (
    PAGE,
    Damage,
    assert_no_lookup_is_wrong,
    assert_refused,
    assert_verify_says_so,
    changed,
    consistent,
    edited,
    fix_checksums,
    index_of,
    put,
    read_whole,
    taken_apart,
)
from support.pack_trees import counts, flat, is_sound, recorded_tree, starts_of_packs
from support.packed import checksum, edit
from support.reference import Reference

from tartapefs import Tape, TapeError, TapeFormatError, TapePlayer, TapeRecorder
from tartapefs.index import row_codec

FIRST, MIDDLE, LAST = 0, 1536, 4608  # the packs of `recorded`


# What can be wrong with a pack's row, before anybody looks into its members.
SET_PACK = f"UPDATE pack SET {{}} WHERE start = {MIDDLE}"


COPY = "INSERT INTO pack SELECT {}, count, folders, members, crc FROM pack WHERE start = {}"


ROWS: dict[str, Damage] = {
    "checksum wrong": changed(SET_PACK.format("crc = crc + 1")),
    "checksum null": changed(SET_PACK.format("crc = NULL")),
    "checksum a text": changed(SET_PACK.format("crc = 'x'")),
    "checksum a fraction": changed(SET_PACK.format("crc = crc + 0.5")),
    "checksum a blob": changed(SET_PACK.format("crc = x'00'")),
    "checksum negative": changed(SET_PACK.format("crc = -1")),
    "checksum of another row": changed(SET_PACK.format("crc = (SELECT crc FROM pack WHERE start = 0)")),
    "checksum null of the first": changed("UPDATE pack SET crc = NULL WHERE start = 0"),
    "members changed": changed(SET_PACK.format("members = CAST(replace(members, x'6572', x'6573') AS BLOB)")),
    "members of another row": changed(SET_PACK.format("members = (SELECT members FROM pack WHERE start = 0)")),
    "count changed": changed(SET_PACK.format("count = count - 1")),
    "folders changed": changed(SET_PACK.format("folders = folders - 1")),
    "folders changed, none there": changed(f"UPDATE pack SET folders = 1 WHERE start = {LAST}"),
    "all rows gone": consistent("DELETE FROM pack"),
    "first row gone": consistent("DELETE FROM pack WHERE start = 0"),
    "row gone": consistent(f"DELETE FROM pack WHERE start = {MIDDLE}"),
    "last row gone": consistent(f"DELETE FROM pack WHERE start = {LAST}"),
    "last row alone": consistent(f"DELETE FROM pack WHERE start < {LAST}"),
    "row twice, overlapping": consistent(COPY.format(MIDDLE + 512, MIDDLE)),
    "row of another within": consistent(COPY.format(MIDDLE + 512, LAST)),
    "row twice, in place of another": consistent(f"DELETE FROM pack WHERE start = {LAST}", COPY.format(LAST, MIDDLE)),
    "rows swapped": consistent(f"UPDATE pack SET start = 1 WHERE start = {MIDDLE}",
                           f"UPDATE pack SET start = {MIDDLE} WHERE start = {LAST}",
                           f"UPDATE pack SET start = {LAST} WHERE start = 1"),
    "first row swapped": consistent("UPDATE pack SET start = 1 WHERE start = 0",
                                f"UPDATE pack SET start = 0 WHERE start = {MIDDLE}",
                                f"UPDATE pack SET start = {MIDDLE} WHERE start = 1"),
    "row too early": consistent(SET_PACK.format("start = start - 512")),
    "row too late": consistent(SET_PACK.format("start = start + 512")),
    "last row too early": consistent(f"UPDATE pack SET start = start - 512 WHERE start = {LAST}"),
    "last row too late": consistent(f"UPDATE pack SET start = start + 512 WHERE start = {LAST}"),
    "all rows later": consistent("UPDATE pack SET start = start + 1000000", "UPDATE pack SET start = start - 999488"),
    "start odd": consistent(SET_PACK.format("start = start + 1")),
    "all starts odd": consistent("UPDATE pack SET start = start + 1 WHERE start > 0",
                             "UPDATE tape SET value = value + 1 WHERE fact = 'total_size'"),
    "start negative": consistent("UPDATE pack SET start = -512 WHERE start = 0"),
    "start the largest": consistent(SET_PACK.format(f"start = {2**63 - 512}")),
    "start the smallest": consistent(SET_PACK.format(f"start = {-(2**63)}")),
    "first start the smallest": consistent(f"UPDATE pack SET start = {-(2**63)} WHERE start = 0"),
    **{f"count {what}": consistent(SET_PACK.format(f"count = {value}")) for what, value in {
        "one too many": "count + 1", "one too few": "count - 1", "zero": 0, "33": 33, "255": 255, "65535": 65535,
        "65536": 65536, "one more than 65536 less": "count + 65536", "2^62": 2**62, "negative": "-count",
        "the smallest": -(2**63), "a text": "'x'", "null": "NULL", "a fraction": "count + 0.5", "a blob": "x'03'",
        "infinite": "9e999"}.items()},
    "count infinite, then negative": consistent("UPDATE pack SET count = 9e999 WHERE start = 0",
                                            SET_PACK.format("count = -9e999")),
    "counts that overflow": consistent(f"UPDATE pack SET count = {2**62}"),
    **{f"folders {what}": consistent(SET_PACK.format(f"folders = {value}")) for what, value in {
        "one too many": "folders + 1", "one too few": "folders - 1", "255": 255, "65535": 65535, "65536": 65536,
        "one more than 65536 less": "folders + 65536", "2^62": 2**62, "negative": "-folders", "a text": "'x'",
        "null": "NULL", "a fraction": "folders + 0.5", "a blob": "x'01'", "infinite": "9e999"}.items()},
    "folders none of the first": consistent("UPDATE pack SET folders = 0 WHERE start = 0"),
    "folders, none there": consistent(f"UPDATE pack SET folders = 1 WHERE start = {LAST}"),
    **{f"members {what}": consistent(SET_PACK.format(f"members = {value}")) for what, value in {
        "null": "NULL", "a text": "'x'", "a number": 5, "a fraction": 0.5, "infinite": "9e999", "empty": "x''",
        "an empty text": "''", "a byte": "x'03'", "two bytes": "x'0300'", "without facts": "substr(members, 1, 5)",
        "cut within the numbers of folders": "substr(members, 1, 4)",
        "cut within the facts": "substr(members, 1, 5 + 44 + 17)", "cut after the facts": "substr(members, 1, 5 + 132)",
        "cut within the names": "substr(members, 1, 5 + 132 + 4)",
        "cut by a byte": "substr(members, 1, length(members) - 1)",
        "cut at the front": "substr(members, 2)", "a byte longer": "CAST(members || x'78' AS BLOB)",
        "a slash longer": "CAST(members || x'2f' AS BLOB)", "a string longer": "CAST(members || x'00' AS BLOB)",
        "twice": "CAST(members || members AS BLOB)", "zeros": "zeroblob(length(members))",
        "many zeros": "zeroblob(32768)",
        "as long as they may be": "zeroblob(33700)", "longer than they may be": "zeroblob(33800)",
        "a megabyte": "zeroblob(1000000)"}.items()},
    "last members cut by a byte": consistent(f"UPDATE pack SET members = substr(members, 1, length(members) - 1)"
                                         f" WHERE start = {LAST}"),
    "last members a byte longer": consistent(f"UPDATE pack SET members = CAST(members || x'78' AS BLOB)"
                                         f" WHERE start = {LAST}"),
}  # fmt: skip


# The bytes of the middle pack: "er" in the first of its folders, "file" in the second, "b" in the third.
FOLDER_AT, OWNER_AT = 42, 43  # in a member's facts


PACKS: dict[str, Damage] = {
    "no folders named": taken_apart(MIDDLE, named=put(0, b"\0")),
    "a folder too few named": taken_apart(MIDDLE, named=put(0, b"\2")),
    "a folder too many named": taken_apart(MIDDLE, named=put(0, b"\4")),
    "255 folders named": taken_apart(MIDDLE, named=put(0, b"\xff")),
    "an owner named": taken_apart(MIDDLE, named=put(1, b"\1")),
    "255 owners named": taken_apart(MIDDLE, named=put(1, b"\xff")),
    "a folder taken for an owner": taken_apart(MIDDLE, named=put(0, b"\2\1"), shared=lambda old: old[:2]),
    "an owner taken for a folder": taken_apart(MIDDLE, named=put(0, b"\4\0"), shared=lambda old: old + b"\0",
                                               strings=lambda old: [*old, b"0:0:a:b"]),
    "a member of no folder": taken_apart(MIDDLE, facts=put(FOLDER_AT, b"\3")),
    "the last member of no folder": taken_apart(MIDDLE, facts=put(2 * 44 + FOLDER_AT, b"\xff")),
    "a member of no owner": taken_apart(MIDDLE, facts=put(OWNER_AT, b"\1")),
    "the last member of no owner": taken_apart(MIDDLE, facts=put(2 * 44 + OWNER_AT, b"\xff")),
    "a member of no owner among some": taken_apart(MIDDLE, named=put(1, b"\1"), facts=put(OWNER_AT, b"\2"),
                                                   strings=lambda old: [*old, b"0:0:a:b"]),
    "a string too few": taken_apart(MIDDLE, strings=lambda old: old[1:]),
    "a string too many": taken_apart(MIDDLE, strings=lambda old: [b"x", *old]),
    "no strings": taken_apart(MIDDLE, strings=lambda old: []),
    "strings in another order": taken_apart(MIDDLE, strings=lambda old: old[::-1]),
    "names and targets swapped": taken_apart(MIDDLE, strings=lambda old: old[3:6] + old[:3] + old[6:]),
    "a folder's fact too few": taken_apart(MIDDLE, shared=lambda old: old[:2]),
    "a folder's fact too many": taken_apart(MIDDLE, shared=lambda old: old + b"\0"),
    "a member's facts too few": taken_apart(MIDDLE, facts=lambda old: old[44:]),
    "a member's facts too many": taken_apart(MIDDLE, facts=lambda old: old + old[:44]),
    "facts shifted": taken_apart(MIDDLE, facts=lambda old: old[-1:] + old[:-1]),
    "nothing shared with what is before": taken_apart(MIDDLE, shared=put(1, b"\0")),
    "shared up to within a name": taken_apart(MIDDLE, shared=put(2, b"\4")),
    "shared up to a slash, then another": taken_apart(MIDDLE, strings=lambda old: [*old[:8], b"/"]),
    "shared, then above": taken_apart(MIDDLE, strings=lambda old: [*old[:8], b"../"]),
    "shared up to within a name, and above by both": taken_apart(
        MIDDLE, shared=put(1, b"\5\6"), strings=lambda old: [*old[:7], b"./", b"./"]),
    "first folder sharing with nothing": taken_apart(MIDDLE, shared=put(0, b"\5"),
                                                     strings=lambda old: [*old[:6], b"a/deep/", *old[7:]]),
    "folder in no use, malformed": taken_apart(MIDDLE, named=put(0, b"\4"), shared=lambda old: old + b"\0",
                                               strings=lambda old: [*old, b"data/../"]),
    "folder in no use, without its slash": taken_apart(MIDDLE, named=put(0, b"\4"), shared=lambda old: old + b"\0",
                                                       strings=lambda old: [*old, b"data/a"]),
    "owner in no use, malformed": taken_apart(MIDDLE, named=put(1, b"\1"), strings=lambda old: [*old, b"0:0:a"]),
    "owner in no use, empty": taken_apart(MIDDLE, named=put(1, b"\1"), strings=lambda old: [*old, b""]),
    "size with the highest bit": taken_apart(MIDDLE, facts=put(2 * 44, struct.pack("<Q", 1 << 63))),
    "size the largest": taken_apart(MIDDLE, facts=put(2 * 44, b"\xff" * 8)),
    "all sizes the largest": taken_apart(MIDDLE, facts=lambda old: b"".join(
        b"\xff" * 8 + old[at + 8 : at + 44] for at in range(0, len(old), 44))),
}  # fmt: skip


FILE = "name = x'62'"  # "b", a file of one block


SET_FILE = f"UPDATE member SET {{}} WHERE {FILE}"


SET_LINK = "UPDATE member SET {} WHERE name = x'63'"


SET_ROOT = "UPDATE member SET {} WHERE number = 1"


TEXT = "CAST('{}' AS BLOB)"


LONG = "CAST(printf('{}%0{}d{}', 0) AS BLOB)"  # zeros between two texts


GROWN = "UPDATE tape SET value = value + {} WHERE fact = 'total_size'"


def more_members(count: int) -> str:
    """Adds empty files to the last pack, which has two members."""
    return (
        f"WITH more (at) AS (SELECT 1 UNION ALL SELECT at + 1 FROM more LIMIT {count})"
        f" INSERT INTO member ({', '.join(packed.COLUMNS)}) SELECT pack, folder, CAST(printf('d%02d', at) AS BLOB),"
        f" {', '.join(packed.COLUMNS[3:])} FROM member, more WHERE name = x'64'"
    )


MEMBERS: dict[str, Damage] = {
    "first gone": edited("DELETE FROM member WHERE number = 1"),
    "first of a pack gone": edited("DELETE FROM member WHERE number = 4"),
    "gone": edited(f"DELETE FROM member WHERE {FILE}"),
    "last of a pack gone": edited("DELETE FROM member WHERE number = 3"),
    "last gone": edited("DELETE FROM member WHERE number = 8"),
    "all gone but the first": edited("DELETE FROM member WHERE number > 1"),
    "too many": edited(more_members(1)),
    "too many in a pack": edited(more_members(31), facts=(GROWN.format(31 * 512),)),
    "in the pack before": edited("UPDATE member SET pack = 0 WHERE number = 4"),
    "in the pack after": edited(f"UPDATE member SET pack = {LAST} WHERE number = 6"),
    "in a pack that starts elsewhere": edited("UPDATE member SET pack = 1024 WHERE number IN (2, 3)"),
    "gap by a smaller size": edited(SET_FILE.format("size = 0")),
    "overlap by a larger size": edited(SET_FILE.format("size = 513")),
    "overlap with all that follows": edited(SET_FILE.format(f"size = {2**62}")),
    "size of the last too large": edited("UPDATE member SET size = 512 WHERE number = 8"),
    "size the largest": edited(SET_FILE.format(f"size = {2**63 - 1}")),
    "sizes that add up beyond any offset": edited(f"UPDATE member SET size = {2**62} WHERE pack = {LAST}",
                                                  SET_LINK.format(f"mode = {stat.S_IFREG}, target = x''")),
    "size of a folder": edited("UPDATE member SET size = 512 WHERE name = x'64656570'"),
    "size of a folder, and all joins": edited(
        "UPDATE member SET size = 512 WHERE number = 3", "DELETE FROM member WHERE number = 4",
        "UPDATE member SET pack = 2048 WHERE number IN (5, 6)"),
    "size of a link": edited(SET_LINK.format("size = 512")),
    "size of a link, and all joins": edited(SET_LINK.format("size = 512"), "DELETE FROM member WHERE number = 8"),
    **{f"name {what}": edited(SET_FILE.format(f"name = {value}")) for what, value in {
        "with a slash": "x'622f63'", "absolute": "x'2f62'", "with a closing slash": "x'622f'", "a slash": "x'2f'",
        "above": "x'2e2e'", "of the same": "x'2e'", "above, absolute": "x'2f2e2e'", "with NUL": "x'6200'",
        "of two": "x'620062'", "empty": "x''", "too long": LONG.format("", 251, ""),
        "that no slash splits": LONG.format("", 101, ""), "of 30 KiB": LONG.format("", 30_000, ""),
        "of a megabyte": "zeroblob(1000000)"}.items()},
    "name of a folder empty": edited("UPDATE member SET name = x'' WHERE number = 2"),
    "name of a folder above": edited("UPDATE member SET name = x'2e2e' WHERE number = 2"),
    "name of a folder too long": edited("UPDATE member SET name = CAST(printf('%0100d', 0) AS BLOB) WHERE number = 3"),
    "name of the root another": edited(SET_ROOT.format("name = x'64617461ff'")),
    "name of the root shorter": edited(SET_ROOT.format("name = x'646174'")),
    "name of the root above": edited(SET_ROOT.format("name = x'2e2e'")),
    "name of the root empty": edited(SET_ROOT.format("name = x''")),
    "name of the root with a slash": edited(SET_ROOT.format("name = x'646174612f'")),
    **{f"folder {what}": edited(SET_FILE.format(f"folder = {value}")) for what, value in {
        "none": "x''", "without its slash": TEXT.format("data"), "within without its slash": TEXT.format("data/a"),
        "of two letters without its slash": TEXT.format("data/ab"),
        "the largest root": TEXT.format("/"), "absolute": TEXT.format("/data/"), "another root": TEXT.format("other/"),
        "another root of the same beginning": TEXT.format("data2/"), "a part of the root": TEXT.format("dat/"),
        "above": TEXT.format("../"), "above the root": TEXT.format("data/../"),
        "above and back": TEXT.format("data/../data/"),
        "above within": TEXT.format("data/a/../"), "the same": TEXT.format("data/./"),
        "the same first": TEXT.format("./data/"),
        "an empty one within": TEXT.format("data//"), "an empty one further": TEXT.format("data//a/"),
        "an empty one last": TEXT.format("data/a//"), "with NUL": "x'646174612f00'",
        "of two": "x'646174612f00646174612f'",
        "too long": LONG.format("data/", 300, "/"), "that no slash splits": LONG.format("data/", 160, "/"),
        "of 30 KiB": LONG.format("data/", 30_000, "/")}.items()},
    "root in a folder": edited(SET_ROOT.format(f"folder = {TEXT.format('data/')}")),
    "root in a folder above": edited(SET_ROOT.format(f"folder = {TEXT.format('../')}")),
    "root second": edited("UPDATE member SET number = 0 WHERE number = 2"),
    "root twice": edited("UPDATE member SET folder = x'', name = x'64617461' WHERE number = 2"),
    "root in every pack": edited("UPDATE member SET folder = x'', name = x'64617461' WHERE number = 4"),
    "two roots": edited("UPDATE member SET folder = x'' WHERE number = 2"),
    "root a file": edited(SET_ROOT.format(f"mode = {stat.S_IFREG | 0o644}")),
    "root a file, no other folders": edited(f"UPDATE member SET mode = {stat.S_IFREG | 0o644} WHERE pack = 0"),
    "root a link": edited(SET_ROOT.format(f"mode = {stat.S_IFLNK | 0o777}, target = x'61'")),
    **{f"of the type {kind:o}": edited(f"UPDATE member SET mode = {kind | 0o644} WHERE number = 8")
       for kind in range(0, 1 << 16, 1 << 12) if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)},
    "folder a link without a target": edited(f"UPDATE member SET mode = {stat.S_IFLNK | 0o777} WHERE number = 3"),
    "file a link without a target": edited(SET_FILE.format(f"mode = {stat.S_IFLNK | 0o777}, size = 0")),
    "file a folder with a size": edited(SET_FILE.format(f"mode = {stat.S_IFDIR | 0o755}")),
    "nanoseconds too many": edited(SET_FILE.format("mtime_nsec = 1000000000")),
    "nanoseconds the most": edited(SET_FILE.format(f"mtime_nsec = {2**32 - 1}")),
    "nanoseconds of ctime": edited(SET_FILE.format(f"ctime_nsec = {10**9}")),
    "nanoseconds of ctime the most": edited(SET_FILE.format(f"ctime_nsec = {2**32 - 1}")),
    "target of a file": edited(SET_FILE.format("target = x'61'")),
    "target of a folder": edited("UPDATE member SET target = x'61' WHERE number = 3"),
    "target of the root": edited(SET_ROOT.format("target = x'61'")),
    "target of an empty file": edited("UPDATE member SET target = x'61' WHERE number = 8"),
    "target of a file alone in its pack": edited("UPDATE member SET target = x'61', pack = 5120 WHERE number = 8"),
    "no folder, alone in a pack with one": edited("UPDATE member SET pack = 5120 WHERE number = 8",
                                                  facts=("UPDATE pack SET folders = 1 WHERE start = 5120",)),
    "target missing": edited(SET_LINK.format("target = x''")),
    "target too long": edited(SET_LINK.format("target = CAST(printf('%0101d', 0) AS BLOB)")),
    "target of 30 KiB": edited(SET_LINK.format("target = CAST(printf('%030000d', 0) AS BLOB)")),
    "target with NUL": edited(SET_LINK.format("target = x'610062'")),
    **{f"owner {what}": edited(SET_FILE.format(f"owner = {value}")) for what, value in {
        "malformed": "x'3a'", "of one": "x'30'", "of three": TEXT.format("0:0:a"), "of five": TEXT.format("0:0:a:b:c"),
        "no number": TEXT.format("a:0:b:c"), "whose group is no number": TEXT.format("0:a:b:c"),
        "without a number": TEXT.format(":0:b:c"), "beyond its field": TEXT.format(f"{10**30}:0:b:c"),
        "of eleven digits": TEXT.format(f"{10**10}:0:b:c"),
        "whose group has eleven digits": TEXT.format(f"0:{10**10}:b:c"),
        "negative": TEXT.format("-1:-1:b:c"), "with a sign": TEXT.format("+1:0:b:c"),
        "with a space": TEXT.format(" 1:0:b:c"),
        "with an underscore": TEXT.format("1_0:0:b:c"), "of a fraction": TEXT.format("1.0:0:b:c"),
        "with a line's end": "x'303a300a3a623a63'", "of digits that are no ASCII": TEXT.format("\u0661:0:b:c"),
        "of endless digits": TEXT.format(f"{'9' * 5000}:0:b:c"), "with NUL": "x'303a303a61003a62'",
        "of a name too long": LONG.format("0:0:", 32, ":b"), "of a group too long": LONG.format("0:0:a:", 32, ""),
    }.items()},
}  # fmt: skip


ROW_DAMAGES = {f"{kind}: {what}": damage
               for kind, damages in (("row", ROWS), ("pack", PACKS), ("member", MEMBERS))
               for what, damage in damages.items()}  # fmt: skip


@pytest.mark.long(but=25)
@pytest.mark.parametrize("damage", ROW_DAMAGES)
def test_bad_rows_are_refused(damageable: Path, damage: str) -> None:
    """With TapeFormatError, at opening or when the bad row is used; never with another error, never believed."""
    assert_refused(damageable, ROW_DAMAGES[damage])


@pytest.mark.long(but=4)
@pytest.mark.parametrize("damage", ROW_DAMAGES)
def test_bad_rows_are_refused_whoever_looks(
    damageable: Path, damage: str, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_no_lookup_is_wrong(damageable, ROW_DAMAGES[damage])
    assert_verify_says_so(program, damageable, capsys)


def test_rows_join_where_no_other_check_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the last row the one before, one block later, so that it ends where the last one did.

    Whoever reads on gets none of its members, and whoever goes back none before it.
    """
    root = tmp_path / "data"
    root.mkdir()
    for name in range(27):
        (root / f"{name:02}").write_bytes(b"x" * (26 - name))
    monkeypatch.setattr(row_codec, "MOST", 3)
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        members = list(tape.members())
    before, last = members[-4].start, members[-1].start
    consistent(f"DELETE FROM pack WHERE start = {last}", COPY.format(before + 512, before))(index_of(root))
    forwards, back = [], []
    with Tape.discover(root) as tape:
        with pytest.raises(TapeFormatError, match="do not join"):
            for member in tape.members():
                forwards.append(member)
        with pytest.raises(TapeFormatError, match="do not join"):
            for member, _ in tape.headed_backwards(0, tape.total_size):
                back.append(member)
    assert forwards == members[:-1]
    assert len(back) == 3


AT_OPENING = ["row: all rows gone", "row: first row gone", "row: last row gone", "row: last row too early",
              "row: last row too late", "row: start negative", "member: first gone", "member: last gone",
              "member: size of the last too large", "member: too many", "member: root a file"]  # fmt: skip


@pytest.mark.parametrize("damage", AT_OPENING)
def test_both_ends_are_looked_at_first(damageable: Path, damage: str) -> None:
    """A tape whose first member is none, or whose last one does not end at its size, is not even opened."""
    ROW_DAMAGES[damage](index_of(damageable))
    with pytest.raises(TapeFormatError):
        Tape.discover(damageable)


def test_right_checksums_alone_changes_nothing(recorded: Path) -> None:
    """The check on these tests: what is refused above is not refused for how it was damaged."""
    with closing(sqlite3.connect(index_of(recorded))) as database:
        assert database.execute("SELECT start FROM pack").fetchall() == [(FIRST,), (MIDDLE,), (LAST,)]
        assert database.execute("PRAGMA page_size").fetchall() == [(PAGE,)]
    expected = Reference(recorded).read(0, 1 << 30)
    fix_checksums(index_of(recorded))
    assert read_whole(recorded) == expected
    edited(f"UPDATE member SET mtime = mtime WHERE {FILE}")(index_of(recorded))
    assert read_whole(recorded) == expected


# What is written in another way than ours, and says the same.
SAME: dict[str, Damage] = {
    "folders whole": edited(),
    "one pack": edited("UPDATE member SET pack = 0"),
    "a pack each": edited("UPDATE member SET pack = CASE number WHEN 2 THEN 512 WHEN 3 THEN 1024 WHEN 5 THEN 2048"
                          " WHEN 6 THEN 3584 WHEN 8 THEN 5120 ELSE pack END"),
    "members a text": consistent(SET_PACK.format("members = CAST(members AS TEXT)")),
    "count a text of digits": consistent(SET_PACK.format("count = '3'")),
    "count a fraction of none": consistent(SET_PACK.format("count = 3.0")),
    "folder in no use": taken_apart(MIDDLE, named=put(0, b"\4"), shared=lambda old: old + b"\5",
                                    strings=lambda old: [*old, b"no/"]),
    "owner in no use": taken_apart(MIDDLE, named=put(1, b"\1"), strings=lambda old: [*old, b"0:0:a:b"]),
    "folder twice": taken_apart(MIDDLE, named=put(0, b"\4"), shared=lambda old: old + b"\5",
                                strings=lambda old: [*old, b""]),
    "shared longer than the one before": taken_apart(MIDDLE, shared=put(1, b"\xff")),
    "first folder sharing with nothing": taken_apart(MIDDLE, shared=put(0, b"\xff")),
}  # fmt: skip


@pytest.mark.parametrize("damage", SAME)
def test_other_bytes_that_say_the_same(damageable: Path, damage: str) -> None:
    """The check on the damages above: those come by the same ways, and are not refused for how they came."""
    reference = Reference(damageable)
    SAME[damage](index_of(damageable))
    assert read_whole(damageable) == reference.read(0, reference.size)
    with Tape.discover(damageable) as tape:
        assert {member.name: member.start for member in tape.members()} == reference.starts
        assert [member.name for member in tape.folders()] == [name for name in reference.starts if name[-1:] == b"/"]
        for name, start in reference.starts.items():
            assert tape.find(name).start == start


# What only a recorder can tell from a recording, by the digest of all packs, or a player, by the source.
OTHERS: dict[str, Damage] = {
    "time": edited(f"UPDATE member SET mtime = mtime + 1 WHERE {FILE}"),
    "time far away": edited(f"UPDATE member SET mtime = {2**63 - 1}, ctime = {-(2**63)} WHERE {FILE}"),
    "inode": edited(SET_FILE.format("ino = ino + 1")),
    "mode": edited(SET_FILE.format("mode = mode | 4095")),
    "size within its block": edited(SET_FILE.format("size = 511")),
    "name": edited(SET_FILE.format("name = x'626f'")),
    "name that drives a terminal": edited(SET_FILE.format("name = x'1b5b324a0a'")),
    "owner": edited(SET_FILE.format(f"owner = {TEXT.format('9999999999:9999999999::')}")),
    "target": edited(SET_LINK.format("target = x'2e2e2f2e2e'")),
    "file a folder": edited(SET_FILE.format(f"mode = {stat.S_IFDIR}, size = 0"), "UPDATE member SET pack = pack - 512"
                            f" WHERE pack = {LAST}", facts=(GROWN.format(-512),)),
    "folder a file": edited(f"UPDATE member SET mode = {stat.S_IFREG | 0o644} WHERE number = 3"),
    "folder that is none": edited(SET_FILE.format(f"folder = {TEXT.format('data/none/')}")),
    "folder that follows": edited(f"UPDATE member SET folder = {TEXT.format('data/a/deep/')} WHERE number = 2"),
    "folder itself": edited(f"UPDATE member SET folder = {TEXT.format('data/a/')} WHERE number = 2"),
    "in a file": edited(f"UPDATE member SET folder = {TEXT.format('data/b/')} WHERE number = 8"),
    "in a link": edited(f"UPDATE member SET folder = {TEXT.format('data/c/')} WHERE number = 8"),
    "in the recording itself": edited(f"UPDATE member SET folder = {TEXT.format('data/.tartape/')} WHERE number = 8"),
    "name of another": edited("UPDATE member SET name = x'62' WHERE number = 8"),
    "another order": edited("UPDATE member SET number = 9 WHERE number = 7"),
    "a member more": edited(more_members(1), facts=(GROWN.format(512),)),
    "as many as a pack may have": edited(more_members(30), facts=(GROWN.format(30 * 512),)),
    "a member less": edited("DELETE FROM member WHERE number = 8", facts=(GROWN.format(-512),)),
}  # fmt: skip


AGREEING = ("owner", "another order", "a member less")  # the source has all that these say of it


@pytest.mark.long(but=6)
@pytest.mark.parametrize("damage", OTHERS)
def test_rows_that_only_their_digest_tells(damageable: Path, damage: str, program: Callable[..., int]) -> None:
    """Another recording, with its own right checksums, is found by the check of all rows, and as drift by a reader."""
    with Tape.discover(damageable) as tape:
        assert tape.rows_are_sound()
    OTHERS[damage](index_of(damageable))
    with Tape.discover(damageable) as tape:
        assert not tape.rows_are_sound()
        for member in tape.members():
            assert len(member.header()) == 512
            assert member.path == b"" or not {b"", b".", b".."} & set(member.path.split(b"/"))
    with nullcontext() if damage in AGREEING else pytest.raises(TapeError):
        read_whole(damageable)
    assert program("verify", damageable) == 3


# Beyond the last member, or before the first, nobody looks who reads the archive.
BEYOND: dict[str, Damage] = {
    "after the last": consistent(COPY.format(5632, LAST)),
    "in the footer": consistent(COPY.format(6144, LAST)),
    "far beyond": consistent(COPY.format(2**62, LAST)),
    "at the largest offset": consistent(COPY.format(2**63 - 512, MIDDLE)),
    "before the first": consistent(COPY.format(-512, LAST)),
    "at the smallest offset": consistent(COPY.format(-(2**63), MIDDLE)),
    "sizes beyond any offset": edited(f"UPDATE member SET pack = {2**62}, number = 99 WHERE number = 3",
                                      f"INSERT INTO member SELECT 3, 0, {', '.join(packed.COLUMNS[1:])} FROM member"
                                      " WHERE number = 99",
                                      f"INSERT INTO member SELECT 100, {2**62}, folder, x'66', {stat.S_IFREG}, {2**62},"
                                      f" {', '.join(packed.COLUMNS[5:])} FROM member WHERE number = 99"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BEYOND)
def test_rows_beyond_the_archive(damageable: Path, damage: str) -> None:
    """They change no byte; who looks at all folders or all rows gets an answer or TapeFormatError."""
    reference = Reference(damageable)
    BEYOND[damage](index_of(damageable))
    with suppress(TapeFormatError):
        assert read_whole(damageable) == reference.read(0, reference.size)
    with Tape.discover(damageable) as tape:
        with suppress(TapeFormatError):
            list(tape.folders())
        with suppress(TapeFormatError):
            assert not tape.rows_are_sound() or "before" in damage or "smallest" in damage


@pytest.mark.long(but=64)
@pytest.mark.parametrize("damage", ROW_DAMAGES)
def test_folders_of_a_bad_index(damageable: Path, damage: str) -> None:
    """Who asks for these alone, as an audit does, gets an answer or TapeFormatError."""
    ROW_DAMAGES[damage](index_of(damageable))
    try:
        tape = Tape.discover(damageable)
    except TapeFormatError:
        return
    with tape, suppress(TapeFormatError):
        assert all(member.is_directory and member.name.startswith(b"data/") for member in tape.folders())


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
    root = recorded_tree(tmp_path / "tree", flat, is_sealed)
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
    root = recorded_tree(tmp_path / "tree", flat, is_sealed)
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
