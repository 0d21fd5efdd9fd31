"""Digests that take ranges of an archive: of a whole range, in order, and of parts, in any order.

Rule: a digest takes bytes from any offset, uses those that continue where it stopped, and tells which it still needs.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from tartapefs.base import hashes
from tartapefs.base.hashes import IncrementalHash
from tartapefs.base.resumable_hash import ResumableHash, is_resumable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

HashAlgorithm = Literal["md5", "sha256", "blake3"]


def _new_hash(algorithm: HashAlgorithm, resumable: bool) -> IncrementalHash:
    return ResumableHash(algorithm) if resumable and is_resumable(algorithm) else hashes.constructor(algorithm)()


def etag(md5s: Iterable[bytes]) -> str:
    """The ETag of an S3 multipart upload whose parts have these MD5s, 16 bytes each, in order.

    This holds for objects that are stored plain or with SSE-S3; with SSE-KMS or SSE-C, S3 gives other ETags.

    >>> etag([hashlib.md5(b"a").digest(), hashlib.md5(b"b").digest()])
    '96e024ba2074fe77e8e965ba43a704be-2'
    """
    joined = b"".join(md5s)
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(joined) // 16}"


class RangeDigest:
    """The digest of the bytes `[start, stop)` of the archive.

    `mark`: an offset from which another archive may go on otherwise, so that what is saved can be cut back to it.

    Attributes: `algorithm`; `start`, `stop` and `position`, the next byte that it needs, offsets in the archive.
    """

    def __init__(
        self, algorithm: HashAlgorithm, start: int, stop: int, resumable: bool = False, mark: int | None = None
    ) -> None:
        self.algorithm = algorithm
        self.start, self.stop, self.position = start, stop, start
        self._hash: IncrementalHash | None = _new_hash(algorithm, resumable)
        self._result = ""
        self._mark = mark
        self._at_mark: dict[str, Any] | None = None
        self._lock = threading.Lock()

    @property
    def is_complete(self) -> bool:
        return self.position == self.stop

    def add(self, offset: int, data: "ReadableBuffer") -> None:
        """Hashes the bytes of `data`, which begins at `offset` of the archive, from `position` on."""
        view = memoryview(data)
        with self._lock:
            low = self.position - offset
            if 0 <= low < len(view) and self._hash is not None:
                piece = view[low : self.stop - offset]
                if self._mark is not None and self.position <= self._mark < self.position + len(piece):
                    self._hash.update(piece[: self._mark - self.position])
                    if isinstance(self._hash, ResumableHash):
                        self._at_mark = {"position": self._mark, "state": self._hash.save()}
                    self._hash.update(piece[self._mark - self.position :])
                else:
                    self._hash.update(piece)
                self.position += len(piece)

    def missing(self) -> Iterator[tuple[int, int]]:
        if not self.is_complete:
            yield self.position, self.stop

    def hexdigest(self) -> str:
        """Raises ValueError while bytes are missing."""
        if not self.is_complete:
            raise ValueError(f"the bytes from {self.position} to {self.stop} are missing")
        return self._result if self._hash is None else self._hash.hexdigest()

    def save(self) -> dict[str, Any] | None:
        """What `load` continues from; None if the hash cannot be saved half way."""
        with self._lock:
            at_mark = {} if self._at_mark is None else {"at_mark": self._at_mark}
            if self.is_complete:
                return {"position": self.position, "result": self.hexdigest()} | at_mark
            if isinstance(self._hash, ResumableHash):
                return {"position": self.position, "state": self._hash.save()} | at_mark
            return None

    def load(self, saved: dict[str, Any]) -> None:
        """Continues from what `save` gave. Raises ValueError, KeyError or TypeError for anything else."""
        position = saved["position"]
        if not isinstance(position, int) or not self.start <= position <= self.stop:
            raise ValueError("a position outside its range")
        if position == self.stop:
            self._hash, self._result = None, str(saved["result"])
        elif not is_resumable(self.algorithm):
            return  # it was saved on a machine where that works; here it starts again
        else:
            self._hash = ResumableHash.restore(self.algorithm, saved["state"])
        self.position, self._at_mark = position, saved.get("at_mark")

    @staticmethod
    def cut_back(saved: dict[str, Any], mark: int) -> dict[str, Any] | None:
        """What `save` would have given at `mark` at the latest; None if that is not known."""
        return saved if saved["position"] <= mark else saved.get("at_mark")


class PartDigests:
    """The ETag of the archive as a multipart upload in parts of `size` bytes: MD5 over the MD5s of the parts.

    Attributes: `size`, of a part, and `total_size`, of the archive, in bytes; `count` of parts; `md5s`, of the complete
    parts, by their numbers, from 0 here and from 1 in S3.
    """

    def __init__(self, size: int, total_size: int, resumable: bool = False) -> None:
        if size < 1:
            raise ValueError("a part has at least one byte")
        self.size, self.total_size = size, total_size
        self.count = -(-total_size // size)
        self.md5s: dict[int, bytes] = {}
        self._resumable = resumable
        self._open: dict[int, RangeDigest] = {}
        self._lock = threading.Lock()

    def range(self, number: int) -> tuple[int, int]:
        """The offsets `[start, stop)` of part `number`, from 0."""
        return number * self.size, min((number + 1) * self.size, self.total_size)

    def _range_digest(self, number: int) -> RangeDigest | None:
        with self._lock:
            if number in self.md5s:
                return None
            if number not in self._open:
                self._open[number] = RangeDigest("md5", *self.range(number), self._resumable)
            return self._open[number]

    def add(self, offset: int, data: "ReadableBuffer") -> None:
        view = memoryview(data)
        for number in range(offset // self.size, min(-(-(offset + len(view)) // self.size), self.count)):
            digest = self._range_digest(number)
            if digest is not None:
                digest.add(offset, view)
                if digest.is_complete:
                    with self._lock:
                        self.md5s[number] = bytes.fromhex(digest.hexdigest())
                        self._open.pop(number, None)

    def missing(self) -> Iterator[tuple[int, int]]:
        for number in range(self.count):
            if number not in self.md5s:
                start, stop = self.range(number)
                yield self._open[number].position if number in self._open else start, stop

    def hexdigest(self) -> str:
        """The ETag. Raises ValueError while bytes are missing."""
        if len(self.md5s) < self.count:
            raise ValueError(f"{self.count - len(self.md5s)} of {self.count} parts are missing")
        return etag(self.md5s[number] for number in range(self.count))

    def save(self) -> dict[str, Any]:
        with self._lock:
            begun = ((number, digest.save()) for number, digest in self._open.items())
            return {
                "md5s": {str(number): md5.hex() for number, md5 in self.md5s.items()},
                "open": {str(number): state for number, state in begun if state},
            }

    @staticmethod
    def cut_back(saved: dict[str, Any], mark: int, size: int) -> dict[str, Any]:
        """What `save` would have given of the parts, of `size` bytes, that end at `mark` or before."""
        return {kind: {n: at for n, at in saved[kind].items() if (int(n) + 1) * size <= mark} for kind in saved}

    def load(self, saved: dict[str, Any]) -> None:
        for text, md5 in saved["md5s"].items():
            self.md5s[int(text)] = bytes.fromhex(md5)
        if not all(0 <= number < self.count and len(md5) == 16 for number, md5 in self.md5s.items()):
            raise ValueError("a part outside the archive")
        for text, state in saved["open"].items():
            digest = self._range_digest(int(text))
            if digest is not None:
                digest.load(state)
