"""The pool of threads: all work is done, errors come back by number, and no threads are no error."""

import threading

import pytest

from tartapefs.archive.member import Member
from tartapefs.base import processes
from tartapefs.play.thread_pool import SharedMembers, ThreadPool, map_in_threads


def test_results_are_in_order_and_errors_by_number() -> None:
    pool = ThreadPool(3)
    try:
        results, failures = pool.run([lambda: 5, lambda: 1 // 0, lambda: 7, lambda: {}["x"]])
    finally:
        pool.close()
    assert (results[0], results[2]) == (5, 7)
    assert {number: type(error) for number, error in failures.items()} == {1: ZeroDivisionError, 3: KeyError}


def test_threads_run_at_once() -> None:
    """Each waits for all others."""
    pool, barrier = ThreadPool(4), threading.Barrier(4, timeout=60)
    try:
        results, failures = pool.run([lambda: barrier.wait() >= 0 for _ in range(4)])
    finally:
        pool.close()
    assert (results, failures) == ([1, 1, 1, 1], {})


@pytest.mark.parametrize("available", [0, 1])
def test_where_few_threads_can_be_started(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    started, start = [], processes.start_thread

    def limited(*arguments: object, **options: object) -> threading.Thread:
        if len(started) == available:
            raise OSError
        started.append(start(*arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(processes, "start_thread", limited)
    pool, called = ThreadPool(4), []
    try:
        results, failures = pool.run([lambda: called.append(threading.current_thread()) or 3 for _ in range(5)])
    finally:
        pool.close()
    assert (results, failures) == ([3] * 5, {})
    assert set(called) == ({started[0]} if available else {threading.current_thread()})


def test_threads_end_when_it_is_closed_and_start_anew() -> None:
    pool, seen = ThreadPool(2), []
    for _ in range(2):
        pool.run([lambda: seen.append(threading.current_thread()) or 0 for _ in range(8)])
        pool.close()
        for thread in seen:
            thread.join(60)
        assert not any(thread.is_alive() for thread in seen)


def test_members_are_shared() -> None:
    """Each goes to one of the threads, and `start` is that of the last one given out."""
    members = [(Member(512 * at, b"x", 0o100644, 0, 0, 0, 0, b"", None), b"header") for at in range(1000)]
    shared, taken = SharedMembers(iter(members), threading.Lock()), []
    pool = ThreadPool(4)
    try:
        pool.run([lambda: taken.extend(shared) or 0 for _ in range(4)])
    finally:
        pool.close()
    assert sorted(member.start for member, _ in taken) == [member.start for member, _ in members]
    assert shared.start == members[-1][0].start


def test_items_are_taken_late_and_results_come_early() -> None:
    """Of three that run at once, one may wait for its thread, and the first result comes before the last item."""
    taken: list[int] = []
    results = map_in_threads(lambda number: number * 2, (taken.append(n) or n for n in range(100)), 3)
    first = next(results)
    assert len(taken) <= 5
    assert sorted([first, *results]) == [number * 2 for number in range(100)]
    assert list(map_in_threads(lambda number: number * 2, range(5), 1)) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_ends_it(threads: int) -> None:
    called: list[int] = []
    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(lambda number: called.append(number) or 1 // (number - 2), range(1000), threads))
    assert len(called) < 20
