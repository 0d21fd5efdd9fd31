"""The command that compares a folder with its recording: verify."""

import random
from collections.abc import Iterator

import click

from tartapefs.api.tape import Tape
from tartapefs.base.commands import command
from tartapefs.base.errors import TapeFormatError, TapeIntegrityError
from tartapefs.base.text import counted, printable
from tartapefs.cli.common import (
    DRIFT,
    additions_option,
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
    progress_note,
    refuse_part,
    say,
    show,
    strict_option,
)
from tartapefs.cli.progress import progress
from tartapefs.play.assemble import Assembler
from tartapefs.play.audit import verify as find_drift
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.verify.content_scan import VerificationState, Verifier, extents, sampled_extents


def drift_facts(error: TapeIntegrityError) -> dict[str, object]:
    return {
        "member": error.member,
        "differences": [{"what": d.subject, "recorded": d.recorded, "found": d.found} for d in error.differences],
    }


def _parse_share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0
    if not 0 < share <= 1:
        raise click.BadParameter(f"{text!r} is not a percentage above 0 and up to 100")
    return share


@click.command()
@folder_argument
@index_option
@check_option
@additions_option
@strict_option
@expect_option
@click.option("--deep", is_flag=True, help="Read all contents, and compare them with the digests.")
@click.option(
    "--sample",
    type=_parse_share,
    metavar="PERCENT",
    help="Like --deep, for this share of all blocks, chosen at random.",
)
@click.option("--state", type=path, metavar="FILE", help="Save the progress of --deep here, and continue from it.")
@json_option
def verify(
    directory: str,
    index: str | None,
    check: Check,
    allow_additions: bool,
    strict: bool,
    expect: str | None,
    deep: bool,
    sample: float | None,
    state: str | None,
    as_json: bool,
) -> None:
    """Compare DIR with its recording, and list all drift.

    Checks the whole index, and the size, timestamps and so on of each member; with --deep also contents. With --state
    the command can be interrupted and run again: it continues where it stopped.
    """
    if state is not None and not deep:
        raise click.UsageError('"--state" needs "--deep"')
    if sample is not None and deep:
        raise click.UsageError('give "--deep" or "--sample", not both')
    with Tape.discover(directory, index) as tape:
        if (deep or sample is not None) and not tape.seal:
            raise click.UsageError(f'the tape has no digests of contents; run "{command("seal")}" first')
        check_expected(tape, expect, complete=True)
        player = TapePlayer(tape, directory, check, strict=strict, allow_additions=allow_additions)
        if state is not None:
            refuse_part(state, tape, player, directory)
        if not tape.rows_are_sound():
            raise TapeFormatError(tape.index_path, "its rows fail their digest")
        verifier, check_contents = None, None
        if tape.seal:
            verifier = Verifier(tape, Assembler(tape, player.source, player.at_home, contents=False, strict=strict))
            check_contents = None if strict else verifier.verify_member
        found: list[TapeIntegrityError] = []
        added: list[str] = []

        def note(error: TapeIntegrityError) -> None:
            found.append(error)
            if not as_json:
                show(str(error))

        def note_addition(arc_path: str) -> None:
            added.append(printable(arc_path))
            if not as_json:
                show(f"{added[-1]}: added since the recording")

        with progress("verifying", tape.member_count, tape=tape) as update:
            for error in find_drift(player.inspector, update, check_contents, note_addition):
                note(error)
        if verifier is not None and (deep or sample is not None):
            known = {error.member for error in found}
            for error in _wrong_contents(tape, verifier, sample, state):
                if error.member not in known:
                    note(error)
        blocks = verifier.blocks if verifier is not None else 0
        if as_json:
            facts = {"blocks": blocks} if deep or sample is not None else {}
            drift = list(map(drift_facts, found))
            members = tape.member_count
            print_json({"valid": not found, "members": members, **facts, "drift": drift, "additions": added})
        elif not found:
            contents = f", {counted(blocks, 'block')} of contents" if deep or sample is not None else ""
            say(
                f"as recorded: {counted(tape.member_count, 'member')}{contents}"
                + (f"; added since: {len(added):,}" * bool(added))
            )
    if found:
        fail(f"{counted(len(found), 'difference')} from the recording", DRIFT)


def _wrong_contents(
    tape: Tape, verifier: Verifier, sample: float | None, state_file: str | None
) -> Iterator[TapeIntegrityError]:
    with VerificationState(tape, state_file) as state:
        yield from state.found
        if sample is None:
            scanned = extents(tape, tape.block_size, state.position)
        else:
            scanned = sampled_extents(tape, sample, random.Random())
        remedy = progress_note(state_file, "verify.state" if sample is None else None)
        with interruptible(remedy), progress("reading", tape.total_size, True, tape) as update:
            try:
                for extent, wrong in verifier.verify(scanned):
                    state.add(extent.stop, wrong)
                    yield from wrong
                    update(extent.stop, extent.stop)
            finally:
                state.save()
        state.remove()
