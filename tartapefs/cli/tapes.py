"""The commands that look into a tape: info, ls, locate."""

import json
import os
import re
import stat
from bisect import bisect_right
from typing import Any

import click

from tartapefs.api.tape import Tape
from tartapefs.archive.member import Member
from tartapefs.base.commands import command
from tartapefs.base.text import counted, moment, on_one_line, printable, size_text
from tartapefs.cli.common import (
    DRIFT,
    fail,
    folder_argument,
    index_option,
    json_option,
    late_note,
    print_json,
)
from tartapefs.index.schema import YES_OR_NO, Generation
from tartapefs.source.folder import Source


def _checks(tape: Tape, directory: str) -> tuple[bool | None, str, list[str]]:
    """Tells whether the tape is at home, which facts a read compares, and the file systems that delay changes."""
    try:
        with Source(directory) as source:
            at_home, late_on = tape.is_at_home(source.ino), source.foreign_types(tape.one_file_system)
    except OSError:
        return None, "the source folder cannot be opened", []
    if at_home:
        return True, "type, size, mtime, mode, link target, inode, ctime", late_on
    return False, "type, size, mtime, mode, link target (not inode and ctime: folder or index are copies)", late_on


@click.command()
@folder_argument
@index_option
@json_option
def info(directory: str, index: str | None, as_json: bool) -> None:
    """Show the facts of the tape of DIR: size, seal and so on."""
    with Tape.discover(directory, index) as tape:
        at_home, checks, late_on = _checks(tape, directory)
        if tape.seal and at_home is not None:
            checks += "; contents, which decide where only mtime, inode or ctime changed"
        facts = {
            "source": os.path.realpath(directory),
            "index": tape.index_path,
            "fingerprint": tape.fingerprint,
            "seal": tape.seal or None,
            "digests": f"{tape.algorithm}, of blocks of {tape.block_size} bytes" if tape.seal else None,
            "total_size": tape.total_size,
            "member_count": tape.member_count,
            "recorded": moment(tape.recorded_ns),
            "generations": [_generation_facts(generation) for generation in tape.generations],
            "excluded": list(tape.excluded),
            "left_out": tape.left_out,
            "owners": "kept" if tape.owners_kept else "scrubbed",
            "long_names": tape.long_names,
            "hard_links": tape.hard_links,
            "one_file_system": tape.one_file_system,
            "at_home": at_home,
            "checks": checks,
            "late_on": late_on,
        }
    if as_json:
        print_json(facts)
        return
    facts["total_size"] = f"{tape.total_size} ({size_text(tape.total_size)})"
    facts["excluded"] = " ".join(tape.excluded) or "nothing"
    facts["seal"] = tape.seal or "none"
    due = f", which are to be of {tape.due_algorithm}" if tape.due_algorithm else ""
    facts["digests"] = facts["digests"] or f'none; "{command("seal")}" adds them{due}'
    del facts["late_on"]
    for option in YES_OR_NO:
        if facts.pop(option):
            facts[option] = "-x: without what is mounted below" if option == "one_file_system" else "recorded"
    if late_on:
        facts["file_system"] = late_note(late_on)
    facts["at_home"] = {True: "yes", False: "no", None: "unknown"}[at_home]
    del facts["generations"]
    for key, value in facts.items():
        shown = (on_one_line if key == "digests" else printable)(str(value))  # it may name a command, for a shell
        click.echo(f"{key.replace('_', ' '):14}{shown}")
    for number, generation in enumerate(tape.generations, 1) if len(tape.generations) > 1 else ():
        label, size = f"generation {number}", generation.stop - generation.start
        click.echo(
            f"{label:14}{counted(generation.members, 'member')}, {size} bytes from {generation.start},"
            f" recorded {moment(generation.recorded_ns)}, fingerprint {generation.fingerprint}"
        )


def _generation_facts(generation: Generation) -> dict[str, Any]:
    return {
        "start": generation.start,
        "stop": generation.stop,
        "members": generation.members,
        "recorded": moment(generation.recorded_ns),
        "fingerprint": generation.fingerprint,
    }


def member_facts(member: Member) -> dict[str, Any]:
    facts = {
        "path": member.arc_path,
        "start": member.start,
        "stop": member.stop,
        "mode": f"{stat.S_IMODE(member.mode):04o}",
        "type": _type_of(member),
        "size": member.size,
        "mtime": moment(member.mtime_ns),
    }
    return facts | ({"target": os.fsdecode(member.target)} if member.target else {})


def _type_of(member: Member) -> str:
    if member.is_file or member.is_directory:
        return "file" if member.is_file else "directory"
    return "hard link" if member.is_hard_link else "link"


def _with_generation(tape: Tape, member: Member) -> dict[str, Any]:
    """The facts of a member and, where there are several generations, the number of its own, from 1."""
    if len(tape.generations) == 1:
        return member_facts(member)
    number = bisect_right(tape.generations, member.start, key=lambda generation: generation.start)
    superseded = member.is_directory and tape.is_superseded(member)
    return member_facts(member) | {"generation": number, "superseded": superseded}


@click.command("ls")
@folder_argument
@index_option
@click.option("--json", "as_json", is_flag=True, help="A JSON object for each member, one a line.")
def ls(directory: str, index: str | None, as_json: bool) -> None:
    """List the members of the archive of DIR.

    A line has mode, size, mtime, offset in the archive, and name. The mode of a hard link begins with "h", and its name
    is followed by that of the member with the contents, as in tar. A folder that "record --append" found changed is
    listed again where its new header lies; with --json each has its generation, and whether it is superseded.
    """
    with Tape.discover(directory, index) as tape:
        wide = len(str(tape.total_size))
        for member in tape.members():
            if as_json:
                print(json.dumps(_with_generation(tape, member)))
                continue
            sign = "->" if member.is_link else "link to"
            arrow = f" {sign} {printable(member.target)}" if member.target else ""
            mode = stat.filemode(member.mode)
            mode = f"h{mode[1:]}" if member.is_hard_link else mode
            print(
                f"{mode} {member.size:>{wide}} {moment(member.mtime_ns).partition('.')[0]}"
                f" {member.start:>{wide}} {printable(member.name)}{arrow}"
            )


@click.command()
@folder_argument
@click.argument("where", metavar="OFFSET|MEMBER")
@index_option
@json_option
def locate(directory: str, where: str, index: str | None, as_json: bool) -> None:
    """Show what lies at OFFSET, or where MEMBER lies.

    A plain number is an offset in the archive, in bytes. Anything else is a member's name, which starts with the
    folder's own name. If that name is a number, add a slash.
    """
    with Tape.discover(directory, index) as tape:
        if re.fullmatch(r"[0-9]{1,19}", where, re.ASCII):
            offset = int(where)
            segment = tape.segment_at(offset)
            member = tape.member_at(offset)
            facts: dict[str, Any] = {
                "offset": offset,
                "segment": segment.kind.value,
                "start": segment.start,
                "stop": segment.stop,
                "position": offset - segment.start,
                "member": _with_generation(tape, member) if member else None,
            }
            name = f"of {printable(member.arc_path)}" if member else "of the archive"
            line = (
                f"offset {offset}: byte {offset - segment.start} of the {segment.kind} {name},"
                f" which is [{segment.start}, {segment.stop})"
            )
        else:
            try:
                member = tape.find(where)
            except KeyError:
                fail(f'{printable(where)}: no such member; "{command("ls")}" lists them', DRIFT)
            parts = list(member.segments())
            facts = _with_generation(tape, member) | {"segments": {s.kind.value: [s.start, s.stop] for s in parts}}
            line = f"{printable(member.arc_path)}: [{member.start}, {member.stop}): " + ", ".join(
                f"{s.kind} [{s.start}, {s.stop})" for s in parts
            )
    if as_json:
        print_json(facts)
    else:
        click.echo(line)
