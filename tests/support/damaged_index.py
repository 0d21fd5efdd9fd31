"""Ways to damage an index, and what must then be seen: it is refused, or gives what was recorded."""

import os
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from support import packed
from support.reference import Reference
from tartapefs import Member, Tape, TapeError, TapeFormatError, TapePlayer

Damage = Callable[[Path], None]


PAGE = 16384  # bytes


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


def fix_checksums(path: Path) -> None:
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


def consistent(*statements: str) -> Damage:
    def damage(path: Path) -> None:
        execute(path, *statements)
        fix_checksums(path)

    FORGED.add(damage)
    return damage


def edited(*statements: str, facts: tuple[str, ...] = ()) -> Damage:
    """The statements work on members, one a row: see `packed.edit`."""

    def damage(path: Path) -> None:
        packed.edit(path, *statements)
        execute(path, *facts)
        fix_checksums(path)

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
        fix_checksums(path)

    FORGED.add(damage)
    return damage


def put(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:at] + new + old[at + len(new) :]


def changed(*statements: str) -> Damage:
    return lambda path: execute(path, *statements)


def patched(offset: int, data: bytes) -> Damage:
    def damage(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        whole[offset : offset + len(data)] = data
        path.write_bytes(whole)

    return damage


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


def assert_refused(root: Path, damage: Damage) -> None:
    """A reader of the damaged index gets TapeFormatError; one that goes back through it does, or the right members."""
    before, members = read_whole(root), backwards(root)
    assert members
    damage(index_of(root))
    refused(root)
    with suppress(TapeFormatError):
        assert backwards(root) == members
    assert len(before) > 1024


def assert_no_lookup_is_wrong(root: Path, damage: Damage) -> None:
    """Each lookup and each read in the damaged index is right or a TapeError."""
    reference = Reference(root)
    damage(index_of(root))
    right = []
    with suppress(TapeFormatError), Tape.from_index(index_of(root)) as tape, closing(TapePlayer(tape)) as player:
        for name, start in reference.starts.items():
            with suppress(TapeError, KeyError):
                right.append(tape.find(name).start == start)
            with suppress(TapeError):
                right.append(getattr(tape.member_at(start), "name", b"") == name)
            with suppress(TapeError):
                right.append(player.read(start, 1024) == reference.read(start, 1024))
    assert all(right) or damage in FORGED


def assert_verify_says_so(program: Callable[..., int], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`verify` of the damaged index exits 3, and says why on one line."""
    assert program("verify", root) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("\n")
    assert said.err[:-1].isprintable()
    assert "not a usable tape index" in said.err
