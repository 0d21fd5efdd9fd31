"""How a read is served, from what the reads before it cost: observations in, decisions out, without a source."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from tartapefs.play.read_policy import (
    COLD_REQUESTS,
    PREFETCH,
    PROBE,
    SLOW_REQUESTS,
    SMALLEST_PART,
    THREADS,
    Decision,
    ReadPolicy,
)

MIB = 1 << 20
BLOCK_SIZE = 1 << 16
DISK_BLOCK = 512


class Read(NamedTuple):
    """A request of 1 MiB that was filled in the reader's thread, and what it cost; the number of it in the archive."""

    number: int
    members: int = 1
    seconds: float = 0.0
    waits: int = 0
    disk_blocks: int = 0


FAST = Read(0)
MANY = Read(0, members=200, seconds=0.02)
SLOW = Read(0, members=200, seconds=1.0, waits=200)
BUSY = Read(0, members=200, seconds=1.0, waits=7)  # the machine is, and the thread waits for its turn alone
COLD = Read(0, members=200, seconds=1.0, waits=200, disk_blocks=MIB // DISK_BLOCK)
BARELY_COLD = Read(0, members=200, seconds=1.0, waits=200, disk_blocks=MIB // DISK_BLOCK // 4)


def in_order(*reads: Read) -> list[Read]:
    return [read._replace(number=number) for number, read in enumerate(reads)]


def policy_after(reads: list[Read], block_size: int = 0) -> ReadPolicy:
    policy = ReadPolicy(block_size)
    for number, members, seconds, waits, disk_blocks in reads:
        policy.measured(number * MIB, (number + 1) * MIB, members, seconds, waits, disk_blocks)
    return policy


@pytest.mark.parametrize(
    ("reads", "without_helper", "with_helper"),
    [
        pytest.param([], Decision.PROBE, Decision.PROBE, id="the first"),
        pytest.param(in_order(FAST), Decision.ALONE, Decision.ALONE, id="one large member"),
        pytest.param(in_order(Read(0, 4)), Decision.ALONE, Decision.ALONE, id="three boundaries"),
        pytest.param(in_order(Read(0, 5)), Decision.ALONE, Decision.MEMBERS, id="four boundaries"),
        pytest.param(in_order(MANY), Decision.ALONE, Decision.MEMBERS, id="many members"),
        pytest.param(in_order(MANY, FAST), Decision.ALONE, Decision.ALONE, id="no more many"),
        pytest.param(in_order(SLOW), Decision.PROBE, Decision.MEMBERS, id="slow once"),
        pytest.param(in_order(SLOW, SLOW), Decision.THREADS, Decision.THREADS, id="slow twice"),
        pytest.param(in_order(SLOW, FAST), Decision.ALONE, Decision.ALONE, id="slow, and fast again"),
        pytest.param(in_order(SLOW, FAST, SLOW), Decision.PROBE, Decision.MEMBERS, id="slow, but not in a row"),
        pytest.param(in_order(BUSY, BUSY), Decision.ALONE, Decision.MEMBERS, id="a busy machine"),
        pytest.param(in_order(Read(0, 1, 1.0, 7), Read(0, 1, 1.0, 7)), Decision.ALONE, Decision.ALONE, id="few waits"),
        pytest.param(in_order(Read(0, 1, 1.0, 8), Read(0, 1, 1.0, 8)), Decision.THREADS, Decision.THREADS, id="eight"),
        pytest.param(in_order(COLD, COLD), Decision.ALONE, Decision.MEMBERS, id="a cold cache is not a slow source"),
        pytest.param(in_order(COLD, SLOW, SLOW), Decision.ALONE, Decision.MEMBERS, id="it waits for the prefetch"),
        pytest.param(in_order(BARELY_COLD, SLOW), Decision.THREADS, Decision.THREADS, id="a quarter from the disk"),
        pytest.param([Read(5)], Decision.PROBE, Decision.PROBE, id="a jump"),
        pytest.param([Read(5, 200)], Decision.PROBE, Decision.MEMBERS, id="a jump among many members"),
    ],
)
def test_decisions(reads: list[Read], without_helper: Decision, with_helper: Decision) -> None:
    """For the request of 1 MiB after these, or at the start of the archive after a jump."""
    policy = policy_after(reads)
    start = len(reads) * MIB
    assert policy.decide(start, start + MIB, has_helper=False) is without_helper
    assert policy.decide(start, start + MIB, has_helper=True) is with_helper


@pytest.mark.parametrize(("size", "decision"), [(2 * PROBE, Decision.ALONE), (2 * PROBE + 1, Decision.PROBE)])
def test_a_small_request_needs_no_probe(size: int, decision: Decision) -> None:
    assert ReadPolicy(0).decide(0, size, has_helper=False) is decision


@pytest.mark.parametrize(
    ("has_helper", "whole_blocks", "decision"),
    [
        (True, 2, Decision.BLOCKS),
        (True, 1, Decision.THREADS),
        (False, 2, Decision.THREADS),
    ],
)
def test_blocks_are_shared_whatever_was_observed(has_helper: bool, whole_blocks: int, decision: Decision) -> None:
    """Hashing is what takes long."""
    policy = policy_after(in_order(SLOW, SLOW), BLOCK_SIZE)
    assert policy.decide(2 * MIB, 3 * MIB, has_helper, whole_blocks) is decision


def test_smallest_in_blocks() -> None:
    assert ReadPolicy(BLOCK_SIZE).smallest_in_blocks == 2 * BLOCK_SIZE
    assert ReadPolicy(0).smallest_in_blocks > 1 << 60


@pytest.mark.parametrize(
    ("note", "is_suspected"),
    [
        (lambda policy: policy.shared_blocks(2 * MIB), False),
        (lambda policy: policy.shared(MIB, 2 * MIB, 1), True),
    ],
)
def test_a_request_in_blocks_clears_the_suspicion(note: Callable[[ReadPolicy], None], is_suspected: bool) -> None:
    """One that was shared by members was measured before."""
    policy = policy_after(in_order(SLOW))
    note(policy)
    expected = Decision.PROBE if is_suspected else Decision.ALONE
    assert policy.decide(2 * MIB, 3 * MIB, has_helper=False) is expected


def test_the_helpers_members_count() -> None:
    """This thread filled few members, the helper the rest."""
    policy = policy_after(in_order(Read(0, 2)))
    assert not policy.has_many_members(MIB)
    policy.shared(0, MIB, 200)
    assert policy.has_many_members(MIB)
    assert policy.decide(MIB, 2 * MIB, has_helper=True) is Decision.MEMBERS


def test_a_slow_source_is_measured_again() -> None:
    """After a number of requests that threads have filled."""
    policy = policy_after(in_order(SLOW, SLOW))
    for number in range(2, 2 + SLOW_REQUESTS):
        assert policy.decide(number * MIB, (number + 1) * MIB, has_helper=True) is Decision.THREADS
        policy.divided(number * MIB, (number + 1) * MIB, 200)
    assert policy.slow_requests == 0
    start = (2 + SLOW_REQUESTS) * MIB
    assert policy.decide(start, start + MIB, has_helper=False) is Decision.PROBE


@pytest.mark.parametrize(
    ("size", "members", "expected"),
    [
        (MIB, 200, (THREADS, True)),
        (MIB, 64, (THREADS, False)),
        (MIB, 65, (THREADS, True)),
        (MIB, 1, (THREADS, False)),
        (2 * SMALLEST_PART, 200, (2, False)),
        (3 * SMALLEST_PART - 1, 1000, (2, True)),
    ],
)
def test_division_among_threads(size: int, members: int, expected: tuple[int, bool]) -> None:
    """`members`: in a MiB. Twice as many as threads are taken one by one, fewer in equal parts."""
    assert policy_after([Read(0, members)]).threads(size) == expected


def test_prefetch() -> None:
    """What comes after the request, each part once, for as long as the disk is read."""
    policy = policy_after(in_order(FAST))
    assert policy.cold_requests == 0
    policy = policy_after(in_order(COLD))
    assert policy.cold_requests == COLD_REQUESTS
    assert policy.prefetch(MIB, 2 * MIB, disk_blocks=1000) == (MIB, 2 * MIB + PREFETCH)
    policy.shared(MIB, 2 * MIB, 1)
    assert policy.prefetch(2 * MIB, 3 * MIB, disk_blocks=2000) == (2 * MIB + PREFETCH, 3 * MIB + PREFETCH)
    assert policy.cold_requests == COLD_REQUESTS
    for left in reversed(range(COLD_REQUESTS)):
        assert policy.prefetch(2 * MIB, 3 * MIB, disk_blocks=2000) == (3 * MIB + PREFETCH, 3 * MIB + PREFETCH)
        assert policy.cold_requests == left


def test_no_prefetch_for_a_jump() -> None:
    policy = policy_after(in_order(COLD))
    assert policy.prefetch(5 * MIB, 6 * MIB, disk_blocks=1000) is None
    assert policy.cold_requests == COLD_REQUESTS


def test_a_reader_that_is_past_what_was_prefetched() -> None:
    """The range starts anew, also before it."""
    policy = policy_after(in_order(COLD))
    policy.prefetch(MIB, 2 * MIB, disk_blocks=1)
    for start in (20 * MIB, 0):
        policy.shared_blocks(start)
        assert policy.prefetch(start, start + MIB, disk_blocks=2) == (start, start + MIB + PREFETCH)
