"""One S3 object, against a real server: what is held, what is copied, what other servers answer, what goes wrong."""

import hashlib
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.digests import expected_etag, in_base64, slow_crc
from support.encrypting import Encrypting
from support.recordings import player_of, whole
from support.s3 import S3, environment
from support.s3 import s3 as s3
from support.uploads import PART, make

from tartapefs import TapeRecorder, UploadError
from tartapefs.api.archive_file import Parts
from tartapefs.transfer import s3_client, s3_object
from tartapefs.transfer.s3_object import S3Object
from tartapefs.transfer.upload_targets import HashedPart, Held, Label, StoredPart

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = make(tmp_path / "data", count=2, size=PART)
    TapeRecorder(root).commit()
    return root


def send(target: S3Object, data: Path) -> tuple[list[StoredPart], str]:
    """Sends all three parts; returns what is stored, and the ETag that the object must have."""
    archive = whole(data)
    with player_of(data) as player:
        bodies = [
            HashedPart(player, part.start, part.stop, part.name, with_crc=target.checksummed)
            for part in Parts(player, PART)
        ]
        stored = [target.send(at, body) for at, body in enumerate(bodies)]
    md5s = [hashlib.md5(archive[start : start + PART]).hexdigest() for start in range(0, len(archive), PART)]
    assert [part.md5 for part in stored] == md5s
    return stored, expected_etag(archive, PART)


def as_listed(stored: list[StoredPart]) -> dict[int, StoredPart]:
    """As moto lists it, with ETags alone."""
    return {at: StoredPart(part.etag) for at, part in enumerate(stored)}


def test_an_object_and_its_label(data: Path, s3: S3) -> None:
    """It counts as held if the label has its size, and its ETag has as many parts."""
    archive = whole(data)
    label = Label("f", "r", len(archive), PART)
    target = S3Object("tapes", "a.tar", s3.options)
    assert target.held() is None
    begun = target.begin(label)
    assert target.begin(label).upload_id == begun.upload_id != target.begin(label, anew=True).upload_id
    stored, etag = send(begun, data)
    crc = in_base64(slow_crc("crc64nvme", archive))
    with player_of(data) as player:
        parts = Parts(player, PART)
        assert begun.there(parts) == as_listed(stored)
        held = begun.finish(stored, parts, label)
        assert held == begun.finish(stored, parts, label)  # the answer was lost
        wrong = [replace(part, etag="0" * 32, md5="0" * 32) for part in stored]
        with pytest.raises(UploadError, match=f"has the ETag {etag}, predicted was .*-3"):
            begun.finish(wrong, parts, label)
    assert held == target.held() == Held(label, etag, crc)
    assert s3.object("a.tar") == archive
    assert target.is_labelled(label) and not target.is_labelled(Label("g", "r", 1, PART))
    for other in (Label("f", "r", len(archive) + 1, PART), Label("f", "r", len(archive), 2 * PART)):
        again = replace(target.begin(other, anew=True), checksummed=False)  # else its size counts
        stored, etag = send(again, data)
        with player_of(data) as player:
            assert again.finish(stored, Parts(player, PART), other).etag == etag
        assert target.held() is None


@pytest.mark.long
def test_a_copy_is_of_the_object_that_was_held(data: Path, s3: S3) -> None:
    archive = whole(data)
    label = Label("f", "r", len(archive), PART)
    first = S3Object("tapes", "a.tar", s3.options).begin(label)
    with player_of(data) as player:
        parts = Parts(player, PART)
        stored, _ = send(first, data)
        held = first.finish(stored, parts, label)
        assert first.copies(held)
        again = first.begin(label, anew=True)
        copied = [replace(part, crc64nvme=None) for part in stored]
        assert [again.copy(at, parts[at], held) for at in range(len(parts))] == copied
        with s3.client() as client:
            client.put_object(Bucket="tapes", Key="a.tar", Body=b"x" * len(archive))
        with pytest.raises(UploadError, match="Precondition"):
            again.copy(0, parts[0], held)


@pytest.mark.parametrize("answer", [{}, {"ETag": '"97a0f1310a20a30932b5898e31b3561e-2"'}])
def test_a_copy_that_has_no_md5(s3: S3, monkeypatch: pytest.MonkeyPatch, answer: dict[str, str]) -> None:
    """As rclone's server answers, which takes it for an empty part, and SeaweedFS."""
    client = SimpleNamespace(upload_part_copy=lambda **_: {"CopyPartResult": answer}, close=lambda: None)
    monkeypatch.setattr(s3_object, "client_of", lambda options, signs: client)
    label = Label("f", "r", 2 * PART, PART)
    part: Any = SimpleNamespace(start=0, stop=PART)
    with pytest.raises(UploadError, match="no MD5"):
        S3Object("tapes", "a.tar", s3.options, "id").copy(0, part, Held(label, "e-2"))
    target = S3Object("tapes", "a.tar", s3.options)
    assert target.copies(Held(label, "e-2")) and not target.copies(Held(label, "e"))


def test_a_server_whose_etag_is_of_the_whole(data: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of rclone."""
    archive = whole(data)
    for found, is_right in ((hashlib.md5(archive).hexdigest(), True), ("0" * 32, False)):
        client = SimpleNamespace(
            exceptions=SimpleNamespace(NoSuchUpload=KeyError),
            complete_multipart_upload=lambda **_: None,
            head_object=lambda found=found, **_: {"ETag": f'"{found}"'},
            close=lambda: None,
        )
        with monkeypatch.context() as patched, player_of(data) as player:
            patched.setattr(s3_object, "client_of", lambda options, signs, client=client: client)
            finish = partial(S3Object("tapes", "a.tar", s3.options, "id").finish, [], Parts(player, PART))
            if is_right:
                finish(Label("f", "r", 1, PART))
            else:
                with pytest.raises(UploadError, match="predicted was d41d8cd98f00b204e9800998ecf8427e-0"):
                    finish(Label("f", "r", 1, PART))


def test_a_part_is_stored_otherwise_than_it_was_read(data: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    target = S3Object("tapes", "a.tar", s3.options).begin(Label("f", "r", 1, PART))
    monkeypatch.setattr(HashedPart, "hexdigest", lambda part: "0" * 32)
    with pytest.raises(UploadError, match=r"archive.tar.00001 is stored with the ETag .*, its MD5 is 000"):
        send(target, data)


def test_without_the_package_for_checksums(data: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """ETags alone decide; where they are no MD5s, the error says what to install."""
    monkeypatch.setattr(s3_object, "is_installed", lambda algorithm: False)
    label = Label("f", "r", len(whole(data)), PART)
    target = S3Object("tapes", "a.tar", s3.options).begin(label)
    stored, etag = send(target, data)
    with player_of(data) as player:
        assert target.finish(stored, Parts(player, PART), label) == Held(label, etag)
    s3.app = Encrypting(s3.app)
    with pytest.raises(UploadError, match=r"is stored with the ETag .*, its MD5 is .*; needs the package awscrt"):
        send(target.begin(label), data)


def test_servers_that_list_nothing(data: Path, s3: S3) -> None:
    """As s3rver answers. An upload then begins anew each time."""
    label = Label("f", "r", len(whole(data)), PART)

    def refuse(method: str, query: str) -> str | None:
        if method == "GET" and "uploads" in query:
            return "501 Not Implemented"
        return "405 Method Not Allowed" if method in ("GET", "DELETE") and "uploadId" in query else None

    s3.on_request = refuse
    target = S3Object("tapes", "a.tar", s3.options | {"config": quick()})
    begun = target.begin(label)
    assert begun.upload_id != target.begin(label).upload_id
    stored, _ = send(begun, data)
    with player_of(data) as player:
        assert begun.there(Parts(player, PART)) == {}
        target.begin(label).abort()
        begun.finish(stored, Parts(player, PART), label)
    assert s3.object("a.tar") == whole(data)


def quick() -> Any:
    from botocore.config import Config

    return Config(request_checksum_calculation="when_required", retries={"max_attempts": 0})


@pytest.mark.long(but=3)
@pytest.mark.parametrize(
    ("bucket", "key", "options", "says"),
    [
        ("none", "a.tar", {}, "NoSuchBucket: The specified bucket does not exist"),
        ("tapes", "a.tar", {"endpoint_url": "http://127.0.0.1:1"}, "Could not connect"),
        ("tapes", "a.tar", {"endpoint_url": "http://nowhere.invalid"}, "Could not connect"),
        ("tapes", "a.tar", {"endpoint_url": "nonsense"}, "Invalid endpoint: nonsense"),
        ("tapes", "a.tar", {"nonsense": 1}, "nonsense"),
        ("Ta/pes", "a.tar", {}, "Invalid bucket name"),
        ("tapes", "a.tar", {"Nonsense": 1}, "Nonsense"),
    ],
)
def test_what_goes_wrong_is_one_line(s3: S3, bucket: str, key: str, options: dict[str, Any], says: str) -> None:
    target = S3Object(bucket, key, s3.options | {"config": quick()} | options)
    with pytest.raises(UploadError, match=says) as raised:
        target.held()
        target.begin(Label("f", "r", 1, PART))
    assert raised.value.url == f"s3://{bucket}/{key}"
    assert "\n" not in str(raised.value)


def test_without_credentials(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment(s3):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3_client.session.cache_clear()
    try:
        with pytest.raises(UploadError, match="there are no credentials; set AWS_PROFILE"):
            S3Object("tapes", "a.tar", {"endpoint_url": s3.url, "region_name": "us-east-1"}).held()
    finally:
        s3_client.session.cache_clear()


def test_access_is_denied(data: Path, s3: S3) -> None:
    """Whoever may not look at an object may still be allowed to write it."""
    refused: list[str] = []

    def refuse(method: str, query: str) -> str | None:
        if method in refused:
            return "403 Forbidden"
        return None

    s3.on_request = refuse
    target = S3Object("tapes", "a.tar", s3.options | {"config": quick()})
    refused.append("HEAD")
    assert target.held() is None
    assert target.begin(Label("f", "r", 1, PART)).upload_id
    refused.append("POST")
    with suppress(StopIteration), pytest.raises(UploadError, match="403"):
        target.begin(Label("f", "r", 1, PART), anew=True)


def test_a_part_is_read_once(data: Path, s3: S3) -> None:
    """Its body is not signed; the request that names the MD5s is."""
    signed: dict[str, list[str]] = {}
    s3.on_headers = lambda method, headers: signed.setdefault(method, []).append(headers["HTTP_X_AMZ_CONTENT_SHA256"])
    positions: list[int] = []
    label = Label("f", "r", len(whole(data)), PART)
    target = S3Object("tapes", "a.tar", s3.options).begin(label)
    with player_of(data) as player:
        parts = Parts(player, PART)
        part = HashedPart(player, 0, PART, "part", positions.append, target.checksummed)
        stored = target.send(0, part)
        assert positions == sorted(set(positions))
        target.finish([stored], parts, label)
    assert signed["PUT"] == ["UNSIGNED-PAYLOAD"]
    assert "UNSIGNED-PAYLOAD" not in signed["POST"]
