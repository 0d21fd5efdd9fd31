"""Filters of names: whatever was put in is found; of what was not, little looks as if it was."""

import pytest

from tartapefs.index import name_filter


def has(blocks: list[bytes], key: bytes) -> bool:
    block, *places = name_filter.hash_of(key)
    return name_filter.may_have(blocks[block % len(blocks)], places)


@pytest.mark.parametrize("members", [1, 2, 3, 100, 3276, 3277, 20_000])
def test_what_is_in_it_is_found(members: int) -> None:
    keys = [b"data\0%d" % number for number in range(members)]
    blocks = list(name_filter.build(keys, members))
    count, size = name_filter.shape(members)
    assert [len(block) for block in blocks] == [size] * count
    assert all(has(blocks, key) for key in keys)
    assert sum(has(blocks, b"other\0%d" % number) for number in range(10_000)) < (300 if members > 3 else 3000)


def test_places_are_the_formats() -> None:
    """What was written by another version is read."""
    assert name_filter.hash_of(b"data\0file") == (424_901_731, 16267, 37419, 15020, 32618, 43107, 30858)
    shapes = {1: (1, 2), 3276: (1, 4095), 3277: (2, 2049), name_filter.MOST: (1280, 4096)}
    assert {members: name_filter.shape(members) for members in shapes} == shapes
