"""Progress on a terminal: one line, never wrapped: bar, percent, rate, time left, and the member that is read."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tartapefs.api.tape import Tape
from tartapefs.base.text import printable, size_text
from tartapefs.cli.common import is_quiet

_DELAY = 1.0  # seconds: what ends earlier shows nothing
_LOOKUP_INTERVAL = 0.2  # seconds between two lookups of the member
_WIDE = 100  # columns; from here on the bar is longer


class Update(Protocol):
    """Reports progress: `done` of the total; `position`: offset in the archive that is read, in bytes.

    `total`: once it is known, if it was not at the beginning.
    """

    def __call__(self, done: int, position: int | None = None, note: str = "", total: int | None = None) -> None: ...


def _no_update(done: int, position: int | None = None, note: str = "", total: int | None = None) -> None:
    pass


@contextmanager
def progress(what: str, total: int | None = None, is_bytes: bool = False, tape: Tape | None = None) -> Iterator[Update]:
    """Shows the progress of `what` on a terminal, after one second; the block calls the function that it gets.

    The unit is bytes or members. With a `tape` it also shows the member at the position. A `total` that turns out too
    small was an estimate, and is dropped. At the end, also after an interruption, the line is erased.
    """
    if sys.stderr is None or not sys.stderr.isatty() or is_quiet():
        yield _no_update
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Done(ProgressColumn):
        """The percentage, or the count if the total is unknown."""

        def render(self, task: Task) -> Text:
            count = size_text(task.completed) if is_bytes else f"{task.completed:,.0f}"
            return Text(count if task.total is None else f"{task.percentage:3.0f}%")

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.speed or 0
            return Text(f"{size_text(speed)}/s" if is_bytes else f"{speed:,.0f} members/s")

    console = Console(stderr=True, no_color=True)  # its colours are made for dark terminals

    def line(ratio: int | None = None, max_width: int | None = None) -> Column:
        return Column(no_wrap=True, overflow="ellipsis", ratio=ratio, max_width=max_width)

    bar = Progress(
        TextColumn("{task.description}", markup=False, table_column=line(max_width=console.width // 4)),
        BarColumn(bar_width=20 if console.width >= _WIDE else 10),
        Done(table_column=line()),
        Rate(table_column=line()),
        TimeRemainingColumn(table_column=line()),
        TextColumn("{task.fields[note]}", markup=False, table_column=line(ratio=1)),
        console=console,
        expand=True,
        transient=True,
        redirect_stdout=False,  # stdout is data
        redirect_stderr=False,
    )
    number = bar.add_task(printable(what), total=total, note="")
    task = bar.tasks[number]
    begun = last_lookup = time.monotonic()
    shown = False

    def update(done: int, position: int | None = None, note: str = "", total: int | None = total) -> None:
        nonlocal shown, last_lookup
        now = time.monotonic()
        task.total = None if total is not None and done > total else total
        if not shown and now - begun > _DELAY:
            shown = True
            bar.start()
        if tape is not None and position is not None:
            if not shown or now - last_lookup < _LOOKUP_INTERVAL:
                bar.update(number, completed=done)
                return
            last_lookup = now
            member = tape.member_at(min(position, tape.total_size - 1))
            note = printable(member.arc_path) if member is not None else ""
        bar.update(number, completed=done, note=note)

    try:
        yield update
    finally:
        bar.stop()
