"""The command upload: what it says, its exit codes, killed and interrupted on the way."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.digests import expected_etag, in_base64, slow_crc
from support.programs import TARTAPEFS, done, quiet, refused, run, wait_until
from support.recordings import played, whole
from support.s3 import S3, environment
from support.s3 import s3 as s3
from support.uploads import PART, add, make

from tartapefs import TapeRecorder
from tartapefs.base.errors import UploadError
from tartapefs.cli.upload import upload
from tartapefs.transfer import distributed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A recorded folder whose archive has three parts."""
    root = make(tmp_path / "data", count=8)
    TapeRecorder(root).commit()
    return root


@pytest.fixture
def command(data: Path) -> list[str]:
    return ["upload", os.fspath(data), "s3://tapes/a.tar", "--part-size", str(PART)]


@pytest.mark.long
def test_what_it_says(data: Path, s3: S3, command: list[str]) -> None:
    archive, names = whole(data), environment(s3)
    etag, crc = expected_etag(archive, PART), in_base64(slow_crc("crc64nvme", archive))
    first = run(*command, "--json", "--option", "StorageClass=STANDARD_IA", env=names)
    facts = json.loads(done(first))
    assert facts == {
        "url": "s3://tapes/a.tar",
        "size": len(archive),
        "part_size": PART,
        "parts": 3,
        "sent": 3,
        "copied": 0,
        "etag": etag,
        "crc64nvme": crc,
        "was_complete": False,
    }
    with s3.client() as client:
        assert client.head_object(Bucket="tapes", Key="a.tar")["StorageClass"] == "STANDARD_IA"
    assert s3.object("a.tar") == archive
    again = run(*command[:3], env=names)
    assert (done(again), again.stderr) == (
        "",
        f"tartapefs: s3://tapes/a.tar: has this archive already; nothing was sent; ETag {etag}; CRC64NVME {crc}\n",
    )
    add(data, "more", size=PART)
    done(run("record", data, "--append"))
    grown = run(*command, "--threads", "1", env=names)
    archive = played(data)
    etag = expected_etag(archive, PART)
    assert s3.object("a.tar") == archive
    assert (done(grown), grown.stderr) == (
        "",
        f"tartapefs: s3://tapes/a.tar: complete; {len(archive):,} bytes in 4 parts, 2 sent, 2 taken from"
        f" the archive that was there; ETag {etag}; CRC64NVME {in_base64(slow_crc('crc64nvme', archive))}\n",
    )


@pytest.mark.long(but=4)
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["s3://none/a.tar"], 1, "s3://none/a.tar: NoSuchBucket: The specified bucket does not exist"),
        (["s3://tapes/a.tar", "--option", "endpoint_url=http://127.0.0.1:1"], 1, "Could not connect"),
        (["s3://tapes/a.tar", "--option", "nonsense"], 2, "not KEY=VALUE"),
        (["s3://tapes/a.tar", "--threads", "0"], 2, "0 is not in the range"),
        (["s3://tapes/a.tar", "--part-size", "0"], 2, "at least one byte"),
        (["s3://tapes/a.tar", "--part-size", "1M"], 2, "S3 takes 10,000 parts"),
        (["s3://tapes/a.tar", "--threads", "2", "--scheduler", "tcp://host:1"], 2, "of this machine"),
        (["s3://tapes/a.tar", "--scheduler", "host:8786"], 2, "no address of a scheduler"),
        (["file:///tmp/a.tar"], 2, "ends in a slash"),
        (["file:///proc/nothing/"], 1, "/proc/nothing: No such file or directory"),
        (["nothing://a/"], 1, "Protocol not known: nothing"),
    ],
)
def test_what_is_refused(data: Path, s3: S3, arguments: list[str], code: int, says: str) -> None:
    result = run("upload", data, *arguments, env=environment(s3) | {"AWS_MAX_ATTEMPTS": "1"})
    refused(result, code)
    assert says in result.stderr
    assert code == 2 or len(result.stderr.splitlines()) == 1


def test_drift_and_no_tape(data: Path, s3: S3, command: list[str]) -> None:
    (data / "07").write_bytes(b"other")
    result = run(*command, env=environment(s3))
    refused(result, 1)
    assert "data/07: size changed since recording" in result.stderr
    assert (s3.keys(), s3.unfinished()) == ([], [])
    refused(run("upload", data.parent, *command[2:], env=environment(s3)), 3)


@pytest.mark.root
def test_a_full_disk(data: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", full], check=True)
    try:
        result = run("upload", data, f"file://{full}/out/", "--part-size", str(PART))
        refused(result, 1)
        assert "No space left on device; the same call goes on from here" in result.stderr
    finally:
        subprocess.run(["umount", full], check=True)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_ended_on_the_way(data: Path, s3: S3, command: list[str], number: int) -> None:
    """The next one sends what is missing, and no more."""
    ended = threading.Event()
    s3.on_part = lambda part: part == 1 or not ended.wait(60)
    names = environment(s3) | {"AWS_MAX_ATTEMPTS": "1"}
    with subprocess.Popen([*TARTAPEFS, *command], env=names, stderr=subprocess.PIPE, text=True) as upload:
        wait_until(lambda: s3.received == [1], 60)
        upload.send_signal(number)
        code = upload.wait(60)  # though the requests have no answer yet
        ended.set()
    assert code == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert s3.keys() == []
    wait_until(lambda: s3.received == [1])
    s3.forget()
    s3.on_part = lambda part: None
    result = run(*command, env=names)
    quiet(result)
    assert (result.returncode, sorted(s3.received)) == (0, [2, 3])
    assert s3.object("a.tar") == whole(data)


def test_what_is_to_be_run_again_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UploadError("s3://tapes/a.tar", "has not the ETag of its parts", "remove it, and run this again")

    monkeypatch.setattr(distributed, "upload", fail)
    monkeypatch.setattr(sys, "argv", ["tartapefs", "upload", "my data", "s3://tapes/a.tar"])
    error = CliRunner().invoke(upload, sys.argv[2:]).exception
    line = "remove it, and run \"tartapefs upload 'my data' s3://tapes/a.tar\""
    assert str(error) == f"s3://tapes/a.tar: has not the ETag of its parts; {line}"


@pytest.mark.long
def test_threads_need_no_dask(data: Path, s3: S3, command: list[str]) -> None:
    code = (
        "import sys; sys.modules['distributed'] = None; sys.argv[0] = 'tartapefs'; from tartapefs.__main__ import main;"
        " main()"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], env=environment(s3), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
