"""The command that writes an archive, or a part of one: play."""

import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, BinaryIO

import click

from tartapefs.api.tape import Tape
from tartapefs.base import outputs
from tartapefs.base.buffers import aligned
from tartapefs.base.commands import as_path, command
from tartapefs.base.errors import OffsetError
from tartapefs.base.text import printable
from tartapefs.cli.common import (
    DRIFT,
    additions_option,
    again,
    byte_count,
    check_expected,
    check_option,
    expect_option,
    fail,
    folder_argument,
    index_option,
    path,
    refuse_part,
    say,
    show,
    strict_option,
)
from tartapefs.cli.progress import Update, progress
from tartapefs.cli.tapes import member_facts
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.play.events import Event, FileData, FileEnd, FileStart, TapeCompleted
from tartapefs.play.playback import CHUNK


def _event_facts(event: Event, position: int) -> dict[str, Any]:
    match event:
        case FileStart():
            facts = {"start_offset": event.metadata.start_offset, "resumed": event.metadata.resumed}
            return member_facts(event.entry) | {"type": event.type} | facts
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


def _play_events(player: TapePlayer, start: int, stop: int, out: BinaryIO | None, update: Update) -> None:
    position = start
    for event in player.play(start, processes=2):
        if isinstance(event, FileData):
            data = event.data[: stop - position]
            if out is not None:
                out.write(data)
            show(json.dumps(_event_facts(FileData(data), position)), flush=False)
            position += len(data)
            update(position - start, position)
        else:
            show(json.dumps(_event_facts(event, position)), flush=False)
        if position == stop and stop < player.tape.total_size:
            return


def _play_bytes(player: TapePlayer, start: int, stop: int, out: BinaryIO, update: Update) -> None:
    buffer = aligned(CHUNK)
    for position in range(start, stop, CHUNK):
        out.write(buffer[: player.readinto(buffer[: stop - position], position)])
        update(position - start, position)


def _open_for_append(output: str, player: TapePlayer) -> tuple[int, int]:
    """Opens or creates the copy to continue; returns its descriptor and length in bytes."""
    fd = outputs.open_existing(output, create=True)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise click.BadParameter(f"{printable(output)} is not a regular file", param_hint="-o")
        outputs.lock(fd, output)
        size = os.lseek(fd, 0, os.SEEK_END)
        # Compares its beginning and end only; "check" and "resume" compare more.
        for offset in {0, max(0, size - CHUNK)}:
            found_there = os.pread(fd, min(CHUNK, size - offset), offset)
            if size > player.tape.total_size or found_there != player.read(offset, len(found_there)):
                remedy = f'"{command("resume", as_path(output))}" completes a copy'
                fail(f"{printable(output)}: is no beginning of this archive; {remedy}", DRIFT)
    except BaseException:
        os.close(fd)
        raise
    return fd, size


@contextmanager
def _new_output(output: str, force: bool, go_on: str | None) -> Iterator[BinaryIO]:
    """Opens the output file. An existing file is replaced at the end; a new one keeps what was written.

    `go_on`: the command that continues it, in quotes, if it can be continued.
    """
    exists = outputs.refuse_existing(output, force, '"--force" replaces it, "--append" continues it')
    if exists:
        with outputs.Unfinished(output) as unfinished:
            with os.fdopen(unfinished.fd, "wb", closefd=False) as file:
                yield file
            unfinished.commit(replace=True)
        return
    with os.fdopen(outputs.create(output), "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.flush()
            size = os.fstat(file.fileno()).st_size
            if size == 0 and exists is None:
                outputs.remove(output, file.fileno())
            elif size and go_on is not None:
                say(f"{printable(output)}: has the first {size:,} bytes; {go_on} goes on from there")
            raise


@contextmanager
def _appending(fd: int) -> Iterator[BinaryIO]:
    with os.fdopen(fd, "ab") as file:
        yield file
        file.flush()
        os.fsync(fd)


@click.command()
@folder_argument
@index_option
@check_option
@additions_option
@strict_option
@expect_option
@click.option("--start", type=byte_count, metavar="BYTES", help="The first byte of the archive to play, 0 by default.")
@click.option("--length", type=byte_count, metavar="BYTES", help="How many bytes to play; by default all that follow.")
@click.option("-o", "--output", type=path, metavar="FILE", help="Write the archive to this new file instead of stdout.")
@click.option("--append", is_flag=True, help="Continue the output file, which must be the beginning of the archive.")
@click.option("--force", is_flag=True, help="Replace an existing output file, once all has been written.")
@click.option("--events", is_flag=True, help="Print events as JSON lines; the archive goes to --output, if given.")
def play(
    directory: str,
    index: str | None,
    check: Check,
    allow_additions: bool,
    strict: bool,
    expect: str | None,
    start: int | None,
    length: int | None,
    output: str | None,
    append: bool,
    force: bool,
    events: bool,
) -> None:
    """Write the archive of DIR to stdout or a file.

    Refuses an existing file, unless --append continues it or --force replaces it. If the command fails, a new file
    keeps what was written, and an existing one stays unchanged.
    """
    output = None if output == "-" else output
    if append and (output is None or start is not None or force):
        raise click.UsageError(
            '"--append" continues the file of "-o" from its end: "--start", "--force" have no meaning'
        )
    with Tape.discover(directory, index) as tape, ExitStack() as opened:
        if start is not None and start > tape.total_size:
            raise OffsetError(start, tape.total_size)
        check_expected(tape, expect, complete=True)
        player = TapePlayer(tape, directory, check, strict=strict, allow_additions=allow_additions)
        if sys.stdout is None and (events or output is None):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")
        if output is None and not events and sys.stdout.isatty():
            raise click.UsageError('the archive does not belong on a terminal; use "-o FILE" or a pipe')
        start = start or 0
        out: BinaryIO | None = None
        if output is None:
            out = None if events else sys.stdout.buffer
        elif (descriptor := outputs.open_device(output)) is not None:
            out = opened.enter_context(os.fdopen(descriptor, "wb"))
        else:
            refuse_part(output, tape, player, directory)
            if append:
                descriptor, start = _open_for_append(output, player)
                out = opened.enter_context(_appending(descriptor))
            else:
                is_begin = start == 0 and length is None
                go_on = again("--append", without="--force") if is_begin else None
                out = opened.enter_context(_new_output(output, force, go_on))
        stop = tape.total_size if length is None else min(start + length, tape.total_size)
        with progress("playing", stop - start, True, tape) as update:
            if events:
                _play_events(player, start, stop, out, update)
            else:
                assert out is not None
                _play_bytes(player, start, stop, out, update)
                out.flush()
