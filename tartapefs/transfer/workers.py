"""Who sends the parts of an upload: threads of this process, or the workers of a Dask cluster. Both are executors.

Rule: a task returns an `Outcome`, also of what failed. A task that fails is retried, on another worker if there is one.
Drift, whichever worker finds it, ends the work; the tasks that run are waited for, so that nothing they send arrives
after the caller has removed what was sent.
"""

import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from tartapefs.base.errors import TapeIntegrityError, UploadError
from tartapefs.transfer.upload_targets import StoredPart

if TYPE_CHECKING:
    from distributed import Client

_Item = TypeVar("_Item", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a task. Errors are values, since those of boto3 cannot be pickled.

    Attributes: `worker`, its address; `part`, as the far end has it; `sent`: its bytes were sent; `copied`:
    the far end had them, and copied them; `refused`: why it did not copy them; `drift` and `failure`: what went wrong.
    """

    worker: str = ""
    part: StoredPart | None = None
    sent: bool = False
    copied: bool = False
    refused: str = ""
    drift: TapeIntegrityError | None = None
    failure: str = ""


def reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def here() -> str:
    """The address of the Dask worker that runs this; empty in a thread of a process that is none."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return ""
    try:
        address: str = distributed.get_worker().address
    except ValueError:
        return ""
    return address


class Workers(Protocol):
    """Executors, and what they run on. Leaving the `with` block by an error drops what has not begun."""

    def count(self) -> int:
        """How many tasks run at once."""
        ...

    def hosts(self) -> Iterable[str]:
        """The address of one worker on each host."""
        ...

    def executor(self, on: str = "", avoid: str = "") -> Executor:
        """What runs a task; on the worker `on`, or not on the worker `avoid`, as long as there are others."""
        ...

    def interrupt(self) -> None:
        """Ends the running tasks soon, if they can be ended; does not wait."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


class Threads:
    """`count` threads of this process. Their tasks call `check` now and then, so that they can be interrupted."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} threads send nothing; there is at least 1")
        self._count = count
        self._pool = ThreadPoolExecutor(count, "upload")
        self._interrupted = threading.Event()

    def count(self) -> int:
        return self._count

    def hosts(self) -> Iterable[str]:
        return [""]

    def executor(self, on: str = "", avoid: str = "") -> Executor:
        return self._pool

    def check(self) -> None:
        """Raises InterruptedError once the tasks are to end."""
        if self._interrupted.is_set():
            raise InterruptedError("the upload has ended")

    def interrupt(self) -> None:
        self._interrupted.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.interrupt()
        self._pool.shutdown(wait=False, cancel_futures=True)


class Cluster:
    """The workers of the cluster of `client`, a Client of Dask's."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._anywhere: Executor = client.get_executor(pure=False)
        self._executors: list[Executor] = [self._anywhere]

    def count(self) -> int:
        return sum(self._client.nthreads().values())

    def hosts(self) -> Iterable[str]:
        return {address.rpartition(":")[0]: address for address in self._client.nthreads()}.values()

    def executor(self, on: str = "", avoid: str = "") -> Executor:
        workers = [on] if on else [worker for worker in self._client.nthreads() if avoid and worker != avoid]
        if not workers:
            return self._anywhere
        executor: Executor = self._client.get_executor(pure=False, workers=workers, allow_other_workers=True)
        self._executors.append(executor)
        return executor

    def interrupt(self) -> None:
        pass  # Dask cancels only what has not begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for executor in self._executors:
            executor.shutdown(wait=False)


def run(
    workers: Workers,
    task: Callable[[_Item], Outcome],
    items: Iterable[_Item],
    attempts: int,
    url: str,
    pinned: bool = False,
) -> Iterator[tuple[_Item, Outcome]]:
    """Runs `task` for each item, and yields the results of those that succeed, in any order.

    A task may fail `attempts` times. Hardly more tasks are submitted than run at once, so an item is taken late, and
    after drift little is to be waited for. `pinned`: the items are the addresses of the workers to run on.

    Raises the first drift, and UploadError, with this `url`, for a task that failed too often.
    """
    waiting, failures = iter(items), Counter[_Item]()
    running: dict[Future[Outcome], _Item] = {}
    again: deque[tuple[_Item, str]] = deque()
    drift: TapeIntegrityError | None = None
    while True:
        while drift is None and len(running) <= workers.count():
            if again:
                item, avoid = again.popleft()
            else:
                try:
                    item, avoid = next(waiting), ""
                except StopIteration:
                    break
            on = item if pinned and isinstance(item, str) and not avoid else ""
            running[workers.executor(on, avoid).submit(task, item)] = item
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            item, outcome = running.pop(future), _outcome(future)
            if outcome.drift is not None:
                drift = drift or outcome.drift
                workers.interrupt()
            elif drift is not None:
                pass
            elif outcome.failure:
                failures[item] += 1
                if failures[item] >= attempts:
                    raise UploadError(
                        url, f"failed {attempts} times, last with {outcome.failure}; the same call goes on from here"
                    )
                again.append((item, outcome.worker))
            else:
                yield item, outcome
    if drift is not None:
        raise drift


def _outcome(future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except Exception as error:  # its worker died
        return Outcome(failure=reason(error))
