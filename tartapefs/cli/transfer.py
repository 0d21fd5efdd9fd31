"""The commands on copies of an archive: check, resume, resume-hint, diff, digest."""

import errno
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import click

from tartapefs.api.tape import Tape
from tartapefs.base import outputs
from tartapefs.base.errors import OffsetError
from tartapefs.base.text import printable
from tartapefs.cli.common import (
    DRIFT,
    byte_count,
    check_option,
    expect_option,
    expected,
    fail,
    folder_argument,
    index_option,
    json_option,
    named,
    path,
    print_json,
    progress,
    refuse_part,
    say,
)
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.transfer.copies import Agreement, Copy, compare, sample
from tartapefs.transfer.digests import ALGORITHMS, STATE, Algorithm, Digests
from tartapefs.transfer.index_diff import Change, Comparison

_MOST_PARTS = 10_000  # of a multipart upload, says S3
_SMALLEST_PART = 64 << 20
_MARKS = {"added": "+", "removed": "-", "changed": "!", "moved": ">"}


def _examine(tape: Tape, player: TapePlayer | None, copy: Copy, shown: str, full: bool, start: int = 0) -> Agreement:
    size = tape.total_size if copy.is_stream else min(copy.size, tape.total_size)
    with progress(f"checking {shown}", size - start, True, tape) as update:

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
        "zeros": [list(stretch) for stretch in found.zeros],
        "beyond": found.beyond,
        "exact": found.exact,
        "compared": found.compared,
    }
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
    if facts["segment"] is not None:
        of = printable(facts["member"]) if facts["member"] is not None else "the archive"
        line("ends in", f"the {facts['segment']} of {of}, at its byte {facts['position']}")
    line("first wrong", "none seen" if facts["wrong"] is None else f"{facts['wrong']}")
    for start, stop in facts["zeros"]:
        line("zeros", f"[{start}, {stop})")
    if facts["beyond"]:
        line("beyond", f"{facts['beyond']} bytes after the archive's end")
    line("compared", "every byte" if facts["exact"] else f"{facts['compared']} bytes, in places (--full: all)")


def _refuse_other_files(copy: str, found: Agreement) -> None:
    if not found.is_copy:
        fail(f"{printable(copy)}: does not begin as this archive does; remove it, or name another file", DRIFT)


@click.command()
@folder_argument
@click.argument("copy", metavar="COPY", type=path)
@index_option
@check_option
@expect_option
@click.option("--full", is_flag=True, help="Compare every byte, not only places.")
@click.option("--no-source", is_flag=True, help="Look at headers and footer alone, which need no DIR, just its index.")
@click.option("--truncate", is_flag=True, help="Cut COPY to its good prefix, after asking.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def check(
    directory: str,
    copy: str,
    index: str | None,
    check: Check,
    expect: str | None,
    full: bool,
    no_source: bool,
    truncate: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """How far COPY, a file or - for a stream, agrees with the archive of DIR.

    Exit code 0 if it is complete and equal, else 1. "good" is the number of bytes to go on from. Without --full it
    looks at every header, a place in each 64 MiB of a body, the file's holes, and all of the last 64 MiB; a stream is
    compared whole, and read up to 64 MiB beyond.
    """
    if truncate and copy == "-":
        raise click.UsageError("a stream cannot be cut")
    if truncate and not yes and not sys.stdin.isatty():
        raise click.UsageError('there is no terminal to ask at; "--truncate" needs "--yes"')
    if no_source and (full or copy == "-"):
        raise click.UsageError('"--no-source" leaves nothing to compare every byte with')
    if copy == "-" and sys.stdin is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard input")
    with Tape.discover(directory, index) as tape, ExitStack() as opened:
        expected(tape, expect, complete=True)
        player = None if no_source else TapePlayer(tape, directory, check)
        if truncate:
            refuse_part(copy, tape, player, directory)
        file = opened.enter_context(Copy(sys.stdin.fileno() if copy == "-" else copy, writable=truncate))
        if no_source and file.is_stream:
            raise click.UsageError("only a file can be checked without the source")
        found = _examine(tape, player, file, copy, full)
        facts = _facts(tape, found)
        if as_json:
            print_json(facts)
        else:
            _print_agreement(facts)
        if truncate and found.good < found.size:
            _refuse_other_files(copy, found)
            question = f"Cut {printable(copy)} from {found.size} to {found.good} bytes?"
            if yes or click.confirm(question, err=True):
                file.truncate(found.good)
                say(f"{printable(copy)} has {found.good} bytes now")
                if found.good == found.total_size:
                    return
        if not found.is_complete:
            raise SystemExit(DRIFT)


@click.command()
@folder_argument
@click.argument("copy", metavar="COPY", type=path)
@index_option
@check_option
@click.option("--full", is_flag=True, help="Compare every byte, before and after, not only places.")
@json_option
def resume(directory: str, copy: str, index: str | None, check: Check, full: bool, as_json: bool) -> None:
    """Complete COPY, a local file: check it, cut what is wrong, append what is missing, check that.

    May be interrupted in any way and at any time, and then be run again. A COPY that is not there is made.
    """
    with Tape.discover(directory, index) as tape:
        player = TapePlayer(tape, directory, check)
        refuse_part(copy, tape, player, directory)
        with Copy(copy, writable=True, create=True) as file:
            found = _examine(tape, player, file, copy, full)
            _refuse_other_files(copy, found)
            if found.good < found.size:
                say(f"{printable(copy)}: cut from {found.size:,} to {found.good:,} bytes")
                file.truncate(found.good)
            with progress(f"writing {copy}", tape.total_size - found.good, True, tape) as update:
                file.extend(player, lambda position, done: update(done, position))
            again = _examine(tape, player, file, copy, full, found.good)
        if as_json:
            print_json({"resumed_from": found.good} | _facts(tape, again))
        if not again.is_complete:
            fail(f"{printable(copy)}: what was written reads back wrong from byte {again.good:,} on", DRIFT)
        say(f"{printable(copy)}: complete; {tape.total_size:,} bytes, {tape.total_size - found.good:,} of them new")


@click.command("resume-hint")
@folder_argument
@click.option("--have", type=byte_count, required=True, metavar="BYTES", help='How many are good, as "check" tells.')
@click.option(
    "--archive",
    default="/mnt/tape/archive.tar",
    show_default=True,
    type=path,
    help="Where it is mounted; its name may be one of those that mount --name takes.",
)
@click.option("--copy", type=path, help="The copy to complete, by default one of the same name in the current folder.")
@click.option("--url", type=path, help="Where the archive is served, for curl; by default the mounted file.")
@click.option("--bucket", default="BUCKET", type=path, help="Of the S3 upload.")
@click.option("--key", default="KEY", type=path, help="Of the S3 upload.")
@click.option("--upload-id", default="UPLOAD_ID", type=path, help="Of the S3 upload.")
@click.option("--part-size", type=byte_count, metavar="BYTES", help="Of the S3 upload; all parts but the last have it.")
@index_option
@json_option
def resume_hint(
    directory: str,
    have: int,
    archive: str,
    copy: str | None,
    url: str | None,
    bucket: str,
    key: str,
    upload_id: str,
    part_size: int | None,
    index: str | None,
    as_json: bool,
) -> None:
    """Print the commands that go on with a transfer of which BYTES are good, by other means.

    Each is one line for a shell, cuts the copy to BYTES first, and exits otherwise than 0 unless it has sent all of the
    rest. Nothing is run.
    """
    with Tape.discover(directory, index) as tape:
        total = tape.total_size
        archive = named(tape, archive, "--archive")
    copy = copy or os.path.basename(archive)
    if have > total:
        raise OffsetError(have, total)
    if part_size == 0:
        raise click.BadParameter("a part has at least one byte", param_hint="--part-size")
    size = part_size or max(_SMALLEST_PART, -(-total // _MOST_PARTS >> 20) << 20)
    first, last = have // size + 1, -(-total // size)
    source, target = shlex.quote(_not_an_option(os.path.abspath(archive))), shlex.quote(_not_an_option(copy))
    address = shlex.quote(url or "file://" + _url_path(os.path.abspath(archive)))
    folder = _not_an_option(directory) if directory.startswith("-") else directory
    play = shlex.join(["tartapefs", "play", folder, *(("--index", index) if index else ())])
    upload = shlex.join(["--bucket", bucket, "--key", key, "--upload-id", upload_id])
    part = shlex.quote(_not_an_option(copy) + ".part")
    cut = f"truncate -s {have} {target}"
    hints = {
        "dd": f"{cut} && dd if={source} of={target} bs=1M iflag=skip_bytes skip={have} oflag=append conv=notrunc",
        "rsync": f"{cut} && rsync --append {source} {target}",
        "rclone": f"{cut} && rclone cat --offset {have} {source} >> {target}",
        # It exits 0 on a file that fails to read (7.88, with file://), so the size has to tell.
        "curl": f"{cut} && curl -f -r {have}- {address} >> {target} && test $(stat -c %s {target}) = {total}",
        "tartapefs": f"{cut} && {play} --start {have} >> {target}",
        # Whoever completes the upload after this line exited 0 has all parts in it, and no other.
        "aws": f"(for n in $(seq {first} {last}); do {play} --start $(((n - 1) * {size})) --length {size} > {part}"
        f" && aws s3api upload-part {upload} --part-number $n --body {part} || exit 1; done)"
        f" && test \"$(aws s3api list-parts {upload} --query '[length(Parts), sum(Parts[].Size)]' --output json"
        f" | tr -d ' \\n')\" = '[{last},{total}]'",
    }
    if have == total:
        hints = {}
        say("nothing is missing")
    elif last > _MOST_PARTS:
        say(f"parts of {size} bytes are {last:,}; S3 takes {_MOST_PARTS:,}")
    if as_json:
        print_json({"have": have, "total_size": total, "part_size": size, "parts": last, "commands": hints})
        return
    for client, line in hints.items():
        click.echo(f"# {client}\n{line}")


def _not_an_option(name: str) -> str:
    """The path such that no program takes it for an option, or, as rsync does, for one on another host."""
    return name if name.startswith(("/", "./", "../")) else f"./{name}"


def _url_path(name: str) -> str:
    from urllib.parse import quote

    return quote(os.fsencode(name))


def _open_index(place: str) -> Tape:
    return Tape.discover(place) if os.path.isdir(place) else Tape.from_index(place)


def _change_facts(change: Change) -> dict[str, Any]:
    return {
        "change": change.kind,
        "path": change.member.arc_path,
        "old_start": change.old.start if change.old else None,
        "new_start": change.new.start if change.new else None,
        "old_size": change.old.size if change.old else None,
        "new_size": change.new.size if change.new else None,
    }


@click.command()
@click.argument("old", metavar="OLD_INDEX", type=path)
@click.argument("new", metavar="NEW_INDEX", type=path)
@check_option
@click.option("--json", "as_json", is_flag=True, help="A JSON object for each change, one a line; the summary last.")
def diff(old: str, new: str, check: Check, as_json: bool) -> None:
    """What differs between two recordings, and how many bytes of the old archive the new one begins with.

    Each may be an index or a recorded folder. A line for each member that was added (+), removed (-), changed (!) or
    moved (>) to another offset, with its start in the old and the new archive. Exit code 1 if the archives differ.
    """
    counts = dict.fromkeys(_MARKS, 0)
    with _open_index(old) as one, _open_index(new) as other:
        comparison = Comparison(one, other, check)
        most = max(one.member_count, other.member_count)
        with progress("comparing", most, tape=other) as update:
            prefix = comparison.prefix(update)
        with progress("listing", most, tape=other) as update:
            for change in comparison.changes(update):
                counts[change.kind] += 1
                if as_json:
                    print(json.dumps(_change_facts(change)))
                else:
                    before = change.old.start if change.old else "-"
                    after = change.new.start if change.new else "-"
                    print(f"{_MARKS[change.kind]} {before:>15} {after:>15} {printable(change.member.name)}")
    sizes = {"old_size": one.total_size, "new_size": other.total_size}
    if as_json:
        print(json.dumps({"valid_prefix": prefix} | sizes | counts))
    else:
        print(", ".join(f"{count:,} {kind}" for kind, count in counts.items()))
        print(f"{prefix} bytes of the old archive, of {one.total_size}, begin the new one, of {other.total_size}")
    if any(counts.values()) or prefix != one.total_size:
        raise SystemExit(DRIFT)


@click.command()
@folder_argument
@index_option
@check_option
@click.option(
    "-a",
    "--algorithm",
    "algorithms",
    multiple=True,
    type=click.Choice(ALGORITHMS),
    help="Of the whole archive. Repeatable; by default sha256 if nothing else is asked for.",
)
@click.option(
    "--s3-part-size",
    "part_sizes",
    multiple=True,
    type=byte_count,
    metavar="BYTES",
    help="The ETag of a multipart upload in parts of this size. Repeatable.",
)
@click.option("--sums", type=path, metavar="FILE", help="Write the SHA-256 of each file there, for sha256sum -c.")
@click.option("--state", type=path, metavar="FILE", help="Keep there what was reached, and go on from it.")
@click.option("--force", is_flag=True, help="Replace the FILE of --sums if it is there, once the new one is complete.")
@click.option(
    "--name",
    default="archive.tar",
    show_default=True,
    help="The name that is printed with each digest, as mount --name.",
)
@json_option
def digest(
    directory: str,
    index: str | None,
    check: Check,
    algorithms: tuple[Algorithm, ...],
    part_sizes: tuple[int, ...],
    sums: str | None,
    state: str | None,
    force: bool,
    name: str,
    as_json: bool,
) -> None:
    """Print digests of the archive of DIR, all in one pass, without storing it.

    The lines are those of sha256sum --tag, which sha256sum -c, md5sum -c and b3sum -c read. With --state it may be
    interrupted and run again: it goes on where it stopped (BLAKE3 alone begins anew).
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
        name = named(tape, name, "--name")
        player = TapePlayer(tape, directory, check)
        for output in (sums, state):
            if output is not None and output != "-":
                refuse_part(output, tape, player, directory)
        out: BinaryIO | None = None
        if sums == "-":
            out = sys.stdout.buffer
        elif sums is not None:
            there = outputs.refuse_existing(sums, force) is not None
            unfinished = opened.enter_context(_unfinished(sums, state))
            out = opened.enter_context(os.fdopen(os.dup(unfinished.fd), "r+b"))
        digests = Digests(tape, algorithms, part_sizes, out, state)
        for size, parts in digests.parts.items():
            if parts.count > _MOST_PARTS:
                say(f"parts of {size} bytes are {parts.count:,}; S3 takes {_MOST_PARTS:,}")
        if state is not None and digests.not_kept:
            again = f"; {digests.read_again:,} bytes are read for that alone" if digests.read_again else ""
            say(f"cannot be kept half way, and begins anew each time: {', '.join(digests.not_kept)}{again}")
        missing = sum(stop - start for start, stop in digests.missing())
        with progress(f"reading {directory}", missing, True, tape) as update:
            digests.complete(player, lambda position, done: update(done, position))
        if sums is not None and sums != "-" and out is not None:
            out.flush()
            unfinished.commit(replace=there)
    whole = {algorithm: window.hexdigest() for algorithm, window in digests.whole.items()}
    etags = [
        {"part_size": size, "parts": parts.count, "etag": parts.hexdigest()} for size, parts in digests.parts.items()
    ]
    if as_json:
        facts = {"fingerprint": tape.fingerprint, "total_size": tape.total_size, "sums": sums}
        print_json(facts | whole | {"s3": etags})
        return
    for algorithm, value in whole.items():
        click.echo(f"{algorithm.upper()} ({printable(name)}) = {value}")
    for etag in etags:
        click.echo(f"S3-ETAG-{etag['part_size']} ({printable(name)}) = {etag['etag']}")


@contextmanager
def _unfinished(sums: str, state: str | None) -> Iterator[outputs.Unfinished]:
    """The file that is to become `sums`, locked. Without a state nothing can go on from it, and it is removed."""
    token = None
    if state is not None:
        with outputs.State(state, STATE, wait=True) as kept:
            token = kept.token
    unfinished = outputs.Unfinished(sums, token, goes_on=True)
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
