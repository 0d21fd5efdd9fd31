"""ratarmount mounts copies by the exported index: a local one, one behind HTTP, and one in S3.

Run by `make clients`: s3fs needs versions of its own of what boto3 needs too.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.long_names import contents, fill
from support.mounting import mountpoint as mountpoint
from support.programs import done, run, wait_until
from support.readme import README, Scratch
from support.readme import scratch as scratch
from support.recordings import whole
from support.s3 import environment, s3_server

from tartapefs import TapeRecorder

pytestmark = [pytest.mark.fuse, pytest.mark.needs("fusermount3")]
PROGRAMS = Path(sys.executable).parent
Ranges = list[tuple[int, int]]
LARGE = 40_000_000  # bytes in the middle, which nobody needs to read to mount the archive


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with long names, and a large file."""
    root = tmp_path / "data"
    root.mkdir()
    fill(root, 200, 8)
    (root / "large").write_bytes(os.urandom(LARGE))
    TapeRecorder(root, long_names=True).commit()
    return root


@pytest.fixture
def archive(root: Path) -> bytes:
    return whole(root)


@pytest.fixture
def index(root: Path, tmp_path: Path) -> Path:
    done(run("export-index", root, "--ratarmount", tmp_path / "index"))
    return tmp_path / "index"


@contextmanager
def mounted(mountpoint: Path, home: Path, *command: object, **environment: str) -> Iterator[None]:
    """The archive, mounted by ratarmount, which says that it took the index, and makes none."""
    log = home / "ratarmount.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [PROGRAMS / "ratarmount", "-f", *map(os.fspath, command), mountpoint],
            env=os.environ | environment | {"HOME": os.fspath(home), "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=output,
        )
        try:
            wait_until(lambda: os.path.ismount(mountpoint) or process.poll() is not None, 120)
            assert process.poll() is None, log.read_text()
            yield
        finally:
            subprocess.run(["fusermount3", "-u", mountpoint], check=False)
            process.wait(60)
    said = log.read_text()
    assert "Successfully loaded offset dictionary" in said and "Creating" not in said, said


def test_a_local_copy(root: Path, archive: bytes, index: Path, tmp_path: Path, mountpoint: Path) -> None:
    """The index is found beside it, by its name, and stays as it is."""
    (tmp_path / "copy.tar").write_bytes(archive)
    shutil.move(index, beside := tmp_path / "copy.tar.index.sqlite")
    before = beside.read_bytes()
    with mounted(mountpoint, tmp_path, tmp_path / "copy.tar"):
        assert contents(mountpoint / "data") == contents(root)
    assert beside.read_bytes() == before


@contextmanager
def serving(data: bytes) -> Iterator[tuple[str, Ranges]]:
    """A web server that has `data` at every path, by ranges; and the ranges that it sent."""
    sent: Ranges = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET(False)

        def do_GET(self, has_body: bool = True) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            stop = min(int(wanted[2]) + 1, len(data)) if wanted and wanted[2] else len(data)
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.end_headers()
            with suppress(ConnectionError):  # it asks for the whole only to look at the headers
                for at in range(start, stop if has_body else start, 1 << 16):
                    self.wfile.write(data[at : min(at + (1 << 16), stop)])
                    sent.append((at, min(at + (1 << 16), stop)))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/copy.tar", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_behind_http(root: Path, archive: bytes, index: Path, tmp_path: Path, mountpoint: Path) -> None:
    with (
        serving(archive) as (url, sent),
        mounted(mountpoint, tmp_path, "--index-file", index, url),
    ):
        assert sorted(os.listdir(mountpoint / "data")) == sorted(set(os.listdir(root)) - {".tartape"})
        assert sum(stop - start for start, stop in sent) < len(archive) / 2, sent
        assert contents(mountpoint / "data") == contents(root)


def test_in_s3(root: Path, archive: bytes, index: Path, tmp_path: Path, mountpoint: Path) -> None:
    """The index comes from the bucket, too."""
    with s3_server() as s3:
        with s3.client() as client:
            client.put_object(Bucket="tapes", Key="copy.tar", Body=archive)
            client.put_object(Bucket="tapes", Key="copy.tar.index.sqlite", Body=index.read_bytes())
        variables = {name: value for name, value in environment(s3).items() if name.startswith("AWS_")}
        command = ["--index-file", "s3://tapes/copy.tar.index.sqlite", "s3://tapes/copy.tar"]
        with mounted(mountpoint, tmp_path, *command, **variables):
            assert contents(mountpoint / "data") == contents(root)


def test_the_page(scratch: Scratch) -> None:
    """Every command of docs/far-end.md, as it is printed."""
    path = f"{scratch.environment['PATH']}:{PROGRAMS}"
    scratch.environment |= {"PATH": path, "HOME": os.fspath(scratch.folder)}
    scratch.run_all((README.parent / "docs" / "far-end.md").read_text())
    assert scratch.run == 8
