"""Compares the source with a tape on the way of a walk, for a generation that has what is new.

Rule: what was recorded must be there as it was recorded, or nothing is added. Of a folder only its header may be
outdated, by its mode or mtime: then the folder is a part of the new generation, too.

Walk and generations are in the order of paths. Of each generation one member is waited for, by its name: nearly every
member of the walk is one of these, and only for the others, and for folders, paths are put in order.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from itertools import chain

from tartapefs.archive import ustar
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
        # The members that are waited for, by name, each with those that follow it in its generation.
        self._awaited: dict[bytes, tuple[Member, Iterator[Member]]] = {}
        self._keys: dict[bytes, bytes] = {}  # of the names of some of them
        self._replaced = b"\0"  # a recorded folder that is gone or no folder any more: so is what lies in it
        self._is_valid = True
        self.problems = problems
        self.superseded: list[int] = []
        self.valid = 0

    def __iter__(self) -> Iterator[ustar.Facts]:
        awaited, at_home = self._awaited, self._at_home
        is_one = len(self._tape.generations) == 1
        lowest: bytes | None = None  # of the keys of what is awaited, if it is known
        for generation in self._tape.generations:
            self._await_next(self._tape.members_of(generation))
        for facts in self._walk:
            name = facts[0]
            if name not in awaited or (name[-1:] == b"/" and not is_one):
                # It is new, or its generation waits for what is gone, as one might that has a folder's latest header.
                key = path_key(name)
                if lowest is None or lowest < key:
                    lowest = self._note_gone(key)
                if lowest != key:
                    self._is_valid = False
                    yield facts
                    continue
                name = name if name in awaited else _of_other_type(name)
            old, following = awaited.pop(name)
            lowest = None
            is_same = (at_home and old[1:8] == facts[:7]) or self._is_same(old, facts)
            self._is_valid = self._is_valid and is_same and old.start == self.valid
            if self._is_valid:
                self.valid = old.stop
            if not is_same:
                if old.is_directory and stat.S_ISDIR(facts[1]):
                    self.superseded.append(old.start)
                    yield facts
                else:
                    found_now = inspect(old, self._source, at_home)
                    otherwise = "changes again and again" if old.target == facts[6] else "has a name before it by now"
                    self._note(old, "; ".join(map(str, found_now)) or otherwise)
            member = next(following, None)
            if member is not None and member[1] not in awaited:
                awaited[member[1]] = member, following
            elif member is not None:
                self._await_next(chain((member,), following))
        self._note_gone()

    def _await_next(self, members: Iterator[Member]) -> None:
        """Waits for the next of these; where two generations have the same folder, for the later one alone."""
        while (member := next(members, None)) is not None:
            other = self._awaited.get(member.name)
            if other is None or other[0].start < member.start:
                self._awaited[member.name] = member, members
                if other is None:
                    return
                members = other[1]

    def _note_gone(self, key: bytes | None = None) -> bytes | None:
        """Notes the members that are waited for and whose paths lie before the one with this key; all by default.

        Returns the lowest key of those that are left.
        """
        while self._awaited:
            keys = self._keys = {name: self._keys.get(name) or path_key(name) for name in self._awaited}
            name = min(keys, key=keys.__getitem__)
            if key is not None and keys[name] >= key:
                return keys[name]
            old, following = self._awaited.pop(name)
            if not name.startswith(self._replaced):
                self._note(old, "is gone")
            self._await_next(following)
        return None

    def _is_same(self, old: Member, facts: ustar.Facts) -> bool:
        """Whether the member is as recorded; a folder, as its header says."""
        _, mode, size, mtime_ns, ino, ctime_ns, target, _ = facts
        if old.is_directory and stat.S_ISDIR(mode):
            return mode == old.mode and mtime_ns // _NS == old.mtime_ns // _NS
        is_same = (mode, size, mtime_ns, target) == (old.mode, old.size, old.mtime_ns, old.target)
        return is_same and (not self._at_home or (ino, ctime_ns) == (old.ino, old.ctime_ns))

    def _note(self, old: Member, reason: str) -> None:
        self.problems.append(Problem(os.fsdecode(old.path) or ".", reason))
        self._is_valid = False
        if old.is_directory:
            self._replaced = old.name


def _of_other_type(name: bytes) -> bytes:
    """The name that a folder had when it was a file, or a file when it was a folder."""
    return name[:-1] if name.endswith(b"/") else name + b"/"
