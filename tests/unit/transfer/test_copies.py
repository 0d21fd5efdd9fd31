"""How far a copy agrees, found in every way that one can be broken: by all bytes, and by samples."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.copies import first_wrong

from tartapefs import Tape, TapePlayer
from tartapefs.archive.layout import Segment
from tartapefs.transfer import copies
from tartapefs.transfer.copies import Agreement, Copy, compare, sample


@pytest.fixture(scope="module")
def player(recorded: Path) -> Iterator[TapePlayer]:
    with Tape.discover(recorded) as tape:
        player = TapePlayer(tape)
        yield player
        player.close()


@pytest.fixture(autouse=True)
def at_rest(player: TapePlayer) -> Iterator[None]:
    """A file that a test read in part is open no longer than the test takes."""
    yield
    player.rest()


@pytest.fixture
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides so small that the sample of a small archive is one of places."""
    monkeypatch.setattr(copies, "STRIDE", 64 << 10)
    monkeypatch.setattr(copies, "TAIL", 128 << 10)
    monkeypatch.setattr(copies, "CHUNK", 16 << 10)


def both(player: TapePlayer, path: Path) -> tuple[Agreement, Agreement]:
    with Copy(os.fspath(path)) as copy:
        return compare(player, copy), sample(player.tape, player, copy)


DAMAGES: dict[str, Callable[[bytearray], object]] = {
    "complete": lambda copy: None,
    "empty": lambda copy: copy.clear(),
    "one byte": lambda copy: copy.__delitem__(slice(1, None)),
    "part of a header": lambda copy: copy.__delitem__(slice(700, None)),
    "part of a body": lambda copy: copy.__delitem__(slice(1_234_567, None)),
    "without its footer": lambda copy: copy.__delitem__(slice(-1024, None)),
    "without its last byte": lambda copy: copy.__delitem__(slice(-1, None)),
    "zeros from a body on": lambda copy: copy.__setitem__(slice(777_777, None), bytes(len(copy) - 777_777)),
    "zeros from a header on": lambda copy: copy.__setitem__(slice(515, None), bytes(len(copy) - 515)),
    "zeros from before zeros of its own on": lambda copy: copy.__setitem__(slice(-2_205_024, None), bytes(2_205_024)),
    "zeros from shortly before zeros of its own on": lambda copy: copy.__setitem__(
        slice(-2_015_024, None),
        bytes(2_015_024),  # between the last sample before them and the first one in them
    ),
    "all zeros": lambda copy: copy.__setitem__(slice(0, None), bytes(len(copy))),
    "other bytes from a body on": lambda copy: copy.__setitem__(slice(3_000_001, None), b"x" * (len(copy) - 3_000_001)),
    "beyond": lambda copy: copy.extend(b"and more"),
    "far beyond": lambda copy: copy.extend(bytes(3_000_000)),
    "the last byte": lambda copy: copy.__setitem__(-1, 7),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("places", [False, True])
def test_first_wrong_byte(
    player: TapePlayer, archive: bytes, tmp_path: Path, damage: str, places: bool, request: pytest.FixtureRequest
) -> None:
    """A transfer that broke off: found exactly, by every byte and in places."""
    if places:
        request.getfixturevalue("in_small_steps")
    copy = bytearray(archive)
    DAMAGES[damage](copy)
    (tmp_path / "copy").write_bytes(copy)
    wrong = first_wrong(copy, archive)
    good = min(len(copy), len(archive)) if wrong is None else wrong
    whole, sampled = both(player, tmp_path / "copy")
    for found in whole, sampled:
        assert (found.size, found.total_size, found.good, found.wrong) == (len(copy), len(archive), good, wrong)
        assert found.is_complete == (copy == archive)
        assert found.beyond == max(0, len(copy) - len(archive))
    assert all(not any(copy[start:stop]) and copy[start:stop] != archive[start:stop] for start, stop in whole.zeros)
    assert bool(whole.zeros) == ("zeros" in damage)
    if whole.zeros:
        assert whole.zeros[0][0] <= good and whole.zeros[-1][1] == len(copy)
    assert sampled.zeros == (whole.zeros if sampled.exact else ())


def test_zeros_in_the_middle(player: TapePlayer, archive: bytes, tmp_path: Path, in_small_steps: None) -> None:
    """What rsync leaves after a read that failed and then went well: each run, to the byte, where all is compared."""
    copy = bytearray(archive)
    runs = [(262_144, 524_288), (1_000_000, 1_300_000), (5_200_000, 5_600_000)]
    for start, stop in runs:
        copy[start:stop] = bytes(stop - start)
    (tmp_path / "copy").write_bytes(copy)
    whole, sampled = both(player, tmp_path / "copy")
    for found in whole, sampled:
        assert found.good == found.wrong == first_wrong(copy, archive)
    assert len(whole.zeros) == 3
    for (start, stop), (low, high) in zip(whole.zeros, runs, strict=True):
        assert not any(copy[start:stop]) and start <= low + 3 and stop >= high
    assert sampled.zeros == () and not sampled.exact


def test_a_hole_that_no_stride_meets(player: TapePlayer, archive: bytes, tmp_path: Path, in_small_steps: None) -> None:
    """Never written, as after a preallocation: the file system says so."""
    path = tmp_path / "copy"
    path.write_bytes(archive)
    low = 1_114_112 + 8192
    try:
        subprocess.run(["fallocate", "-p", "-o", str(low), "-l", "8192", path], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        with open(path, "r+b") as file:  # a file system without: write around it
            file.truncate(low)
            file.seek(low + 8192)
            file.write(archive[low + 8192 :])
    with Copy(os.fspath(path)) as copy:
        assert (low, low + 8192) in list(copy.holes(0, len(archive)))
    for found in both(player, path):
        assert found.good == found.wrong == first_wrong(path.read_bytes(), archive)


def test_what_the_places_miss_the_whole_finds(
    player: TapePlayer, archive: bytes, tmp_path: Path, in_small_steps: None
) -> None:
    """One byte in a body between two places: the documented limit."""
    copy = bytearray(archive)
    copy[1_100_000] ^= 1
    (tmp_path / "copy").write_bytes(copy)
    whole, places = both(player, tmp_path / "copy")
    assert whole.wrong == whole.good == 1_100_000 and whole.exact
    assert places.wrong is None and places.is_complete and not places.exact
    assert places.compared < len(archive) / 3


@settings(max_examples=80, deadline=None)
@given(st.data())
@pytest.mark.long
def test_any_break(
    player: TapePlayer, archive: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Good to any byte, then nothing, zeros or rubbish to any size: both give the prefix, and never too long a one."""
    good = data.draw(st.integers(0, len(archive)))
    size = data.draw(st.integers(good, len(archive) + 2000))
    rest = size - good
    filling = data.draw(st.sampled_from([bytes(rest), random.Random(good).randbytes(rest)]))
    copy = archive[:good] + filling
    path = tmp_path_factory.getbasetemp() / "any-break"
    path.write_bytes(copy)
    wrong = first_wrong(copy, archive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "STRIDE", 64 << 10)
        patch.setattr(copies, "TAIL", 128 << 10)
        patch.setattr(copies, "CHUNK", 16 << 10)
        whole, places = both(player, path)
    real = min(size, len(archive)) if wrong is None else wrong
    assert (whole.good, whole.wrong) == (real, wrong)
    assert places.good <= real
    if places.good < real:  # only where the tape has nothing but zeros, of which a place says nothing
        assert not any(archive[places.good : real - 4096])


def test_segments_are_told_right(player: TapePlayer, archive: bytes) -> None:
    """The report's last line of help for each kind of segment."""
    kinds = {str(player.tape.segment_at(at).kind) for at in range(0, len(archive), 100)}
    assert kinds == {"header", "body", "padding", "footer"}
    assert isinstance(player.tape.segment_at(0), Segment)
