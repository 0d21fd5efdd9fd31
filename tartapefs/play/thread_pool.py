"""A pool of threads that wait for a slow source, and iterators that they share."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from tartapefs.archive.member import Headed
from tartapefs.base import processes

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class SharedMembers:
    """An iterator over members that several threads share, one for each. `start`: of the last member it returned."""

    def __init__(self, members: Iterator[Headed], lock: threading.Lock) -> None:
        self.start = 0
        self._members = members
        self._lock = lock

    def __iter__(self) -> "SharedMembers":
        return self

    def __next__(self) -> Headed:
        with self._lock:
            member, header = next(self._members)
        self.start = member.start
        return member, header


class ThreadPool:
    """A pool of threads, started with the first work; they end with the process, whatever they wait for.

    If not all can be started, there are fewer; if none can, the caller does the work.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._started = 0
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def start(self, function: Callable[[], None]) -> None:
        """Queues `function`, which must raise nothing, for the next free thread."""
        with contextlib.suppress(OSError):
            while self._started < self._count:
                processes.start_thread(self._serve)
                self._started += 1
        if self._started:
            self._work.put(function)
        else:
            function()

    def run(self, functions: Sequence[Callable[[], int]]) -> tuple[list[int], dict[int, BaseException]]:
        """Waits for all functions; returns their results, and by number the exceptions of those that failed."""
        results = [0] * len(functions)
        failures: dict[int, BaseException] = {}
        ended = threading.Semaphore(0)

        def call(number: int) -> None:
            try:
                results[number] = functions[number]()
            except BaseException as error:
                failures[number] = error
            ended.release()

        for number in range(len(functions)):
            self.start(partial(call, number))
        for _ in functions:
            ended.acquire()
        return results, failures

    def close(self) -> None:
        """Ends the threads after the work queued so far; more work starts new ones."""
        for _ in range(self._started):
            self._work.put(None)
        self._started = 0

    def _serve(self) -> None:
        while work := self._work.get():
            work()
            del work  # which has the source open


def map_in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int) -> Iterator[_Result]:
    """Calls `function` for each item, in so many threads; yields the results as they come. One is the caller's own.

    An item is taken once a thread is nearly free for it. Raises the first exception that `function` raises, and does
    not wait for the calls that still run then.
    """
    if threads == 1:
        yield from map(function, items)
        return
    pool, ended = ThreadPool(threads), SimpleQueue[Callable[[], _Result]]()

    def call(item: _Item) -> None:
        try:
            result = function(item)
        except BaseException as error:
            ended.put(partial(_raise, error))
        else:
            ended.put(lambda: result)

    running = 0
    try:
        for item in items:
            if running > threads:
                running -= 1
                yield ended.get()()
            pool.start(partial(call, item))
            running += 1
        for _ in range(running):
            yield ended.get()()
    finally:
        pool.close()


def _raise(error: BaseException) -> Any:
    raise error
