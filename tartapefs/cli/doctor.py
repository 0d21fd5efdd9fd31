"""The command that checks whether this machine can mount an archive, and says what to do if not: doctor.

The self-test runs the commands as a user would, with index and mount point in a temporary folder.
"""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain

import click

from tartapefs.api.tape import Tape
from tartapefs.base.commands import command
from tartapefs.base.errors import TapeError
from tartapefs.base.naming import ARCHIVE_NAME
from tartapefs.base.text import counted, printable
from tartapefs.cli.common import DRIFT, json_option, path, print_json
from tartapefs.cli.progress import progress
from tartapefs.mount.machine_checks import Finding, machine_findings
from tartapefs.play.engine import TapePlayer
from tartapefs.play.playback import CHUNK


def _run(*command: str) -> str:
    """Runs a command, and returns its standard output. Raises ChildProcessError with the last line that it printed."""
    result = subprocess.run(
        command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, errors="backslashreplace"
    )
    if result.returncode:
        *_, message = ["", *(result.stdout + result.stderr).splitlines()]
        raise ChildProcessError(message.removeprefix("tartapefs: ") or f"{command[0]} ended with {result.returncode}")
    return result.stdout


def _tartapefs(*arguments: str) -> str:
    return _run(sys.executable, "-m", "tartapefs", *arguments)


def _read_with_tarfile(archive: str, tape: Tape, player: TapePlayer) -> str:
    """Reads the mounted archive with `tarfile`; compares members with the recording, contents with the player's."""
    with tarfile.open(archive) as tar, progress("reading back", tape.total_size, True, tape) as update:
        for member in tape.members():
            update(member.start, member.start)
            found = tar.next()
            if found is None or os.fsencode(found.name) != member.name.rstrip(b"/") or found.size != member.size:
                raise ChildProcessError(f"{printable(member.name)} is not where it was recorded")
            contents = tar.extractfile(found) if found.isreg() else None
            while contents and (data := contents.read(CHUNK)):
                if data != player.read(found.offset_data + contents.tell() - len(data), len(data)):
                    raise ChildProcessError(f"{printable(member.name)} has other contents")
                update(position := found.offset_data + contents.tell(), position)
        if tar.next() is not None:
            raise ChildProcessError("there are more members than recorded")
    return f"{counted(tape.member_count, 'member')}, as recorded"


def _compare_with_tar(archive: str, folder_above: str) -> str:
    if "GNU tar" not in _run("tar", "--version"):
        raise ChildProcessError("the program tar is not GNU tar")
    _run("tar", "--compare", "--numeric-owner", "-f", archive, "-C", folder_above)
    return "no difference from the folder"


def _temporary_folder() -> str | None:
    try:
        return os.path.realpath(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def _self_test(directory: str) -> Iterator[Finding]:
    """Records, mounts, reads back twice and unmounts, without writing to the folder."""
    if _temporary_folder() is None:
        yield Finding(
            "temporary folder", "problem", "there is none that you can write", "set TMPDIR to one that you can"
        )
        return
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tartapefs-doctor-"))
        index, mountpoint = os.path.join(scratch, "index.db"), os.path.join(scratch, "mnt")
        archive = os.path.join(mountpoint, ARCHIVE_NAME)
        os.mkdir(mountpoint)

        def record() -> str:
            facts = json.loads(_tartapefs("record", "--json", "--keep-owners", "--index", index, "--", directory))
            return f"{counted(facts['member_count'], 'member')}, {facts['total_size']:,} bytes"

        def mount() -> str:
            _tartapefs("mount", "--index", index, "--", directory, mountpoint)
            stack.callback(clean_up)
            return f"at {mountpoint}"

        def read() -> str:
            with Tape.discover(directory, index) as tape, contextlib.closing(TapePlayer(tape, directory)) as player:
                return _read_with_tarfile(archive, tape, player)

        def compare() -> str:
            return _compare_with_tar(archive, os.path.dirname(os.path.realpath(directory)))

        def unmount(*options: str) -> str:
            _tartapefs("unmount", *options, "--", mountpoint)
            return "nothing is left"

        def clean_up() -> None:
            with contextlib.suppress(OSError):  # usually it is unmounted already
                unmount("--lazy")

        def archive_state() -> str:
            """The state of the archive in parentheses, if it is invalid, without a remedy."""
            with contextlib.suppress(OSError):
                state = os.getxattr(mountpoint, "user.tartape.state").decode()
                return "" if state == "valid" else f" ({state.partition('; run ')[0]})"
            return ""

        for check, step, needed, remedy in (
            ("record", record, True, 'see what it says; "tartapefs help record" has options to leave things out'),
            ("mount", mount, True, "see the checks above"),
            ("tarfile", read, False, "try a folder that nobody writes to; if it fails there too, report it"),
            ("GNU tar", compare, False, "try a folder that nobody writes to; if it fails there too, report it"),
            ("unmount", unmount, False, command("unmount --lazy", mountpoint)),
        ):
            try:
                yield Finding(check, "ok", step())
            except (TapeError, OSError, tarfile.TarError) as error:
                if isinstance(error, TapeError):
                    error.remedy = ""  # the tape that it is about is gone at the end
                yield Finding(check, "problem", str(error) + archive_state(), remedy)
                if needed:
                    return


@click.command()
@click.argument("directory", metavar="[DIR]", type=path, required=False)
@json_option
def doctor(directory: str | None, as_json: bool) -> None:
    """Check whether this machine can mount archives.

    Says what to do if not; the exit code is 1 then. With DIR it also runs a self-test: it records DIR, mounts it, reads
    it back with Python's tarfile and with GNU tar, compares, and unmounts. It writes nothing to DIR.
    """
    if directory is not None:
        if not os.path.isdir(directory):
            raise click.BadParameter(f"{printable(directory)} is not a folder", param_hint="DIR")
        root, scratch = os.path.realpath(directory), _temporary_folder()
        if scratch is not None and os.path.commonpath((root, scratch)) == root:
            raise click.BadParameter(f"the temporary folder {scratch} lies in it: set TMPDIR", param_hint="DIR")
    findings = []
    for finding in chain(machine_findings(), _self_test(directory) if directory is not None else ()):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.status:8}{finding.check:16}{finding.found}")
            if finding.remedy:
                click.echo(f"{'':24}remedy: {finding.remedy}")
    usable = all(finding.status != "problem" for finding in findings)
    if as_json:
        print_json({"usable": usable, "findings": list(map(asdict, findings))})
    if not usable:
        raise SystemExit(DRIFT)
