"""`play()`: the archive in order. A helper is forked only from a process of one thread, so those tests run programs."""

import hashlib
import os
import random
import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support import changes
from support.programs import needs_two_cores
from support.recordings import around_blocks, bodies
from support.reference import Reference

from tartapefs import (
    FileData,
    OffsetError,
    Tape,
    TapeCompleted,
    TapeIntegrityError,
    TapePlayer,
    TapeRecorder,
)
from tartapefs.verify.seal import seal


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 files of up to 3,000 bytes, links, empty folders, and a file that no chunk holds. Not to be changed."""
    root, some = tmp_path_factory.mktemp("stream") / "data", random.Random(1)
    for number in range(3000):
        folder = root / f"{number // 100:02}"
        if number % 100 == 0:
            (folder / "empty").mkdir(parents=True)
            (folder / "link").symlink_to("nowhere")
        (folder / f"{number}.bin").write_bytes(some.randbytes(some.randrange(3000)))
    (root / "15" / "large").write_bytes(some.randbytes(3_000_001))
    TapeRecorder(root).commit()
    return root


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, made without the code under test."""
    path, reference = tmp_path_factory.mktemp("expected") / "archive.tar", Reference(source)
    path.write_bytes(reference.read(0, reference.size))
    return path


BEGIN = """
import hashlib, os, signal, sys
from pathlib import Path
from tartapefs import Tape, TapeIntegrityError, TapePlayer
root, expected = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
tape = Tape.discover(root, *sys.argv[3:])
player = TapePlayer(tape, root)
helper_of = lambda player: player._strategy._helper and player._strategy._helper._pid
"""


END = """
player.close()
tape.close()
try:
    os.wait()
except ChildProcessError:
    print("no process is left")
"""


def passes(program: str, *arguments: Path) -> None:
    """It runs to its end without a word on standard error, and leaves no process behind."""
    text = BEGIN + textwrap.dedent(program) + END
    result = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "no process is left\n")


ALL = """
def play(offset, chunk_size):
    position, helpers, sums = offset, set(), 0
    for event in player.play(offset, chunk_size, processes=2):
        helpers.add(helper_of(player))
        assert event.data == expected[position : position + len(event.data)], position
        assert len(event.data) <= chunk_size
        position += len(event.data)
        if event.type == "file_end":
            assert event.metadata.is_complete == (offset <= event.entry.start)
            body = event.entry.start + 512
            if event.entry.is_file and offset <= body:
                assert event.metadata.md5sum == hashlib.md5(expected[body : body + event.entry.size]).hexdigest()
                sums += 1
            else:
                assert event.metadata.md5sum is None
    assert position == len(expected)
    return helpers - {None}, sums

for chunk_size in (1 << 20, 100_000, 5 << 20):
    helpers, sums = play(0, chunk_size)
    assert len(helpers) == 1 and sums == 3001
for offset in (1, 512, 513, 1_000_001, len(expected) // 2, len(expected) - 20_000):
    assert len(play(offset, 1 << 20)[0]) == 1
    assert helper_of(player) is None
"""


@needs_two_cores
def test_all_bytes_and_sums(source: Path, expected: Path) -> None:
    """In chunks of all sizes, from any byte on, and as many sums as there are files."""
    passes(ALL, source, expected)


@needs_two_cores
def test_of_a_sealed_tape(source: Path, expected: Path, tmp_path: Path) -> None:
    index = tmp_path / "sealed.db"
    TapeRecorder(source, index).commit()
    with Tape.discover(source, index) as tape, closing(TapePlayer(tape, source)) as player:
        seal(tape, player.source, player.at_home)
    passes(ALL, source, expected, index)


@needs_two_cores
def test_a_helper_takes_a_part(source: Path, expected: Path) -> None:
    """Of the sums, too: they are its own work while a chunk is handed out."""
    program = """
    import time
    from tartapefs.play import playback as stream
    summed, together = [0, 0], stream._play_group
    def counted(members, position, chunk, sums, first_summed):
        for member in members:
            summed[member.start >= first_summed] += 1
        return together(members, position, chunk, sums, first_summed)
    stream._play_group = counted
    for event in player.play(processes=2):
        if event.type == "file_start" and event.entry.is_directory:
            time.sleep(0.02)
    assert sum(summed) == 3000 + 30 + 30 + 30 + 1, summed
    assert summed[1] > 300, summed
    """
    passes(program, source, expected)


@needs_two_cores
def test_a_stream_that_nobody_finishes(source: Path, expected: Path) -> None:
    """The helper ends with it."""
    program = """
    play = player.play(processes=2)
    for _ in range(100):
        next(play)
    assert helper_of(player)
    play.close()
    assert helper_of(player) is None
    for event in player.play(processes=2):
        if event.type == "file_end":
            break
    del play, event
    """
    passes(program, source, expected)


@needs_two_cores
def test_two_streams_and_reads_beside(source: Path, expected: Path) -> None:
    """The first one has the helper; none gets another's bytes."""
    program = """
    positions, some = [0, 0], 7
    streams = [player.play(processes=2), player.play(0, 70_000, processes=2)]
    while True:
        for number, stream in enumerate(streams):
            for event in stream:
                at = positions[number]
                assert event.data == expected[at : at + len(event.data)]
                positions[number] += len(event.data)
                break
            else:
                assert positions[number] == len(expected)
                streams[number] = ()
        if streams == [(), ()]:
            break
        some = some * 48271 % (2**31 - 1)
        if some % 50 == 0:
            at = some % len(expected)
            assert player.read(at, 300_000) == expected[at : at + 300_000]
    """
    passes(program, source, expected)


@needs_two_cores
def test_a_helper_that_is_killed(source: Path, expected: Path) -> None:
    """Its part is done here."""
    program = """
    position = ended = 0
    for event in player.play(processes=2):
        if position > 500_000 and not ended:
            ended = 1
            os.kill(helper_of(player), signal.SIGKILL)
        assert event.data == expected[position : position + len(event.data)]
        position += len(event.data)
        if event.type == "file_end" and event.entry.is_file:
            body = event.entry.start + 512
            assert event.metadata.md5sum == hashlib.md5(expected[body : body + event.entry.size]).hexdigest()
    assert position == len(expected) and ended
    """
    passes(program, source, expected)


@needs_two_cores
def test_drift_in_the_next_chunk(tmp_path: Path) -> None:
    """Whichever of both meets it: every byte before the chunk is right, and the culprit is named."""
    root = tmp_path / "data"
    root.mkdir()
    for number in range(2100):
        (root / f"{number:04}").write_bytes(os.urandom(3000))
    TapeRecorder(root).commit()
    archive, reference = tmp_path / "archive.tar", Reference(root)
    archive.write_bytes(reference.read(0, reference.size))
    program = """
    changed = position = 0
    try:
        for event in player.play(processes=2):
            assert event.data == expected[position : position + len(event.data)]
            position += len(event.data)
            if position > 2_000_000 and not changed:
                changed = root / "1500"
                changed.write_bytes(b"another")
        raise SystemExit("no drift was seen")
    except TapeIntegrityError as error:
        assert error.member == "data/1500", error
    culprit = tape.find("data/1500")
    assert culprit.start - (1 << 20) < position <= culprit.start
    try:
        next(player.play(processes=2))
    except TapeIntegrityError:
        pass
    """
    passes(program, root, archive)


@needs_two_cores
def test_a_process_with_threads_is_not_forked(source: Path, expected: Path) -> None:
    program = """
    import threading
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    assert b"".join(event.data for event in player.play(processes=2)) == expected
    for _ in player.play(processes=2):
        assert helper_of(player) is None
    event.set()
    thread.join()
    """
    passes(program.replace("event.data for event in", "e.data for e in"), source, expected)


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
