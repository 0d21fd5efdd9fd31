"""The commands on digests of contents: seal, verify-extracted, extract."""

import json
import os

import click

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.base.errors import TapeIntegrityError
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
    path,
    print_json,
    progress,
    say,
    size_text,
)
from tartapefs.play.engine import Check, TapePlayer
from tartapefs.source.folder import Source
from tartapefs.verify.extracted import verify_extracted as find_differences
from tartapefs.verify.restore import Restorer, below
from tartapefs.verify.seal import seal as make_seal


def digest_facts(error: TapeIntegrityError) -> dict[str, object]:
    return {
        "member": error.member,
        "differences": [{"what": d.what, "recorded": d.recorded, "found": d.found} for d in error.differences],
    }


def seal_folder(
    directory: str,
    index: str | None,
    algorithm: hash_tree.SealAlgorithm,
    block_size: int,
    check: Check = "full",
    known: Tape | None = None,
) -> str:
    """Seals the tape of the folder, with digests out of `known` where nothing changed, and returns the seal."""
    with Tape.discover(directory, index) as tape:
        player = TapePlayer(tape, directory, check)
        with progress(f"sealing {directory}", tape.total_size, True, tape) as update:
            sealed = make_seal(
                tape,
                player.source,
                player.at_home,
                algorithm,
                block_size,
                lambda position: update(position, position),
                known,
            )
        say(f"sealed {tape.member_count:,} members, {size_text(tape.total_size)}, with {algorithm}")
    return sealed


@click.command("seal")
@folder_argument
@index_option
@check_option
@click.option(
    "--digest",
    "algorithm",
    type=click.Choice(hash_tree.ALGORITHMS),
    help="The algorithm: blake3, unless the tape was recorded to have another.",
)
@click.option(
    "--block-size",
    type=byte_count,
    metavar="BYTES",
    help=f"What has a digest of its own, 64K to 1M: {hash_tree.BLOCK_SIZE >> 10}K, unless another was asked for.",
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
    """Add digests of all contents to the tape of DIR, and print its seal.

    Contents are read once. What was read is kept when this is interrupted, and need not be read again. From then on
    every read is checked against contents, and --expect holds a tape to its seal.
    """
    with Tape.discover(directory, index) as tape:
        algorithm = algorithm or tape.due_algorithm or "blake3"  # type: ignore[assignment]  # checked at opening
        block_size = block_size or tape.due_block_size or hash_tree.BLOCK_SIZE
    assert algorithm is not None
    if not hash_tree.SMALLEST_BLOCK <= block_size <= hash_tree.LARGEST_BLOCK or block_size % 512:
        raise click.BadParameter("a block has 64K to 1M, and a multiple of 512 bytes", param_hint="--block-size")
    sealed = seal_folder(directory, index, algorithm, block_size, check)
    if as_json:
        print_json({"seal": sealed, "algorithm": algorithm, "block_size": block_size})
    else:
        click.echo(sealed)


def _check_sealed(tape: Tape) -> None:
    if not tape.seal:
        raise click.UsageError(f'{printable(tape.index_path)} has no digests; run "tartapefs seal" first')


@click.command("verify-extracted")
@folder_argument
@click.argument("extracted", metavar="EXTRACTED", type=path)
@index_option
@expect_option
@click.option(
    "--ignore",
    type=click.Choice(("mode", "mtime")),
    multiple=True,
    help="What is not compared: tar changes modes without -p, for example. Repeatable.",
)
@json_option
def verify_extracted(
    directory: str, extracted: str, index: str | None, expect: str | None, ignore: tuple[str, ...], as_json: bool
) -> None:
    """Compare EXTRACTED, a folder that was extracted from the archive of DIR, with the tape.

    Names, types, modes, sizes, times, links and all contents, by the tape's digests: DIR itself is not read and, with
    --index, need not be there. EXTRACTED is the folder that was extracted, or the one that it was extracted into.
    """
    with Tape.discover(directory, index) as tape:
        _check_sealed(tape)
        expected(tape, expect, complete=True)
        inside = os.path.join(extracted, tape.root_name)
        where = inside if os.path.basename(os.path.realpath(extracted)) != tape.root_name else extracted
        if not os.path.isdir(where):
            raise click.BadParameter(f"{printable(where)} is not a folder", param_hint="EXTRACTED")
        found = []
        with (
            Source(where) as source,
            progress(f"verifying {extracted}", tape.total_size, True, tape) as update,
        ):
            for error in find_differences(tape, source, ignore, lambda position: update(position, position)):
                found.append(error)
                if not as_json:
                    click.echo(str(error))
        if as_json:
            print_json({"valid": not found, "members": tape.member_count, "drift": list(map(digest_facts, found))})
        elif not found:
            say(f"{tape.member_count:,} members, contents included, agree with the tape")
    if found:
        fail(f"{len(found):,} differences from the tape", DRIFT)


@click.command("extract")
@folder_argument
@click.argument("copy", metavar="COPY", type=path)
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@index_option
@expect_option
@click.option("-C", "destination", metavar="DEST", type=path, default=".", show_default=True, help="Where to put them.")
@click.option(
    "--offset",
    type=byte_count,
    metavar="BYTES",
    default="0",
    show_default=True,
    help="Where in the archive COPY begins, if it is a part of one.",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object for each member, one a line.")
def extract(
    directory: str,
    copy: str,
    names: tuple[str, ...],
    index: str | None,
    expect: str | None,
    destination: str,
    offset: int,
    force: bool,
    as_json: bool,
) -> None:
    """Take single members out of COPY, a copy of the archive of DIR or a part of one, and check their digests.

    Only what is asked for is read. NAME is a member's name, as "ls" lists it; of a folder all that lies in it comes
    along. DIR itself is not read and, with --index, need not be there.
    """
    with Tape.discover(directory, index) as tape:
        _check_sealed(tape)
        expected(tape, expect)
        wanted = []
        for name in names:
            try:
                wanted.append(tape.find(name))
            except KeyError:
                fail(f'{printable(name)}: no such member; "tartapefs ls" lists them', DRIFT)
        with Restorer(tape, copy, destination, offset, force) as restorer:
            for first in wanted:
                with progress(f"extracting {first.arc_path}") as update:
                    for count, member in enumerate(below(tape, first), 1):
                        restorer.restore(member)
                        update(count)
                        if as_json:
                            print(json.dumps({"path": member.arc_path, "size": member.size}))
