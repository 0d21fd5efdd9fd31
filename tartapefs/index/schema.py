"""The schema of an index: its formats and tables, the checksums of rows, and the facts of the tape as a whole.

Pure: rows in, values out. Nothing that an index says of the tape is returned before it is checked.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from tartapefs.archive import hash_tree
from tartapefs.archive.layout import BLOCK, FOOTER, MAX_OFFSET
from tartapefs.index import row_codec

FORMAT, SEALED_FORMAT = 3, 4
_TABLES = [
    (
        "pack",
        "CREATE TABLE pack (start INTEGER PRIMARY KEY, count INTEGER, folders INTEGER, members BLOB, crc INTEGER)",
    ),
    ("tape", "CREATE TABLE tape (fact TEXT PRIMARY KEY, value) WITHOUT ROWID"),
]
# A node's `place` is its `node_key`. A leaf's `stop` is where its last member ends.
_SEALED_TABLES = sorted(
    [
        *_TABLES,
        ("leaf", "CREATE TABLE leaf (start INTEGER PRIMARY KEY, stop INTEGER, digests BLOB, crc INTEGER)"),
        ("node", "CREATE TABLE node (place INTEGER PRIMARY KEY, digests BLOB, crc INTEGER)"),
        ("piece", "CREATE TABLE piece (start INTEGER PRIMARY KEY, digests BLOB, crc INTEGER)"),
    ]
)
TABLES = {FORMAT: _TABLES, SEALED_FORMAT: _SEALED_TABLES}  # of each format, the name and the SQL of each table
LONGEST_VALUE = 1 << 20  # bytes
LONGEST_ROW = row_codec.LONGEST + (1 << 10)  # bytes
_LEVEL_SHIFT = 54  # in a node's key, the bits below the level
_pack_numbers = struct.Struct("<qHH").pack


@dataclass(frozen=True, slots=True)
class TapeFacts:
    """What an index says of the tape as a whole.

    root_name: the folder's name in the archive.
    fingerprint: SHA-256 over all headers, 64 hex digits.
    total_size: bytes of the archive, footer included.
    member_count: the number of members.
    recorded_ns: when the folder was recorded, in nanoseconds since 1970.
    excluded: patterns; a callable is named by its repr.
    left_out: the number of sockets, pipes, devices and unreadable files that were left out.
    owners_kept: whether headers name the owners of files.
    root_ino, index_ino: the inodes of the source folder and of the index file when recorded.
    rows_digest: SHA-256 over the facts of all rows, 64 hex digits.

    Only of a sealed tape; empty or 0 otherwise:

    seal: the second fingerprint, over contents too, 64 hex digits.
    algorithm: of the digests, one of `hash_tree.ALGORITHMS`.
    block_size: bytes of a body that have a digest of their own.
    levels: of nodes.
    unsealed_rows: `rows_digest` before sealing, when the packs ended elsewhere.

    Only of a tape without a seal that is to get one; empty or 0 otherwise:

    due_algorithm, due_block_size: of its digests; the size in bytes.
    """

    root_name: bytes
    fingerprint: str
    total_size: int
    member_count: int
    recorded_ns: int
    excluded: tuple[str, ...]
    left_out: int
    owners_kept: bool
    root_ino: int
    index_ino: int
    rows_digest: str
    seal: str = ""
    algorithm: str = ""
    block_size: int = 0
    levels: int = 0
    unsealed_rows: str = ""
    due_algorithm: str = ""
    due_block_size: int = 0

    def to_keep(self) -> dict[str, Any]:
        """Facts to copy into the index that replaces this one, as `IndexWriter.commit` takes them."""
        return {
            "root_name": self.root_name,
            "fingerprint": self.fingerprint,
            "total_size": self.total_size,
            "member_count": self.member_count,
            "recorded_ns": self.recorded_ns,
            "excluded": json.dumps(self.excluded),
            "left_out": self.left_out,
            "owners_kept": int(self.owners_kept),
            "root_ino": self.root_ino,
        }


def signed(ino: int) -> int:
    """An inode number as SQLite can store it: 64 bits, two's complement."""
    return ino if ino < 1 << 63 else ino - (1 << 64)


def pack_bytes(start: int, count: int, folders: int, members: bytes) -> bytes:
    """The bytes of a row of `pack` that its checksum and the digest of all rows are taken over."""
    return _pack_numbers(start, count, folders) + members


def digests_crc(*numbers: int, digests: bytes) -> int:
    """The checksum of a row of `leaf`, `piece` or `node`, whose numbers these are."""
    return crc32(digests + b"".join(number.to_bytes(8, "little") for number in numbers))


def node_key(level: int, start: int) -> int:
    """The key of a node: its level in the upper bits, its start in blocks in the lower ones."""
    return level << _LEVEL_SHIFT | start // BLOCK


def split_node_key(key: int) -> tuple[int, int]:
    """A node's level and start, from its key."""
    return key >> _LEVEL_SHIFT, (key & ((1 << _LEVEL_SHIFT) - 1)) * BLOCK


def facts_digest(facts: dict[str, Any]) -> str:
    """The digest that the table `tape` holds of its other facts: SHA-256, 64 hex digits."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()


def parse_facts(rows: Iterable[tuple[Any, Any]], is_sealed: bool) -> TapeFacts:
    """The facts in the rows of the table `tape`. Raises ValueError with the reason if they cannot be believed."""
    try:
        facts: dict[str, Any] = {
            key.decode(): value.decode() if isinstance(value, bytes) and key != b"root_name" else value
            for key, value in rows
        }
        is_intact = facts.pop("facts_digest", None) == facts_digest(facts)
        tape = _tape_facts(facts, is_sealed) if is_intact else None
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"a fact of the tape is missing or malformed: {error}") from error
    if tape is None:
        raise ValueError("the facts of the tape fail their digest")
    integers = (tape.total_size, tape.member_count, tape.recorded_ns, tape.left_out, tape.root_ino)
    if not all(isinstance(value, int) and value >= 0 for value in integers):
        raise ValueError("a fact of the tape is out of range")
    if not (FOOTER + BLOCK <= tape.total_size <= MAX_OFFSET):
        raise ValueError(f"a total size of {tape.total_size} is out of range")
    if not isinstance(tape.root_name, bytes) or not row_codec.is_name(tape.root_name):
        raise ValueError("the root's name is malformed")
    return tape


def _tape_facts(facts: dict[str, Any], is_sealed: bool) -> TapeFacts:
    tape = TapeFacts(
        **facts
        | {
            "excluded": _strings(json.loads(facts["excluded"])),
            "owners_kept": bool(facts["owners_kept"]),
            "root_ino": facts["root_ino"] % (1 << 64),
            "index_ino": facts["index_ino"] % (1 << 64),
        }
    )
    digests = [tape.fingerprint, tape.rows_digest]
    if is_sealed:
        digests += tape.seal, tape.unsealed_rows
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
        raise ValueError("a digest has 64 hex digits")
    if (tape.due_algorithm, tape.due_block_size) != ("", 0):
        _check_digest_facts(tape.due_algorithm, tape.due_block_size)
    if is_sealed:
        _check_digest_facts(tape.algorithm, tape.block_size)
        if not 0 < tape.levels <= hash_tree.MOST_LEVELS:
            raise ValueError("the number of levels is out of range")
    elif any((tape.seal, tape.algorithm, tape.block_size, tape.levels, tape.unsealed_rows)):
        raise ValueError("a seal, and no digests")
    return tape


def _check_digest_facts(algorithm: str, block_size: int) -> None:
    if algorithm not in hash_tree.ALGORITHMS:
        raise ValueError(f"no such algorithm: {algorithm!r}")
    if not hash_tree.SMALLEST_BLOCK <= block_size <= hash_tree.LARGEST_BLOCK or block_size % BLOCK:
        raise ValueError("the size of blocks is out of range")


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("not a list of strings")
    return tuple(value)
