"""The members that a user names: by their names, by patterns, or by the folder that they lie in.

Rule: a NAME is a name if the tape has a member of it, else a pattern as in .gitignore, matched with whole names in the
archive. A folder brings all that lies in it. What a NAME begins with bounds where in the index its members are looked
for: `data/photos/*.jpg` reads nothing but what lies below data/photos.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from tartapefs.api.tape import Tape
from tartapefs.archive.member import Member, latest_of
from tartapefs.source.exclusion import exclusion

_SPECIAL = re.compile(r"[*?\[\\]")


def select(tape: Tape, names: Iterable[str]) -> tuple[Iterator[Member], int | None]:
    """The members with these names, each once, in the order of their paths; and how many bytes they take there.

    The number is None if there is a pattern, which tells only at the end. Raises KeyError, with the first name that no
    member has.
    """
    single: dict[int, Member] = {}
    runs: list[Iterator[Member]] = []
    size: int | None = 0
    for name in names:
        try:
            member = tape.find(name)
        except KeyError:
            runs += _matching(tape, name)
            size = None
            continue
        single[member.start] = member
        ranges = tape.ranges(member.sort_key + b"\0") if member.is_directory else []
        runs += (tape.members(start, stop) for start, stop in ranges)
        if size is not None:
            size += member.stop - member.start + sum(stop - start for start, stop in ranges)
    runs.append(iter(sorted(single.values(), key=lambda member: member.sort_key)))
    return latest_of(runs), size


def _matching(tape: Tape, pattern: str) -> list[Iterator[Member]]:
    """The members that a pattern matches, in runs. Raises KeyError if there is none."""
    special = _SPECIAL.search(pattern)
    if special is None:
        raise KeyError(pattern)
    matches = _matcher(pattern)
    begin = pattern[: special.start()].lstrip("/") if "/" in pattern.rstrip("/") else ""
    bound = os.fsencode(begin).replace(b"/", b"\0")
    found = (filter(matches, tape.members(start, stop)) for start, stop in tape.ranges(bound))
    runs: list[Iterator[Member]] = [
        chain([first], run) for run in found for first in [next(run, None)] if first is not None
    ]
    if not runs:
        raise KeyError(pattern)
    return runs


def _matcher(pattern: str) -> Callable[[Member], bool]:
    literal = "\\" * pattern.startswith(("!", "#")) + pattern  # neither a negation nor a comment
    try:
        matches, _ = exclusion(literal)
    except ValueError:
        raise KeyError(pattern) from None
    return lambda member: matches(member.name.rstrip(b"/"), member.is_directory)
