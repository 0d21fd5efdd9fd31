"""Shards: where an archive is cut so that each piece has whole members, and whole samples, up to a size.

Rule: a shard takes as many samples as fit, from where the one before ends, so the first shards depend on nothing that
follows. What `record --append` adds can only lengthen the last one. A sample that is too large for a shard is one.

A sample is what webdataset takes for one: members that follow each other and whose names agree up to the first dot
after the last slash. It ends with its generation, so that no append takes a member out of a shard.

A cut is looked for where the next shard would be full, back to where a sample begins: a few lookups for each shard,
not a pass over all members.
"""

from array import array
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise

from tartapefs.archive.layout import FOOTER
from tartapefs.archive.member import Member
from tartapefs.base.commands import complete
from tartapefs.base.naming import MOST_PARTS
from tartapefs.index.reader import Index
from tartapefs.index.schema import TapeFacts

_MOST_KEPT = 4
_found: dict[tuple[TapeFacts, int], "array[int]"] = {}  # for what opens one shard after the other by its name


def shard_starts(tape: Index, size: int, on_shard: Callable[[int], None] = lambda position: None) -> "array[int]":
    """Where the shards of at most `size` bytes start, footers included, in bytes from the start of the archive.

    Calls `on_shard` with each start. Raises ValueError, with the reason in one line, for a `size` below 1, for more
    shards than there are names, and for a tape with hard links; TapeFormatError if the index is damaged.
    """
    if size < 1:
        raise ValueError(f"a shard has at least 1 byte, not {size}")
    if tape.facts.hard_links:
        remedy = complete('run "tartapefs record --force --no-hard-links" to record full copies')
        raise ValueError(f"a hard link and its contents may lie in different shards; {remedy}")
    key = tape.facts, size
    if key not in _found:
        starts = array("q")
        for start in _starts(tape, size):
            if len(starts) == MOST_PARTS:
                # Two shards that follow each other are larger than one can be.
                enough = -(-2 * tape.facts.end // (MOST_PARTS - 1)) + FOOTER
                raise ValueError(
                    f"shards of {size:,} bytes are more than {MOST_PARTS:,}; {enough:,} bytes are always enough"
                )
            starts.append(start)
            on_shard(start)
        if len(_found) >= _MOST_KEPT:
            _found.clear()
        _found[key] = starts
        return starts
    return _found[key]


def sample_of(name: bytes) -> bytes:
    """What the names of the members of one sample, and only they, have in common.

    >>> sample_of(b"data/cat.1/a.cls.txt"), sample_of(b"data/cat.1/"), sample_of(b"data/.hidden"), sample_of(b"data/a")
    (b'data/cat.1/a', b'data/cat', b'data/.hidden', b'data/a')
    """
    folder, slash, last = name.rstrip(b"/").rpartition(b"/")
    stem = last.partition(b".")[0]
    return folder + slash + stem if stem else name


def _starts(tape: Index, size: int) -> Iterator[int]:
    start, end = 0, tape.facts.end
    begins = frozenset(generation.start for generation in tape.generations)
    yield start
    while start + size < end + FOOTER:
        full = start + size - FOOTER
        backwards = tape.members_backwards(start, full + 1) if full > start else iter(())
        pairs = ((before, member) for member, before in pairwise(backwards))
        cut = next((member.start for before, member in pairs if _begins_sample(before, member, begins)), None)
        if cut is None:
            following = pairwise(tape.members(max(start, full)))
            cut = next((member.start for before, member in following if _begins_sample(before, member, begins)), end)
        if cut == end:
            return
        yield (start := cut)


def _begins_sample(before: Member, member: Member, begins: Collection[int]) -> bool:
    """Whether a sample begins with `member`, which follows `before`."""
    return member.start in begins or sample_of(before.name) != sample_of(member.name)
