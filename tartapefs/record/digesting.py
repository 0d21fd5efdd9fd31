"""Reads and hashes the contents of members that are added to a sealed tape."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from tartapefs.archive import hash_tree
from tartapefs.archive.member import Member
from tartapefs.base.buffers import EndedEarlyError, aligned, read_all
from tartapefs.record.walk import changed
from tartapefs.source.drift import agrees, differences
from tartapefs.source.folder import Source


def extended_tree(
    source: Source, members: Iterable[Member], builder: hash_tree.Builder, hash_: hash_tree.Hash, block_size: int
) -> Iterator[hash_tree.Row]:
    """The rows by which `members` extend the hash tree of `builder`, whose `seal` is known at the end.

    Raises TapeIntegrityError if a file changes meanwhile, and OSError if it cannot be read.
    """
    buffer = aligned(block_size)
    for member in members:
        if not member.size:
            yield from builder.add(member.header(), 0, lambda count: b"")
            continue
        fd = source.open(member.path)
        try:
            with suppress(EndedEarlyError):  # its size tells
                yield from builder.add(member.header(), member.size, _block_digests(fd, member, hash_, buffer))
            found = source.fstat(fd)
        finally:
            os.close(fd)
        if not agrees(member, found, at_home=True):
            raise changed(member.path, differences(member, found, b"", at_home=True)[0])
    yield from builder.finish()


def _block_digests(fd: int, member: Member, hash_: hash_tree.Hash, buffer: memoryview) -> Callable[[int], bytes]:
    """A function that returns the digests of the next so many blocks of the file, of the buffer's size each."""
    position = 0

    def digests(count: int) -> bytes:
        nonlocal position
        found = []
        for _ in range(count):
            block = buffer[: min(len(buffer), member.size - position)]
            read_all(fd, block, position)
            found.append(hash_(block))
            position += len(block)
        return b"".join(found)

    return digests
