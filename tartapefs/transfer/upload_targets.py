"""Where an upload stores its parts: an S3 object, by multipart upload, or a folder of fsspec's with a file a part.

Rule: the targets keep no state: each call asks the far end which parts are there.
"""

import hashlib
import io
import shutil
import threading
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from tartapefs.api.archive_file import Parts, Window
from tartapefs.base.errors import OutputError, TapeError
from tartapefs.base.naming import ARCHIVE_NAME, part_number
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.s3_limits import LARGEST_PART, MOST_PARTS, SMALLEST_PART

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_SUMS = "MD5SUMS"
_UNDER_WAY = "unfinished."  # what a part's name begins with while there is a complete set
_session_lock = threading.Lock()


class HashedPart(Window):
    """A window that computes the MD5 of what is read from it, in order; a read at its start starts again."""

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        if self.tell() == 0:
            self._md5 = hashlib.md5(usedforsecurity=False)
        count = super().readinto(buffer)
        self._md5.update(memoryview(buffer)[:count])
        return count

    def hexdigest(self) -> str:
        return self._md5.hexdigest()


class UploadTarget(Protocol):
    """Where parts go. `there` is called before the first part, `finish` after the last, and `send` on workers."""

    def there(self, parts: Parts) -> dict[int, str]:
        """The MD5 of each part that the far end has, by its number from 0."""
        ...

    def send(self, at: int, part: "HashedPart") -> None:
        """Stores part `at`. Raises TapeError if the stored bytes are not those that were read."""
        ...

    def finish(self, md5s: list[str], predicted: str, parts: Parts) -> None: ...

    def abort(self) -> None: ...


def _import(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise TapeError(f"{error.name} is not installed; run pip install 'tartapefs[distributed]'") from None


def target_for(url: str, options: dict[str, Any], parts: Parts, size: int) -> UploadTarget:
    if url.endswith("/"):
        return PartsFolder.begin(url, options)
    if not url.startswith("s3://"):
        raise ValueError(f"{url}: only S3 joins parts to one object; a URL that ends in a slash is a folder of parts")
    if len(parts) > MOST_PARTS or size > LARGEST_PART or (size < SMALLEST_PART and len(parts) > 1):
        raise ValueError(
            f"{len(parts):,} parts of {size:,} bytes: S3 takes {MOST_PARTS:,} parts of {SMALLEST_PART:,} to"
            f" {LARGEST_PART:,} bytes; a URL that ends in a slash is a folder of parts, of up to 99,999"
        )
    return S3Object.begin(url, options)


@dataclass(frozen=True, slots=True)
class S3Object:
    """One object, by multipart upload. Continues the latest unfinished upload of its key."""

    bucket: str
    key: str
    options: dict[str, Any]
    upload_id: str

    @classmethod
    def begin(cls, url: str, options: dict[str, Any]) -> "S3Object":
        bucket, _, key = url.removeprefix("s3://").partition("/")
        with _s3(options) as s3:
            pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key)
            unfinished = [found for page in pages for found in page.get("Uploads", ()) if found["Key"] == key]
            latest = max(unfinished, key=lambda found: found["Initiated"], default=None)
            latest = latest or s3.create_multipart_upload(Bucket=bucket, Key=key)
        return cls(bucket, key, options, latest["UploadId"])

    @property
    def _names(self) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.key, "UploadId": self.upload_id}

    def there(self, parts: Parts) -> dict[int, str]:
        with _s3(self.options) as s3:
            pages = s3.get_paginator("list_parts").paginate(**self._names)
            return {p["PartNumber"] - 1: p["ETag"].strip('"') for page in pages for p in page.get("Parts", ())}

    def send(self, at: int, part: HashedPart) -> None:
        with _s3(self.options) as s3:
            answer = s3.upload_part(**self._names, PartNumber=at + 1, Body=io.BufferedReader(part, CHUNK))
        if answer["ETag"].strip('"') != part.hexdigest():
            raise TapeError(f"{part.name}: stored with the ETag {answer['ETag']}, its MD5 is {part.hexdigest()}")

    def finish(self, md5s: list[str], predicted: str, parts: Parts) -> None:
        listed = [{"PartNumber": number, "ETag": md5} for number, md5 in enumerate(md5s, 1)]
        with _s3(self.options) as s3:
            with suppress(s3.exceptions.NoSuchUpload):  # it is complete, and only the answer was lost; or see below
                s3.complete_multipart_upload(**self._names, MultipartUpload={"Parts": listed})
            found = s3.head_object(Bucket=self.bucket, Key=self.key)["ETag"].strip('"')
        if found != predicted:
            raise TapeError(f"s3://{self.bucket}/{self.key}: has the ETag {found}, predicted was {predicted}")

    def abort(self) -> None:
        with _s3(self.options) as s3, suppress(s3.exceptions.NoSuchUpload):
            s3.abort_multipart_upload(**self._names)


def _is_of_a_part(name: str) -> bool:
    """Whether a file in a folder of parts is a part or the MD5 of one, complete or under way."""
    return part_number(name.removeprefix(_UNDER_WAY).removesuffix(".md5"), ARCHIVE_NAME) is not None


@cache
def _session() -> Any:
    return _import("boto3.session").Session()


def _s3(options: dict[str, Any]) -> "closing[Any]":
    """Makes a client of boto3: in 5 ms from one session, else in 70, but only one thread at a time may do so.

    It computes no checksums, for which it would read every part once more: a part's MD5 is compared anyway.
    """
    config = _import("botocore.config").Config(request_checksum_calculation="when_required")
    with _session_lock:
        return closing(_session().client("s3", **{"config": config} | options))


@dataclass(frozen=True, slots=True)
class PartsFolder:
    """A folder of fsspec's with a file for each part and a file with its MD5, written once the part is whole.

    A complete set of parts, as MD5SUMS says, stays until the next one is complete. Meanwhile the names of the new parts
    begin with `under_way`, which is empty if there is no complete set.
    """

    url: str
    options: dict[str, Any]
    under_way: str = ""

    @classmethod
    def begin(cls, url: str, options: dict[str, Any]) -> "PartsFolder":
        target = cls(url, options)
        fs, path = target._open()
        fs.makedirs(path, exist_ok=True)
        if not fs.exists(f"{path}/{_SUMS}"):
            return target
        listed = [
            line.partition(b"  ")[2].decode(errors="replace") for line in fs.cat_file(f"{path}/{_SUMS}").splitlines()
        ]
        if not all(part_number(name, ARCHIVE_NAME) for name in listed):
            raise OutputError(f"{url}{_SUMS}", "is not of an upload; move it, or choose another folder")
        return replace(target, under_way=_UNDER_WAY)

    def _open(self) -> tuple[Any, str]:
        try:
            fs, path = _import("fsspec").core.url_to_fs(self.url, **self.options)
        except ImportError as error:  # it says which package fsspec needs for this URL
            raise TapeError(f"{self.url}: {error}") from None
        return fs, path.rstrip("/")

    def _listed(self) -> tuple[Any, str, dict[str, int]]:
        """The sizes of the files in the folder, by their names."""
        fs, path = self._open()
        fs.invalidate_cache()
        try:
            listed = fs.ls(path, detail=True)
        except FileNotFoundError:  # an object store has no empty folders
            listed = []
        return fs, path, {found["name"].rpartition("/")[2]: found["size"] for found in listed}

    def there(self, parts: Parts) -> dict[int, str]:
        listed = self._listed()
        found = self._whole(listed, "", parts)
        return found | self._whole(listed, self.under_way, parts) if self.under_way else found

    def _whole(self, listed: tuple[Any, str, dict[str, int]], begin: str, parts: Parts) -> dict[int, str]:
        """The MD5 of each whole part whose file's name begins with `begin`."""
        fs, path, sizes = listed
        whole = {
            f"{begin}{part.name}.md5": at
            for at, part in enumerate(parts)
            if sizes.get(begin + part.name) == part.size and f"{begin}{part.name}.md5" in sizes
        }
        # In one call, which many file systems do at once.
        lines = fs.cat([f"{path}/{name}" for name in whole]) if whole else {}
        return {whole[name.rpartition("/")[2]]: line.decode().partition(" ")[0] for name, line in lines.items()}

    def send(self, at: int, part: HashedPart) -> None:
        fs, path = self._open()
        file = f"{path}/{self.under_way}{part.name}"
        if fs.exists(f"{file}.md5"):
            fs.rm_file(f"{file}.md5")
        with fs.open(file, "wb") as out:
            shutil.copyfileobj(part, out, CHUNK)
        stored = fs.info(file)["size"]
        if stored != part.size:
            raise TapeError(f"{part.name}: stored with {stored} bytes, it has {part.size}")
        fs.pipe_file(f"{file}.md5", f"{part.hexdigest()}  {part.name}\n".encode())

    def finish(self, md5s: list[str], predicted: str, parts: Parts) -> None:
        fs, path, sizes = listed = self._listed()
        names = [part.name for part in parts]
        kept = {*names, *(f"{name}.md5" for name in names)}
        ready = self._whole(listed, self.under_way, parts) if self.under_way else {}
        moving = [name for at, name in enumerate(names) if ready.get(at) == md5s[at]]
        others = {name for name in sizes if _is_of_a_part(name)} - kept
        if self.under_way and others:
            fs.rm_file(f"{path}/{_SUMS}")  # from here on there are parts of two sets
        for name in (name for part in moving for name in (part, f"{part}.md5")):
            fs.mv(f"{path}/{self.under_way}{name}", f"{path}/{name}")
            others.discard(self.under_way + name)
        for name in others:  # of another size, or left by an upload that was killed
            fs.rm_file(f"{path}/{name}")
        lines = [f"{md5}  {name}\n" for md5, name in zip(md5s, names, strict=True)]
        fs.pipe_file(f"{path}/{_SUMS}", "".join(lines).encode())

    def abort(self) -> None:
        fs, path, sizes = self._listed()
        for name in sizes:
            if name.startswith(self.under_way) and _is_of_a_part(name):
                fs.rm_file(f"{path}/{name}")
