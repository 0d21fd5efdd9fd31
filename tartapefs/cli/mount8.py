"""Mounting by mount(8): its option strings, and the program that it runs.

mount(8) runs `mount.tartapefs SRC MNT [-sfnv] [-o OPTIONS]` for the type tartapefs, and through mount.fuse3
`tartapefs SRC MNT -o OPTIONS` for fuse.tartapefs. Rule: the options are those of `tartapefs mount`, with `_` for `-`
(`allow_other`), except those that record: a folder that is mounted at boot has been recorded before. Options that
mount(8), fstab and systemd have for every file system are accepted without effect, since an archive is always mounted
read-only, nosuid, nodev and noexec; a user who asks for `rw`, as `defaults` does, gets a warning. Any other option is
refused by name. The exit codes are those of mount(8).
"""

import logging
import re
import shlex
from collections.abc import Iterator

import click

from tartapefs.api.tape import Tape
from tartapefs.base import commands
from tartapefs.base.text import on_one_line, printable
from tartapefs.cli import common
from tartapefs.cli.common import fail, message_options, path, say
from tartapefs.cli.mounts import mount

_INVOCATION, _INTERRUPT, _MOUNT_FAILURE = 1, 8, 32  # mount(8), EXIT STATUS
_WITHOUT_EFFECT = re.compile(
    "(no)?(atime|auto|dev|diratime|exec|group|iversion|lazytime|mand|owner|relatime|strictatime|suid|symfollow|users?)"
    "|_netdev|async|comment|default_permissions|defaults|dirsync|helper|loud|nofail|silent|sync|uhelper|[xX]-.*",
    re.DOTALL,
)
_OPTIONS = (
    "name",
    "part_size",
    "shard_size",
    "mode",
    "uid",
    "gid",
    "index",
    "source_check",
    "allow_additions",
    "strict",
    "expect",
    "allow_other",
    "direct",
    "audit_interval",
    "audit_share",
    "scrub_share",
    "on_drift",
    "on_drift_run",
    "log",
)


def _known() -> dict[str, click.Option]:
    """The options of `tartapefs mount` that mount(8) can use, by their names in an option string."""
    options = [option for option in mount.params if isinstance(option, click.Option)]
    named = {option.opts[-1].removeprefix("--").replace("-", "_"): option for option in options}
    return {name: option for name, option in named.items() if name in _OPTIONS}


def _split(options: str) -> list[str]:
    """Splits an option string. A comma in a value needs a backslash before it, or double quotes around the value."""
    lexer = shlex.shlex(options, posix=True)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters, lexer.quotes = ",", True, "", '"'
    try:
        return list(lexer)
    except ValueError as error:
        raise click.UsageError(f"the options {options}: {error}") from None


def arguments(options: str, sloppy: bool = False) -> Iterator[str]:
    """Translates an option string to arguments of `tartapefs mount`; `sloppy` skips unknown options.

    Raises click.UsageError.
    """
    known = _known()
    for item in _split(options):
        name, equals, value = item.partition("=")
        option = known.get(name)
        if option is not None:
            if option.is_flag == bool(equals):
                raise click.UsageError(f"the option {name} {'has no' if equals else 'needs a'} value")
            yield option.opts[-1] + equals + value
        elif name not in ("ro", "rw") and not _WITHOUT_EFFECT.fullmatch(name) and not sloppy:
            raise click.UsageError(f"unknown option: {name}")


def asks_to_write(options: str) -> bool:
    """Whether the last of `ro` and `rw` in this option string is `rw`. Raises click.UsageError."""
    requested = [name for item in _split(options) if (name := item.partition("=")[0]) in ("ro", "rw")]
    return requested[-1:] == ["rw"]


def exit_code(code: object) -> int:
    """Translates an exit code of tartapefs to the one that mount(8) uses."""
    match code:
        case 0 | None:
            return 0
        case common.USAGE:
            return _INVOCATION
        case common.INTERRUPTED:
            return _INTERRUPT
        case _:
            return _MOUNT_FAILURE


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes, those of mount(8): 0 mounted; 1 wrong options; 8 interrupted; 32 it could not be mounted.",
)
@click.argument("directory", metavar="SRC", type=path)
@click.argument("mountpoint", metavar="MNT", type=path)
@click.option("-o", "options", metavar="OPTIONS", multiple=True, help="Options, with commas between them.")
@click.option("-s", "sloppy", is_flag=True, help="Skip unknown options.")
@click.option("-f", "fake", is_flag=True, help="Check the options and the tape, but do not mount.")
@click.option("-n", "no_mtab", is_flag=True, help="No effect: nothing is written to /etc/mtab.")
@message_options
@click.option("-t", "kind", metavar="TYPE", help="No effect: there is one type.")
def command(
    directory: str,
    mountpoint: str,
    options: tuple[str, ...],
    sloppy: bool,
    fake: bool,
    no_mtab: bool,
    kind: str | None,
) -> None:
    """Mount the archive of SRC at MNT for mount(8); return once it can be read.

    The options are those of "tartapefs mount", except those for recording, with _ for -: name=, part_size=,
    shard_size=, mode=, uid=, gid=, index=, source_check=, allow_additions, strict, expect=, allow_other, direct,
    audit_interval=, audit_share=, scrub_share=, on_drift=, on_drift_run=, log=. SRC must have been recorded.

    mount(8) asks for rw unless it is told ro. The archive is mounted read-only anyway, with a warning.
    """
    try:
        requested = ",".join(options)
        mount_arguments = [*arguments(requested, sloppy), "--", directory, mountpoint]
        with mount.make_context("mount.tartapefs", mount_arguments) as context:
            if fake:
                commands.given(directory, context.params["index"])
                Tape.discover(directory, context.params["index"]).close()
            else:
                mount.invoke(context)
                if asks_to_write(requested):  # in the words of mount(8)
                    say(f"{printable(mountpoint)}: WARNING: source write-protected, mounted read-only", logging.WARNING)
    except click.UsageError as error:
        fail(on_one_line(error.format_message()), common.USAGE)
