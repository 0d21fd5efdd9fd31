"""The command that compares two recordings: diff."""

import json
import os
from typing import Any

import click

from tartapefs.api.tape import Tape
from tartapefs.base.text import counted, printable
from tartapefs.cli.common import DRIFT, check_option, path, show
from tartapefs.cli.progress import progress
from tartapefs.play.engine import Check
from tartapefs.transfer.index_diff import Change, Comparison, naming_another

_MARKS = {"added": "+", "removed": "-", "changed": "!", "moved": ">"}


def _open_index(location: str) -> Tape:
    return Tape.discover(location) if os.path.isdir(location) else Tape.from_index(location)


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
    """List the changes between two recordings.

    Each may be an index or a recorded folder. Prints a line for each member that was added (+), removed (-), changed
    (!) or moved (>) to another offset, with its start in the old and the new archive, and then
    how many bytes of the old archive the new one begins with, or that it extends it. The exit code is 1 if the archives
    differ.
    """
    counts = dict.fromkeys(_MARKS, 0)
    with naming_another(), _open_index(old) as old_tape, _open_index(new) as new_tape:
        comparison = Comparison(old_tape, new_tape, check)
        most = max(old_tape.member_count, new_tape.member_count)
        with progress("comparing", most, tape=new_tape) as update:
            prefix = comparison.prefix(update)
        with progress("listing", most, tape=new_tape) as update:
            for change in comparison.changes(update):
                counts[change.kind] += 1
                if as_json:
                    show(json.dumps(_change_facts(change)), flush=False)
                else:
                    before = change.old.start if change.old else "-"
                    after = change.new.start if change.new else "-"
                    name = printable(change.member.name)
                    show(f"{_MARKS[change.kind]} {before:>15} {after:>15} {name}", flush=False)
    extension = comparison.extension(prefix)
    sizes = {"old_size": old_tape.total_size, "new_size": new_tape.total_size}
    if as_json:
        extends = {"extends": extension is not None} if len(new_tape.generations) > 1 else {}
        print(json.dumps({"valid_prefix": prefix} | sizes | counts | extends))
    else:
        print(", ".join(f"{count:,} {kind}" for kind, count in counts.items()))
        print(
            f"{printable(new)} extends {printable(old)} by {counted(extension[0], 'member')}, {extension[1]:,} bytes;"
            f" copies stay valid up to byte {prefix}"
            if extension is not None
            else f"{prefix} bytes of the old archive, of {old_tape.total_size}, begin the new one, of"
            f" {new_tape.total_size}"
        )
    if any(counts.values()) or prefix != old_tape.total_size:
        raise SystemExit(DRIFT)
