"""The command on units of systemd."""

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
    """How to run what is running now."""
    if os.path.basename(sys.argv[0]) == "__main__.py":
        return [sys.executable, "-m", "tartapefs"]
    return [os.path.abspath(sys.argv[0])]


@click.command("systemd-unit")
@folder_argument
@click.argument("mountpoint", metavar="MNT", type=path)
@click.option("--user", is_flag=True, help="For a user's own services: systemctl --user.")
@click.option("--automount", is_flag=True, help="Mount it by mount(8) on first use; unmount it when it is idle.")
@click.option(
    "-o", "options", metavar="OPTIONS", default="ro", help="Options as for mount(8), with commas between them."
)
@click.option("--output", metavar="FOLDER", type=path, help="Write the units into this folder.")
@click.option("--force", is_flag=True, help="Replace units that are there.")
def systemd_unit(
    directory: str, mountpoint: str, user: bool, automount: bool, options: str, output: str | None, force: bool
) -> None:
    """Print the systemd unit that mounts the archive of DIR at MNT.

    It is a service, which is watched, and started again when it fails; with --automount a pair of units.
    """
    told = list(mount8.arguments(options))  # refuses what no mount would take
    if user and automount:
        raise click.UsageError("only the system's own systemd can mount on first use; leave out --user or --automount")
    # Resolved: a unit for a mount point that is a link does not start, and the source's disk is found by its own path.
    source, where = os.path.realpath(directory), os.path.realpath(mountpoint)
    try:
        if automount:
            found = units.automount(source, where, options)
        else:
            found = units.service(_this_program(), source, where, told, user)
    except ValueError as error:
        fail(str(error), USAGE)
    folder = output or ("~/.config/systemd/user" if user else "/etc/systemd/system")
    if output is None:
        for name, text in found.items():
            click.echo(f"# {folder}/{name}\n{text}")
        return
    places = {os.path.join(folder, name): text for name, text in found.items()}
    there = []
    for place in places:  # all of them before any is written
        tape_files.refuse_part(place, tape_files.TapeFiles(source, default_index(source)))
        if outputs.refuse_existing(place, force) is not None:
            there.append(place)
    for place, text in places.items():
        with outputs.Unfinished(place) as unfinished:
            os.write(unfinished.fd, text.encode())
            unfinished.commit(replace=place in there)
        say(f"wrote {printable(place)}")
