"""The command that prints digests of an archive: digest."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

import click

from tartapefs.api.tape import Tape
from tartapefs.base import outputs
from tartapefs.base.crc import s3_checksum
from tartapefs.base.naming import ARCHIVE_NAME
from tartapefs.base.saved_state import SavedState
from tartapefs.base.text import printable
from tartapefs.cli.common import (
    additions_option,
    byte_count,
    check_option,
    expand_name,
    folder_argument,
    index_option,
    interruptible,
    json_option,
    path,
    print_json,
    progress_note,
    refuse_part,
    say,
    say_if_too_many_parts,
)
from tartapefs.cli.progress import progress
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.transfer.digests import ALGORITHMS, CRCS, STATE, Algorithm, Digests


@click.command()
@folder_argument
@index_option
@check_option
@additions_option
@click.option(
    "-a",
    "--algorithm",
    "algorithms",
    multiple=True,
    type=click.Choice(ALGORITHMS),
    help="A digest of the whole archive. Repeatable; sha256 if nothing else is requested.",
)
@click.option(
    "--s3-part-size",
    "part_sizes",
    multiple=True,
    type=byte_count,
    metavar="BYTES",
    help="The ETag of a multipart upload in parts of this size. Repeatable.",
)
@click.option("--sums", type=path, metavar="FILE", help="Write the SHA-256 of each file to FILE, for sha256sum -c.")
@click.option("--state", type=path, metavar="FILE", help="Save progress in FILE, and continue from it.")
@click.option("--force", is_flag=True, help="Replace an existing FILE of --sums, once the new one is complete.")
@click.option(
    "--name",
    metavar="NAME",
    default=ARCHIVE_NAME,
    show_default=True,
    help="The name to print with each digest; it may have the placeholders of mount --name.",
)
@json_option
def digest(
    directory: str,
    index: str | None,
    check: Check,
    allow_additions: bool,
    algorithms: tuple[Algorithm, ...],
    part_sizes: tuple[int, ...],
    sums: str | None,
    state: str | None,
    force: bool,
    name: str,
    as_json: bool,
) -> None:
    """Print digests of the archive of DIR.

    Computes all in one pass, without storing the archive. The lines have the format of sha256sum --tag, which sha256sum
    -c, md5sum -c and b3sum -c read. With --state you can interrupt it and run it again: it continues where it stopped
    (only BLAKE3 starts again), also after "record --append".
    """
    if not all(part_sizes):
        raise click.BadParameter("a part has at least one byte", param_hint="--s3-part-size")
    if not (algorithms or part_sizes or sums):
        algorithms = ("sha256",)
    if sums == "-" and (algorithms or part_sizes or state or as_json):
        raise click.UsageError("sums on standard output cannot be mixed with anything else, nor kept in a state")
    if sums is not None and state is not None and os.path.realpath(sums) == os.path.realpath(state):
        raise click.UsageError("sums and state are two files")
    with Tape.discover(directory, index) as tape, ExitStack() as opened:
        name = expand_name(tape, name, "--name")
        player = TapePlayer(tape, directory, check, allow_additions=allow_additions)
        for output in (sums, state):
            if output is not None and output != "-":
                refuse_part(output, tape, player, directory)
        out: BinaryIO | None = None
        if sums == "-":
            out = sys.stdout.buffer
        elif sums is not None:
            exists = outputs.refuse_existing(sums, force) is not None
            unfinished = opened.enter_context(_unfinished_sums(sums, state))
            out = opened.enter_context(os.fdopen(os.dup(unfinished.fd), "r+b"))
            if exists and state is not None and not os.fstat(unfinished.fd).st_size:
                with open(sums, "rb") as before:  # a state of these continues from them, and replaces any other
                    shutil.copyfileobj(before, out)
        digests = Digests(tape, algorithms, part_sizes, out, state)
        for size, parts in digests.parts.items():
            say_if_too_many_parts(size, parts.count)
        if state is not None and digests.not_kept:
            again = f"; {digests.read_again:,} bytes are read for that alone" if digests.read_again else ""
            say(f"cannot be saved half way, and starts again each time: {', '.join(digests.not_kept)}{again}")
        missing = sum(stop - start for start, stop in digests.missing())
        remedy = progress_note(state, None if sums == "-" else "digest.state")
        with interruptible(remedy), progress("reading", missing, True, tape) as update:
            digests.complete(player, lambda position, done: update(done, position))
        if sums is not None and sums != "-" and out is not None:
            out.flush()
            unfinished.commit(replace=exists)
    whole = {algorithm: hashed.hexdigest() for algorithm, hashed in digests.whole.items()}
    etags = [
        {"part_size": size, "parts": parts.count, "etag": parts.hexdigest()} for size, parts in digests.parts.items()
    ]
    if as_json:
        facts = {"fingerprint": tape.fingerprint, "total_size": tape.total_size, "sums": sums}
        checksums = {f"Checksum{crc.upper()}": s3_checksum(whole[crc]) for crc in CRCS if crc in whole}
        print_json(facts | whole | {"s3": etags, "s3_checksum": checksums})
        return
    for algorithm, value in whole.items():
        click.echo(f"{algorithm.upper()} ({printable(name)}) = {value}")
        if algorithm in CRCS:
            click.echo(f"S3-{algorithm.upper()} ({printable(name)}) = {s3_checksum(value)}")
    for etag in etags:
        click.echo(f"S3-ETAG-{etag['part_size']} ({printable(name)}) = {etag['etag']}")


@contextmanager
def _unfinished_sums(sums: str, state: str | None) -> Iterator[outputs.Unfinished]:
    """Opens and locks the file that is to become `sums`; removes it at the end if no state can continue from it."""
    token = None
    if state is not None:
        with SavedState(state, STATE, wait=True) as saved:
            token = saved.token
    unfinished = outputs.Unfinished(sums, token, resume=True)
    try:
        outputs.lock(unfinished.fd, sums)
        yield unfinished
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = sums
        raise
    finally:
        if state is None:
            unfinished.discard()
        unfinished.close()
