"""What a worker does for an upload, into memory; and whole uploads by threads, to a real S3 server and to a folder."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.config import Config
from support.digests import expected_etag
from support.programs import wait_until
from support.recordings import played, whole
from support.reference import Reference
from support.s3 import S3
from support.s3 import s3 as s3
from support.seals import seal_again
from support.uploads import EARLIER, PART, add, make

from tartapefs import Tape, TapeIntegrityError, TapeRecorder, UploadError
from tartapefs.api.archive_file import Parts, Window
from tartapefs.archive.layout import FOOTER
from tartapefs.base.errors import Fact
from tartapefs.distributed import Upload, upload
from tartapefs.transfer import distributed
from tartapefs.transfer.s3_object import S3Object
from tartapefs.transfer.upload_targets import HashedPart, Held, Label

SMALL = 100_000  # bytes


class Memory:
    """A target that keeps the parts, or refuses them."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.refuses = False

    @property
    def url(self) -> str:
        return "memory:"

    def held(self) -> Held | None:
        return None

    def begin(self, label: Label, anew: bool = False) -> "Memory":
        return self

    def there(self, parts: Parts) -> dict[int, str]:
        return {}

    def kept(self, parts: Parts, held: Held, valid: int) -> dict[int, str]:
        return {}

    def copies(self, held: Held) -> bool:
        return True

    def copy(self, at: int, part: Window, held: Held) -> str:
        if self.refuses:
            raise OSError("no")
        return f"copy of {at}"

    def send(self, at: int, part: HashedPart) -> None:
        if self.refuses:
            raise OSError("no")
        self.parts[at] = part.read()

    def finish(self, md5s: list[str], predicted: str, parts: Parts, label: Label) -> None: ...

    def is_labelled(self, label: Label) -> bool:
        return True

    def abort(self) -> None: ...


@pytest.fixture(autouse=True)
def on_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = SimpleNamespace(get_worker=lambda: SimpleNamespace(address="tcp://here:1"))
    monkeypatch.setitem(sys.modules, "distributed", worker)


@pytest.fixture
def target() -> Memory:
    return Memory()


@pytest.fixture
def job(tree: Path, target: Memory) -> distributed._Job:
    TapeRecorder(tree).commit()
    with Tape.discover(tree) as tape:
        return distributed._Job(os.fspath(tree), None, tape.fingerprint, tape.rows_digest, "full", False, SMALL, target)


def test_a_part_is_sent_unless_it_is_there(tree: Path, job: distributed._Job, target: Memory) -> None:
    part = Reference(tree).read(SMALL, SMALL)
    md5 = hashlib.md5(part).hexdigest()
    sent = distributed._send(job, (1, "", False))
    assert (sent.md5, sent.sent, sent.worker, sent.drift, sent.failure) == (md5, True, "tcp://here:1", None, "")
    assert target.parts == {1: part}
    target.parts.clear()
    there = distributed._send(job, (1, md5, False))
    assert (there.md5, there.sent, target.parts) == (md5, False, {})
    again = distributed._send(job, (1, "0" * 32, False))
    assert (again.md5, again.sent, target.parts) == (md5, True, {1: part})


def test_a_failure_is_a_value(job: distributed._Job, target: Memory) -> None:
    target.refuses = True
    outcome = distributed._send(job, (0, "", False))
    assert (outcome.failure, outcome.drift, outcome.sent) == ("OSError: no", None, False)


def test_drift_is_told_from_a_failure(tree: Path, job: distributed._Job) -> None:
    assert distributed._audit(job, "").failure == ""
    (tree / "more").touch()
    outcome = distributed._audit(job, "")
    assert outcome.drift is not None and outcome.drift.differences[0].what == Fact.MTIME


@pytest.mark.parametrize("fact", [Fact.FINGERPRINT, Fact.RECORDING])
def test_another_recording_is_drift(tree: Path, job: distributed._Job, fact: Fact) -> None:
    """Also one whose headers are the same: a file was replaced within its second."""
    path = tree / "photos" / "5000.bin"
    found = path.stat()
    path.write_bytes(os.urandom(5000))
    if fact == Fact.RECORDING:
        os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns))
    else:
        os.utime(path, ns=(0, 0))
    TapeRecorder(tree, overwrite=True).commit()
    outcome = distributed._send(job, (0, "", False))
    assert outcome.drift is not None and outcome.drift.differences[0].what == fact


def quick() -> Config:
    return Config(request_checksum_calculation="when_required", retries={"max_attempts": 0})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A recorded folder whose archive has three parts."""
    root = make(tmp_path / "data", count=8)
    TapeRecorder(root).commit()
    return root


def go(data: Path, s3: S3, **options: Any) -> Upload:
    """Uploads, and compares what is there with what tarfile makes of the folder."""
    s3.forget()
    done = upload(data, "s3://tapes/a.tar", storage_options=s3.options, **options)
    archive = played(data)
    assert s3.object("a.tar") == archive
    assert s3.etag("a.tar") == done.etag == expected_etag(archive, done.part_size)
    assert s3.unfinished() == []
    assert (done.sent, done.size) == (len(s3.received), len(archive))
    return done


def test_what_was_added_is_sent_and_the_rest_is_copied(data: Path, s3: S3) -> None:
    assert go(data, s3, part_size=PART).sent == 3
    first = whole(data)
    assert s3.object("a.tar") == first
    again = go(data, s3)
    assert (again.was_complete, again.part_size, s3.received, s3.copied) == (True, PART, [], [])
    add(data, "more", size=PART)
    TapeRecorder(data, append=True).commit()
    grown = go(data, s3)
    assert (sorted(s3.copied), sorted(s3.received)) == ([1, 2], [3, 4])
    assert (grown.copied, grown.sent, grown.parts, grown.was_complete) == (2, 2, 4, False)
    assert s3.object("a.tar")[: len(first) - FOOTER] == first[:-FOOTER]
    assert s3.received_bytes < grown.size - 2 * PART + 20_000
    assert go(data, s3).was_complete
    other = go(data, s3, part_size=PART + 1)  # the parts have other borders, and the last one is copied, too
    assert (other.copied, other.sent) == (4, 0)
    seal_again(data)
    assert go(data, s3).was_complete
    add(data, "most")
    TapeRecorder(data, append=True).commit()
    assert go(data, s3).copied == 3


def test_a_part_that_is_refused_and_what_goes_on_from_there(data: Path, s3: S3) -> None:
    s3.on_part = lambda number: number != 2
    options = {"part_size": PART, "storage_options": s3.options | {"config": quick()}}
    with pytest.raises(UploadError, match=r"s3://tapes/a.tar: failed 3 times.*the same call goes on from here"):
        upload(data, "s3://tapes/a.tar", threads=1, **options)
    assert s3.keys() == [] and 2 not in s3.received
    there = len(s3.received)
    s3.on_part = lambda number: None
    seen: list[tuple[int, int]] = []
    done = go(data, s3, part_size=PART, on_progress=lambda *at: seen.append(at))
    assert done.sent == 3 - there
    assert seen[-1] == (done.size, done.size) and len(seen) > 10


def test_it_grew_before_it_was_sent(data: Path, s3: S3) -> None:
    """The upload that goes on was begun with the label of the earlier recording."""
    s3.on_part = lambda number: number != 3
    options = {"part_size": PART, "storage_options": s3.options | {"config": quick()}}
    with pytest.raises(UploadError):
        upload(data, "s3://tapes/a.tar", threads=1, attempts=1, **options)
    s3.on_part = lambda number: None
    wait_until(lambda: len(s3.received) == 2)
    add(data, "more", size=PART)
    TapeRecorder(data, append=True).commit()
    assert go(data, s3, part_size=PART).sent == 2
    assert len(s3.copied) == 4, "the complete object was copied to get its label"
    assert go(data, s3).was_complete


def test_recorded_again(data: Path, s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the index of before, what both archives begin with is copied; without it, everything is sent."""
    go(data, s3, part_size=PART)
    old = tmp_path / "old.db"
    (data / ".tartape" / "index.db").rename(old)
    os.utime(data, (EARLIER, EARLIER))
    TapeRecorder(data).commit()
    assert go(data, s3, part_size=PART).sent == 3
    assert "of another recording" in caplog.text
    (data / ".tartape" / "index.db").rename(old)
    (data / "05").write_bytes(b"other")
    os.utime(data / "05", (EARLIER, EARLIER))
    TapeRecorder(data).commit()
    assert (go(data, s3, old_index=old).copied, sorted(s3.copied)) == (1, [1])
    assert s3.object("a.tar") == whole(data)
    caplog.clear()
    TapeRecorder(data, tmp_path / "new.db", exclude=["07"]).commit()
    s3.forget()
    assert upload(data, "s3://tapes/a.tar", index=tmp_path / "new.db", old_index=old, storage_options=s3.options).sent
    assert "not of the old index" in caplog.text and s3.copied == []


def test_a_server_that_does_not_copy(data: Path, s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    go(data, s3, part_size=PART)
    add(data, "more")
    TapeRecorder(data, append=True).commit()
    s3.copies = False
    done = go(data, s3, threads=1)
    assert (done.copied, done.sent) == (0, 3)
    assert "sent instead of copied" in caplog.text


def test_what_was_copied_is_not_what_was_there(data: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    go(data, s3, part_size=PART)
    before = s3.etag("a.tar")
    add(data, "more")
    TapeRecorder(data, append=True).commit()
    copy = S3Object.copy

    def copy_another(target: S3Object, at: int, part: Window, held: Held) -> str:
        return copy(target, at, Window(part._player, 0, part.size, part.name), held)

    with monkeypatch.context() as patched:
        patched.setattr(S3Object, "copy", copy_another)
        with pytest.raises(UploadError, match="has not the ETag of its parts"):
            upload(data, "s3://tapes/a.tar", storage_options=s3.options)
    found = iter([S3Object("tapes", "a.tar", s3.options).held(), None])
    with monkeypatch.context() as patched:
        patched.setattr(S3Object, "held", lambda target: next(found))
        with pytest.raises(UploadError, match="was replaced while it was copied"):
            upload(data, "s3://tapes/a.tar", storage_options=s3.options)
    assert s3.etag("a.tar") == before
    assert go(data, s3).copied == 2


def test_drift_removes_what_was_sent(data: Path, s3: S3) -> None:
    def change(number: int) -> None:
        if number == 2:
            (data / "07").write_bytes(b"other")

    s3.on_part = change
    with pytest.raises(TapeIntegrityError, match="data/07"):
        upload(data, "s3://tapes/a.tar", threads=2, part_size=PART, storage_options=s3.options)
    assert (s3.keys(), s3.unfinished()) == ([], [])


def test_additions(data: Path, s3: S3) -> None:
    archive = whole(data)
    s3.on_part = lambda number: (data / f"new {number}").touch()
    with pytest.raises(TapeIntegrityError, match="data: mtime"):
        upload(data, "s3://tapes/a.tar", part_size=PART, storage_options=s3.options)
    upload(data, "s3://tapes/a.tar", part_size=PART, storage_options=s3.options, allow_additions=True)
    assert s3.object("a.tar") == archive


def test_a_folder_of_parts_that_grows(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    url = f"file://{out}/"
    assert upload(data, url, part_size=PART).sent == 3
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert upload(data, url).was_complete
    add(data, "more", size=PART)
    TapeRecorder(data, append=True).commit()
    grown = upload(data, url)
    assert (grown.copied, grown.sent) == (2, 2)
    for number in (1, 2):
        assert (out / f"archive.tar.{number:05}").stat().st_mtime_ns == times[f"archive.tar.{number:05}"]
    assert b"".join((out / f"archive.tar.{number:05}").read_bytes() for number in range(1, 5)) == played(data)
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=out, check=True)
    assert upload(data, url).was_complete
    (out / "archive.tar.00002").write_bytes(b"half")
    assert upload(data, url).sent == 1
    assert upload(data, url, part_size=2 * PART).parts == 2
    assert b"".join((out / f"archive.tar.{number:05}").read_bytes() for number in range(1, 3)) == played(data)
