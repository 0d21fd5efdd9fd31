"""Which ranges are read: all of the members and nothing else, in few requests, none of them large."""

import os
import random
import stat
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartapefs.archive.member import Member
from tartapefs.base.buffers import EndedEarlyError
from tartapefs.verify.ranged_requests import LONGEST, LocalCopy, requests

BLOCK = 1 << 17


def members(sizes: list[int]) -> list[Member]:
    """Files of these sizes, one after the other, as in an archive."""
    made: list[Member] = []
    for number, size in enumerate(sizes):
        name = b"data/%05d" % number + b"n" * (200 if number % 3 == 0 else 0)
        made.append(Member(made[-1].stop if made else 0, name, stat.S_IFREG | 0o644, size, 0, 0, 0, b"", None))
    return made


SIZES = st.lists(st.sampled_from([0, 1, 511, 512, 70_000, BLOCK, LONGEST - 512, LONGEST, 3 * LONGEST + 5]), max_size=9)


@given(SIZES, st.sampled_from([0, 512, 1 << 16]), st.randoms())
def test_every_byte_once(sizes: list[int], gap: int, chance: random.Random) -> None:
    wanted = [member for member in members(sizes) if chance.random() < 0.7]
    shuffled = chance.sample(wanted, len(wanted))
    made = list(requests(shuffled, gap, BLOCK))
    slices = [each for request in made for each in request]
    for member in wanted:
        own = [(start, stop) for of, start, stop in slices if of is member]
        assert own[0][0] == member.start and own[-1][1] == member.body + member.size
        assert all(one[1] == other[0] for one, other in pairwise(own))
        assert all((start - member.body) % BLOCK == 0 for start, _ in own[1:]), "whole blocks"
    assert len({each.member.start for each in slices}) == len(wanted)
    for request in made:
        assert request[-1].stop - request[0].start <= LONGEST
        assert all(0 <= two.start - one.stop <= gap for one, two in pairwise(request))


def test_neighbours_share_a_request() -> None:
    """A thousand small ones do, across their padding; those behind a gap do not."""
    small = members([1000] * 1000)
    assert len(list(requests(small, 512, BLOCK))) == 1
    assert len(list(requests(small[::2], 512, BLOCK))) == 500
    assert len(list(requests(small[::2], 1 << 16, BLOCK))) == 1


def test_a_local_copy(tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"0123456789")
    copy = LocalCopy(os.fspath(tmp_path / "copy"))
    try:
        view = memoryview(bytearray(4))
        copy.readinto(view, 3)
        assert (copy.size, bytes(view)) == (10, b"3456")
        with pytest.raises(EndedEarlyError):
            copy.readinto(view, 8)
    finally:
        copy.close()
