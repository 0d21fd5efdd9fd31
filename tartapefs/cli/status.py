"""The command that shows the state of mounted archives: status."""

import bisect
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import click

from tartapefs.base.errors import MountError
from tartapefs.base.text import counted, on_one_line, printable, size_text
from tartapefs.cli import terminal
from tartapefs.cli.common import DRIFT, json_option, path, print_json, say
from tartapefs.cli.openmetrics import openmetrics

_INTERVAL = 1.0  # seconds between two reports of --watch
_LABEL = 15  # columns
_LEAST = 10  # columns of a text, and cells of the bar
_CELLS = 50  # of the bar, but for a terminal
_RANGES_SHOWN = 8

Facts = dict[str, Any]


def _line(text: object) -> str:
    """Makes a value of a report one printable line, even if a foreign daemon sent it."""
    return on_one_line(str(text))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def bar(ranges: list[list[int]], size: int, cells: int = _CELLS) -> str:
    """Draws coverage: `#` for a cell whose bytes are all in the ranges, `+` for some of them, `.` for none.

    >>> bar([[0, 50], [60, 65]], 100, cells=10)
    '#####.+...'
    """
    starts, text = [start for start, _ in ranges], ""
    for cell in range(cells):
        low, high = size * cell // cells, size * (cell + 1) // cells
        overlapping = ranges[max(0, bisect.bisect_right(starts, low) - 1) : bisect.bisect_left(starts, high)]
        covered = sum(max(0, min(stop, high) - max(start, low)) for start, stop in overlapping)
        text += "." if covered == 0 else "#" if covered == high - low else "+"
    return text


def _ranges_text(coverage: Facts) -> str:
    ranges = coverage["ranges"]
    shown = ", ".join(f"{start}-{stop}" for start, stop in ranges[:_RANGES_SHOWN])
    more = f" and {len(ranges) - _RANGES_SHOWN} more" if len(ranges) > _RANGES_SHOWN else ""
    unsure = f"; up to {size_text(coverage['unsure'])} of it were not delivered" if coverage["unsure"] else ""
    return f"{shown or 'none'}{more}{unsure}"


def _reader_text(reader: Facts, size: int) -> str:
    left, given = reader["seconds_left"], reader["position"]
    ahead = given - reached if (reached := reader.get("reached")) else 0  # 0 if it reads by offset
    return (
        f"{_line(reader['command'] or '?')} at {given} ({_percent(given, size)},"
        f" {_line(reader['member'] or 'no member')}), {size_text(reader['rate'])}/s"
        + (f", in {_line(reader['part'])}" if "part" in reader else "")
        + (f", {size_text(ahead)} of it ahead" if ahead > 0 else "")
        + ("" if left is None else f", {timedelta(seconds=round(left))} left")
    )


def _held_text(read: Facts, size: int) -> str:
    return (
        f"{_line(read['command'] or '?')} at {read['position']} ({_percent(read['position'], size)},"
        f" {_line(read['member'] or 'no member')}), for {timedelta(seconds=round(read['seconds']))}"
    )


def _lines(facts: Facts, cells: int) -> Iterator[tuple[str, str]]:
    """Formats a report as pairs of label and text. A daemon that has only extended attributes reports all of them.

    `cells`: of the bar.
    """
    size = facts.get("size", 0)
    for key, value in facts.items():
        match key:
            case "format" | "position" | "member":
                continue  # they belong to the latest reader, which has a line of its own
            case "size":
                yield key, f"{value} ({size_text(value)})"
            case "delivered" | "covered":
                yield key, f"{value} ({size_text(value)})"
            case "coverage":
                yield key, f"{bar(value['ranges'], size, cells)} {_percent(value['size'], size)}"
                yield "ranges", _ranges_text(value)
            case "scrub":
                passes = f"{counted(value['passes'], 'time')} to the end"
                yield key, f"at {value['position']} ({_percent(value['position'], size)}), {passes}"
            case "additions":
                others = ", …" * (value["count"] > len(value["paths"]))
                yield key, f"{value['count']}: {', '.join(map(_line, value['paths']))}{others}"
            case "read_ahead":
                yield key, "none" if value == 0 else "unknown" if value is None else size_text(value)
            case "rate":
                yield key, f"{size_text(value)}/s"
            case "readers" if isinstance(value, list):
                for reader in value:
                    yield f"reader {reader['pid'] or '?'}", _reader_text(reader, size)
            case "held" if isinstance(value, list):
                for read in value:
                    yield f"held {read['pid'] or '?'}", _held_text(read, size)
            case "mountpoint":
                yield key, printable(value)
            case _:
                yield key, _line(value)


def _report(facts: Facts, columns: int | None) -> Iterator[str]:
    """Lays a report out in lines of at most this width, if there is one."""
    room = columns and max(_LEAST, columns - _LABEL)
    for label, text in _lines(facts, max(_LEAST, room - len(" 100.0 %")) if room else _CELLS):
        for part in terminal.folded(text, room) if room else [text]:
            yield f"{label:{_LABEL}}{part}"
            label = ""


def _summary(facts: Facts) -> str:
    """Formats a report as one line, for a list of mounts."""
    text = f"{printable(facts['mountpoint'])}: {_line(facts['source'])}, {_line(facts['state'])}"
    if "size" in facts:
        covered = facts["coverage"]["size"] if "coverage" in facts else facts["covered"]
        text += f", {_percent(covered, facts['size'])} of {size_text(facts['size'])} delivered"
    if "rate" in facts:
        text += f", {counted(len(facts['readers']), 'reader')}, {size_text(facts['rate'])}/s"
    return text


def _state(mountpoint: str | None) -> tuple[Facts | list[Facts], bool]:
    """Returns the report of one mount, or those of all; and whether none is known to be invalid."""
    from tartapefs.mount import mount_table

    if mountpoint is not None:
        facts = mount_table.status(mount_table.entry_of(mountpoint))
        return facts, facts["state"] == "valid"
    found = mount_table.statuses()
    return found, not any(facts["state"].startswith("invalid") for facts in found)


def _text(found: Facts | list[Facts], columns: int | None) -> list[str]:
    """Formats what `_state` returns for a terminal of this width, or for something else."""
    if isinstance(found, dict):
        return list(_report(found, columns))
    lines = list(map(_summary, found)) or ["no archive is mounted"]
    return [part for line in lines for part in (terminal.folded(line, columns) if columns else [line])]


@click.command()
@click.argument("mountpoint", metavar="[MNT]", required=False, type=path)
@click.option("-w", "--watch", is_flag=True, help="Refresh every second, until it is unmounted.")
@json_option
@click.option("--openmetrics", "as_metrics", is_flag=True, help="Report for Prometheus; the exit code is 0 then.")
def status(mountpoint: str | None, watch: bool, as_json: bool, as_metrics: bool) -> None:
    """Show the state of one mounted archive, or of all.

    Tells whether it is still as recorded (exit code 1 if not), which processes read it, how far each has read, and
    which parts of the archive have been delivered: in the bar, # stands for all, + for some, . for none.
    """
    if watch + as_json + as_metrics > 1:
        raise click.UsageError("--watch is for people, --json and --openmetrics are for programs: give one of them")
    found, is_valid = _state(mountpoint)
    if as_metrics:
        click.echo(openmetrics(found if isinstance(found, list) else [found]))
        return
    if watch:
        is_valid = _watch(mountpoint)
    elif as_json:
        print_json(found)
    else:
        _print(found)
    if not is_valid:
        raise SystemExit(DRIFT)


def _print(found: Facts | list[Facts]) -> None:
    click.echo("\n".join(_text(found, terminal.columns(sys.stdout))))


def _watch(mountpoint: str | None) -> bool:
    """Shows the report repeatedly until the archive is unmounted; returns whether it was as recorded then.

    On a terminal over itself, and anew when the window gets another size; elsewhere one below the other.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])  # it ends the pause
    live = terminal.can_draw(sys.stdout)
    found, is_valid = _state(mountpoint)
    try:
        with terminal.Drawing(sys.stdout) as drawing:
            while True:
                if live:
                    drawing.draw(_text(found, drawing.columns))
                else:
                    _print(found)
                    click.echo()
                signal.sigtimedwait([signal.SIGWINCH], _INTERVAL)
                found, is_valid = _state(mountpoint)
    except MountError as error:
        ended = str(error)
    finally:
        if live:
            _print(found)
    say(ended)
    return is_valid
