"""What the commands share: exit codes, messages, the options that several have, progress."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from tartapefs.display import printable

DRIFT, USAGE, NO_TAPE, REFUSED, NO_MOUNT, INTERRUPTED = 1, 2, 3, 4, 5, 130

_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", "K", "M", "G", "T", "P"))}


def say(message: str) -> None:
    click.echo(f"tartapefs: {message}", err=True)


def size_text(count: int) -> str:
    """A size for people: `1.5 GiB`."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def byte_count(text: str) -> int:
    """A number of bytes, with K, M, G, T or P (or KiB and so on) for powers of 1024."""
    number = re.fullmatch(r"([0-9]{1,19})(?:([KMGTP])(?:iB)?)?", text, re.ASCII)
    if number is None:
        raise click.BadParameter(f"{text!r} is not a number of bytes, such as 512, 64K or 5GiB")
    return int(number[1]) * _UNITS[number[2] or ""]


def path(text: str) -> str:
    """A path, which is not empty; what lies there is for the command to find out."""
    if not text:
        raise click.BadParameter("an empty path names nothing")
    return text


def octal_mode(text: str) -> int:
    """Permission bits in octal."""
    if not re.fullmatch(r"0*[0-7]{1,3}", text, re.ASCII):
        raise click.BadParameter(f"{text!r} is not a mode in octal, such as 0440")
    return int(text, 8)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


@contextmanager
def progress(what: str, total: int | None = None, is_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows how far `what` is, on a terminal, once it has taken a second; the block calls what it is given."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(),)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=False,  # which is data, wherever it goes
        redirect_stderr=False,
    )
    task = bar.add_task(printable(what), total=total)
    begun, shown = time.monotonic(), False

    def update(done: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - begun > 1:
            shown = True
            bar.start()
        bar.update(task, completed=done)

    try:
        yield update
    finally:
        if shown:
            bar.stop()


def folder_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("directory", metavar="DIR", type=path)(function)


def index_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--index", metavar="PATH", type=path, help="The index, if not DIR/.tartape/index.db.")(function)


def check_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--check",
        type=click.Choice(("full", "mtime")),
        default="full",
        show_default=True,
        help="What is compared: everything, or not inode and change time.",
    )(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Report as JSON.")(function)


def recording_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--exclude", metavar="PATTERN", multiple=True, help="Leave out, as .gitignore would. Repeatable."),
        click.option("--keep-owners", is_flag=True, help="Write real owners into the archive instead of root."),
        click.option("--skip-unreadable", is_flag=True, help="Leave out what this user cannot read, and say so."),
        click.option("--skip-busy", is_flag=True, help="Leave out what a program is writing just now, and say so."),
    ):
        function = option(function)
    return function


def fail(message: str, code: int) -> NoReturn:
    say(message)
    raise SystemExit(code)
