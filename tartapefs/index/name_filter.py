"""Filters of names: which names a later generation may have, so that a lookup need not search one that lacks a name.

Pure. A Bloom filter in blocks: a name sets some bits, all in one block, and a generation of which one of them is not
set does not have it. Of the names that a generation lacks, one in a hundred looks as if it was there.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator

MOST = 1 << 22  # members of a generation that has a filter: 5 MiB, held while it is made
_BITS = 10  # for each member
_BLOCK = 1 << 12  # bytes, at most
_HASH = struct.Struct("<I6H")  # the block; then the bits in it


def hash_of(key: bytes) -> tuple[int, ...]:
    """What `place` needs of the `path_key` of a name."""
    return _HASH.unpack(hashlib.blake2b(key, digest_size=_HASH.size).digest())


def shape(members: int) -> tuple[int, int]:
    """How many blocks the filter of so many members has, and how many bytes each."""
    size = -(-members * _BITS // 8)
    blocks = -(-size // _BLOCK)
    return blocks, -(-size // blocks)


def build(keys: Iterable[bytes], members: int) -> Iterator[bytes]:
    """The blocks of the filter of so many names, given by their `path_key`."""
    blocks, size = shape(members)
    bits = bytearray(blocks * size)
    for key in keys:
        block, *places = hash_of(key)
        first = block % blocks * size
        for place in places:
            place %= 8 * size
            bits[first + (place >> 3)] |= 1 << (place & 7)
    for first in range(0, len(bits), size):
        yield bytes(bits[first : first + size])


def may_have(block: bytes, places: Iterable[int]) -> bool:
    """Whether the block has all bits of a name, whose `hash_of` ends in `places`."""
    size = 8 * len(block)
    return all(block[place % size >> 3] >> (place % size & 7) & 1 for place in places)
