"""Progress on a terminal: one line, never wrapped: bar, percent, rate, time left, and the member that is read."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tartapefs.api.tape import Tape
from tartapefs.base.text import printable, size_text
from tartapefs.cli import terminal
from tartapefs.cli.common import is_quiet

_DELAY = 1.0  # seconds: what ends earlier shows nothing
_INTERVAL = 0.2  # seconds between two drawings
_RECENT = 100  # of them; the rate is that since then
_WIDE = 100  # columns; from here on there is room for what is done with the member
_LEAST_NAME = 8  # columns; a name with less room tells nothing


class Update(Protocol):
    """Reports progress: `done` of the total; `position`: offset in the archive that is read, in bytes.

    `total`: once it is known, if it was not at the beginning.
    """

    def __call__(self, done: int, position: int | None = None, note: str = "", total: int | None = None) -> None: ...


def _no_update(done: int, position: int | None = None, note: str = "", total: int | None = None) -> None:
    pass


def line(columns: int, doing: str, note: str, done: int, total: int | None, rate: float, is_bytes: bool) -> str:
    """Lays out the line: what there is no room for is left out from its end on.

    >>> line(60, "reading", "data/photos/1.jpg", 1 << 30, 4 << 30, 100 << 20, is_bytes=True)
    '#......   25%   100.0 MiB/s  0:00:31  data/photos/1.jpg'
    """
    parts = []
    if total:
        cells = max(5, columns // 8)
        full = cells * done // total
        parts = ["#" * full + "." * (cells - full), f"{100 * done // total:3}%"]
    else:
        parts = [size_text(done) if is_bytes else f"{done:,}"]
    if rate > 0:
        parts.append(f"{size_text(rate) if is_bytes else f'{rate:,.0f} members':>10}/s")
        if total:
            minutes, seconds = divmod(round((total - done) / rate), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}")
    while len(numbers := "  ".join(parts)) > columns:
        parts.pop()
    room = columns - len(numbers) - 2
    text = f"{doing} {note}" if columns >= _WIDE and note else note or doing
    return f"{numbers}  {terminal.cut(text, room)}" if room >= min(terminal.width(text), _LEAST_NAME) else numbers


@contextmanager
def progress(
    doing: str, total: int | None = None, is_bytes: bool = False, tape: Tape | None = None
) -> Iterator[Update]:
    """Shows progress on a terminal, after one second; the block calls the function that it gets.

    `doing`: the verb. The unit is bytes or members. With a `tape` it also shows the member at the position. A `total`
    that turns out too small was an estimate, and is dropped. At the end, after an interruption too, the line is erased.
    """
    if not terminal.can_draw(sys.stderr) or is_quiet():
        yield _no_update
        return
    due = time.monotonic() + _DELAY
    recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)

    def update(done: int, position: int | None = None, note: str = "", total: int | None = total) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due and recent:
            return
        recent.append((now, done))
        if now < due:
            return
        due = now + _INTERVAL
        if tape is not None and position is not None:
            member = tape.member_at(min(position, tape.total_size - 1))
            note = printable(member.arc_path) if member is not None else ""
        if total is not None and done > total:
            total = None
        begun, had = recent[0]
        rate = (done - had) / (now - begun) if now > begun else 0
        drawing.draw([line(drawing.columns, doing, note, done, total, rate, is_bytes)])

    with terminal.Drawing(sys.stderr) as drawing:
        yield update
