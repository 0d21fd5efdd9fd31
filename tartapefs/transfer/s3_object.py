"""An upload to S3: one object, by multipart upload, which becomes visible when it is complete.

Rule: a part counts once its ETag is the MD5 of its bytes, and the object once its ETag is that of these parts. Where
ETags are no MD5s (SSE-KMS), the CRC64NVME of each part decides, or of the whole: S3 is asked for that in any case, and
compares it before the object becomes visible. The object's metadata is its label, and is given when the upload begins;
a complete object with a label was compared when it was finished, since S3 completes an upload only from the parts that
it is told, by their ETags.

Not every server lists unfinished uploads or their parts: then an upload begins anew each time. Some give the MD5 of the
whole object as its ETag: then the tape is read once more at the end.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from tartapefs.api.archive_file import Parts, Window
from tartapefs.base.buffers import aligned
from tartapefs.base.crc import NOT_INSTALLED, from_s3_checksum
from tartapefs.base.errors import UploadError
from tartapefs.base.hashes import is_installed
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.range_digests import etag
from tartapefs.transfer.s3_client import advice, client_of, status_of
from tartapefs.transfer.s3_limits import SMALLEST_PART
from tartapefs.transfer.upload_targets import HashedPart, Held, Label, StoredPart, crc64nvme_of, import_needed

log = logging.getLogger("tartapefs")

_CHECKSUM = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}


@dataclass(frozen=True, slots=True)
class S3Object:
    """The object `key` of `bucket`.

    `options`: of `boto3.client`; those that begin with a capital are of `create_multipart_upload`, as `StorageClass`.
    """

    bucket: str
    key: str
    options: dict[str, Any]
    upload_id: str = ""
    checksummed: bool = False  # the upload was begun with CRC64NVME, and it can be computed here

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
            client = client_of(options, signs_bodies)
        except (errors.BotoCoreError, TypeError, ValueError) as error:
            raise UploadError(self.url, advice(error)) from None
        try:
            yield client
        except (errors.BotoCoreError, errors.ClientError) as error:
            raise UploadError(self.url, advice(error)) from error
        finally:
            client.close()

    def held(self) -> Held | None:
        with self._s3() as s3:
            found = self._head(s3)
        label = Label.from_strings(found.get("Metadata", {}))
        if label is None or found["ContentLength"] != label.size:
            return None
        held = _held(label, found)
        parts = -(-label.size // label.part_size)
        return held if held.etag.partition("-")[2] in ("", str(parts)) else None

    def _head(self, s3: Any) -> dict[str, Any]:
        """What is known of the object; nothing if there is none, or if this user may not know."""
        try:
            found: dict[str, Any] = s3.head_object(**self._object, ChecksumMode="ENABLED")
        except s3.exceptions.ClientError as error:
            if status_of(error) not in (403, 404):
                raise
            return {}
        return found

    def begin(self, label: Label, anew: bool = False) -> "S3Object":
        with self._s3() as s3:
            latest = None if anew else self._unfinished(s3)
            latest = latest or self._create(s3, label)
        checksummed = latest.get("ChecksumAlgorithm") == _CHECKSUM["ChecksumAlgorithm"] and is_installed("crc64nvme")
        if not checksummed:
            log.info("%s: compared by ETags, without a checksum of the whole", self.url)
        return replace(self, upload_id=latest["UploadId"], checksummed=checksummed)

    def _create(self, s3: Any, label: Label) -> dict[str, Any]:
        """Begins an upload; with a checksum of the whole, unless the server refuses that or the user wants another."""
        arguments = {name: value for name, value in self.options.items() if name[:1].isupper()}
        arguments |= self._object | {"Metadata": label.as_strings()}
        begun: dict[str, Any]
        if "ChecksumAlgorithm" not in arguments and is_installed("crc64nvme"):
            try:
                begun = s3.create_multipart_upload(**arguments, **_CHECKSUM)
                return begun
            except s3.exceptions.ClientError as error:
                if status_of(error) not in (400, 501):
                    raise
        begun = s3.create_multipart_upload(**arguments)
        return begun

    def _unfinished(self, s3: Any) -> dict[str, Any] | None:
        """The latest unfinished upload of the key."""
        pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.key)
        with _unlisted(s3):
            found = [each for page in pages for each in page.get("Uploads", ()) if each["Key"] == self.key]
            return max(found, key=lambda each: each["Initiated"], default=None)
        return None

    def there(self, parts: Parts) -> dict[int, StoredPart]:
        with self._s3() as s3:
            pages = s3.get_paginator("list_parts").paginate(**self._upload)
            with _unlisted(s3):
                return {found["PartNumber"] - 1: _stored(found) for page in pages for found in page.get("Parts", ())}
        return {}

    def kept(self, parts: Parts, held: Held, valid: int) -> dict[int, StoredPart]:
        return {}

    def copies(self, held: Held) -> bool:
        # A server whose ETags are of another form may take the copy of a part for an empty part.
        is_compared = held.has_md5s or (self.checksummed and held.crc64nvme)
        return held.label.size > SMALLEST_PART and "-" in held.etag and bool(is_compared)

    def copy(self, at: int, part: Window, held: Held) -> StoredPart:
        with self._s3() as s3:
            answer = s3.upload_part_copy(
                **self._upload,
                PartNumber=at + 1,
                CopySource=self._object,
                CopySourceRange=f"bytes={part.start}-{part.stop - 1}",
                CopySourceIfMatch=f'"{held.etag}"',
            )
        copied = _stored({"ETag": ""} | answer["CopyPartResult"])
        if len(copied.etag) == 32 and _has_md5s(answer):
            return replace(copied, md5=copied.etag)
        if copied.crc64nvme is None or not copied.etag:
            raise UploadError(self.url, f"a copied part has the ETag {copied.etag!r}, which is no MD5")
        return copied

    def send(self, at: int, part: HashedPart) -> StoredPart:
        with self._s3(signs_bodies=False) as s3:
            answer = s3.upload_part(**self._upload, PartNumber=at + 1, Body=_Body(part))
        stored = _stored(answer)
        compared_at_the_end = self.checksummed and stored.crc64nvme is None and not _has_md5s(answer)
        if not part.equals(stored) and not compared_at_the_end:
            remedy = "" if is_installed("crc64nvme") or _has_md5s(answer) else f"; {NOT_INSTALLED}"
            raise UploadError(
                self.url,
                f"{part.name} is stored with the ETag {answer['ETag']}, its MD5 is {part.hexdigest()}{remedy}",
            )
        return part.as_stored(stored.etag)

    def finish(self, stored: list[StoredPart], parts: Parts, label: Label) -> Held:
        listed = [{"PartNumber": number, "ETag": part.etag} for number, part in enumerate(stored, 1)]
        crc = crc64nvme_of(stored, label) if self.checksummed else ""
        whole = {"ChecksumCRC64NVME": crc, "ChecksumType": "FULL_OBJECT"} if crc else {}
        answer: dict[str, Any] = {}
        with self._s3() as s3:
            with suppress(s3.exceptions.NoSuchUpload):  # it is complete, and only the answer was lost; or see below
                answer = s3.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": listed}, **whole)
            held = _held(label, s3.head_object(**self._object, ChecksumMode="ENABLED"))
            if crc and held.crc64nvme not in ("", crc):
                is_ours = answer.get("ETag", "").strip('"') == held.etag  # S3 itself would have refused to complete it
                if is_ours:
                    s3.delete_object(**self._object)
                raise UploadError(
                    self.url,
                    f"has the CRC64NVME {held.crc64nvme}, predicted was {crc}" + "; it was removed" * is_ours,
                )
        if crc and held.crc64nvme and any(part.etag != part.md5 for part in stored):
            return held  # whose ETag is not made of MD5s
        predicted = etag(bytes.fromhex(part.md5) for part in stored)
        if held.etag != predicted and ("-" in held.etag or held.etag != _md5(parts)):
            raise UploadError(self.url, f"has the ETag {held.etag}, predicted was {predicted}")
        return held

    def is_labelled(self, label: Label) -> bool:
        with self._s3() as s3:
            return Label.from_strings(self._head(s3).get("Metadata", {})) in (None, label)

    def abort(self) -> None:
        with self._s3() as s3, suppress(s3.exceptions.NoSuchUpload), _unlisted(s3):
            s3.abort_multipart_upload(**self._upload)


def _stored(found: dict[str, Any]) -> StoredPart:
    """What S3 tells of a part."""
    checksum = found.get("ChecksumCRC64NVME")
    return StoredPart(found["ETag"].strip('"'), crc64nvme=from_s3_checksum(checksum) if checksum else None)


def _held(label: Label, found: dict[str, Any]) -> Held:
    return Held(label, found["ETag"].strip('"'), found.get("ChecksumCRC64NVME", ""), _has_md5s(found))


def _has_md5s(found: dict[str, Any]) -> bool:
    """Whether ETags are made of MD5s, as far as S3 tells how the object is encrypted."""
    return found.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in found


class _Body:
    """A part as boto3 reads it: 1 MiB at a time, whatever size is asked for, which is 16 KiB, each sent by itself.

    What `read` returns is valid until the next one.
    """

    def __init__(self, part: HashedPart) -> None:
        self._part, self._buffer = part, aligned(CHUNK)
        self.seek, self.tell = part.seek, part.tell

    def read(self, size: int = -1) -> memoryview:
        return self._buffer[: self._part.readinto(self._buffer)]


def _md5(parts: Parts) -> str:
    """The MD5 of the whole archive."""
    digest, buffer = hashlib.md5(usedforsecurity=False), bytearray(CHUNK)
    for part in parts:
        while count := part.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


@contextmanager
def _unlisted(s3: Any) -> Iterator[None]:
    """Passes over the answers of servers that do not know the call: s3rver, and rclone if there is nothing to list."""
    try:
        yield
    except s3.exceptions.ClientError as error:
        if status_of(error) not in (405, 501) and error.response["Error"]["Code"] != "NoSuchUpload":
            raise
