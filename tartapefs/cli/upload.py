"""The command that sends an archive to S3, or to a folder of another machine: upload."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import click

from tartapefs.base.errors import UploadError
from tartapefs.base.text import counted, printable
from tartapefs.cli.common import (
    DRIFT,
    INTERRUPTED,
    additions_option,
    again,
    byte_count,
    check_option,
    folder_argument,
    index_option,
    interruptible,
    json_option,
    key_value,
    path,
    print_json,
    say,
    word,
)
from tartapefs.cli.progress import progress
from tartapefs.play.engine import Check
from tartapefs.transfer import distributed
from tartapefs.transfer.upload_targets import import_needed

_THREADS = 4
_PATIENCE = 10  # seconds, with a scheduler


def _address(text: str) -> str:
    if re.match("(tcp|tls|ucx|ws|wss)://.", text) is None:
        raise click.BadParameter(f"{text!r} is no address of a scheduler, such as tcp://host:8786")
    return text


@click.command()
@folder_argument
@click.argument("url", metavar="URL", type=word)
@index_option
@check_option
@additions_option
@click.option(
    "--part-size",
    type=byte_count,
    metavar="BYTES",
    help="Size of the parts; by default that of the archive that is there, else 64 MiB, or what 10,000 parts need.",
)
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help=f"How many parts to send at once; {_THREADS} by default."
)
@click.option(
    "--scheduler",
    type=_address,
    metavar="ADDRESS",
    help="Send by the workers of this Dask cluster, as tcp://host:8786.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    type=key_value,
    metavar="KEY=VALUE",
    help="An option of boto3's S3 client, or of fsspec's file system; with a capital, of the object, as"
    " StorageClass=STANDARD_IA. Repeatable.",
)
@click.option(
    "--old-index",
    type=path,
    metavar="PATH",
    help='The index of the recording whose archive is there, kept from before "record --force".',
)
@json_option
def upload(
    directory: str,
    url: str,
    index: str | None,
    check: Check,
    allow_additions: bool,
    part_size: int | None,
    threads: int | None,
    scheduler: str | None,
    options: tuple[tuple[str, Any], ...],
    old_index: str | None,
    as_json: bool,
) -> None:
    """Send the archive of DIR to URL, in parts.

    s3://BUCKET/KEY is one object; it takes credentials and endpoint from where the AWS command does (AWS_PROFILE,
    AWS_ENDPOINT_URL). Any other URL of fsspec must end in a slash, and becomes a folder with a file for each part. You
    can interrupt it at any time, in any way, and run it again: it sends what is missing. After "record --append" it
    sends what was added; the store copies the rest.
    """
    if part_size == 0:
        raise click.BadParameter("a part has at least one byte", param_hint="--part-size")
    if threads is not None and scheduler is not None:
        raise click.UsageError('"--threads" are of this machine; the workers of a "--scheduler" have their own')
    go_on = f"what was sent stays there: {again()} goes on from there"
    with _ended_at_once(), interruptible(go_on), ExitStack() as opened:
        update = opened.enter_context(progress("sending", is_bytes=True))
        client = opened.enter_context(_client_of(scheduler)) if scheduler is not None else None
        try:
            done = distributed.upload(
                directory,
                url,
                client,
                threads=threads or _THREADS,
                part_size=part_size,
                index=index,
                old_index=old_index,
                check=check,
                allow_additions=allow_additions,
                storage_options=dict(options),
                on_progress=lambda done, total: update(done, total=total),
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        except UploadError as error:
            error.remedy = error.remedy.replace("run this again", f"run {again()}")
            raise
    if as_json:
        print_json(asdict(done))
    proof = f"ETag {done.etag}" + f"; CRC64NVME {done.crc64nvme}" * bool(done.crc64nvme)
    if done.was_complete:
        say(f"{printable(url)}: has this archive already; nothing was sent; {proof}")
        return
    say(
        f"{printable(url)}: complete; {done.size:,} bytes in {counted(done.parts, 'part')}, {done.sent:,} sent,"
        f" {done.copied:,} taken from the archive that was there; {proof}"
    )


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Has an interruption end the process without waiting for threads that wait for the network."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted")
        os._exit(INTERRUPTED)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else DRIFT)


def _client_of(scheduler: str) -> Any:
    """A Client of Dask's. Raises UploadError if nothing answers."""
    try:
        return import_needed("distributed").Client(scheduler, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UploadError(scheduler, " ".join(str(error).split())) from None
