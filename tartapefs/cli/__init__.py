"""The command line: parses, builds, calls, prints, and maps the outcome to an exit code.

Rule: data goes to stdout, messages to stderr; names are always escaped; no traceback for anything a user can cause.
Exit codes: 0 done; 1 drift, or a failed check or read; 2 wrong usage; 3 no tape, or not a tape; 4 refused at recording;
5 could not mount or unmount; 130 interrupted.
"""

import errno
import logging
import os
import signal
import sys
from functools import cache
from importlib import import_module
from typing import NoReturn

import click

from tartapefs import __version__
from tartapefs.base import signals
from tartapefs.base.errors import (
    CopyError,
    MountError,
    OutputBusyError,
    SourceBusyError,
    SourceUnreadableError,
    TapeBusyError,
    TapeConstraintError,
    TapeError,
    TapeExistsError,
    TapeFormatError,
    TapeIntegrityError,
    TapeNotFoundError,
    TapeSealedError,
    UnexpectedTapeError,
    UploadError,
)
from tartapefs.base.text import counted, on_one_line, printable
from tartapefs.cli import terminal
from tartapefs.cli.common import (
    DRIFT,
    INTERRUPTED,
    NO_MOUNT,
    NO_TAPE,
    REFUSED,
    USAGE,
    log_to_stderr,
    message_options,
    say,
)
from tartapefs.cli.examples import examples

# The commands by the groups of `tartapefs --help`, each with its module and its summary there. A new one needs a line
# here, a function of its name in that module, with `_` for `-`, and examples (`cli.examples`).
_GROUPS = {
    "Record": {
        "record": ("record", "Record DIR, and print the fingerprint of its archive."),
        "info": ("tapes", "Show the facts of the tape of DIR: size, seal and so on."),
        "ls": ("tapes", "List the members of the archive of DIR."),
        "locate": ("tapes", "Show what lies at OFFSET, or where MEMBER lies."),
        "seal": ("seals", "Add digests of all contents to the tape of DIR."),
        "diff": ("diff", "List the changes between two recordings."),
    },
    "Mount": {
        "mount": ("mounts", "Mount the archive of DIR at MNT."),
        "status": ("status", "Show the state of one mounted archive, or of all."),
        "unmount": ("mounts", "Unmount the archive at MNT."),
    },
    "Copy": {
        "play": ("play", "Write the archive of DIR to stdout or a file."),
        "upload": ("upload", "Send the archive of DIR to URL, in parts."),
        "resume": ("copies", "Complete COPY, a local file."),
        "resume-hint": ("resume_hint", "Print commands that continue a transfer."),
        "extract": ("extract", "Extract members from COPY, and check their digests."),
        "export-index": ("export_index", "Write an index of the archive for ratarmount."),
    },
    "Verify": {
        "verify": ("verify", "Compare DIR with its recording, and list all drift."),
        "check": ("copies", "Show how far COPY agrees with the archive of DIR."),
        "digest": ("digest", "Print digests of the archive of DIR."),
        "verify-extracted": ("seals", "Compare an extracted folder with the tape of DIR."),
    },
    "System": {
        "doctor": ("doctor", "Check whether this machine can mount archives."),
        "systemd-unit": ("systemd", "Print a systemd unit that mounts the archive."),
        "completion": ("completion", "Print the completion script for SHELL."),
    },
}
COMMANDS = {name: command for group in _GROUPS.values() for name, command in group.items()}
_ALIASES = {"umount": "unmount"}


@cache
def _imported(name: str) -> click.Command:
    module = import_module(f"tartapefs.cli.{COMMANDS[name][0]}")
    command: click.Command = message_options(getattr(module, name.replace("-", "_")))
    command.epilog = examples(name)
    return command


class _Program(click.Group):
    """Imports a command when it is called: importing them all takes longer than most of them do."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] == "help":
            args = [*args[1:2], "--help"]
            if len(args) == 1:
                click.echo(ctx.get_help())
                ctx.exit()
        args[0] = _ALIASES.get(args[0], args[0])
        name, _, rest = super().resolve_command(ctx, args)
        signals.end_at_once()  # until it is imported
        command = None if name is None else _imported(name)
        signals.handle(_end_on_signal)
        return name, command, rest

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(map(len, COMMANDS))
        for title, commands in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(widest), summary) for name, (_, summary) in commands.items()])


@click.group(
    cls=_Program,
    commands=[click.Command(name, short_help=summary) for name, (_, summary) in COMMANDS.items()],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='"tartapefs help COMMAND" has the options of a command, and examples.\n\n'
    "Exit codes: 0 done; 1 drift, or a failed check or read; 2 wrong usage; 3 no tape, or not a tape;"
    " 4 refused at recording; 5 could not mount or unmount; 130 interrupted.",
)
@click.version_option(__version__, "-V", "--version", prog_name="tartapefs")
@message_options
def cli() -> None:
    """Show a folder as one read-only tar archive that needs no disk space.

    Record a folder once, then mount it: archive.tar has a known size, can be read at any offset, and is checked against
    the recording on every read.

    The recording of DIR is its tape, DIR/.tartape/index.db. Members are the files, folders and links in the archive.
    Drift is any difference between DIR and its tape. COPY is a copy of the archive; MNT is an empty folder.
    """


def _exit_code(error: TapeError) -> int:
    match error:
        case TapeNotFoundError() | TapeFormatError():
            return NO_TAPE
        case TapeExistsError() | TapeBusyError() | TapeSealedError():
            return REFUSED
        case TapeConstraintError() | SourceUnreadableError() | SourceBusyError():
            return REFUSED
        case MountError():
            return NO_MOUNT
        case TapeIntegrityError() | UnexpectedTapeError() | OutputBusyError() | UploadError() | CopyError():
            return DRIFT
        case _:
            return USAGE


def _end_on_signal(number: int, frame: object) -> NoReturn:
    if number == signal.SIGINT:
        terminal.erase_echo(sys.stderr)
        raise KeyboardInterrupt
    raise SystemExit(128 + number)  # an exception, so that a recording cleans up


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Tells of an exception in a generator or object that is thrown away, unless a second signal came then."""
    if not isinstance(found.exc_value, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(found)


def main() -> NoReturn:
    """The program `tartapefs`."""
    if _is_run_by_mount(sys.argv[1:]):
        mount_tartapefs()
    _run(cli, "tartapefs")


def mount_tartapefs() -> NoReturn:
    """The program `mount.tartapefs`, which mount(8) runs."""
    from tartapefs.cli import mount8

    try:
        _run(mount8.command, "mount.tartapefs")
    except SystemExit as end:
        sys.exit(mount8.exit_code(end.code))


def _is_run_by_mount(argv: list[str]) -> bool:
    """Whether mount.fuse3 runs `tartapefs`: without a command, and with `-o` behind two paths."""
    return len(argv) > 2 and argv[2] == "-o" and argv[0] not in COMMANDS


def _run(command: click.Command, name: str) -> NoReturn:
    """Runs a command line, and exits with its code."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # when a pipe's reader ends, clean up first
    while (
        descriptor := os.open(os.devnull, os.O_RDWR)
    ) < 3:  # reopens those of the standard three that the caller closed
        pass
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for names that the locale cannot encode
    log_to_stderr()
    sys.unraisablehook = _unraisable
    try:
        try:
            signals.handle(_end_on_signal)
            code = _code_of(command, name)
        finally:
            signals.end_at_once()
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        code = INTERRUPTED
    sys.exit(code)


def _code_of(command: click.Command, name: str) -> int:
    """Runs a command line, reports any error, and returns the exit code."""
    try:
        if f"_{name.upper()}_COMPLETE" in os.environ:
            command.main(prog_name=name)  # answers the shell, and exits
        # Otherwise not by `main`, which handles a broken pipe itself.
        with command.make_context(name, sys.argv[1:]) as context:
            command.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where errors are caught
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.message = "\n".join(map(on_one_line, error.message.split("\n")))  # type: ignore[misc]
        error.show()
        return USAGE
    except (TapeConstraintError, SourceUnreadableError, SourceBusyError) as error:
        for problem in error.problems:
            click.echo(str(problem), err=True)
        remedy = '; "--skip-busy" leaves such files out' if isinstance(error, SourceBusyError) else ""
        say(f"{counted(len(error.problems), 'problem')}; nothing was written{remedy}", logging.ERROR)
        for note in getattr(error, "__notes__", ()):
            say(note)
        return REFUSED
    except TapeError as error:
        say(str(error), logging.ERROR)
        return _exit_code(error)
    except BrokenPipeError:  # quietly: the reader of the pipe has ended
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _drop_output()
        name = f"{printable(error.filename)}: " if error.filename else ""
        say(f"{name}{error.strerror or os.strerror(error.errno or errno.EIO)}", logging.ERROR)
        return DRIFT
    except MemoryError:
        say("there is not enough memory", logging.ERROR)
        return DRIFT
    except RuntimeError as error:
        if error.args != ("can't start new thread",):  # Python's own message, from a thread pool
            raise
        say("no thread can be started, for a limit on processes or memory", logging.ERROR)
        return DRIFT
    return 0


def _drop_output() -> None:
    """Drops buffered standard output: it cannot be written, and Python would report that again."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
