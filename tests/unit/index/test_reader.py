"""The index as input from outside: whatever is in the file, it is refused or gives the recorded archive."""

import gc
import os
import random
import shutil
import signal
import sqlite3
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from support import packed
from support.programs import run
from support.reference import Reference

from tartapefs import (
    Member,
    Tape,
    TapeError,
    TapeFormatError,
    TapeNotFoundError,
    TapePlayer,
    TapeRecorder,
    cli,
)
from tartapefs.base import signals
from tartapefs.base.errors import TapeBusyError
from tartapefs.index import row_codec as packs
from tartapefs.index.reader import Index
from tartapefs.source.folder import Source
from tartapefs.verify.seal import seal as seal_tape

Damage = Callable[[Path], None]


FIRST, MIDDLE, LAST = 0, 1536, 4608  # the packs of `recorded`


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recorded folder: some files, a link, folders in folders; in packs of three, so that there is more than one."""
    root = tmp_path / "data"
    (root / "a" / "deep" / "er").mkdir(parents=True)
    (root / "a" / "deep" / "er" / "file").write_bytes(b"x" * 700)
    (root / "b").write_bytes(b"y" * 512)
    (root / "c").symlink_to("b")
    (root / "d").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(packs, "MOST", 3)
        TapeRecorder(root).commit()
    return root


def index_of(root: Path) -> Path:
    return root / ".tartape" / "index.db"


def read_whole(root: Path) -> bytes:
    """The archive, and each member's row looked at, as any reader would."""
    with Tape.discover(root) as tape:
        members = list(tape.members())
        for member in members:
            assert len(member.header()) == 512
        player = TapePlayer(tape)
        try:
            return player.read(0, tape.total_size)
        finally:
            player.close()


def backwards(root: Path) -> list[Member]:
    with Tape.discover(root) as tape:
        return [member for member, _ in tape.headed_backwards(0, tape.total_size)]


def refused(root: Path) -> TapeFormatError:
    with pytest.raises(TapeFormatError) as caught:
        read_whole(root)
    error = caught.value
    assert error.path == str(index_of(root))
    assert error.reason in str(error)
    assert str(error).startswith(error.path)
    assert "tartapefs record" in str(error)
    return error


def execute(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in statements:
            database.execute(statement)
    finally:
        database.close()


def seal(path: Path) -> None:
    """Makes all checksums right again: they keep accidents out, not a forger, who can compute them as well."""
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.execute("BEGIN")
        database.text_factory = bytes
        rows = database.execute("SELECT * FROM pack").fetchall()
        database.text_factory = str
        for *facts, _ in rows:
            try:
                checksum = packed.checksum(*facts)
            except (TypeError, struct.error):
                continue  # of types that have no checksum
            database.execute("UPDATE pack SET crc = ? WHERE start = ?", (checksum, facts[0]))
        packed.sign_facts(database)
        database.execute("COMMIT")
    finally:
        database.close()


FORGED: set[Damage] = set()  # what keeps all checksums right, so that a part of it may well be believed


def sealed(*statements: str) -> Damage:
    def damage(path: Path) -> None:
        execute(path, *statements)
        seal(path)

    FORGED.add(damage)
    return damage


def edited(*statements: str, facts: tuple[str, ...] = ()) -> Damage:
    """The statements work on members, one a row: see `packed.edit`."""

    def damage(path: Path) -> None:
        packed.edit(path, *statements)
        execute(path, *facts)
        seal(path)

    FORGED.add(damage)
    return damage


def taken_apart(start: int, **changes: Callable[[Any], Any]) -> Damage:
    """The bytes of a pack in parts, each of which may be changed: `named`, `shared`, `facts`, `strings` (a list)."""

    def damage(path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            ((count, blob),) = database.execute("SELECT count, members FROM pack WHERE start = ?", (start,))
            facts_start = 2 + blob[0]
            stop = facts_start + count * packed.FACTS.size
            parts: dict[str, Any] = {"named": blob[:2], "shared": blob[2:facts_start], "facts": blob[facts_start:stop]}
            parts["strings"] = blob[stop:].split(b"\0")
            parts |= {name: change(parts[name]) for name, change in changes.items()}
            changed = parts["named"] + parts["shared"] + parts["facts"] + b"\0".join(parts["strings"])
            assert changed != blob
            database.execute("UPDATE pack SET members = ? WHERE start = ?", (changed, start))
        seal(path)

    FORGED.add(damage)
    return damage


def put(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:at] + new + old[at + len(new) :]


def unsealed(*statements: str) -> Damage:
    return lambda path: execute(path, *statements)


def content(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data) and None


def patched(offset: int, data: bytes) -> Damage:
    def damage(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        whole[offset : offset + len(data)] = data
        path.write_bytes(whole)

    return damage


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


PAGE = 16384  # bytes


def varint(number: int) -> bytes:
    """As SQLite writes it, below 2^56: seven bits a byte, the highest first."""
    digits = [number & 127]
    while number := number >> 7:
        digits.append(number & 127 | 128)
    return bytes(reversed(digits))


def interior(children: list[tuple[int, int]], last: int) -> bytes:
    """An interior page of a table's b-tree: pages, each with the largest key in it, and the last page."""
    body, stop, places = bytearray(PAGE), PAGE, []
    for child, key in children:
        cell = child.to_bytes(4, "big") + varint(key)
        stop -= len(cell)
        body[stop : stop + len(cell)] = cell
        places.append(stop.to_bytes(2, "big"))
    assert stop >= 12 + 2 * len(places)
    head = b"\5\0\0%b%b\0%b" % (len(places).to_bytes(2, "big"), stop.to_bytes(2, "big"), last.to_bytes(4, "big"))
    body[: 12 + 2 * len(places)] = head + b"".join(places)
    return bytes(body)


def replanted(plant: Callable[[int, int, bytes], list[bytes]]) -> Damage:
    """`plant(root, new, old)`: the packs' root page anew, and pages to append, of which the first has number `new`.

    `old` is what the root page held; it is the first of the appended ones.
    """

    def damage(path: Path) -> None:
        database = sqlite3.connect(path)
        ((root,),) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'pack'")
        database.close()
        whole = bytearray(path.read_bytes())
        old = bytes(whole[(root - 1) * PAGE : root * PAGE])
        new_root, *more = plant(root, len(whole) // PAGE + 1, old)
        whole[(root - 1) * PAGE : root * PAGE] = new_root
        whole += old + b"".join(more)
        whole[28:32] = (len(whole) // PAGE).to_bytes(4, "big")
        path.write_bytes(whole)

    return damage


def chain(depth: int, pages: int) -> Damage:
    """Levels of pages that each name the next level many times: few pages, more rows than anybody can read."""

    def plant(root: int, new: int, old: bytes) -> list[bytes]:
        below = [*range(new + 1, new + depth), new]
        return [interior([(page, 2**55 + at) for at in range(pages)], page) for page in below]

    return replanted(plant)


def giant(circular: bool) -> Damage:
    """The first pack alone, with a value of 1 GB, as SQLite would lay it out; the file has holes in place of zeros.

    `circular`: the pages of the value are one page that names itself as the next.
    """
    length = 10**9

    def plant(root: int, new: int, old: bytes) -> list[bytes]:
        head = b"".join([b"\0", b"\1", b"\1", varint(12 + 2 * length), b"\x08"])
        row = varint(len(head) + 1) + head + b"\1\1"
        payload = len(row) + length
        least = (PAGE - 12) * 32 // 255 - 23
        local = least + (payload - least) % (PAGE - 4)
        local = local if local <= PAGE - 35 else least
        cell = varint(payload) + b"\0" + row.ljust(local, b"\0") + (new + 1).to_bytes(4, "big")
        start = PAGE - len(cell)
        head = b"\x0d\0\0\0\1" + start.to_bytes(2, "big") + b"\0" + start.to_bytes(2, "big")
        return [head.ljust(start, b"\0") + cell, (new + 1).to_bytes(4, "big").ljust(PAGE, b"\0")]

    def damage(path: Path) -> None:
        replanted(plant)(path)
        if not circular:
            whole = path.read_bytes()
            path.write_bytes(whole[:28] + (length // PAGE + 1000).to_bytes(4, "big") + whole[32:])
            os.truncate(path, (length // PAGE + 1000) * PAGE)

    return damage


FILES: dict[str, Damage] = {
    "text": content(b"this is no index\n" * 400),
    "empty": content(b""),
    "zero bytes": content(bytes(8192)),
    "one byte": content(b"S"),
    "SQLite's magic alone": content(b"SQLite format 3\0"),
    "other database": other_database,
    "wrong application": unsealed("PRAGMA application_id=1"),
    "newer version": unsealed("PRAGMA user_version=5"),
    "version of sealed ones": unsealed("PRAGMA user_version=4"),
    "older version": unsealed("PRAGMA user_version=1"),
    "older version of sealed ones": unsealed("PRAGMA user_version=2"),
    "version 0": unsealed("PRAGMA user_version=0"),
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
    "text not UTF-8": unsealed(
        "PRAGMA writable_schema=ON", "UPDATE sqlite_master SET sql = CAST(x'435245415445d2ff' AS TEXT)"
    ),
    "name not UTF-8": unsealed(
        "PRAGMA writable_schema=ON", "UPDATE sqlite_master SET name = CAST(x'd2ff' AS TEXT), sql = 'CREATE nothing'"
    ),
    "name that drives a terminal": unsealed(
        "PRAGMA writable_schema=ON", "UPDATE sqlite_master SET name = char(10, 27) || '[2J', sql = 'CREATE nothing'"
    ),
    "both tables one": unsealed(
        "PRAGMA writable_schema=ON",
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'tape')",
    ),
    "table in the schema's page": unsealed("PRAGMA writable_schema=ON", "UPDATE sqlite_master SET rootpage = 1"),
    "table nowhere": unsealed("PRAGMA writable_schema=ON", "UPDATE sqlite_master SET rootpage = 0"),
    "table beyond the file": unsealed("PRAGMA writable_schema=ON", "UPDATE sqlite_master SET rootpage = 99999"),
    "virtual table": unsealed(
        "PRAGMA writable_schema=ON",
        "INSERT INTO sqlite_master VALUES ('table', 'more', 'more', 0, 'CREATE VIRTUAL TABLE more USING fts5(x)')",
    ),
    "statistics": unsealed("ANALYZE"),
    "extra table": unsealed("CREATE TABLE more (x)"),
    "extra view": unsealed("CREATE VIEW more AS SELECT 1"),
    "extra trigger": unsealed("CREATE TRIGGER more AFTER INSERT ON pack BEGIN SELECT 1; END"),
    "extra index": unsealed("CREATE INDEX more ON pack (count)"),
    "extra column": unsealed("ALTER TABLE pack ADD COLUMN more"),
    "generated column": unsealed("ALTER TABLE pack ADD COLUMN more AS (start + 1)"),
    "no packs": unsealed("DROP TABLE pack"),
    "no facts": unsealed("DROP TABLE tape"),
    "view of packs": unsealed("ALTER TABLE pack RENAME TO p", "CREATE VIEW pack AS SELECT * FROM p"),
    "schema as text, otherwise right": unsealed(
        "PRAGMA writable_schema=ON", "UPDATE sqlite_master SET sql = replace(sql, 'members BLOB', 'members TEXT')"
    ),
}

SET = "UPDATE tape SET value = {1} WHERE fact = '{0}'"
FACTS: dict[str, Damage] = {
    "digest wrong": unsealed("UPDATE tape SET value = value + 512 WHERE fact = 'total_size'"),
    "digest missing": unsealed("DELETE FROM tape WHERE fact = 'facts_digest'"),
    "fact missing": sealed("DELETE FROM tape WHERE fact = 'member_count'"),
    "all missing": unsealed("DELETE FROM tape"),
    "fact too many": sealed("INSERT INTO tape VALUES ('more', 1)"),
    **{
        f"digests due {what}": sealed(f"INSERT INTO tape VALUES ('due_algorithm', {name}), ('due_block_size', {size})")
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
    "fact that drives a terminal": sealed("INSERT INTO tape VALUES (char(10, 27) || '[2J', 1)"),
    "size negative": sealed(SET.format("total_size", -1)),
    "size zero": sealed(SET.format("total_size", 0)),
    "size of a footer": sealed(SET.format("total_size", 1024)),
    "size too large": sealed("UPDATE tape SET value = value + 512 WHERE fact = 'total_size'"),
    "size too small": sealed("UPDATE tape SET value = value - 512 WHERE fact = 'total_size'"),
    "size odd": sealed("UPDATE tape SET value = value + 1 WHERE fact = 'total_size'"),
    "size the largest": sealed(SET.format("total_size", 2**63 - 1)),
    "size a text": sealed("UPDATE tape SET value = value || '' WHERE fact = 'total_size'"),
    "size a fraction": sealed("UPDATE tape SET value = value + 0.0 WHERE fact = 'total_size'"),
    "size null": sealed(SET.format("total_size", "NULL")),
    "count negative": sealed(SET.format("member_count", -1)),
    "count a text": sealed(SET.format("member_count", "'8'")),
    "recorded a text": sealed(SET.format("recorded_ns", "'now'")),
    "recorded before 1970": sealed(SET.format("recorded_ns", -1)),
    "root's name another": sealed(SET.format("root_name", "x'61'")),
    "root's name with a slash": sealed(SET.format("root_name", "x'612f62'")),
    "root's name above": sealed(SET.format("root_name", "x'2e2e'")),
    "root's name with NUL": sealed(SET.format("root_name", "x'6100'")),
    "root's name empty": sealed(SET.format("root_name", "x''")),
    "root's name a number": sealed(SET.format("root_name", 5)),
    "fingerprint a number": sealed(SET.format("fingerprint", 5)),
    "fingerprint no digest": sealed(SET.format("fingerprint", "'of nothing'")),
    "fingerprint with control characters": sealed(SET.format("fingerprint", "printf('%064d', 0) || char(10)")),
    "excluded no JSON": sealed(SET.format("excluded", "'['")),
    "excluded a number": sealed(SET.format("excluded", "'5'")),
    "excluded a text": sealed(SET.format("excluded", "'\"abc\"'")),
    "excluded of numbers": sealed(SET.format("excluded", "'[1, 2]'")),
    "excluded null": sealed(SET.format("excluded", "NULL")),
    "excluded nested without end": sealed(SET.format("excluded", f"'{'[' * 200_000}'")),
    "size the smallest": sealed(SET.format("total_size", -(2**63))),
    "size no block": sealed(SET.format("total_size", 1535)),
    "left out negative": sealed(SET.format("left_out", -1)),
    "inode a text": sealed(SET.format("root_ino", "'x'")),
    "inode of the index null": sealed(SET.format("index_ino", "NULL")),
    "digest of rows too short": sealed(SET.format("rows_digest", "'00'")),
    "digest of rows no text": sealed(SET.format("rows_digest", "x'ff'")),
    "value of a megabyte": sealed(SET.format("fingerprint", "CAST(zeroblob(1000000) AS TEXT)")),
    "fact's name no text": unsealed("INSERT INTO tape VALUES (x'ff', 1)"),
    "value not UTF-8": unsealed(SET.format("fingerprint", "CAST(x'ff' AS TEXT)")),
}

# What can be wrong with a pack's row, before anybody looks into its members.
SET_PACK = f"UPDATE pack SET {{}} WHERE start = {MIDDLE}"
COPY = "INSERT INTO pack SELECT {}, count, folders, members, crc FROM pack WHERE start = {}"
ROWS: dict[str, Damage] = {
    "checksum wrong": unsealed(SET_PACK.format("crc = crc + 1")),
    "checksum null": unsealed(SET_PACK.format("crc = NULL")),
    "checksum a text": unsealed(SET_PACK.format("crc = 'x'")),
    "checksum a fraction": unsealed(SET_PACK.format("crc = crc + 0.5")),
    "checksum a blob": unsealed(SET_PACK.format("crc = x'00'")),
    "checksum negative": unsealed(SET_PACK.format("crc = -1")),
    "checksum of another row": unsealed(SET_PACK.format("crc = (SELECT crc FROM pack WHERE start = 0)")),
    "checksum null of the first": unsealed("UPDATE pack SET crc = NULL WHERE start = 0"),
    "members changed": unsealed(SET_PACK.format("members = CAST(replace(members, x'6572', x'6573') AS BLOB)")),
    "members of another row": unsealed(SET_PACK.format("members = (SELECT members FROM pack WHERE start = 0)")),
    "count changed": unsealed(SET_PACK.format("count = count - 1")),
    "folders changed": unsealed(SET_PACK.format("folders = folders - 1")),
    "folders changed, none there": unsealed(f"UPDATE pack SET folders = 1 WHERE start = {LAST}"),
    "all rows gone": sealed("DELETE FROM pack"),
    "first row gone": sealed("DELETE FROM pack WHERE start = 0"),
    "row gone": sealed(f"DELETE FROM pack WHERE start = {MIDDLE}"),
    "last row gone": sealed(f"DELETE FROM pack WHERE start = {LAST}"),
    "last row alone": sealed(f"DELETE FROM pack WHERE start < {LAST}"),
    "row twice, overlapping": sealed(COPY.format(MIDDLE + 512, MIDDLE)),
    "row of another within": sealed(COPY.format(MIDDLE + 512, LAST)),
    "row twice, in place of another": sealed(f"DELETE FROM pack WHERE start = {LAST}", COPY.format(LAST, MIDDLE)),
    "rows swapped": sealed(f"UPDATE pack SET start = 1 WHERE start = {MIDDLE}",
                           f"UPDATE pack SET start = {MIDDLE} WHERE start = {LAST}",
                           f"UPDATE pack SET start = {LAST} WHERE start = 1"),
    "first row swapped": sealed("UPDATE pack SET start = 1 WHERE start = 0",
                                f"UPDATE pack SET start = 0 WHERE start = {MIDDLE}",
                                f"UPDATE pack SET start = {MIDDLE} WHERE start = 1"),
    "row too early": sealed(SET_PACK.format("start = start - 512")),
    "row too late": sealed(SET_PACK.format("start = start + 512")),
    "last row too early": sealed(f"UPDATE pack SET start = start - 512 WHERE start = {LAST}"),
    "last row too late": sealed(f"UPDATE pack SET start = start + 512 WHERE start = {LAST}"),
    "all rows later": sealed("UPDATE pack SET start = start + 1000000", "UPDATE pack SET start = start - 999488"),
    "start odd": sealed(SET_PACK.format("start = start + 1")),
    "all starts odd": sealed("UPDATE pack SET start = start + 1 WHERE start > 0",
                             "UPDATE tape SET value = value + 1 WHERE fact = 'total_size'"),
    "start negative": sealed("UPDATE pack SET start = -512 WHERE start = 0"),
    "start the largest": sealed(SET_PACK.format(f"start = {2**63 - 512}")),
    "start the smallest": sealed(SET_PACK.format(f"start = {-(2**63)}")),
    "first start the smallest": sealed(f"UPDATE pack SET start = {-(2**63)} WHERE start = 0"),
    **{f"count {what}": sealed(SET_PACK.format(f"count = {value}")) for what, value in {
        "one too many": "count + 1", "one too few": "count - 1", "zero": 0, "33": 33, "255": 255, "65535": 65535,
        "65536": 65536, "one more than 65536 less": "count + 65536", "2^62": 2**62, "negative": "-count",
        "the smallest": -(2**63), "a text": "'x'", "null": "NULL", "a fraction": "count + 0.5", "a blob": "x'03'",
        "infinite": "9e999"}.items()},
    "count infinite, then negative": sealed("UPDATE pack SET count = 9e999 WHERE start = 0",
                                            SET_PACK.format("count = -9e999")),
    "counts that overflow": sealed(f"UPDATE pack SET count = {2**62}"),
    **{f"folders {what}": sealed(SET_PACK.format(f"folders = {value}")) for what, value in {
        "one too many": "folders + 1", "one too few": "folders - 1", "255": 255, "65535": 65535, "65536": 65536,
        "one more than 65536 less": "folders + 65536", "2^62": 2**62, "negative": "-folders", "a text": "'x'",
        "null": "NULL", "a fraction": "folders + 0.5", "a blob": "x'01'", "infinite": "9e999"}.items()},
    "folders none of the first": sealed("UPDATE pack SET folders = 0 WHERE start = 0"),
    "folders, none there": sealed(f"UPDATE pack SET folders = 1 WHERE start = {LAST}"),
    **{f"members {what}": sealed(SET_PACK.format(f"members = {value}")) for what, value in {
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
    "last members cut by a byte": sealed(f"UPDATE pack SET members = substr(members, 1, length(members) - 1)"
                                         f" WHERE start = {LAST}"),
    "last members a byte longer": sealed(f"UPDATE pack SET members = CAST(members || x'78' AS BLOB)"
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

DAMAGES = {f"{kind}: {what}": damage
           for kind, damages in (("file", FILES), ("tree", TREES), ("schema", SCHEMAS), ("fact", FACTS), ("row", ROWS),
                                 ("pack", PACKS), ("member", MEMBERS))
           for what, damage in damages.items()}  # fmt: skip


@pytest.mark.long(but=100)
@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_index_is_refused(recorded: Path, damage: str) -> None:
    """With TapeFormatError, at opening or where the bad row is used; never with another error, never believed.

    Not by who goes back through it, either.
    """
    before, members = read_whole(recorded), backwards(recorded)
    assert members
    DAMAGES[damage](index_of(recorded))
    refused(recorded)
    with suppress(TapeFormatError):
        assert backwards(recorded) == members
    assert len(before) > 1024


def test_rows_join_where_no_other_check_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the last row the one before, one block later, so that it ends where the last one did.

    Whoever reads on gets none of its members, and whoever goes back none before it.
    """
    root = tmp_path / "data"
    root.mkdir()
    for name in range(27):
        (root / f"{name:02}").write_bytes(b"x" * (26 - name))
    monkeypatch.setattr(packs, "MOST", 3)
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        members = list(tape.members())
    before, last = members[-4].start, members[-1].start
    sealed(f"DELETE FROM pack WHERE start = {last}", COPY.format(before + 512, before))(index_of(root))
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


AT_OPENING = ["fact: size too large", "fact: size too small", "fact: size odd", "fact: root's name another",
              "row: all rows gone", "row: first row gone", "row: last row gone", "row: last row too early",
              "row: last row too late", "row: start negative", "member: first gone", "member: last gone",
              "member: size of the last too large", "member: too many", "member: root a file"]  # fmt: skip


@pytest.mark.parametrize("damage", AT_OPENING)
def test_both_ends_are_looked_at_first(recorded: Path, damage: str) -> None:
    """A tape whose first member is none, or whose last one does not end at its size, is not even opened."""
    DAMAGES[damage](index_of(recorded))
    with pytest.raises(TapeFormatError):
        Tape.discover(recorded)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`program(*arguments)` is `tartapefs` in this process: its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGPIPE, *signals.ENDING)}

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tartapefs", *map(os.fspath, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    gc.freeze()  # of all that thousands of tests have, nothing is looked at below
    yield run
    gc.collect()  # what the program left to the end of its process
    gc.unfreeze()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.long(but=10)
@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_index_is_refused_whoever_looks(
    recorded: Path, damage: str, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A lookup or read by itself is right or a TapeError; `verify` exits 3 and says why on one line."""
    reference = Reference(recorded)
    DAMAGES[damage](index_of(recorded))
    right = []
    with suppress(TapeFormatError), Tape.from_index(index_of(recorded)) as tape:
        player = TapePlayer(tape)
        try:
            for name, start in reference.starts.items():
                with suppress(TapeError, KeyError):
                    right.append(tape.find(name).start == start)
                with suppress(TapeError):
                    right.append(getattr(tape.member_at(start), "name", b"") == name)
                with suppress(TapeError):
                    right.append(player.read(start, 1024) == reference.read(start, 1024))
        finally:
            player.close()
    assert all(right) or DAMAGES[damage] in FORGED
    assert program("verify", recorded) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("\n")
    assert said.err[:-1].isprintable()
    assert "not a usable tape index" in said.err


def test_sealing_alone_changes_nothing(recorded: Path) -> None:
    """The check on these tests: what is refused above is not refused for how it was damaged."""
    with closing(sqlite3.connect(index_of(recorded))) as database:
        assert database.execute("SELECT start FROM pack").fetchall() == [(FIRST,), (MIDDLE,), (LAST,)]
        assert database.execute("PRAGMA page_size").fetchall() == [(PAGE,)]
    expected = Reference(recorded).read(0, 1 << 30)
    seal(index_of(recorded))
    assert read_whole(recorded) == expected
    edited(f"UPDATE member SET mtime = mtime WHERE {FILE}")(index_of(recorded))
    assert read_whole(recorded) == expected


@pytest.mark.parametrize("count", [0, 1, 7, 9, 2**62])
def test_count_of_members_that_does_not_add_up(recorded: Path, count: int) -> None:
    """Found at the latest by the check of all rows."""
    sealed(SET.format("member_count", count))(index_of(recorded))
    try:
        tape = Tape.discover(recorded)
    except TapeFormatError:
        return
    with tape:
        assert not tape.rows_are_sound()


# What is written in another way than ours, and says the same.
SAME: dict[str, Damage] = {
    "folders whole": edited(),
    "one pack": edited("UPDATE member SET pack = 0"),
    "a pack each": edited("UPDATE member SET pack = CASE number WHEN 2 THEN 512 WHEN 3 THEN 1024 WHEN 5 THEN 2048"
                          " WHEN 6 THEN 3584 WHEN 8 THEN 5120 ELSE pack END"),
    "members a text": sealed(SET_PACK.format("members = CAST(members AS TEXT)")),
    "count a text of digits": sealed(SET_PACK.format("count = '3'")),
    "count a fraction of none": sealed(SET_PACK.format("count = 3.0")),
    "folder in no use": taken_apart(MIDDLE, named=put(0, b"\4"), shared=lambda old: old + b"\5",
                                    strings=lambda old: [*old, b"no/"]),
    "owner in no use": taken_apart(MIDDLE, named=put(1, b"\1"), strings=lambda old: [*old, b"0:0:a:b"]),
    "folder twice": taken_apart(MIDDLE, named=put(0, b"\4"), shared=lambda old: old + b"\5",
                                strings=lambda old: [*old, b""]),
    "shared longer than the one before": taken_apart(MIDDLE, shared=put(1, b"\xff")),
    "first folder sharing with nothing": taken_apart(MIDDLE, shared=put(0, b"\xff")),
}  # fmt: skip


@pytest.mark.parametrize("damage", SAME)
def test_other_bytes_that_say_the_same(recorded: Path, damage: str) -> None:
    """The check on the damages above: those come by the same ways, and are not refused for how they came."""
    reference = Reference(recorded)
    SAME[damage](index_of(recorded))
    assert read_whole(recorded) == reference.read(0, reference.size)
    with Tape.discover(recorded) as tape:
        assert {member.name: member.start for member in tape.members()} == reference.starts
        assert [member.name for member in tape.folders()] == [name for name in reference.starts if name[-1:] == b"/"]
        for name, start in reference.starts.items():
            assert tape.find(name).start == start
            assert tape.count(0, start) == list(reference.starts).index(name)


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
def test_rows_that_only_their_digest_tells(recorded: Path, damage: str, program: Callable[..., int]) -> None:
    """Another recording, with its own right checksums, is found by the check of all rows, and as drift by a reader."""
    with Tape.discover(recorded) as tape:
        assert tape.rows_are_sound()
    OTHERS[damage](index_of(recorded))
    with Tape.discover(recorded) as tape:
        assert not tape.rows_are_sound()
        for member in tape.members():
            assert len(member.header()) == 512
            assert member.path == b"" or not {b"", b".", b".."} & set(member.path.split(b"/"))
    with nullcontext() if damage in AGREEING else pytest.raises(TapeError):
        read_whole(recorded)
    assert program("verify", recorded) == 3


# Beyond the last member, or before the first, nobody looks who reads the archive.
BEYOND: dict[str, Damage] = {
    "after the last": sealed(COPY.format(5632, LAST)),
    "in the footer": sealed(COPY.format(6144, LAST)),
    "far beyond": sealed(COPY.format(2**62, LAST)),
    "at the largest offset": sealed(COPY.format(2**63 - 512, MIDDLE)),
    "before the first": sealed(COPY.format(-512, LAST)),
    "at the smallest offset": sealed(COPY.format(-(2**63), MIDDLE)),
    "sizes beyond any offset": edited(f"UPDATE member SET pack = {2**62}, number = 99 WHERE number = 3",
                                      f"INSERT INTO member SELECT 3, 0, {', '.join(packed.COLUMNS[1:])} FROM member"
                                      " WHERE number = 99",
                                      f"INSERT INTO member SELECT 100, {2**62}, folder, x'66', {stat.S_IFREG}, {2**62},"
                                      f" {', '.join(packed.COLUMNS[5:])} FROM member WHERE number = 99"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BEYOND)
def test_rows_beyond_the_archive(recorded: Path, damage: str) -> None:
    """They change no byte; who looks at all folders, all rows or counts gets an answer or TapeFormatError."""
    reference = Reference(recorded)
    BEYOND[damage](index_of(recorded))
    with suppress(TapeFormatError):
        assert read_whole(recorded) == reference.read(0, reference.size)
    with Tape.discover(recorded) as tape:
        looks: list[Callable[[], object]] = [
            lambda: list(tape.folders()),
            lambda: tape.count(0, tape.total_size),
            lambda: tape.count(0, 2**63 - 1),
        ]
        for look in looks:
            with suppress(TapeFormatError):
                look()
        with suppress(TapeFormatError):
            assert not tape.rows_are_sound() or "before" in damage or "smallest" in damage


@pytest.mark.long(but=64)
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name.startswith(("row:", "pack:", "member:"))])
def test_folders_and_counts_of_a_bad_index(recorded: Path, damage: str) -> None:
    """Who asks for these alone, as an audit does, gets an answer or TapeFormatError."""
    DAMAGES[damage](index_of(recorded))
    try:
        tape = Tape.discover(recorded)
    except TapeFormatError:
        return
    with tape:
        with suppress(TapeFormatError):
            assert all(member.is_directory and member.name.startswith(b"data/") for member in tape.folders())
        for start, stop in ((0, 512), (1000, 5000), (0, tape.total_size)):
            with suppress(TapeFormatError):
                assert isinstance(tape.count(start, stop), int)


@pytest.mark.parametrize("what", ["folder", "index", "folder is a file"])
def test_missing_index(tmp_path: Path, what: str) -> None:
    """TapeNotFoundError, which is also a FileNotFoundError, and says what to run."""
    root = tmp_path / "data"
    if what == "folder is a file":
        root.write_bytes(b"")
    elif what == "index":
        (root / ".tartape").mkdir(parents=True)
    for open_tape in (lambda: Tape.discover(root), lambda: Tape.from_index(index_of(root))):
        with pytest.raises(TapeNotFoundError, match="tartapefs record") as caught:
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
            seal_tape(tape, source, True, "sha256")
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
