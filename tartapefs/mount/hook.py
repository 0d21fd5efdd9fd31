"""The program of `mount --on-drift-run`: a mail, a kill, a restart. It is run once, at the first drift.

Rule: only a thread of its own waits for it, and the mount stays whatever becomes of it. It has no descriptor of the
daemon's, goes on when the daemon ends, and learns from its environment what drifted (TARTAPEFS_DRIFT), where
(TARTAPEFS_MOUNTPOINT, TARTAPEFS_SOURCE), and which processes have the archive open (TARTAPEFS_READERS).
"""

import logging
import os
import subprocess
import threading
from collections.abc import Callable
from typing import BinaryIO

from tartapefs.base import forked_work
from tartapefs.base.text import printable
from tartapefs.mount import sd_notify
from tartapefs.play.engine import TapePlayer

log = logging.getLogger("tartapefs")

_LAST = 4096  # bytes of what it says, the last line of which tells why it failed


class Hook:
    """Runs `command`, a line for /bin/sh, once `player` finds the first drift; it gets the numbers of `readers()`."""

    def __init__(self, command: str, player: TapePlayer, mountpoint: str, readers: Callable[[], set[int]]) -> None:
        self._command = command
        self._player = player
        self._mountpoint = mountpoint
        self._readers = readers
        self._has_begun = threading.Event()
        forked_work.thread(self._run, name="hook")

    def await_begin(self, seconds: float) -> None:
        """Returns once the program runs, if there was drift, or after so long: for a process that is about to end."""
        if self._player.drift is not None:
            self._has_begun.wait(seconds)

    def _run(self) -> None:
        self._player.drifted.wait()
        try:
            # Not a pipe, which would end what goes on to write after the daemon's end.
            with open(os.memfd_create("said"), "rb") as said:
                self._run_with(said)
        except OSError as error:
            log.error("%s: could not be run: %s", printable(self._command), error.strerror or error)
        finally:
            self._has_begun.set()

    def _run_with(self, said: BinaryIO) -> None:
        process = subprocess.Popen(
            ["/bin/sh", "-c", self._command],
            cwd="/",
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # a signal to the daemon's group is not for it
        )
        self._has_begun.set()
        log.info("%s: runs, since there is drift", printable(self._command))
        if code := process.wait():
            ending = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
            said.seek(max(0, os.fstat(said.fileno()).st_size - _LAST))
            lines = said.read().splitlines()
            log.error("%s: %s%s", printable(self._command), ending, f": {printable(lines[-1])}" if lines else "")

    def _environment(self) -> dict[str, str]:
        return sd_notify.silenced(os.environ) | {
            "TARTAPEFS_DRIFT": str(self._player.drift),
            "TARTAPEFS_MOUNTPOINT": self._mountpoint,
            "TARTAPEFS_SOURCE": self._player.source.root,
            "TARTAPEFS_READERS": " ".join(map(str, sorted(self._readers() - {0}))),  # 0: not known; for kill, all of us
        }
