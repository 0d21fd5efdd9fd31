"""Messages to the service manager: sd_notify(3), the watchdog, and levels in the journal.

Rule: without a service manager nothing is sent, and no function fails: a manager that does not listen must not end the
daemon. The protocol is a datagram of lines, which systemd promises to keep. Of the libraries for it, sdnotify has seen
no change since 2017, and systemd-python and cysystemd need the C library for these few lines.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Mapping

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")

# From <syslog.h>, for the levels of logging.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


def is_enabled() -> bool:
    """Whether a service manager wants messages."""
    return "NOTIFY_SOCKET" in os.environ


def send(*assignments: str) -> None:
    """Sends lines such as `READY=1` or `STATUS=...` to the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        name = "\0" + address[1:] if address.startswith("@") else address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(os.fsencode(name))
            manager.send("\n".join(assignments).encode(errors="backslashreplace"))


def disable() -> None:
    """Sends nothing from now on: for a process that the service started, and that is not the service."""
    for name in _VARIABLES:
        os.environ.pop(name, None)


def without_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that must not send messages."""
    return {name: value for name, value in environment.items() if name not in _VARIABLES}


def watchdog() -> float | None:
    """The seconds within which this process must send the next `WATCHDOG=1`; None without a watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
        with contextlib.suppress(ValueError):
            return int(os.environ.get("WATCHDOG_USEC", "")) / 1e6 or None
    return None


def to_journal() -> bool:
    """Whether standard error goes to the journal: JOURNAL_STREAM of systemd.exec(5).

    The variable alone does not tell: a program with another standard error inherits it, too.
    """
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def with_level(text: str, level: int) -> str:
    """`text`, each line with the prefix of sd-daemon(3) that tells the journal its level, one of logging's.

    >>> with_level("first\\nsecond", logging.ERROR)
    '<3>first\\n<3>second'
    """
    priority = next(priority for least, priority in _PRIORITIES if level >= least)
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


class JournalFormatter(logging.Formatter):
    """For a log that goes to standard error, and from there to the journal, which adds program, process and time."""

    def format(self, record: logging.LogRecord) -> str:
        return with_level(super().format(record), record.levelno)
