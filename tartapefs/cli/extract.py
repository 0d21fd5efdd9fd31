"""The command that restores members out of a copy: extract."""

import json
import logging
import re
from collections import Counter
from contextlib import closing
from typing import Any

import click

from tartapefs.api.tape import Tape
from tartapefs.archive.layout import FOOTER
from tartapefs.base.commands import command
from tartapefs.base.text import counted, printable, size_text
from tartapefs.cli.common import (
    DRIFT,
    again,
    byte_count,
    check_expected,
    expect_option,
    fail,
    folder_argument,
    index_option,
    key_value,
    path,
    say,
    show,
)
from tartapefs.cli.progress import progress
from tartapefs.verify.ranged_requests import CopyReader, LocalCopy
from tartapefs.verify.restore import Restored, Restorer
from tartapefs.verify.selection import select

_THREADS = 4  # of a URL


def _is_url(copy: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[^/]+)?://", copy) is not None


def _opened(copy: str, options: tuple[tuple[str, Any], ...], threads: int, pinned: bool) -> CopyReader:
    if _is_url(copy):
        from tartapefs.transfer.remote_copy import open_url

        return open_url(copy, dict(options), threads, pinned)
    if options:
        raise click.UsageError('"--option" is for a URL')
    return LocalCopy(copy)


def _check_digests(tape: Tape, no_digests: bool) -> None:
    if tape.seal:
        return
    if not no_digests:
        remedy = f'run "{command("seal")}" first, or give "--no-digests", and only headers are checked'
        raise click.UsageError(f"{printable(tape.index_path)} has no digests; {remedy}")
    say("the tape has no digests: names, sizes and times are checked, contents are not")


def _check_size(tape: Tape, copy: str, reader: CopyReader) -> None:
    """Reports a copy that is not of this archive's size, nor of that before an append; without digests, refuses it."""
    if reader.size in (tape.total_size, *(generation.stop + FOOTER for generation in tape.generations)):
        return
    message = (
        f"{printable(copy)} has {reader.size:,} bytes, the archive {tape.total_size:,}:"
        f" it is of another one, or not complete"
    )
    if not tape.seal:
        fail(f'{message}; if it is a part, say where it begins with "--offset"', DRIFT)
    say(message)


def _report(restored: Restored, as_json: bool) -> None:
    member, error = restored.member, restored.error
    if isinstance(error, FileExistsError):
        say(f'{printable(member.arc_path)}: another file exists; "--force" replaces it', logging.ERROR)
    elif error is not None:
        say(str(error), logging.ERROR)
    if as_json:
        facts = {"path": member.arc_path, "size": member.size, "was_there": restored.was_there}
        show(json.dumps(facts | ({"error": str(error)} if error is not None else {})), flush=False)


@click.command()
@folder_argument
@click.argument("copy", metavar="COPY", type=path)
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@index_option
@expect_option
@click.option(
    "-C", "destination", metavar="FOLDER", type=path, default=".", show_default=True, help="Where to put them."
)
@click.option(
    "--offset",
    type=byte_count,
    metavar="BYTES",
    help="Archive offset at which COPY begins, if it is a part.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help=f"How many requests at once; by default {_THREADS} of a URL, 1 of a file.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    type=key_value,
    metavar="KEY=VALUE",
    help="Of a URL: an option of boto3's S3 client or of fsspec's file system, or a header of HTTP. Repeatable.",
)
@click.option("--no-digests", is_flag=True, help="Accept a tape without digests: contents are not checked then.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object for each member, one a line.")
def extract(
    directory: str,
    copy: str,
    names: tuple[str, ...],
    index: str | None,
    expect: str | None,
    destination: str,
    offset: int | None,
    threads: int | None,
    options: tuple[tuple[str, Any], ...],
    no_digests: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Extract members from COPY, and check their digests.

    COPY is a copy of the archive of DIR, or a part of one: a file, or a URL of S3, of HTTP, or of what fsspec knows;
    only these members are read. NAME is a member's name, as
    "ls" lists it, or a pattern as in .gitignore, such as 'data/photos/*.jpg'; a folder is extracted with all that lies
    in it. DIR itself is not read and, with --index, need not exist. You can interrupt it at any time, in any way, and
    run it again: files that are there, and right, are not read again.
    """
    with Tape.discover(directory, index) as tape:
        _check_digests(tape, no_digests)
        check_expected(tape, expect)
        try:
            members, size = select(tape, names)
        except KeyError as missing:
            fail(f'{printable(str(missing.args[0]))}: no such member; "{command("ls")}" lists them', DRIFT)
        threads = threads or (_THREADS if _is_url(copy) else 1)
        with closing(_opened(copy, options, threads, pinned=not tape.seal)) as reader:
            if offset is None:
                _check_size(tape, copy, reader)
            restorer = Restorer(tape, reader, destination, offset or 0, force, threads, unchecked=no_digests)
            counts: Counter[str] = Counter()
            try:
                with progress("extracting", size, True) as update, restorer:
                    for some in restorer.restore(members):
                        for each in some:
                            _report(each, as_json)
                            counts["failed" if each.error else "there" if each.was_there else "extracted"] += 1
                            counts["bytes"] += 0 if each.error or each.was_there else each.member.size
                        update(restorer.done, note=printable(some[-1].member.arc_path) if some else "")
            except BaseException:
                say(f"{counts['extracted'] + counts['there']:,} members are extracted; {again()} goes on from there")
                raise
            cost = f"; {reader.cost()}" if reader.cost() else ""
    there = f"; {counts['there']:,} were there already" if counts["there"] else ""
    say(f"extracted {counted(counts['extracted'], 'member')}, {size_text(counts['bytes'])}{there}{cost}")
    if counts["failed"]:
        fail(f"{counts['failed']:,} members are not extracted", DRIFT)
