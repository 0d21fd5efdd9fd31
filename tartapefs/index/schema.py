"""The schema of an index: its formats and tables, the checksums of rows, and the facts of the tape as a whole.

Pure: rows in, values out. Nothing that an index says of the tape is returned before it is checked.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from tartapefs.archive import hash_tree
from tartapefs.archive.layout import BLOCK, FOOTER, MAX_OFFSET
from tartapefs.index import row_codec

# A format is the first one and, for each of what a tape may have, a number added.
FORMAT = 3
_SEALED, _GENERATIONS, LONG_NAMES, _NAME_FILTERS, HARD_LINKS = 1, 2, 4, 8, 16
_TABLES = [
    (
        "pack",
        "CREATE TABLE pack (start INTEGER PRIMARY KEY, count INTEGER, folders INTEGER, members BLOB, crc INTEGER)",
    ),
    ("tape", "CREATE TABLE tape (fact TEXT PRIMARY KEY, value) WITHOUT ROWID"),
]
# A node's `place` is its `node_key`. A leaf's `stop` is where its last member ends.
_SEALED_TABLES = [
    ("leaf", "CREATE TABLE leaf (start INTEGER PRIMARY KEY, stop INTEGER, digests BLOB, crc INTEGER)"),
    ("node", "CREATE TABLE node (place INTEGER PRIMARY KEY, digests BLOB, crc INTEGER)"),
    ("piece", "CREATE TABLE piece (start INTEGER PRIMARY KEY, digests BLOB, crc INTEGER)"),
]
_GENERATION_TABLES = [
    (
        "generation",
        "CREATE TABLE generation (start INTEGER PRIMARY KEY, members INTEGER, recorded_ns INTEGER, fingerprint BLOB,"
        " crc INTEGER)",
    ),
    ("superseded", "CREATE TABLE superseded (start INTEGER PRIMARY KEY, crc INTEGER)"),
]
# A block's `place` is the start of its generation and its own number: a generation has more bytes than blocks.
_FILTER_TABLES = [
    ("name_filter", "CREATE TABLE name_filter (place INTEGER PRIMARY KEY, bits BLOB, crc INTEGER)"),
]
TABLES = {  # of each format, the name and the SQL of each table
    FORMAT + has: sorted(
        [
            *_TABLES,
            *_SEALED_TABLES * bool(has & _SEALED),
            *_GENERATION_TABLES * bool(has & _GENERATIONS),
            *_FILTER_TABLES * bool(has & _NAME_FILTERS),
        ]
    )
    for has in range(32)
    if has & _GENERATIONS or not has & _NAME_FILTERS
}
YES_OR_NO = ("long_names", "hard_links", "one_file_system")  # options of the recording; facts where they hold
LONGEST_VALUE = 1 << 20  # bytes
_LEVEL_SHIFT = 54  # in a node's key, the bits below the level
_pack_numbers = struct.Struct("<qHH").pack


def version_of(sealed: bool, generations: bool) -> int:
    """The format of an index with digests of contents or without, and of several generations or one."""
    return FORMAT + _SEALED * sealed + (_GENERATIONS + _NAME_FILTERS) * generations


def is_sealed(version: int) -> bool:
    """Whether an index of this format has digests of contents."""
    return bool((version - FORMAT) & _SEALED)


def has_generations(version: int) -> bool:
    """Whether an index of this format has a table of generations."""
    return bool((version - FORMAT) & _GENERATIONS)


def has_name_filters(version: int) -> bool:
    """Whether later generations have filters of names in an index of this format. The first ones had none."""
    return bool((version - FORMAT) & _NAME_FILTERS)


def has_long_names(version: int) -> bool:
    """Whether headers may have more than one block, by an index of this format."""
    return bool((version - FORMAT) & LONG_NAMES)


def has_hard_links(version: int) -> bool:
    """Whether members may be hard links, by an index of this format."""
    return bool((version - FORMAT) & HARD_LINKS)


def longest_row(long_names: bool) -> int:
    """The bytes of the longest row of an index."""
    return (row_codec.LONGEST_WITH_LONG_NAMES if long_names else row_codec.LONGEST) + (1 << 10)


@dataclass(frozen=True, slots=True)
class Generation:
    """A run of members that one recording added to a tape: those in the bytes `[start, stop)` of the archive.

    start, stop: bytes; the footer is no part of a generation.
    members: how many there are.
    recorded_ns: when, since 1970.
    fingerprint: of the archive up to `stop`: what the tape's was when this generation was the last. 64 hex digits.
    """

    start: int
    stop: int
    members: int
    recorded_ns: int
    fingerprint: str


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

    Only of a tape that was recorded so:

    long_names: whether headers may have more than one block.
    hard_links: whether further names of a file are links to the first.
    one_file_system: whether what lies on other file systems than the root was left out.

    Only of a tape of several generations; empty otherwise:

    generations_digest: SHA-256 over the rows of `GENERATION_TABLES`, 64 hex digits.

    end: where the last member ends, and the footer starts, in bytes.
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
    long_names: bool = False
    hard_links: bool = False
    one_file_system: bool = False
    generations_digest: str = ""

    @property
    def end(self) -> int:
        """Where the last member ends, and the footer starts, in bytes."""
        return self.total_size - FOOTER

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
        } | {option: 1 for option in YES_OR_NO if getattr(self, option)}


def signed(ino: int) -> int:
    """An inode number as SQLite can store it: 64 bits, two's complement."""
    return ino if ino < 1 << 63 else ino - (1 << 64)


def pack_bytes(start: int, count: int, folders: int, members: bytes) -> bytes:
    """The bytes of a row of `pack` that its checksum and the digest of all rows are taken over."""
    return _pack_numbers(start, count, folders) + members


def row_crc(*numbers: int, blob: bytes = b"") -> int:
    """The checksum of a row of any table but `pack` and `tape`: over its numbers, and its blob if it has one."""
    return crc32(blob + b"".join(number.to_bytes(8, "little") for number in numbers))


def node_key(level: int, start: int) -> int:
    """The key of a node: its level in the upper bits, its start in blocks in the lower ones."""
    return level << _LEVEL_SHIFT | start // BLOCK


def split_node_key(key: int) -> tuple[int, int]:
    """A node's level and start, from its key."""
    return key >> _LEVEL_SHIFT, (key & ((1 << _LEVEL_SHIFT) - 1)) * BLOCK


def generation_row(generation: Generation) -> tuple[int, int, int, bytes, int]:
    numbers = generation.start, generation.members, generation.recorded_ns
    fingerprint = bytes.fromhex(generation.fingerprint)
    return *numbers, fingerprint, row_crc(*numbers, blob=fingerprint)


GENERATION_TABLES = {  # in the order of their digest: each with its key, and with how a row goes into the digest
    "generation": ("start", b"%d %d %d %b %d\n"),
    "superseded": ("start", b"%d %d\n"),
    "name_filter": ("place", b"%d %b %d\n"),
}


def generations_digest(version: int, rows_of: Callable[[str], Iterable[tuple[Any, ...]]]) -> str:
    """The digest of the rows of `GENERATION_TABLES`, each in the order of its key: SHA-256, 64 hex digits."""
    digest, tables = hashlib.sha256(), dict(TABLES[version])
    for table, (_, form) in GENERATION_TABLES.items():
        for row in rows_of(table) if table in tables else ():
            digest.update(form % row)
    return digest.hexdigest()


def parse_generations(rows: Iterable[tuple[Any, ...]], tape: "TapeFacts") -> tuple[Generation, ...]:
    """The generations in the rows of their table, in order. Raises ValueError with the reason if they do not add up."""
    try:
        found: list[Generation] = []
        rows = list(rows)
        stops = [row[0] for row in rows[1:]] + [tape.total_size - FOOTER]
        for (start, members, recorded_ns, fingerprint, crc), stop in zip(rows, stops, strict=True):
            if row_crc(start, members, recorded_ns, blob=fingerprint) != crc or len(fingerprint) != 32:
                raise ValueError("one fails its checksum")
            if start % BLOCK or not start < stop or not 0 < members <= (stop - start) // BLOCK:
                raise ValueError("one is out of range")
            found.append(Generation(start, stop, members, recorded_ns, fingerprint.hex()))
        last = found[-1]
        if found[0].start or sum(generation.members for generation in found) != tape.member_count:
            raise ValueError("they do not add up")
        if (last.fingerprint, last.recorded_ns) != (tape.fingerprint, tape.recorded_ns):
            raise ValueError("the last one is not the tape's")
    except (TypeError, ValueError, OverflowError, AttributeError, IndexError) as error:
        raise ValueError(f"its generations are malformed: {error}") from error
    return tuple(found)


def facts_digest(facts: dict[str, Any]) -> str:
    """The digest that the table `tape` holds of its other facts: SHA-256, 64 hex digits."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()


def parse_facts(rows: Iterable[tuple[Any, Any]], version: int) -> TapeFacts:
    """The facts in the rows of the table `tape` of an index of this format.

    Raises ValueError with the reason if they cannot be believed.
    """
    try:
        facts: dict[str, Any] = {
            key.decode(): value.decode() if isinstance(value, bytes) and key != b"root_name" else value
            for key, value in rows
        }
        is_intact = facts.pop("facts_digest", None) == facts_digest(facts)
        tape = _tape_facts(facts, version) if is_intact else None
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


def _tape_facts(facts: dict[str, Any], version: int) -> TapeFacts:
    sealed = is_sealed(version)
    tape = TapeFacts(
        **facts
        | {
            "excluded": _strings(json.loads(facts["excluded"])),
            "owners_kept": bool(facts["owners_kept"]),
            "root_ino": facts["root_ino"] % (1 << 64),
            "index_ino": facts["index_ino"] % (1 << 64),
        }
        | {option: bool(facts.get(option)) for option in YES_OR_NO}
    )
    if tape.long_names != has_long_names(version):
        raise ValueError("long names, in a format that has none, or the other way round")
    if tape.hard_links != has_hard_links(version):
        raise ValueError("hard links, in a format that has none, or the other way round")
    digests = [tape.fingerprint, tape.rows_digest]
    if sealed:
        digests += tape.seal, tape.unsealed_rows
    if has_generations(version):
        digests.append(tape.generations_digest)
    elif tape.generations_digest:
        raise ValueError("generations, in a format that has none")
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
        raise ValueError("a digest has 64 hex digits")
    if (tape.due_algorithm, tape.due_block_size) != ("", 0):
        _check_digest_facts(tape.due_algorithm, tape.due_block_size)
    if sealed:
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
