"""The command that tells how mounted archives fare: status."""

import bisect
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import click

from tartapefs.base.errors import MountError
from tartapefs.base.text import printable
from tartapefs.cli.common import DRIFT, json_option, path, print_json, say, size_text

_EVERY = 1.0  # seconds between two looks of --watch
_CELLS = 50  # of the bar
_RANGES_SHOWN = 8

Facts = dict[str, Any]


def _line(text: object) -> str:
    """What a report says, which is of one line already, unless it comes from elsewhere than it should."""
    return str(text) if str(text).isprintable() else printable(str(text))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def bar(ranges: list[list[int]], size: int, cells: int = _CELLS) -> str:
    """`#` where all of a cell's bytes are in the ranges, `+` where some are, `.` where none is.

    >>> bar([[0, 50], [60, 65]], 100, cells=10)
    '#####.+...'
    """
    starts, text = [start for start, _ in ranges], ""
    for cell in range(cells):
        low, high = size * cell // cells, size * (cell + 1) // cells
        some = ranges[max(0, bisect.bisect_right(starts, low) - 1) : bisect.bisect_left(starts, high)]
        covered = sum(max(0, min(stop, high) - max(start, low)) for start, stop in some)
        text += "." if covered == 0 else "#" if covered == high - low else "+"
    return text


def _ranges(coverage: Facts) -> str:
    ranges = coverage["ranges"]
    shown = ", ".join(f"{start}-{stop}" for start, stop in ranges[:_RANGES_SHOWN])
    more = f" and {len(ranges) - _RANGES_SHOWN} more" if len(ranges) > _RANGES_SHOWN else ""
    unsure = f"; up to {size_text(coverage['unsure'])} of it were not delivered" if coverage["unsure"] else ""
    return f"{shown or 'none'}{more}{unsure}"


def _reader(reader: Facts, size: int) -> str:
    left = reader["seconds_left"]
    return (
        f"{_line(reader['command'] or '?')} at {reader['position']} ({_share(reader['position'], size)},"
        f" {_line(reader['member'] or 'no member')}), {size_text(reader['rate'])}/s"
        + ("" if left is None else f", {timedelta(seconds=round(left))} left")
    )


def _held(read: Facts, size: int) -> str:
    return (
        f"{_line(read['command'] or '?')} at {read['position']} ({_share(read['position'], size)},"
        f" {_line(read['member'] or 'no member')}), for {timedelta(seconds=round(read['seconds']))}"
    )


def _lines(facts: Facts) -> Iterator[tuple[str, str]]:
    """A report as it is shown: what, and that. Of a daemon that only has extended attributes, all that they say."""
    size = facts.get("size", 0)
    for key, value in facts.items():
        match key:
            case "format" | "position" | "member":
                continue  # of the latest reader, which is shown as a whole
            case "size":
                yield key, f"{value} ({size_text(value)})"
            case "delivered" | "covered":
                yield key, f"{value} ({size_text(value)})"
            case "coverage":
                yield key, f"{bar(value['ranges'], size)} {_share(value['size'], size)}"
                yield "ranges", _ranges(value)
            case "scrub":
                yield (
                    key,
                    f"at {value['position']} ({_share(value['position'], size)}), {value['passes']} times to the end",
                )
            case "rate":
                yield key, f"{size_text(value)}/s"
            case "readers" if isinstance(value, list):
                for reader in value:
                    yield f"reader {reader['pid'] or '?'}", _reader(reader, size)
            case "held" if isinstance(value, list):
                for read in value:
                    yield f"held {read['pid'] or '?'}", _held(read, size)
            case "mountpoint":
                yield key, printable(value)
            case _:
                yield key, _line(value)


def _text(facts: Facts) -> str:
    return "\n".join(f"{key:14}{value}" for key, value in _lines(facts))


def _row(facts: Facts) -> str:
    """A report in one line, of a list of them."""
    text = f"{printable(facts['mountpoint'])}: {_line(facts['source'])}, {_line(facts['state'])}"
    if "size" in facts:
        covered = facts["coverage"]["size"] if "coverage" in facts else facts["covered"]
        text += f", {_share(covered, facts['size'])} of {size_text(facts['size'])} delivered"
    if "rate" in facts:
        text += f", {len(facts['readers'])} readers, {size_text(facts['rate'])}/s"
    return text


def _look(mountpoint: str | None) -> tuple[Facts | list[Facts], str, bool]:
    """The report or, of all mounts, the reports; these as text; and whether all that is known is as recorded."""
    from tartapefs.mount import mount_table

    if mountpoint is not None:
        facts = mount_table.status(mountpoint)
        return facts, _text(facts), facts["state"] == "valid"
    found = mount_table.statuses()
    bad = [facts for facts in found if facts["state"].startswith("invalid")]
    return found, "\n".join(map(_row, found)) or "no archive is mounted", not bad


@click.command()
@click.argument("mountpoint", metavar="[MNT]", required=False, type=path)
@click.option("-w", "--watch", is_flag=True, help="Look again every second, until it is unmounted.")
@json_option
def status(mountpoint: str | None, watch: bool, as_json: bool) -> None:
    """How the archive mounted at MNT fares, or all that are mounted.

    Tells whether it is still as recorded (exit code 1 if not), who reads it, how far each reader is, and which parts of
    the archive have been delivered so far: in the bar, # stands for all, + for some, . for nothing.
    """
    facts, text, is_valid = _look(mountpoint)
    if not watch:
        print_json(facts) if as_json else click.echo(text)
    elif as_json:
        raise click.UsageError("--watch is for people, --json for programs: ask again")
    else:
        is_valid = _watch(mountpoint, text, is_valid)
    if not is_valid:
        raise SystemExit(DRIFT)


def _watch(mountpoint: str | None, text: str, is_valid: bool) -> bool:
    """Shows the report, and goes on to show it, until its archive is unmounted; whether it was as recorded then."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(Text(text), console=Console(), auto_refresh=False) as live:
        try:
            while True:
                live.update(Text(text), refresh=True)
                time.sleep(_EVERY)
                _, text, is_valid = _look(mountpoint)
        except MountError as error:
            ended = str(error)
    say(ended)
    return is_valid
