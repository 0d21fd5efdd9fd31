"""Compares the source with a tape on the way of a walk, for a generation that has what is new.

Rule: what was recorded must be there as it was recorded, or nothing is added. Of a folder only its header may be
outdated, by its mode or mtime: then the folder is a part of the new generation, too.
"""

import os
import stat
from collections.abc import Iterable, Iterator

from tartapefs.archive import ustar
from tartapefs.archive.layout import span
from tartapefs.archive.member import Member, path_key
from tartapefs.base.errors import Problem
from tartapefs.index.reader import Index
from tartapefs.source.drift import inspect
from tartapefs.source.folder import Source

_NS = 10**9  # in a second: a header has whole ones


class Comparison:
    """Iterate over it once for the members of the walk that are not on the tape, and folders with outdated headers.

    It adds to `problems` what was recorded and is gone or is another. Attributes: `superseded`, the starts of the
    outdated headers; `valid`, up to which byte copies would stay valid if the folder was recorded anew.
    """

    def __init__(self, tape: Index, source: Source, walk: Iterable[ustar.Facts], problems: list[Problem]) -> None:
        self._tape, self._source = tape, source
        self._walk = walk
        self._at_home = tape.is_at_home(source.ino)
        self.problems = problems
        self.superseded: list[int] = []
        self.valid = 0

    def __iter__(self) -> Iterator[ustar.Facts]:
        source, recorded, is_valid = self._source, self._tape.latest_members(), True
        old = next(recorded, None)
        for facts in self._walk:
            name = facts[0]
            while old is not None and old.name != name and path_key(old.name) < path_key(name):
                self._note(old, "is gone")
                old, is_valid = _after(old, recorded), False
            if old is None or (old.name != name and path_key(old.name) != path_key(name)):
                is_valid = False
                yield facts
                continue
            is_same = self._is_same(old, facts)
            is_valid = is_valid and is_same and old.start == self.valid
            if is_valid:
                self.valid += span(facts[2])
            if not is_same and old.is_directory and stat.S_ISDIR(facts[1]):
                self.superseded.append(old.start)
                yield facts
            elif not is_same:
                found = inspect(old, source, self._at_home)
                self._note(old, "; ".join(map(str, found)) if found else "changes again and again")
            old = next(recorded, None) if stat.S_ISDIR(facts[1]) else _after(old, recorded)
        while old is not None:
            self._note(old, "is gone")
            old = _after(old, recorded)

    def _is_same(self, old: Member, facts: ustar.Facts) -> bool:
        """Whether the member is as recorded; a folder, as its header says."""
        _, mode, size, mtime_ns, ino, ctime_ns, target, _ = facts
        if old.is_directory and stat.S_ISDIR(mode):
            return mode == old.mode and mtime_ns // _NS == old.mtime_ns // _NS
        is_same = (mode, size, mtime_ns, target) == (old.mode, old.size, old.mtime_ns, old.target)
        return is_same and (not self._at_home or (ino, ctime_ns) == (old.ino, old.ctime_ns))

    def _note(self, old: Member, reason: str) -> None:
        self.problems.append(Problem(os.fsdecode(old.path) or ".", reason))


def _after(old: Member, recorded: Iterator[Member]) -> Member | None:
    """The next recorded member that does not lie below `old`."""
    following = next(recorded, None)
    while old.is_directory and following is not None and following.name.startswith(old.name):
        following = next(recorded, None)
    return following
