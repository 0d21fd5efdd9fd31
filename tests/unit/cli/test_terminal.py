"""How texts fit into the columns of a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wcwidth import wcswidth

from tartapefs.cli import terminal

WIDE = "\N{CJK UNIFIED IDEOGRAPH-6F22}"
TEXTS = st.lists(st.sampled_from(["a", "b", "/", " ", WIDE, "e\N{COMBINING ACUTE ACCENT}"]), max_size=60).map("".join)


@given(TEXTS, st.integers(2, 30))
def test_a_text_is_folded_without_a_loss(text: str, room: int) -> None:
    lines = list(terminal.folded(text, room))
    assert all(wcswidth(line) <= room for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


@given(TEXTS, st.integers(2, 30))
def test_a_text_is_cut_where_there_is_no_room(text: str, room: int) -> None:
    shown = terminal.cut(text, room)
    assert shown == text if wcswidth(text) <= room else room - 2 <= wcswidth(shown) <= room and shown[-1] == "…"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("a report", ["a report"]),
        ("one, two, three", ["one, two,", "three"]),
        ("cp at 1 (65.2 %, a)", ["cp at 1", "(65.2 %,", "a)"]),
        ("up to 32.6 MiB/s", ["up to", "32.6 MiB/s"]),
        ("0123456789abcdef", ["0123456789", "abcdef"]),
        ("data/photos/2024/1.jpg", ["data/", "photos/", "2024/1.jpg"]),
    ],
)
def test_where_lines_end(text: str, lines: list[str]) -> None:
    """Between words; no number is parted from its unit, and no word but one that no line holds."""
    assert list(terminal.folded(text, 10)) == lines
