"""Sealing: reads all contents of a recorded tape once, and puts an index with their digests in the old one's place.

Rule: at every instant there is the tape without digests or the tape with them, whole. What was read is kept in a state
(see `outputs`) beside the index, from which an interrupted sealing goes on; it belongs to one recording. Contents are
read as a reader of the archive would read them, so a member that is not as recorded ends it.
"""

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.archive.layout import BLOCK
from tartapefs.archive.member import Member
from tartapefs.base.errors import OutputBusyError, TapeBusyError, TapeError, TapeSealedError
from tartapefs.base.saved_state import SavedState
from tartapefs.index.writer import IndexWriter
from tartapefs.play.assemble import Filler
from tartapefs.source.folder import Source
from tartapefs.verify.content_scan import Part, Reader, Stretch, in_order, stretch_of, stretches

_STATE = ".seal"  # what is added to the name of the index
_STOP = struct.Struct("<Q")  # how far in the archive; the digests up to there follow

Progress = Callable[[int], None]


def seal(
    tape: Tape,
    source: Source,
    at_home: bool,
    algorithm: hash_tree.SealAlgorithm = "blake3",
    block_size: int = hash_tree.BLOCK_SIZE,
    on_progress: Progress = lambda position: None,
    known: Tape | None = None,
    processes: int = 1,
) -> str:
    """Seals `tape`, and returns the seal, 64 hex digits. `tape` itself stays as it is: discover it anew.

    `known`: a sealed tape of the same folder. Where both are at home and have digests of one kind, those of members
    that are recorded there with the same facts are taken over, and what lies in such a file now is not read.

    `processes`: as of `TapeRecorder`. `on_progress` is called with how far in the archive contents have been read.

    Raises TapeSealedError if it has digests already, TapeIntegrityError where the source is not as recorded,
    TapeBusyError while another program seals or records it, OutputError where a file that is not ours has the name of
    the state, TapeFormatError for a damaged index, and OSError where the source cannot be read or the disk is full.
    Then the index is untouched, and what was read need not be read again.
    """
    if tape.seal:
        raise TapeSealedError(tape.index_path)
    if not hash_tree.SMALLEST_BLOCK <= block_size <= hash_tree.LARGEST_BLOCK or block_size % BLOCK:
        raise ValueError(f"blocks of {block_size} bytes; they have 64 KiB to 1 MiB, and a multiple of {BLOCK}")
    with _State(tape, algorithm, block_size) as state:
        reader = Reader(Filler(tape, source, at_home), algorithm, block_size)
        if known is not None and not (
            at_home and known.is_at_home(source.ino) and _is_of_kind(known, algorithm, block_size)
        ):
            known = None
        before = _Before(known, reader)
        matched = before.matched(stretches(tape, block_size, state.position))
        for (stretch, _), digests in in_order(before.digests, matched):
            state.add(stretch.stop, digests)
            on_progress(stretch.stop)
        sealed = _write(tape, tape.is_at_home(source.ino), algorithm, block_size, state.digests(), processes)
        state.remove()
    return sealed


def _write(
    tape: Tape,
    at_home: bool,
    algorithm: hash_tree.SealAlgorithm,
    block_size: int,
    digests: Callable[[int], bytes],
    processes: int,
) -> str:
    builder = hash_tree.Builder(algorithm, block_size)
    with IndexWriter(tape.index_path, block_size, processes) as writer:
        with Tape.from_index(tape.index_path) as now:
            if not now.is_same(tape):  # recorded again meanwhile
                raise TapeBusyError(tape.index_path)
        writer.add(member[1:] for member in tape.members())
        rows = (builder.add(member.header(), member.size, digests) for member in tape.members())
        writer.add_digests(chain.from_iterable(rows))
        writer.add_digests(builder.finish())
        writer.commit(
            tape.facts.to_keep()
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
                    self._tape.block_digests(old, part.low // size, hash_tree.blocks(part.high, size))
                    if old.size
                    else b""
                )
        return None


class _State:
    """The digests that were reached, in a file. `position`: up to where in the archive contents have been read."""

    def __init__(self, tape: Tape, algorithm: str, block_size: int) -> None:
        self._total_size = tape.total_size
        try:
            self._state = SavedState(tape.index_path + _STATE, "seal")
        except OutputBusyError:
            raise TapeBusyError(tape.index_path) from None
        facts = [tape.rows_digest, tape.fingerprint, tape.recorded_ns, algorithm, block_size]
        self._of = json.dumps(facts).encode()
        self.position = 0
        if next(self._state.records(), None) == self._of:
            for position, _ in self._reached():
                self.position = position
        else:  # new, or of another recording
            self._state.clear()
            self._state.add(self._of)

    def __enter__(self) -> "_State":
        return self

    def __exit__(self, *_: object) -> None:
        self._state.close()

    def _reached(self) -> Iterator[tuple[int, bytes]]:
        position = 0
        for record in islice(self._state.records(), 1, None):
            stop, digests = _STOP.unpack_from(record)[0], record[_STOP.size :]
            if len(digests) % hash_tree.SIZE or not position < stop <= self._total_size:
                return
            yield stop, digests
            position = stop

    def add(self, position: int, digests: bytes) -> None:
        """What was read up to `position`; in the file before this returns, whatever becomes of this process."""
        self._state.add(_STOP.pack(position) + digests)
        self.position = position

    def digests(self) -> Callable[[int], bytes]:
        """A function that gives the next so many digests, from the first on."""
        records, rest = self._reached(), memoryview(b"")

        def take(count: int) -> bytes:
            nonlocal rest
            wanted, taken = count * hash_tree.SIZE, b""
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
        self._state.remove()
