"""The index as input from outside: whatever is in the file, it is refused or gives the recorded archive."""

import gc
import os
import random
import shutil
import signal
import sqlite3
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from reference import Reference

from tartapefs import Tape, TapeError, TapeFormatError, TapeNotFoundError, TapePlayer, TapeRecorder, cli
from tartapefs import index as index_module

Damage = Callable[[Path], None]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A recorded folder: some files, a link, folders in folders."""
    root = tmp_path / "data"
    (root / "a" / "deep" / "er").mkdir(parents=True)
    (root / "a" / "deep" / "er" / "file").write_bytes(b"x" * 700)
    (root / "b").write_bytes(b"y" * 512)
    (root / "c").symlink_to("b")
    (root / "d").write_bytes(b"")
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
        for start, *facts in database.execute("SELECT * FROM member").fetchall():
            try:
                checksum = zlib.crc32(index_module._facts((start, *facts[:-1])))
            except Exception:
                continue  # of types that have no checksum
            database.execute("UPDATE member SET crc = ? WHERE start = ?", (checksum, start))
        facts = dict(database.execute("SELECT fact, value FROM tape WHERE fact != 'facts_digest'"))
        database.execute("UPDATE tape SET value = ? WHERE fact = 'facts_digest'", (index_module._digest(facts),))
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
    execute(path, "CREATE TABLE member (start INTEGER PRIMARY KEY)")


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


PAGE = 4096


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
    """`plant(root, new, old)`: the members' root page anew, and pages to append, of which the first has number `new`.

    `old` is what the root page held; it is the first of the appended ones.
    """

    def damage(path: Path) -> None:
        database = sqlite3.connect(path)
        ((root,),) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'member'")
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
    """The root's row alone, with a value of 1 GB, as SQLite would lay it out; the file has holes in place of zeros.

    `circular`: the pages of the value are one page that names itself as the next.
    """
    length = 10**9

    def plant(root: int, new: int, old: bytes) -> list[bytes]:
        types = [b"\0", b"\1", varint(12 + 2 * 4), b"\4", *[b"\x08"] * 6, b"\x0c", b"\x0c", varint(12 + 2 * length)]
        head = b"".join(types)
        row = varint(len(head) + 1) + head + b"\xff" + b"data" + (0o040755).to_bytes(4, "big")
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
    "newer version": unsealed("PRAGMA user_version=2"),
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
    "truncated by a page": truncated(lambda size: size - 4096),
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
    "page without rows": replanted(lambda root, new, old: [b"\x0d" + bytes(4) + b"\x10" + bytes(PAGE - 6)]),
    "cells outside the page": replanted(lambda root, new, old: [old[:8] + b"\xff" * 8 + old[16:]]),
    "all cells one": replanted(lambda root, new, old: [old[:8] + old[8:10] * 5 + old[18:]]),
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
    "extra trigger": unsealed("CREATE TRIGGER more AFTER INSERT ON member BEGIN SELECT 1; END"),
    "extra index": unsealed("CREATE INDEX more ON member (name)"),
    "extra column": unsealed("ALTER TABLE member ADD COLUMN more"),
    "generated column": unsealed("ALTER TABLE member ADD COLUMN more AS (start + 1)"),
    "no members": unsealed("DROP TABLE member"),
    "no facts": unsealed("DROP TABLE tape"),
    "view of members": unsealed("ALTER TABLE member RENAME TO m", "CREATE VIEW member AS SELECT * FROM m"),
    "schema as text, otherwise right": unsealed(
        "PRAGMA writable_schema=ON", "UPDATE sqlite_master SET sql = replace(sql, 'owner BLOB', 'owner TEXT')"
    ),
}

SET = "UPDATE tape SET value = {1} WHERE fact = '{0}'"
FACTS: dict[str, Damage] = {
    "digest wrong": unsealed("UPDATE tape SET value = value + 512 WHERE fact = 'total_size'"),
    "digest missing": unsealed("DELETE FROM tape WHERE fact = 'facts_digest'"),
    "fact missing": sealed("DELETE FROM tape WHERE fact = 'member_count'"),
    "all missing": unsealed("DELETE FROM tape"),
    "fact too many": sealed("INSERT INTO tape VALUES ('more', 1)"),
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

FILE = "start = (SELECT start FROM member WHERE name = x'62')"  # "b", a file of one block
ROWS: dict[str, Damage] = {
    "checksum wrong": unsealed(f"UPDATE member SET crc = crc + 1 WHERE {FILE}"),
    "checksum null": unsealed(f"UPDATE member SET crc = NULL WHERE {FILE}"),
    "fact changed": unsealed(f"UPDATE member SET mtime = mtime + 1 WHERE {FILE}"),
    "all rows gone": sealed("DELETE FROM member"),
    "first row gone": sealed("DELETE FROM member WHERE start = 0"),
    "gap": sealed(f"DELETE FROM member WHERE {FILE}"),
    "last row gone": sealed("DELETE FROM member WHERE start = (SELECT max(start) FROM member)"),
    "gap by a smaller size": sealed(f"UPDATE member SET size = 0 WHERE {FILE}"),
    "overlap by a larger size": sealed(f"UPDATE member SET size = 513 WHERE {FILE}"),
    "overlap with all that follows": sealed(f"UPDATE member SET size = {2**62} WHERE {FILE}"),
    "row too many": sealed("INSERT INTO member SELECT start + 512, folder, name, mode, size, mtime, mtime_nsec, ino,"
                           f" ctime, ctime_nsec, target, owner, crc FROM member WHERE {FILE}"),
    "start odd": sealed(f"UPDATE member SET start = start + 1 WHERE {FILE}"),
    "start negative": sealed("UPDATE member SET start = -512 WHERE start = 0"),
    "size negative": sealed(f"UPDATE member SET size = -1 WHERE {FILE}"),
    "size of a folder": sealed("UPDATE member SET size = 512 WHERE name = x'64656570'"),
    "size a text": sealed(f"UPDATE member SET size = 'x' WHERE {FILE}"),
    "size a fraction": sealed(f"UPDATE member SET size = 512.5 WHERE {FILE}"),
    "size null": sealed(f"UPDATE member SET size = NULL WHERE {FILE}"),
    "name with a slash": sealed(f"UPDATE member SET name = x'622f63' WHERE {FILE}"),
    "name absolute": sealed(f"UPDATE member SET name = x'2f62' WHERE {FILE}"),
    "name above": sealed(f"UPDATE member SET name = x'2e2e' WHERE {FILE}"),
    "name of the same": sealed(f"UPDATE member SET name = x'2e' WHERE {FILE}"),
    "name with NUL": sealed(f"UPDATE member SET name = x'6200' WHERE {FILE}"),
    "name empty": sealed(f"UPDATE member SET name = x'' WHERE {FILE}"),
    "name null": sealed(f"UPDATE member SET name = NULL WHERE {FILE}"),
    "name a number": sealed(f"UPDATE member SET name = 5 WHERE {FILE}"),
    "name too long": sealed(f"UPDATE member SET name = CAST(printf('%0251d', 0) AS BLOB) WHERE {FILE}"),
    "name that no slash splits": sealed(f"UPDATE member SET name = CAST(printf('%0101d', 0) AS BLOB) WHERE {FILE}"),
    "name of a megabyte": sealed(f"UPDATE member SET name = zeroblob(1000000) WHERE {FILE}"),
    "mtime a text": sealed(f"UPDATE member SET mtime = 'x' WHERE {FILE}"),
    "mtime null": sealed(f"UPDATE member SET mtime = NULL WHERE {FILE}"),
    "inode a fraction": sealed(f"UPDATE member SET ino = 0.5 WHERE {FILE}"),
    "ctime a blob": sealed(f"UPDATE member SET ctime = x'00' WHERE {FILE}"),
    "mode a text": sealed(f"UPDATE member SET mode = 'x' WHERE {FILE}"),
    "mode a fraction": sealed(f"UPDATE member SET mode = 33188.5 WHERE {FILE}"),
    "target a number": sealed(f"UPDATE member SET target = 5 WHERE {FILE}"),
    "owner a number": sealed(f"UPDATE member SET owner = 5 WHERE {FILE}"),
    "size the largest": sealed(f"UPDATE member SET size = {2**63 - 1} WHERE {FILE}"),
    "size the smallest": sealed(f"UPDATE member SET size = {-(2**63)} WHERE {FILE}"),
    "start the largest": sealed(f"UPDATE member SET start = {2**63 - 512} WHERE {FILE}"),
    "start the smallest": sealed(f"UPDATE member SET start = {-(2**63)} WHERE {FILE}"),
    "folder the largest": sealed(f"UPDATE member SET folder = {2**63 - 1} WHERE {FILE}"),
    "folder the smallest": sealed(f"UPDATE member SET folder = {-(2**63)} WHERE {FILE}"),
    "folder a fraction": sealed(f"UPDATE member SET folder = 0.5 WHERE {FILE}"),
    "folder null": sealed(f"UPDATE member SET folder = NULL WHERE {FILE}"),
    "folder that follows": sealed("UPDATE member SET folder = (SELECT start FROM member WHERE name = x'64656570')"
                                  " WHERE name = x'61'"),
    "folders in each other": sealed("UPDATE member SET folder = (SELECT start FROM member WHERE name = x'6572')"
                                    " WHERE name = x'64656570'"),
    "root in a folder": sealed("UPDATE member SET folder = 512 WHERE start = 0"),
    "folder of none": sealed(f"UPDATE member SET folder = -1 WHERE {FILE}"),
    "folder nowhere": sealed(f"UPDATE member SET folder = 511 WHERE {FILE}"),
    "folder negative": sealed(f"UPDATE member SET folder = -512 WHERE {FILE}"),
    "folder itself": sealed(f"UPDATE member SET folder = start WHERE {FILE}"),
    "folder a file": sealed("UPDATE member SET folder = (SELECT start FROM member WHERE name = x'62')"
                            " WHERE name = x'64'"),
    "folder of the root": sealed("UPDATE member SET folder = 0 WHERE start = 0"),
    "folder a text": sealed(f"UPDATE member SET folder = 'x' WHERE {FILE}"),
    "type a socket": sealed(f"UPDATE member SET mode = {stat.S_IFSOCK | 0o644} WHERE {FILE}"),
    "type a device": sealed(f"UPDATE member SET mode = {stat.S_IFBLK | 0o644} WHERE {FILE}"),
    "type none": sealed(f"UPDATE member SET mode = {0o644} WHERE {FILE}"),
    "mode too large": sealed(f"UPDATE member SET mode = mode + {1 << 16} WHERE {FILE}"),
    "mode beyond any integer of C": sealed(f"UPDATE member SET mode = {1 << 40} WHERE {FILE}"),
    "mode negative": sealed(f"UPDATE member SET mode = -1 WHERE {FILE}"),
    "root a file": sealed(f"UPDATE member SET mode = {stat.S_IFREG | 0o644} WHERE start = 0"),
    "nanoseconds too many": sealed(f"UPDATE member SET mtime_nsec = 1000000000 WHERE {FILE}"),
    "nanoseconds negative": sealed(f"UPDATE member SET mtime_nsec = -1 WHERE {FILE}"),
    "nanoseconds of ctime": sealed(f"UPDATE member SET ctime_nsec = {10**9} WHERE {FILE}"),
    "target of a file": sealed(f"UPDATE member SET target = x'61' WHERE {FILE}"),
    "target missing": sealed("UPDATE member SET target = x'' WHERE name = x'63'"),
    "target too long": sealed("UPDATE member SET target = CAST(printf('%0101d', 0) AS BLOB) WHERE name = x'63'"),
    "target with NUL": sealed("UPDATE member SET target = x'610062' WHERE name = x'63'"),
    "owner malformed": sealed(f"UPDATE member SET owner = x'3a' WHERE {FILE}"),
    "owner no number": sealed(f"UPDATE member SET owner = CAST('a:0:b:c' AS BLOB) WHERE {FILE}"),
    "owner beyond its field": sealed(f"UPDATE member SET owner = CAST('{10**30}:0:b:c' AS BLOB) WHERE {FILE}"),
    "owner negative": sealed(f"UPDATE member SET owner = CAST('-1:-1:b:c' AS BLOB) WHERE {FILE}"),
    "owner of endless digits": sealed(f"UPDATE member SET owner = CAST('{'9' * 5000}:0:b:c' AS BLOB) WHERE {FILE}"),
    "owner with NUL": sealed(f"UPDATE member SET owner = x'303a303a61003a62' WHERE {FILE}"),
    "owner null": sealed(f"UPDATE member SET owner = NULL WHERE {FILE}"),
}  # fmt: skip

DAMAGES = {f"{kind}: {what}": damage
           for kind, damages in (("file", FILES), ("tree", TREES), ("schema", SCHEMAS), ("fact", FACTS), ("row", ROWS))
           for what, damage in damages.items()}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_index_is_refused(recorded: Path, damage: str) -> None:
    """With TapeFormatError, at opening or where the bad row is used; never with another error, never believed."""
    before = read_whole(recorded)
    DAMAGES[damage](index_of(recorded))
    refused(recorded)
    assert len(before) > 1024


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`program(*arguments)` is `tartapefs` in this process: its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGPIPE, signal.SIGTERM)}

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tartapefs", *map(os.fspath, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    yield run
    gc.collect()  # what the program left to the end of its process
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
    seal(index_of(recorded))
    execute(index_of(recorded), f"UPDATE member SET mtime = mtime WHERE {FILE}")
    assert read_whole(recorded) == Reference(recorded).read(0, 1 << 30)


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


def test_rows_that_only_their_digest_tells(recorded: Path) -> None:
    """A row of another recording, with its own right checksum, is found by the check of all rows."""
    with Tape.discover(recorded) as tape:
        assert tape.rows_are_sound()
    sealed(f"UPDATE member SET mtime = mtime + 1 WHERE {FILE}")(index_of(recorded))
    with Tape.discover(recorded) as tape:
        assert not tape.rows_are_sound()


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
    bits = [chance.randrange(len(good) * 8) for _ in range(200)] + [chance.randrange(100 * 8) for _ in range(100)]
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
