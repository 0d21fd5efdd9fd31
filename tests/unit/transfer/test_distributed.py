"""What a worker does for an upload, into memory; and whole uploads by threads, to a real S3 server and to a folder."""

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.config import Config
from support.digests import expected_etag, in_base64, slow_crc
from support.encrypting import Encrypting
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
from tartapefs.transfer.upload_targets import HashedPart, Held, Label, StoredPart

SMALL = 100_000  # bytes


class Memory:
    """A target that keeps the parts, or refuses them."""

    checksummed = False

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

    def there(self, parts: Parts) -> dict[int, StoredPart]:
        return {}

    def kept(self, parts: Parts, held: Held, valid: int) -> dict[int, StoredPart]:
        return {}

    def copies(self, held: Held) -> bool:
        return True

    def copy(self, at: int, part: Window, held: Held) -> StoredPart:
        if self.refuses:
            raise OSError("no")
        return StoredPart(f"copy of {at}")

    def send(self, at: int, part: HashedPart) -> StoredPart:
        if self.refuses:
            raise OSError("no")
        self.parts[at] = part.read()
        return part.as_stored(part.hexdigest())

    def finish(self, stored: list[StoredPart], parts: Parts, label: Label) -> Held:
        return Held(label, "")

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
    stored = StoredPart(hashlib.md5(part).hexdigest(), hashlib.md5(part).hexdigest())
    sent = distributed._send(job, (1, None, False))
    assert (sent.part, sent.sent, sent.worker, sent.drift, sent.failure) == (stored, True, "tcp://here:1", None, "")
    assert target.parts == {1: part}
    target.parts.clear()
    there = distributed._send(job, (1, StoredPart(stored.etag), False))
    assert (there.part, there.sent, target.parts) == (stored, False, {})
    again = distributed._send(job, (1, StoredPart("0" * 32), False))
    assert (again.part, again.sent, target.parts) == (stored, True, {1: part})


def test_a_failure_is_a_value(job: distributed._Job, target: Memory) -> None:
    target.refuses = True
    outcome = distributed._send(job, (0, None, False))
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
    outcome = distributed._send(job, (0, None, False))
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


@pytest.mark.long
def test_other_parts_and_seals(data: Path, s3: S3) -> None:
    go(data, s3, part_size=PART)
    other = go(data, s3, part_size=PART + 1)  # the parts have other borders, and the last one is copied, too
    assert (other.copied, other.sent) == (3, 0)
    seal_again(data)
    assert go(data, s3).was_complete
    add(data, "most")
    TapeRecorder(data, append=True).commit()
    assert go(data, s3).copied == 2


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


@pytest.mark.long
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


@pytest.mark.long
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
    assert "not that of the old index" in caplog.text and s3.copied == []


@pytest.mark.long
def test_a_server_that_does_not_copy(data: Path, s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    go(data, s3, part_size=PART)
    add(data, "more")
    TapeRecorder(data, append=True).commit()
    s3.copies = False
    done = go(data, s3, threads=1)
    assert (done.copied, done.sent) == (0, 3)
    assert "sent instead of copied" in caplog.text


@pytest.mark.long
def test_what_was_copied_is_not_what_was_there(data: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    go(data, s3, part_size=PART)
    before = s3.etag("a.tar")
    add(data, "more")
    TapeRecorder(data, append=True).commit()
    copy = S3Object.copy

    def copy_another(target: S3Object, at: int, part: Window, held: Held) -> StoredPart:
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


@pytest.mark.long
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


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recorded folder whose archive has three parts."""
    root = make(tmp_path / "small", count=2, size=PART)
    TapeRecorder(root).commit()
    return root


def go_encrypted(data: Path, s3: S3) -> Upload:
    """Uploads to a server whose ETags are no MD5s, and compares what is there, and its checksum."""
    s3.forget()
    done = upload(data, "s3://tapes/a.tar", storage_options=s3.options | {"config": quick()}, part_size=PART)
    archive = played(data)
    assert s3.object("a.tar") == archive
    assert (done.crc64nvme, done.etag) == (in_base64(slow_crc("crc64nvme", archive)), s3.etag("a.tar"))
    assert done.etag != expected_etag(archive, PART)
    return done


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.long
def test_an_encrypted_bucket(small: Path, s3: S3, tells: bool) -> None:
    """What has the right checksum is not sent again, is recognised, and is copied; what has none told is sent."""
    s3.app = server = Encrypting(s3.app, tells)
    s3.on_part = lambda number: number != 2
    with pytest.raises(UploadError, match="failed 3 times"):
        go_encrypted(small, s3)
    s3.on_part = lambda number: None
    there = len(s3.received)
    assert go_encrypted(small, s3).sent == (3 - there if tells else 3)
    assert go_encrypted(small, s3).was_complete
    add(small, "more", size=PART)
    TapeRecorder(small, append=True).commit()
    grown = go_encrypted(small, s3)
    assert (grown.copied, grown.sent) == ((2, 2) if tells else (0, 4))
    assert server.checksums[-1] == grown.crc64nvme != server.checksums[0]


@pytest.mark.long
def test_a_part_that_a_bad_link_changed(small: Path, s3: S3) -> None:
    s3.app = Encrypting(s3.app, damaged=[2])
    go_encrypted(small, s3)
    assert sorted(s3.received) == [1, 2, 2, 3]


@pytest.mark.long
def test_an_object_with_another_checksum(small: Path, s3: S3) -> None:
    """Of a server that told no checksum of the parts: it is removed, and the next upload sends everything again."""
    s3.app = Encrypting(s3.app, tells=False, damaged=[2])
    with pytest.raises(UploadError, match=r"s3://tapes/a.tar: has the CRC64NVME .*, predicted was .*; it was removed$"):
        go_encrypted(small, s3)
    assert (s3.keys(), s3.unfinished()) == ([], [])
    assert go_encrypted(small, s3).sent == 3


@pytest.mark.long
def test_what_was_copied_has_another_checksum(small: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.app = Encrypting(s3.app)
    go_encrypted(small, s3)
    before = s3.etag("a.tar")
    add(small, "more")
    TapeRecorder(small, append=True).commit()
    copy = S3Object.copy

    def copy_another(target: S3Object, at: int, part: Window, held: Held) -> StoredPart:
        return copy(target, at, Window(part._player, 0, part.size, part.name), held)

    monkeypatch.setattr(S3Object, "copy", copy_another)
    with pytest.raises(UploadError, match="has not the ETag of its parts"):
        upload(small, "s3://tapes/a.tar", storage_options=s3.options)
    assert s3.etag("a.tar") == before


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.long
def test_a_server_without_checksums(small: Path, s3: S3, refuses: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It refuses them, or passes them over; ETags are compared then, as -v says."""
    caplog.set_level(logging.INFO, "tartapefs")
    app = s3.app

    def old(environ: dict[str, Any], start_response: Any) -> Any:
        checksums = [name for name in environ if name.startswith("HTTP_X_AMZ_CHECKSUM")]
        if refuses and checksums and environ["REQUEST_METHOD"] == "POST":
            start_response("501 Not Implemented", [("Content-Length", "0")])
            return [b""]
        return app({name: value for name, value in environ.items() if name not in checksums}, start_response)

    s3.app = old
    done = go(small, s3, part_size=PART)
    assert done.crc64nvme == "" and "compared by ETags, without a checksum of the whole" in caplog.text
