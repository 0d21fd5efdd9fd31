"""The CRC of an archive from pieces in any order, by several threads, over sessions."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.digests import slow_crc

from tartapefs.base import crc
from tartapefs.base.crc import SIZES, CrcAlgorithm
from tartapefs.transfer import crc_digest
from tartapefs.transfer.crc_digest import CrcDigest


def crc_from(archive: bytes, start: int, stop: int) -> int:
    return int(slow_crc("crc64nvme", archive[start:stop]), 16)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_in_any_order_with_repeats_and_cuts(data: st.DataObject) -> None:
    """Pieces at random, some twice, saved and loaded and cut back between them: missing is what was not given, and with
    that the CRC is right."""
    algorithm: CrcAlgorithm = data.draw(st.sampled_from(list(SIZES)))
    archive = random.Random(1).randbytes(data.draw(st.integers(1, 3000)))
    size = len(archive)
    mark = data.draw(st.none() | st.integers(1, size))
    digest, there = CrcDigest(algorithm, size, mark), set[int]()
    for _ in range(data.draw(st.integers(0, 12))):
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, size))
            piece = data.draw(st.sampled_from((archive[at : at + 1000], archive[at:] + b"beyond")))
            digest.add(at, piece)
            there |= set(range(at, min(at + len(piece), size)))
        else:
            saved = json.loads(json.dumps(digest.save()))
            if mark is not None and data.draw(st.booleans()):
                saved = CrcDigest.cut_back(saved, mark)
                there = {byte for byte in there if byte < mark}
            digest = CrcDigest(algorithm, size, mark)
            digest.load(saved)
        missing = list(digest.missing())
        assert missing == sorted(missing)
        assert there == set(range(size)).difference(*(range(*gap) for gap in missing))
        if missing:
            with pytest.raises(ValueError, match="missing"):
                digest.hexdigest()
    for start, stop in digest.missing():
        digest.add(start, archive[start:stop])
    assert digest.hexdigest() == slow_crc(algorithm, archive)
    assert len(digest.save()["segments"]) == (1 if mark in (None, size) else 2)


def test_segments_of_others() -> None:
    """What workers computed is joined, in any order, and never twice."""
    archive = random.Random(2).randbytes(10_000)
    bounds = [0, 1, 512, 4096, 9999, 10_000]
    digest = CrcDigest("crc64nvme", len(archive))
    pieces = list(pairwise(bounds))
    for start, stop in (pieces[3], pieces[0], pieces[4], pieces[2], pieces[1]):
        assert digest.join(start, stop, crc_from(archive, start, stop))
    assert not digest.join(511, 513, 0) and not digest.join(0, 1, 0)
    assert digest.hexdigest() == slow_crc("crc64nvme", archive)


def test_two_threads_give_the_same_bytes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each computes before the other has joined: no byte counts twice, none is lost."""
    archive = random.Random(3).randbytes(3000)
    computing, real = threading.Barrier(2, timeout=30), crc.crc_of("crc32c")
    first = threading.local()

    def update(data: bytes, before: int) -> int:
        if not getattr(first, "was", False):
            first.was = True
            computing.wait()
        return real.update(data, before)

    monkeypatch.setattr(crc_digest, "crc_of", lambda algorithm: crc.Crc(4, update, real.join))
    digest = CrcDigest("crc32c", len(archive))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda at: digest.add(at, archive[at : at + 2000]), (0, 1000)))
    assert digest.hexdigest() == slow_crc("crc32c", archive)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces with gaps between them, beyond the most that are kept: they stay missing, and are asked for."""
    monkeypatch.setattr(crc_digest, "_MOST_SEGMENTS", 3)
    archive = random.Random(4).randbytes(1000)
    digest = CrcDigest("crc32c", len(archive))
    for at in range(0, 1000, 100):
        digest.add(at, archive[at : at + 50])
    assert len(digest.save()["segments"]) == 3
    assert list(digest.missing()) == [(50, 100), (150, 200), (250, 1000)]
    digest.add(250, archive[250:300])  # what continues a segment is taken
    for start, stop in digest.missing():
        digest.add(start, archive[start:stop])
    assert digest.hexdigest() == slow_crc("crc32c", archive)


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"segments": [[0, 10]]},
        {"segments": [[0, 11, 0]]},
        {"segments": [[-1, 5, 0]]},
        {"segments": [[5, 5, 0]]},
        {"segments": [[0, 5, 1 << 32]]},
        {"segments": [[0, 5, -1]]},
        {"segments": [[0, 5, 0], [4, 6, 0]]},
        {"segments": [["0", 5, 0]]},
        {"segments": 3},
    ],
)
def test_what_was_never_saved(saved: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        CrcDigest("crc32c", 10).load(saved)
