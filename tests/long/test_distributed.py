"""A tape uploaded by several processes to a real S3 server and to a folder: killed, restarted, refused, drifted."""

import gc
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from botocore.config import Config
from distributed import Client
from support.daemon import is_gone
from support.programs import run, wait_until
from support.readme import Scratch
from support.readme import scratch as scratch
from support.reference import Reference
from support.s3 import S3, environment, s3_server

from tartapefs import OutputError, TapeError, TapeIntegrityError, TapeRecorder
from tartapefs.distributed import upload
from tartapefs.transfer import parts_folder, s3_client, workers
from tartapefs.transfer.s3_object import S3Object
from tartapefs.transfer.upload_targets import StoredPart
from tartapefs.transfer.url import TapeFileSystem

PART = 5 << 20  # the smallest that S3 takes
FILE = 1_500_000


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A recorded folder whose archive has five parts."""
    root = tmp_path / "data"
    root.mkdir()
    for number in range(15):
        (root / f"{number:02}").write_bytes(os.urandom(FILE))
    TapeRecorder(root).commit()
    return root


@pytest.fixture
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


CLUSTER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with LocalCluster(**options, local_directory=sys.argv[1]) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a cluster of two worker processes, which all the tests here share."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "cluster.py").write_text(CLUSTER)
    names = os.environ | {
        "AWS_MAX_ATTEMPTS": "1",
        "DASK_TEMPORARY_DIRECTORY": str(folder),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    with subprocess.Popen(
        [sys.executable, folder / "cluster.py", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=names,
    ) as cluster:
        yield cluster.stdout.readline().strip()
        cluster.stdin.close()
    wait_until(lambda: not processes_at(folder), 60)


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
        yield client


def processes_at(folder: Path) -> list[str]:
    """Those that were started with `folder` in their command line, or work in it."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (
                os.fsencode(folder) in (entry / "cmdline").read_bytes() or folder in (entry / "cwd").readlink().parents
            ):
                found.append(entry.name)
    return found


def parts_of(reference: Reference) -> list[bytes]:
    return [reference.read(start, PART) for start in range(0, reference.size, PART)]


def predicted(reference: Reference) -> str:
    digests = [hashlib.md5(part).digest() for part in parts_of(reference)]
    return f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}"


def assert_whole(s3: S3, reference: Reference) -> None:
    assert s3.object("a.tar") == reference.read(0, reference.size)
    assert s3.etag("a.tar") == predicted(reference)
    assert s3.unfinished() == []


def assert_nothing(s3: S3) -> None:
    assert (s3.keys(), s3.unfinished()) == ([], [])


def test_an_object_in_parts(data: Path, s3: S3, client: Client) -> None:
    reference, seen = Reference(data), []
    done = upload(
        data,
        "s3://tapes/a.tar",
        client,
        part_size=PART,
        storage_options=s3.options,
        on_progress=lambda *bytes_done: seen.append(bytes_done),
    )
    assert_whole(s3, reference)
    assert sorted(s3.received) == [1, 2, 3, 4, 5]
    assert (done.size, done.parts, done.sent, done.etag) == (reference.size, 5, 5, predicted(reference))
    assert seen[-1] == (reference.size, reference.size)
    assert len(seen) == 5


def test_a_worker_is_killed_on_the_way(data: Path, s3: S3, client: Client) -> None:
    victim = next(iter(client.run(os.getpid).values()))
    killed = threading.Event()

    def kill(number: int) -> None:
        if number == 3 and not killed.is_set():
            killed.set()
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: is_gone(victim))

    s3.on_part = kill
    done = upload(data, "s3://tapes/a.tar", client, part_size=PART, storage_options=s3.options)
    assert killed.is_set()
    assert victim not in client.run(os.getpid).values()
    assert_whole(s3, Reference(data))
    assert done.parts == 5


JOB = """
import json
import sys
from distributed import Client
from tartapefs.distributed import upload

with Client(sys.argv[1]) as client:
    options = json.loads(sys.argv[4])
    upload(sys.argv[2], "s3://tapes/a.tar", client, part_size=int(sys.argv[3]), storage_options=options)
"""


def test_a_job_is_killed_and_started_again(data: Path, s3: S3, client: Client, address: str) -> None:
    stopped = threading.Event()

    def hold(number: int) -> bool:
        return number < 3 or not stopped.wait(60)

    s3.on_part = hold
    arguments = [address, data, str(PART), json.dumps(s3.options)]
    job = subprocess.Popen([sys.executable, "-c", JOB, *arguments])
    try:
        wait_until(lambda: len(s3.received) >= 2, 60)
    finally:
        job.kill()
        job.wait()
        stopped.set()
    assert s3.keys() == []
    assert sorted(s3.received) == [1, 2]
    s3.received.clear()
    s3.on_part = lambda number: None
    done = upload(data, "s3://tapes/a.tar", client, part_size=PART, storage_options=s3.options)
    assert sorted(s3.received) == [3, 4, 5]
    assert done.sent in (2, 3)  # a worker of the killed job may try again to send the part that it was held at
    assert_whole(s3, Reference(data))


def test_a_part_that_is_refused_again_and_again(data: Path, s3: S3, client: Client) -> None:
    """The upload ends with what was sent in place; the next one replaces what is wrong there, and sends the rest."""
    attempts = []

    def refuse(number: int) -> bool:
        attempts.append(number)
        return number != 4

    s3.on_part = refuse
    with pytest.raises(TapeError, match=r"failed 3 times.*the same call goes on"):
        upload(data, "s3://tapes/a.tar", client, part_size=PART, storage_options=s3.options)
    assert attempts.count(4) == 3
    assert s3.keys() == []
    wait_until(lambda: not any(client.processing().values()), 30)
    with s3.client() as direct:
        names = {"Bucket": "tapes", "Key": "a.tar"}
        upload_id = direct.list_multipart_uploads(Bucket="tapes")["Uploads"][0]["UploadId"]
        direct.upload_part(**names, UploadId=upload_id, PartNumber=2, Body=b"x" * PART)
    there = set(s3.received) - {2}
    s3.received.clear()
    s3.on_part = lambda number: None
    done = upload(data, "s3://tapes/a.tar", client, part_size=PART, storage_options=s3.options)
    assert set(s3.received) == set(range(1, 6)) - there
    assert done.sent == 5 - len(there)
    assert_whole(s3, Reference(data))


def fails_at(bad: str, item: int) -> workers.Outcome:
    here = workers.here()
    return workers.Outcome(here, StoredPart(here), failure="no" if here == bad else "")


def test_what_fails_on_one_worker_is_done_by_the_other(client: Client) -> None:
    bad, good = sorted(client.nthreads())
    outcomes = dict(workers.run(workers.Cluster(client), partial(fails_at, bad), range(10), 2, "memory:"))
    assert sorted(outcomes) == list(range(10))
    assert {outcome.part for outcome in outcomes.values()} == {StoredPart(good)}


def change(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


def test_drift_ends_the_upload(data: Path, s3: S3, client: Client) -> None:
    """Found by a worker while it sends; by another tape in the place of the first; by the audit after the last part."""
    go = partial(upload, data, "s3://tapes/a.tar", client, part_size=PART, storage_options=s3.options)

    # As over TLS, the body is read while it is sent, not before: boto3 then wraps what reading it raises.
    unsigned = Config(request_checksum_calculation="when_required", s3={"payload_signing_enabled": False})
    s3.on_part = lambda number: change(data / "14") if number == 2 else None
    with pytest.raises(TapeIntegrityError, match="data/14: mtime"):
        go(storage_options=s3.options | {"config": unsigned})
    assert 2 in s3.received
    assert_nothing(s3)

    TapeRecorder(data, overwrite=True).commit()

    def record_again(now: int, number: int) -> None:
        if number == 2:
            os.utime(data / "14", ns=(now, now))
            TapeRecorder(data, overwrite=True).commit()

    # Another header; then one and the same header, of contents that may be others.
    for now, what in ((10**9, "fingerprint"), (10**9 + 1, "the recording")):
        s3.on_part = partial(record_again, now)
        with pytest.raises(TapeIntegrityError, match=rf"{what} changed .*every host needs the same tape"):
            go()
        assert_nothing(s3)

    s3.on_part = lambda number: None
    s3.received.clear()
    with pytest.raises(TapeIntegrityError, match="data"):
        go(on_progress=lambda done, of: (data / "new").touch() if done == of else None)
    assert len(s3.received) == 5
    assert_nothing(s3)


def test_more_parts_than_s3_lists_at_once(s3: S3) -> None:
    """1,000 are what one answer has."""
    with s3.client() as direct:
        names = {"Bucket": "tapes", "Key": "a.tar"}
        names["UploadId"] = direct.create_multipart_upload(**names)["UploadId"]

        def send(number: int) -> str:
            return direct.upload_part(**names, PartNumber=number, Body=b"%d" % number)["ETag"].strip('"')

        with ThreadPoolExecutor(4) as pool:
            sent = dict(enumerate(pool.map(send, range(1, 1006))))
        assert direct.list_parts(**names)["IsTruncated"]
    nobody: Any = None
    assert S3Object("tapes", "a.tar", s3.options, names["UploadId"]).there(nobody) == {
        at: StoredPart(etag) for at, etag in sent.items()
    }
    assert S3Object("tapes", "a.tar", s3.options).begin(nobody).upload_id == names["UploadId"]


@pytest.mark.root
@pytest.mark.needs("unshare")
def test_two_hosts_with_a_replica_each(data: Path, s3: S3, tmp_path: Path) -> None:
    """The second worker sees a copy of the folder in its place, as another machine would; then one that drifted."""
    replica = tmp_path / "replica"
    subprocess.run(["cp", "-a", data, replica], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dask = [sys.executable, "-m", "dask"]
    options = ["--nthreads", "1", "--no-dashboard", "--local-directory", tmp_path, "--death-timeout", "60"]
    elsewhere = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', replica, data]
    commands = [
        [*dask, "scheduler", "--host", address, "--no-dashboard"],
        [*dask, "worker", address, *options, "--no-nanny"],
        [*elsewhere, *dask, "worker", address, *options, "--no-nanny"],
    ]
    go = partial(upload, data, "s3://tapes/a.tar", part_size=PART, storage_options=s3.options)
    processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    try:
        with Client(address, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            here = client.run(os.stat, data)
            assert len({found.st_ino for found in here.values()}) == 2, "both see the same folder"
            both = threading.Barrier(2, timeout=60)

            def wait_for_both(number: int) -> None:
                if number <= 2:
                    both.wait()

            s3.on_part = wait_for_both
            assert go(client=client).etag == predicted(Reference(data))
            assert_whole(s3, Reference(data))

            with s3.client() as direct:
                direct.delete_object(Bucket="tapes", Key="a.tar")
            s3.on_part = lambda number: None
            (replica / "new").touch()
            with pytest.raises(TapeIntegrityError, match="data: mtime"):
                go(client=client)
            assert_nothing(s3)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def test_a_folder_of_parts(data: Path, client: Client, tmp_path: Path) -> None:
    reference, out = Reference(data), tmp_path / "out"
    go = partial(upload, data, f"file://{out}/", client, part_size=PART)
    assert go().sent == 5
    names = [f"archive.tar.{number:05}" for number in range(1, 6)]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["MD5SUMS", "TARTAPE", *names, *(f"{n}.md5" for n in names)]
    )
    assert b"".join((out / name).read_bytes() for name in names) == reference.read(0, reference.size)
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=out, check=True)

    (out / names[0]).unlink()
    (out / f"{names[1]}.md5").unlink()
    (out / names[2]).write_bytes(b"half")
    (out / f"{names[3]}.md5").write_text(f"{'0' * 32}  {names[3]}\n")
    again = go()
    assert (again.sent, again.etag) == (4, predicted(reference))
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=out, check=True)

    (out / "TARTAPE").unlink()  # so that it is read
    complete = contents(out)
    change(data / "14")
    with pytest.raises(TapeIntegrityError):
        go()
    assert contents(out) == complete

    TapeRecorder(data, overwrite=True).commit()  # another archive, in as many parts
    (out / f"{parts_folder._UNDER_WAY}{names[0]}").write_bytes(b"left by an upload that was killed")
    (out / f"{parts_folder._UNDER_WAY}archive.tar.00009").write_bytes(b"of another size")
    seen: list[dict[str, bytes]] = []
    again = go(on_progress=lambda *_: seen.append(contents(out)))
    assert again.etag == predicted(Reference(data))
    for found in seen:
        assert complete.items() <= found.items(), "the complete set was touched before the next one was complete"
    assert sorted(contents(out)) == sorted([*complete, "TARTAPE"])
    assert b"".join((out / name).read_bytes() for name in names) == Reference(data).read(0, Reference(data).size)
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=out, check=True)

    assert go(part_size=2 * PART).parts == 3  # so the parts of before would be in the way
    assert len(contents(out)) == 8
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=out, check=True)

    (out / "MD5SUMS").unlink()  # not complete: then drift takes all of it away
    (out / "mine").write_bytes(b"mine")
    (out / "archive.tar.mine").write_bytes(b"mine")
    change(data / "14")
    with pytest.raises(TapeIntegrityError):
        go()
    assert contents(out) == {"mine": b"mine", "archive.tar.mine": b"mine"}
    (out / "MD5SUMS").write_bytes(b"d41d8cd98f00b204e9800998ecf8427e  my-own-file\n")
    with pytest.raises(OutputError, match="is not of an upload"):
        go()
    assert (out / "MD5SUMS").read_bytes().endswith(b"my-own-file\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("page", ["python.md", "distributed.md", "uploads.md"])
def test_the_pages(page: str, s3: S3, address: str, scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their examples, as they are printed, with this server and this cluster in the place of theirs."""
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    scratch.environment |= environment(s3) | {"PATH": scratch.environment["PATH"]}
    s3_client.session.cache_clear()
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    text = text.replace("tcp://scheduler:8786", address)
    text = text.replace('spread.tar", client)', f'spread.tar", client, storage_options={s3.options!r})')
    run("record", "data", cwd=scratch.folder / "work")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the examples close nothing
        scratch.run_all(text)
        archive = Reference(scratch.folder / "work" / "data")
        assert s3.object(s3.keys()[0]) == archive.read(0, archive.size)
        for name in ("s3", "client"):
            if name in scratch.names:
                scratch.names[name].close()
        scratch.names.clear()
        gc.collect()
    TapeFileSystem.clear_instance_cache()
