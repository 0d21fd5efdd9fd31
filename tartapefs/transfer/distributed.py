"""Uploads one tape: plans its parts here, and has threads, or the workers of a Dask cluster, send them.

Rule: the target becomes visible whole or not at all; an earlier complete one stays until then. Every worker opens the
tape itself, and hashes a part while it sends it; the part counts once the far end has the same MD5. Drift, whichever
worker finds it, ends the upload and removes what was sent. Any other failure is retried on other workers; if it stays,
so does what was sent: the same call, repeated, reads the parts that are there, compares them, and sends only those that
are missing or different.

No state is kept here: the far end tells which parts are there. If it has a complete archive whose label is of this
tape, nothing is sent; if of an earlier generation, it keeps or copies the parts that lie in what both share, and these
are not read either: their MD5s are those that the far end gives.

After the last part each host audits all directories of its source, since the audit before the footer came before the
other parts were read.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from tartapefs.api.archive_file import Parts
from tartapefs.api.tape import Tape
from tartapefs.archive.layout import FOOTER
from tartapefs.base.buffers import aligned
from tartapefs.base.crc import crc_of
from tartapefs.base.errors import Difference, Fact, TapeIntegrityError, UploadError
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.index_diff import Comparison, naming_another
from tartapefs.transfer.parts_folder import PartsFolder
from tartapefs.transfer.range_digests import etag
from tartapefs.transfer.s3_limits import LARGEST_PART, MOST_PARTS, SMALLEST_PART, part_size_for
from tartapefs.transfer.s3_object import S3Object
from tartapefs.transfer.upload_targets import HashedPart, Held, Label, StoredPart, UploadTarget, crc64nvme_of
from tartapefs.transfer.workers import Cluster, Outcome, Threads, Workers, here, reason, run

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger("tartapefs")

Progress = Callable[[int, int], object]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class Upload:
    """The result of an upload.

    Attributes: `url`; `size` of the archive and `part_size`, in bytes; `parts`, their number; `sent`, how many parts
    this call sent, and `copied`, how many the far end copied of, or kept in, an earlier archive: the others were there,
    and were compared; `etag`, mostly the MD5 of the parts' MD5s, and their number; `crc64nvme` of the whole, as S3
    writes it, empty if it does not tell it; `was_complete`: the archive of this very recording was there, and nothing
    was done.
    """

    url: str
    size: int
    part_size: int
    parts: int
    sent: int
    copied: int
    etag: str
    crc64nvme: str = ""
    was_complete: bool = False


def upload(
    directory: str | os.PathLike[str],
    url: str,
    client: "Client | None" = None,
    *,
    threads: int = 4,
    part_size: int | None = None,
    index: str | os.PathLike[str] | None = None,
    old_index: str | os.PathLike[str] | None = None,
    check: Check = "full",
    allow_additions: bool = False,
    storage_options: dict[str, Any] | None = None,
    attempts: int = 3,
    on_progress: Progress | None = None,
) -> Upload:
    """Uploads the archive of `directory`, by `threads` of this process, or by the workers of `client`.

    The path leads to the same tape here and on every worker. `url`: `s3://bucket/key` is one object, by multipart
    upload; any URL of fsspec that ends in a slash is a folder, in which each part is a file, and MD5SUMS, written last,
    says that they are complete. `part_size`: bytes; by default that of the archive that is there, or else 64 MiB or as
    much as 10,000 parts need. `old_index`: of the recording whose archive is there, if `record --force` replaced it:
    what both archives begin with is not sent. `storage_options`: the arguments of `boto3.client("s3")`, or of fsspec's
    file system. `check`, `allow_additions`: as for a TapePlayer. `attempts`: how often a part may fail before the
    upload ends. `on_progress` is called with the bytes done and the bytes in all, from any thread, but one at a time.

    Raises ValueError for parts that S3 would refuse; TapeIntegrityError for drift, after it has removed what was sent;
    and UploadError if the far end refuses, or for a part that failed too often, after which the same call continues
    with the parts that are there.
    """
    path = os.path.realpath(directory)
    workers: Workers = Threads(threads) if client is None else Cluster(client)
    with (
        Tape.discover(path, index) as tape,
        closing(TapePlayer(tape, check=check, allow_additions=allow_additions)) as player,
        workers,
    ):
        target = _target_at(url, storage_options or {})
        if part_size:
            _check_parts(url, Parts(player, part_size), part_size)
        held = target.held()
        valid = _valid(tape, held, old_index, check) if held else 0
        size = part_size or _part_size(tape, held if valid else None)
        parts = Parts(player, size)
        _check_parts(url, parts, size)
        label = Label.of(tape, size)
        done = Upload(url, tape.total_size, size, len(parts), 0, 0, "")
        if held is not None and valid == tape.total_size and held.label.part_size == size:
            return replace(done, etag=held.etag, crc64nvme=held.crc64nvme, was_complete=True)
        index_path = os.path.abspath(index) if index else None
        job = _Job(path, index_path, tape.fingerprint, tape.rows_digest, check, allow_additions, size, target)
        job = replace(job, target=target.begin(label), held=held if valid else None, valid=valid)
        sending = _Sending(workers, job, parts, attempts, on_progress)
        sending.run(player)
        held = sending.finish(label)
        return replace(done, sent=sending.sent, copied=sending.copied, etag=held.etag, crc64nvme=held.crc64nvme)


def _target_at(url: str, options: dict[str, Any]) -> UploadTarget:
    if url.endswith("/"):
        return PartsFolder(url, options)
    if not url.startswith("s3://") or not all(url.removeprefix("s3://").partition("/")):
        raise ValueError(
            f"{url}: is no s3://bucket/key; only S3 joins parts to one object, and a URL that ends in a slash is a"
            " folder of parts"
        )
    return S3Object.at(url, options)


def _check_parts(url: str, parts: Parts, size: int) -> None:
    if url.endswith("/"):
        return
    if len(parts) > MOST_PARTS or size > LARGEST_PART or (size < SMALLEST_PART and len(parts) > 1):
        raise ValueError(
            f"{len(parts):,} parts of {size:,} bytes: S3 takes {MOST_PARTS:,} parts of {SMALLEST_PART:,} to"
            f" {LARGEST_PART:,} bytes; a URL that ends in a slash is a folder of parts, of up to 99,999"
        )


def _part_size(tape: Tape, held: Held | None) -> int:
    """That of the archive that is there, as long as its parts are not too many."""
    if held is not None and -(-tape.total_size // held.label.part_size) <= MOST_PARTS:
        return held.label.part_size
    return part_size_for(tape.total_size)


def _valid(tape: Tape, held: Held, old_index: str | os.PathLike[str] | None, check: Check) -> int:
    """Up to which byte the archive that is there is that of `tape`."""
    rows = held.label.rows.split()
    valid = tape.shared_with(held.label.fingerprint, rows)
    if valid is not None:
        return valid
    if old_index is not None:
        with naming_another():
            old = Tape.from_index(old_index)
        with old:
            if old.shared_with(held.label.fingerprint, rows) == old.total_size:
                return min(Comparison(old, tape, check).prefix(), old.facts.end)
        log.warning("the archive that is there is not that of the old index; everything is sent")
    else:
        log.warning("the archive that is there is of another recording, whose index is needed; everything is sent")
    return 0


@dataclass(frozen=True, slots=True)
class _Job:
    """All that a worker needs to know."""

    directory: str
    index: str | None
    fingerprint: str
    rows_digest: str
    check: Check
    allow_additions: bool
    part_size: int
    target: UploadTarget
    held: Held | None = None
    valid: int = 0  # up to where `held` has the bytes of this tape
    on_read: Callable[[int, int], object] | None = None  # in this process: (part, position in it); may raise

    def tape(self) -> Tape:
        tape = Tape.discover(self.directory, self.index)
        if tape.rows_digest != self.rows_digest:
            with tape:
                difference = Difference(Fact.FINGERPRINT, self.fingerprint, tape.fingerprint)
                if tape.fingerprint == self.fingerprint:  # contents may differ: other nanoseconds, inodes
                    difference = Difference(Fact.RECORDING, self.rows_digest, tape.rows_digest)
                raise TapeIntegrityError(self.directory, [difference], "every host needs the same tape")
        return tape


_Item = tuple[int, StoredPart | None, bool]  # the number of a part from 0, what is there, whether to have it copied


class _Sending:
    """The parts of one upload on their way.

    Attributes: `sent` and `copied`, how many parts were.
    """

    def __init__(self, workers: Workers, job: _Job, parts: Parts, attempts: int, on_progress: Progress | None) -> None:
        if isinstance(workers, Threads):
            job = replace(job, on_read=self._on_read)
        self._workers, self._job, self._parts, self._attempts = workers, job, parts, attempts
        self._on_progress = on_progress
        self._total = parts[-1].stop
        self._stored: dict[int, StoredPart] = {}
        self._reading: dict[int, int] = {}  # how far parts under way were read
        self._lock = threading.Lock()
        self._copies = job.held is not None and job.target.copies(job.held)
        self._was_copied = False
        self.sent = self.copied = 0

    def run(self, player: TapePlayer) -> None:
        """Sends what is missing. After drift removes what was sent, and raises it."""
        job = self._job
        if job.held is not None and job.held.label.part_size == job.part_size:
            self._stored = job.target.kept(self._parts, job.held, job.valid)
            self.copied = len(self._stored)
        try:
            for (at, *_), done in run(
                self._workers, partial(_send, job), self._items(), self._attempts, job.target.url
            ):
                if done.refused and self._copies:
                    log.warning("%s: sent instead of copied: %s", job.target.url, done.refused)
                    self._copies = False
                assert done.part is not None
                self._stored[at] = done.part
                self.sent += done.sent
                self.copied += done.copied
                self._was_copied |= done.copied
                self._show(at)
            hosts, audit = self._workers.hosts(), partial(_audit, job)
            for _ in run(self._workers, audit, hosts, self._attempts, job.target.url, pinned=True):
                pass
            self._check_copies(player)
        except TapeIntegrityError:
            job.target.abort()
            raise

    def _items(self) -> Iterator[_Item]:
        there = self._job.target.there(self._parts)
        for at in range(len(self._parts)):
            if at not in self._stored:
                copied = self._copies and min((at + 1) * self._job.part_size, self._total) <= self._job.valid
                yield at, there.get(at), copied

    def _on_read(self, at: int, position: int) -> None:
        assert isinstance(self._workers, Threads)
        self._workers.check()
        self._show(at, position)

    def _show(self, at: int, position: int | None = None) -> None:
        """Reports progress; `position`: in part `at`, None if it is done."""
        with self._lock:
            if position is None:
                self._reading.pop(at, None)
            elif at not in self._stored:
                self._reading[at] = position
            if self._on_progress is not None:
                done = len(self._stored) * self._job.part_size + sum(self._reading.values())
                self._on_progress(min(done, self._total), self._total)

    def _check_copies(self, player: TapePlayer) -> None:
        """Raises UploadError unless what was copied is of the archive that was there."""
        held, url = self._job.held, self._job.target.url
        if held is None or not self._was_copied:
            return
        if self._job.target.held() != held:  # not every server copies on the condition that it is what it was
            raise UploadError(url, "was replaced while it was copied", "run this again")
        if not self._is_as_copied(player, held):
            raise UploadError(url, "has not the ETag of its parts", "remove it, and run this again")

    def finish(self, label: Label) -> Held:
        """Makes the archive visible; returns what is there then."""
        job = self._job
        held = job.target.finish([self._stored[at] for at in range(len(self._parts))], self._parts, label)
        if not job.target.is_labelled(label):
            self._label(held)
        return held

    def _is_as_copied(self, player: TapePlayer, held: Held) -> bool:
        """Whether the earlier archive's ETag, or CRC64NVME, is that of the parts that were copied, and of its end.

        True if that is not known: its parts had another size, or it ended otherwise than this one goes on.
        """
        size, valid = self._job.part_size, self._job.valid
        if held.label.part_size != size or held.label.size != valid + FOOTER:
            return True
        stored = [self._stored[at] for at in range(valid // size)]
        crc = crc_of("crc64nvme") if self._job.target.checksummed else None
        for start in range(len(stored) * size, held.label.size, size):
            stop, md5, value = min(start + size, held.label.size), hashlib.md5(usedforsecurity=False), 0
            positions = range(start, min(stop, valid), CHUNK)
            pieces = (player.read(position, min(CHUNK, stop - position, valid - position)) for position in positions)
            for piece in chain(pieces, [bytes(stop - max(start, valid))]):
                md5.update(piece)
                value = crc.update(piece, value) if crc else 0
            stored.append(StoredPart("", md5.hexdigest(), value if crc else None))
        if all(part.md5 for part in stored):
            return etag(bytes.fromhex(part.md5) for part in stored) == held.etag
        return held.crc64nvme in ("", crc64nvme_of(stored, held.label))

    def _label(self, held: Held) -> None:
        """Gives a complete object its label: it was begun, with another one, for an earlier recording.

        Only a copy of an object has other metadata. If the far end refuses, the next upload sends everything again.
        """
        job = replace(self._job, target=self._job.target.begin(held.label, anew=True), held=held)
        copies = run(self._workers, partial(_copy, job), range(len(self._parts)), self._attempts, job.target.url)
        try:
            copied = {at: done.part for at, done in copies if done.part is not None}
            if held != job.target.finish([copied[at] for at in range(len(self._parts))], self._parts, held.label):
                what = "is another one since it was copied"
                raise UploadError(job.target.url, what, "remove it, and run this again")
        except UploadError as error:
            log.warning("complete, but the next upload will not recognise it: %s", error)
            job.target.abort()


def _copy(job: _Job, at: int) -> Outcome:
    """On a worker: has the far end copy a part."""

    def copy(player: TapePlayer) -> Outcome:
        assert job.held is not None
        return Outcome(part=job.target.copy(at, Parts(player, job.part_size)[at], job.held), copied=True)

    return _on_worker(job, copy)


def _send(job: _Job, item: _Item) -> Outcome:
    """On a worker: sends a part, unless the far end copies it, or has it with the MD5 that it reported."""
    at, stored, copied = item

    def send(player: TapePlayer) -> Outcome:
        part, refused = Parts(player, job.part_size)[at], ""
        if copied:
            made = _copy(job, at)
            if not made.failure:
                return made
            refused = made.failure
        on_read = partial(job.on_read, at) if job.on_read else lambda position: None
        body = HashedPart(player, part.start, part.stop, part.name, on_read, job.target.checksummed)
        if stored:
            buffer = aligned(CHUNK)
            while body.readinto(buffer):
                pass
            if body.equals(stored):
                return Outcome(part=body.as_stored(stored.etag))
            body.seek(0)
        return Outcome(part=job.target.send(at, body), sent=True, refused=refused)

    return _on_worker(job, send)


def _audit(job: _Job, _: str) -> Outcome:
    """On a worker: audits all directories of the source."""

    def audit(player: TapePlayer) -> Outcome:
        player.audit()
        return Outcome()

    return _on_worker(job, audit)


def _on_worker(job: _Job, work: Callable[[TapePlayer], Outcome]) -> Outcome:
    """Opens the tape, does `work`, and returns its result or error."""
    player = None
    try:
        with (
            job.tape() as tape,
            closing(TapePlayer(tape, check=job.check, allow_additions=job.allow_additions)) as player,
        ):
            return replace(work(player), worker=here())
    except Exception as error:
        drift = player.drift if player else None  # boto3 may have wrapped what reading the body raised
        if drift is None and isinstance(error, TapeIntegrityError):
            drift = error
        return Outcome(worker=here(), drift=drift, failure=reason(error))
