"""One tape, uploaded by many machines: its parts are planned here and sent by the workers of a Dask cluster.

Rule: the target becomes visible whole or not at all, and what was whole there before stays until then. Every worker
opens the tape itself, and sends a part while it hashes what it reads; the part counts once the far end has the same
MD5. Drift, whichever worker finds it, ends the upload and takes away what was sent. Any other failure is tried again on
other workers, and if it stays, what was sent stays too: the same call, made again, reads the parts that are there,
compares, and sends only what is missing or different.

No state is kept here: what is there, the far end tells. After the last part each host looks once at all directories of
its source, since the audit before the footer came before the other parts were read.
"""

import hashlib
import io
import os
import re
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tartapefs.api.archive_file import ARCHIVE, Parts, Window
from tartapefs.api.tape import Tape
from tartapefs.base.buffers import aligned
from tartapefs.base.errors import Difference, OutputError, TapeError, TapeIntegrityError
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.digests import etag

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from distributed import Client, Future

# Of S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MOST_PARTS = 10_000
SMALLEST_PART = 5 << 20  # bytes; the last one may be smaller
LARGEST_PART = 5 << 30
_USUAL_PART = 64 << 20
_SUMS = "MD5SUMS"
_PART = re.compile(rf"{re.escape(ARCHIVE)}\.part-[0-9]+-of-[0-9]+")
_UNDER_WAY = "unfinished."  # what a part's name begins with while there is a complete set
_one_at_a_time = threading.Lock()
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Upload:
    """What `upload` has made of the archive at `url`."""

    url: str
    size: int  # bytes
    part_size: int  # bytes
    parts: int
    sent: int  # parts that this call sent; the others were there, and were compared
    etag: str  # as S3 forms it: MD5 of the parts' MD5s, and their number


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
    which each part is a file and MD5SUMS, written last, says that they are complete. `part_size`: bytes, by default
    64 MiB or as much as 10,000 parts need. `storage_options`: the arguments of `boto3.client("s3")`, or of fsspec's
    file system. `check`: as for a TapePlayer. `attempts`: how often a part may fail before the upload ends.
    `on_progress` is called with the bytes done and the bytes in all.

    Raises ValueError for parts that S3 would refuse, TapeIntegrityError for drift, which takes away what was sent, and
    TapeError for a part that failed too often, after which the same call goes on with what is there.
    """
    path = os.path.realpath(directory)
    with Tape.discover(path, index) as tape, closing(TapePlayer(tape, check=check)) as player:
        size = part_size or max(_USUAL_PART, -(-tape.total_size // MOST_PARTS // CHUNK) * CHUNK)
        parts = Parts(player, size)
        target = _target(url, storage_options or {}, parts, size)
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
    """What became of a task. Errors come as values: an error of boto3 does not cross to another process."""

    worker: str = ""  # its address
    md5: str = ""
    sent: bool = False
    drift: TapeIntegrityError | None = None
    failure: str = ""


class _Target(Protocol):
    """Where parts go. `there` is asked before the first part, `finish` after the last; `send` is called on workers."""

    def there(self, parts: Parts) -> dict[int, str]:
        """The MD5 of each part that is there already, by its number from 0."""
        ...

    def send(self, at: int, part: "_Hashed") -> None:
        """Stores the part. Raises TapeError where what is stored is not what was read."""
        ...

    def finish(self, md5s: list[str], predicted: str, parts: Parts) -> None: ...

    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Job:
    """All that a worker needs to know."""

    directory: str
    index: str | None
    fingerprint: str
    rows_digest: str
    check: Check
    part_size: int
    target: _Target

    def tape(self) -> Tape:
        tape = Tape.discover(self.directory, self.index)
        if tape.rows_digest != self.rows_digest:
            with tape:
                difference = Difference("fingerprint", self.fingerprint, tape.fingerprint)
                if tape.fingerprint == self.fingerprint:  # contents may differ: other nanoseconds, inodes
                    difference = Difference("the recording", self.rows_digest, tape.rows_digest)
                raise TapeIntegrityError(self.directory, [difference], "every host needs the same tape")
        return tape


class _Hashed(Window):
    """A window that knows the MD5 of what was read from it, in order; a read from its start starts anew."""

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        if self.tell() == 0:
            self._md5 = hashlib.md5(usedforsecurity=False)
        count = super().readinto(buffer)
        self._md5.update(memoryview(buffer)[:count])
        return count

    def hexdigest(self) -> str:
        return self._md5.hexdigest()


def _send(job: _Job, numbered: tuple[int, str]) -> _Outcome:
    """On a worker: sees to it that the far end has this part, which may be there with that MD5."""
    at, there = numbered

    def send(player: TapePlayer) -> _Outcome:
        part = Parts(player, job.part_size)[at]
        body = _Hashed(player, part.start, part.stop, part.name)
        if there:
            buffer = aligned(CHUNK)
            while body.readinto(buffer):
                pass
            if body.hexdigest() == there:
                return _Outcome(md5=there)
            body.seek(0)
        job.target.send(at, body)
        return _Outcome(md5=body.hexdigest(), sent=True)

    return _on_worker(job, send)


def _audit(job: _Job, _: str) -> _Outcome:
    """On a worker: looks at all directories of the source."""

    def audit(player: TapePlayer) -> _Outcome:
        player.audit()
        return _Outcome()

    return _on_worker(job, audit)


def _on_worker(job: _Job, work: Callable[[TapePlayer], _Outcome]) -> _Outcome:
    """Opens the tape, and gives what becomes of `work`."""
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
    """Runs `task` on the cluster for each item, and gives what came of those that succeeded, in any order.

    What fails is tried again on other workers. The cluster has hardly more tasks than threads at a time, so that after
    drift those that run can be waited for: a part that arrives after the abort would stay there. `pinned`: the items
    are the addresses of the workers to run on, as long as these live.
    """
    waiting, failures = deque(items), Counter[_Item]()
    under_way: dict[str, _Item] = {}
    futures = import_module("distributed").as_completed()
    drift: TapeIntegrityError | None = None

    def submit(item: _Item, avoid: str = "") -> None:
        workers = [item] if pinned else []
        if avoid:
            workers = [worker for worker in client.nthreads() if worker != avoid]
        future = client.submit(task, item, pure=False, workers=workers or None, allow_other_workers=bool(workers))
        under_way[future.key] = item
        futures.add(future)

    def fill() -> None:
        while waiting and len(under_way) <= sum(client.nthreads().values()):
            submit(waiting.popleft())

    fill()
    for future in futures:
        item, outcome = under_way.pop(future.key), _outcome(future)
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
        fill()
    if drift is not None:
        raise drift


def _outcome(future: "Future") -> _Outcome:
    try:
        outcome: _Outcome = future.result()
    except Exception as error:  # its workers died
        return _Outcome(failure=f"{type(error).__name__}: {error}")
    return outcome


def _needed(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise TapeError(f"{error.name} is not installed; run pip install 'tartapefs[distributed]'") from None


def _target(url: str, options: dict[str, Any], parts: Parts, size: int) -> _Target:
    if url.endswith("/"):
        return _Folder.begin(url, options)
    if not url.startswith("s3://"):
        raise ValueError(f"{url}: only S3 joins parts to one object; a URL that ends in a slash is a folder of parts")
    if len(parts) > MOST_PARTS or size > LARGEST_PART or (size < SMALLEST_PART and len(parts) > 1):
        raise ValueError(
            f"{len(parts):,} parts of {size:,} bytes: S3 takes {MOST_PARTS:,} parts of {SMALLEST_PART:,} to"
            f" {LARGEST_PART:,} bytes; a URL that ends in a slash is a folder of parts, without these limits"
        )
    return _S3Object.begin(url, options)


@dataclass(frozen=True, slots=True)
class _S3Object:
    """One object, by multipart upload. It goes on with the latest unfinished upload of its key."""

    bucket: str
    key: str
    options: dict[str, Any]
    upload_id: str

    @classmethod
    def begin(cls, url: str, options: dict[str, Any]) -> "_S3Object":
        bucket, _, key = url.removeprefix("s3://").partition("/")
        with _s3(options) as s3:
            pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key)
            unfinished = [found for page in pages for found in page.get("Uploads", ()) if found["Key"] == key]
            latest = max(unfinished, key=lambda found: found["Initiated"], default=None)
            latest = latest or s3.create_multipart_upload(Bucket=bucket, Key=key)
        return cls(bucket, key, options, latest["UploadId"])

    @property
    def _names(self) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.key, "UploadId": self.upload_id}

    def there(self, parts: Parts) -> dict[int, str]:
        with _s3(self.options) as s3:
            pages = s3.get_paginator("list_parts").paginate(**self._names)
            return {p["PartNumber"] - 1: p["ETag"].strip('"') for page in pages for p in page.get("Parts", ())}

    def send(self, at: int, part: _Hashed) -> None:
        with _s3(self.options) as s3:
            answer = s3.upload_part(**self._names, PartNumber=at + 1, Body=io.BufferedReader(part, CHUNK))
        if answer["ETag"].strip('"') != part.hexdigest():
            raise TapeError(f"{part.name}: stored with the ETag {answer['ETag']}, its MD5 is {part.hexdigest()}")

    def finish(self, md5s: list[str], predicted: str, parts: Parts) -> None:
        listed = [{"PartNumber": number, "ETag": md5} for number, md5 in enumerate(md5s, 1)]
        with _s3(self.options) as s3:
            with suppress(s3.exceptions.NoSuchUpload):  # it is complete, and only the answer was lost; or see below
                s3.complete_multipart_upload(**self._names, MultipartUpload={"Parts": listed})
            found = s3.head_object(Bucket=self.bucket, Key=self.key)["ETag"].strip('"')
        if found != predicted:
            raise TapeError(f"s3://{self.bucket}/{self.key}: has the ETag {found}, predicted was {predicted}")

    def abort(self) -> None:
        with _s3(self.options) as s3, suppress(s3.exceptions.NoSuchUpload):
            s3.abort_multipart_upload(**self._names)


def _is_of_a_part(name: str) -> bool:
    """Whether a file in a folder of parts is one, or the MD5 of one, under way or not."""
    return _PART.fullmatch(name.removeprefix(_UNDER_WAY).removesuffix(".md5")) is not None


@cache
def _session() -> Any:
    return _needed("boto3.session").Session()


def _s3(options: dict[str, Any]) -> "closing[Any]":
    """A client of boto3. From one session it takes 5 ms to make, not 70, but only one thread at a time may do so.

    It computes no checksum of its own, for which it would read every part once more: a part's MD5 is compared anyway.
    """
    config = _needed("botocore.config").Config(request_checksum_calculation="when_required")
    with _one_at_a_time:
        return closing(_session().client("s3", **{"config": config} | options))


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of fsspec's with a file for each part, and beside it its MD5, written once the part is whole.

    A set of parts that is complete, as MD5SUMS says, stays as it is until the next one is complete: meanwhile the parts
    of that one have names that begin with `under_way`, which is empty where there is no complete set.
    """

    url: str
    options: dict[str, Any]
    under_way: str = ""

    @classmethod
    def begin(cls, url: str, options: dict[str, Any]) -> "_Folder":
        target = cls(url, options)
        fs, path = target._open()
        fs.makedirs(path, exist_ok=True)
        if not fs.exists(f"{path}/{_SUMS}"):
            return target
        listed = [
            line.partition(b"  ")[2].decode(errors="replace") for line in fs.cat_file(f"{path}/{_SUMS}").splitlines()
        ]
        if not all(map(_PART.fullmatch, listed)):
            raise OutputError(f"{url}{_SUMS}", "is not of an upload; move it, or choose another folder")
        return replace(target, under_way=_UNDER_WAY)

    def _open(self) -> tuple[Any, str]:
        try:
            fs, path = _needed("fsspec").core.url_to_fs(self.url, **self.options)
        except ImportError as error:  # fsspec needs another package for it, and says which
            raise TapeError(f"{self.url}: {error}") from None
        return fs, path.rstrip("/")

    def _listed(self) -> tuple[Any, str, dict[str, int]]:
        """The sizes of the files in the folder, by their names."""
        fs, path = self._open()
        fs.invalidate_cache()
        try:
            listed = fs.ls(path, detail=True)
        except FileNotFoundError:  # an object store has no folder until something is in it
            listed = []
        return fs, path, {found["name"].rpartition("/")[2]: found["size"] for found in listed}

    def there(self, parts: Parts) -> dict[int, str]:
        listed = self._listed()
        found = self._whole(listed, "", parts)
        return found | self._whole(listed, self.under_way, parts) if self.under_way else found

    def _whole(self, listed: tuple[Any, str, dict[str, int]], begin: str, parts: Parts) -> dict[int, str]:
        """The MD5 of each part whose name begins so and that is whole."""
        fs, path, sizes = listed
        whole = {
            f"{begin}{part.name}.md5": at
            for at, part in enumerate(parts)
            if sizes.get(begin + part.name) == part.size and f"{begin}{part.name}.md5" in sizes
        }
        # In one call, which many file systems do at once.
        lines = fs.cat([f"{path}/{name}" for name in whole]) if whole else {}
        return {whole[name.rpartition("/")[2]]: line.decode().partition(" ")[0] for name, line in lines.items()}

    def send(self, at: int, part: _Hashed) -> None:
        fs, path = self._open()
        file = f"{path}/{self.under_way}{part.name}"
        if fs.exists(f"{file}.md5"):
            fs.rm_file(f"{file}.md5")
        with fs.open(file, "wb") as out:
            shutil.copyfileobj(part, out, CHUNK)
        stored = fs.info(file)["size"]
        if stored != part.size:
            raise TapeError(f"{part.name}: stored with {stored} bytes, it has {part.size}")
        fs.pipe_file(f"{file}.md5", f"{part.hexdigest()}  {part.name}\n".encode())

    def finish(self, md5s: list[str], predicted: str, parts: Parts) -> None:
        fs, path, sizes = listed = self._listed()
        names = [part.name for part in parts]
        kept = {*names, *(f"{name}.md5" for name in names)}
        ready = self._whole(listed, self.under_way, parts) if self.under_way else {}
        moving = [name for at, name in enumerate(names) if ready.get(at) == md5s[at]]
        others = {name for name in sizes if _is_of_a_part(name)} - kept
        if self.under_way and others:
            fs.rm_file(f"{path}/{_SUMS}")  # from here on the parts are of two sets
        for name in (name for part in moving for name in (part, f"{part}.md5")):
            fs.mv(f"{path}/{self.under_way}{name}", f"{path}/{name}")
            others.discard(self.under_way + name)
        for name in others:  # of another size, or left by an upload that was killed
            fs.rm_file(f"{path}/{name}")
        lines = [f"{md5}  {name}\n" for md5, name in zip(md5s, names, strict=True)]
        fs.pipe_file(f"{path}/{_SUMS}", "".join(lines).encode())

    def abort(self) -> None:
        fs, path, sizes = self._listed()
        for name in sizes:
            if name.startswith(self.under_way) and _is_of_a_part(name):
                fs.rm_file(f"{path}/{name}")
