"""`play()` with a helper, which is forked only from a process of one thread: these tests run programs."""

import os
import random
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest
from support.programs import needs_two_cores
from support.reference import Reference

from tartapefs import (
    Tape,
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
