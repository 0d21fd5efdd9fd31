"""Tasks on threads: retried, ended by drift, interrupted. On a cluster: tests/long/test_distributed.py."""

import threading
from collections import Counter

import pytest

from tartapefs import TapeIntegrityError, UploadError
from tartapefs.base.errors import Difference, Fact
from tartapefs.transfer.upload_targets import StoredPart
from tartapefs.transfer.workers import Outcome, Threads, here, reason, run

DRIFT = TapeIntegrityError("data/a", [Difference(Fact.SIZE, "1", "2")])


def test_each_item_once_and_hardly_more_than_run_at_once() -> None:
    taken: list[int] = []
    finished: list[int] = []

    def items():  # type: ignore[no-untyped-def]
        for number in range(20):
            taken.append(number)
            assert len(taken) - len(finished) <= 4
            yield number

    def task(number: int) -> Outcome:
        return Outcome(part=StoredPart(str(number)))

    with Threads(3) as workers:
        for number, outcome in run(workers, task, items(), 3, "memory:"):
            assert outcome.part == StoredPart(str(number))
            finished.append(number)
    assert sorted(finished) == list(range(20))


def test_a_failure_is_retried() -> None:
    tries: Counter[int] = Counter()

    def task(number: int) -> Outcome:
        tries[number] += 1
        if number == 2 and tries[2] < 3:
            raise OSError("no")
        return Outcome()

    with Threads(2) as workers:
        assert len(dict(run(workers, task, range(4), 3, "memory:"))) == 4
    assert tries == {0: 1, 1: 1, 2: 3, 3: 1}


def test_a_failure_that_stays_ends_it() -> None:
    tries: Counter[int] = Counter()

    def task(number: int) -> Outcome:
        tries[number] += 1
        return Outcome(failure="no" if number == 2 else "")

    with pytest.raises(UploadError, match=r"memory:.*failed 3 times, last with no"), Threads(1) as workers:
        list(run(workers, task, range(100), 3, "memory:"))
    assert tries[2] == 3 and len(tries) < 10


def test_drift_waits_for_what_runs_and_begins_nothing_more() -> None:
    begun, ended = threading.Event(), threading.Event()
    seen: list[int] = []

    with Threads(2) as workers:

        def task(number: int) -> Outcome:
            seen.append(number)
            if number == 0:
                begun.wait(30)
                return Outcome(drift=DRIFT, failure="drift")
            begun.set()
            with pytest.raises(InterruptedError):
                while True:
                    workers.check()
            ended.set()
            return Outcome(failure="ended")

        with pytest.raises(TapeIntegrityError, match="data/a"):
            list(run(workers, task, range(100), 3, "memory:"))
        assert ended.is_set() and len(seen) <= 3


def test_leaving_the_block_ends_the_tasks() -> None:
    begun, ended = threading.Event(), threading.Event()

    def task(number: int) -> Outcome:
        begun.set()
        try:
            while True:
                workers.check()
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt), Threads(1) as workers:
        workers.executor().submit(task, 0)
        begun.wait(30)
        raise KeyboardInterrupt
    assert ended.wait(30)


def test_no_threads() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Threads(0)


def test_what_an_outcome_says() -> None:
    assert reason(OSError("two\nlines")) == "OSError: two lines"
    assert here() == ""
