"""`play()`: the archive in order, from any offset, in chunks of any size."""

import hashlib
import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support import changes
from support.recordings import around_blocks, bodies

from tartapefs import (
    FileData,
    OffsetError,
    Tape,
    TapeCompleted,
    TapeIntegrityError,
    TapePlayer,
    TapeRecorder,
)


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


def test_drift_in_the_middle_of_a_play(player: TapePlayer, small: Path, archive: bytes) -> None:
    """What was sent before is right; no event of the changed member's bytes comes, and none after."""
    sent = b""
    with pytest.raises(TapeIntegrityError, match="data/z"):
        for event in player.play(chunk_size=512):
            if event.type == "file_start" and event.entry.arc_path == "data/link":
                changes.append(small / "z")
            sent += event.data
    assert sent == archive[: player.get_offset_of("data/z")]


@pytest.mark.parametrize("kept", ["generator", "None"])
def test_a_play_left_in_the_middle_does_not_hold_up_the_end(tmp_path: Path, kept: str) -> None:
    """From Python 3.13 on the thread that takes a digest is not there any more when the generator is closed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "large").write_bytes(bytes(3 << 20))
    program = (
        "from tartapefs import Tape, TapePlayer, TapeRecorder\n"
        f"TapeRecorder({str(tmp_path / 'data')!r}).commit()\n"
        f"generator = TapePlayer(Tape.discover({str(tmp_path / 'data')!r})).play()\n"
        "while not next(generator).data: pass\n"
        f"import builtins; builtins.kept = {kept}\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
