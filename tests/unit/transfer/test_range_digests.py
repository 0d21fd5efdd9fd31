"""Digests that take ranges in any order, some of them twice."""

import hashlib
import json
import os
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.digests import expected_etag

from tartapefs.transfer.range_digests import PartDigests, etag


def test_etag_of_tiny_parts() -> None:
    archive = os.urandom(1536)
    for size in (1, 7, 512, 1535, 1536, 1537):
        parts = PartDigests(size, len(archive))
        parts.add(0, archive)
        assert parts.hexdigest() == expected_etag(archive, size) == etag(parts.md5s[n] for n in range(parts.count))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_in_any_order_with_repeats(data: st.DataObject) -> None:
    """Pieces at random, in any order, some twice: the parts that got all their bytes in order are complete and right,
    and what is missing is told exactly enough that giving it completes every digest."""
    archive = random.Random(1).randbytes(data.draw(st.integers(1536, 4000)))
    size = data.draw(st.integers(1, 5000))
    parts = PartDigests(size, len(archive), data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(0, 12))):
        at = data.draw(st.integers(0, len(archive) - 1))
        parts.add(at, archive[at : at + data.draw(st.integers(0, 2000))])
    for number, md5 in parts.md5s.items():
        assert md5 == hashlib.md5(archive[number * size : (number + 1) * size]).digest()
    again = PartDigests(size, len(archive), True)
    again.load(json.loads(json.dumps(parts.save())))
    assert list(again.missing()) <= list(parts.missing()) or not parts._resumable
    for one in (parts, again):
        for start, stop in list(one.missing()):
            one.add(start, archive[start:stop])
        assert one.hexdigest() == expected_etag(archive, size)
