"""What a recording excludes, by patterns as in .gitignore or by a function: when it is made and when it is compared.

Rule: the index keeps the patterns, so that later comparisons of the folder exclude the same. Of a function it keeps the
name alone: then no comparison can tell what would be excluded.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable

from tartapefs.archive.member import RECORDABLE
from tartapefs.base.tape_files import TAPE_FOLDER

Exclude = str | Iterable[str] | Callable[[str], bool]
IsExcluded = Callable[[bytes, bool], bool]  # (path below the root, whether it is a directory)
_FUNCTION = "function "  # what the index says of one, before its name


def exclusion(exclude: Exclude) -> tuple[IsExcluded, list[str]]:
    """The test whether a path is excluded, and the text of it for the index."""
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


def recorded_exclusion(excluded: tuple[str, ...]) -> IsExcluded | None:
    """The test whether a recording excluded a path, from the text in its index; None if that was a function."""
    if is_function(excluded):
        return None
    try:
        return exclusion(excluded)[0] if excluded else lambda path, is_directory: False
    except ValueError:  # a pattern of another version of pathspec, or a forged one
        return None


def is_function(excluded: tuple[str, ...]) -> bool:
    """Whether the text in the index is the name of a function that excluded paths."""
    return len(excluded) == 1 and excluded[0].startswith(_FUNCTION)


def is_recordable(path: bytes, mode: int, is_excluded: IsExcluded) -> bool:
    """Whether a recording would have a member for a file of this `mode` at `path` below the root."""
    is_directory = stat.S_ISDIR(mode)
    is_its_index = is_directory and path == TAPE_FOLDER
    return stat.S_IFMT(mode) in RECORDABLE and not is_its_index and not is_excluded(path, is_directory)


def _name(function: Callable[[str], bool]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
