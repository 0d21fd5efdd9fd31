"""Digests of an archive that nobody stores: of the whole, of its parts as S3 has them, of each member.

Rule: a digest takes bytes of the archive from anywhere, in any order and from any thread: of what it is given it uses
what goes on where it stopped, and it can tell which ranges it still misses. `Digests.complete` reads those, and no
others, from the player, whose every byte is checked; so a digest comes out whole however the reading before was broken
up, and the same as that of the archive in one piece.

A hash of the whole can only go on in order; S3's ETag is made of independent parts, in any order. What was reached is
kept in a state (see `outputs`), which belongs to one recording. BLAKE3's package
cannot save a hash half way, so that one begins anew in each session.
"""

import hashlib
import heapq
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

from tartapefs.api.tape import Tape
from tartapefs.archive.layout import BLOCK
from tartapefs.archive.member import Member
from tartapefs.base import outputs
from tartapefs.base.buffers import aligned
from tartapefs.base.errors import OutputError, TapeError
from tartapefs.base.resumable_hash import SavableHash, savable
from tartapefs.base.text import printable
from tartapefs.play.engine import TapePlayer
from tartapefs.play.playback import CHUNK

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Algorithm = Literal["md5", "sha256", "blake3"]
ALGORITHMS: tuple[Algorithm, ...] = ("md5", "sha256", "blake3")
STATE = "digest"  # what a state of these is for
_SAVE_EVERY = 10.0  # seconds


class _Hash(Protocol):
    def update(self, data: "ReadableBuffer", /) -> object: ...
    def hexdigest(self) -> str: ...


def _new_hash(algorithm: Algorithm, may_be_saved: bool) -> _Hash:
    if algorithm == "blake3":
        try:
            from blake3 import blake3
        except ImportError:
            raise TapeError('BLAKE3 needs the package blake3: pip install "tartapefs[blake3]"') from None
        return blake3()
    if may_be_saved and savable(algorithm):
        return SavableHash(algorithm)
    return hashlib.new(algorithm, usedforsecurity=False)


def etag(md5s: Iterable[bytes]) -> str:
    """The ETag that S3 gives to a multipart upload whose parts have these MD5s, 16 bytes each, in order.

    (Of an object that is stored plain or with SSE-S3; with SSE-KMS or SSE-C S3 makes up others.)

    >>> etag([hashlib.md5(b"a").digest(), hashlib.md5(b"b").digest()])
    '96e024ba2074fe77e8e965ba43a704be-2'
    """
    joined = b"".join(md5s)
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(joined) // 16}"


class Stretch:
    """The digest of the bytes `[start, stop)` of the archive. `position`: the next byte that it needs."""

    def __init__(self, algorithm: Algorithm, start: int, stop: int, may_be_saved: bool = False) -> None:
        self.algorithm = algorithm
        self.start, self.stop, self.position = start, stop, start
        self._hash: _Hash | None = _new_hash(algorithm, may_be_saved)
        self._result = ""
        self._lock = threading.Lock()

    @property
    def is_complete(self) -> bool:
        return self.position == self.stop

    def add(self, offset: int, data: "ReadableBuffer") -> None:
        """Takes of `data`, which lies at `offset` of the archive, what goes on at `position`."""
        view = memoryview(data)
        with self._lock:
            low = self.position - offset
            if 0 <= low < len(view) and self._hash is not None:
                piece = view[low : self.stop - offset]
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
        """What `load` goes on from; None if nothing of it can be kept."""
        with self._lock:
            if self.is_complete:
                return {"position": self.position, "result": self.hexdigest()}
            if isinstance(self._hash, SavableHash):
                return {"position": self.position, "state": self._hash.save()}
            return None

    def load(self, saved: dict[str, Any]) -> None:
        position = saved["position"]
        if not isinstance(position, int) or not self.start <= position <= self.stop:
            raise ValueError("a position outside its range")
        if position == self.stop:
            self._hash, self._result = None, str(saved["result"])
        elif not savable(self.algorithm):
            return  # saved where it could be, and begun anew where it cannot
        else:
            self._hash = SavableHash.restore(self.algorithm, saved["state"])
        self.position = position


class Parts:
    """The ETag of the archive as a multipart upload in parts of `size` bytes: MD5 over the MD5s of the parts.

    Parts are numbered from 0 here and from 1 in S3. `md5s`: those that are complete.
    """

    def __init__(self, size: int, total_size: int, may_be_saved: bool = False) -> None:
        if size < 1:
            raise ValueError("a part has at least one byte")
        self.size, self.total_size = size, total_size
        self.count = -(-total_size // size)
        self.md5s: dict[int, bytes] = {}
        self._may_be_saved = may_be_saved
        self._open: dict[int, Stretch] = {}
        self._lock = threading.Lock()

    def range(self, number: int) -> tuple[int, int]:
        """Where part `number`, from 0, lies: `[start, stop)`."""
        return number * self.size, min((number + 1) * self.size, self.total_size)

    def _window(self, number: int) -> Stretch | None:
        with self._lock:
            if number in self.md5s:
                return None
            if number not in self._open:
                self._open[number] = Stretch("md5", *self.range(number), self._may_be_saved)
            return self._open[number]

    def add(self, offset: int, data: "ReadableBuffer") -> None:
        view = memoryview(data)
        for number in range(offset // self.size, min(-(-(offset + len(view)) // self.size), self.count)):
            window = self._window(number)
            if window is not None:
                window.add(offset, view)
                if window.is_complete:
                    with self._lock:
                        self.md5s[number] = bytes.fromhex(window.hexdigest())
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
            begun = ((number, window.save()) for number, window in self._open.items())
            return {
                "md5s": {str(number): md5.hex() for number, md5 in self.md5s.items()},
                "open": {str(number): state for number, state in begun if state},
            }

    def load(self, saved: dict[str, Any]) -> None:
        for text, md5 in saved["md5s"].items():
            self.md5s[int(text)] = bytes.fromhex(md5)
        if not all(0 <= number < self.count and len(md5) == 16 for number, md5 in self.md5s.items()):
            raise ValueError("a part outside the archive")
        for text, state in saved["open"].items():
            window = self._window(int(text))
            if window is not None:
                window.load(state)


def sums_line(digest: str, name: bytes) -> bytes:
    """A line as `sha256sum` writes it: a name with a backslash, newline or return in it is escaped, and marked so."""
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return b"%b%b  %b\n" % (b"\\" if escaped != name else b"", digest.encode(), escaped)


class Sums:
    """The SHA-256 of every file's content, written to `out` in the archive's order, as `sha256sum -c` reads it."""

    def __init__(self, tape: Tape, out: BinaryIO, may_be_saved: bool = False) -> None:
        self._tape, self._out, self._may_be_saved = tape, out, may_be_saved
        self._written = 0  # bytes
        self._lines = hashlib.sha256()  # of what was written
        self._lock = threading.Lock()
        self._start(0)

    def _start(self, position: int) -> None:
        self._files = (member for member in self._tape.members(position) if member.is_file)
        self._next()

    def _next(self) -> None:
        self._member: Member | None = next(self._files, None)
        if self._member is not None:
            body = self._member.start + BLOCK
            self._window = Stretch("sha256", body, body + self._member.size, self._may_be_saved)

    def _advance(self) -> None:
        """Writes the line of each file that is complete, which an empty one is at once."""
        while self._member is not None and self._window.is_complete:
            line = sums_line(self._window.hexdigest(), self._member.name)
            self._written += self._out.write(line)
            self._lines.update(line)
            self._next()

    def add(self, offset: int, data: "ReadableBuffer") -> None:
        view = memoryview(data)
        with self._lock:
            self._advance()
            while self._member is not None and offset <= self._window.position < offset + len(view):
                self._window.add(offset, view)
                self._advance()

    def missing(self) -> Iterator[tuple[int, int]]:
        if self._member is not None:
            yield self._window.position, self._tape.total_size

    def save(self) -> dict[str, Any]:
        with self._lock:
            self._out.flush()
            return {
                "written": self._written,
                "lines": self._lines.hexdigest(),
                "member": None if self._member is None else self._member.start,
                "window": None if self._member is None else self._window.save(),
            }

    def cut(self) -> None:
        """Cuts `out` to what this has written, in an earlier session or never. A pipe has nothing to cut."""
        if self._out.seekable():
            self._out.truncate(self._written)
            self._out.seek(self._written)

    def load(self, saved: dict[str, Any]) -> None:
        """Goes on if `out` still has what was written to it when this was saved; else it begins anew."""
        start = saved["member"]
        self._out.seek(0)
        lines = hashlib.sha256(self._out.read(saved["written"]))
        if lines.hexdigest() != saved["lines"]:
            return
        self._written, self._lines = saved["written"], lines
        if start is None:
            self._member = None
            return
        self._start(start)
        if self._member is None or self._member.start != start:
            raise ValueError("no file starts there")
        if saved["window"] is not None:
            self._window.load(saved["window"])


def _union(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted ranges, joined where they touch or overlap."""
    low = high = -1
    for start, stop in ranges:
        if start > high:
            if low < high:
                yield low, high
            low = start
        high = max(high, stop)
    if low < high:
        yield low, high


def _size(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


class Digests:
    """Several digests of `tape`, made in one pass, or in as many as it takes.

    `algorithms`: of the whole archive. `part_sizes`: of S3 multipart uploads, in bytes. `sums`: a binary file, which
    gets the SHA-256 of each member's content; open for reading and writing if there is a `state`. `state`: the path of
    a file that keeps what was reached; if it exists, the digests go on from there.

    Raises OutputError for a file that is no state, or one that belongs to another recording or is damaged, and OSError
    where it cannot be read or made.
    """

    def __init__(
        self,
        tape: Tape,
        algorithms: Iterable[Algorithm] = (),
        part_sizes: Iterable[int] = (),
        sums: BinaryIO | None = None,
        state: str | os.PathLike[str] | None = None,
    ) -> None:
        self.tape = tape
        self._state = os.fspath(state) if state is not None else None
        kept = self._state is not None
        self.whole = {name: Stretch(name, 0, tape.total_size, kept) for name in algorithms}
        self.parts = {size: Parts(size, tape.total_size, kept) for size in part_sizes}
        self.sums = Sums(tape, sums, kept) if sums is not None else None
        self._all: dict[str, Stretch | Parts | Sums] = dict(self.whole.items())
        self._all |= {f"s3:{size}": parts for size, parts in self.parts.items()}
        if self.sums is not None:
            self._all["sums"] = self.sums
        self._others: dict[str, Any] = {}  # what the state keeps for digests that are not asked for now
        if self._state is not None:
            with outputs.State(self._state, STATE, wait=True) as kept_state:
                records = list(kept_state.records())
                kept_state.check_whole()
            for record in records:
                self._load(self._state, json.loads(record))
        if self.sums is not None:
            self.sums.cut()

    def add(self, offset: int, data: "ReadableBuffer") -> None:
        """Offers the bytes at `offset`, as the player gave them, to every digest. From any thread, in any order."""
        for digest in self._all.values():
            digest.add(offset, data)

    def missing(self) -> list[tuple[int, int]]:
        """The ranges of the archive that some digest still needs, in order."""
        return list(_union(heapq.merge(*(digest.missing() for digest in self._all.values()))))

    def complete(
        self, player: TapePlayer, on_progress: Callable[[int, int], None] = lambda position, done: None
    ) -> None:
        """Reads what is missing, each byte once, and hashes it in a thread for each digest while it reads on.

        `on_progress` is called after each chunk with the position in the archive and the bytes read so far. The state,
        if there is one, is saved every ten seconds and at the end, also when this is interrupted or fails. Raises what
        `TapePlayer.read` raises.
        """
        spare, buffer = aligned(CHUNK), aligned(CHUNK)
        saved, done = time.monotonic(), 0
        try:
            with ThreadPoolExecutor(max(1, len(self._all))) as pool:
                hashing: list[Any] = []
                for start, stop in self.missing():
                    for position in range(start, stop, CHUNK):
                        count = player.readinto(buffer[: stop - position], position)
                        for future in hashing:
                            future.result()
                        if self._state is not None and time.monotonic() - saved > _SAVE_EVERY:
                            self.save()
                            saved = time.monotonic()
                        chunk = buffer[:count]
                        hashing = [pool.submit(digest.add, position, chunk) for digest in self._all.values()]
                        spare, buffer = buffer, spare
                        done += count
                        on_progress(position + count, done)
                for future in hashing:
                    future.result()
        finally:
            if self._state is not None:
                self.save()

    def results(self) -> dict[str, str]:
        """Each digest by its name: an algorithm, or `s3:` and the part size. Raises ValueError if some are missing."""
        return {name: digest.hexdigest() for name, digest in self._all.items() if not isinstance(digest, Sums)}

    @property
    def not_kept(self) -> tuple[Algorithm, ...]:
        """The algorithms of the whole whose state cannot be saved here: they begin anew in each session."""
        return tuple(name for name in self.whole if not savable(name))

    @property
    def read_again(self) -> int:
        """How many bytes are missing for those alone."""
        others = (digest.missing() for name, digest in self._all.items() if name not in self.not_kept)
        return _size(self.missing()) - _size(_union(heapq.merge(*others)))

    def _identity(self) -> dict[str, Any]:
        """What a state belongs to: the headers alone do not tell two contents of the same second apart."""
        return {"fingerprint": self.tape.fingerprint, "rows": self.tape.rows_digest}

    def save(self) -> None:
        """Replaces the state file by what was reached until now. Raises OSError."""
        assert self._state is not None, "there is no state file"
        digests = {name: saved for name, digest in self._all.items() if (saved := digest.save()) is not None}
        content = self._identity() | {"digests": self._others | digests}
        with outputs.State(self._state, STATE, wait=True) as state:
            state.replace(json.dumps(content).encode())

    def _load(self, path: str, content: dict[str, Any]) -> None:
        kept = content.pop("digests")
        if content != self._identity():
            raise OutputError(path, "is the state of another recording; remove it to begin anew")
        try:
            for name, digest in self._all.items():
                if name in kept:
                    digest.load(kept[name])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise OutputError(path, f"{printable(str(error))}; remove it to begin anew") from None
        self._others = {name: saved for name, saved in kept.items() if name not in self._all}
