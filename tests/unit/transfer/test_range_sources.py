"""Ranges of remote files, each kind from a real server: the right bytes and no others, and what goes wrong by name."""

import random
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.http_ranges import HttpFile, http_file
from support.s3 import S3
from support.s3 import s3 as s3

from tartapefs import CopyError, TapeError
from tartapefs.transfer.range_sources import FsspecRanges, HttpRanges, RangeSource, S3Ranges

DATA = random.Random(1).randbytes(300_000)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # boto3 closes its sockets late


@pytest.fixture
def http() -> Iterator[HttpFile]:
    with http_file(DATA) as file:
        yield file


def read(source: RangeSource, start: int, stop: int) -> bytes:
    buffer, got = memoryview(bytearray(stop - start + 1)), 0
    with source.get(start, stop) as body:
        while count := body.readinto(buffer[got:]):
            got += count
    return bytes(buffer[:got])


def put(s3: S3, data: bytes = DATA) -> None:
    with s3.client() as client:
        client.put_object(Bucket="tapes", Key="a.tar", Body=data)


def check(source: RangeSource) -> None:
    with closing(source):
        assert source.size() == len(DATA)
        for start, stop in ((0, 1), (0, 5000), (299_999, 300_000), (1234, 250_000)):
            assert read(source, start, stop) == DATA[start:stop]


def test_http(http: HttpFile) -> None:
    check(HttpRanges(http.url, {"Authorization": "Basic x"}, True))
    assert http.ranges == [(0, 1), (0, 1), (0, 5000), (299_999, 300_000), (1234, 250_000)]
    assert all(headers["Authorization"] == "Basic x" for headers in http.headers)
    http.forget()
    http.status = 302
    assert HttpRanges(http.url, {"Authorization": "Basic x"}, True).size() == len(DATA)
    assert ["Authorization" in headers for headers in http.headers] == [True, False], "it is for that server alone"


def test_s3(s3: S3) -> None:
    put(s3)
    check(S3Ranges("s3://tapes/a.tar", s3.options, True, 2))


def test_fsspec(tmp_path: Path, http: HttpFile) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    check(FsspecRanges(f"file://{tmp_path}/a.tar", {}))


def test_a_server_without_ranges_is_left_at_once(http: HttpFile) -> None:
    """Of what it sends nothing is read but what the sockets took by then."""
    http.data, http.ignores_ranges = bytes(64 << 20), True
    source = HttpRanges(http.url, {}, False)
    with pytest.raises(CopyError, match=r"archive\.tar: the server gives no ranges: it answers 200"):
        source.size()
    with pytest.raises(CopyError, match="gives no ranges"):
        read(source, 1000, 2000)
    assert http.sent < len(http.data) / 2


@pytest.mark.parametrize("said", ["bytes 0-999/300000", "bytes 1000-1999/*", "items 1000-1999/300000"])
def test_an_answer_with_another_range(http: HttpFile, said: str) -> None:
    http.range_is = said
    with pytest.raises(CopyError, match="does not say which range"):
        read(HttpRanges(http.url, {}, False), 1000, 2000)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, CopyError), (403, CopyError), (416, CopyError), (503, OSError), (429, OSError)]
)
def test_answers_of_http(http: HttpFile, status: int, kind: type[Exception]) -> None:
    http.status = status
    with pytest.raises(kind, match=f"the server answers {status}") as raised:
        HttpRanges(http.url, {}, False).size()
    assert isinstance(raised.value, CopyError) == (kind is CopyError)


def test_no_server(tmp_path: Path, http: HttpFile) -> None:
    http.close()
    with pytest.raises(OSError, match="refused"):
        HttpRanges(http.url, {}, False).size()
    for url in ("http://[x", "http://user:word@127.0.0.1:1x/a"):
        with pytest.raises((CopyError, OSError)):
            HttpRanges(url, {}, False).size()


def test_a_file_that_is_replaced_meanwhile(http: HttpFile, s3: S3) -> None:
    """It is told, unless the tape has digests to check contents with."""
    put(s3)
    pinned = [HttpRanges(http.url, {}, True), S3Ranges("s3://tapes/a.tar", s3.options, True, 1)]
    other = [HttpRanges(http.url, {}, False), S3Ranges("s3://tapes/a.tar", s3.options, False, 1)]
    for source in (*pinned, *other):
        assert source.size() == len(DATA)
    changed = DATA[::-1]
    put(s3, changed)
    http.data, http.etag = changed, '"2"'
    for source in other:
        assert read(source, 0, 100) == changed[:100]
    for source in pinned:
        with pytest.raises(CopyError, match="it was replaced while it was read"):
            read(source, 0, 100)
    http.data, http.etag = DATA + b"x", '"1"'  # as of a server whose ETags do not change, or that has none
    with pytest.raises(CopyError, match="it was replaced while it was read"):
        read(pinned[0], 0, 100)
    for source in (*pinned, *other):
        source.close()


def test_what_is_not_there(s3: S3, tmp_path: Path) -> None:
    sources: list[RangeSource] = [
        S3Ranges("s3://tapes/nothing", s3.options, False, 1),
        S3Ranges("s3://nowhere/nothing", s3.options, False, 1),
        FsspecRanges(f"file://{tmp_path}/nothing", {}),
    ]
    for source in sources:
        with closing(source), pytest.raises(CopyError, match=r"^[a-z0-9]+://.*nothing: .*([Nn]ot [Ff]ound|No such)"):
            source.size()
    with pytest.raises(CopyError, match="name one as s3://BUCKET/KEY"):
        S3Ranges("s3://tapes", s3.options, False, 1)
    with pytest.raises(CopyError, match="gcsfs"):
        FsspecRanges("gs://bucket/key", {}).size()
    with pytest.raises(CopyError, match="nothing-known"):
        FsspecRanges("nothing-known://x", {}).size()


def test_a_server_of_s3_that_fails(s3: S3) -> None:
    """Whatever boto3 tried again by itself."""
    put(s3)
    with closing(S3Ranges("s3://tapes/a.tar", s3.options, False, 1)) as source:
        s3.on_request = lambda method, query: "403 Forbidden"
        with pytest.raises(CopyError, match="403"):
            source.size()
        s3.on_request = lambda method, query: "501 Not Implemented"
        with pytest.raises(OSError, match="501"):
            read(source, 0, 10)


@pytest.mark.parametrize("module", ["botocore", "fsspec"])
def test_without_a_package(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module] or [module]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TapeError, match=rf"{module}.* is not installed; .*pip install 'tartapefs\[upload\]'"):
        if module == "fsspec":
            FsspecRanges("sftp://host/a", {}).size()
        else:
            S3Ranges("s3://tapes/a", {}, False, 1)
