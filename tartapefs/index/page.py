"""A page: the members of one row of the index, checked and decoded, as the reader caches them."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from tartapefs.archive import ustar
from tartapefs.archive.member import Headed, Member


@dataclass(slots=True)
class Page:
    """Members that follow each other without a gap, and cover `[start, stop)` of the archive.

    starts: of the members.
    digests: of a sealed tape, by the starts of the members that have a body.
    """

    start: int
    stop: int
    starts: list[int]
    members: list[Member]
    digests: dict[int, bytes]
    # The latest result of `headed`, after the range of members that it is of.
    _headed: tuple[int, int, list[Headed]] = (0, 0, [])

    def within(self, start: int, stop: int) -> list[Member]:
        """The members that overlap `[start, stop)`, which begins in this page and is not empty."""
        return self.members[bisect_right(self.starts, start) - 1 : bisect_left(self.starts, stop)]

    def headed(self, start: int, stop: int) -> list[Headed]:
        """As `within`, each with its header."""
        first, end = bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop)
        headed = self._headed  # one load: threads see the old ones or the new
        if headed[0] != first or headed[1] != end:
            members = self.members[first:end]
            headers = ustar.headers([member[1:] for member in members])
            headed = self._headed = first, end, list(zip(members, headers, strict=True))
        return headed[2]

    def has_start(self, position: int) -> bool:
        """Whether a member starts at `position`, which lies in this page."""
        return self.starts[bisect_right(self.starts, position) - 1] == position
