"""How names and times are shown: on one line, whatever they hold, and so that no two of them look the same."""

import calendar
import os
import subprocess
import sys
import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tartapefs.base.text import moment, on_one_line, printable, size_text

UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, surrogate, line and paragraph separators

# Whatever a Linux file name may hold: bytes of any kind, and text that is more likely to be troublesome.
BYTES = st.binary(min_size=1, max_size=20)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10).map(str.encode)
TROUBLE = st.text("ab\\xu01\n\r\t\x1b\x7f\x80\x85\xad\u200e\u202e\u2028\u2029\ue000\U000e0001", max_size=6).map(
    str.encode
)
LIKE_ESCAPES = st.text("\\xuUn0189abdf", max_size=8).map(str.encode)
NAMES = st.one_of(BYTES, TEXT, TROUBLE, LIKE_ESCAPES, st.tuples(TROUBLE, BYTES).map(b"".join))


@given(NAMES)
def test_a_name_is_one_line_without_anything_unseen(name: bytes) -> None:
    """No name can forge a line, move the cursor or turn the direction of writing."""
    shown = printable(name)
    assert len(shown.splitlines()) == 1 or shown == ""
    assert not {unicodedata.category(character) for character in shown} & UNSEEN
    shown.encode()


@given(NAMES, NAMES)
def test_different_names_look_different(one: bytes, other: bytes) -> None:
    assert (printable(one) == printable(other)) == (one == other)


def test_no_two_short_names_look_the_same() -> None:
    """Every single byte, every character of Latin-1, and what their escapes look like."""
    names = {bytes([byte]) for byte in range(256)} | {chr(code).encode() for code in range(256)}
    names |= {b"\\x%02x" % byte for byte in range(256)} | {b"\\u%04x" % code for code in range(256)}
    names |= {b"\\n", b"\\r", b"\\t", b"\\\\"}
    shown: dict[str, bytes] = {}
    for name in sorted(names):
        text = printable(name)
        assert text not in shown, f"{name!r} and {shown[text]!r} are both shown as {text}"
        shown[text] = name


@given(NAMES)
def test_bytes_and_their_decoded_form_are_shown_alike(name: bytes) -> None:
    assert printable(name) == printable(os.fsdecode(name))


@pytest.mark.parametrize(
    "name",
    ["plain", "two words", "-rf", "tär", "日本", "📼", "quote'\"", "a&b|c;d", "[red]{0}%s", "no\u00a0break"],
)
def test_an_ordinary_name_is_shown_as_it_is(name: str) -> None:
    assert printable(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"two\nlines", r"two\nlines"),
        (b"tab\tret\r", r"tab\tret\r"),
        (b"back\\slash", r"back\\slash"),
        (b"\x1b[31mred", r"\x1b[31mred"),
        (b"\xff\xfe", r"\xff\xfe"),
        ("gpj.\u202eexe".encode(), r"gpj.\u202eexe"),
        ("tag\U000e0001".encode(), r"tag\U000e0001"),
    ],
)
def test_what_cannot_be_seen_is_escaped(name: bytes, shown: str) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "no_SUCH.locale"])
def test_a_name_is_shown_alike_in_every_locale(locale: str) -> None:
    name = "tär \u202e\n".encode() + b"\xff"
    code = (
        f"import sys; from tartapefs.base.text import printable; sys.stdout.buffer.write(printable({name!r}).encode())"
    )
    environment = {"PATH": os.defpath, "LC_ALL": locale}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=os.getcwd(), capture_output=True)
    assert (result.stdout.decode(), result.stderr) == ("tär \\u202e\\n\\xff", b"")


FIRST, LAST = calendar.timegm((1, 1, 1, 0, 0, 0)), calendar.timegm((9999, 12, 31, 23, 59, 59))


@given(st.integers(FIRST, LAST), st.integers(0, 10**9 - 1))
@example(FIRST, 0)
@example(LAST, 10**9 - 1)
@example(-1, 1)
def test_a_moment_is_in_utc_to_the_nanosecond(seconds: int, nanoseconds: int) -> None:
    """Each field has its full width, so that times sort as text."""
    year, month, day, hour, minute, second = time.gmtime(seconds)[:6]
    expected = f"{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z"
    assert moment(seconds * 10**9 + nanoseconds) == expected


@given(st.integers(-(2**63), FIRST - 1) | st.integers(LAST + 1, 2**63 - 1), st.integers(0, 10**9 - 1))
def test_a_moment_beyond_the_calendar_is_bare_seconds(seconds: int, nanoseconds: int) -> None:
    """A file system can hold such times, so they must be shown and not fail."""
    assert moment(seconds * 10**9 + nanoseconds) == f"@{seconds}.{nanoseconds:09}"


@pytest.mark.parametrize("zone", ["UTC", "America/St_Johns", "Asia/Kathmandu"])
def test_a_moment_does_not_depend_on_the_time_zone(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert moment(-1) == "1969-12-31 23:59:59.999999999Z"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 60, "1024.0 PiB"),
    ],
)
def test_a_size_for_people(count: int, text: str) -> None:
    assert size_text(count) == text


def test_a_text_of_several_parts_is_escaped_once() -> None:
    """Whoever put it together may have escaped the names in it, or quoted them for a shell."""
    escaped = printable("two\nlines") + ": is another"
    assert on_one_line(escaped) == escaped != printable(escaped)
    assert on_one_line("two\nlines") == "two\\nlines"
