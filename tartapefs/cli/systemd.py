"""The command that prints systemd units: systemd-unit."""

import os
import sys

import click

from tartapefs.base import outputs, tape_files
from tartapefs.base.tape_files import default_index
from tartapefs.base.text import printable
from tartapefs.cli import mount8
from tartapefs.cli.common import USAGE, fail, folder_argument, path, say
from tartapefs.mount import units


def _this_program() -> list[str]:
    """The command line that runs this program."""
    if os.path.basename(sys.argv[0]) == "__main__.py":
        return [sys.executable, "-m", "tartapefs"]
    return [os.path.abspath(sys.argv[0])]


@click.command("systemd-unit")
@folder_argument
@click.argument("mountpoint", metavar="MNT", type=path)
@click.option("--user", is_flag=True, help="For a user's own services: systemctl --user.")
@click.option("--automount", is_flag=True, help="Mount it by mount(8) on first use; unmount it when it is idle.")
@click.option(
    "--options", metavar="OPTIONS", default="ro", help="Options of the mount as for mount(8), with commas between them."
)
@click.option("-o", "--output", metavar="FOLDER", type=path, help="Write the units into this folder.")
@click.option("--force", is_flag=True, help="Replace existing units.")
def systemd_unit(
    directory: str, mountpoint: str, user: bool, automount: bool, options: str, output: str | None, force: bool
) -> None:
    """Print a systemd unit that mounts the archive.

    It is a service, which systemd watches, and restarts if it fails; with --automount it is a pair of units.
    """
    arguments = list(mount8.arguments(options))  # refuses options that no mount accepts
    if user and automount:
        raise click.UsageError("only the system's own systemd can mount on first use; leave out --user or --automount")
    # Resolved: a unit whose mount point is a link does not start, and systemd finds the source's disk by its real path.
    source, mountpoint_path = os.path.realpath(directory), os.path.realpath(mountpoint)
    try:
        if automount:
            found = units.automount(source, mountpoint_path, options)
        else:
            found = units.service(_this_program(), source, mountpoint_path, arguments, user)
    except ValueError as error:
        fail(str(error), USAGE)
    if output is not None and not os.path.isdir(output):
        remedy = "the options of the mount are given by --options"
        raise click.BadParameter(f"{printable(output)} is not a folder; {remedy}", param_hint="--output")
    folder = output or ("~/.config/systemd/user" if user else "/etc/systemd/system")
    if output is None:
        for name, text in found.items():
            click.echo(f"# {folder}/{name}\n{text}")
        return
    paths = {os.path.join(folder, name): text for name, text in found.items()}
    existing = []
    for unit_path in paths:  # check all of them before writing any
        tape_files.refuse_part(unit_path, tape_files.TapeFiles(source, default_index(source)))
        if outputs.refuse_existing(unit_path, force) is not None:
            existing.append(unit_path)
    for unit_path, text in paths.items():
        with outputs.Unfinished(unit_path) as unfinished:
            os.write(unfinished.fd, text.encode())
            unfinished.commit(replace=unit_path in existing)
        say(f"wrote {printable(unit_path)}")
