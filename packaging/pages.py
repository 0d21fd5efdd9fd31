"""Writes the manual pages and the shells' completions, from the same text as --help: `python pages.py FOLDER`.

They lie below FOLDER where they belong below /usr or a virtual environment: share/man/man1/tartapefs.1, and so on.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from tartapefs import __version__
from tartapefs.cli import cli, mount8
from tartapefs.cli.completion import SHELLS, script

COMPLETIONS = {
    "bash": "share/bash-completion/completions/tartapefs",
    "zsh": "share/zsh/site-functions/_tartapefs",
    "fish": "share/fish/vendor_completions.d/tartapefs.fish",
}


def escaped(text: str) -> str:
    """Text that roff(7) shows as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        yield escaped(" ".join(paragraph.split()))


def options(context: click.Context) -> Iterator[str]:
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            yield f".TP\n.B {escaped(record[0])}\n{escaped(record[1])}"


def examples(command: click.Command) -> Iterator[str]:
    _, *lines = (command.epilog or "").removeprefix("\b\n").splitlines()
    yield ".PP\nExamples:"
    yield ".nf"
    yield from map(escaped, lines)
    yield ".fi"


def usage(context: click.Context) -> str:
    return " ".join([context.command_path, *context.command.collect_usage_pieces(context)])


def page(command: click.Command, name: str, section: int) -> str:
    """The manual page of a program; that of a group has its commands as sections."""
    context = click.Context(command, info_name=name, **command.context_settings)
    summary, _, _ = (command.help or "").strip().partition("\n")
    kind = {1: "User Commands", 8: "System Administration"}[section]
    lines = [
        f'.TH {name.upper()} {section} "" "tartapefs {__version__}" "{kind}"',
        f".SH NAME\n{escaped(name)} \\- {escaped(summary.rstrip('.'))}",
        f".SH SYNOPSIS\n.B {escaped(usage(context))}",
        ".SH DESCRIPTION",
        *paragraphs(command.help or ""),
        ".SH OPTIONS",
        *options(context),
    ]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for sub_name in command.list_commands(context):
            _, sub_command, _ = command.resolve_command(context, [sub_name])  # imports it
            sub_context = click.Context(sub_command, context, sub_name, **sub_command.context_settings)
            lines += [
                f'.SS "{escaped(usage(sub_context))}"',
                *paragraphs(sub_command.help or ""),
                *options(sub_context),
                *examples(sub_command),
            ]
    if command.epilog:
        lines += [".SH EXIT STATUS", *paragraphs(command.epilog)]
    return "\n".join(lines) + "\n"


def write(folder: Path) -> list[str]:
    """Writes them all; their paths below `folder`."""
    texts = {
        "share/man/man1/tartapefs.1": page(cli, "tartapefs", 1),
        "share/man/man8/mount.tartapefs.8": page(mount8.command, "mount.tartapefs", 8),
    } | {COMPLETIONS[shell]: script(cli, shell) for shell in SHELLS}
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return list(texts)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
