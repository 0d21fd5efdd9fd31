"""Uploads one tape from many machines: plans its parts here, and has the workers of a Dask cluster send them.

Rule: the target becomes visible whole or not at all; an earlier complete one stays until then. Every worker opens the
tape itself, and hashes a part while it sends it; the part counts once the far end has the same MD5. Drift, whichever
worker finds it, ends the upload and removes what was sent. Any other failure is retried on other workers; if it stays,
so does what was sent: the same call, repeated, reads the parts that are there, compares them, and sends only those that
are missing or different.

No state is kept here: the far end tells which parts are there. After the last part each host audits all directories of
its source, since the audit before the footer came before the other parts were read.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from tartapefs.api.archive_file import Parts
from tartapefs.api.tape import Tape
from tartapefs.base.buffers import aligned
from tartapefs.base.errors import Difference, Fact, TapeError, TapeIntegrityError
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.range_digests import etag
from tartapefs.transfer.s3_limits import part_size_for
from tartapefs.transfer.upload_targets import HashedPart, UploadTarget, target_for

if TYPE_CHECKING:
    from distributed import Client, Future

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Upload:
    """The result of an upload.

    Attributes: `url`; `size` of the archive and `part_size`, in bytes; `parts`, their number; `sent`, how many parts
    this call sent: the others were there, and were compared; `etag`, as S3 forms it: MD5 of the parts' MD5s, and their
    number.
    """

    url: str
    size: int
    part_size: int
    parts: int
    sent: int
    etag: str


def upload(
    directory: str | os.PathLike[str],
    url: str,
    client: "Client",
    *,
    part_size: int | None = None,
    index: str | os.PathLike[str] | None = None,
    check: Check = "full",
    storage_options: dict[str, Any] | None = None,
    attempts: int = 3,
    on_progress: Callable[[int, int], object] | None = None,
) -> Upload:
    """Uploads the archive of `directory`, a path that leads to the same tape here and on every worker of `client`.

    `url`: `s3://bucket/key` is one object, by multipart upload; any URL of fsspec that ends in a slash is a folder, in
    which each part is a file, and MD5SUMS, written last, says that they are complete. `part_size`: bytes, by default
    64 MiB or as much as 10,000 parts need. `storage_options`: the arguments of `boto3.client("s3")`, or of fsspec's
    file system. `check`: as for a TapePlayer. `attempts`: how often a part may fail before the upload ends.
    `on_progress` is called with the bytes done and the bytes in all.

    Raises ValueError for parts that S3 would refuse; TapeIntegrityError for drift, after it has removed what was sent;
    and TapeError for a part that failed too often, after which the same call continues with the parts that are there.
    """
    path = os.path.realpath(directory)
    with Tape.discover(path, index) as tape, closing(TapePlayer(tape, check=check)) as player:
        size = part_size or part_size_for(tape.total_size)
        parts = Parts(player, size)
        target = target_for(url, storage_options or {}, parts, size)
        there = target.there(parts)
        index_path = os.path.abspath(index) if index else None
        job = _Job(path, index_path, tape.fingerprint, tape.rows_digest, check, size, target)
        md5s: dict[int, str] = {}
        sent = 0
        try:
            numbered = ((at, there.get(at, "")) for at in range(len(parts)))
            for (at, _), done in _run(client, partial(_send, job), numbered, attempts):
                md5s[at] = done.md5
                sent += done.sent
                if on_progress:
                    on_progress(min(len(md5s) * size, tape.total_size), tape.total_size)
            hosts = {address.rpartition(":")[0]: address for address in client.nthreads()}
            for _ in _run(client, partial(_audit, job), hosts.values(), attempts, pinned=True):
                pass
        except TapeIntegrityError:
            target.abort()
            raise
        ordered = [md5s[at] for at in range(len(parts))]
        predicted = etag(map(bytes.fromhex, ordered))
        target.finish(ordered, predicted, parts)
        return Upload(url, tape.total_size, size, len(parts), sent, predicted)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of a task. Errors are values, since those of boto3 cannot be pickled."""

    worker: str = ""  # its address
    md5: str = ""
    sent: bool = False
    drift: TapeIntegrityError | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class _Job:
    """All that a worker needs to know."""

    directory: str
    index: str | None
    fingerprint: str
    rows_digest: str
    check: Check
    part_size: int
    target: UploadTarget

    def tape(self) -> Tape:
        tape = Tape.discover(self.directory, self.index)
        if tape.rows_digest != self.rows_digest:
            with tape:
                difference = Difference(Fact.FINGERPRINT, self.fingerprint, tape.fingerprint)
                if tape.fingerprint == self.fingerprint:  # contents may differ: other nanoseconds, inodes
                    difference = Difference(Fact.RECORDING, self.rows_digest, tape.rows_digest)
                raise TapeIntegrityError(self.directory, [difference], "every host needs the same tape")
        return tape


def _send(job: _Job, numbered: tuple[int, str]) -> _Outcome:
    """On a worker: sends a part, unless the far end has it with the MD5 that it reported."""
    at, stored = numbered

    def send(player: TapePlayer) -> _Outcome:
        part = Parts(player, job.part_size)[at]
        body = HashedPart(player, part.start, part.stop, part.name)
        if stored:
            buffer = aligned(CHUNK)
            while body.readinto(buffer):
                pass
            if body.hexdigest() == stored:
                return _Outcome(md5=stored)
            body.seek(0)
        job.target.send(at, body)
        return _Outcome(md5=body.hexdigest(), sent=True)

    return _on_worker(job, send)


def _audit(job: _Job, _: str) -> _Outcome:
    """On a worker: audits all directories of the source."""

    def audit(player: TapePlayer) -> _Outcome:
        player.audit()
        return _Outcome()

    return _on_worker(job, audit)


def _on_worker(job: _Job, work: Callable[[TapePlayer], _Outcome]) -> _Outcome:
    """Opens the tape, does `work`, and returns its result or error."""
    here = import_module("distributed").get_worker().address
    player = None
    try:
        with job.tape() as tape, closing(TapePlayer(tape, check=job.check)) as player:
            return replace(work(player), worker=here)
    except Exception as error:
        drift = player.drift if player else None  # boto3 may have wrapped what reading the body raised
        if drift is None and isinstance(error, TapeIntegrityError):
            drift = error
        return _Outcome(worker=here, drift=drift, failure=f"{type(error).__name__}: {error}")


def _run(
    client: "Client",
    task: Callable[[_Item], _Outcome],
    items: Iterable[_Item],
    attempts: int,
    pinned: bool = False,
) -> Iterator[tuple[_Item, _Outcome]]:
    """Runs `task` on the cluster for each item, and yields the results of those that succeed, in any order.

    Failed tasks are retried on other workers. The cluster gets hardly more tasks than it has threads, so that after
    drift the running ones can be waited for: a part that arrives after the abort would stay. `pinned`: the items are
    the addresses of the workers to run on, as long as these live.
    """
    waiting, failures = deque(items), Counter[_Item]()
    running: dict[str, _Item] = {}
    futures = import_module("distributed").as_completed()
    drift: TapeIntegrityError | None = None

    def submit(item: _Item, avoid: str = "") -> None:
        workers = [item] if pinned else []
        if avoid:
            workers = [worker for worker in client.nthreads() if worker != avoid]
        future = client.submit(task, item, pure=False, workers=workers or None, allow_other_workers=bool(workers))
        running[future.key] = item
        futures.add(future)

    def submit_waiting() -> None:
        while waiting and len(running) <= sum(client.nthreads().values()):
            submit(waiting.popleft())

    submit_waiting()
    for future in futures:
        item, outcome = running.pop(future.key), _outcome(future)
        if outcome.drift is not None:
            drift = drift or outcome.drift
            waiting.clear()
        elif drift is not None:
            pass
        elif outcome.failure:
            failures[item] += 1
            if failures[item] >= attempts:
                raise TapeError(
                    f"failed {attempts} times, last with {outcome.failure}; the same call goes on from here"
                )
            submit(item, avoid=outcome.worker)
        else:
            yield item, outcome
        submit_waiting()
    if drift is not None:
        raise drift


def _outcome(future: "Future") -> _Outcome:
    try:
        outcome: _Outcome = future.result()
    except Exception as error:  # its workers died
        return _Outcome(failure=f"{type(error).__name__}: {error}")
    return outcome
