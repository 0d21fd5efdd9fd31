"""Reads the digests of a sealed index, and checks that they and the members belong to the seal.

Rule: no member and no digest is returned before its way up to the seal has been checked (see `hash_tree`). The tables
have a format of their own, which versions without digest support refuse.
"""

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable

from tartapefs.archive import hash_tree
from tartapefs.archive.layout import span
from tartapefs.archive.member import Member
from tartapefs.base import hashes
from tartapefs.index import row_codec, schema
from tartapefs.index.connections import Connections
from tartapefs.index.page import Page

_MAX_PIECES = 512  # rows of digests of large members in the cache, 2 KiB each
_MALFORMED = (TypeError, ValueError, AttributeError, OverflowError)


class SealedReader:
    """The digests of the sealed index behind `connections`; usable from many threads.

    Every method raises TapeFormatError if the index is damaged or does not belong to its seal.
    """

    def __init__(self, connections: Connections, facts: schema.TapeFacts) -> None:
        self._connections = connections
        self._facts = facts
        self._pieces: dict[int, bytes] = {}  # by their starts
        hash_ = hash_tree.hasher(facts.algorithm)
        numbers = facts.total_size, facts.member_count, facts.block_size, facts.levels
        self._checker = hash_tree.Checker(hash_, *numbers, facts.seal, self._node)

    def checked(self, page: Page, position: int, stop: int) -> Page:
        """The part of `page` that its leaves between `position` and `stop` cover, with their digests.

        Each of these leaves must belong to the seal. A pack holds whole leaves.
        """
        malformed, checker = self._connections.malformed, self._checker
        leaves = self._connections.query(
            "SELECT * FROM leaf WHERE start >= (SELECT max(start) FROM leaf WHERE start <= ?)"
            f" AND start < ? ORDER BY start LIMIT {row_codec.MOST}",
            (position, min(stop, page.stop)),
        )
        if not leaves or not page.start <= leaves[0][0] <= position:
            raise malformed(f"no digests cover offset {position}")
        low = end = leaves[0][0]
        first = at_member = bisect_left(page.starts, low)
        try:
            for start, leaf_stop, digests, crc in leaves:
                if start != end or schema.row_crc(start, leaf_stop, blob=digests) != crc:
                    raise malformed(f"the digests at {start} fail their checksum")
                hashed, at = [], 0
                while end < leaf_stop:
                    member = page.members[at_member]
                    if member.start != end:
                        raise malformed(f"its members do not join at offset {end}")
                    at_member += 1
                    header = member.header()
                    hashed.append(header)
                    if member.size:
                        digest = digests[at : at + hash_tree.SIZE]
                        page.digests[end] = digest
                        hashed.append(digest)
                        at += hash_tree.SIZE
                    end += span(member.size, len(header))
                if (
                    end != leaf_stop
                    or at != len(digests)
                    or not checker.belongs(hash_tree.leaf_hash(checker.hash, start, leaf_stop, b"".join(hashed)), start)
                ):
                    raise malformed(f"the members at {start} do not belong to its seal")
        except (*_MALFORMED, IndexError, struct.error) as error:
            self._connections.check_open()
            raise malformed(f"the digests at {leaves[0][0]} are malformed: {error}") from error
        if end <= position:
            raise malformed(f"no digests cover offset {position}")
        return Page(low, end, page.starts[first:at_member], page.members[first:at_member], page.digests)

    def block_digests(self, member: Member, first: int, stop: int) -> bytes:
        """The digests of the blocks `[first, stop)` of a member of several blocks, one after the other."""
        found, number = b"", first
        while number < stop:
            low = number % hash_tree.FANOUT
            piece = self._piece(member, number // hash_tree.FANOUT)
            found += piece[low * hash_tree.SIZE : (low + stop - number) * hash_tree.SIZE]
            number += hash_tree.FANOUT - low
        return found

    def builder(self) -> hash_tree.Builder:
        """What extends the tree by another generation: it goes on from the last node of each level.

        Raises TapeFormatError unless they belong to the seal.
        """
        found: list[tuple[int, list[bytes]]] = []
        child = b""  # the hash of the last node of the level below
        for level in range(1, self._facts.levels + 1):
            start, joined = self._node(level, self._facts.end)
            children = [joined[at : at + hash_tree.SIZE] for at in range(0, len(joined), hash_tree.SIZE)]
            if level > 1 and children.pop() != child:
                raise self._connections.malformed(f"the last digests of level {level} do not belong to its seal")
            found.append((start, children))
            child = hash_tree.node_hash(self._checker.hash, level, start, joined)
        if not self._checker.is_top(child):
            raise self._connections.malformed("its last digests do not belong to its seal")
        facts = self._facts
        return hash_tree.Builder.resumed(facts.algorithm, facts.block_size, facts.end, facts.member_count, found)

    def has_all_digests(self, members: Iterable[Member], digest_of: Callable[[Member], bytes]) -> bool:
        """Whether every digest of `members`, all of the tape's, belongs to the seal, and the tables hold no other rows.

        `digest_of` returns the digest of a member, which was checked.
        """
        children, pieces = 0, 0
        for member in members:
            count = hash_tree.block_count(member.size, self._facts.block_size)
            if count > 1:
                whole = hashes.constructor(self._facts.algorithm)()
                for number in range(0, count, hash_tree.FANOUT):
                    whole.update(self._piece(member, number // hash_tree.FANOUT))
                    pieces += 1
                if whole.digest() != digest_of(member):
                    return False
        children = pieces + self._row_count("leaf")
        nodes = 0
        for _ in range(self._facts.levels):
            children = -(-children // hash_tree.FANOUT)
            nodes += children
        return self._row_count("piece") == pieces and self._row_count("node") == nodes

    def _row_count(self, table: str) -> int:
        counted: int = self._connections.query(f"SELECT count(*) FROM {table}")[0][0]
        return counted

    def _node(self, level: int, start: int) -> tuple[int, bytes]:
        """The start and the children's hashes of the node at `level` above a child at `start`."""
        rows = self._connections.query(
            "SELECT * FROM node WHERE place <= ? ORDER BY place DESC LIMIT 1", (schema.node_key(level, start),)
        )
        try:
            ((key, digests, crc),) = rows
            found_level, found_start = schema.split_node_key(key)
            if found_level != level or schema.row_crc(key, blob=digests) != crc:
                raise ValueError("a node fails its checksum")
        except _MALFORMED as error:
            raise self._connections.malformed(f"the digests above {start} are malformed: {error}") from error
        return found_start, digests

    def _piece(self, member: Member, number: int) -> bytes:
        """The digests of the member's blocks in its piece `number`, of `FANOUT` blocks or, the last one, fewer."""
        block_size = self._facts.block_size
        start = (body := member.body) + number * hash_tree.FANOUT * block_size
        if (found := self._pieces.get(start)) is not None:
            return found
        stop = min(start + hash_tree.FANOUT * block_size, body + member.size)
        rows = self._connections.query("SELECT * FROM piece WHERE start = ?", (start,))
        try:
            ((_, digests, crc),) = rows
            if schema.row_crc(start, blob=digests) != crc:
                raise ValueError("they fail their checksum")
            if len(digests) != hash_tree.block_count(stop - start, block_size) * hash_tree.SIZE:
                raise ValueError("they are not as many as the blocks")
            if not self._checker.belongs(hash_tree.piece_hash(self._checker.hash, start, stop, digests), start):
                raise self._connections.malformed(f"the digests at {start} do not belong to its seal")
        except _MALFORMED as error:
            self._connections.check_open()
            raise self._connections.malformed(f"the digests at {start} are malformed: {error}") from error
        if len(self._pieces) >= _MAX_PIECES:
            self._pieces = {}
        self._pieces[start] = digests
        return bytes(digests)
