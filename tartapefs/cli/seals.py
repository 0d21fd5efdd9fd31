"""The commands on digests of contents: seal, verify-extracted."""

import os

import click

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.base.commands import command
from tartapefs.base.hashes import is_installed
from tartapefs.base.text import counted, printable, size_text
from tartapefs.cli.common import (
    DRIFT,
    again,
    byte_count,
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
    say,
    show,
)
from tartapefs.cli.progress import progress
from tartapefs.cli.verify import drift_facts
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.source.folder import Source
from tartapefs.verify.extracted import verify_extracted as find_differences
from tartapefs.verify.seal import seal as make_seal


def seal_folder(
    directory: str,
    index: str | None,
    algorithm: hash_tree.SealAlgorithm,
    block_size: int,
    check: Check = "full",
    known: Tape | None = None,
    go_on: str | None = None,
) -> str:
    """Seals the tape of the folder, reusing digests of `known` for unchanged files, and returns the seal.

    `go_on`: what goes on after an interruption, in quotes; by default `tartapefs seal`.
    """
    go_on = go_on or f'"{command("seal")}"'
    with Tape.discover(directory, index) as tape:
        player = TapePlayer(tape, directory, check)
        with (
            interruptible(f"what was read is kept: {go_on} goes on from there"),
            progress("sealing", tape.total_size, True, tape) as update,
        ):
            sealed = make_seal(
                tape,
                player.source,
                player.at_home,
                algorithm,
                block_size,
                lambda position: update(position, position),
                known,
                processes=2,
            )
        say(f"sealed {counted(tape.member_count, 'member')}, {size_text(tape.total_size)}, with {algorithm}")
    return sealed


def _best_algorithm() -> hash_tree.SealAlgorithm:
    """The fastest one that is installed; says so if it is not BLAKE3."""
    if is_installed("blake3"):
        return "blake3"
    say('BLAKE3 is not installed, so SHA-256 is used, which is slower: pip install "tartapefs[blake3]"')
    return "sha256"


@click.command("seal")
@folder_argument
@index_option
@check_option
@click.option(
    "--digest",
    "algorithm",
    type=click.Choice(hash_tree.ALGORITHMS),
    help="The algorithm; unless recorded otherwise blake3, if it is installed.",
)
@click.option(
    "--block-size",
    type=byte_count,
    metavar="BYTES",
    help=f"Size of the blocks with digests, 64K to 1M; {hash_tree.BLOCK_SIZE >> 10}K unless recorded otherwise.",
)
@json_option
def seal(
    directory: str,
    index: str | None,
    check: Check,
    algorithm: hash_tree.SealAlgorithm | None,
    block_size: int | None,
    as_json: bool,
) -> None:
    """Add digests of all contents to the tape of DIR.

    Prints the seal, one digest of them all. It reads all contents once; after an interruption it continues where it
    stopped. From then on every read is checked against the digests, and --expect can require the seal.
    """
    with Tape.discover(directory, index) as tape:
        algorithm = algorithm or tape.due_algorithm or _best_algorithm()  # type: ignore[assignment]  # checked at opening
        block_size = block_size or tape.due_block_size or hash_tree.BLOCK_SIZE
    assert algorithm is not None
    if not hash_tree.SMALLEST_BLOCK <= block_size <= hash_tree.LARGEST_BLOCK or block_size % 512:
        raise click.BadParameter("a block has 64K to 1M, and a multiple of 512 bytes", param_hint="--block-size")
    sealed = seal_folder(directory, index, algorithm, block_size, check, go_on=again())
    if as_json:
        print_json({"seal": sealed, "algorithm": algorithm, "block_size": block_size})
    else:
        click.echo(sealed)


def _check_sealed(tape: Tape) -> None:
    if not tape.seal:
        raise click.UsageError(f'{printable(tape.index_path)} has no digests; run "{command("seal")}" first')


@click.command("verify-extracted")
@folder_argument
@click.argument("extracted", metavar="EXTRACTED", type=path)
@index_option
@expect_option
@click.option(
    "--ignore",
    type=click.Choice(("mode", "mtime")),
    multiple=True,
    help="What not to compare: tar without -p changes modes, for example. Repeatable.",
)
@json_option
def verify_extracted(
    directory: str, extracted: str, index: str | None, expect: str | None, ignore: tuple[str, ...], as_json: bool
) -> None:
    """Compare an extracted folder with the tape of DIR.

    Compares names, types, modes, sizes, times, links and, by the tape's digests, all contents. DIR itself is not read
    and, with --index, need not exist. EXTRACTED is the extracted folder, or the one into which it was extracted.
    """
    with Tape.discover(directory, index) as tape:
        _check_sealed(tape)
        check_expected(tape, expect, complete=True)
        inside = os.path.join(extracted, tape.root_name)
        folder = inside if os.path.basename(os.path.realpath(extracted)) != tape.root_name else extracted
        if not os.path.isdir(folder):
            raise click.BadParameter(f"{printable(folder)} is not a folder", param_hint="EXTRACTED")
        found = []
        with (
            Source(folder) as source,
            progress("verifying", tape.total_size, True, tape) as update,
        ):
            for error in find_differences(tape, source, ignore, lambda position: update(position, position)):
                found.append(error)
                if not as_json:
                    show(str(error))
        if as_json:
            print_json({"valid": not found, "members": tape.member_count, "drift": list(map(drift_facts, found))})
        elif not found:
            say(f"as on the tape, contents included: {counted(tape.member_count, 'member')}")
    if found:
        fail(f"{counted(len(found), 'difference')} from the tape", DRIFT)
