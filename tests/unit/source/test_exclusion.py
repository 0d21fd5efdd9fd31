"""Exclusion: the same paths when a folder is recorded and when it is compared later."""

import stat

import pytest

from tartapefs.source.exclusion import exclusion, is_function, is_recordable, recorded_exclusion

FILE, FOLDER, LINK, PIPE = (kind | 0o644 for kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO))


# As in gitignore(5).
@pytest.mark.parametrize(
    ("patterns", "excluded", "kept"),
    [
        ("*.o", [b"a.o", b"sub/b.o"], [b"a.c", b"o"]),
        ("/top", [b"top"], [b"sub/top"]),
        ("build/", [b"build/", b"sub/build/"], [b"build", b"sub/build"]),
        (["*.log", "!keep.log"], [b"a.log"], [b"keep.log", b"sub/keep.log"]),
        ("a/**/z", [b"a/z", b"a/b/z", b"a/b/c/z"], [b"z", b"b/a"]),
        ("# nothing", [], [b"# nothing", b"nothing"]),
        ([], [], [b"a"]),
        ("*.\N{LATIN SMALL LETTER E WITH ACUTE}", ["x.\N{LATIN SMALL LETTER E WITH ACUTE}".encode()], [b"x.\xe9"]),
    ],
)
def test_patterns(patterns: str | list[str], excluded: list[bytes], kept: list[bytes]) -> None:
    """The index keeps the patterns, which exclude the same later. A path here that ends in "/" is a directory's."""
    is_excluded, texts = exclusion(patterns)
    assert texts == ([patterns] if isinstance(patterns, str) else patterns)
    later = recorded_exclusion(tuple(texts))
    assert later is not None
    for test in (is_excluded, later):
        assert [path for path in excluded + kept if test(path.rstrip(b"/"), path.endswith(b"/"))] == excluded


def test_a_function_excludes_and_only_its_name_is_kept() -> None:
    seen: list[str] = []

    def large(path: str) -> bool:
        seen.append(path)
        return path.startswith("large")

    is_excluded, texts = exclusion(large)
    assert is_excluded(b"large/\xff", False) and not is_excluded(b"small", True)
    assert seen == ["large/\udcff", "small"]
    (text,) = texts
    assert text.startswith("function ") and text.endswith("large")
    assert is_function(tuple(texts)) and recorded_exclusion(tuple(texts)) is None


def test_a_callable_without_a_name_has_that_of_its_class() -> None:
    class Rule:
        def __call__(self, path: str) -> bool:
            return False

    assert exclusion(Rule())[1][0].endswith("Rule")


def test_a_malformed_pattern() -> None:
    """When it is given, it is an error. In an index it may be one of another version: nobody can tell what it means."""
    with pytest.raises(ValueError, match="a malformed pattern"):
        exclusion(["!"])
    assert recorded_exclusion(("!",)) is None


def test_patterns_are_no_function() -> None:
    assert not is_function(()) and not is_function(("function x", "y")) and not is_function(("*.o",))


def test_what_is_recordable() -> None:
    """Files, folders and links, unless they are excluded or are the folder for the index."""

    def is_excluded(path: bytes, is_directory: bool) -> bool:
        return path == b"excluded" and not is_directory

    def recordable(path: bytes, mode: int) -> bool:
        return is_recordable(path, mode, is_excluded)

    assert all(recordable(b"a/b", mode) for mode in (FILE, FOLDER, LINK))
    assert not recordable(b"a/b", PIPE)
    assert not recordable(b"excluded", FILE) and recordable(b"excluded", FOLDER)
    assert not recordable(b".tartape", FOLDER)
    assert recordable(b".tartape", FILE) and recordable(b"a/.tartape", FOLDER)
