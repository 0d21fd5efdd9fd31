"""The tape: facts, members, and lookups by name and by offset, against the independent archive."""

import contextlib
import os
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.pack_trees import BLOCK, TREES, recorded_tree
from support.reference import Reference

from tartapefs import Kind, Member, OffsetError, Tape, TapeError, TapeFormatError, TapePlayer, TapeRecorder
from tartapefs.index import row_codec
from tartapefs.transfer.digests import Digests
from tartapefs.verify.seal import seal


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    """A recorded folder with many names that differ little."""
    root = tmp_path / "tree"
    for name in ("a/b/c/d", "a.b", "a-b/x", "a/b.c", "ab", "a/b/c.d/e", "b/a", "b/\udcff", "b/a\nb", "b/\x01", "-b"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape") * 40)
    for size in (0, 1, 511, 512, 513):
        (root / f"{size}").write_bytes(b"s" * size)
    (root / "z").symlink_to("a.b")
    (root / "empty folder").mkdir()
    TapeRecorder(root).commit()
    return root


@pytest.fixture
def tape(varied: Path) -> Iterator[Tape]:
    with Tape.discover(varied) as tape:
        yield tape


def member_by_hand(expected: Reference, offset: int) -> bytes | None:
    """The name of the member that `offset` lies in, by looking at every start; None in the footer."""
    if offset >= expected.size - 1024:
        return None
    return [name for name, start in expected.starts.items() if start <= offset][-1]


def test_facts(varied: Path, tape: Tape) -> None:
    expected = Reference(varied)
    assert tape.total_size == expected.size
    assert tape.member_count == len(expected.starts)
    assert tape.root_name == "tree"
    assert tape.directory == str(varied)
    assert tape.index_path == str(varied / ".tartape" / "index.db")
    assert (tape.excluded, tape.left_out, tape.owners_kept) == ((), 0, False)
    assert len(bytes.fromhex(tape.fingerprint)) == 32
    assert tape.rows_are_sound()


def test_members(varied: Path, tape: Tape) -> None:
    """In order, each with what is on disk."""
    expected = Reference(varied)
    members = list(tape.members())
    assert [(member.name, member.start) for member in members] == list(expected.starts.items())
    stops = [*(member.start for member in members[1:]), expected.size - 1024]
    assert [member.stop for member in members] == stops
    for member in members:
        found = os.lstat(os.fsencode(varied) + b"/" + member.path)
        assert (member.mode, member.mtime_ns, member.ino) == (found.st_mode, found.st_mtime_ns, found.st_ino)
        assert member.ctime_ns == found.st_ctime_ns
        assert member.size == (found.st_size if member.is_file else 0)
        assert [member.is_file, member.is_directory, member.is_link].count(True) == 1
        assert member.target == (b"a.b" if member.is_link else b"")
        assert member.owner is None
        assert member.header() == expected.read(member.start, 512)
        assert os.fsencode(member.arc_path) == member.name.rstrip(b"/")


@pytest.mark.parametrize("width", [1, 2, 511, 512, 513, 5000])
def test_members_that_overlap_a_range(varied: Path, tape: Tape, width: int) -> None:
    """Half open: who only touches the range is not in it."""
    members = list(tape.members())
    for place in Reference(varied).boundaries():
        for start in (max(0, place - width), max(0, place - 1), place, place + 1):
            stop = start + width
            wanted = [member for member in members if member.start < stop and start < member.stop]
            assert list(tape.members(start, stop)) == wanted, (start, stop)


@pytest.mark.parametrize("sealed", [False, True])
def test_members_with_headers(varied: Path, sealed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same members of any range, in both directions, in packs of a few; whatever was read before."""
    monkeypatch.setattr(row_codec, "MOST", 9 if sealed else 3)
    TapeRecorder(varied, overwrite=True).commit()
    with Tape.discover(varied) as tape, contextlib.closing(TapePlayer(tape)) as player:
        if sealed:
            seal(tape, player.source, player.at_home, "sha256")
    with Tape.discover(varied) as tape:
        every = list(tape.members())
        assert list(tape.headed_backwards(0, tape.total_size)) == [(m, m.header()) for m in every[::-1]]
    some = random.Random(1)
    with Tape.discover(varied) as tape:
        for _ in range(1000):
            start, stop = sorted(some.randrange(-600, tape.total_size + 600) for _ in range(2))
            expected = [member for member in every if member.start < stop and start < member.stop and start < stop]
            headed = [(member, member.header()) for member in expected]
            assert list(tape.headed_backwards(start, stop)) == headed[::-1]
            assert list(tape.headed(start, stop)) == headed
            assert list(tape.members(start, stop)) == expected


def test_members_of_no_range(tape: Tape) -> None:
    """Nothing lies in an empty range, in the footer, or beyond the end."""
    assert list(tape.members(512, 512)) == []
    assert list(tape.members(513, 512)) == []
    assert list(tape.members(tape.total_size - 1024)) == []
    assert list(tape.members(tape.total_size, tape.total_size + 10**6)) == []


def test_members_of_a_range_that_reaches_outside(tape: Tape) -> None:
    """A range is clamped to where members lie; one that starts too early says nothing about the index."""
    everything = list(tape.members())
    assert list(tape.members(0, tape.total_size * 2)) == everything
    assert list(tape.members(-10, 0)) == []
    assert list(tape.members(-10, 1)) == everything[:1]
    assert list(tape.members(-(2**70), 2**70)) == everything


def test_members_at_once_and_in_between(tape: Tape) -> None:
    """Two passes that advance in turns, and lookups between their steps, do not disturb each other."""
    members = list(tape.members())
    first, second = tape.members(), tape.members(members[3].start)
    seen = [next(first), next(first)]
    assert next(second) == members[3]
    assert tape.find(members[-1].name) == members[-1]
    seen += [next(first)]
    assert seen == members[:3]
    assert [*second] == members[4:]
    assert [*first] == members[3:]


def test_find_every_member(varied: Path, tape: Tape) -> None:
    """By text or bytes, with or without a directory's slash."""
    for name, start in Reference(varied).starts.items():
        for given in (name, name.rstrip(b"/"), os.fsdecode(name), os.fsdecode(name).rstrip("/")):
            member = tape.find(given)
            assert (member.name, member.start) == (name, start)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "tree/nothing",
        "tree/a/b/c/d/e",
        "tre",
        "tree0",
        "TREE",
        "a.b",
        "/tree/a.b",
        "./tree/a.b",
        "tree//a.b",
        "tree/./a.b",
        "tree/a/../a.b",
        "tree/a.",
        "tree/a.bb",
        "tree/\x00",
        "tree/\udc80",
        "zzz",
        "\x01",
        "tree/.tartape",
        "tree/.tartape/index.db",
    ],
)
def test_find_nothing(tape: Tape, name: str) -> None:
    """KeyError for each name that no member has, whatever it would mean to a file system."""
    for given in (name, os.fsencode(name)):
        with pytest.raises(KeyError):
            tape.find(given)


def test_find_in_a_large_folder(tmp_path: Path) -> None:
    """A search by name is right wherever it has to look, and sees few of the members on the way."""
    root = tmp_path / "tree"
    root.mkdir()
    names = [f"{number * 7919 % 5003}" for number in range(1500)]
    for name in names:
        (root / name).write_bytes(b"x" * (int(name) % 3))
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        by_name = {member.arc_path: member for member in tape.members()}
        assert len(by_name) == 1501
        for name in names:
            assert tape.find(f"tree/{name}") == by_name[f"tree/{name}"]
            with pytest.raises(KeyError):
                tape.find(f"tree/{name}x")


def test_lookup_by_offset(varied: Path, tape: Tape) -> None:
    """At every boundary, and a byte before and after it: the member and the segment."""
    expected = Reference(varied)
    boundaries = expected.boundaries()
    for place in boundaries:
        for offset in (place - 1, place, place + 1):
            if not 0 <= offset < expected.size:
                continue
            name = member_by_hand(expected, offset)
            member = tape.member_at(offset)
            assert (member and member.name) == name
            segment = tape.segment_at(offset)
            assert segment.start <= offset < segment.stop
            assert segment.start in boundaries
            assert segment.stop in boundaries
            assert boundaries.index(segment.stop) == boundaries.index(segment.start) + 1
            assert segment.kind == kind_by_hand(member, offset)


def kind_by_hand(member: Member | None, offset: int) -> Kind:
    if member is None:
        return Kind.FOOTER
    if offset < member.start + 512:
        return Kind.HEADER
    return Kind.BODY if offset < member.start + 512 + member.size else Kind.PADDING


@pytest.mark.parametrize("offset", [-1, -(2**70), "size", "size + 1", 2**63, 2**64, 2**70])
def test_offsets_outside(tape: Tape, offset: int | str) -> None:
    """OffsetError, which is also a ValueError, with the offset and the size."""
    number = tape.total_size + (offset == "size + 1") if isinstance(offset, str) else offset
    for lookup in (tape.member_at, tape.segment_at):
        with pytest.raises(OffsetError, match=f"{number} is outside") as caught:
            lookup(number)
        assert isinstance(caught.value, ValueError)
        assert (caught.value.offset, caught.value.total_size) == (number, tape.total_size)


def test_open_by_index_path(varied: Path, tmp_path: Path) -> None:
    """The default place tells where the source is; another place does not."""
    with Tape.from_index(varied / ".tartape" / "index.db") as tape:
        assert tape.directory == str(varied)
    (varied / ".tartape" / "index.db").rename(tmp_path / "index.db")
    with Tape.from_index(str(tmp_path / "index.db")) as tape:
        assert tape.directory is None
        assert tape.root_name == "tree"
    with Tape.discover(varied, tmp_path / "index.db") as tape:
        assert tape.directory == str(varied)


@pytest.mark.parametrize("given", [".", "a/..", "{parent}/link", "./"])
def test_discover_in_other_ways(varied: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    (varied.parent / "link").symlink_to("tree")
    monkeypatch.chdir(varied)
    with Tape.discover(given.format(parent=varied.parent)) as tape:
        assert tape.directory == str(varied)


def test_without_with(varied: Path) -> None:
    """Usable without a block; `close` more than once does no harm."""
    tape = Tape.discover(varied)
    assert tape.find("tree/a.b").size > 0
    tape.close()
    tape.close()


@pytest.mark.parametrize("looked_before", [False, True])
@pytest.mark.parametrize(
    "lookup",
    [
        lambda tape: list(tape.members()),
        lambda tape: tape.member_at(0),
        lambda tape: tape.member_at(5000),
        lambda tape: tape.segment_at(5000),
        lambda tape: tape.find("tree/a.b"),
        lambda tape: tape.rows_are_sound(),
    ],
    ids=["members", "member_at the start", "member_at", "segment_at", "find", "rows_are_sound"],
)
def test_closed_tape(varied: Path, lookup: Callable[[Tape], object], looked_before: bool) -> None:
    """Every lookup raises ValueError, also one that was answered before."""
    tape = Tape.discover(varied)
    if looked_before:
        lookup(tape)
    tape.close()
    for _ in range(3):
        with pytest.raises(ValueError, match="closed"):
            lookup(tape)


def test_two_tapes_in_one_process(varied: Path, tmp_path: Path) -> None:
    """Each keeps to its own folder and index."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"other")
    TapeRecorder(other).commit()
    with Tape.discover(varied) as first, Tape.discover(other) as second, Tape.discover(varied) as third:
        players = [TapePlayer(tape) for tape in (first, second, third)]
        for player, root in zip(players, (varied, other, varied), strict=True):
            expected = Reference(root)
            assert player.read(0, expected.size) == expected.read(0, expected.size)
            player.close()
        second.close()
        assert list(first.members()) == list(third.members())


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs `work(number)` in threads at once, and fails with the first error of any."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_one_tape_in_many_threads(varied: Path) -> None:
    """Lookups by name and offset, whole passes and reads, all at once: each gets its own right answer."""
    for number in range(600):
        (varied / "b" / f"{number}").write_bytes(b"%d" % number * (number % 7))
    TapeRecorder(varied, overwrite=True).commit()
    expected = Reference(varied)
    archive = expected.read(0, expected.size)
    names = list(expected.starts)
    with Tape.discover(varied) as tape:
        player = TapePlayer(tape)

        def work(number: int) -> None:
            chance = random.Random(number)
            for turn in range(120):
                name = chance.choice(names)
                assert tape.find(name).start == expected.starts[name]
                offset = chance.randrange(expected.size)
                size = chance.choice((1, 512, 4096, 20_000))
                assert player.read(offset, size) == archive[offset : offset + size]
                member = tape.member_at(offset)
                assert member is None or member.start <= offset < member.stop
                if turn % 40 == number:
                    assert [member.name for member in tape.members()] == names

        in_threads(10, work)
        player.close()


def test_closing_while_threads_look_up(varied: Path) -> None:
    """Each lookup is answered rightly or raises ValueError; after the close, all raise; nothing stays open."""
    for number in range(400):
        (varied / "b" / f"{number}").write_bytes(b"1")
    TapeRecorder(varied, overwrite=True).commit()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(8):
        tape = Tape.discover(varied)
        last = tape.total_size - 1024
        begun = threading.Barrier(9)

        def work(number: int, tape: Tape = tape, last: int = last, begun: threading.Barrier = begun) -> None:
            chance = random.Random(number)
            begun.wait()
            while True:
                offset = chance.randrange(last)
                try:
                    member = tape.member_at(offset)
                except ValueError as error:
                    assert "closed" in str(error)
                    return
                assert member is not None
                assert member.start <= offset < member.stop

        closer = threading.Thread(target=lambda tape=tape, begun=begun: (begun.wait(), tape.close()))
        closer.start()
        in_threads(8, work)
        closer.join()
        for offset in range(0, last, 2048):
            with pytest.raises(ValueError, match="closed"):
                tape.member_at(offset)
        left = {fd for fd in set(os.listdir("/proc/self/fd")) - before if links_to(fd).endswith("/index.db")}
        assert not left


def links_to(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def test_opening_leaves_no_trace_of_the_caller(varied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape that was opened by a relative path stays the same tape after a change of folder."""
    monkeypatch.chdir(varied)
    with Tape.discover(".") as tape:
        monkeypatch.chdir("/")
        player = TapePlayer(tape)
        expected = Reference(varied)
        assert player.read(0, expected.size) == expected.read(0, expected.size)
        player.close()


def test_a_fact_of_the_tape_that_fails_its_digest(tree: Path) -> None:
    """Even one that would pass every other check: the time of recording."""
    TapeRecorder(tree).commit()
    index = tree / ".tartape" / "index.db"
    with contextlib.closing(sqlite3.connect(index)) as database, database:
        database.execute("UPDATE tape SET value = value + 1 WHERE fact = 'recorded_ns'")
    with pytest.raises(TapeFormatError, match="digest"):
        Tape.discover(tree)


def test_children_of_each_folder(tmp_path: Path) -> None:
    """Those directly in it, in order, however much lies below others; for large and small trees alike."""
    root = tmp_path / "data"
    chance = random.Random(11)
    folders = [root]
    root.mkdir()
    for number in range(300):
        above = chance.choice(folders[-40:])
        path = above / f"{chance.choice('abc')}{number}"
        if chance.random() < 0.4:
            path.mkdir()
            folders.append(path)
        else:
            path.write_bytes(bytes(chance.randrange(2000)))
    (root / "a-file-before-a-folder").touch()
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        for folder in tape.folders():
            expected = sorted(os.listdir(os.fsencode(root) + b"/" + folder.path))
            if not folder.path:
                expected.remove(b".tartape")
            assert [child.name.rstrip(b"/") for child in tape.children(folder)] == [
                folder.name + name for name in expected
            ]


def test_find_every_member_of_every_pack(root: Path) -> None:
    with Tape.discover(root) as tape:
        for name, start in Reference(root).starts.items():
            assert tape.find(name).start == start
            with pytest.raises(KeyError):
                tape.find(name.rstrip(b"/") + b"\1")


@pytest.mark.parametrize("name", TREES)
def test_a_tape_that_is_sealed_stays_the_same_recording(tmp_path: Path, name: str) -> None:
    """Its rows are cut otherwise; what is kept of digests begun before goes on all the same."""
    root, state = recorded_tree(tmp_path / "tree", TREES[name], False), tmp_path / "state"
    with Tape.discover(root) as bare, closing(TapePlayer(bare, root)) as player:
        Digests(bare, ("sha256",), state=state).save()
        seal(bare, player.source, player.at_home, "sha256", BLOCK)
        with Tape.discover(root) as tape:
            assert tape.seal
            assert list(tape.members()) == list(bare.members())
            assert tape.rows_digest == bare.rows_digest
            Digests(tape, ("sha256",), state=state)
    (root / "another").touch()
    TapeRecorder(root, overwrite=True).commit()
    with Tape.discover(root) as tape, pytest.raises(TapeError, match="another recording"):
        Digests(tape, ("sha256",), state=state)


def test_what_is_shared_with_another_recording(tree: Path) -> None:
    """All of it, a generation, or nothing; headers alone do not tell."""
    fingerprints, digests, ends = [], [], []
    for number in range(3):
        (tree / f"new {number}").write_bytes(b"new")
        TapeRecorder(tree, append=number > 0).commit()
        with Tape.discover(tree) as tape:
            fingerprints.append(tape.fingerprint)
            digests.append(tape.rows_digest)
            ends.append(tape.facts.end)
    with Tape.discover(tree) as tape:
        for at, shared in enumerate((*ends[:2], tape.total_size)):
            assert tape.shared_with(fingerprints[at], [digests[at]]) == shared
            assert tape.shared_with(fingerprints[at], [None, "0" * 64, digests[at - 1]]) is None
        assert tape.shared_with("0" * 64, digests) is None
