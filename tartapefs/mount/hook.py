"""The program of `mount --on-drift-run`: a mail, a kill, a restart. It is run once, at the first drift.

Rule: only its own thread waits for the program, and the mount does not depend on its result. The program inherits none
of the daemon's descriptors and outlives the daemon. Its environment says what drifted (TARTAPEFS_DRIFT), where
(TARTAPEFS_MOUNTPOINT, TARTAPEFS_SOURCE), and which processes have the archive open (TARTAPEFS_READERS).
"""

import logging
import os
import subprocess
import threading
from collections.abc import Callable
from typing import BinaryIO

from tartapefs.base import processes
from tartapefs.base.text import printable
from tartapefs.mount import sd_notify
from tartapefs.play.engine import TapePlayer

log = logging.getLogger("tartapefs")

_OUTPUT_TAIL = 4096  # bytes at the end of its output, whose last line tells why it failed


class Hook:
    """Runs `command`, a line for /bin/sh, at the first drift of `player`, with the pids that `readers()` returns."""

    def __init__(self, command: str, player: TapePlayer, mountpoint: str, readers: Callable[[], set[int]]) -> None:
        self._command = command
        self._player = player
        self._mountpoint = mountpoint
        self._readers = readers
        self._has_begun = threading.Event()
        processes.start_thread(self._run, name="hook")

    def await_begin(self, seconds: float) -> None:
        """If there was drift, waits until the program runs, at most `seconds`: for a process that is about to end."""
        if self._player.drift is not None:
            self._has_begun.wait(seconds)

    def _run(self) -> None:
        self._player.drifted.wait()
        try:
            # Not a pipe: SIGPIPE would kill a program that writes after the daemon has ended.
            with open(os.memfd_create("output"), "rb") as output:
                self._run_writing_to(output)
        except OSError as error:
            log.error("%s: could not be run: %s", printable(self._command), error.strerror or error)
        finally:
            self._has_begun.set()

    def _run_writing_to(self, output: BinaryIO) -> None:
        process = subprocess.Popen(
            ["/bin/sh", "-c", self._command],
            cwd="/",
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # signals to the daemon's process group do not reach it
        )
        self._has_begun.set()
        log.info("%s: runs, since there is drift", printable(self._command))
        if code := process.wait():
            ending = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
            output.seek(max(0, os.fstat(output.fileno()).st_size - _OUTPUT_TAIL))
            lines = output.read().splitlines()
            log.error("%s: %s%s", printable(self._command), ending, f": {printable(lines[-1])}" if lines else "")

    def _environment(self) -> dict[str, str]:
        return sd_notify.without_variables(os.environ) | {
            "TARTAPEFS_DRIFT": str(self._player.drift),
            "TARTAPEFS_MOUNTPOINT": self._mountpoint,
            "TARTAPEFS_SOURCE": self._player.source.root,
            "TARTAPEFS_READERS": " ".join(
                map(str, sorted(self._readers() - {0}))
            ),  # 0: unknown, which kill(2) takes for the whole process group
        }
