"""Background threads of the daemon: audits, the scrub, dropping of cached pages, reports to the service manager.

Rule: each runs until the event `ended` is set, and serves no requests. The player keeps the drift that one finds;
`ArchiveFS.errno_of` logs other errors.
"""

import os
import subprocess
import threading

from tartapefs.base.errors import TapeError
from tartapefs.mount import sd_notify
from tartapefs.mount.operations import ArchiveFS, MountOptions
from tartapefs.mount.session import Session
from tartapefs.play.engine import FOOTER_AUDIT_AGE, TapePlayer

_SCRUB_PAUSE = 60.0  # seconds between two scrubs
_STATE_INTERVAL = 2.0  # seconds between two checks whether the state has changed


def audit(
    player: TapePlayer, archive: ArchiveFS, options: MountOptions, ended: threading.Event, audited: threading.Event
) -> None:
    """Audits the source at once, then at intervals while any program has the archive open; ends at the first drift.

    `audited`: set once the first audit has ended, or the caller waits for it no longer. Until then it does not pause.
    """
    while player.drift is None:
        try:
            player.audit(options.audit_share, lambda seconds: audited.is_set() and ended.wait(seconds))
        except (TapeError, OSError) as error:
            archive.errno_of(error)
        audited.set()
        while True:
            if ended.wait(options.audit_interval):
                return
            if archive.is_open:
                break


def drop_pages(player: TapePlayer, session: Session, ended: threading.Event) -> None:
    """Drops the kernel's cached pages at drift: programs that opened the archive before would go on to read them."""
    player.drifted.wait()
    session.drop_pages(ended)


def drop_footers(session: Session, ended: threading.Event) -> None:
    """Drops the footer from the kernel's page cache soon after it got there, so that no reader gets it much later.

    The kernel reads it ahead while a program may be far from it: what an audit found then must not be old news.
    """
    while not ended.is_set():
        session.footer_cached.wait()
        session.footer_cached.clear()
        if ended.wait(FOOTER_AUDIT_AGE):
            return
        session.drop_footer(ended)


def scrub(player: TapePlayer, archive: ArchiveFS, share: float, ended: threading.Event) -> None:
    """Reads all contents again and again until there is drift; pauses a minute after each pass."""
    while not ended.is_set() and player.drift is None:
        try:
            player.scrub(share, ended.wait)
        except (TapeError, OSError) as error:
            archive.errno_of(error)
        ended.wait(_SCRUB_PAUSE)


def state_line(player: TapePlayer, archive: ArchiveFS) -> str:
    """The state in one line: how much has been delivered, or the drift."""
    if player.drift is not None:
        held = len(archive.hold.reads()) if archive.hold else 0
        return f"invalid: {player.drift}" + (f"; {held} held by that" if held else "")
    delivered, coverage, _ = archive.statistics.snapshot()
    return f"valid; delivered {delivered:,} bytes, {100 * coverage.size // player.tape.total_size}% of the archive"


def report_state(player: TapePlayer, archive: ArchiveFS, ended: threading.Event) -> None:
    """Tells the service manager the state each time it has changed."""
    reported = ""
    while True:
        state = state_line(player, archive)
        if state != reported:
            sd_notify.send(f"STATUS={state}")
            reported = state
        if ended.wait(_STATE_INTERVAL):
            return


def feed_watchdog(where: str, ended: threading.Event) -> None:
    """Feeds the service manager's watchdog as long as requests are answered."""
    limit = sd_notify.watchdog()
    while limit and not ended.wait(limit / 2):
        if not failure_of(where):
            sd_notify.send("WATCHDOG=1")


def failure_of(path: str) -> str:
    """Why a file of this process' own mount cannot be read; empty if it can.

    Another process stats it: a process that waits for its own answer cannot be killed until there is one.
    """
    try:
        result = subprocess.run(
            ["stat", "--", path],
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    except FileNotFoundError:
        return "the program stat is not installed"
    except OSError as error:
        return f"stat could not be run: {error.strerror}"
    said = result.stderr.decode(errors="replace").strip()
    return "" if result.returncode == 0 else said.rpartition(": ")[2] or "stat failed"
