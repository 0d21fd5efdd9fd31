"""What is kept of requests, against a bitmap of every byte; and that it stays small whatever is read."""

import random
import threading
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartapefs.mount import read_statistics as module
from tartapefs.mount.read_statistics import MAX_RANGES, Coverage, ReadStatistics

SIZE = 300
RANGES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 40)))


def covered(ranges: list[tuple[int, int]]) -> set[int]:
    return {at for start, stop in ranges for at in range(start, stop)}


@given(st.lists(RANGES))
def test_ranges_are_those_of_the_bytes(batches: list[list[tuple[int, int]]]) -> None:
    """Exactly the bytes that were delivered, in as few ranges as there can be, sorted."""
    coverage, expected = Coverage(), set()
    for batch in batches:
        coverage.include([at for at, _ in batch], [at + size for at, size in batch])
        expected |= covered([(at, at + size) for at, size in batch])
        assert covered(coverage.ranges) == expected
        assert coverage.size == len(expected)
        flat = [at for pair in coverage.ranges for at in pair]
        assert flat == sorted(set(flat)), "no range is empty, and none touches the next"
    assert coverage.unsure == 0


@given(st.lists(RANGES), st.integers(1, 5))
def test_too_many_ranges_are_joined_and_that_is_told(batches: list[list[tuple[int, int]]], most: int) -> None:
    """Never a byte too few; and those that are too many are at most as many as is said."""
    expected: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_RANGES", most)
        coverage = Coverage()
        for batch in batches:
            coverage.include([at for at, _ in batch], [at + size for at, size in batch])
            expected |= covered([(at, at + size) for at, size in batch])
            assert len(coverage.ranges) <= most
            assert expected <= covered(coverage.ranges)
            assert len(covered(coverage.ranges) - expected) <= coverage.unsure


def test_the_smallest_gaps_are_closed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_RANGES", 2)
        coverage = Coverage()
        coverage.include([0, 20, 100, 140], [10, 30, 110, 150])
    assert coverage.ranges == [(0, 30), (100, 150)]
    assert coverage.unsure == 10 + 30


def test_nothing_was_delivered() -> None:
    activity = ReadStatistics()
    activity.delivered(activity.opened(1), 100, 0)  # a read at the archive's end
    delivered, coverage, readers = activity.snapshot()
    assert (delivered, coverage.ranges, coverage.size, len(readers)) == (0, [], 0, 1)
    assert readers[0].rate(time.monotonic()) == 0
    assert readers[0].seconds_left(time.monotonic(), 1000) is None


@pytest.mark.long
def test_memory_is_bounded_whatever_is_read() -> None:
    """Random small reads of 10 TB: the worst for ranges; and handles that come and go."""
    chosen = random.Random(1)
    activity = ReadStatistics()
    handle = activity.opened(1)
    tracemalloc.start()
    try:
        peaks = []
        for _ in range(4):
            tracemalloc.reset_peak()
            for _ in range(20_000):
                activity.delivered(handle, chosen.randrange(10 << 40), 4096)
            activity.closed(activity.opened(2))
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    delivered, coverage, readers = activity.snapshot()
    assert delivered == 80_000 * 4096
    assert len(coverage.ranges) <= MAX_RANGES
    assert len(readers) == 1
    assert max(peaks) < 1.1 * peaks[0] < 16_000_000


def test_readers_in_many_threads_and_one_who_asks() -> None:
    """No request is lost or counted twice, whoever works them out."""
    activity = ReadStatistics()
    ended = threading.Event()

    def read(number: int) -> None:
        handle = activity.opened(number)
        for at in range(20_000):
            activity.delivered(handle, (at * 4 + number) * 10, 10)

    def ask() -> None:
        while not ended.is_set():
            delivered, coverage, _ = activity.snapshot()
            assert coverage.size - coverage.unsure <= delivered

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    asking = threading.Thread(target=ask)
    for thread in (*threads, asking):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    asking.join()
    delivered, coverage, readers = activity.snapshot()
    assert delivered == 800_000
    assert (coverage.ranges[0][0], coverage.ranges[-1][1]) == (0, 800_000)
    assert [reader.last.delivered for reader in readers] == [200_000] * 4
    assert sorted(reader.pid for reader in readers) == [0, 1, 2, 3]


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(module, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("asked_every", [1, 7, 1000])
def test_rate_and_time_left_of_a_steady_reader(clock: Clock, asked_every: int) -> None:
    """100 MiB a second, from the middle of the archive on, however often somebody asks."""
    activity, mebibyte = ReadStatistics(), 1 << 20
    handle = activity.opened(1)
    for second in range(60):
        for at in range(100):
            clock.now += 0.01
            activity.delivered(handle, (50_000 + second * 100 + at) * mebibyte, mebibyte)
        if second % asked_every == 0:
            activity.snapshot()
    (reader,) = activity.snapshot()[2]
    assert reader.last.position == 56_000 * mebibyte
    assert reader.rate(clock.now) == pytest.approx(100 * mebibyte, rel=0.02)
    assert reader.seconds_left(clock.now, 66_000 * mebibyte) == pytest.approx(100, rel=0.02)
    clock.now += 11
    activity.delivered(handle, 0, 0)
    assert reader.rate(clock.now) == 0
    assert reader.seconds_left(clock.now, 66_000 * mebibyte) is None


def test_a_rate_is_that_of_late(clock: Clock) -> None:
    """Fast at first, then ten times slower: what counts is the last ten seconds."""
    activity = ReadStatistics()
    handle = activity.opened(1)
    for step, size in [(0.1, 1000)] * 600 + [(0.1, 100)] * 200:
        clock.now += step
        activity.delivered(handle, 0, size)
        activity.snapshot()
    assert activity.snapshot()[2][0].rate(clock.now) == pytest.approx(1000, rel=0.02)


def test_a_reader_here_and_there_has_no_time_left(clock: Clock) -> None:
    activity, chosen = ReadStatistics(), random.Random(2)
    handle = activity.opened(1)
    for _ in range(1000):
        clock.now += 0.01
        activity.delivered(handle, chosen.randrange(1 << 40), 4096)
    (reader,) = activity.snapshot()[2]
    assert reader.rate(clock.now) == pytest.approx(409_600, rel=0.02)
    assert reader.seconds_left(clock.now, 1 << 40) is None


@pytest.mark.parametrize("asked", [False, True])
def test_requests_that_overtake_one_another(clock: Clock, asked: bool) -> None:
    """A read of 512 KiB is four requests, which four threads answer in any order; somebody may ask after each."""
    activity, chosen, size = ReadStatistics(), random.Random(3), 131_072
    handle = activity.opened(1)
    for first in range(0, 400, 4):
        clock.now += 1
        for at in chosen.sample(range(first, first + 4), 4):
            activity.delivered(handle, at * size, size)
            if asked:
                activity.snapshot()
        (reader,) = activity.snapshot()[2]
        assert reader.last.position == (first + 4) * size
    assert reader.seconds_left(clock.now, 600 * size) == pytest.approx(50, rel=0.1)
