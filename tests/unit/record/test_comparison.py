"""The comparison of a walk with a tape: what is new, what is outdated, and what must not have changed.

More, with real folders, in test_append.py.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tartapefs import Problem, Tape, TapeRecorder
from tartapefs.archive import ustar
from tartapefs.record.comparison import Comparison
from tartapefs.source.folder import Source


@pytest.fixture
def tape(tree: Path) -> Iterator[Tape]:
    TapeRecorder(tree).commit()
    with Tape.discover(tree) as tape:
        yield tape


def compared(tape: Tape, tree: Path, walk: list[ustar.Facts]) -> tuple[list[bytes], list[Problem], Comparison]:
    """The names of what is new or outdated, and the problems, if the walk yields this."""
    problems: list[Problem] = []
    with closing(Source(str(tree))) as source:
        comparison = Comparison(tape, source, walk, problems)
        return [facts[0] for facts in comparison], problems, comparison


def walked(tape: Tape) -> list[ustar.Facts]:
    return [member[1:] for member in tape.members()]


def test_nothing_differs(tape: Tape, tree: Path) -> None:
    names, problems, comparison = compared(tape, tree, walked(tape))
    assert (names, problems, comparison.superseded) == ([], [], [])
    assert comparison.valid == tape.total_size - 1024


def test_new_names_anywhere(tape: Tape, tree: Path) -> None:
    walk = walked(tape)
    for name in (b"data/-first", b"data/photos/000", b"data/zzz"):
        new = (name, 0o100644, 3, 0, 99, 0, b"", None)
        walk.append(new)
    walk.sort(key=lambda facts: facts[0].rstrip(b"/").split(b"/"))
    names, problems, comparison = compared(tape, tree, walk)
    assert names == [b"data/-first", b"data/photos/000", b"data/zzz"]
    assert (problems, comparison.superseded) == ([], [])
    assert comparison.valid == tape.find("data").stop  # the first new name follows the root


def test_an_outdated_folder(tape: Tape, tree: Path) -> None:
    """By mode or by whole seconds of its mtime; not by less, nor by its inode and ctime."""
    photos = tape.find("data/photos")
    changes = [
        (photos._replace(mode=0o040700), True),
        (photos._replace(mtime_ns=photos.mtime_ns + 10**9), True),
        (photos._replace(mtime_ns=photos.mtime_ns // 10**9 * 10**9 + (photos.mtime_ns + 1) % 10**9), False),
        (photos._replace(ctime_ns=0), False),
    ]
    for changed, is_outdated in changes:
        walk = [changed[1:] if facts[0] == photos.name else facts for facts in walked(tape)]
        names, problems, comparison = compared(tape, tree, walk)
        assert (names, problems) == ([photos.name] * is_outdated, [])
        assert comparison.superseded == [photos.start] * is_outdated


@pytest.mark.parametrize("change", [{"mode": 0o100600}, {"size": 4}, {"mtime_ns": 0}, {"ino": 1}, {"ctime_ns": 0}])
def test_a_file_that_the_walk_saw_otherwise(tape: Tape, tree: Path, change: dict[str, int]) -> None:
    """Even if it is as recorded again by the time that it is looked at."""
    script = tape.find("data/script.sh")
    walk = [script._replace(**change)[1:] if facts[0] == script.name else facts for facts in walked(tape)]  # type: ignore[arg-type]
    names, problems, comparison = compared(tape, tree, walk)
    assert names == []
    assert [(problem.path, problem.reason) for problem in problems] == [("script.sh", "changes again and again")]
    assert comparison.valid <= script.start


def test_what_is_missing_is_said_once(tape: Tape, tree: Path) -> None:
    """Of a folder that is gone, not all that lay in it."""
    walk = [facts for facts in walked(tape) if not facts[0].startswith((b"data/photos/", b"data/script"))]
    names, problems, _ = compared(tape, tree, walk)
    assert names == []
    assert [(problem.path, problem.reason) for problem in problems] == [("photos", "is gone"), ("script.sh", "is gone")]
