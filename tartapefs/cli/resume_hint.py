"""The command that prints how other programs can continue a transfer: resume-hint."""

import os
import shlex

import click

from tartapefs.api.tape import Tape
from tartapefs.archive.layout import FOOTER
from tartapefs.base.errors import OffsetError
from tartapefs.base.naming import ARCHIVE_NAME
from tartapefs.cli.common import (
    byte_count,
    expand_name,
    folder_argument,
    index_option,
    json_option,
    path,
    print_json,
    say,
    say_if_too_many_parts,
    word,
)
from tartapefs.transfer.s3_limits import part_size_for


@click.command("resume-hint")
@folder_argument
@click.option(
    "--have", type=byte_count, required=True, metavar="BYTES", help='How many bytes are good, as "check" tells.'
)
@click.option(
    "--archive",
    default=f"/mnt/tape/{ARCHIVE_NAME}",
    show_default=True,
    type=path,
    metavar="FILE",
    help="Path of the mounted archive; its name may have the placeholders of mount --name.",
)
@click.option(
    "--copy",
    type=path,
    metavar="FILE",
    help="The copy to complete; by default, the file of the same name in the current folder.",
)
@click.option("--url", type=word, metavar="URL", help="URL of the archive, for curl; by default the mounted file.")
@click.option("--bucket", default="BUCKET", type=word, metavar="NAME", help="Bucket of the S3 upload.")
@click.option("--key", default="KEY", type=word, metavar="KEY", help="Key of the S3 upload.")
@click.option("--upload-id", default="UPLOAD_ID", type=word, metavar="ID", help="ID of the S3 upload.")
@click.option(
    "--part-size", type=byte_count, metavar="BYTES", help="Part size of the S3 upload; only the last part may differ."
)
@index_option
@json_option
def resume_hint(
    directory: str,
    have: int,
    archive: str,
    copy: str | None,
    url: str | None,
    bucket: str,
    key: str,
    upload_id: str,
    part_size: int | None,
    index: str | None,
    as_json: bool,
) -> None:
    """Print commands that continue a transfer.

    Each is one line for a shell: with dd, rsync, rclone, curl, tartapefs and aws. It cuts the copy to the BYTES that
    are good, and exits with 0 only if it has sent all of the rest. Nothing is run.
    """
    with Tape.discover(directory, index) as tape:
        total = tape.total_size
        archive = expand_name(tape, archive, "--archive")
        for number, generation in enumerate(tape.generations[:-1], 1):
            if generation.stop < have <= generation.stop + FOOTER:  # a part of the footer is wrong, too
                say(f"a copy of {have} bytes ends in the footer of generation {number}, which is cut first")
                have = generation.stop
    copy = copy or os.path.basename(archive)
    if have > total:
        raise OffsetError(have, total)
    if part_size == 0:
        raise click.BadParameter("a part has at least one byte", param_hint="--part-size")
    size = part_size or part_size_for(total)
    first, last = have // size + 1, -(-total // size)
    source, target = shlex.quote(_not_an_option(os.path.abspath(archive))), shlex.quote(_not_an_option(copy))
    address = shlex.quote(url or "file://" + _url_path(os.path.abspath(archive)))
    folder = _not_an_option(directory) if directory.startswith("-") else directory
    play = shlex.join(["tartapefs", "play", folder, *(("--index", index) if index else ())])
    upload = shlex.join(["--bucket", bucket, "--key", key, "--upload-id", upload_id])
    part = shlex.quote(_not_an_option(copy) + ".part")
    cut = f"truncate -s {have} {target}"
    hints = {
        "dd": f"{cut} && dd if={source} of={target} bs=1M iflag=skip_bytes skip={have} oflag=append conv=notrunc",
        "rsync": f"{cut} && rsync --append {source} {target}",
        "rclone": f"{cut} && rclone cat --offset {have} {source} >> {target}",
        # curl exits 0 on a file that fails to read (7.88, with file://), so check the size.
        "curl": f"{cut} && curl -f -r {have}- {address} >> {target} && test $(stat -c %s {target}) = {total}",
        "tartapefs": f"{cut} && {play} --start {have} >> {target}",
        # If this line exits 0, the upload has all parts, and no others, and can be completed.
        "aws": f"(for n in $(seq {first} {last}); do {play} --start $(((n - 1) * {size})) --length {size} > {part}"
        f" && aws s3api upload-part {upload} --part-number $n --body {part} || exit 1; done)"
        f" && test \"$(aws s3api list-parts {upload} --query '[length(Parts), sum(Parts[].Size)]' --output json"
        f" | tr -d ' \\n')\" = '[{last},{total}]'",
    }
    if have == total:
        hints = {}
        say("nothing is missing")
    else:
        say_if_too_many_parts(size, last)
    if as_json:
        print_json({"have": have, "total_size": total, "part_size": size, "parts": last, "commands": hints})
        return
    for client, line in hints.items():
        click.echo(f"# {client}\n{line}")


def _not_an_option(name: str) -> str:
    """Writes a path so that no program takes it for an option, nor rsync for one on another host."""
    return name if name.startswith(("/", "./", "../")) else f"./{name}"


def _url_path(name: str) -> str:
    from urllib.parse import quote

    return quote(os.fsencode(name))
