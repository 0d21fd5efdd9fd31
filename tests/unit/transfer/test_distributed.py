"""What a worker does for an upload: without a cluster, into memory."""

import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.reference import Reference

from tartapefs import Tape, TapeRecorder
from tartapefs.api.archive_file import Parts
from tartapefs.base.errors import Fact
from tartapefs.transfer import distributed
from tartapefs.transfer.upload_targets import HashedPart

PART = 100_000  # bytes


class Memory:
    """A target that keeps the parts, or refuses them."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.refuses = False

    def there(self, parts: Parts) -> dict[int, str]:
        return {}

    def send(self, at: int, part: HashedPart) -> None:
        if self.refuses:
            raise OSError("no")
        self.parts[at] = part.read()

    def finish(self, md5s: list[str], predicted: str, parts: Parts) -> None: ...

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
        return distributed._Job(os.fspath(tree), None, tape.fingerprint, tape.rows_digest, "full", PART, target)


def test_a_part_is_sent_unless_it_is_there(tree: Path, job: distributed._Job, target: Memory) -> None:
    part = Reference(tree).read(PART, PART)
    md5 = hashlib.md5(part).hexdigest()
    sent = distributed._send(job, (1, ""))
    assert (sent.md5, sent.sent, sent.worker, sent.drift, sent.failure) == (md5, True, "tcp://here:1", None, "")
    assert target.parts == {1: part}
    target.parts.clear()
    there = distributed._send(job, (1, md5))
    assert (there.md5, there.sent, target.parts) == (md5, False, {})
    again = distributed._send(job, (1, "0" * 32))
    assert (again.md5, again.sent, target.parts) == (md5, True, {1: part})


def test_a_failure_is_a_value(job: distributed._Job, target: Memory) -> None:
    target.refuses = True
    outcome = distributed._send(job, (0, ""))
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
    outcome = distributed._send(job, (0, ""))
    assert outcome.drift is not None and outcome.drift.differences[0].what == fact
