"""The command that records a folder: record."""

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import click

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.base import tape_files
from tartapefs.base.commands import command
from tartapefs.base.errors import TapeConstraintError, TapeError, TapeExistsError, TapeFormatError
from tartapefs.base.text import counted, printable, size_text
from tartapefs.cli.common import (
    REFUSED,
    again,
    fail,
    folder_argument,
    index_option,
    json_option,
    print_json,
    recording_options,
    say,
    warn_of_late_changes,
)
from tartapefs.cli.progress import progress
from tartapefs.cli.seals import seal_folder
from tartapefs.index.schema import YES_OR_NO
from tartapefs.record.recorder import TapeRecorder
from tartapefs.source.folder import Source
from tartapefs.transfer.index_diff import Comparison


def record_folder(
    directory: str,
    index: str | None,
    expected: int | None = None,
    is_rehearsal: bool = False,
    **options: Any,
) -> tuple[TapeRecorder, str]:
    """Records, and reports what was recorded. `expected`: members, estimated; `options`: of the recorder."""
    if not os.path.isdir(directory):
        raise click.BadParameter(f"{printable(directory)} is not a folder", param_hint="DIR")
    with _recorder(directory, index, expected, **options) as recorder:
        fingerprint = _commit(recorder, again("--long-names"))
    _report_options(recorder, bool(options["exclude"]), options.get("digest"))
    _report_left_out(recorder)
    recorded, has = ("would record", "would have") if is_rehearsal else ("recorded", "has")
    say(
        f"{recorded} {counted(recorder.member_count, 'member')} of {printable(directory)};"
        f" the archive {has} {recorder.total_size:,} bytes ({size_text(recorder.total_size)})"
    )
    for line in _what_differs(recorder):
        say(line)
    return recorder, fingerprint


def _what_differs(recorder: TapeRecorder) -> Iterator[str]:
    """A line for each way in which the archive holds something otherwise than the folder (docs/what-it-holds.md)."""
    found = recorder.summary
    if found.further_names:
        least = "" if found.counts_all_names else "at least "
        size = f"{least}{found.further_bytes:,} bytes"
        what = f"links instead of {size}" if recorder.hard_links else f"full copies, {size} more"
        named = f"{least}{found.further_names:,} further names of files"
        yield f"hard links: {named} are {what} ({size_text(found.further_bytes)})"
    if found.sparse_files:
        room = f"{found.sparse_bytes:,} bytes ({size_text(found.sparse_bytes)}) that take no room in the folder"
        yield f"sparse or compressed files: {found.sparse_files:,} are written out, with {room}"
    if found.other_owners:
        yield f'owners: {found.other_owners:,} members have others than root ("--keep-owners" keeps them)'
    if found.with_attributes:
        having = f"{counted(found.with_attributes, 'member')} with extended attributes or ACLs"
        yield f'attributes: {having}, which are left out ("getfattr -R -d -m -" and "getfacl -R" save them)'
    if found.file_systems:
        what = "empty folders in" if recorder.one_file_system else "in"
        hint = "" if recorder.one_file_system else ' ("-x" leaves them out)'
        yield f"file systems: {found.file_systems:,} mounted below the folder are {what} the archive{hint}"


@contextmanager
def _recorder(
    directory: str, index: str | None, expected: int | None, known: int = 0, **options: Any
) -> Iterator[TapeRecorder]:
    """A recorder that shows its progress: of the members without the `known` first ones, `expected` is an estimate."""
    with progress("recording", expected) as update:
        try:
            recorder = TapeRecorder(
                directory,
                index,
                processes=2,
                on_progress=lambda members, size: update(
                    members - known, note=f"{size_text(size)}  {printable(recorder.latest)}"
                ),
                **options,
            )
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--exclude") from None
        yield recorder


def _commit(recorder: TapeRecorder, long_names: str) -> str:
    try:
        return recorder.commit()
    except TapeConstraintError as error:
        if recorder.too_long:
            error.add_note(f"{long_names} records names and targets of any length, as GNU tar does")
        raise
    except OSError as error:
        if isinstance(error, TapeError):
            raise
        name = error.filename or recorder.index_path
        elsewhere = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = f"; {again('--index', _elsewhere(recorder))} puts the index elsewhere" if elsewhere else ""
        fail(f"{printable(name)}: {error.strerror or error}; nothing was written{remedy}", REFUSED)


def _elsewhere(recorder: TapeRecorder) -> str:
    """A path for the index of a folder that cannot hold it."""
    return os.path.join(os.path.expanduser("~"), f"{os.path.basename(recorder.root)}.db")


def _report_left_out(recorder: TapeRecorder) -> None:
    for problem in recorder.skipped:
        say(f"left out: {problem}")
    special = recorder.left_out - len(recorder.skipped)
    if special:
        say(f"sockets, pipes and devices left out: {special:,}")


def _report_options(
    recorder: TapeRecorder, excludes: bool, digest: hash_tree.SealAlgorithm | Literal[""] | None
) -> None:
    """Reports which options of the replaced recording still hold, and which no longer do."""
    if recorder.not_taken_over:
        say(f"no options are taken over from what was there before: {recorder.not_taken_over}")
    previous = recorder.replaced
    if previous is None:
        return
    retained: list[tuple[str, str]] = []  # the option, and what drops it
    dropped: list[tuple[str, str]] = []
    if previous.excluded and not excludes:
        patterns = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in previous.excluded)
        (retained if recorder.excluded else dropped).append((patterns, "--no-exclude"))
    if previous.owners_kept:
        (retained if recorder.owners_kept else dropped).append(("--keep-owners", "--no-keep-owners"))
    for option in YES_OR_NO:
        if getattr(previous, option):
            name = option.replace("_", "-")
            (retained if getattr(recorder, option) else dropped).append((f"--{name}", f"--no-{name}"))
    if (algorithm := previous.algorithm or previous.due_algorithm) and not digest:
        (retained if recorder.due_algorithm else dropped).append((f"--digest {algorithm}", "--no-digest"))
    if retained:
        drops = ", ".join(f'"{drop}"' for _, drop in retained)
        say(f"as recorded before: {printable(', '.join(option for option, _ in retained))} ({drops} to drop)")
    if dropped:
        say(f"no longer: {printable(', '.join(option for option, _ in dropped))}")


def _previous_tape(directory: str, index: str | None) -> Tape | None:
    """Opens the tape that a new recording is about to replace; it stays readable after that."""
    try:
        return Tape.discover(directory, index)
    except (TapeError, OSError):  # there is none, or it cannot be read
        return None


@click.command()
@folder_argument
@index_option
@recording_options
@click.option("--no-exclude", is_flag=True, help="Drop the exclude patterns of the previous recording.")
@click.option(
    "--force", is_flag=True, help="Replace an existing recording; keep its options, unless new ones are given."
)
@click.option(
    "--append",
    is_flag=True,
    help="Add what is new to the existing recording; its archive stays a prefix of the new one.",
)
@click.option(
    "--digest",
    "algorithm",
    type=click.Choice(hash_tree.ALGORITHMS),
    help="Read all contents too, and seal the tape with their digests.",
)
@click.option("--no-digest", is_flag=True, help="Make no digests, even if the previous recording had them.")
@click.option("-n", "--dry-run", is_flag=True, help="Report what would be recorded, and write nothing.")
@json_option
def record(
    directory: str,
    index: str | None,
    recording: dict[str, Any],
    no_exclude: bool,
    force: bool,
    append: bool,
    algorithm: hash_tree.SealAlgorithm | None,
    no_digest: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Record DIR, and print the fingerprint of its archive.

    With --digest it prints the seal, one digest of all contents, on a second line. With --force it tells how much of
    existing copies stays valid, and keeps the options of the previous recording: exclude patterns, owners, and digests,
    for which it reads only changed files. An option that is given replaces the previous one; --no-... drops it.

    With --append what was recorded must be there unchanged. Copies of the archive before then only lack what is added:
    all of their bytes but the footer, the last 1,024, stay valid.

    With --dry-run no contents are read for digests, and the exit code is that which the recording would have.
    """
    if recording["exclude"] and no_exclude:
        raise click.UsageError('give "--exclude" or "--no-exclude", not both')
    if algorithm and no_digest:
        raise click.UsageError('give "--digest" or "--no-digest", not both')
    skipping = {name: recording[name] for name in ("skip_unreadable", "skip_busy")}
    is_given = any(value is not None for name, value in recording.items() if name not in skipping)
    if append and (force or is_given or no_exclude or algorithm or no_digest):
        raise click.UsageError('"--append" keeps the options of the recording: give no others, and no "--force"')
    if algorithm is not None:
        hash_tree.hasher(algorithm)  # raises if it is not installed, before anything is recorded
    if append and dry_run:
        Tape.discover(directory, index).close()  # raises if there is none, by the name of the real one
    with _rehearsal(directory, index, force or append) if dry_run else nullcontext(index) as place:
        if append:
            _append(directory, place, skipping, dry_run, as_json)
            return
        if no_exclude:
            recording["exclude"] = ()
        digest = "" if no_digest else algorithm
        _record(directory, place, recording | {"overwrite": force, "digest": digest}, dry_run, as_json)


@contextmanager
def _rehearsal(directory: str, index: str | None, goes_on: bool) -> Iterator[str]:
    """Gives the path of an index elsewhere, which is removed at the end: a copy of the real one, if that `goes_on`."""
    import shutil
    import tempfile

    real = index or tape_files.default_index(os.path.realpath(directory))
    if os.path.lexists(real) and not goes_on:
        raise TapeExistsError(real)
    with tempfile.TemporaryDirectory(prefix="tartapefs-") as place:
        shadow = os.path.join(place, "index.db")
        if os.path.exists(real):
            shutil.copyfile(real, shadow)
        yield shadow


def _record(directory: str, index: str | None, options: dict[str, Any], is_rehearsal: bool, as_json: bool) -> None:
    old = _previous_tape(directory, index) if options["overwrite"] else None
    members = old.member_count if old is not None else None
    recorder, fingerprint = record_folder(directory, index, members, is_rehearsal, **options)
    prefix, seal = None, ""
    with old or nullcontext():
        if old is not None:
            prefix = _valid_prefix(directory, index, old)
        if not as_json:
            click.echo(fingerprint)
        if not recorder.due_algorithm:
            with Source(directory) as source:
                warn_of_late_changes(source, recorder.one_file_system)
        elif not is_rehearsal:  # an explicit --digest reads all contents again
            seal = _make_digests(directory, index, recorder, None if options["digest"] else old)
    if not as_json:
        if seal and options["digest"]:
            click.echo(seal)
        return
    print_json(_facts(recorder, fingerprint, seal, prefix, is_rehearsal))


def _facts(
    recorder: TapeRecorder, fingerprint: str, seal: str, valid_prefix: int | None, is_rehearsal: bool
) -> dict[str, Any]:
    return {
        **({"dry_run": True} if is_rehearsal else {}),
        "fingerprint": fingerprint,
        **({"seal": seal} if seal else {}),
        "total_size": recorder.total_size,
        "member_count": recorder.member_count,
        "index": None if is_rehearsal else recorder.index_path,
        "valid_prefix": valid_prefix,
        "left_out": recorder.left_out,
        "skipped": [{"path": problem.path, "reason": problem.reason} for problem in recorder.skipped],
        "summary": recorder.summary.facts(),
    }


def _append(directory: str, index: str | None, skipping: dict[str, Any], is_rehearsal: bool, as_json: bool) -> None:
    with Tape.discover(directory, index) as before:
        with _recorder(directory, index, None, before.member_count, append=True, **skipping) as recorder:
            try:
                fingerprint = _commit(recorder, f'"{command("record --force --long-names")}"')
            except TapeConstraintError as error:
                error.add_note(
                    f'what is on the tape cannot be changed by --append; after "{command("record --force")}" existing'
                    f" copies would stay valid up to byte {recorder.valid_prefix:,} of {before.total_size:,}"
                )
                raise
        added, size = recorder.member_count - before.member_count, recorder.total_size - before.total_size
        _report_left_out(recorder)
        if added:
            say(
                f"{'would add' if is_rehearsal else 'added'} {counted(added, 'member')}, {size:,} bytes"
                f" ({size_text(size)}), to the archive of {printable(directory)};"
                f" existing copies stay valid up to byte {before.facts.end:,}"
            )
        else:
            say(f"nothing is new in {printable(directory)}; the recording stays as it is")
        if not as_json:
            click.echo(fingerprint)
        if before.due_algorithm and not before.seal and not is_rehearsal:
            _make_digests(directory, index, recorder, None)
        if not as_json:
            return
        with Tape.discover(directory, index) as tape:
            seal = tape.seal
        valid_prefix = before.facts.end if added else before.total_size
        print_json(_facts(recorder, fingerprint, seal, valid_prefix, is_rehearsal) | {"added": added})


def _valid_prefix(directory: str, index: str | None, old: Tape) -> int | None:
    """Returns and reports how many bytes of existing copies stay valid; None if that cannot be told."""
    with Tape.discover(directory, index) as new, progress("comparing", new.member_count, tape=new) as update:
        try:
            prefix = Comparison(old, new).prefix(update)
        except TapeFormatError as error:
            say(f"how many bytes of existing copies stay valid cannot be told: {error.reason}")
            return None
    say(
        f"existing copies stay valid up to byte {prefix:,} of {old.total_size:,}"
        if prefix < old.total_size
        else "the archive is the same as before: every copy stays valid"
    )
    return prefix


def _make_digests(directory: str, index: str | None, recorder: TapeRecorder, known: Tape | None) -> str:
    """Seals the new recording, with digests out of `known` for files that did not change."""
    algorithm: hash_tree.SealAlgorithm = recorder.due_algorithm  # type: ignore[assignment]
    try:
        return seal_folder(directory, index, algorithm, recorder.due_block_size, known=known)
    except BaseException:
        say(f'it is recorded, but has no digests yet; "{command("seal")}" makes them')
        raise
