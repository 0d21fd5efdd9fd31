"""What commands draw on a terminal, and draw over: progress, and the report of `status --watch`.

Rule: the cursor rests on the first character of what is drawn. Whatever the terminal or another program writes then,
such as ^C, stays within that, and so do the lines that a window makes of one when it becomes narrower: the next
drawing clears all from the cursor on. No line is ever wrapped, and no colours are used: those that can be read on a
dark background cannot on a light one.
"""

import os
import re
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import ClassVar, TextIO

from tartapefs.base.signals import undisturbed

_CLEAR = "\r\x1b[J"  # all from this line on
_CUT, _WRAP = "\x1b[?7l", "\x1b[?7h"  # what the terminal does at its right edge

_WORD = re.compile(r" *[^ ]+(?:(?<=\d) (?:%|[KMGTP]?i?B)[^ ]*)?")


def can_draw(stream: TextIO | None) -> bool:
    """Whether this is a terminal that moves its cursor."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def columns(stream: TextIO | None) -> int | None:
    """The width of a terminal; None of anything else."""
    return _size(stream).columns if stream is not None and stream.isatty() else None


def _size(stream: TextIO) -> os.terminal_size:
    wide, high = os.get_terminal_size(stream.fileno())
    return os.terminal_size((wide or 80, high or 24))


def width(text: str) -> int:
    """How many columns a terminal needs for it."""
    if text.isascii():
        return len(text)
    marks, wide = ("Mn", "Me"), ("W", "F")
    return sum(1 + (unicodedata.east_asian_width(c) in wide) for c in text if unicodedata.category(c) not in marks)


def head(text: str, room: int) -> str:
    """As much of its beginning as there is room for."""
    for end, character in enumerate(text):
        room -= width(character)
        if room < 0:
            return text[:end]
    return text


def cut(text: str, room: int) -> str:
    """The text; if there is not enough room, its beginning and an ellipsis.

    >>> cut("photos/1.jpg", 12), cut("photos/1.jpg", 8)
    ('photos/1.jpg', 'photos/…')
    """
    return text if width(text) <= room else head(text, room - 1) + "…"


def folded(text: str, room: int) -> Iterator[str]:
    """Lays a text out in lines of this width, between words; a longer word is folded, if it can be behind a slash.

    A number and its unit are one word.

    >>> list(folded("data/photos/2024 is of 12.0 MiB", 12))
    ['data/photos/', '2024 is of', '12.0 MiB']
    """
    line = ""
    for word in _WORD.findall(text):
        if line and width(line + word) > room:
            yield line
            word, line = word.lstrip(), ""
        line += word
        while width(line) > room:
            part = head(line, room) or line[0]
            part = part[: part.rfind("/") + 1] or part
            yield part
            line = line[len(part) :]
    yield line


class Drawing:
    """Lines on a terminal that take each other's place; at the end of the `with` block none is left."""

    current: ClassVar["Drawing | None"] = None

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.RLock()  # threads that report progress may go on while the block ends
        self._is_drawn = self._is_over = False

    @property
    def columns(self) -> int:
        return _size(self._stream).columns

    def draw(self, lines: Sequence[str]) -> None:
        """Draws lines, none of which is wider than the terminal; no more of them than it has."""
        rows = _size(self._stream).lines
        if len(lines) > rows:
            lines = [*lines[: rows - 1], "…"]
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        with self._lock:
            if not self._is_over:
                self._is_drawn = True
                self._write(_CLEAR + _CUT + "\r\n".join(lines) + _WRAP + "\r" + up)

    def erase(self) -> None:
        """Makes room for a message, until something is drawn again."""
        with self._lock:
            if self._is_drawn:
                self._write(_CLEAR)
                self._is_drawn = False

    def _write(self, text: str) -> None:
        with suppress(OSError):  # the terminal may be gone, which is no reason to end
            os.write(self._stream.fileno(), text.encode(self._stream.encoding, "backslashreplace"))

    def __enter__(self) -> "Drawing":
        Drawing.current = self
        return self

    def __exit__(self, *exception: object) -> None:
        with undisturbed(), self._lock:
            self.erase()
            self._is_over, Drawing.current = True, None


def make_way(stream: TextIO | None) -> None:
    """Erases what is drawn, if this stream is a terminal, too: what is written to it takes its place."""
    if Drawing.current is not None and stream is not None and stream.isatty():
        Drawing.current.erase()


def erase_echo(stream: TextIO | None) -> None:
    """Erases the ^C with which a terminal shows an interruption."""
    if stream is not None and can_draw(stream):
        with suppress(OSError):
            os.write(stream.fileno(), b"\r\x1b[K")
