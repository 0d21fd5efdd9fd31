"""The player: the recorded bytes at any offset, in any piece, or an error; and the same in order, as events."""

import array
import dataclasses
import errno
import gc
import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.changes import (
    add_file,
    append,
    chmod,
    chmod_and_back,
    chown,
    empty,
    overwrite,
    overwrite_keeping_times,
    remove,
    rename,
    replace,
    replace_by_copy,
    replace_by_copy_keeping_folder_times,
    replace_by_copy_of_folder,
    replace_by_file,
    replace_by_folder,
    replace_by_link,
    replace_by_link_to_a_copy,
    replace_by_pipe,
    replace_by_socket,
    replace_folder_by_link,
    replace_folder_by_link_to_a_copy,
    retarget,
    retarget_keeping_times,
    shrink,
    times_kept,
    touch,
    touch_by_a_nanosecond,
)
from support.daemon import open_in
from support.reference import Reference

from tartapefs import (
    FileData,
    FileEnd,
    FileStart,
    OffsetError,
    Tape,
    TapeCompleted,
    TapeError,
    TapeIntegrityError,
    TapePlayer,
    TapeRecorder,
)
from tartapefs.play import assemble as fill
from tartapefs.play import descriptor_cache as kept
from tartapefs.source import folder as source

Change = Callable[[Path], None]


@pytest.fixture(params=[True, False], ids=["openat2", "by component"])
def way_to_open(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Files are opened by one system call, or as on a kernel that does not have it."""
    if request.param and not source.has_openat2():
        pytest.skip("this kernel has no openat2")
    monkeypatch.setattr(source, "has_openat2", lambda: request.param)
    return bool(request.param)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recorded folder whose archive is of some 20 KiB and has each kind of segment, next to each other kind."""
    root = tmp_path / "data"
    (root / "photos" / "2024").mkdir(parents=True)
    (root / "empty folder").mkdir()
    for size in (0, 1, 511, 512, 513, 1024):
        (root / "photos" / f"{size}").write_bytes(pattern(size))
    (root / "photos" / "2024" / "a").write_bytes(pattern(3000))
    (root / "photos" / "2024" / "b").write_bytes(pattern(700))
    (root / "link").symlink_to("photos/512")
    (root / "z").write_bytes(pattern(1500))
    TapeRecorder(root).commit()
    return root


def pattern(size: int) -> bytes:
    return hashlib.shake_128(b"%d" % size).digest(size)


@pytest.fixture
def player(small: Path) -> Iterator[TapePlayer]:
    with Tape.discover(small) as tape:
        player = TapePlayer(tape, source_root=small)
        yield player
        player.close()


@pytest.fixture
def archive(small: Path) -> bytes:
    """The archive that the small folder has."""
    return whole(small)


def whole(root: Path) -> bytes:
    expected = Reference(root)
    return expected.read(0, expected.size)


def around_blocks(size: int) -> list[int]:
    """Every multiple of 512 up to the end of the archive, and the offsets one below and one above it."""
    places = {block + side for block in range(0, size + 1, 512) for side in (-1, 0, 1)}
    return sorted(place for place in places if 0 <= place <= size)


# Random access


@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("size", [0, 1, 2, 511, 512, 513, 1024, 1025, 5000, 1 << 20])
def test_read_at_every_block(player: TapePlayer, archive: bytes, size: int) -> None:
    """`read` and `readinto` give the recorded bytes, and fewer only where the archive ends."""
    for offset in around_blocks(len(archive)):
        wanted = archive[offset : offset + size]
        assert player.read(offset, size) == wanted, offset
        buffer = bytearray(b"?" * size)
        assert player.readinto(buffer, offset) == len(wanted)
        assert buffer == wanted + b"?" * (size - len(wanted)), offset


def test_read_byte_by_byte(player: TapePlayer, archive: bytes) -> None:
    assert b"".join(player.read(offset, 1) for offset in range(len(archive))) == archive


def test_read_backwards(player: TapePlayer, archive: bytes) -> None:
    pieces = [player.read(offset, 100) for offset in reversed(range(0, len(archive), 100))]
    assert b"".join(reversed(pieces)) == archive


@pytest.mark.parametrize("beyond", [0, 1, 511, 512, 2**40, 2**63, 2**64])
def test_read_at_and_beyond_the_end(player: TapePlayer, archive: bytes, beyond: int) -> None:
    """As of any file: no bytes, and no error."""
    assert player.read(len(archive) + beyond, 100) == b""
    assert player.readinto(bytearray(100), len(archive) + beyond) == 0


def test_read_sizes_beyond_any_memory(player: TapePlayer, archive: bytes) -> None:
    """Only what there is is set aside."""
    assert player.read(100, 2**62) == archive[100:]


@pytest.mark.parametrize("offset", [-1, -512, -(2**63), -(2**70)])
def test_read_before_the_start(player: TapePlayer, offset: int) -> None:
    with pytest.raises(OffsetError, match=str(offset)):
        player.read(offset, 10)
    with pytest.raises(OffsetError, match=str(offset)):
        player.readinto(bytearray(10), offset)
    with pytest.raises(OffsetError):
        player.read(offset, 0)
    assert player.drift is None


def test_read_of_a_negative_size(player: TapePlayer) -> None:
    with pytest.raises(ValueError, match="-1"):
        player.read(0, -1)


def test_readinto_any_writable_buffer(player: TapePlayer, archive: bytes) -> None:
    """Memory of whatever element type counts by its bytes; a part of it is filled where it lies."""
    numbers = array.array("I", [7] * 200)
    assert player.readinto(numbers, 500) == 800
    assert numbers.tobytes() == archive[500:1300]
    outer = bytearray(b"?" * 1000)
    assert player.readinto(memoryview(outer)[100:600], 700) == 500
    assert outer == b"?" * 100 + archive[700:1200] + b"?" * 400
    assert player.readinto(bytearray(), 0) == 0
    assert player.readinto(array.array("I"), 0) == 0


def test_readinto_memory_that_is_not_writable(player: TapePlayer) -> None:
    with pytest.raises((TypeError, ValueError)):
        player.readinto(b"?" * 100, 0)  # type: ignore[arg-type]
    assert player.drift is None


def test_offsets_by_name(player: TapePlayer, small: Path) -> None:
    expected = Reference(small)
    for name, start in expected.starts.items():
        assert player.get_offset_of(os.fsdecode(name)) == start
        assert player.get_offset_of(os.fsdecode(name).rstrip("/")) == start
        assert player.tape.find(name).arc_path == os.fsdecode(name).rstrip("/")
    with pytest.raises(KeyError):
        player.get_offset_of("data/nothing")


# Events


@pytest.mark.usefixtures("way_to_open")
def test_play_from_every_block(player: TapePlayer, archive: bytes) -> None:
    """Joined, the events from any offset on are what a read of all the rest gives, the footer included."""
    for offset in around_blocks(len(archive)):
        joined = b"".join(event.data for event in player.play(start_offset=offset))
        assert joined == archive[offset:] == player.read(offset, len(archive)), offset


@pytest.mark.parametrize("chunk_size", [1, 511, 512, 513, 1 << 20, 1 << 40])
def test_chunk_sizes(player: TapePlayer, archive: bytes, chunk_size: int) -> None:
    """No event holds more than a chunk, none that should hold something is empty."""
    for offset in (0, 1, 600, len(archive) - 1024, len(archive) - 1):
        sent = [event.data for event in player.play(offset, chunk_size) if event.type == "file_data"]
        assert b"".join(sent) == archive[offset:]
        assert all(0 < len(data) <= chunk_size for data in sent)


def bodies(root: Path) -> dict[str, bytes | None]:
    """The content of each file of the folder by its name in the archive; None for folders and links."""
    found: dict[str, bytes | None] = {root.name: None}
    for path in root.rglob("*"):
        if ".tartape" not in path.parts:
            found[str(path.relative_to(root.parent))] = (
                None if path.is_symlink() or path.is_dir() else path.read_bytes()
            )
    return found


@pytest.mark.parametrize("chunk_size", [100, 512, 700, 1 << 20])
def test_order_of_events(player: TapePlayer, small: Path, chunk_size: int) -> None:
    """Each member is started, sent and ended before the next; the footer follows, and the end is said once."""
    expected, content = Reference(small), bodies(small)
    offset_of = {os.fsdecode(name).rstrip("/"): start for name, start in expected.starts.items()}
    stops = [*list(expected.starts.values())[1:], expected.size - 1024]
    position, open_member, ended = 0, None, []
    events = list(player.play(chunk_size=chunk_size))
    for event in events:
        match event.type:
            case "file_start":
                assert open_member is None
                open_member = event.entry
                assert event.metadata.start_offset == position == offset_of[event.entry.arc_path]
                assert event.metadata.resumed is False
                assert event.data == b""
            case "file_data":
                position += len(event.data)
                assert open_member is not None or position > expected.size - 1024
            case "file_end":
                assert event.entry == open_member
                assert event.metadata.end_offset == position == stops[len(ended)]
                assert event.metadata.is_complete is True
                body = content[event.entry.arc_path]
                assert event.metadata.md5sum == (None if body is None else hashlib.md5(body).hexdigest())
                assert event.data == b""
                ended.append(event.entry.arc_path)
                open_member = None
    assert ended == list(offset_of)
    assert [event.type for event in events].count("tape_completed") == 1
    assert events[-1].type == "tape_completed"
    assert events[-1].data == b""
    assert position == expected.size


@pytest.mark.parametrize("chunk_size", [1, 300, 1 << 20])
def test_resumed_events(player: TapePlayer, small: Path, chunk_size: int) -> None:
    """From any byte on: the member that it lies in is resumed unless it starts there, and its body hashed if whole."""
    expected, content = Reference(small), bodies(small)
    starts = {os.fsdecode(name).rstrip("/"): start for name, start in expected.starts.items()}
    for offset in around_blocks(expected.size - 1024)[:: 1 if chunk_size > 1 else 7]:
        events = player.play(start_offset=offset, chunk_size=chunk_size)
        first = next(events)
        while not isinstance(last := next(events), FileEnd):
            assert last.type in ("file_data", "tape_completed")
            if last.type == "tape_completed":
                break
        if offset == expected.size - 1024:
            assert isinstance(first, FileData)
            continue
        assert isinstance(first, FileStart)
        assert isinstance(last, FileEnd)
        name = first.entry.arc_path
        inside = offset - starts[name]
        assert first.metadata.start_offset == starts[name] <= offset < last.metadata.end_offset
        assert first.metadata.resumed == (inside > 0)
        assert last.metadata.is_complete == (inside == 0)
        body = content[name]
        hashed = body is not None and inside <= 512
        assert last.metadata.md5sum == (hashlib.md5(body or b"").hexdigest() if hashed else None), (name, inside)
        following = next((event for event in events if event.type == "file_start"), None)
        assert following is None or following.metadata.resumed is False


def test_play_at_the_end(player: TapePlayer, archive: bytes) -> None:
    """At the archive's size there is nothing to send but that it is complete."""
    assert list(player.play(start_offset=len(archive))) == [TapeCompleted()]
    for offset in (len(archive) - 1, len(archive) - 512, len(archive) - 1024):
        assert list(player.play(offset)) == [FileData(bytes(len(archive) - offset)), TapeCompleted()]


@pytest.mark.parametrize("offset", [-1, -(2**70), "beyond", 2**63, 2**70])
def test_play_outside(player: TapePlayer, archive: bytes, offset: int | str) -> None:
    """Raises at the call, not at the first event."""
    with pytest.raises(OffsetError):
        player.play(start_offset=len(archive) + 1 if isinstance(offset, str) else offset)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_play_by_no_chunks(player: TapePlayer, chunk_size: int) -> None:
    """Raises at the call."""
    with pytest.raises(ValueError, match="chunk"):
        player.play(chunk_size=chunk_size)


def test_events_are_values(player: TapePlayer) -> None:
    """Frozen, and equal where they say the same."""
    events = list(player.play())
    assert events == list(player.play())
    for event in events:
        for value in (event, getattr(event, "metadata", None)):
            for field in dataclasses.fields(value) if value else ():
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(value, field.name, None)
        if event.type in ("file_start", "file_end"):
            with pytest.raises(AttributeError):
                event.entry.size = 0
    assert {event.type for event in events} == {"file_start", "file_data", "file_end", "tape_completed"}


def test_many_plays_interleaved(player: TapePlayer, archive: bytes) -> None:
    """Any number of plays in one thread, step by step in turns, each from its own offset."""
    offsets = [0, 1, 511, 512, 5000, 9000, len(archive) - 1024, len(archive), 3000, 3000, 0, 0]
    plays = [player.play(offset, chunk_size=300) for offset in offsets]
    joined = [b""] * len(plays)
    going = set(range(len(plays)))
    while going:
        for at in sorted(going):
            event = next(plays[at], None)
            if event is None:
                going.discard(at)
            else:
                joined[at] += event.data
    assert joined == [archive[offset:] for offset in offsets]


def test_play_that_nobody_finishes(small: Path) -> None:
    """Leaves nothing open that would be in the way of closing."""
    with Tape.discover(small) as tape:
        player = TapePlayer(tape)
        plays = [player.play(chunk_size=100) for _ in range(8)]
        for play in plays:
            for _ in range(4):
                next(play)
        player.close()


def hashing_threads() -> int:
    return sum("_hash" in thread.name for thread in threading.enumerate())


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Bodies that are hashed by a thread, of whole chunks and not, between small ones."""
    root = tmp_path / "data"
    root.mkdir()
    for name, size in (("a", 3), ("b", 3 << 20), ("c", 0), ("d", (2 << 20) + 777), ("e", 1 << 18), ("f", 10)):
        (root / name).write_bytes(os.urandom(size))
    TapeRecorder(root).commit()
    return root


@pytest.mark.parametrize("chunk_size", [1 << 17, 1 << 18, 400_000, 1 << 20, 5 << 20])
def test_play_of_large_members(large: Path, chunk_size: int) -> None:
    """The sums are those of the files, from the start, from a body's first byte, and none from its second."""
    content = bodies(large)
    with Tape.discover(large) as tape, closing(TapePlayer(tape)) as player:
        archive = player.read(0, tape.total_size)
        b, d = tape.find("data/b"), tape.find("data/d")
        for offset in (0, b.start + 512, b.start + 513, b.stop - 1, d.start):
            events = list(player.play(offset, chunk_size))
            assert b"".join(event.data for event in events) == archive[offset:]
            assert all(len(event.data) <= chunk_size for event in events)
            for event in events:
                if event.type == "file_end":
                    body = content[event.entry.arc_path]
                    whole = body is not None and offset <= event.entry.start + 512
                    assert event.metadata.md5sum == (hashlib.md5(body or b"").hexdigest() if whole else None)
    assert hashing_threads() == 0


def test_play_of_a_large_member_that_nobody_finishes(large: Path) -> None:
    """Its thread ends with it: when it is closed, and when drift ends it."""
    with Tape.discover(large) as tape, closing(TapePlayer(tape)) as player:
        play = player.play(tape.find("data/b").start)
        for _ in range(3):
            next(play)
        assert hashing_threads() == 1
        play.close()
        assert hashing_threads() == 0
        play = player.play(tape.find("data/b").start)
        with pytest.raises(TapeIntegrityError):
            for event in play:
                if event.type == "file_data":
                    os.utime(large / "b", ns=(0, 0))
        assert hashing_threads() == 0


def test_members_that_a_chunk_holds_are_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 300 members by itself takes three times as long. None is divided that need not be."""
    root = tmp_path / "data"
    root.mkdir()
    for number in range(300):
        (root / f"{number:03}").write_bytes(os.urandom(4096))
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape, closing(TapePlayer(tape)) as player:
        requests = []
        readinto = player.readinto

        def counted(buffer: Any, offset: int) -> int:
            requests.append((offset, len(buffer)))
            return readinto(buffer, offset)

        monkeypatch.setattr(player, "readinto", counted)
        for chunk_size in (1 << 20, 10_000, 1 << 30):
            requests.clear()
            sent = [len(event.data) for event in player.play(chunk_size=chunk_size) if event.type == "file_data"]
            assert sent == [512] + 300 * [512 + 4096] + [1024]
            starts = {member.start for member in tape.members()} | {tape.total_size - 1024}
            assert {offset for offset, _ in requests} <= starts
            assert max(size for _, size in requests) <= min(chunk_size, 1 << 20)
            assert len(requests) <= 2 * tape.total_size / min(chunk_size, 1 << 20) + 2


# The programs that must run as they are printed

RECORD = """
recorder = TapeRecorder("./massive_dataset"); fingerprint = recorder.commit()
"""
BACKUP = """
tape = Tape.discover("./massive_dataset"); player = TapePlayer(tape, source_root="./massive_dataset")
with open("backup.tar", "wb") as f:
    for event in player.play():
        if event.type == "file_data": f.write(event.data)
"""
RESUME = """
for event in player.play(start_offset=5 * 1024**3): upload_to_cloud(event.data)
"""
WATCH = """
for event in player.play():
    if event.type == "file_start": print(event.entry.arc_path, event.metadata.start_offset)
    elif event.type == "file_end": print(event.entry.arc_path, event.metadata.md5sum)
"""
IMPORT = "from tartapefs import TapeRecorder, Tape, TapePlayer\n"


def test_printed_programs(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Record, back up, and watch, one after the other."""
    shutil.rmtree(small / ".tartape")
    root = small.rename(small.with_name("massive_dataset"))
    monkeypatch.chdir(root.parent)
    names: dict[str, object] = {}
    for program in (IMPORT, RECORD, BACKUP, WATCH):
        exec(program, names)
    expected = Reference(root)
    assert (root.parent / "backup.tar").read_bytes() == expected.read(0, expected.size)
    headers = b"".join(expected.read(start, 512) for start in expected.starts.values())
    assert names["fingerprint"] == hashlib.sha256(headers).hexdigest()
    content = bodies(root)
    lines = []
    for name, start in expected.starts.items():
        shown = os.fsdecode(name).rstrip("/")
        body = content[shown]
        lines += [f"{shown} {start}", f"{shown} {None if body is None else hashlib.md5(body).hexdigest()}"]
    assert capsys.readouterr().out.splitlines() == lines


def test_printed_program_that_resumes_far_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 5 GiB on, what is uploaded is the rest of the archive."""
    root = tmp_path / "massive_dataset"
    root.mkdir()
    for name, size in (("a", 5 * 1024**3 - 3000), ("b", 2000), ("c", 3_000_000)):
        with open(root / name, "wb") as file:
            file.truncate(size)
            file.seek(size - 1500)
            file.write(pattern(1500))
    monkeypatch.chdir(tmp_path)
    uploaded: list[bytes] = []
    names: dict[str, object] = {"upload_to_cloud": uploaded.append}
    for program in (IMPORT, RECORD, BACKUP.splitlines()[1], RESUME):
        exec(program, names)
    expected = Reference(root)
    assert b"".join(uploaded) == expected.read(5 * 1024**3, expected.size)
    assert 3_000_000 < sum(map(len, uploaded)) == expected.size - 5 * 1024**3


# Drift


def of_parent(change: Change) -> Change:
    """The change to the folder of the path."""

    def changed(path: Path) -> None:
        change(path.parent)

    changed.__name__ = f"parent_{change.__name__}"
    return changed


def of_root(change: Change) -> Change:
    """The change to the root, the folder above that of the path."""

    def changed(path: Path) -> None:
        change(path.parents[1])

    changed.__name__ = f"root_{change.__name__}"
    return changed


def move_beside(path: Path) -> None:
    path.rename(path.with_name("moved"))


replace_parent_by_link_to_a_copy = of_parent(replace_folder_by_link_to_a_copy)
move_root = of_root(move_beside)

FILE_CHANGES: dict[Change, str] = {  # and what the message must say of it
    append: "size",
    shrink: "size",
    empty: "size",
    touch: "mtime",
    touch_by_a_nanosecond: "mtime",
    chmod: "mode",
    chmod_and_back: "ctime",
    chown: "ctime",
    overwrite: "mtime",
    overwrite_keeping_times: "ctime",
    replace: "inode",
    replace_by_copy: "inode",
    replace_by_copy_keeping_folder_times: "inode",
    remove: "nothing",
    rename: "nothing",
    replace_by_link: "symbolic link",
    replace_by_link_to_a_copy: "symbolic link",
    replace_by_folder: "directory",
    replace_by_pipe: "pipe",
    replace_by_socket: "socket",
    of_parent(replace_folder_by_link): "path",
    replace_parent_by_link_to_a_copy: "",
    of_parent(replace_by_link): "path",
    of_parent(replace_by_file): "nothing",
    of_parent(remove): "nothing",
    move_root: "moved",
    of_root(replace_by_copy_of_folder): "moved",
    of_root(replace_by_link): "moved",
}


def assert_invalid(player: TapePlayer, size: int) -> None:
    """Each read of whatever place fails, by whatever way it is asked for, with the same words."""
    message = str(player.drift)
    for offset in (0, 600, size // 2, size - 1024, size - 1):
        with pytest.raises(TapeIntegrityError) as caught:
            player.read(offset, 1)
        assert str(caught.value) == message
        with pytest.raises(TapeIntegrityError):
            player.readinto(bytearray(10), offset)
        with pytest.raises(TapeIntegrityError):
            for _ in player.play(offset):
                pass


def assert_drift(player: TapePlayer, offset: int, size: int, member: str, says: str) -> None:
    """A read there raises; the line tells member, what was recorded, what was found and what to do; and it stays so."""
    assert player.drift is None
    with pytest.raises(TapeIntegrityError) as caught:
        player.read(offset, size)
    error = caught.value
    line = str(error)
    assert error.member == member
    assert line.startswith(f"{member}: ")
    assert says in line
    assert error.differences
    for difference in error.differences:
        assert f"(recorded {difference.recorded}, found {difference.found})" in line
        assert difference.what in line
        assert difference.recorded != difference.found
    assert "tartapefs record --force" in line
    assert "\n" not in line
    assert isinstance(error, RuntimeError)
    assert player.drift is not None
    assert_invalid(player, player.tape.total_size)


@pytest.mark.long(but=70)
@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("part", ["body", "end of the body", "all", "two files at once", "kept open"])
@pytest.mark.parametrize("change", FILE_CHANGES, ids=lambda change: change.__name__)
def test_drift_of_a_file(tmp_path: Path, change: Change, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a file, or the way to it, is changed: its bytes are not served, and from then on nothing is."""
    if part == "kept open":
        monkeypatch.setattr(fill, "LARGE", 3000)
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (root / "folder" / name).write_bytes(pattern(3000))
    (root / "z").write_bytes(pattern(600))
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        player = TapePlayer(tape)
        before = whole(root)
        a, b = tape.find("data/folder/a"), tape.find("data/folder/b")
        offset, size = {
            "body": (b.start + 512 + 1000, 100),
            "end of the body": (b.start + 512 + 2999, 1),
            "all": (b.start, b.stop - b.start),
            "two files at once": (a.start + 600, 3000 + 1024),
            "kept open": (b.start + 512 + 1, 1000),
        }[part]
        if part == "two files at once":  # the first one is as recorded unless the folder is not
            member = "data/folder/a" if change.__name__.startswith("parent") else "data/folder/b"
        else:
            member = "data/folder/b"
        assert player.read(offset, size) == before[offset : offset + size]
        is_kept = part == "kept open" and is_on_a_local_disk(root)
        assert open_in(root) == ([f"{root}/folder/b"] if is_kept else [])
        change(root / "folder" / "b")
        if change.__name__.startswith("root"):
            member = "data"
        assert_drift(player, offset, size, member, FILE_CHANGES[change])
        player.close()


@pytest.mark.parametrize(
    "change",
    [append, touch, chmod, chmod_and_back, replace_by_copy, remove, replace_by_link, move_root],
    ids=lambda change: change.__name__,
)
def test_drift_shows_at_the_header(player: TapePlayer, small: Path, change: Change) -> None:
    """A header is not served either once the file is not the recorded one."""
    member = player.tape.find("data/photos/512")
    change(small / "photos" / "512")
    name = "data" if change is move_root else member.arc_path
    assert_drift(player, member.start + 100, 1, name, FILE_CHANGES[change])


@pytest.mark.parametrize("change", [touch, remove, chmod, append], ids=lambda change: change.__name__)
def test_drift_of_an_empty_file(player: TapePlayer, small: Path, change: Change) -> None:
    member = player.tape.find("data/photos/0")
    change(small / "photos" / "0")
    assert_drift(player, member.start, 512, member.arc_path, FILE_CHANGES[change])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("photos", add_file, "mtime"),
        ("photos", chmod, "mode"),
        ("photos", remove, "nothing"),
        ("photos/2024", add_file, "mtime"),
        ("empty folder", add_file, "mtime"),
        ("", add_file, "mtime"),
        ("", chmod, "mode"),
        ("link", retarget, "target"),
        ("link", retarget_keeping_times, "target"),
        ("link", replace_by_file, "regular file"),
        ("link", remove, "nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_drift_of_folders_and_links(player: TapePlayer, small: Path, name: str, change: Change, says: str) -> None:
    """What has no body is judged where its header is served."""
    change(small / name)
    member = player.tape.find(f"data/{name}")
    assert_drift(player, member.start, 512, member.arc_path, says)


def test_change_back_is_drift_too(player: TapePlayer, small: Path) -> None:
    """A file that was renamed and renamed back is not the recorded one any more: it may have had visitors."""
    (small / "photos" / "512").rename(small / "away")
    (small / "away").rename(small / "photos" / "512")
    with pytest.raises(TapeIntegrityError):
        player.read(0, player.tape.total_size)


def test_root_that_was_away(player: TapePlayer, small: Path) -> None:
    """The failure is for good: the folder's return does not make the tape valid again; a new player may try."""
    small.rename(small.with_name("moved"))
    with pytest.raises(TapeIntegrityError):
        player.read(0, 10)
    small.with_name("moved").rename(small)
    assert_invalid(player, player.tape.total_size)
    again = TapePlayer(player.tape)
    assert again.drift is None
    again.close()


def test_drift_elsewhere_is_not_met(player: TapePlayer, small: Path, archive: bytes) -> None:
    """A read is judged by the members that it touches."""
    append(small / "z")
    z = player.tape.find("data/z")
    assert player.read(0, z.start) == archive[: z.start]
    with pytest.raises(TapeIntegrityError):
        player.read(0, z.start + 1)


def test_padding_is_checked(player: TapePlayer, small: Path) -> None:
    """Bytes that are always zero are those of a member nevertheless."""
    append(small / "photos" / "1")
    member = player.tape.find("data/photos/1")
    with pytest.raises(TapeIntegrityError):
        player.read(member.stop - 1, 1)


def test_drift_in_the_middle_of_a_play(player: TapePlayer, small: Path, archive: bytes) -> None:
    """What was sent before is right; no event of the changed member's bytes comes, and none after."""
    sent = b""
    with pytest.raises(TapeIntegrityError, match="data/z"):
        for event in player.play(chunk_size=512):
            if event.type == "file_start" and event.entry.arc_path == "data/link":
                append(small / "z")
            sent += event.data
    assert sent == archive[: player.get_offset_of("data/z")]


def test_drift_message_of_odd_names(tmp_path: Path) -> None:
    """One line that hides nothing, whatever the name."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "line\nbreak\x1b[31m\udcff").write_bytes(b"12")
    TapeRecorder(root).commit()
    (root / "line\nbreak\x1b[31m\udcff").write_bytes(b"123")
    with Tape.discover(root) as tape:
        player = TapePlayer(tape)
        with pytest.raises(TapeIntegrityError) as caught:
            player.read(600, 400)
        player.close()
    assert str(caught.value).isprintable()
    assert r"line\nbreak\x1b[31m\xff" in str(caught.value)
    assert "recorded 2, found 3" in str(caught.value)


# Errors that are not drift


@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.ESTALE])
def test_error_of_the_disk_is_not_drift(
    player: TapePlayer, archive: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It comes through as it is, says nothing of the tape, and the next read is served."""
    preadv, failures = os.preadv, [number]

    def failing(*arguments: object) -> int:
        if failures:
            raise OSError(failures.pop(), os.strerror(number))
        return preadv(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        player.read(0, len(archive))
    assert not isinstance(caught.value, TapeError)
    assert caught.value.errno == number
    assert player.drift is None
    assert player.read(0, len(archive)) == archive


def test_error_while_the_file_drifts(player: TapePlayer, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file is not as recorded, that is what is said."""

    def failing(*arguments: object) -> int:
        append(small / "z")
        raise OSError(errno.EIO, "the disk")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(TapeIntegrityError, match="data/z"):
        player.read(player.get_offset_of("data/z") + 512, 100)


@pytest.mark.parametrize("most", [1, 7, 511, 512])
def test_short_answers_of_the_system(
    player: TapePlayer, archive: bytes, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """What one system call gave in part is completed, in the right places."""
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert player.read(0, len(archive)) == archive
    assert player.read(700, 5000) == archive[700:5700]


def test_file_that_ends_early(player: TapePlayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that gives no more bytes of a file of the recorded size makes an error, never a short read."""
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    with pytest.raises(OSError, match="ended early") as caught:
        player.read(player.get_offset_of("data/z") + 512, 100)
    assert caught.value.errno == errno.EIO
    assert player.drift is None


@pytest.mark.usefixtures("way_to_open")
def test_too_few_descriptors(player: TapePlayer, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of descriptors is an error of this moment, not of the tape."""
    opening, failures = os.open, [True]

    def failing(*arguments: object, **options: object) -> int:
        if failures:
            failures.pop()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opening(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", failing)
    try:
        assert player.read(0, len(archive)) == archive  # by a system call that is not `os.open`
    except OSError as error:
        assert error.errno == errno.EMFILE
    failures.clear()
    assert player.drift is None
    assert player.read(0, len(archive)) == archive


# Descriptors


def is_on_a_local_disk(path: Path) -> bool:
    """Whether it lies on a file system of which large files are kept open."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True).stdout.strip()
    return kind in ("ext2/ext3", "xfs", "btrfs", "tmpfs", "f2fs", "zfs", "bcachefs")


@pytest.mark.usefixtures("way_to_open")
def test_no_file_stays_open(player: TapePlayer, small: Path, archive: bytes) -> None:
    """Between two reads nothing in the source is open, so an idle archive is in nobody's way."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for offset in range(0, len(archive), 700):
        player.read(offset, 1500)
        assert open_in(small) == []
    for event in player.play(chunk_size=400):
        assert event.type
        assert open_in(small) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A recorded folder with large files, at depths from the root on to where none is kept open."""
    root = tmp_path / "deep"
    for depth in range(6):
        place = root.joinpath(*"abcde"[:depth])
        place.mkdir()
        (place / "file").write_bytes(random.Random(depth).randbytes((1 << 20) + 700 * depth))
    TapeRecorder(root).commit()
    return root


@pytest.mark.usefixtures("way_to_open")
def test_large_files_stay_open_while_they_are_read(deep: Path) -> None:
    """From one part to the next; not beyond the last one, nor beyond `rest`, nor where that would not be faster."""
    reference = Reference(deep)
    with Tape.discover(deep) as tape, closing(TapePlayer(tape)) as player:
        for depth in range(6):
            path = deep.joinpath(*"abcde"[:depth], "file")
            start = reference.starts[f"deep/{path.relative_to(deep)}".encode()] + 512
            for at in (start + 9999, start, start + 5, start + 600_000):
                assert player.read(at, 4096) == reference.read(at, 4096)
                assert open_in(deep) == ([str(path)] if depth < 4 and is_on_a_local_disk(deep) else [])
            size = path.stat().st_size
            assert player.read(start + 4096, size - 4096) == path.read_bytes()[4096:]
            assert open_in(deep) == []
        for depth in (2, 0, 1):
            start = reference.starts[f"deep/{'a/b/'[: 2 * depth]}file".encode()] + 512
            assert player.read(start, 700) == reference.read(start, 700)
        assert len(open_in(deep)) == 3 * is_on_a_local_disk(deep)
        player.rest()
        assert open_in(deep) == []
        assert b"".join(event.data for event in player.play()) == reference.read(0, reference.size)
        assert open_in(deep) == []
        assert player.read(start, 700) == reference.read(start, 700)
        assert len(open_in(deep)) == is_on_a_local_disk(deep)
    assert open_in(deep) == []


def test_large_files_kept_by_many_threads(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a descriptor for itself while it reads; of those of all no more stay than are kept."""
    monkeypatch.setattr(kept, "_CAPACITY", 2)
    reference = Reference(deep)

    def read(seed: int) -> None:
        some = random.Random(seed)
        for _ in range(500):
            at, size = some.randrange(reference.size - 1024), some.randrange(1, 5000)
            assert player.read(at, size) == reference.read(at, size)[: tape.total_size - at]

    with Tape.discover(deep) as tape, closing(TapePlayer(tape)) as player:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(16)))
        assert len(open_in(deep)) <= 2
    assert open_in(deep) == []


@pytest.mark.root
@pytest.mark.needs("bindfs")
def test_no_file_stays_open_where_others_change_it(deep: Path, tmp_path: Path) -> None:
    """On a network file system, or any other that answers for itself, each read opens its file."""
    (tmp_path / "bound").mkdir()
    subprocess.run(["bindfs", deep.parent, tmp_path / "bound"], check=True)
    try:
        root = tmp_path / "bound" / "deep"
        with Tape.discover(root) as tape, closing(TapePlayer(tape)) as player:
            start = tape.find("deep/file").start + 512
            assert player.read(start, 700) == (deep / "file").read_bytes()[:700]
            assert open_in(root) == []
    finally:
        subprocess.run(["umount", tmp_path / "bound"], check=True)


def test_a_kept_file_that_is_read_short(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call may give less than it was asked for."""
    whole, content = os.preadv, (deep / "file").read_bytes()
    with Tape.discover(deep) as tape, closing(TapePlayer(tape)) as player:
        start = tape.find("deep/file").start + 512
        assert player.read(start, 1000) == content[:1000]
        assert len(open_in(deep)) == is_on_a_local_disk(deep)
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][: -(-len(views[0]) // 2)]], at))
        assert player.read(start + 5, 1000) == content[5:1005]


def test_no_way_leads_by_a_link(deep: Path) -> None:
    """Not even to the very file: nothing is kept that was opened in the instant in which a folder became a link."""
    with closing(source.Source(str(deep))) as folder:
        way = [os.fsencode(deep / below) for below in ("", "a", "a/b", "a/b/file")]
        assert [place for place, _, _ in folder.resolve(b"a/b/file")] == (way if is_on_a_local_disk(deep) else [])
        (deep / "a").rename(deep / "moved")
        (deep / "a").symlink_to("moved")
        with pytest.raises(NotADirectoryError):
            folder.resolve(b"a/b/file")


@pytest.mark.parametrize("way", [replace, replace_by_copy_keeping_folder_times], ids=lambda way: way.__name__)
def test_a_kept_file_hides_no_other(deep: Path, way: Change) -> None:
    """Where inodes do not count: what has the name now is read, or found to be another."""
    with Tape.discover(deep) as tape, closing(TapePlayer(tape, check="mtime")) as player:
        start = tape.find("deep/file").start + 512
        old = player.read(start, 1000)
        with times_kept(deep / "file"):
            way(deep / "file")
            overwrite(deep / "file", data=b"other bytes")
        assert player.read(start + 1, 999) == b"ther bytes" + (deep / "file").read_bytes()[11:1000]
        assert player.read(start, 1000) != old


@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("change", FILE_CHANGES, ids=lambda change: change.__name__)
def test_no_file_stays_open_after_drift(tmp_path: Path, change: Change) -> None:
    """A read that fails closes what it opened."""
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (root / "folder" / name).write_bytes(pattern(3000))
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        player = TapePlayer(tape)
        change(root / "folder" / "b")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(TapeIntegrityError):
            player.read(0, tape.total_size)
        assert len(os.listdir("/proc/self/fd")) == before
        player.close()


# Places


@pytest.mark.usefixtures("way_to_open")
def test_copied_tape(small: Path, tmp_path: Path, archive: bytes) -> None:
    """A folder that was copied with its tape plays; inodes and times of change are not compared there."""
    copy = tmp_path / "elsewhere" / "data"
    copy.parent.mkdir()
    subprocess.run(["cp", "-a", small, copy], check=True)
    with Tape.discover(copy) as tape:
        player = TapePlayer(tape)
        assert not player.at_home
        assert player.read(0, tape.total_size) == archive
        for harmless in (chmod_and_back, replace_by_copy_keeping_folder_times):
            harmless(copy / "photos" / "513")
            assert player.read(0, tape.total_size) == archive
        touch(copy / "photos" / "513")
        with pytest.raises(TapeIntegrityError, match="mtime"):
            player.read(0, tape.total_size)
        player.close()


@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("change", [replace_by_link_to_a_copy, replace_parent_by_link_to_a_copy, replace_by_pipe],
                         ids=lambda change: change.__name__)  # fmt: skip
def test_no_link_is_followed_in_a_copy(small: Path, tmp_path: Path, change: Change) -> None:
    """Nor where no inode tells the difference."""
    copy = tmp_path / "elsewhere" / "data"
    copy.parent.mkdir()
    subprocess.run(["cp", "-a", small, copy], check=True)
    with Tape.discover(copy) as tape:
        player = TapePlayer(tape)
        change(copy / "photos" / "513")
        with pytest.raises(TapeIntegrityError):
            player.read(tape.find("data/photos/513").start + 512, 100)
        player.close()


def test_at_home(player: TapePlayer, small: Path, tmp_path: Path, archive: bytes) -> None:
    """At home it is where both the folder and the index are the recorded ones, moved or not."""
    assert player.at_home
    moved = small.rename(tmp_path / "moved")
    with Tape.discover(moved) as tape:
        other = TapePlayer(tape)
        assert other.at_home
        other.close()
    shutil.copy(moved / ".tartape" / "index.db", tmp_path / "index.db")
    with Tape.from_index(tmp_path / "index.db") as tape:
        other = TapePlayer(tape, source_root=moved)
        assert not other.at_home
        other.close()
    assert len(archive) == player.tape.total_size


def test_unknown_source(small: Path, tmp_path: Path, archive: bytes) -> None:
    """An index alone does not tell where its folder is; who names it plays it."""
    shutil.copy(small / ".tartape" / "index.db", tmp_path / "index.db")
    with Tape.from_index(tmp_path / "index.db") as tape:
        with pytest.raises(TapeError, match="source"):
            TapePlayer(tape)
        with pytest.raises(FileNotFoundError):
            TapePlayer(tape, source_root=tmp_path / "missing")
        player = TapePlayer(tape, source_root=str(small))
        assert player.read(0, tape.total_size) == archive
        player.close()


def test_source_given_by_a_link(small: Path, tmp_path: Path, archive: bytes) -> None:
    """The folder that the link leads to at the time of opening is the source."""
    (tmp_path / "link").symlink_to(small)
    with Tape.discover(tmp_path / "link") as tape:
        player = TapePlayer(tape, source_root=tmp_path / "link")
        (tmp_path / "link").unlink()
        assert player.read(0, tape.total_size) == archive
        player.close()


def test_another_folder_is_not_the_source(small: Path, tmp_path: Path) -> None:
    """A tape played from a folder that only looks alike fails before any byte of it."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "z").write_bytes(pattern(1500))
    with Tape.discover(small) as tape:
        player = TapePlayer(tape, source_root=other)
        with pytest.raises(TapeIntegrityError):
            player.read(tape.find("data/z").start + 512, 10)
        player.close()


def test_player_closes_its_own(small: Path) -> None:
    """The player closes the source, the tape stays open; closing twice does no harm."""
    with Tape.discover(small) as tape:
        player = TapePlayer(tape)
        player.close()
        player.close()
        assert tape.find("data/z")


def test_many_kinds_of_reads_at_once(player: TapePlayer, small: Path) -> None:
    """A slow reader of the first bytes and a fast one of the last see a change at their own next read."""
    slow = player.play(chunk_size=1)
    for _ in range(10):
        next(slow)
    time.sleep(0.01)
    touch(small / "z")
    with pytest.raises(TapeIntegrityError):
        list(player.play(start_offset=player.get_offset_of("data/z")))
    with pytest.raises(TapeIntegrityError):
        next(slow)


@pytest.mark.parametrize("kept", ["generator", "None"])
def test_a_play_left_in_the_middle_does_not_hold_up_the_end(tmp_path: Path, kept: str) -> None:
    """From Python 3.13 on the thread that takes a digest is not there any more when the generator is closed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "large").write_bytes(bytes(3 << 20))
    program = (
        IMPORT + f"TapeRecorder({str(tmp_path / 'data')!r}).commit()\n"
        f"generator = TapePlayer(Tape.discover({str(tmp_path / 'data')!r})).play()\n"
        "while not next(generator).data: pass\n"
        f"import builtins; builtins.kept = {kept}\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
