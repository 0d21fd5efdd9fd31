"""Sealing: reads all contents of a recorded tape once, and puts an index with their digests in the old one's place.

Rule: at every instant there is the tape without digests or the tape with them, whole. What was read is kept in a state
file beside the index, from which an interrupted sealing goes on; it belongs to one recording, and each piece of it has
a checksum. Contents are read as a reader of the archive would read them, so a member that is not as recorded ends it.
"""

import fcntl
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from typing import BinaryIO
from zlib import crc32

from tartapefs import merkle
from tartapefs.deep import Part, Reader, Stretch, in_order, stretch_of, stretches
from tartapefs.errors import TapeBusyError, TapeError, TapeSealedError
from tartapefs.fill import Filler
from tartapefs.index import IndexWriter
from tartapefs.layout import BLOCK
from tartapefs.member import Member
from tartapefs.source import Source
from tartapefs.tape import Tape

_STATE = ".seal"  # what is added to the name of the index
_RECORD = struct.Struct("<QII")  # how far in the archive, bytes of digests that follow, checksum

Progress = Callable[[int], None]


def seal(
    tape: Tape,
    source: Source,
    at_home: bool,
    algorithm: merkle.SealAlgorithm = "blake3",
    block_size: int = merkle.BLOCK_SIZE,
    on_progress: Progress = lambda position: None,
    known: Tape | None = None,
) -> str:
    """Seals `tape`, and returns the seal, 64 hex digits. `tape` itself stays as it is: discover it anew.

    `known`: a sealed tape of the same folder. Where both are at home and have digests of one kind, those of members
    that are recorded there with the same facts are taken over, and what lies in such a file now is not read.

    `on_progress` is called with how far in the archive contents have been read. Raises TapeSealedError if it has
    digests already, TapeIntegrityError where the source is not as recorded, TapeBusyError while another program seals
    or records it, TapeFormatError for a damaged index, and OSError where the source cannot be read or the disk is full.
    Then the index is untouched, and what was read need not be read again.
    """
    if tape.seal:
        raise TapeSealedError(tape.index_path)
    if not merkle.SMALLEST_BLOCK <= block_size <= merkle.LARGEST_BLOCK or block_size % BLOCK:
        raise ValueError(f"blocks of {block_size} bytes; they have 64 KiB to 1 MiB, and a multiple of {BLOCK}")
    with _State(tape, algorithm, block_size) as state:
        reader = Reader(Filler(tape, source, at_home), algorithm, block_size)
        if known is not None and not (
            at_home and known.is_at_home(source) and _is_of_kind(known, algorithm, block_size)
        ):
            known = None
        before = _Before(known, reader)
        matched = before.matched(stretches(tape, block_size, state.position))
        for (stretch, _), digests in in_order(before.digests, matched):
            state.add(stretch.stop, digests)
            on_progress(stretch.stop)
        sealed = _write(tape, tape.is_at_home(source), algorithm, block_size, state.digests())
        state.remove()
    return sealed


def _write(
    tape: Tape, at_home: bool, algorithm: merkle.SealAlgorithm, block_size: int, digests: Callable[[int], bytes]
) -> str:
    builder = merkle.Builder(algorithm, block_size)
    with IndexWriter(tape.index_path, block_size) as writer:
        with Tape.from_index(tape.index_path) as now:
            if not now.is_same(tape):  # recorded again meanwhile
                raise TapeBusyError(tape.index_path)
        writer.add(member[1:] for member in tape.members())
        rows = (builder.add(member.header(), member.size, digests) for member in tape.members())
        writer.add_digests(chain.from_iterable(rows))
        writer.add_digests(builder.finish())
        writer.commit(
            tape.facts_to_keep()
            | {
                "seal": builder.seal,
                "algorithm": algorithm,
                "block_size": block_size,
                "levels": builder.levels,
                "unsealed_rows": tape.rows_digest,
            },
            at_home,
        )
    return builder.seal


def _is_of_kind(tape: Tape, algorithm: str, block_size: int) -> bool:
    return bool(tape.seal) and tape.algorithm == algorithm and tape.block_size == block_size


class _Before:
    """The digests that `tape` has of members that are the same there; of others `reader` makes them.

    A damaged tape is of no use from there on, and no error.
    """

    def __init__(self, tape: Tape | None, reader: Reader) -> None:
        self._tape = tape
        self._reader = reader

    def matched(self, them: Iterator[Stretch]) -> Iterator[tuple[Stretch, list[Member | None]]]:
        """Each stretch, and for each of its parts the same member of the tape before, if it has one."""
        members = self._members()
        old = next(members, None)
        for stretch in them:
            same: list[Member | None] = []
            for part in stretch.parts:
                while old is not None and old.sort_key < part.member.sort_key:
                    old = next(members, None)
                same.append(old if old is not None and old.same_object(part.member) else None)
            yield stretch, same

    def _members(self) -> Iterator[Member]:
        if self._tape is not None:
            with suppress(TapeError, OSError):
                yield from self._tape.members()

    def digests(self, matched: tuple[Stretch, list[Member | None]]) -> bytes:
        """As `Reader.digests`."""
        stretch, same = matched
        known = [self._of(part, old) for part, old in zip(stretch.parts, same, strict=True)]
        if not any(known):
            return self._reader.digests(stretch)
        pairs = zip(stretch.parts, known, strict=True)
        return b"".join(self._reader.digests(stretch_of(part)) if its is None else its for part, its in pairs)

    def _of(self, part: Part, old: Member | None) -> bytes | None:
        if old is not None and self._tape is not None:
            size = self._tape.block_size
            with suppress(TapeError, OSError):
                return (
                    self._tape.block_digests(old, part.low // size, merkle.blocks(part.high, size)) if old.size else b""
                )
        return None


class _State:
    """The digests that were reached, in a file. `position`: up to where in the archive contents have been read."""

    def __init__(self, tape: Tape, algorithm: str, block_size: int) -> None:
        self._tape = tape
        self._path = tape.index_path + _STATE
        facts = [1, tape.rows_digest, tape.fingerprint, tape.recorded_ns, algorithm, block_size]
        self._head = json.dumps(facts).encode() + b"\n"
        self.position = 0
        self._file = self._open()
        try:
            self._load()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> BinaryIO:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            file = os.fdopen(fd, "r+b")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):  # its last owner may have removed it before we had the lock
                    if os.path.samestat(os.stat(self._path), os.fstat(fd)):
                        return file
            except BlockingIOError:
                file.close()
                raise TapeBusyError(self._tape.index_path) from None
            except BaseException:
                file.close()
                raise
            file.close()

    def __enter__(self) -> "_State":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _load(self) -> None:
        """Finds what can be gone on from, and cuts off the rest: a record that was being written, another recording."""
        end = 0
        if self._file.readline(1 << 12) == self._head:
            end = self._file.tell()
            for position, digests in self._records():
                self.position = position
                end += _RECORD.size + len(digests)
        self._file.seek(end)
        self._file.truncate()
        if end == 0:
            self._file.write(self._head)

    def _records(self) -> Iterator[tuple[int, bytes]]:
        position = 0
        while len(head := self._file.read(_RECORD.size)) == _RECORD.size:
            stop, size, crc = _RECORD.unpack(head)
            if size % merkle.SIZE or size > 1 << 24 or not position < stop <= self._tape.total_size:
                return
            digests = self._file.read(size)
            if len(digests) != size or _checksum(stop, digests) != crc:
                return
            position = stop
            yield stop, digests

    def add(self, position: int, digests: bytes) -> None:
        """What was read up to `position`; in the file before this returns, whatever becomes of this process."""
        self._file.write(_RECORD.pack(position, len(digests), _checksum(position, digests)) + digests)
        self._file.flush()
        self.position = position

    def digests(self) -> Callable[[int], bytes]:
        """A function that gives the next so many digests, from the first on."""
        self._file.flush()
        self._file.seek(len(self._head))
        records, rest = self._records(), memoryview(b"")

        def take(count: int) -> bytes:
            nonlocal rest
            wanted, taken = count * merkle.SIZE, b""
            while len(taken) < wanted:
                if not rest:
                    _, digests = next(records)
                    rest = memoryview(digests)
                    continue
                piece = rest[: wanted - len(taken)]
                taken += piece
                rest = rest[len(piece) :]
            return taken

        return take

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path)


def _checksum(position: int, digests: bytes) -> int:
    return crc32(digests, position & 0xFFFF_FFFF)
