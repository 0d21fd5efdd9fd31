"""Seals a recorded tape: reads all contents once, and replaces the index by one with their digests.

Rule: at every instant there is the whole tape without digests or the whole tape with them. The digests so far are kept
in a state (see `outputs`) beside the index, from which an interrupted sealing continues; it belongs to one recording.
Contents are read as a reader of the archive would read them, so a member that is not as recorded ends the sealing.
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
from tartapefs.play.assemble import Assembler
from tartapefs.source.folder import Source
from tartapefs.verify.content_scan import BlockHasher, BodyRange, Extent, extent_of, extents, map_in_order

_STATE = ".seal"  # added to the name of the index
_STOP = struct.Struct("<Q")  # an offset in the archive; the digests up to there follow

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
    """Seals `tape`, and returns the seal, 64 hex digits. `tape` itself does not change: discover it again.

    `known`: a sealed tape of the same folder. If both are at home and have digests of one kind, digests of members that
    it recorded with the same facts are copied, and those files are not read.

    `processes`: as of `TapeRecorder`. `on_progress` is called with the offset in the archive up to which contents have
    been read.

    Raises TapeSealedError if the tape has digests, TapeIntegrityError if the source is not as recorded, TapeBusyError
    while another program seals or records it, OutputError if another file has the name of the state, TapeFormatError
    for a damaged index, and OSError if the source cannot be read or the disk is full. Then the index is untouched, and
    the next call continues.
    """
    if tape.seal:
        raise TapeSealedError(tape.index_path)
    if not hash_tree.SMALLEST_BLOCK <= block_size <= hash_tree.LARGEST_BLOCK or block_size % BLOCK:
        raise ValueError(f"blocks of {block_size} bytes; they have 64 KiB to 1 MiB, and a multiple of {BLOCK}")
    with _State(tape, algorithm, block_size) as state:
        hasher = BlockHasher(Assembler(tape, source, at_home), algorithm, block_size)
        if known is not None and not (
            at_home and known.is_at_home(source.ino) and _is_of_kind(known, algorithm, block_size)
        ):
            known = None
        known_digests = _KnownDigests(known, hasher)
        matched = known_digests.match(extents(tape, block_size, state.position))
        for (extent, _), digests in map_in_order(known_digests.digests, matched):
            state.add(extent.stop, digests)
            on_progress(extent.stop)
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
    with IndexWriter(tape.index_path, block_size, processes, tape.generations) as writer:
        with Tape.from_index(tape.index_path) as now:
            if not now.is_same(tape):  # recorded again meanwhile
                raise TapeBusyError(tape.index_path)
        writer.add(member[1:] for member in tape.members())
        for generation in tape.generations:
            members = tape.members(generation.start, generation.stop)
            rows = (builder.add(member.header(), member.size, digests) for member in members)
            writer.add_digests(chain.from_iterable(rows))
            writer.add_digests(builder.end_generation())
        writer.add_digests(builder.finish())
        if len(tape.generations) > 1:
            writer.supersede(tape.superseded())
            writer.add_name_filters(tape.name_filters())
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


class _KnownDigests:
    """Copies the digests that `tape` has of unchanged members; has `hasher` compute the others.

    A damaged tape gives none from there on, and is no error.
    """

    def __init__(self, tape: Tape | None, hasher: BlockHasher) -> None:
        self._tape = tape
        self._hasher = hasher

    def match(self, extents: Iterator[Extent]) -> Iterator[tuple[Extent, list[Member | None]]]:
        """Yields each extent, with the same member of the known tape, or None, for each of its bodies."""
        members = self._members()
        old = next(members, None)
        for extent in extents:
            same: list[Member | None] = []
            for body in extent.bodies:
                while old is not None and old.sort_key < body.member.sort_key:
                    old = next(members, None)
                same.append(old if old is not None and old.same_object(body.member) else None)
            yield extent, same

    def _members(self) -> Iterator[Member]:
        if self._tape is not None:
            with suppress(TapeError, OSError):
                yield from self._tape.latest_members()

    def digests(self, matched: tuple[Extent, list[Member | None]]) -> bytes:
        """As `BlockHasher.digests`."""
        extent, same = matched
        known = [self._known(body, old) for body, old in zip(extent.bodies, same, strict=True)]
        if not any(known):
            return self._hasher.digests(extent)
        pairs = zip(extent.bodies, known, strict=True)
        return b"".join(self._hasher.digests(extent_of(body)) if its is None else its for body, its in pairs)

    def _known(self, body: BodyRange, old: Member | None) -> bytes | None:
        if old is None or self._tape is None:
            return None
        if not old.size:
            return b""
        size = self._tape.block_size
        with suppress(TapeError, OSError):
            return self._tape.block_digests(old, body.start // size, hash_tree.block_count(body.stop, size))
        return None


class _State:
    """The digests so far, in a file. `position`: up to which offset of the archive contents have been read."""

    def __init__(self, tape: Tape, algorithm: str, block_size: int) -> None:
        self._total_size = tape.total_size
        try:
            self._state = SavedState(tape.index_path + _STATE, "seal")
        except OutputBusyError:
            raise TapeBusyError(tape.index_path) from None
        facts = [tape.rows_digest, tape.fingerprint, tape.recorded_ns, algorithm, block_size]
        self._recording = json.dumps(facts).encode()
        self.position = 0
        if next(self._state.records(), None) == self._recording:
            for position, _ in self._records():
                self.position = position
        else:  # new, or of another recording
            self._state.clear()
            self._state.add(self._recording)

    def __enter__(self) -> "_State":
        return self

    def __exit__(self, *_: object) -> None:
        self._state.close()

    def _records(self) -> Iterator[tuple[int, bytes]]:
        position = 0
        for record in islice(self._state.records(), 1, None):
            stop, digests = _STOP.unpack_from(record)[0], record[_STOP.size :]
            if len(digests) % hash_tree.SIZE or not position < stop <= self._total_size:
                return
            yield stop, digests
            position = stop

    def add(self, position: int, digests: bytes) -> None:
        """Writes the digests up to `position` into the file, where they survive the end of this process."""
        self._state.add(_STOP.pack(position) + digests)
        self.position = position

    def digests(self) -> Callable[[int], bytes]:
        """Returns a function that takes a number, and returns so many more of the digests, from the first on."""
        records, rest = self._records(), memoryview(b"")

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
