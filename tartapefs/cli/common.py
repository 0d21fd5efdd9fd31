"""Shared by the commands: exit codes, messages, types of options, common options."""

import functools
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import CompletionItem

from tartapefs.base import commands, naming, tape_files
from tartapefs.base import text as base_text
from tartapefs.base.commands import command, quoted
from tartapefs.base.errors import TapeFormatError
from tartapefs.base.text import printable
from tartapefs.cli import terminal
from tartapefs.mount import sd_notify
from tartapefs.transfer.s3_limits import MOST_PARTS

if TYPE_CHECKING:  # `tartapefs --help` needs none of them
    from tartapefs.api.tape import Tape
    from tartapefs.play.engine import TapePlayer
    from tartapefs.source.folder import Source

DRIFT, USAGE, NO_TAPE, REFUSED, NO_MOUNT, INTERRUPTED = 1, 2, 3, 4, 5, 130

_TAKEN_AS_THEY_ARE = "long_names", "hard_links", "one_file_system", "skip_unreadable", "skip_busy"


def say(message: str, level: int = logging.INFO) -> None:
    """Prints a message on standard error; in the journal with this level, one of logging's."""
    if is_quiet() and level < logging.ERROR:
        return
    terminal.make_way(sys.stderr)
    click.echo(sd_notify.with_level(message, level) if sd_notify.to_journal() else f"tartapefs: {message}", err=True)


def show(line: str, flush: bool = True) -> None:
    """Prints a line of data while there is progress."""
    terminal.make_way(sys.stdout)
    print(line, flush=flush)


def _make_way(record: logging.LogRecord) -> bool:
    terminal.make_way(sys.stderr)
    return True


def log_to_stderr() -> None:
    """Sends the log to where `say` prints."""
    logging.basicConfig(format="tartapefs: %(message)s")
    logging.getLogger().handlers[0].addFilter(_make_way)
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # it logs what it raises, too
    if sd_notify.to_journal():
        logging.getLogger().handlers[0].setFormatter(sd_notify.JournalFormatter())


def byte_count(text: str) -> int:
    """Parses a file size as `text.byte_count` does."""
    try:
        return base_text.byte_count(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def key_value(text: str) -> tuple[str, Any]:
    """Parses KEY=VALUE; the value is JSON if it can be read as such, else a string."""
    key, is_given, value = text.partition("=")
    if not key or not is_given:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE, such as region_name=eu-north-1")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


class Number(click.FloatRange):
    """The type of a number in this range; refuses nan."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class _Word(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """The type of a string that is not empty."""

    name = "value"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail(f"the {self.name} is empty", param, ctx)
        return value


class _Path(_Word):
    """The type of a path, not empty; whether it exists is for the command to check."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, "file")]  # the shell completes it


word = _Word()
path = _Path()


def name_template(text: str) -> str:
    """Checks a file name that may contain `{fingerprint}`, `{seal}` and `{root}`; refuses one that no tape can have."""
    try:
        naming.file_name(text, "0" * 64, "0" * 64, "root")
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return text


def expand_name(tape: "Tape", template: str, option: str) -> str:
    """Fills the placeholders in the file name of `template`, the value of `option`. Raises click.BadParameter."""
    folder, name = os.path.split(template)
    try:
        return os.path.join(folder, tape.file_name(name))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def octal_mode(text: str) -> int:
    """Parses permission bits in octal."""
    if not re.fullmatch(r"0*[0-7]{1,3}", text, re.ASCII):
        raise click.BadParameter(f"{text!r} is not a mode in octal, such as 0440")
    return int(text, 8)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def folder_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Takes DIR. The commands that messages name have it, and --index, from the call on."""

    @functools.wraps(function)
    def called(**parameters: Any) -> Any:
        commands.given(parameters["directory"], parameters.get("index"))
        return function(**parameters)

    return click.argument("directory", metavar="DIR", type=path)(called)


def index_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--index", metavar="PATH", type=path, help="The index, if not DIR/.tartape/index.db.")(function)


def check_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--source-check",
        "check",
        type=click.Choice(("full", "mtime")),
        default="full",
        show_default=True,
        help="What to compare of the source: all facts, or all but inode and change time.",
    )(function)


def strict_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--strict",
        is_flag=True,
        help="For a tape with digests: report a file also if only its timestamps or inode changed.",
    )(function)


def additions_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--allow-additions",
        is_flag=True,
        help="Accept files that were added since the recording; they are not in the archive.",
    )(function)


def expect_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--expect",
        metavar="FINGERPRINT",
        help="The seal that the tape must have, or the fingerprint, which does not cover contents.",
    )(function)


def check_expected(tape: "Tape", value: str | None, complete: bool = False) -> None:
    """Checks that the tape has this seal or fingerprint, and reports which; `complete`: computes it of all headers."""
    if value is None:
        return
    value = value.strip().lower()
    if tape.expect(value) == "seal":
        say("the seal is the expected one: it covers contents")
        return
    if complete and not tape.has_fingerprint():
        raise TapeFormatError(tape.index_path, "its headers have another fingerprint than it says")
    say("the fingerprint is the expected one: it covers names, sizes, modes and times, but no contents")


def late_note(types: list[str]) -> str:
    """One line on the consequence of a source on these types of file systems."""
    return f"{', '.join(types)}: a change there may be seen late; a sealed tape is beyond that"


def warn_of_late_changes(source: "Source", one_file_system: bool) -> None:
    if types := source.foreign_types(one_file_system):
        say(f'{printable(source.root)} is on {late_note(types)} ("{command("seal")}")')


def say_if_too_many_parts(size: int, count: int) -> None:
    if count > MOST_PARTS:
        say(f"parts of {size} bytes are {count:,}; S3 takes {MOST_PARTS:,}")


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Report as JSON.")(function)


def _set_level(context: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given:
        logging.getLogger().setLevel(logging.INFO if parameter.name == "verbose" else logging.ERROR)


def is_quiet() -> bool:
    """Whether the user wants errors only, neither messages nor progress."""
    return logging.getLogger().level == logging.ERROR


def message_options(command: Callable[..., Any]) -> Any:
    """Adds --verbose and --quiet, to the program and to each command: users may write them anywhere."""
    for short, long, text in (("-q", "--quiet", "Print errors only."), ("-v", "--verbose", "Say more on stderr.")):
        option = click.option(short, long, is_flag=True, expose_value=False, callback=_set_level, help=text)
        command = option(command)
    return command


def patterns_of(name: str) -> list[str]:
    """The patterns in this file, or in standard input for `-`: one a line, as in .gitignore."""
    try:
        with click.open_file(name, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise click.BadParameter(f"{printable(name)}: {error.strerror or error}") from None
    return [os.fsdecode(line) for line in lines if line.strip() and not line.startswith(b"#")]


def recording_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the options of a new recording as one argument, `recording`: keywords of `TapeRecorder`."""

    @functools.wraps(function)
    def collected(
        *, exclude: tuple[str, ...], exclude_from: tuple[list[str], ...], keep_owners: bool | None, **others: Any
    ) -> Any:
        recording = {name: others.pop(name) for name in _TAKEN_AS_THEY_ARE} | {
            "exclude": (*itertools.chain.from_iterable(exclude_from), *exclude) or None,
            "anonymize": None if keep_owners is None else not keep_owners,
        }
        return function(recording=recording, **others)

    decorated: Callable[..., Any] = collected
    for option in (
        click.option(
            "--exclude", metavar="PATTERN", multiple=True, help="Leave out files, as .gitignore would. Repeatable."
        ),
        click.option(
            "--exclude-from",
            metavar="FILE",
            multiple=True,
            type=patterns_of,
            help="Leave out what the patterns in FILE say, one a line; those of --exclude come after them.",
        ),
        click.option(
            "--keep-owners/--no-keep-owners",
            default=None,
            help="Write real owners into the archive instead of root.",
        ),
        click.option(
            "--long-names/--no-long-names",
            default=None,
            help="Record names and link targets that do not fit into ustar, as GNU tar does.",
        ),
        click.option(
            "--hard-links/--no-hard-links",
            default=None,
            help="Record further names of a file as hard links, not as full copies.",
        ),
        click.option(
            "-x",
            "--one-file-system/--no-one-file-system",
            default=None,
            help="Leave out what is mounted below the folder, all but the mount points.",
        ),
        click.option(
            "--skip-unreadable", is_flag=True, help="Leave out files that this user cannot read, and list them."
        ),
        click.option("--skip-busy", is_flag=True, help="Leave out files that a program is writing, and list them."),
    ):
        decorated = option(decorated)
    return decorated


def refuse_part(output: str, tape: "Tape", player: "TapePlayer | None", directory: str) -> None:
    """Refuses an output that would overwrite or change the folder that is being played, or a tape."""
    from tartapefs.play.audit import files_of
    from tartapefs.source.folder import Source

    with ExitStack() as opened:
        if player is not None:
            files = files_of(tape, player.source, player.at_home)
        else:
            try:
                source = opened.enter_context(Source(directory))
            except OSError:  # only the index is here
                files = tape_files.TapeFiles(directory, tape.index_path)
            else:
                files = files_of(tape, source, tape.is_at_home(source.ino))
        tape_files.refuse_part(output, files)


def again(*options: str, without: str | None = None) -> str:
    """The command line as the user gave it, in quotes, to be run once more, with these options and `without` one."""
    words = [word for word in sys.argv[1:] if word != without]
    if any(word.startswith("--option") or ("://" in word and "?" in word) for word in words):  # what may be secret
        return "the same command"
    end = words.index("--") if "--" in words else len(words)
    return f'"{" ".join(["tartapefs", *map(quoted, (*words[:end], *options, *words[end:]))])}"'


def progress_note(state: str | None, suggested: str | None) -> str:
    """How to go on after an interruption: from this state, or with a `suggested` one from the next time on."""
    if state is not None:
        return f"progress is saved: {again()} goes on from there"
    return "nothing is saved" + (f": {again('--state', suggested)} could go on" if suggested else "")


@contextmanager
def interruptible(remedy: str) -> Iterator[None]:
    """Says what to do next if the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        say(remedy)
        raise
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:  # by a signal
            say(remedy)
        raise


def fail(message: str, code: int) -> NoReturn:
    say(message, logging.ERROR)
    raise SystemExit(code)
