"""The archive and its parts as files: what files promise, and what the libraries that upload files make of them."""

import gc
import http.client
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests
from boto3.s3.transfer import TransferConfig
from support.digests import expected_etag
from support.programs import wait_until
from support.recordings import whole
from support.s3 import S3, environment, s3_server
from support.shards import fill, shards

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder, Window
from tartapefs.api.archive_file import Parts

PART = 5 << 20  # the smallest that S3 takes


@pytest.fixture
def tape(tree: Path) -> Iterator[Tape]:
    TapeRecorder(tree).commit()
    with Tape.discover(tree) as tape:
        yield tape


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A recorded folder whose archive has four parts."""
    root = tmp_path / "large"
    root.mkdir()
    for number in range(12):
        (root / f"{number:02}").write_bytes(os.urandom(1_500_000))
    TapeRecorder(root).commit()
    return root


@pytest.fixture
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def test_as_a_file(tape: Tape, tree: Path) -> None:
    """Whatever is done with it, it does as an ordinary file with the same bytes."""
    window, file, random = tape.open(), io.BytesIO(whole(tree)), Random(1)
    for _ in range(500):
        match random.randrange(6):
            case 0:
                size = random.choice([None, -1, 0, 1, 511, 512, 5000, 10**9])
                assert window.read(size) == file.read(size)
            case 1:
                mine, other = bytearray(size := random.randrange(3000)), bytearray(size)
                assert window.readinto(mine) == file.readinto(other)
                assert mine == other
            case 2:
                at = random.randrange(window.size + 1000)
                assert window.seek(at) == file.seek(at)
            case 3:
                at = random.randrange(-window.size, 1000)
                assert window.seek(at, os.SEEK_END) == file.seek(at, os.SEEK_END)
            case 4:
                at = random.randrange(-min(100, window.tell()), 100) if window.tell() else 0
                assert window.seek(at, os.SEEK_CUR) == file.seek(at, os.SEEK_CUR)
            case 5:
                assert window.readline() == file.readline()
        assert window.tell() == file.tell()
    assert (window.seek(0), window.readall()) == (0, file.getvalue())


def test_what_a_file_refuses(tape: Tape) -> None:
    window = tape.open()
    assert isinstance(window, io.RawIOBase)
    assert (window.readable(), window.seekable(), window.writable()) == (True, True, False)
    for offset, whence in ((-1, os.SEEK_SET), (-1, os.SEEK_CUR), (-window.size - 1, os.SEEK_END), (0, 9)):
        with pytest.raises(ValueError, match="not a position"):
            window.seek(offset, whence)
    for call in (lambda: window.write(b"x"), window.fileno, window.truncate):
        with pytest.raises((OSError, NotImplementedError)):
            call()
    window.close()
    window.close()
    for call in (window.read, window.tell, lambda: window.seek(0), lambda: window.readinto(bytearray(1))):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_part_of_wider_items(tape: Tape, tree: Path) -> None:
    """A buffer counts in bytes, whatever its items are; a multiple of them or not."""
    buffer = memoryview(bytearray(1024)).cast("I")
    assert tape.parts(700)[1].readinto(buffer) == 700
    assert buffer.cast("B")[:700] == whole(tree)[700:1400]


@pytest.mark.parametrize("size", [1000, 4096, 65_536, 10**12])
def test_parts_make_up_the_archive(tape: Tape, tree: Path, size: int) -> None:
    archive, parts = whole(tree), tape.parts(size)
    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(Window.read, parts)) == archive
    assert len(parts) == -(-len(archive) // size)
    assert [part.size for part in parts] == [len(archive[at : at + size]) for at in range(0, len(archive), size)]
    names = [part.name for part in parts]
    assert names == sorted(names) == [part.name for part in tape.parts(size)]
    assert names[-1] == f"archive.tar.{len(parts):05}"
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    with pytest.raises(IndexError):
        parts[len(parts)]


def test_as_many_parts_as_there_are_names(tape: Tape) -> None:
    least = -(-tape.total_size // 99_999)
    assert len(tape.parts(least)) <= 99_999
    with pytest.raises(ValueError, match=f"more than 99,999; a part needs {least:,} bytes or more"):
        tape.parts(least - 1)
    with pytest.raises(ValueError, match="at least 1"):
        tape.parts(0)


@pytest.mark.parametrize("size", [1024, 10_000, 100_000])
def test_shards_are_archives_of_whole_samples(tmp_path: Path, size: int) -> None:
    root = tmp_path / "data"
    root.mkdir()
    fill(root, 60, size)
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        windows, expected = tape.shards(size), shards(whole(root), size)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(Window.read, windows)) == expected
        assert [window.size for window in windows] == list(map(len, expected))
        assert [window.name for window in windows[:2]] == ["archive.00001.tar", "archive.00002.tar"]
        first = windows[0]
        first.seek(-700, os.SEEK_END)
        assert (first.read(100), first.read(), first.read()) == (bytes(100), bytes(600), b"")
        (root / "zzz").touch()
        with pytest.raises(TapeIntegrityError):
            windows[-1].read()
        first.seek(-700, os.SEEK_END)
        with pytest.raises(TapeIntegrityError):  # though these zeros are read from nowhere
            first.read(100)
        del windows, first
    gc.collect()


def test_one_window_in_many_threads(tape: Tape, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte goes to one of them."""
    readinto = TapePlayer.readinto

    def slowly(*arguments: Any) -> int:
        time.sleep(0.001)
        return readinto(*arguments)

    monkeypatch.setattr(TapePlayer, "readinto", slowly)
    window, pieces = tape.open(), []

    def read() -> None:
        while piece := window.read(1000):
            pieces.append(piece)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    archive = whole(tree)
    assert sorted(pieces) == sorted(archive[at : at + 1000] for at in range(0, len(archive), 1000))


def test_the_source_closes_with_the_last_window(tree: Path) -> None:
    TapeRecorder(tree).commit()
    open_before = len(os.listdir("/proc/self/fd"))
    with Tape.discover(tree) as tape:
        parts = tape.parts(4096)
        first, second = parts[0], parts[1]
        del parts
        first.close()
        assert len(second.read()) == 4096
        second.close()
        del first, second
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_drift(tree: Path) -> None:
    """It comes through as it is, by whichever way the bytes are asked for; and all parts of one call share it."""
    TapeRecorder(tree).commit()
    with Tape.discover(tree) as tape:
        parts = tape.parts(4096)
        (tree / "photos" / "513.bin").write_bytes(b"other")
        with pytest.raises(TapeIntegrityError, match=r"photos/513\.bin"):
            shutil.copyfileobj(tape.open(), io.BytesIO())
        with pytest.raises(TapeIntegrityError, match=r"photos/513\.bin"):
            io.BufferedReader(tape.open()).read()
        with pytest.raises(TapeIntegrityError, match=r"photos/513\.bin"):
            for part in parts:
                part.read()
        with pytest.raises(TapeIntegrityError, match=r"photos/513\.bin"):
            parts[0].read(1)
        del parts, part
    gc.collect()  # a player and the drift that it found hold each other


def test_tarfile_reads_it(tape: Tape, tree: Path) -> None:
    with tarfile.open(fileobj=tape.open()) as archive:
        member = archive.extractfile("data/photos/2024/large.bin")
        assert member is not None
        assert member.read() == (tree / "photos" / "2024" / "large.bin").read_bytes()


class Echo(BaseHTTPRequestHandler):
    """Keeps the headers and the body of each request that sends one."""

    got: list[tuple[dict[str, str], bytes]]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.got.append((dict(self.headers), body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[tuple[int, list[tuple[dict[str, str], bytes]]]]:
    """A real HTTP server: its port, and what it got."""
    handler = type("Handler", (Echo,), {"got": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port, handler.got
        server.shutdown()
        thread.join()


def test_over_http(tape: Tape, tree: Path, echo: tuple[int, list[tuple[dict[str, str], bytes]]]) -> None:
    """requests and http.client send a part as it is, with its length, from the position that it has."""
    port, got = echo
    archive = whole(tree)
    part = tape.parts(100_000)[1]
    with requests.Session() as session:
        session.put(f"http://127.0.0.1:{port}/", data=part).raise_for_status()
        part.seek(90_000)
        session.put(f"http://127.0.0.1:{port}/", data=part).raise_for_status()
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        part.seek(0)
        connection.request("PUT", "/", body=part, headers={"Content-Length": str(part.size)})
        assert connection.getresponse().status == 200
    assert [body for _, body in got] == [archive[100_000:200_000], archive[190_000:200_000], archive[100_000:200_000]]
    assert [headers["Content-Length"] for headers, _ in got] == ["100000", "10000", "100000"]
    assert not any("Transfer-Encoding" in headers for headers, _ in got)
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        part.seek(0)
        connection.request("PUT", "/", body=part)  # which does not look for a length, and sends chunks
        assert connection.getresponse().status == 200
    assert got[-1][1] == archive[100_000:200_000] and got[-1][0]["Transfer-Encoding"] == "chunked"


@pytest.mark.long
def test_boto3_uploads_it(large: Path, s3: S3) -> None:
    """As one stream that boto3 cuts itself, as one object, and part by part: with the bytes and ETags predicted."""
    archive = whole(large)
    with Tape.discover(large) as tape, s3.client() as client:
        config = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART)
        client.upload_fileobj(tape.open(), "tapes", "stream.tar", Config=config)
        assert s3.object("stream.tar") == archive
        assert s3.etag("stream.tar") == expected_etag(archive, PART)

        part = tape.parts(PART)[1]
        client.put_object(Bucket="tapes", Key=part.name, Body=part)
        assert s3.object("archive.tar.00002") == archive[PART : 2 * PART]

        upload = {"Bucket": "tapes", "Key": "parts.tar"}
        upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]

        def send(numbered: tuple[int, Window]) -> dict[str, object]:
            number, part = numbered
            answer = client.upload_part(**upload, PartNumber=number, Body=part)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        with ThreadPoolExecutor(4) as pool:
            sent = list(pool.map(send, enumerate(tape.parts(PART), 1)))
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": sent})
        assert s3.object("parts.tar") == archive
        assert s3.etag("parts.tar") == expected_etag(archive, PART)


UPLOAD = """
import sys
from concurrent.futures import ThreadPoolExecutor
import boto3
from tartapefs import Tape

s3 = boto3.client("s3")
upload = {"Bucket": "tapes", "Key": "a.tar"}
upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
with ThreadPoolExecutor(2) as pool:
    for number, part in enumerate(Tape.discover(sys.argv[1]).parts(int(sys.argv[2])), 1):
        pool.submit(s3.upload_part, **upload, PartNumber=number, Body=part)
"""


@pytest.mark.long
def test_an_upload_that_broke_goes_on(large: Path, s3: S3) -> None:
    """Killed with two of its parts sent, it is completed with the others, and has the ETag predicted."""
    archive, stopped = whole(large), threading.Event()
    s3.on_part = lambda number: number < 3 or not stopped.wait(60)
    uploader = subprocess.Popen([sys.executable, "-c", UPLOAD, large, str(PART)], env=environment(s3))
    try:
        wait_until(lambda: len(s3.received) == 2, 60)
    finally:
        uploader.kill()
        uploader.wait()
        stopped.set()
    s3.on_part = lambda number: None
    with Tape.discover(large) as tape, s3.client() as client:
        (unfinished,) = client.list_multipart_uploads(Bucket="tapes")["Uploads"]
        upload = {"Bucket": "tapes", "Key": "a.tar", "UploadId": unfinished["UploadId"]}
        there = {part["PartNumber"]: part["ETag"] for part in client.list_parts(**upload)["Parts"]}
        assert sorted(there) == [1, 2]
        for number, part in enumerate(tape.parts(PART), 1):
            if number not in there:
                there[number] = client.upload_part(**upload, PartNumber=number, Body=part)["ETag"]
        listed = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(there.items())]
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": listed})
    assert sorted(s3.received) == [1, 2, 3, 4]
    assert s3.object("a.tar") == archive
    assert s3.etag("a.tar") == expected_etag(archive, PART)


def test_drift_ends_an_upload(large: Path, s3: S3) -> None:
    """boto3 aborts what it began: no object, and no parts that cost money."""

    class Changed(Window):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 2 * PART:  # two parts are read: boto3 reads ahead while it sends
                wait_until(lambda: s3.received, 60)
                (large / "11").write_bytes(b"other")
            return super().read(size)

    with Tape.discover(large) as tape, s3.client() as client, closing(TapePlayer(tape)) as player:
        config = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART)
        with pytest.raises(TapeIntegrityError, match="large/11"):
            client.upload_fileobj(Changed(player, 0, tape.total_size, "a.tar"), "tapes", "a.tar", Config=config)
    assert s3.received
    assert (s3.keys(), s3.unfinished()) == ([], [])


def test_without_a_known_source(tape: Tape, tree: Path) -> None:
    """A player with a source of its own makes windows as the tape does."""
    with closing(TapePlayer(tape, tree)) as player:
        assert Parts(player, 10**9)[0].read() == whole(tree)
