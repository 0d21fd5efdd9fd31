"""A copy at a URL, over links that break: it goes on at the byte where it broke, and gives up without one."""

import random
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from support.http_ranges import HttpFile, http_file
from support.s3 import S3
from support.s3 import s3 as s3

from tartapefs import CopyError
from tartapefs.transfer import remote_copy
from tartapefs.transfer.remote_copy import open_url

DATA = random.Random(2).randbytes(1_000_000)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpFile]:
    monkeypatch.setattr(remote_copy, "_PAUSE", 0)
    with http_file(DATA) as file:
        yield file


def test_a_link_that_breaks_again_and_again(http: HttpFile) -> None:
    """Each byte comes once."""
    with closing(open_url(http.url, {}, 1, False)) as copy:
        http.forget()
        http.breaks = lambda start: 70_000
        view = memoryview(bytearray(900_000))
        copy.readinto(view, 50_000)
        assert view == DATA[50_000:950_000]
        assert [start for start, _ in http.ranges[-13:]] == list(range(50_000, 950_000, 70_000))
        assert (copy.received, copy.requests) == (900_000, 13)
        assert copy.cost() == "900,000 bytes received in 13 requests"


def test_a_link_that_is_gone(http: HttpFile) -> None:
    with closing(open_url(http.url, {}, 1, False)) as copy:
        http.forget()
        http.breaks = lambda start: max(60_000 - start, 0)
        with pytest.raises(CopyError, match=r"archive\.tar: failed 4 times, last with: "):
            copy.readinto(memoryview(bytearray(900_000)), 0)
        assert [start for start, _ in http.ranges] == [0, 60_000, 60_000, 60_000, 60_000]
    http.status = 503
    http.forget()
    with pytest.raises(CopyError, match="failed 4 times, last with: the server answers 503"):
        open_url(http.url, {}, 1, False)


def test_what_is_closed_does_not_try_again(http: HttpFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_copy, "_PAUSE", 1000)
    copy = open_url(http.url, {}, 1, False)
    http.breaks = lambda start: 0
    failed: list[CopyError] = []

    def read() -> None:
        try:
            copy.readinto(memoryview(bytearray(10)), 0)
        except CopyError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    copy.close()
    reader.join(60)
    assert len(failed) == 1


@pytest.mark.parametrize("url", ["s3", "http", "file"])
def test_each_kind_of_url(http: HttpFile, s3: S3, url: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("copy") / "a.tar"
    place.write_bytes(DATA)
    with s3.client() as client:
        client.put_object(Bucket="tapes", Key="a.tar", Body=DATA)
    where = {"s3": "s3://tapes/a.tar", "http": http.url.replace("http:", "HTTP:"), "file": f"file://{place}"}[url]
    with closing(open_url(where, s3.options if url == "s3" else {}, 3, True)) as copy:
        assert copy.size == len(DATA)
        views = [memoryview(bytearray(1000)) for _ in range(8)]
        readers = [threading.Thread(target=copy.readinto, args=(view, 1000 * at)) for at, view in enumerate(views)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert b"".join(views) == DATA[:8000]
