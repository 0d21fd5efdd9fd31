"""The hash tree of an archive, whose root is the seal: one digest for every byte. Pure, no I/O.

Rule: a byte is believed if its block has the digest in a row of the index, and a row if its hash is among the children
of the node above it, and so on up to the seal. This takes one row a level, so a tape of any size is checked against its
seal as it is read.

- A block is `block_size` bytes of a body, the last one shorter; its digest is the plain hash of its bytes.
- A member's digest is that of its block or, if it has several, the hash of its blocks' digests one after the other.
  A member without a body has none.
- A leaf is a run of at most `RUN` members, `[start, stop)` of the archive; a member of several blocks ends it, and so
  does the end of a generation. Its hash is over "leaf", start, stop, and for each member its header and its digest.
- A piece is `FANOUT` blocks of a member that has several, the last one shorter: "piece", start, stop, their digests.
- Leaves and pieces, in the order of their starts, are the children of the nodes of level 1, `FANOUT` in each, and
  those of the nodes of level 2, and so on up to a level of one node. A node's hash is over "node", its level, the start
  of its first child, and its children's hashes.
- The seal is the hash over "seal", total size, number of members, block size, number of levels, and the top's hash.

Numbers have 8 bytes, big endian. All hashes are of one algorithm and have 32 bytes. Since start and stop are hashed,
it is enough that a hash is among its parent's children: no row can stand in for another.
"""

from collections.abc import Callable, Iterator
from struct import Struct
from typing import TYPE_CHECKING, Literal, NamedTuple

from tartapefs.archive.layout import BLOCK, span
from tartapefs.base import hashes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SealAlgorithm = Literal["blake3", "sha256"]
ALGORITHMS: tuple[SealAlgorithm, ...] = ("blake3", "sha256")
SIZE = 32  # bytes of a digest
RUN = 8  # members in a leaf, at most: to read one takes a hash of all their headers
FANOUT = 62  # digests in a row: eight rows fill one of the index's pages
BLOCK_SIZE = 1 << 17  # bytes, the default; see docs/decisions/0009-seals.md
SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 16, 1 << 20  # bytes
MOST_LEVELS = 12  # an archive has fewer bytes than 62 to the power of this

Hash = Callable[["ReadableBuffer"], bytes]
RowKind = Literal["leaf", "piece", "node"]

_two, _three = Struct(">QQ").pack, Struct(">QQQ").pack


def hasher(algorithm: str) -> Hash:
    """A function that returns the hash of a buffer. Raises TapeError if the algorithm is not installed."""
    new_hash = hashes.constructor(algorithm)
    return lambda data: new_hash(data).digest()


def block_count(size: int, block_size: int) -> int:
    """The number of blocks of a body of `size` bytes."""
    return (size + block_size - 1) // block_size


def ends_leaf(count: int, size: int, block_size: int) -> bool:
    """Whether a leaf of `count` members ends with the last of them, which has a body of `size` bytes."""
    return count == RUN or size > block_size


def leaf_hash(hash_: Hash, start: int, stop: int, members: bytes) -> bytes:
    """The hash of a leaf. `members`: the header and digest of each, one after the other."""
    return hash_(b"leaf" + _two(start, stop) + members)


def piece_hash(hash_: Hash, start: int, stop: int, digests: bytes) -> bytes:
    return hash_(b"piece" + _two(start, stop) + digests)


def node_hash(hash_: Hash, level: int, start: int, children: bytes) -> bytes:
    return hash_(b"node" + _two(level, start) + children)


def seal_of(hash_: Hash, total_size: int, member_count: int, block_size: int, levels: int, top: bytes) -> str:
    return hash_(b"seal" + _three(total_size, member_count, block_size) + levels.to_bytes(8, "big") + top).hex()


class Row(NamedTuple):
    """A row of the index for the tree. `stop`: of a leaf, else 0. `level`: of a node, else 0."""

    kind: RowKind
    level: int
    start: int
    stop: int
    digests: bytes  # of a leaf: those of its members that have a body


class Builder:
    """Builds the tree of an archive, whose members are added in order. Memory: 32 bytes for each piece of a member.

    `add` and `finish` return the rows, those of each kind in the order of their keys (a node's is its level, then its
    start).

    seal, levels: the root of the tree and the number of its levels, once `finish` is exhausted.
    """

    def __init__(self, algorithm: str, block_size: int) -> None:
        self._new_hash = hashes.constructor(algorithm)
        self._hash = hasher(algorithm)
        self._block_size = block_size
        self._leaf_start = self._position = 0
        self._run: list[bytes] = []
        self._digests: list[bytes] = []
        self._count = self._member_count = 0
        self._pieces: list[tuple[int, bytes]] = []  # of the current leaf
        self._open: list[tuple[int, list[bytes]]] = []  # of each level from 1 on, the current node's start and children
        self._upper: list[Row] = []
        self.seal, self.levels = "", 0

    @classmethod
    def resumed(
        cls,
        algorithm: str,
        block_size: int,
        position: int,
        member_count: int,
        open_nodes: list[tuple[int, list[bytes]]],
    ) -> "Builder":
        """A builder that goes on after a generation that ends at `position`, in bytes, with so many members by then.

        `open_nodes`: of each level the start of its last node, and those of its children that are complete.
        """
        builder = cls(algorithm, block_size)
        builder._leaf_start = builder._position = position
        builder._member_count = member_count
        builder._open = [(start, list(children)) for start, children in open_nodes]
        return builder

    def end_generation(self) -> Iterator[Row]:
        """Ends the leaf under way: the next member begins another generation."""
        if self._count:
            yield from self._end_leaf()

    def add(self, header: bytes, size: int, digests: Callable[[int], bytes]) -> Iterator[Row]:
        """Adds the next member; returns the rows that are complete now.

        `digests(count)` returns those of its next `count` blocks, one after the other.
        """
        start, count = self._position, block_count(size, self._block_size)
        self._position = start + span(size, len(header))
        self._member_count += 1
        self._run.append(header)
        if count == 1:
            self._add_digest(digests(1))
        elif count:
            whole, position = self._new_hash(), start + len(header)
            stop = position + size
            while position < stop:
                some = digests(min(FANOUT, count))
                count -= FANOUT
                end = min(position + FANOUT * self._block_size, stop)
                whole.update(some)
                self._pieces.append((position, piece_hash(self._hash, position, end, some)))
                yield Row("piece", 0, position, 0, some)
                position = end
            self._add_digest(whole.digest())
        self._count += 1
        if ends_leaf(self._count, size, self._block_size):
            yield from self._end_leaf()

    def _add_digest(self, digest: bytes) -> None:
        self._run.append(digest)
        self._digests.append(digest)

    def _end_leaf(self) -> Iterator[Row]:
        start, stop = self._leaf_start, self._position
        yield Row("leaf", 0, start, stop, b"".join(self._digests))
        yield from self._add_child(1, start, leaf_hash(self._hash, start, stop, b"".join(self._run)))
        for at, piece in self._pieces:
            yield from self._add_child(1, at, piece)
        self._leaf_start, self._count = stop, 0
        self._run, self._digests, self._pieces = [], [], []

    def _add_child(self, level: int, start: int, child: bytes) -> Iterator[Row]:
        """Adds a hash to the current node at `level`. The few full nodes above level 1 wait for `finish`."""
        if len(self._open) < level:
            self._open.append((start, []))
        children = self._open[level - 1][1]
        if len(children) == FANOUT:
            yield from self._end_node(level)
            children = []
            self._open[level - 1] = start, children
        children.append(child)

    def _end_node(self, level: int) -> Iterator[Row]:
        start, children = self._open[level - 1]
        row = Row("node", level, start, 0, b"".join(children))
        if level == 1:
            yield row
        else:
            self._upper.append(row)
        yield from self._add_child(level + 1, start, node_hash(self._hash, level, start, row.digests))

    def finish(self) -> Iterator[Row]:
        """Returns the last rows."""
        if self._count:
            yield from self._end_leaf()
        level = 1
        while level < len(self._open):
            yield from self._end_node(level)
            level += 1
        start, children = self._open[-1]
        top = Row("node", level, start, 0, b"".join(children))
        if level == 1:
            yield top
        else:
            self._upper.append(top)
        yield from sorted(self._upper, key=lambda row: (row.level, row.start))
        hashed = node_hash(self._hash, level, start, top.digests)
        total_size = self._position + 2 * BLOCK
        self.levels = level
        self.seal = seal_of(self._hash, total_size, self._member_count, self._block_size, level, hashed)


class Checker:
    """Checks that leaves and pieces belong to a seal. Usable from many threads.

    `node(level, start)` returns the start and the children of the node at `level` above a child at `start`; the checker
    does not trust them.
    """

    _MAX_KNOWN = 1 << 14  # hashes, of 100 bytes each in a set

    def __init__(
        self,
        hash_: Hash,
        total_size: int,
        member_count: int,
        block_size: int,
        levels: int,
        seal: str,
        node: Callable[[int, int], tuple[int, bytes]],
    ) -> None:
        self.hash = hash_
        self._node = node
        self._levels = levels
        self._seal = seal
        self._numbers = total_size, member_count, block_size
        self._known: set[bytes] = set()  # hashes that belong to the seal

    def is_top(self, node: bytes) -> bool:
        """Whether this hash of a node is the one that the seal is of."""
        return seal_of(self.hash, *self._numbers, self._levels, node) == self._seal

    def belongs(self, child: bytes, start: int) -> bool:
        """Whether the leaf or piece at `start` with the hash `child` belongs to the seal."""
        if child in self._known:  # as most do in a sequential read
            return True
        found: list[bytes] = []
        for level in range(1, self._levels + 1):
            start, children = self._node(level, start)
            if not _is_among(child, children):
                return False
            if level == 1:
                found += (children[at : at + SIZE] for at in range(0, len(children), SIZE))
            child = node_hash(self.hash, level, start, children)
            if child in self._known:
                break
            found.append(child)
        else:
            if not self.is_top(child):
                return False
        if len(self._known) + len(found) > self._MAX_KNOWN:
            self._known = set()
        self._known.update(found)
        return True


def _is_among(child: bytes, children: bytes) -> bool:
    at = children.find(child)
    while at % SIZE and at >= 0:  # a match by chance across two others
        at = children.find(child, at + 1)
    return at >= 0
