"""What a mount says of itself: a JSON document on a Unix socket, one document for each connection, then its end.

Rule: nothing that a client does costs the daemon more than a second of one thread that does nothing else. Nothing is
read from a client; one that is another user is hung up on, one that does not take what it gets is given up.

There is a socket for each mount, named by the number of the mount's device (`0-57`), which no other mount has
meanwhile, in a folder that only its owner can write: /run/tartapefs for root, else $XDG_RUNTIME_DIR/tartapefs, or one
in /tmp where that cannot be. The folder is opened first and then looked at, and all goes through its descriptor: nobody
can put another in its place, and its path may be of any length. A socket gets its name once it listens: one that
refuses was left behind by a daemon that is gone, and whoever meets it removes it.

`FORMAT` is 1; what is added to the document leaves it as it is. Strings in it are as `display.printable` has them.
"""

import contextlib
import json
import logging
import os
import re
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tartapefs.base import forked_work
from tartapefs.base.errors import TapeError
from tartapefs.base.processes import command_of
from tartapefs.base.text import moment, printable
from tartapefs.index.recording import Recording
from tartapefs.mount.hold import HeldRead, Hold
from tartapefs.mount.read_statistics import Activity, Reader
from tartapefs.play.engine import TapePlayer

log = logging.getLogger("tartapefs")

FORMAT = 1
_PATIENCE = 1.0  # seconds that a client may take; those that wait meanwhile wait in the socket's backlog
_ANSWER_WITHIN = 5.0  # seconds that a daemon may take, which may have a slow client or two before this one
_MAX_READERS = 1000  # in a document: the latest


def facts(player: TapePlayer, name: str) -> dict[str, str | int]:
    """The tape, its archive's name, and whether it is still as recorded: `state` is "valid", or "invalid: " and why."""
    return {
        "state": "valid" if player.drift is None else f"invalid: {player.drift}",
        "name": printable(name),
        "source": printable(player.source.root),
        "fingerprint": player.tape.fingerprint,
        **({"seal": player.tape.seal} if player.tape.seal else {}),
        "members": player.tape.member_count,
        "recorded": moment(player.tape.recorded_ns),
    }


def in_short(player: TapePlayer, activity: Activity, hold: Hold | None = None) -> dict[str, str | int]:
    """What has been delivered, in a few numbers: bytes, unless they are counts."""
    delivered, coverage, readers = activity.so_far()
    return {
        "pid": os.getpid(),
        "size": player.tape.total_size,
        "delivered": delivered,
        "covered": coverage.size,
        "readers": len(readers),
        "position": _latest(readers).last.position if readers else 0,
        **({"held": len(hold.reads())} if hold else {}),
    }


def document(player: TapePlayer, name: str, activity: Activity, hold: Hold | None = None) -> dict[str, Any]:
    """All that is known of a mount. Times in seconds, rates in bytes a second, all else in bytes unless it counts."""
    delivered, coverage, readers = activity.so_far()
    now, tape = time.monotonic(), player.tape
    return {
        "format": FORMAT,
        **facts(player, name),
        "pid": os.getpid(),
        "size": tape.total_size,
        "delivered": delivered,
        "coverage": {"size": coverage.size, "unsure": coverage.unsure, "ranges": coverage.ranges},
        "position": _latest(readers).last.position if readers else None,
        "member": _member_at(tape, _latest(readers).last.position) if readers else None,
        "rate": round(sum(reader.rate(now) for reader in readers)),
        **({"scrub": player.scrubbed._asdict()} if player.scrubbed != (0, 0) else {}),
        "readers": [_reader(reader, tape, now) for reader in readers[-_MAX_READERS:]],
        **({"held": [_held(read, tape, now) for read in hold.reads()[:_MAX_READERS]]} if hold else {}),
    }


def _latest(readers: list[Reader]) -> Reader:
    return max(readers, key=lambda reader: reader.last.when)


def _reader(reader: Reader, tape: Recording, now: float) -> dict[str, Any]:
    seconds_left = reader.seconds_left(now, tape.total_size)
    return {
        "pid": reader.pid,
        "command": _command(reader.pid),
        "delivered": reader.last.delivered,
        "position": reader.last.position,
        "member": _member_at(tape, reader.last.position),
        "rate": round(reader.rate(now)),
        "seconds_left": None if seconds_left is None else round(seconds_left, 1),
    }


def _held(read: HeldRead, tape: Recording, now: float) -> dict[str, Any]:
    return {
        "pid": read.pid,
        "command": _command(read.pid),
        "position": read.offset,
        "size": read.size,
        "member": _member_at(tape, read.offset),
        "seconds": round(now - read.since, 1),
    }


def _command(pid: int) -> str | None:
    name = command_of(pid)
    return None if name is None else printable(name)


def _member_at(tape: Recording, position: int) -> str | None:
    """The member that a reader at `position` is in: the one whose byte it reads next."""
    try:
        member = tape.member_at(position) if position < tape.total_size else None
    except TapeError:
        return None
    return printable(member.arc_path) if member else None


# Sockets


def _folders(make: bool = False) -> Iterator[int]:
    """Descriptors of the folders of this user where sockets may lie, the best first, each closed after its turn."""
    user, runtime = os.geteuid(), os.environ.get("XDG_RUNTIME_DIR", "")
    in_run = "/run" if user == 0 else runtime if os.path.isabs(runtime) else f"/run/user/{user}"
    for path in (f"{in_run}/tartapefs", f"/tmp/tartapefs-{user}"):
        with contextlib.suppress(OSError):
            if make and not os.path.lexists(path):
                os.mkdir(path, 0o700)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(fd)
                if found.st_uid == user and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    yield fd
            finally:
                os.close(fd)


def _connected(place: str, patience: float) -> socket.socket | None:
    """A connection to the daemon behind the socket at `place`; None if it is gone, and then its socket goes too."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(patience)
        client.connect(place)
    except ConnectionRefusedError:
        client.close()
        with contextlib.suppress(OSError):
            os.unlink(place)
        return None
    except BaseException:
        client.close()
        raise
    return client


def _place(folder: int, name: str) -> str:
    return f"/proc/self/fd/{folder}/{name}"


def _name(device: str) -> str:
    return device.replace(":", "-")


def ask(device: str) -> dict[str, Any] | None:
    """The document of the mount whose device has this number (`major:minor`), and that this user has mounted.

    None where it has no socket. Raises OSError where nobody answers in time, and ValueError for a bad answer.
    """
    for folder in _folders():
        with contextlib.suppress(FileNotFoundError):
            client = _connected(_place(folder, _name(device)), _ANSWER_WITHIN)
            if client is not None:
                with client, client.makefile("rb") as answer:
                    found = json.loads(answer.read())
                if not isinstance(found, dict) or found.get("format") != FORMAT:
                    raise ValueError("it is of another version")
                return found
    return None


class Server:
    """Gives `report()` to whoever connects and is this user. Raises OSError where it can have no socket."""

    def __init__(self, device: str, report: Callable[[], dict[str, Any]]) -> None:
        self._report = report
        self._name = _name(device)
        self._ended = threading.Event()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._folder = self._listen()
        except BaseException:
            self._listening.close()
            raise
        try:
            self._thread = forked_work.thread(self._serve, name="status")
        except BaseException:
            self._remove()
            raise

    def _listen(self) -> int:
        """Makes the socket, and removes those of daemons that were killed; a descriptor of their folder."""
        for folder in _folders(make=True):
            for name in filter(re.compile(r"[0-9]+-[0-9]+").fullmatch, os.listdir(folder)):
                with contextlib.suppress(OSError):  # whoever is busy is alive
                    if client := _connected(_place(folder, name), patience=0):
                        client.close()
            unnamed = _place(folder, f".{os.getpid()}")
            self._listening.bind(unnamed)
            os.chmod(unnamed, 0o600)
            self._listening.listen()
            self._inode = os.stat(unnamed).st_ino
            os.rename(unnamed, _place(folder, self._name))
            return os.dup(folder)
        raise PermissionError(0, "there is no folder for it that only this user can write")

    def close(self) -> None:
        """Ends it, and removes its socket, unless another mount's is in its place by now."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # which wakes up `accept`
        self._thread.join(_PATIENCE)
        self._remove()

    def _remove(self) -> None:
        place = _place(self._folder, self._name)
        with contextlib.suppress(OSError):
            if os.lstat(place).st_ino == self._inode:
                os.unlink(place)
        os.close(self._folder)
        self._listening.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listening.accept()
            except OSError:  # no descriptor is left, which may change
                self._ended.wait(_PATIENCE / 10)
                continue
            try:
                with client:
                    self._answer(client)
            except OSError:
                pass  # it went away, or takes nothing
            except Exception:
                log.exception("a defect in tartapefs; no status was given")

    def _answer(self, client: socket.socket) -> None:
        _, user, _ = struct.unpack("iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.geteuid():
            client.settimeout(_PATIENCE)  # for all of `sendall`
            client.sendall(json.dumps(self._report()).encode())
