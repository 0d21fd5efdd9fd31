"""The command that records, and what it takes over from the recording that it replaces."""

import os
import shlex
from contextlib import nullcontext
from typing import Literal

import click

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.base.errors import TapeError, TapeFormatError
from tartapefs.base.text import printable
from tartapefs.cli.common import (
    REFUSED,
    fail,
    folder_argument,
    index_option,
    json_option,
    print_json,
    progress,
    recording_options,
    say,
    say_if_late,
    size_text,
)
from tartapefs.cli.seals import seal_folder
from tartapefs.record.recorder import TapeRecorder
from tartapefs.source.folder import Source
from tartapefs.transfer.index_diff import Comparison


def record_folder(
    directory: str,
    index: str | None,
    exclude: tuple[str, ...],
    keep_owners: bool | None,
    skip_unreadable: bool,
    skip_busy: bool,
    force: bool,
    expected: int | None = None,  # members, about
    no_exclude: bool = False,
    digest: hash_tree.SealAlgorithm | Literal[""] | None = None,
) -> tuple[TapeRecorder, str]:
    if not os.path.isdir(directory):
        raise click.BadParameter(f"{printable(directory)} is not a folder", param_hint="DIR")
    with progress(f"recording {directory}", expected) as update:
        try:
            recorder = TapeRecorder(
                directory,
                index,
                exclude or (() if no_exclude else None),
                None if keep_owners is None else not keep_owners,
                force,
                skip_unreadable=skip_unreadable,
                skip_busy=skip_busy,
                digest=digest,
                on_progress=lambda members, size: update(
                    members, note=f"{size_text(size)}  {printable(recorder.latest)}"
                ),
            )
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--exclude") from None
        try:
            fingerprint = recorder.commit()
        except OSError as error:
            if isinstance(error, TapeError):
                raise
            where = error.filename or recorder.index_path
            fail(f"{printable(where)}: {error.strerror or error}; nothing was written", REFUSED)
    _say_what_became_of_options(recorder, bool(exclude), digest)
    for problem in recorder.skipped:
        say(f"left out: {problem}")
    special = recorder.left_out - len(recorder.skipped)
    if special:
        say(f"left out {special} sockets, pipes and devices")
    say(
        f"recorded {recorder.member_count:,} members of {printable(directory)};"
        f" the archive has {recorder.total_size:,} bytes ({size_text(recorder.total_size)})"
    )
    return recorder, fingerprint


def _say_what_became_of_options(
    recorder: TapeRecorder, excludes: bool, digest: hash_tree.SealAlgorithm | Literal[""] | None
) -> None:
    """Says which options of the recording that was replaced hold for the new one, and which no longer do."""
    if recorder.not_taken_over:
        say(f"no options are taken over from what was there before: {recorder.not_taken_over}")
    before = recorder.replaced
    if before is None:
        return
    kept: list[tuple[str, str]] = []  # the option, and what drops it
    dropped: list[tuple[str, str]] = []
    if before.excluded and not excludes:
        patterns = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in before.excluded)
        (kept if recorder.excluded else dropped).append((patterns, "--no-exclude"))
    if before.owners_kept:
        (kept if recorder.owners_kept else dropped).append(("--keep-owners", "--no-keep-owners"))
    if (algorithm := before.algorithm or before.due_algorithm) and not digest:
        (kept if recorder.due_algorithm else dropped).append((f"--digest {algorithm}", "--no-digest"))
    if kept:
        drops = ", ".join(f'"{drop}"' for _, drop in kept)
        say(f"as recorded before: {printable(', '.join(option for option, _ in kept))} ({drops} to drop)")
    if dropped:
        say(f"no longer: {printable(', '.join(option for option, _ in dropped))}")


def _replaced(directory: str, index: str | None) -> Tape | None:
    """The tape that a new recording is about to replace: what is open of it stays readable."""
    try:
        return Tape.discover(directory, index)
    except (TapeError, OSError):  # none, or none that can be read
        return None


@click.command()
@folder_argument
@index_option
@recording_options
@click.option("--no-exclude", is_flag=True, help="Leave out nothing that the recording before left out.")
@click.option("--force", is_flag=True, help="Replace an existing recording; options that are not given are its own.")
@click.option(
    "--digest",
    "algorithm",
    type=click.Choice(hash_tree.ALGORITHMS),
    help="Read all contents too, and seal the tape with their digests.",
)
@click.option("--no-digest", is_flag=True, help="Have no digests, though the recording before had some.")
@json_option
def record(
    directory: str,
    index: str | None,
    exclude: tuple[str, ...],
    no_exclude: bool,
    keep_owners: bool | None,
    skip_unreadable: bool,
    skip_busy: bool,
    force: bool,
    algorithm: hash_tree.SealAlgorithm | None,
    no_digest: bool,
    as_json: bool,
) -> None:
    """Record DIR, and print the fingerprint of its archive; with --digest also its seal, in a second line.

    With --force it tells how much of a copy of the archive before stays valid, and does as the recording before did:
    what it excluded is left out, owners are kept if they were, and a tape with digests gets digests, for which contents
    are read of what changed alone. An option that is given replaces the one before, --no-... drops it.
    """
    if exclude and no_exclude:
        raise click.UsageError('"--exclude" and "--no-exclude": choose')
    if algorithm and no_digest:
        raise click.UsageError('"--digest" and "--no-digest": choose')
    if algorithm is not None:
        hash_tree.hasher(algorithm)  # or it is not installed, and nothing is recorded
    old = _replaced(directory, index) if force else None
    members = old.member_count if old is not None else None
    recorder, fingerprint = record_folder(
        directory,
        index,
        exclude,
        keep_owners,
        skip_unreadable,
        skip_busy,
        force,
        members,
        no_exclude,
        "" if no_digest else algorithm,
    )
    prefix, seal = None, ""
    with old or nullcontext():
        if old is not None:
            prefix = _valid_prefix(directory, index, old)
        if not as_json:
            click.echo(fingerprint)
        if not recorder.due_algorithm:
            with Source(directory) as source:
                say_if_late(source)
        else:  # what is asked for anew is made anew, of what lies there now
            seal = _sealed(directory, index, recorder, old if algorithm is None else None)
    if not as_json:
        if algorithm is not None:
            click.echo(seal)
        return
    print_json(
        {
            "fingerprint": fingerprint,
            **({"seal": seal} if seal else {}),
            "total_size": recorder.total_size,
            "member_count": recorder.member_count,
            "index": recorder.index_path,
            "valid_prefix": prefix,
            "left_out": recorder.left_out,
            "skipped": [{"path": problem.path, "reason": problem.reason} for problem in recorder.skipped],
        }
    )


def _valid_prefix(directory: str, index: str | None, old: Tape) -> int | None:
    """How much of a copy of the archive of `old` the new recording has too, in bytes, if that can be told; says it."""
    with Tape.discover(directory, index) as new, progress("comparing", new.member_count, tape=new) as update:
        try:
            prefix = Comparison(old, new).prefix(update)
        except TapeFormatError as error:
            say(f"how much of a copy of the archive before stays valid cannot be told: {error.reason}")
            return None
    say(
        f"the first {prefix:,} bytes of a copy of the archive before, of {old.total_size:,}, stay valid"
        if prefix < old.total_size
        else "the archive is the same as before: every copy stays valid"
    )
    return prefix


def _sealed(directory: str, index: str | None, recorder: TapeRecorder, known: Tape | None) -> str:
    """Makes the digests that the new recording is to have."""
    algorithm: hash_tree.SealAlgorithm = recorder.due_algorithm  # type: ignore[assignment]
    try:
        return seal_folder(directory, index, algorithm, recorder.due_block_size, known=known)
    except BaseException:
        say('it is recorded, but has no digests yet; "tartapefs seal" makes them, "record --force" does, too')
        raise
