"""The commands that mount and unmount an archive."""

import contextlib
import grp
import os
import pwd
import re
from collections.abc import Callable
from typing import Any

import click

from tartapefs.api.tape import Tape
from tartapefs.base.commands import as_path, command
from tartapefs.base.errors import MountError, TapeNotFoundError
from tartapefs.base.naming import ARCHIVE_NAME, part_count, part_name, shard_name
from tartapefs.cli.common import (
    Number,
    additions_option,
    byte_count,
    check_expected,
    check_option,
    expand_name,
    expect_option,
    fail,
    folder_argument,
    index_option,
    name_template,
    octal_mode,
    path,
    recording_options,
    strict_option,
    warn_of_late_changes,
)
from tartapefs.cli.progress import progress
from tartapefs.cli.record import record_folder
from tartapefs.index.shards import shard_starts
from tartapefs.play.engine import Check, TapePlayer

_YEAR = 365 * 86400  # seconds


def _id_of(find: Callable[[str], int]) -> Callable[[str], int]:
    """Makes the type of an option that is a user or group: a number, or a name that `find` looks up."""

    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,10}", text, re.ASCII) and int(text) < 2**32 - 1:  # 2**32 - 1 stands for none
            return int(text)
        try:
            return find(text)
        except KeyError:
            raise click.BadParameter(f"{text!r} is not known on this machine") from None

    return parse


def _check_size(option: str, count: Callable[[], object]) -> None:
    """Has `count` look how many files the value of `option` makes. Raises click.BadParameter if they are too many."""
    try:
        count()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


@click.command()
@folder_argument
@click.argument("mountpoint", metavar="MNT", type=path)
@index_option
@check_option
@additions_option
@strict_option
@expect_option
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground until it is unmounted.")
@click.option(
    "--name",
    type=name_template,
    metavar="NAME",
    default=ARCHIVE_NAME,
    show_default=True,
    help="Name of the archive file; {fingerprint}, {seal} and {root} stand for those of the recording.",
)
@click.option(
    "--part-size", type=byte_count, metavar="BYTES", help="Show parts of this size, NAME.00001 and so on, instead."
)
@click.option(
    "--shard-size",
    type=byte_count,
    metavar="BYTES",
    help="Show archives of at most this size, archive.00001.tar and so on, instead; files whose names"
    " differ only in their extension stay together.",
)
@click.option(
    "--mode",
    type=octal_mode,
    metavar="OCTAL",
    default="0400",
    show_default=True,
    help="Permission bits of the archive.",
)
@click.option(
    "--uid",
    type=_id_of(lambda name: pwd.getpwnam(name).pw_uid),
    metavar="USER",
    help="Owner of the archive, if not you.",
)
@click.option(
    "--gid",
    type=_id_of(lambda name: grp.getgrnam(name).gr_gid),
    metavar="GROUP",
    help="Group of the archive, if not yours.",
)
@click.option("--allow-other", is_flag=True, help="Let other users read it, as --mode permits.")
@click.option("--direct", is_flag=True, help="Go past the kernel's page cache: check the source at each read(2).")
@click.option(
    "--audit-interval",
    metavar="SECONDS",
    type=Number(0.1, _YEAR),
    default=60,
    show_default=True,
    help="How often to check all directories while the archive is open.",
)
@click.option(
    "--audit-share",
    metavar="PERCENT",
    type=Number(0.01, 100),
    default=5,
    show_default=True,
    help="How much of one core these checks may use.",
)
@click.option(
    "--scrub-share",
    metavar="PERCENT",
    type=Number(0, 100),
    default=0,
    show_default=True,
    help="For a tape with digests: verify all contents repeatedly, with this share of one core.",
)
@click.option(
    "--on-drift",
    type=click.Choice(["fail", "hold"]),
    default="fail",
    show_default=True,
    help="What a read does after drift: fail, or, with --direct implied, wait until it is interrupted or unmounted.",
)
@click.option(
    "--on-drift-run",
    metavar="COMMAND",
    type=path,
    help="A line for /bin/sh to run once after drift, which $TARTAPEFS_DRIFT describes.",
)
@click.option("--log", "log_file", metavar="FILE", type=path, help="Log file of the daemon, instead of syslog.")
@click.option("--record", "record_first", is_flag=True, help="Record DIR first if it has no recording.")
@recording_options
def mount(
    directory: str,
    mountpoint: str,
    index: str | None,
    check: Check,
    allow_additions: bool,
    strict: bool,
    expect: str | None,
    foreground: bool,
    name: str,
    part_size: int | None,
    shard_size: int | None,
    mode: int,
    uid: int | None,
    gid: int | None,
    allow_other: bool,
    direct: bool,
    audit_interval: float,
    audit_share: float,
    scrub_share: float,
    on_drift: str,
    on_drift_run: str | None,
    log_file: str | None,
    record_first: bool,
    recording: dict[str, Any],
) -> None:
    """Mount the archive of DIR at MNT.

    Returns once it can be read.
    """
    from tartapefs.mount import daemon
    from tartapefs.mount.operations import MountOptions

    if not foreground:
        daemon.close_inherited()
    try:
        tape = Tape.discover(directory, index)
    except TapeNotFoundError:
        if not record_first:
            raise
        record_folder(directory, index, **recording)
        tape = Tape.discover(directory, index)
    with tape:
        if scrub_share and not tape.seal:
            raise click.UsageError(f'the tape has no digests to scrub by; run "{command("seal")}" first')
        check_expected(tape, expect)
        if part_size is not None and shard_size is not None:
            raise click.UsageError("--part-size and --shard-size exclude each other")
        if part_size is not None:
            expand_name(tape, part_name(name, 1), "--name")
            _check_size("--part-size", lambda: part_count(tape.total_size, part_size))
        if shard_size is not None:
            expand_name(tape, shard_name(name, 1), "--name")
            with progress("laying out", tape.total_size, is_bytes=True) as update:
                _check_size("--shard-size", lambda: shard_starts(tape, shard_size, update))
        options = MountOptions(
            name=expand_name(tape, name, "--name"),
            part_size=part_size,
            shard_size=shard_size,
            mode=mode,
            direct=direct,
            allow_other=allow_other,
            audit_interval=audit_interval,
            audit_share=audit_share / 100,
            uid=uid,
            gid=gid,
            scrub_share=scrub_share / 100,
            holds=on_drift == "hold",
            on_drift_run=on_drift_run,
        )
        log = os.path.abspath(log_file) if log_file else None
        player = TapePlayer(
            tape,
            directory,
            check,
            strict=strict,
            expect=expect and expect.strip().lower(),
            allow_additions=allow_additions,
        )
        if not tape.seal:
            warn_of_late_changes(player.source, tape.one_file_system)
        code = daemon.mount(player, mountpoint, options, foreground, log)
    if code:
        fail("the folder is no longer as recorded", code)


@click.command()
@click.argument("mountpoint", metavar="MNT", type=path)
@click.option("--lazy", is_flag=True, help="Do not wait for programs that still read the archive.")
def unmount(mountpoint: str, lazy: bool) -> None:
    """Unmount the archive at MNT."""
    from tartapefs.mount import mount_table

    entry = mount_table.entry_of(mountpoint)
    try:
        mount_table.unmount(entry, lazy)
    except MountError as error:
        facts: dict[str, Any] = {}
        by_force = command("unmount --lazy", as_path(mountpoint))
        with contextlib.suppress(MountError):
            facts = mount_table.status(entry)
        if held := _processes(facts.get("held")):
            remedy = f'These readers are held by drift, and "{by_force}" ends their reads: {held}'
        elif readers := _processes(facts.get("readers")):
            remedy = f'It is read by {readers}; "{by_force}" lets them read on, and unmounts it when they close it'
        else:
            raise
        raise MountError(mountpoint, f"{error.reason} {remedy}") from None


def _processes(found: object) -> str:
    """The commands and pids of what a status tells; empty if it has only a number of them."""
    return ", ".join(f"{each['command'] or '?'} ({each['pid']})" for each in found) if isinstance(found, list) else ""
