"""The packs of an index as a table `member` with a row a member, and back: single facts can be damaged with SQL.

Written from docs/decisions/0011-packs.md and 0029-long-names.md, without `tartapefs.index.row_codec`, which is held
against it.
"""

import hashlib
import sqlite3
import stat
import struct
import zlib
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from support import reference

FACTS = struct.Struct("<QqIQqIHBB")
COLUMNS = (
    *("pack", "folder", "name", "mode", "size", "mtime", "mtime_nsec", "ino", "ctime", "ctime_nsec"),
    *("target", "owner"),
)
_TABLE = f"CREATE TEMP TABLE member (number INTEGER PRIMARY KEY, {', '.join(COLUMNS)})"
_INSERT = f"INSERT INTO member ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"


def rows_of(start: int, count: int, blob: bytes) -> list[tuple[Any, ...]]:
    """Of one pack, in the order of `COLUMNS`: folder is the whole name of the folder, empty for the root's."""
    folder_count, owner_count = blob[0], blob[1] & 0x7F
    shared, rest = blob[2 : 2 + folder_count], blob[2 + folder_count :]
    facts = [FACTS.unpack_from(rest, number * FACTS.size) for number in range(count)]
    strings = rest[count * FACTS.size :].split(b"\0")
    names, targets, strings = strings[:count], strings[count : 2 * count], strings[2 * count :]
    folders: list[bytes] = []
    for common, other in zip(shared, strings[:folder_count], strict=True):
        folders.append((folders[-1] if folders else b"")[:common] + other)
    owners = [b"", *strings[folder_count:]]
    assert len(owners) == owner_count + 1
    return [
        (start, folders[folder], name, mode, size, mtime, mtime_nsec, ino, ctime, ctime_nsec, target, owners[owner])
        for name, target, (size, mtime, mtime_nsec, ino, ctime, ctime_nsec, mode, folder, owner) in zip(
            names, targets, facts, strict=True
        )
    ]


def is_long(row: tuple[Any, ...]) -> bool:
    """Whether the member's header has more than one block."""
    return len(row[10]) > 100 or reference.split(_name(row)) is None


def span(row: tuple[Any, ...]) -> int:
    """The bytes of the archive that the member takes."""
    target, name = row[10], _name(row)
    head = 512 + (len(reference.long_blocks(b"K", target)) if len(target) > 100 else 0)
    if reference.split(name) is None:
        head += len(reference.long_blocks(b"L", name))
    return head + (row[4] + 511) // 512 * 512


def _name(row: tuple[Any, ...]) -> bytes:
    name: bytes = row[1] + row[2]
    return name + b"/" * (row[3] & 0o170000 == stat.S_IFDIR)


def blob_of(rows: list[tuple[Any, ...]], long_names: bool = False) -> bytes:
    """What `rows_of` takes apart; folders are written whole, which is as valid as sharing.

    `long_names`: marks the pack if a header has more than one block.
    """
    folders = list(dict.fromkeys(row[1] for row in rows))
    owners = [b"", *dict.fromkeys(row[11] for row in rows if row[11])]
    packed = b"".join(
        FACTS.pack(size, mtime, mtime_nsec, ino, ctime, ctime_nsec, mode, folders.index(folder), owners.index(owner))
        for _, folder, _, mode, size, mtime, mtime_nsec, ino, ctime, ctime_nsec, _, owner in rows
    )
    strings = [*(row[2] for row in rows), *(row[10] for row in rows), *folders, *owners[1:]]
    mark = 0x80 * (long_names and any(map(is_long, rows)))
    return bytes((len(folders), len(owners) - 1 | mark)) + bytes(len(folders)) + packed + b"\0".join(strings)


def checksum(start: int, count: int, folders: int, blob: bytes) -> int:
    return zlib.crc32(struct.pack("<qHH", start, count, folders) + blob)


def digests_crc(*numbers: int, digests: bytes) -> int:
    """The checksum of a row of digests, whose numbers these are."""
    return zlib.crc32(digests + b"".join(number.to_bytes(8, "little") for number in numbers))


def sign_facts(database: sqlite3.Connection) -> None:
    """Makes the digest of the tape's facts right again."""
    facts = dict(database.execute("SELECT fact, value FROM tape WHERE fact != 'facts_digest'"))
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    database.execute("UPDATE tape SET value = ? WHERE fact = 'facts_digest'", (digest,))


def sign_generations(database: sqlite3.Connection) -> None:
    """Makes the digest of the generations right again, in the facts. Raises TypeError if a number is none."""
    digest = hashlib.sha256()
    for row in database.execute("SELECT * FROM generation ORDER BY start"):
        digest.update(b"%d %d %d %b %d\n" % row)
    for row in database.execute("SELECT * FROM superseded ORDER BY start"):
        digest.update(b"%d %d\n" % row)
    for row in database.execute("SELECT * FROM name_filter ORDER BY place"):
        digest.update(b"%d %b %d\n" % row)
    database.execute("UPDATE tape SET value = ? WHERE fact = 'generations_digest'", (digest.hexdigest(),))


def change_fact(path: Path, fact: str, value: object) -> None:
    """Puts another fact of the tape into the index at `path`, with a digest that is right again."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT OR REPLACE INTO tape VALUES (?, ?)", (fact, value))
        sign_facts(database)


def insert(database: sqlite3.Connection, start: int, folders: int, rows: list[tuple[Any, ...]]) -> None:
    """A pack of `rows`; of what `folders` says of it, the checksum is right as well."""
    has_long_names = database.execute("SELECT 1 FROM tape WHERE fact = 'long_names'").fetchone() is not None
    blob = blob_of(rows, has_long_names)
    facts = start, len(rows), folders, blob
    database.execute("INSERT INTO pack VALUES (?, ?, ?, ?, ?)", (*facts, checksum(*facts)))


def edit(path: Path, *statements: str) -> None:
    """Has the statements work on `member`, and packs what is there then, with right checksums. (Facts: see `seal`.)"""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(_TABLE)
        for start, count, _, blob, _ in database.execute("SELECT * FROM pack ORDER BY start").fetchall():
            database.executemany(_INSERT, rows_of(start, count, blob))
        for statement in statements:
            database.execute(statement)
        rows = database.execute(f"SELECT {', '.join(COLUMNS)} FROM member ORDER BY number").fetchall()
        database.execute("BEGIN")
        database.execute("DELETE FROM pack")
        for start, some in groupby(rows, lambda row: row[0]):
            pack = list(some)
            insert(database, start, sum(row[3] & 0o170000 == 0o040000 for row in pack), pack)
        database.execute("COMMIT")
