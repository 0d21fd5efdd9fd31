"""What a recording leaves out: patterns as in .gitignore or a function, when it is made and when it is compared.

Rule: the index keeps the patterns, so that whoever compares the folder later leaves out the same. Of a function it has
the name alone: then nobody can tell what would be left out.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable

from tartapefs.archive.member import RECORDABLE
from tartapefs.base.tape_files import TAPE_FOLDER

Exclude = str | Iterable[str] | Callable[[str], bool]
IsLeftOut = Callable[[bytes, bool], bool]  # (path below the root, whether it is a directory)
_FUNCTION = "function "  # what the index says of one, before its name


def exclusion(exclude: Exclude) -> tuple[IsLeftOut, list[str]]:
    """The test whether a path is left out, and what the index says of it."""
    if callable(exclude):
        test = exclude
        return lambda path, is_directory: bool(test(os.fsdecode(path))), [_FUNCTION + _name(test)]
    import pathspec  # here, since most recordings exclude nothing

    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    try:
        spec = pathspec.GitIgnoreSpec.from_lines(patterns)
    except (ValueError, re.error) as error:
        raise ValueError(f"a malformed pattern: {error}") from None

    def matches(path: bytes, is_directory: bool) -> bool:
        return spec.match_file(os.fsdecode(path) + "/" * is_directory)

    return matches, patterns


def recorded_exclusion(excluded: tuple[str, ...]) -> IsLeftOut | None:
    """The test whether a path was to be left out of a recording of which the index says this; None: nobody can tell."""
    if is_function(excluded):
        return None
    try:
        return exclusion(excluded)[0] if excluded else lambda path, is_directory: False
    except ValueError:  # what another version of pathspec took for a pattern, or a forger
        return None


def is_function(excluded: tuple[str, ...]) -> bool:
    """Whether what the index says is the name of a function that left out paths."""
    return len(excluded) == 1 and excluded[0].startswith(_FUNCTION)


def has_a_place(path: bytes, mode: int, is_left_out: IsLeftOut) -> bool:
    """Whether a recording would have a member for what lies at `path` below the root, and has this `mode`."""
    is_directory = stat.S_ISDIR(mode)
    is_its_index = is_directory and path == TAPE_FOLDER
    return stat.S_IFMT(mode) in RECORDABLE and not is_its_index and not is_left_out(path, is_directory)


def _name(function: Callable[[str], bool]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
