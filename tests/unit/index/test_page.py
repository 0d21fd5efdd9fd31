"""A page's ranges against a scan of all its members."""

import stat

from hypothesis import given
from hypothesis import strategies as st

from tartapefs import Member
from tartapefs.archive.layout import span
from tartapefs.index.page import Page


def page_of(start: int, sizes: list[int]) -> Page:
    members: list[Member] = []
    stop = start
    for number, size in enumerate(sizes):
        members.append(Member(stop, b"data/%d" % number, stat.S_IFREG | 0o644, size, 0, 1, 0, b"", None))
        stop += span(size)
    return Page(start, stop, [member.start for member in members], members, {})


@given(st.data(), st.integers(0, 9), st.lists(st.integers(0, 2000), min_size=1, max_size=32))
def test_members_that_overlap_a_range(data: st.DataObject, block: int, sizes: list[int]) -> None:
    page = page_of(block * 512, sizes)
    for _ in range(3):
        start = data.draw(st.integers(page.start, page.stop - 1))
        stop = data.draw(st.integers(start + 1, page.stop + 1000))
        expected = [member for member in page.members if member.start < stop and start < member.stop]
        assert page.within(start, stop) == expected
        assert page.headed(start, stop) == [(member, member.header()) for member in expected]
        assert page.headed(start, stop) is page.headed(start, stop), "a range that is read again has its headers"


def test_starts() -> None:
    page = page_of(1024, [0, 700, 0])
    starts = {1024, 1536, 3072}
    assert {position for position in range(page.start, page.stop) if page.has_start(position)} == starts
