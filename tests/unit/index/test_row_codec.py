"""Packs by themselves: members as bytes and back, the limits of each fact, and bytes that nobody wrote.

`packed`, written from the format's description, says what the bytes mean.
"""

import stat
import struct
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import packed

from tartapefs.archive.layout import MAX_OFFSET
from tartapefs.archive.member import Member
from tartapefs.archive.names import why_too_long
from tartapefs.archive.ustar import Owner
from tartapefs.index import row_codec

ROOT = b"data/"
NS = 10**9
FILE, FOLDER, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777
HARD_LINK = 0  # no mode: a file with a target
Row = tuple[Any, ...]  # as `packed.COLUMNS`

parts = st.binary(min_size=1, max_size=12).map(lambda name: name.translate(None, b"/\0")).filter(
    lambda name: name not in (b"", b".", b"..")
)  # fmt: skip
long_parts = st.integers(60, 99).map(lambda length: b"n" * length)
longer_parts = st.integers(100, 255).map(lambda length: b"n" * length)
folders = st.lists(st.one_of(parts, parts, parts, long_parts), max_size=5).map(
    lambda names: ROOT + b"".join(name + b"/" for name in names)
)
deep_folders = st.lists(st.one_of(parts, long_parts, longer_parts), max_size=15).map(
    lambda names: ROOT + b"".join(name + b"/" for name in names)
)
words = st.binary(max_size=31).map(lambda word: word.translate(None, b":\0"))
ids = st.integers(0, 10**10 - 1)
owners = st.none() | st.builds(Owner, ids, ids, words, words)
times = st.builds(
    lambda seconds, nsec: seconds * NS + nsec,
    st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 2),
    st.integers(0, NS - 1),
)
sizes = st.integers(0, 2000) | st.integers(0, 1 << 57)
targets = st.binary(min_size=1, max_size=100).map(lambda target: target.translate(None, b"\0") or b"x")
long_targets = targets | st.integers(101, 4095).map(lambda length: b"t" * length)


@st.composite
def members_of_a_pack(draw: st.DrawFn) -> list[Member]:
    """Members that follow each other, from the root on or from anywhere; in folders that come again and again."""
    long_names = draw(st.booleans())
    some_folders = draw(st.lists(deep_folders if long_names else folders, min_size=1, max_size=6))
    some_owners = draw(st.lists(owners, min_size=1, max_size=4))
    start = draw(st.just(0) | st.integers(1, 1 << 40).map(lambda blocks: blocks * 512))
    made: list[Member] = []
    for number in range(draw(st.integers(1, row_codec.MOST))):
        kind = FOLDER if number == start == 0 else draw(st.sampled_from((FILE, FILE, FOLDER, LINK, HARD_LINK)))
        is_hard_link, kind = kind == HARD_LINK, FILE if kind == HARD_LINK else kind
        name = ROOT if number == start == 0 else draw(st.sampled_from(some_folders))
        name += b"" if name == ROOT and number == start == 0 else draw(parts | longer_parts if long_names else parts)
        name += b"/" * (kind == FOLDER and name != ROOT)
        if why_too_long(name, b"", long_names):
            name = ROOT + b"%d" % number + b"/" * (kind == FOLDER)
        mode = stat.S_IFMT(kind) | draw(st.integers(0, 0o7777))
        size, target = draw(sizes) if kind == FILE and not is_hard_link else 0, b""
        if is_hard_link:
            target = draw(st.sampled_from(some_folders)) + draw(parts)
            if target == name or why_too_long(b"", target, long_names):
                target = ROOT + b"first of %d" % number
        if kind == LINK:
            target = draw(long_targets if long_names else targets)
        ino, owner = draw(st.integers(0, 2**64 - 1)), draw(st.sampled_from(some_owners))
        made.append(Member(start, name, mode, size, draw(times), ino, draw(times), target, owner))
        start = made[-1].stop
    return made


def pack(members: list[Member]) -> bytes:
    return row_codec.pack([member[1:] for member in members], is_long(members))


def is_long(members: list[Member]) -> bool:
    return any(map(packed.is_long, rows_of(members)))


def rows_of(members: list[Member]) -> list[Row]:
    """What is to be in the pack of `members`, in the order of `packed.COLUMNS`."""
    rows = []
    for _, name, mode, size, mtime_ns, ino, ctime_ns, target, owner in members:
        folder, slash, last = name.removesuffix(b"/").rpartition(b"/")
        written = b"%d:%d:%b:%b" % owner if owner else b""
        moments = (*divmod(mtime_ns, NS), ino, *divmod(ctime_ns, NS))
        rows.append((members[0][0], folder + slash, last, mode, size, *moments, target, written))
    return rows


def folders_in(rows: list[Row]) -> int:
    return sum(stat.S_ISDIR(row[3]) for row in rows)


def unpacked(start: int, rows: list[Row]) -> list[Member]:
    return row_codec.unpack(ROOT, start, len(rows), folders_in(rows), packed.blob_of(rows))[2]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(members_of_a_pack())
def test_members_as_bytes_and_back(members: list[Member]) -> None:
    """What is packed means what it should, and is unpacked as it was; so is what another writer made of it."""
    rows, start, count = rows_of(members), members[0][0], len(members)
    data, stop = pack(members), members[-1].stop
    assert packed.rows_of(start, count, data) == rows
    for blob in (data, packed.blob_of(rows, long_names=True)):
        starts, found_stop, found = row_codec.unpack(ROOT, start, count, folders_in(rows), blob)
        assert found == members
        assert all(type(member) is Member for member in found)
        assert (starts, found_stop) == ([member.start for member in members], stop)
    longest = row_codec.LONGEST_WITH_LONG_NAMES if is_long(members) else row_codec.LONGEST
    assert len(data) <= len(packed.blob_of(rows)) <= longest
    first = members[0].name.rstrip(b"/"), stop
    assert row_codec.peek(ROOT, start, count, folders_in(rows), data) == first


def check(start: int, count: int, folder_count: int, data: bytes) -> bool:
    """Whether the bytes are believed; if so, what they say could have been recorded."""
    try:
        starts, stop, members = row_codec.unpack(ROOT, start, count, folder_count, data)
    except row_codec.MALFORMED:
        return False
    assert starts == [member.start for member in members]
    assert len(members) == count
    assert folder_count == sum(member.is_directory for member in members)
    assert (members[0].name == ROOT) == (start == 0)
    for member in members:
        assert member.start == start
        start = member.stop
        assert member.name.startswith(ROOT)
        assert member.is_directory == member.name.endswith(b"/")
        assert not {b"", b".", b".."} & set(member.name.removesuffix(b"/").split(b"/"))
        assert b"\0" not in member.name + member.target
        assert len(member.header()) == member.body - member.start
        assert why_too_long(member.name, member.target, long_names=True) is None
        assert (member.is_link or member.is_hard_link) == bool(member.target)
        assert member.is_file or not member.size
        assert [member.is_file, member.is_directory, member.is_link, member.is_hard_link].count(True) == 1
        if member.is_hard_link:
            assert member.target.startswith(ROOT)
            assert not {b"", b".", b".."} & set(member.target.split(b"/"))
    assert start == stop <= MAX_OFFSET
    assert row_codec.unpack(ROOT, starts[0], count, folder_count, pack(members))[2] == members
    return True


SOME: list[Member] = [
    Member(0, b"data/", FOLDER, 0, 1, 1, 1, b"", None),
    Member(512, b"data/a/", FOLDER, 0, 1, 2, 1, b"", Owner(1, 2, b"u", b"g")),
    Member(1024, b"data/a/b/", FOLDER, 0, 1, 3, 1, b"", None),
    Member(1536, b"data/a/b/file", FILE, 700, -1, 4, 1, b"", Owner(3, 4, b"", b"")),
    Member(3072, b"data/a/link", LINK, 0, 1, 5, 1, b"../x", None),
    Member(3584, b"data/c", FILE, 512, 1, 6, 1, b"", None),
    Member(4608, b"data/d", FILE, 0, 1, 6, 1, b"data/c", None),
]
changes = st.tuples(st.integers(0, 1000), st.integers(0, 1), st.binary(max_size=3))


@pytest.mark.long(but=1)
@pytest.mark.parametrize("part", range(5))
@settings(deadline=None, max_examples=200)
@given(st.booleans(), st.lists(changes, min_size=1, max_size=4), st.integers(-2, 2), st.integers(-1, 1))
@example(True, [(0, 0, b"")], 0, 0)
def test_bytes_that_nobody_wrote(
    part: int, has_root: bool, edits: list[tuple[int, int, bytes]], more: int, folders: int
) -> None:
    """Some bytes changed, cut out or put in: refused, or members that could have been recorded."""
    members = SOME[not has_root :]
    data = pack(members)
    for place, cut, new in edits:
        at = place % len(data)
        data = data[:at] + new + data[at + (len(new) if cut else 0) :]
    check(members[0][0], len(members) + more, folders_in(rows_of(members)) + folders, data)


def test_every_byte_by_itself() -> None:
    """Each byte of a pack with each bit flipped, and the pack cut at each; as the right one is believed."""
    data, count, folder_count = pack(SOME), len(SOME), folders_in(rows_of(SOME))
    assert check(0, count, folder_count, data)
    believed = 0
    for at in range(len(data)):
        for bit in range(8):
            believed += check(0, count, folder_count, data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        assert not check(0, count, folder_count, data[:at])
    assert 0 < believed < len(data) * 8  # such as the bits of a time


def row(**facts: Any) -> Row:
    """A plain file in the root, of the facts given."""
    plain = {"pack": 512, "folder": ROOT, "name": b"f", "mode": FILE, "size": 0, "mtime": 0, "mtime_nsec": 0,
             "ino": 1, "ctime": 0, "ctime_nsec": 0, "target": b"", "owner": b""}  # fmt: skip
    assert plain.keys() == set(packed.COLUMNS)
    return tuple((plain | facts).values())


# Each with what lies just within, and just beyond.
LIMITS: dict[str, tuple[list[Row], list[Row]]] = {
    "members": ([row()] * 32, [row()] * 33),
    "members at all": ([row()], []),
    "size": ([row(size=2**63 - 1536)], [row(size=2**63 - 1535)]),
    "size where blocks end": ([row(size=1 << 62)], [row(size=1 << 63)]),
    "sum of sizes": ([row(size=1 << 62), row(size=(1 << 62) - 4096)], [row(size=1 << 62), row(size=1 << 62)]),
    "nanoseconds": ([row(mtime_nsec=NS - 1)], [row(mtime_nsec=NS)]),
    "nanoseconds of ctime": ([row(), row(ctime_nsec=NS - 1)], [row(), row(ctime_nsec=NS)]),
    "name": ([row(name=b"n" * 100)], [row(name=b"n" * 101)]),
    "name of a folder": ([row(name=b"n" * 99, mode=FOLDER)], [row(name=b"n" * 100, mode=FOLDER)]),
    "whole name": (
        [row(folder=ROOT + b"p" * 149 + b"/", name=b"n" * 99)],
        [row(folder=ROOT + b"p" * 150 + b"/", name=b"n" * 100)],
    ),
    "one name of many": ([row()] * 31 + [row(name=b"n" * 100)], [row()] * 31 + [row(name=b"n" * 101)]),
    "target": ([row(mode=LINK, target=b"t" * 100)], [row(mode=LINK, target=b"t" * 101)]),
    "target of a hard link": ([row(target=ROOT + b"t" * 95)], [row(target=ROOT + b"t" * 96)]),
    "hard link to below the root": ([row(target=b"data/x")], [row(target=b"other/x")]),
    "hard link downwards": ([row(target=b"data/x/y")], [row(target=b"data/../y")]),
    "hard link to no folder": ([row(target=b"data/x")], [row(target=b"data/x/")]),
    "hard link to another name": ([row(target=b"data/g")], [row(target=b"data/f")]),
    "hard link without a body": ([row(target=b"data/x")], [row(target=b"data/x", size=1)]),
    "owner's name": ([row(owner=b"0:0:%b:g" % (b"u" * 31))], [row(owner=b"0:0:%b:g" % (b"u" * 32))]),
    "group's name": ([row(owner=b"0:0:u:%b" % (b"g" * 31))], [row(owner=b"0:0:u:%b" % (b"g" * 32))]),
    "owner's number": ([row(owner=b"9999999999:0:u:g")], [row(owner=b"10000000000:0:u:g")]),
    "group's number": ([row(owner=b"0:9999999999:u:g")], [row(owner=b"0:10000000000:u:g")]),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit: str) -> None:
    within, beyond = LIMITS[limit]
    assert len(unpacked(512, within)) == len(within)
    with pytest.raises(row_codec.MALFORMED):
        unpacked(512, beyond)


# The same, of packs that are marked as having such names.
DEEP = ROOT + b"/".join([b"d" * 255] * 15) + b"/"  # 3,845 bytes
LONG_LIMITS: dict[str, tuple[list[Row], list[Row]]] = {
    "name": ([row(name=b"n" * 101)], [row(name=b"n" * 100)]),
    "whole name": ([row(folder=DEEP, name=b"n" * 250)], [row(folder=DEEP, name=b"n" * 251)]),
    "of a folder": (
        [row(folder=DEEP, name=b"n" * 250, mode=FOLDER)],
        [row(folder=DEEP, name=b"n" * 251, mode=FOLDER)],
    ),
    "target": ([row(mode=LINK, target=b"t" * 4095)], [row(mode=LINK, target=b"t" * 4096)]),
    "one of many": ([row()] * 31 + [row(mode=LINK, target=b"t" * 101)], [row()] * 32),
    "sum of sizes": (
        [row(size=(1 << 62) - 4096, name=b"n" * 250), row(size=(1 << 62) - 4096)],
        [row(size=(1 << 62) - 4096, name=b"n" * 250), row(size=(1 << 62) + 2048)],
    ),
    "largest offset": ([row(size=2**63 - 2560, name=b"n" * 101)], [row(size=2**63 - 2048, name=b"n" * 101)]),
}


@pytest.mark.parametrize("limit", LONG_LIMITS)
def test_limits_of_long_names(limit: str) -> None:
    within, beyond = LONG_LIMITS[limit]
    count = len(within)
    found = row_codec.unpack(ROOT, 512, count, folders_in(within), packed.blob_of(within, long_names=True))[2]
    assert len(found) == count
    blob = packed.blob_of(beyond)
    marked = blob[:1] + bytes([blob[1] | 0x80]) + blob[2:]
    for of in (row_codec.unpack, row_codec.peek):
        with pytest.raises(row_codec.MALFORMED):
            of(ROOT, 512, len(beyond), folders_in(beyond), marked)  # type: ignore[operator]
    with pytest.raises(row_codec.MALFORMED):
        row_codec.unpack(ROOT, 512, count, folders_in(within), packed.blob_of(within))
    if packed.is_long(within[0]) and not within[0][10]:
        with pytest.raises(row_codec.MALFORMED):
            row_codec.peek(ROOT, 512, count, folders_in(within), packed.blob_of(within))


ROOT_ROW = row(folder=b"", name=b"data", mode=FOLDER)


@pytest.mark.parametrize(
    ("start", "rows"),
    [
        (1, [row()]),
        (513, [row()]),
        (-511, [row()]),
        (0, [row()]),
        (0, [row(folder=b"", name=b"data")]),
        (0, [row(folder=b"", name=b"data", mode=LINK, target=b"t")]),
        (0, [row(name=b"data", mode=FOLDER)]),
        (0, [row(folder=b"", name=b"dat", mode=FOLDER)]),
        (0, [row(folder=b"", name=b"", mode=FOLDER)]),
        (0, [ROOT_ROW, ROOT_ROW]),
        (0, [row(), ROOT_ROW]),
        (0, [ROOT_ROW, row(folder=b"")]),
        (512, [ROOT_ROW]),
        (512, [row(), ROOT_ROW]),
        (512, [row(folder=b"", name=b"other", mode=FOLDER)]),
        (512, [row(folder=b"")]),
        (512, [row(), row(folder=b"")]),
        (512, [row(folder=b"data")]),
        (512, [row(folder=b"data/ab")]),
        (512, [row(folder=b"other/")]),
        (512, [row(folder=b"data/../")]),
        (512, [row(folder=b"data/./")]),
        (512, [row(folder=b"data//")]),
        (512, [row(mode=FOLDER, size=1)]),
        (512, [row(mode=LINK, target=b"t", size=1)]),
        (512, [row(mode=LINK)]),
        (512, [row(target=b"t")]),
        (512, [row(mode=FOLDER, target=b"t")]),
        (512, [row(mode=stat.S_IFSOCK | 0o644)]),
        (512, [row(mode=0o644)]),
        (512, [row(name=b"..")]),
        (512, [row(name=b".")]),
        (512, [row(name=b"")]),
        (512, [row(name=b"a/b")]),
        (512, [row(owner=b":::")]),
    ],
)
def test_rows_that_cannot_be(start: int, rows: list[Row]) -> None:
    with pytest.raises(row_codec.MALFORMED):
        unpacked(start, rows)


def test_rows_that_can_be() -> None:
    """The check on the test above."""
    assert [member.name for member in unpacked(0, [ROOT_ROW, row()])] == [b"data/", b"data/f"]
    assert [member.name for member in unpacked(512, [row(mode=FOLDER), row()])] == [b"data/f/", b"data/f"]
    (link,) = unpacked(1 << 40, [row(mode=LINK, target=b"t", owner=b"1:2::")])
    assert (link.start, link.target, link.owner) == (1 << 40, b"t", Owner(1, 2, b"", b""))


@pytest.mark.parametrize("count", [-1, 0, 2, 33, 1 << 16, -(1 << 62), 1 << 62])
def test_counts_that_are_not_those_of_the_bytes(count: int) -> None:
    assert not check(512, count, 0, packed.blob_of([row()]))


@pytest.mark.parametrize("folder_count", [-1, 1, 3, 1 << 62])
@pytest.mark.parametrize("mode", [FILE, FOLDER])
def test_number_of_folders_that_is_not_that_of_the_bytes(folder_count: int, mode: int) -> None:
    rows = [row(mode=mode), row(mode=mode)]
    assert check(512, 2, folders_in(rows), packed.blob_of(rows))
    assert not check(512, 2, folder_count, packed.blob_of(rows))


def blob(named: bytes = b"\1\0", shared: bytes = b"\0", folder: int = 0, owner: int = 0, more: bytes = b"") -> bytes:
    """A pack of one file in one folder, and what can be said wrongly of it."""
    facts = packed.FACTS.pack(0, 0, 0, 1, 0, 0, FILE, folder, owner)
    return named + shared + facts + b"\0".join([b"f", b"", ROOT]) + more


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        blob()[:-1],
        blob()[:46],
        blob()[:47],
        blob(more=b"x"),
        blob(more=b"\0"),
        blob(more=b"\0x"),
        blob(folder=1),
        blob(folder=255),
        blob(owner=1),
        blob(owner=255),
        blob(named=b"\1\1", owner=2, more=b"\x001:2:a:b"),
        blob(named=b"\1\1", owner=0, more=b"\0:::"),
        blob(named=b"\0\0"),
        blob(named=b"\2\0"),
        blob(named=b"\xff\xff"),
        blob(named=b"\2\0", shared=b"\0\0", more=b"\0data/../"),
        blob(named=b"\2\0", shared=b"\0\5", more=b"\0a"),
    ],
)
def test_parts_that_do_not_belong_together(data: bytes) -> None:
    assert not check(512, 1, 0, data)


def test_parts_that_do_belong_together() -> None:
    """The check on the test above."""
    assert check(512, 1, 0, blob())
    assert check(512, 1, 0, blob(named=b"\1\1", owner=1, more=b"\x001:2:a:b"))
    assert check(512, 1, 0, blob(named=b"\2\0", shared=b"\0\5", folder=1, more=b"\0a/"))


FACTS = packed.FACTS.pack(0, 0, 0, 1, 0, 0, FILE, 254, 0)
LONG = row_codec.LONGEST + 1000  # what a row may have
LONGER = row_codec.LONGEST_WITH_LONG_NAMES + 1000
HUGE: dict[str, bytes] = {
    "zeros": bytes(LONG),
    "ones": b"\xff" * LONG,
    "slashes": b"\xff\0" + bytes(255) + FACTS * 32 + b"\0" * 64 + b"/" * (LONG - 2000),
    "folders that share all": b"\xff\0" + bytes(1) + b"\xff" * 254 + FACTS * 32
                              + b"\0".join([b"n"] * 32 + [b""] * 32 + [b"data/" + b"a/" * 15_000] + [b"a/"] * 254),
    "long names": b"\1\x80\0" + packed.FACTS.pack(0, 0, 0, 1, 0, 0, FILE, 0, 0) * 32
                  + b"\0".join([b"n" * 16_000] * 32 + [b""] * 32 + [b"data/"]),
    "long targets": b"\1\x80\0" + packed.FACTS.pack(0, 0, 0, 1, 0, 0, LINK, 0, 0) * 32
                    + b"\0".join([b"n"] * 32 + [b"t" * 16_000] * 32 + [b"data/"]),
    "many folders": b"\xff\x80" + bytes(255) + FACTS * 32 + b"\0" * 64 + b"/" * (LONGER - 2000),
    "a deep folder": b"\1\x80\0" + packed.FACTS.pack(0, 0, 0, 1, 0, 0, FILE, 0, 0) * 32
                     + b"\0".join([b"n"] * 32 + [b""] * 32 + [b"data/" + b"a/" * 250_000]),
    "folders that grow": b"\xff\0" + b"\xff" * 255 + FACTS * 32
                         + b"\0".join([b"n"] * 32 + [b""] * 32 + [b"data/"] + [b"a/" * 59] * 254),
    "names": b"\1\0\0" + packed.FACTS.pack(0, 0, 0, 1, 0, 0, FILE, 0, 0) * 32
             + b"\0".join([b"n" * 900] * 32 + [b""] * 32 + [b"data/"]),
    "owner of digits": b"\1\xff\0" + packed.FACTS.pack(0, 0, 0, 1, 0, 0, FILE, 0, 1) * 32
                       + b"\0".join([b"n"] * 32 + [b""] * 32 + [b"data/"] + [b"9" * 100] * 255),
}  # fmt: skip


@pytest.mark.parametrize("huge", HUGE)
def test_no_bytes_take_work_or_memory_without_end(huge: str) -> None:
    """A row as long as it may be, of the parts that cost most: few lines of Python are executed, and little is kept."""
    lines = 0

    def count(_frame: object, event: str, _argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    tracing = sys.gettrace()
    tracemalloc.start()
    sys.settrace(count)  # type: ignore[arg-type]
    try:
        check(512, 32, 0, HUGE[huge])
    finally:
        sys.settrace(tracing)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 16 << 20
    assert lines < 10_000  # 2,649 at most


@settings(deadline=None)
@given(st.binary(max_size=3000), st.integers(-1, 40), st.integers(-1, 40))
def test_bytes_of_any_kind(data: bytes, count: int, folder_count: int) -> None:
    check(512, count, folder_count, data)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=8)), max_size=8))
def test_folders_of_any_kind(named: list[tuple[int, bytes]]) -> None:
    """What folders share and what they add, whatever it is."""
    strings = [b"name", b"", *(rest.replace(b"\0", b"/") for _, rest in named)]
    head = bytes([len(named), 0]) + bytes(common for common, _ in named)
    for number in range(len(named) + 1):
        check(512, 1, 0, head + struct.pack("<QqIQqIHBB", 0, 0, 0, 1, 0, 0, FILE, number, 0) + b"\0".join(strings))
