"""The commands on copies of an archive: check, resume."""

import errno
import os
import sys
from contextlib import ExitStack
from typing import Any

import click

from tartapefs.api.tape import Tape
from tartapefs.base.commands import as_path, command
from tartapefs.base.errors import TapeIntegrityError
from tartapefs.base.text import printable
from tartapefs.cli.common import (
    DRIFT,
    additions_option,
    again,
    check_expected,
    check_option,
    expect_option,
    fail,
    folder_argument,
    index_option,
    interruptible,
    json_option,
    path,
    print_json,
    refuse_part,
    say,
)
from tartapefs.cli.progress import progress
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.transfer.copies import Agreement, Copy, compare, sample


def _examine(tape: Tape, player: TapePlayer | None, copy: Copy, full: bool, start: int = 0) -> Agreement:
    size = tape.total_size if copy.is_stream else min(copy.size, tape.total_size)
    with progress("checking", size - start, True, tape) as update:

        def on_progress(position: int, done: int) -> None:
            update(done, position)

        if player is not None and (full or copy.is_stream):
            return compare(player, copy, start, on_progress=on_progress)
        return sample(tape, player, copy, start, on_progress)


def _facts(tape: Tape, found: Agreement) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "complete": found.is_complete,
        "size": found.size,
        "total_size": found.total_size,
        "good": found.good,
        "member": None,
        "segment": None,
        "position": None,
        "wrong": found.wrong,
        "zeros": [list(zeros) for zeros in found.zeros],
        "beyond": found.beyond,
        "exact": found.exact,
        "compared": found.compared,
    }
    if len(tape.generations) > 1:
        facts["generation"] = found.generation
    if found.good < found.total_size:
        member, segment = tape.member_at(found.good), tape.segment_at(found.good)
        facts["member"] = member.arc_path if member is not None else None
        facts |= {"segment": segment.kind.value, "position": found.good - segment.start}
    return facts


def _print_agreement(facts: dict[str, Any]) -> None:
    def line(key: str, text: str) -> None:
        click.echo(f"{key:14}{text}")

    line("complete", "yes" if facts["complete"] else "no")
    line("size", f"{facts['size']} of {facts['total_size']}")
    line("good", f"{facts['good']}")
    if facts.get("generation") is not None:
        line("generation", f"{facts['generation']}: the copy was complete then, and lacks only what was added since")
    if facts["segment"] is not None:
        of = printable(facts["member"]) if facts["member"] is not None else "the archive"
        line("ends in", f"the {facts['segment']} of {of}, at its byte {facts['position']}")
    line("first wrong", "none seen" if facts["wrong"] is None else f"{facts['wrong']}")
    for start, stop in facts["zeros"]:
        line("zeros", f"[{start}, {stop})")
    if facts["beyond"]:
        line("beyond", f"{facts['beyond']} bytes after the archive's end")
    line("compared", "every byte" if facts["exact"] else f"{facts['compared']} bytes, in places (--full: all)")


def _refuse_other_files(copy: str, found: Agreement, tape: Tape) -> None:
    if not found.is_copy_of(tape):
        fail(f"{printable(copy)}: does not begin as this archive does; remove it, or name another file", DRIFT)


@click.command()
@folder_argument
@click.argument("copy", metavar="COPY", type=path)
@index_option
@check_option
@additions_option
@expect_option
@click.option("--full", is_flag=True, help="Compare every byte, not only samples.")
@click.option("--no-source", is_flag=True, help="Compare headers and footer only: needs the index, not DIR.")
@click.option("--truncate", is_flag=True, help="Cut COPY to its good prefix, after asking.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def check(
    directory: str,
    copy: str,
    index: str | None,
    check: Check,
    allow_additions: bool,
    expect: str | None,
    full: bool,
    no_source: bool,
    truncate: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Show how far COPY agrees with the archive of DIR.

    COPY is a file, or - for a stream. The exit code is 0 if it is complete and equal, else 1. "good" is the offset, in
    bytes, to continue from. Without --full it compares every header, a sample of each 64 MiB of a body, the file's
    holes, and all of the last 64 MiB. A stream is compared whole, and read up to 64 MiB beyond the archive's end.
    """
    if truncate and copy == "-":
        raise click.UsageError('"--truncate" needs a file, not a stream')
    if truncate and not yes and not sys.stdin.isatty():
        raise click.UsageError('there is no terminal to ask at; "--truncate" needs "--yes"')
    if no_source and (full or copy == "-"):
        raise click.UsageError('"--full", and a stream, need the source; leave out "--no-source"')
    if copy == "-" and sys.stdin is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard input")
    with Tape.discover(directory, index) as tape, ExitStack() as opened:
        check_expected(tape, expect, complete=True)
        player = None if no_source else TapePlayer(tape, directory, check, allow_additions=allow_additions)
        if truncate:
            refuse_part(copy, tape, player, directory)
        file = opened.enter_context(Copy(sys.stdin.fileno() if copy == "-" else copy, writable=truncate))
        if no_source and file.is_stream:
            raise click.UsageError("only a file can be checked without the source")
        try:
            found = _examine(tape, player, file, full)
        except TapeIntegrityError:  # the recording still tells something of the copy
            if player is not None and not file.is_stream:
                alone = _examine(tape, None, file, False)
                say(
                    f"{printable(copy)}: its headers and footer are as recorded up to byte {alone.good:,} of"
                    f' {alone.total_size:,}; its contents cannot be compared any more (as with "--no-source")'
                )
            raise
        facts = _facts(tape, found)
        if as_json:
            print_json(facts)
        else:
            _print_agreement(facts)
        if truncate and found.good < found.size:
            _refuse_other_files(copy, found, tape)
            question = f"Cut {printable(copy)} from {found.size} to {found.good} bytes?"
            if yes or click.confirm(question, err=True):
                file.truncate(found.good)
                say(f"{printable(copy)} has {found.good} bytes now")
                if found.good == found.total_size:
                    return
        if not found.is_complete:
            if player is not None and not file.is_stream and found.is_copy_of(tape):
                say(f'"{command("resume", as_path(copy))}" completes the copy')
            raise SystemExit(DRIFT)


@click.command()
@folder_argument
@click.argument("copy", metavar="COPY", type=path)
@index_option
@check_option
@additions_option
@click.option("--full", is_flag=True, help="Compare every byte, before and after, not only samples.")
@json_option
def resume(
    directory: str, copy: str, index: str | None, check: Check, allow_additions: bool, full: bool, as_json: bool
) -> None:
    """Complete COPY, a local file.

    Checks it, cuts what is wrong, appends what is missing, and checks that. You can interrupt it at any time, in any
    way, and run it again. It creates COPY if it does not exist.
    """
    with Tape.discover(directory, index) as tape:
        player = TapePlayer(tape, directory, check, allow_additions=allow_additions)
        refuse_part(copy, tape, player, directory)
        with Copy(copy, writable=True, create=True) as file:
            found = _examine(tape, player, file, full)
            _refuse_other_files(copy, found, tape)
            if found.good < found.size:
                if found.generation is not None:
                    say(
                        f"{printable(copy)}: complete up to generation {found.generation} of {len(tape.generations)};"
                        f" its footer is cut, and what was added since is written"
                    )
                else:
                    say(f"{printable(copy)}: cut from {found.size:,} to {found.good:,} bytes")
                file.truncate(found.good)
            missing = tape.total_size - found.good
            with (
                interruptible(f"what was written stays: {again()} goes on from there"),
                progress("writing", missing, True, tape) as update,
            ):
                file.extend(player, lambda position, done: update(done, position))
            written = _examine(tape, player, file, full, found.good)
        if as_json:
            print_json({"resumed_from": found.good} | _facts(tape, written))
        if not written.is_complete:
            fail(f"{printable(copy)}: what was written reads back wrong from byte {written.good:,} on", DRIFT)
        say(f"{printable(copy)}: complete; {tape.total_size:,} bytes, {missing:,} of them new")
