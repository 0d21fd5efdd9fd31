"""What fits into a header's fields for names, at every limit, against `reference`, which tries every slash."""

import os

import pytest
from support import reference
from support.long_names import FITTING, NOT_FITTING, lengths_of

from tartapefs.archive import names


@pytest.mark.parametrize("name", FITTING, ids=lengths_of)
def test_names_at_the_limits(name: bytes) -> None:
    """The two fields are within their lengths, not empty if there are two, and joined by a slash give the name."""
    split = names.split_name(name)
    assert split == reference.split(name)
    assert split is not None
    prefix, rest = split
    assert (prefix + b"/" + rest if prefix else rest) == name
    assert len(prefix) <= 155
    assert 1 <= len(rest) <= 100
    assert names.why_too_long(name, b"", False) is None


@pytest.mark.parametrize("name", NOT_FITTING, ids=lengths_of)
def test_names_that_do_not_fit(name: bytes) -> None:
    """Refused with the reason, how long the name is and what would fit; with long names, not."""
    assert names.split_name(name) is reference.split(name) is None
    why = names.why_too_long(name, b"", False)
    assert why is not None
    assert f"{len(name)} bytes" in why
    assert any(limit in why for limit in ("255", "100"))
    assert names.why_too_long(name, b"", True) is None


def test_targets() -> None:
    assert names.why_too_long(b"data/link", b"t" * 100, False) is None
    assert names.why_too_long(b"data/link", b"t" * 101, False) == "the link's target has 101 bytes, at most 100 fit"
    assert names.why_too_long(b"data/link", b"t" * 4095, True) is None


def test_the_longest_path() -> None:
    """What the system takes as a path: no reader could open more."""
    longest = os.pathconf("/", "PC_PATH_MAX") - 1
    assert longest == names.LONGEST_PATH
    for slash in (b"", b"/"):
        assert names.why_too_long(b"n" * longest + slash, b"", True) is None
        assert "at most 4095" in str(names.why_too_long(b"n" * (longest + 1) + slash, b"", True))
