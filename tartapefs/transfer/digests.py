"""Digests of an archive without storing it: of the whole, of its parts as S3 has them, and of each member.

Rule: a digest takes bytes of the archive from any offset, in any order and from any thread; it uses those that continue
where it stopped, and tells which ranges it still needs. `Digests.complete` reads those, and no others, from the player,
which checks every byte. So a digest is that of the archive in one piece, however it was read.

A hash of the whole takes bytes in order only, a CRC in any order, and S3's ETag consists of independent parts.
The progress is kept in a state (see `outputs`), which belongs to one recording, and to those that extend it: they go on
from the last member that both have. BLAKE3's package cannot save a hash half way, so that one starts again in each run.
"""

import hashlib
import heapq
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

from tartapefs.api.tape import Tape
from tartapefs.archive.member import Member
from tartapefs.base.buffers import aligned
from tartapefs.base.crc import CrcAlgorithm
from tartapefs.base.errors import OutputError
from tartapefs.base.resumable_hash import is_resumable
from tartapefs.base.saved_state import SavedState
from tartapefs.base.text import printable
from tartapefs.play.engine import TapePlayer
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.crc_digest import CrcDigest
from tartapefs.transfer.range_digests import HashAlgorithm, PartDigests, RangeDigest

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Algorithm = HashAlgorithm | CrcAlgorithm
CRCS: tuple[CrcAlgorithm, ...] = get_args(CrcAlgorithm)
ALGORITHMS: tuple[Algorithm, ...] = (*get_args(HashAlgorithm), *CRCS)
STATE = "digest"  # what a state of these is for
_SAVE_EVERY = 10.0  # seconds


def sums_line(digest: str, name: bytes) -> bytes:
    """A line as `sha256sum` writes it: a name that contains a backslash, newline or return is escaped, and marked."""
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return b"%b%b  %b\n" % (b"\\" if escaped != name else b"", digest.encode(), escaped)


class Sums:
    """Writes the SHA-256 of every file's content to `out`, in the archive's order, as `sha256sum -c` reads it."""

    def __init__(self, tape: Tape, out: BinaryIO, resumable: bool = False) -> None:
        self._tape, self._out, self._resumable = tape, out, resumable
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
            body = self._member.body
            self._range_digest = RangeDigest("sha256", body, body + self._member.size, self._resumable)

    def _advance(self) -> None:
        """Writes the lines of files that are complete; an empty one is at once."""
        while self._member is not None and self._range_digest.is_complete:
            line = sums_line(self._range_digest.hexdigest(), self._member.name)
            self._written += self._out.write(line)
            self._lines.update(line)
            self._next()

    def add(self, offset: int, data: "ReadableBuffer") -> None:
        view = memoryview(data)
        with self._lock:
            self._advance()
            while self._member is not None and offset <= self._range_digest.position < offset + len(view):
                self._range_digest.add(offset, view)
                self._advance()

    def missing(self) -> Iterator[tuple[int, int]]:
        if self._member is not None:
            yield self._range_digest.position, self._tape.total_size

    def save(self) -> dict[str, Any]:
        with self._lock:
            self._out.flush()
            return {
                "written": self._written,
                "lines": self._lines.hexdigest(),
                "member": None if self._member is None else self._member.start,
                "window": None if self._member is None else self._range_digest.save(),
            }

    def cut(self) -> None:
        """Cuts `out` to what this has written, in an earlier session or this one, if it is a file."""
        if self._out.seekable():
            self._out.truncate(self._written)
            self._out.seek(self._written)

    def load(self, saved: dict[str, Any]) -> None:
        """Continues if `out` still begins with what was written to it when this was saved; else starts again."""
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
        if saved["window"] is not None:
            if self._member is None or self._member.start != start:
                raise ValueError("no file starts there")
            self._range_digest.load(saved["window"])

    @staticmethod
    def cut_back(saved: dict[str, Any], mark: int) -> dict[str, Any]:
        """What goes on with the members from `mark` on, if this was saved after the last one before it."""
        return saved if saved["member"] is not None else saved | {"member": mark, "window": None}


def _union(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Joins sorted ranges where they touch or overlap."""
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


def _digest_of(name: Algorithm, tape: Tape, kept: bool) -> RangeDigest | CrcDigest:
    """The digest of the whole archive. `kept`: it is to be saved half way."""
    end = tape.facts.end if kept else None  # where the archive goes on if the tape is extended
    match name:
        case "crc64nvme" | "crc32c" | "crc32":
            return CrcDigest(name, tape.total_size, end)
        case _:
            return RangeDigest(name, 0, tape.total_size, kept, end)


class Digests:
    """Several digests of `tape`, computed in one pass or over several sessions.

    `algorithms`: of the whole archive. `part_sizes`: of S3 multipart uploads, in bytes. `sums`: a binary file, which
    gets the SHA-256 of each member's content; open for reading and writing if there is a `state`. `state`: the path of
    a file that keeps the progress; if it exists, the digests continue from there.

    Attributes: `tape`; `whole`, the digests by their algorithms; `parts`, those of uploads by their part sizes; `sums`.

    Raises OutputError for a file that is no state, or one that belongs to another recording or is damaged; OSError if
    it cannot be read or created; and TapeError if the package for an algorithm is not installed.
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
        self.whole = {name: _digest_of(name, tape, kept) for name in algorithms}
        self.parts = {size: PartDigests(size, tape.total_size, kept) for size in part_sizes}
        self.sums = Sums(tape, sums, kept) if sums is not None else None
        self._all: dict[str, RangeDigest | CrcDigest | PartDigests | Sums] = dict(self.whole.items())
        self._all |= {f"s3:{size}": parts for size, parts in self.parts.items()}
        if self.sums is not None:
            self._all["sums"] = self.sums
        self._others: dict[str, Any] = {}  # what the state keeps of digests that are not requested now
        if self._state is not None:
            with SavedState(self._state, STATE, wait=True) as kept_state:
                records = list(kept_state.records())
                kept_state.check_whole()
            for record in records:
                self._load(self._state, json.loads(record))
        if self.sums is not None:
            self.sums.cut()

    def add(self, offset: int, data: "ReadableBuffer") -> None:
        """Gives the bytes at `offset`, as the player read them, to every digest. From any thread, in any order."""
        for digest in self._all.values():
            digest.add(offset, data)

    def missing(self) -> list[tuple[int, int]]:
        """The ranges of the archive that at least one digest still needs, in order."""
        return list(_union(heapq.merge(*(digest.missing() for digest in self._all.values()))))

    def complete(
        self, player: TapePlayer, on_progress: Callable[[int, int], None] = lambda position, done: None
    ) -> None:
        """Reads what is missing, each byte once, and hashes it meanwhile, in one thread for each digest.

        `on_progress` is called after each chunk with the position in the archive and the bytes read so far. The state,
        if there is one, is saved every ten seconds and at the end, also after an interruption or an error. Raises what
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
        """The algorithms of the whole archive that cannot be saved half way here: they start again in each session."""
        return tuple(name for name in self.whole if name not in CRCS and not is_resumable(name))

    @property
    def read_again(self) -> int:
        """How many bytes are missing for the `not_kept` ones alone."""
        others = (digest.missing() for name, digest in self._all.items() if name not in self.not_kept)
        return _size(self.missing()) - _size(_union(heapq.merge(*others)))

    def _identity(self) -> dict[str, Any]:
        """The recording that a state belongs to. Headers alone do not distinguish contents of the same second."""
        return {"fingerprint": self.tape.fingerprint, "rows": self.tape.rows_digest}

    def _taken_over(self, content: dict[str, Any]) -> int | None:
        """Up to which byte a state of the recording `content` is one of this tape, None if it is of another one."""
        return self.tape.shared_with(str(content.get("fingerprint")), (content.get("rows"), content.get("packs")))

    @staticmethod
    def _cut_back(name: str, saved: dict[str, Any], mark: int) -> dict[str, Any] | None:
        if name == "sums":
            return Sums.cut_back(saved, mark)
        if name.startswith("s3:"):
            return PartDigests.cut_back(saved, mark, int(name[3:]))
        if name in CRCS:
            return CrcDigest.cut_back(saved, mark)
        return RangeDigest.cut_back(saved, mark)

    def save(self) -> None:
        """Replaces the state file by the progress until now. Raises OSError."""
        assert self._state is not None, "there is no state file"
        digests = {name: saved for name, digest in self._all.items() if (saved := digest.save()) is not None}
        packs = {"packs": self.tape.facts.rows_digest}  # of a sealed tape the rows are others than before
        content = self._identity() | packs | {"digests": self._others | digests}
        with SavedState(self._state, STATE, wait=True) as state:
            state.replace(json.dumps(content).encode())

    def _load(self, path: str, content: dict[str, Any]) -> None:
        kept = content.pop("digests")
        end = self._taken_over(content)
        if end is None:
            raise OutputError(path, "is the state of another recording; remove it to begin anew")
        try:
            if end < self.tape.total_size:
                cut = {name: self._cut_back(name, saved, end) for name, saved in kept.items()}
                kept = {name: saved for name, saved in cut.items() if saved is not None}
            for name, digest in self._all.items():
                if name in kept:
                    digest.load(kept[name])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise OutputError(path, f"{printable(str(error))}; remove it to begin anew") from None
        self._others = {name: saved for name, saved in kept.items() if name not in self._all}
