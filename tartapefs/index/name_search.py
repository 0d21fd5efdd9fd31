"""Finds the pack that a name could be in: by the filters of later generations, which tell those that lack it, and by
the first names of packs, which are read without decoding the packs.

Rule: a row is used once its checksum was checked. What is found here is a hint: the member itself is read by `reader`,
with all checks, those against a seal included.
"""

from collections.abc import Iterator, Sequence
from typing import Any
from zlib import crc32

from tartapefs.archive.member import path_key
from tartapefs.index import name_filter, row_codec, schema
from tartapefs.index.connections import Connections

# First names in memory, some 250 bytes each. None is dropped: the first search leaves those that every search needs.
_MAX_PEEKED = 1 << 16

_Row = tuple[int, int, int, bytes, int]
_Peeked = tuple[bytes, int, int]  # the key of a pack's first name; where the pack starts and stops


class NameSearch:
    """The packs of the index behind `connections`, searched by name; usable from many threads.

    `root`: the name that all members begin with, its slash included. `begins`: where generations start. Raises
    TapeFormatError if the index is damaged.
    """

    def __init__(self, connections: Connections, root: bytes, begins: frozenset[int]) -> None:
        self._connections = connections
        self._root = root
        self._begins = begins
        self._peeked: dict[int, _Peeked] = {}  # by an offset within the pack

    def pack_with(self, key: bytes, start: int, stop: int, is_last: bool = False) -> tuple[int, int] | None:
        """Where the pack of the generation `[start, stop)` lies that may have the member of this `path_key`, if any.

        `is_last`: also if its strings say that it does not.
        """
        peeked, low, high, found = self._peeked, start, stop, None
        rows: dict[int, _Row] = {}  # that this search read, by their starts
        while low < high:
            middle = (low + high) // 2
            first, pack_start, pack_stop = peeked.get(middle) or self._peek(middle, rows)
            if first <= key:
                found, low = (first, pack_start, pack_stop), pack_stop
            else:
                high = pack_start
        if found is None:
            return None
        first, pack_start, pack_stop = found
        if not is_last and first != key:
            _, count, _, packed, _ = rows.get(pack_start) or self._row(pack_start)
            try:
                if not row_codec.may_have(count, packed, key.rpartition(b"\0")[2]):
                    return None
            except row_codec.MALFORMED as error:
                raise self._malformed(pack_start, error) from error
        return pack_start, pack_stop

    def generations_with(self, key: bytes, generations: Sequence[schema.Generation]) -> Iterator[schema.Generation]:
        """Those that may have the member of this `path_key`, the latest first; the first one of all among them."""
        has_filters = schema.has_name_filters(self._connections.version)
        block, *places = name_filter.hash_of(key) if has_filters else (0,)
        for generation in reversed(generations):
            if has_filters and generation.start > 0 and generation.members <= name_filter.MOST:
                blocks, size = name_filter.shape(generation.members)
                place = generation.start + block % blocks
                rows = self._connections.query("SELECT * FROM name_filter WHERE place = ?", (place,))
                if not rows or len(bits := self.checked_block(rows[0])) != size:
                    raise self._connections.malformed(f"there is no filter of names at {place}")
                if not name_filter.may_have(bits, places):
                    continue
            yield generation

    def checked_block(self, row: tuple[Any, ...]) -> bytes:
        """The bits in a row of `name_filter`, after its checksum was checked."""
        place, bits, crc = row
        if not isinstance(bits, bytes) or schema.row_crc(place, blob=bits) != crc:
            raise self._connections.malformed(f"the filter of names at {place} fails its checksum")
        return bits

    def _peek(self, position: int, rows: dict[int, _Row]) -> _Peeked:
        """The pack that `position` lies in; adds its row to `rows`."""
        row = start, count, folders, packed, _ = self._row(position)
        rows[start] = row
        try:
            name, stop = row_codec.peek(self._root, start, count, folders, packed, start in self._begins)
        except row_codec.MALFORMED as error:
            raise self._malformed(start, error) from error
        if not start <= position < stop:
            raise self._connections.malformed(f"no member covers offset {position}")
        peeked = path_key(name), start, stop
        if len(self._peeked) < _MAX_PEEKED:
            self._peeked[position] = peeked
        return peeked

    def _row(self, position: int) -> _Row:
        """The row of the pack that `position` lies in, after its checksum was checked."""
        rows = self._connections.query("SELECT * FROM pack WHERE start <= ? ORDER BY start DESC LIMIT 1", (position,))
        try:
            ((start, count, folders, packed, crc),) = rows
            if crc32(schema.pack_bytes(start, count, folders, packed)) != crc:
                raise ValueError("it fails its checksum")
        except row_codec.MALFORMED as error:
            raise self._malformed(position, error) from error
        return start, count, folders, packed, crc

    def _malformed(self, position: int, error: Exception) -> Exception:
        self._connections.check_open()
        return self._connections.malformed(f"the row at {position} is malformed: {error}")
