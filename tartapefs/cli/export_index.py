"""The command that writes an index of the archive for another program: export-index."""

import os

import click

from tartapefs.api.tape import Tape
from tartapefs.base import outputs
from tartapefs.base.text import counted, printable, size_text
from tartapefs.cli.common import (
    check_expected,
    expect_option,
    folder_argument,
    index_option,
    path,
    refuse_part,
    say,
)
from tartapefs.cli.progress import progress
from tartapefs.index import ratarmount


@click.command()
@folder_argument
@index_option
@click.option(
    "--ratarmount",
    "output",
    metavar="OUT",
    type=path,
    required=True,
    help="Write the index that ratarmount would make, to this new file.",
)
@expect_option
@click.option("--force", is_flag=True, help="Replace an existing OUT, once the new one is complete.")
def export_index(directory: str, index: str | None, output: str, expect: str | None, force: bool) -> None:
    """Write an index of the archive of DIR for another program.

    With it ratarmount mounts a copy of the archive, a local or a remote one, without reading it first. Beside a local
    copy, under its name and ".index.sqlite", it finds it by itself. DIR itself is not read and, with --index, need not
    exist.
    """
    if output == "-":
        raise click.BadParameter("SQLite writes a file, not a stream", param_hint="--ratarmount")
    with Tape.discover(directory, index) as tape:
        check_expected(tape, expect, complete=True)
        refuse_part(output, tape, None, directory)
        exists = outputs.refuse_existing(output, force) is not None
        with (
            outputs.Unfinished(output) as unfinished,
            progress("exporting", tape.member_count, tape=tape) as update,
        ):
            ratarmount.write(tape, unfinished, update)
            size = os.fstat(unfinished.fd).st_size
            unfinished.commit(replace=exists)
        say(f"wrote {printable(output)}: {counted(tape.member_count, 'member')}, {size_text(size)}")
