"""s3fs and the archive by its URL: copied to a real S3 server, synchronised, sent as a folder of parts.

Run by `make clients`: s3fs needs versions of its own of what boto3 needs too.
"""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.generic
import pytest
import s3fs
from distributed import Client, LocalCluster
from support.digests import expected_etag
from support.recordings import whole
from support.s3 import S3, s3_server

from tartapefs import TapeIntegrityError, TapeRecorder
from tartapefs.distributed import upload

PART = 5 << 20  # the smallest that S3 takes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of s3fs's libraries


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """In the place of what all other tests have: s3fs keeps its connections until Python ends."""


@pytest.fixture
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def options(s3: S3) -> dict[str, Any]:
    return {"key": "x", "secret": "x", "client_kwargs": {"endpoint_url": s3.url, "region_name": "us-east-1"}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A recorded folder whose archive has three parts."""
    root = tmp_path / "data"
    root.mkdir()
    for number in range(9):
        (root / f"{number}").write_bytes(os.urandom(1_500_000))
    TapeRecorder(root).commit()
    return root


def test_copied_block_by_block(root: Path, s3: S3, options: dict[str, Any]) -> None:
    """An upload in parts of the block size, with the ETag that is predicted for it."""
    bucket = s3fs.S3FileSystem(**options)
    with (
        fsspec.open(f"tartape://{root}/archive.tar") as source,
        bucket.open("tapes/a.tar", "wb", block_size=PART) as out,
    ):
        shutil.copyfileobj(source, out, PART)
    assert s3.object("a.tar") == whole(root)
    assert s3.etag("a.tar") == expected_etag(whole(root), PART)


def test_copied_by_fsspec_alone(root: Path, s3: S3, options: dict[str, Any]) -> None:
    """By two URLs, and as a synchronised folder, which is not copied again while it is the same."""
    fsspec.config.conf["s3"] = options
    try:
        generic = fsspec.filesystem("generic", default_method="default")
        generic.copy(f"tartape://{root}/archive.tar", "s3://tapes/copied.tar")
        assert s3.object("copied.tar") == whole(root)
        for _ in range(2):
            fsspec.generic.rsync(f"tartape://{root}", "s3://tapes/synchronised", fs=generic)
        assert s3.object("synchronised/archive.tar") == whole(root)
    finally:
        del fsspec.config.conf["s3"]


def test_one_member_out_of_the_copy(root: Path, s3: S3, options: dict[str, Any]) -> None:
    with s3.client() as client:
        client.put_object(Bucket="tapes", Key="a.tar", Body=whole(root))
    bucket = s3fs.S3FileSystem(**options)
    with bucket.open("tapes/a.tar") as file, tarfile.open(fileobj=file) as archive:
        member = archive.extractfile("data/3")
        assert member is not None and member.read() == (root / "3").read_bytes()


def test_drift(root: Path, s3: S3, options: dict[str, Any]) -> None:
    """In a transaction no object becomes visible; outside of one fsspec closes what it writes, and a short one does."""
    (root / "8").write_bytes(b"other")
    bucket = s3fs.S3FileSystem(**options)

    def copy() -> None:
        with (
            fsspec.open(f"tartape://{root}/archive.tar") as source,
            bucket.open("tapes/a.tar", "wb", block_size=PART) as out,
        ):
            shutil.copyfileobj(source, out, PART)

    with pytest.raises(TapeIntegrityError, match="data/8"), bucket.transaction:
        copy()
    assert (s3.keys(), s3.unfinished()) == ([], [])
    with pytest.raises(TapeIntegrityError, match="data/8"):
        copy()
    assert s3.keys() == ["a.tar"]


def test_a_folder_of_parts_in_a_bucket(root: Path, s3: S3, options: dict[str, Any], tmp_path: Path) -> None:
    """What `tartapefs.distributed` sends to an S3 URL that ends in a slash goes through s3fs."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            dashboard_address=None,
            local_directory=tmp_path / "dask",
        ) as cluster,
        Client(cluster) as client,
    ):
        done = upload(root, "s3://tapes/folder/", client, part_size=PART, storage_options=options)
        assert (done.parts, done.sent, done.etag) == (3, 3, expected_etag(whole(root), PART))
        with s3.client() as direct:
            direct.delete_object(Bucket="tapes", Key="folder/archive.tar.00002")
        assert upload(root, "s3://tapes/folder/", client, part_size=PART, storage_options=options).sent == 1
    names = [f"folder/archive.tar.0000{number}" for number in (1, 2, 3)]
    assert b"".join(map(s3.object, names)) == whole(root)
    listed = s3.keys()
    for key in listed:
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(s3.object(key))
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=tmp_path / "folder", check=True)
