"""The command line: parses, builds, calls, prints, and maps what happened to an exit code.

Rule: data on stdout, messages on stderr; names always escaped; no traceback for anything a user can cause. Exit codes:
0 done; 1 drift, or a failed check or read; 2 wrong usage; 3 no tape, or not a tape; 4 refused at recording; 5 could
not mount or unmount; 130 interrupted.
"""

import errno
import json
import logging
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn

import click

from tartapefs import __version__, layout
from tartapefs.audit import verify as find_drift
from tartapefs.display import moment, printable
from tartapefs.errors import (
    MountError,
    OffsetError,
    SourceUnreadableError,
    TapeBusyError,
    TapeConstraintError,
    TapeError,
    TapeExistsError,
    TapeFormatError,
    TapeIntegrityError,
    TapeNotFoundError,
)
from tartapefs.events import Event, FileData, FileEnd, FileStart, TapeCompleted
from tartapefs.member import Member
from tartapefs.player import CHUNK, Check, TapePlayer
from tartapefs.recorder import TapeRecorder
from tartapefs.source import Source
from tartapefs.tape import Tape

DRIFT, USAGE, NO_TAPE, REFUSED, NO_MOUNT, INTERRUPTED = 1, 2, 3, 4, 5, 130

_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", "K", "M", "G", "T", "P"))}


def _say(message: str) -> None:
    click.echo(f"tartapefs: {message}", err=True)


def _size(count: int) -> str:
    """A size for people: `1.5 GiB`."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _bytes(text: str) -> int:
    """A number of bytes, with K, M, G, T or P (or KiB and so on) for powers of 1024."""
    number = re.fullmatch(r"([0-9]{1,19})(?:([KMGTP])(?:iB)?)?", text, re.ASCII)
    if number is None:
        raise click.BadParameter(f"{text!r} is not a number of bytes, such as 512, 64K or 5GiB")
    return int(number[1]) * _UNITS[number[2] or ""]


def _path(text: str) -> str:
    """A path, which is not empty; what lies there is for the command to find out."""
    if not text:
        raise click.BadParameter("an empty path names nothing")
    return text


def _mode(text: str) -> int:
    """Permission bits in octal."""
    if not re.fullmatch(r"0*[0-7]{1,3}", text, re.ASCII):
        raise click.BadParameter(f"{text!r} is not a mode in octal, such as 0440")
    return int(text, 8)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


@contextmanager
def _progress(what: str, total: int | None = None, is_bytes: bool = False) -> Iterator[Callable[[int], None]]:
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


def _folder_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("directory", metavar="DIR", type=_path)(function)


def _index_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--index", metavar="PATH", type=_path, help="The index, if not DIR/.tartape/index.db.")(
        function
    )


def _check_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--check",
        type=click.Choice(("full", "mtime")),
        default="full",
        show_default=True,
        help="What is compared: everything, or not inode and change time.",
    )(function)


def _json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Report as JSON.")(function)


def _recording_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--exclude", metavar="PATTERN", multiple=True, help="Leave out, as .gitignore would. Repeatable."),
        click.option("--keep-owners", is_flag=True, help="Write real owners into the archive instead of root."),
        click.option("--skip-unreadable", is_flag=True, help="Leave out what this user cannot read, and say so."),
    ):
        function = option(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tartapefs")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
def cli(verbose: bool) -> None:
    """Shows a folder as one read-only tar archive that needs no disk space.

    Record a folder once, then mount it: archive.tar has a known size, can be read at any offset, and is checked against
    the recording on every read.
    """
    logging.basicConfig(format="tartapefs: %(message)s", level=logging.INFO if verbose else logging.WARNING)


def _record(
    directory: str, index: str | None, exclude: tuple[str, ...], keep_owners: bool, skip_unreadable: bool, force: bool
) -> tuple[TapeRecorder, str]:
    if not os.path.isdir(directory):
        raise click.BadParameter(f"{printable(directory)} is not a folder", param_hint="DIR")
    with _progress(f"recording {directory}") as update:
        try:
            recorder = TapeRecorder(
                directory,
                index,
                exclude or None,
                not keep_owners,
                force,
                skip_unreadable=skip_unreadable,
                on_progress=lambda members, size: update(members),
            )
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--exclude") from None
        try:
            fingerprint = recorder.commit()
        except OSError as error:
            if isinstance(error, TapeError):
                raise
            where = error.filename or recorder.index_path
            _fail(f"{printable(where)}: {error.strerror or error}; nothing was written", REFUSED)
    for problem in recorder.skipped:
        _say(f"left out: {problem}")
    special = recorder.left_out - len(recorder.skipped)
    if special:
        _say(f"left out {special} sockets, pipes and devices")
    _say(
        f"recorded {recorder.member_count:,} members of {printable(directory)};"
        f" the archive has {recorder.total_size:,} bytes ({_size(recorder.total_size)})"
    )
    return recorder, fingerprint


@cli.command()
@_folder_argument
@_index_option
@_recording_options
@click.option("--force", is_flag=True, help="Replace an existing recording.")
@_json_option
def record(
    directory: str,
    index: str | None,
    exclude: tuple[str, ...],
    keep_owners: bool,
    skip_unreadable: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Record DIR, and print the fingerprint of its archive."""
    recorder, fingerprint = _record(directory, index, exclude, keep_owners, skip_unreadable, force)
    if not as_json:
        click.echo(fingerprint)
        return
    _print_json(
        {
            "fingerprint": fingerprint,
            "total_size": recorder.total_size,
            "member_count": recorder.member_count,
            "index": recorder.index_path,
            "left_out": recorder.left_out,
            "skipped": [{"path": problem.path, "reason": problem.reason} for problem in recorder.skipped],
        }
    )


def _checks(tape: Tape, directory: str) -> tuple[bool | None, str]:
    """Whether the tape is at home, and which facts each read compares."""
    try:
        with Source(directory) as source:
            at_home = tape.is_at_home(source)
    except OSError:
        return None, "the source folder cannot be opened"
    if at_home:
        return True, "type, size, mtime, mode, link target, inode, ctime"
    return False, "type, size, mtime, mode, link target (not inode and ctime: folder or index are copies)"


@cli.command()
@_folder_argument
@_index_option
@_json_option
def info(directory: str, index: str | None, as_json: bool) -> None:
    """What is known of the tape of DIR."""
    with Tape.discover(directory, index) as tape:
        at_home, checks = _checks(tape, directory)
        facts = {
            "source": os.path.realpath(directory),
            "index": tape.index_path,
            "fingerprint": tape.fingerprint,
            "total_size": tape.total_size,
            "member_count": tape.member_count,
            "recorded": moment(tape.recorded_ns),
            "excluded": list(tape.excluded),
            "left_out": tape.left_out,
            "owners": "kept" if tape.owners_kept else "scrubbed",
            "at_home": at_home,
            "checks": checks,
        }
    if as_json:
        _print_json(facts)
        return
    facts["total_size"] = f"{tape.total_size} ({_size(tape.total_size)})"
    facts["excluded"] = " ".join(tape.excluded) or "nothing"
    facts["at_home"] = {True: "yes", False: "no", None: "unknown"}[at_home]
    for key, value in facts.items():
        click.echo(f"{key.replace('_', ' '):14}{printable(str(value))}")


def _member_facts(member: Member) -> dict[str, Any]:
    facts = {
        "path": member.arc_path,
        "start": member.start,
        "stop": member.stop,
        "mode": f"{stat.S_IMODE(member.mode):04o}",
        "type": "file" if member.is_file else "directory" if member.is_directory else "link",
        "size": member.size,
        "mtime": moment(member.mtime_ns),
    }
    return facts | ({"target": os.fsdecode(member.target)} if member.is_link else {})


@cli.command("ls")
@_folder_argument
@_index_option
@click.option("--json", "as_json", is_flag=True, help="A JSON object for each member, one a line.")
def list_members(directory: str, index: str | None, as_json: bool) -> None:
    """List the members: mode, size, mtime, where in the archive each starts, and its name."""
    with Tape.discover(directory, index) as tape:
        wide = len(str(tape.total_size))
        for member in tape.members():
            if as_json:
                print(json.dumps(_member_facts(member)))
                continue
            arrow = f" -> {printable(member.target)}" if member.is_link else ""
            print(
                f"{stat.filemode(member.mode)} {member.size:>{wide}} {moment(member.mtime_ns).partition('.')[0]}"
                f" {member.start:>{wide}} {printable(member.name)}{arrow}"
            )


@cli.command()
@_folder_argument
@click.argument("where", metavar="OFFSET|MEMBER")
@_index_option
@_json_option
def locate(directory: str, where: str, index: str | None, as_json: bool) -> None:
    """What lies at OFFSET of the archive, or where MEMBER lies.

    A plain number is an offset, in bytes; anything else is the name of a member, which starts with the folder's own
    name. For a folder whose name is a number, write a slash after it.
    """
    with Tape.discover(directory, index) as tape:
        if re.fullmatch(r"[0-9]{1,19}", where, re.ASCII):
            offset = int(where)
            segment = tape.segment_at(offset)
            member = tape.member_at(offset)
            facts: dict[str, Any] = {
                "offset": offset,
                "segment": segment.kind.value,
                "start": segment.start,
                "stop": segment.stop,
                "position": offset - segment.start,
                "member": _member_facts(member) if member else None,
            }
            name = f"of {printable(member.arc_path)}" if member else "of the archive"
            line = (
                f"offset {offset}: byte {offset - segment.start} of the {segment.kind} {name},"
                f" which is [{segment.start}, {segment.stop})"
            )
        else:
            try:
                member = tape.find(where)
            except KeyError:
                _fail(f'{printable(where)}: no such member; "tartapefs ls" lists them', DRIFT)
            parts = list(layout.segments(member.start, member.size))
            facts = _member_facts(member) | {"segments": {s.kind.value: [s.start, s.stop] for s in parts}}
            line = f"{printable(member.arc_path)}: [{member.start}, {member.stop}): " + ", ".join(
                f"{s.kind} [{s.start}, {s.stop})" for s in parts
            )
    if as_json:
        _print_json(facts)
    else:
        click.echo(line)


def _drift_facts(error: TapeIntegrityError) -> dict[str, Any]:
    return {
        "member": error.member,
        "differences": [{"what": d.what, "recorded": d.recorded, "found": d.found} for d in error.differences],
    }


@cli.command()
@_folder_argument
@_index_option
@_check_option
@_json_option
def verify(directory: str, index: str | None, check: Check, as_json: bool) -> None:
    """Compare DIR with its recording, and list all drift."""
    with Tape.discover(directory, index) as tape:
        player = TapePlayer(tape, directory, check)
        if not tape.rows_are_sound():
            raise TapeFormatError(tape.index_path, "its rows fail their digest")
        found = []
        with _progress(f"verifying {directory}", tape.member_count) as update:
            for error in find_drift(tape, player.source, player.at_home, update):
                found.append(error)
                if not as_json:
                    click.echo(str(error))
        if as_json:
            _print_json({"valid": not found, "members": tape.member_count, "drift": list(map(_drift_facts, found))})
        elif not found:
            _say(f"{tape.member_count:,} members agree with the recording")
    if found:
        _fail(f"{len(found):,} differences from the recording", DRIFT)


def _event_facts(event: Event, position: int) -> dict[str, Any]:
    match event:
        case FileStart():
            facts = {"start_offset": event.metadata.start_offset, "resumed": event.metadata.resumed}
            return _member_facts(event.entry) | {"type": event.type} | facts
        case FileData():
            return {"type": event.type, "offset": position, "size": len(event.data)}
        case FileEnd():
            return {
                "type": event.type,
                "path": event.entry.arc_path,
                "end_offset": event.metadata.end_offset,
                "md5sum": event.metadata.md5sum,
                "is_complete": event.metadata.is_complete,
            }
        case TapeCompleted():
            return {"type": event.type, "end_offset": position}


def _play_events(
    player: TapePlayer, start: int, stop: int, out: BinaryIO | None, update: Callable[[int], None]
) -> None:
    position = start
    for event in player.play(start):
        if isinstance(event, FileData):
            data = event.data[: stop - position]
            if out is not None:
                out.write(data)
            print(json.dumps(_event_facts(FileData(data), position)))
            position += len(data)
            update(position - start)
        else:
            print(json.dumps(_event_facts(event, position)))
        if position == stop and stop < player.tape.total_size:
            return


def _play_bytes(player: TapePlayer, start: int, stop: int, out: BinaryIO, update: Callable[[int], None]) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for position in range(start, stop, CHUNK):
        out.write(buffer[: player.readinto(buffer[: stop - position], position)])
        update(position - start)


def _check_output(output: str, root: str, index: str) -> None:
    """Refuses an output that would overwrite, or by its mere presence change, what is being played."""
    where = os.path.realpath(output)
    if where == os.path.realpath(index) or os.path.commonpath((where, root)) == root:
        raise click.BadParameter(f"{printable(output)} is part of the tape that is to be played", param_hint="-o")


@cli.command()
@_folder_argument
@_index_option
@_check_option
@click.option(
    "--start",
    type=_bytes,
    metavar="BYTES",
    default="0",
    show_default=True,
    help="The first byte of the archive to play.",
)
@click.option("--length", type=_bytes, metavar="BYTES", help="How many bytes to play; by default all that follow.")
@click.option("-o", "--output", type=_path, help="Write the archive to this file instead of stdout.")
@click.option("--events", is_flag=True, help="Print events as JSON lines; the archive goes to --output, if given.")
def play(
    directory: str, index: str | None, check: Check, start: int, length: int | None, output: str | None, events: bool
) -> None:
    """Write the archive of DIR to stdout or a file, from any byte on."""
    with Tape.discover(directory, index) as tape:
        if start > tape.total_size:
            raise OffsetError(start, tape.total_size)
        stop = tape.total_size if length is None else min(start + length, tape.total_size)
        player = TapePlayer(tape, directory, check)
        if sys.stdout is None and (events or output is None):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")
        if output is not None:
            _check_output(output, player.source.root, tape.index_path)
        elif not events and sys.stdout.isatty():
            raise click.UsageError('the archive does not belong on a terminal; use "-o FILE" or a pipe')
        with _progress(f"playing {directory}", stop - start, is_bytes=True) as update:
            if output is not None:
                with open(output, "wb") as file:
                    if events:
                        _play_events(player, start, stop, file, update)
                    else:
                        _play_bytes(player, start, stop, file, update)
            elif events:
                _play_events(player, start, stop, None, update)
            else:
                _play_bytes(player, start, stop, sys.stdout.buffer, update)
                sys.stdout.buffer.flush()


@cli.command()
@_folder_argument
@click.argument("mountpoint", metavar="MNT", type=_path)
@_index_option
@_check_option
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground until it is unmounted.")
@click.option("--name", default="archive.tar", show_default=True, help="The name of the file that is shown.")
@click.option("--mode", type=_mode, metavar="OCTAL", default="0400", show_default=True, help="Its permission bits.")
@click.option("--allow-other", is_flag=True, help="Let other users in, as far as --mode does.")
@click.option("--cached", is_flag=True, help="Use the kernel's page cache: for programs that need mmap.")
@click.option(
    "--audit-interval",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=60,
    show_default=True,
    help="How often all directories are looked at while the archive is open.",
)
@click.option(
    "--audit-share",
    metavar="PERCENT",
    type=click.FloatRange(min=0, min_open=True, max=100),
    default=5,
    show_default=True,
    help="How much of one core that may take.",
)
@click.option("--log", "log_file", metavar="FILE", type=_path, help="Where the daemon logs, if not to syslog.")
@click.option("--record", "record_first", is_flag=True, help="Record DIR first if it has no recording.")
@_recording_options
def mount(
    directory: str,
    mountpoint: str,
    index: str | None,
    check: Check,
    foreground: bool,
    name: str,
    mode: int,
    allow_other: bool,
    cached: bool,
    audit_interval: float,
    audit_share: float,
    log_file: str | None,
    record_first: bool,
    exclude: tuple[str, ...],
    keep_owners: bool,
    skip_unreadable: bool,
) -> None:
    """Mount the archive of DIR at MNT; return once it can be read."""
    if not name or "/" in name or "\0" in name or name in (".", "..") or len(os.fsencode(name)) > 255:
        raise click.BadParameter(f"{printable(name)!r} is not a file name", param_hint="--name")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        from tartapefs import mount as mounting
        from tartapefs.fs import MountOptions
    except OSError as error:  # fusepy, when it finds no library
        _fail(f"{error}: install libfuse 2 (Debian: libfuse2, Fedora: fuse-libs, Arch: fuse2, Alpine: fuse)", NO_MOUNT)
    if not foreground:
        mounting.close_inherited()
    try:
        tape = Tape.discover(directory, index)
    except TapeNotFoundError:
        if not record_first:
            raise
        _record(directory, index, exclude, keep_owners, skip_unreadable, force=False)
        tape = Tape.discover(directory, index)
    with tape:
        options = MountOptions(name, mode, cached, allow_other, audit_interval, audit_share / 100)
        log = os.path.abspath(log_file) if log_file else None
        code = mounting.mount(TapePlayer(tape, directory, check), mountpoint, options, foreground, log)
    if code:
        _fail("the folder is no longer as recorded", code)


@cli.command()
@click.argument("mountpoint", metavar="MNT", type=_path)
@click.option("--lazy", is_flag=True, help="Do not wait for programs that still read the archive.")
def unmount(mountpoint: str, lazy: bool) -> None:
    """Unmount the archive at MNT."""
    from tartapefs import mount as mounting

    mounting.unmount(mountpoint, lazy)


@cli.command()
@click.argument("mountpoint", metavar="MNT", type=_path)
@_json_option
def status(mountpoint: str, as_json: bool) -> None:
    """Whether the archive mounted at MNT is still as recorded; exit code 1 if not."""
    from tartapefs import mount as mounting

    facts = mounting.status(mountpoint)
    if as_json:
        _print_json(facts)
    else:
        for key, value in facts.items():
            click.echo(f"{key:14}{value}")
    if facts["state"] != "valid":
        raise SystemExit(DRIFT)


def _fail(message: str, code: int) -> NoReturn:
    _say(message)
    raise SystemExit(code)


def _exit_code(error: TapeError) -> int:
    match error:
        case TapeNotFoundError() | TapeFormatError():
            return NO_TAPE
        case TapeExistsError() | TapeBusyError() | TapeConstraintError() | SourceUnreadableError():
            return REFUSED
        case MountError():
            return NO_MOUNT
        case TapeIntegrityError():
            return DRIFT
        case _:
            return USAGE


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> NoReturn:
    """The program: runs the command line, and exits with its code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader of a pipe does
    signal.signal(signal.SIGTERM, _terminated)  # so that a recording cleans up
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever the locale cannot show
    try:
        cli.main(prog_name="tartapefs", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where what it raises is caught
    except click.Abort:
        _say("interrupted")
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.message = "\n".join(map(printable, error.message.split("\n")))  # type: ignore[misc]
        error.show()
        sys.exit(USAGE)
    except (TapeConstraintError, SourceUnreadableError) as error:
        for problem in error.problems:
            click.echo(str(problem), err=True)
        _say(f"{len(error.problems)} problems; nothing was written")
        sys.exit(REFUSED)
    except TapeError as error:
        _say(str(error))
        sys.exit(_exit_code(error))
    except OSError as error:
        if sys.stdout is not None:  # what it still holds cannot be written, and Python would say so once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        name = f"{printable(error.filename)}: " if error.filename else ""
        _say(f"{name}{os.strerror(error.errno or errno.EIO)}")
        sys.exit(DRIFT)
    sys.exit(0)
