"""An upload to S3: one object, by multipart upload, which becomes visible when it is complete.

Rule: a part counts once its ETag is the MD5 of its bytes, and the object once its ETag is that of these parts. Its
metadata is its label, and is given when the upload begins; a complete object with a label was compared when it was
finished, since S3 completes an upload only from the parts that it is told, by their ETags.

Not every server lists unfinished uploads or their parts: then an upload begins anew each time. Some give the MD5 of the
whole object as its ETag: then the tape is read once more at the end.
"""

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tartapefs.api.archive_file import Parts, Window
from tartapefs.base.errors import UploadError
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.s3_limits import SMALLEST_PART
from tartapefs.transfer.upload_targets import HashedPart, Held, Label, import_needed

_session_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class S3Object:
    """The object `key` of `bucket`.

    `options`: of `boto3.client`; those that begin with a capital are of `create_multipart_upload`, as `StorageClass`.
    """

    bucket: str
    key: str
    options: dict[str, Any]
    upload_id: str = ""

    @classmethod
    def at(cls, url: str, options: dict[str, Any]) -> "S3Object":
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return cls(bucket, key, options)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def _object(self) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.key}

    @property
    def _upload(self) -> dict[str, str]:
        return self._object | {"UploadId": self.upload_id}

    @contextmanager
    def _s3(self, signs_bodies: bool = True) -> Iterator[Any]:
        """A client of boto3, whose errors become UploadError."""
        errors = import_needed("botocore.exceptions")
        try:
            options = {name: value for name, value in self.options.items() if not name[:1].isupper()}
            client = _client(options, signs_bodies)
        except (errors.BotoCoreError, TypeError, ValueError) as error:
            raise UploadError(self.url, _advice(error)) from None
        try:
            yield client
        except (errors.BotoCoreError, errors.ClientError) as error:
            raise UploadError(self.url, _advice(error)) from error
        finally:
            client.close()

    def held(self) -> Held | None:
        with self._s3() as s3:
            found = self._head(s3)
        label = Label.from_strings(found.get("Metadata", {}))
        etag = str(found.get("ETag", "")).strip('"')
        if label is None or found["ContentLength"] != label.size:
            return None
        parts = -(-label.size // label.part_size)
        return Held(label, etag) if etag.partition("-")[2] in ("", str(parts)) else None

    def _head(self, s3: Any) -> dict[str, Any]:
        """What is known of the object; nothing if there is none, or if this user may not know."""
        try:
            found: dict[str, Any] = s3.head_object(**self._object)
        except s3.exceptions.ClientError as error:
            if _status(error) not in (403, 404):
                raise
            return {}
        return found

    def begin(self, label: Label, anew: bool = False) -> "S3Object":
        arguments = {name: value for name, value in self.options.items() if name[:1].isupper()}
        with self._s3() as s3:
            latest = None if anew else self._unfinished(s3)
            latest = latest or s3.create_multipart_upload(**self._object, Metadata=label.as_strings(), **arguments)
        return replace(self, upload_id=latest["UploadId"])

    def _unfinished(self, s3: Any) -> dict[str, Any] | None:
        """The latest unfinished upload of the key."""
        pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.key)
        with _unlisted(s3):
            found = [each for page in pages for each in page.get("Uploads", ()) if each["Key"] == self.key]
            return max(found, key=lambda each: each["Initiated"], default=None)
        return None

    def there(self, parts: Parts) -> dict[int, str]:
        with self._s3() as s3:
            pages = s3.get_paginator("list_parts").paginate(**self._upload)
            with _unlisted(s3):
                return {p["PartNumber"] - 1: p["ETag"].strip('"') for page in pages for p in page.get("Parts", ())}
        return {}

    def kept(self, parts: Parts, held: Held, valid: int) -> dict[int, str]:
        return {}

    def copies(self, held: Held) -> bool:
        # A server whose ETags are of another form may take the copy of a part for an empty part.
        return held.label.size > SMALLEST_PART and "-" in held.etag

    def copy(self, at: int, part: Window, held: Held) -> str:
        with self._s3() as s3:
            answer = s3.upload_part_copy(
                **self._upload,
                PartNumber=at + 1,
                CopySource=self._object,
                CopySourceRange=f"bytes={part.start}-{part.stop - 1}",
                CopySourceIfMatch=f'"{held.etag}"',
            )
        etag: str = answer["CopyPartResult"].get("ETag", "").strip('"')
        if len(etag) != 32:
            raise UploadError(self.url, f"a copied part has the ETag {etag!r}, which is no MD5")
        return etag

    def send(self, at: int, part: HashedPart) -> None:
        with self._s3(signs_bodies=False) as s3:
            answer = s3.upload_part(**self._upload, PartNumber=at + 1, Body=io.BufferedReader(part, CHUNK))
        if answer["ETag"].strip('"') != part.hexdigest():
            raise UploadError(
                self.url, f"{part.name} is stored with the ETag {answer['ETag']}, its MD5 is {part.hexdigest()}"
            )

    def finish(self, md5s: list[str], predicted: str, parts: Parts, label: Label) -> None:
        listed = [{"PartNumber": number, "ETag": md5} for number, md5 in enumerate(md5s, 1)]
        with self._s3() as s3:
            with suppress(s3.exceptions.NoSuchUpload):  # it is complete, and only the answer was lost; or see below
                s3.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": listed})
            found = s3.head_object(**self._object)["ETag"].strip('"')
        if found != predicted and ("-" in found or found != _md5(parts)):
            raise UploadError(self.url, f"has the ETag {found}, predicted was {predicted}")

    def is_labelled(self, label: Label) -> bool:
        with self._s3() as s3:
            return Label.from_strings(self._head(s3).get("Metadata", {})) in (None, label)

    def abort(self) -> None:
        with self._s3() as s3, suppress(s3.exceptions.NoSuchUpload), _unlisted(s3):
            s3.abort_multipart_upload(**self._upload)


def _md5(parts: Parts) -> str:
    """The MD5 of the whole archive."""
    digest, buffer = hashlib.md5(usedforsecurity=False), bytearray(CHUNK)
    for part in parts:
        while count := part.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _status(error: Any) -> int:
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


@contextmanager
def _unlisted(s3: Any) -> Iterator[None]:
    """Passes over the answers of servers that do not know the call: s3rver, and rclone if there is nothing to list."""
    try:
        yield
    except s3.exceptions.ClientError as error:
        if _status(error) not in (405, 501) and error.response["Error"]["Code"] != "NoSuchUpload":
            raise


def _advice(error: Exception) -> str:
    """What went wrong, in one line, with what to do about it."""
    match type(error).__name__:
        case "NoCredentialsError":
            return "there are no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        case "NoRegionError":
            return 'no region is given; set AWS_REGION, or "--option region_name=…"'
    if response := getattr(error, "response", None):
        found = response["Error"]
        return f"{found.get('Code', '')}: {found.get('Message', '')}"
    return " ".join(str(error).split())


@cache
def _session() -> Any:
    return import_needed("boto3.session").Session()


def _client(options: dict[str, Any], signs_bodies: bool) -> Any:
    """Makes a client of boto3: in 5 ms from one session, else in 70, but only one thread at a time may do so.

    It computes no checksums, for which it would read every part once more: a part's MD5 is compared anyway. For the
    same reason the body of a part is not signed: the request that completes the upload is, and it names the MD5s.
    """
    config = import_needed("botocore.config").Config(request_checksum_calculation="when_required")
    with _session_lock:
        client = _session().client("s3", **{"config": config} | options)
    if not signs_bodies:
        client.meta.config.s3 = {"payload_signing_enabled": False} | (client.meta.config.s3 or {})
    return client
