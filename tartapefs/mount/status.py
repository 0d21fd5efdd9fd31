"""The status of a mount: a JSON document on a Unix socket, sent once for each connection, which then ends.

Rule: a client costs the daemon at most a second of a thread that serves only the status. The daemon reads nothing from
a client, hangs up on another user, and gives up a client that does not read.

There is a socket for each mount, named by the number of the mount's device (`0-57`), which no other mount has
meanwhile, in a folder that only its owner can write: /run/tartapefs for root, else $XDG_RUNTIME_DIR/tartapefs, or one
in /tmp if that cannot be used. The folder is opened first, then checked, and only its descriptor is used: nobody can
put another in its place, and its path may have any length. A socket gets its name once it listens: one that refuses
connections was left behind by a daemon that is gone, and the process that meets it removes it.

`FORMAT` is 1; added keys do not change it. Strings in the document are as `text.printable` returns them.
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
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tartapefs.api.files import Files
from tartapefs.base import processes
from tartapefs.base.errors import TapeError
from tartapefs.base.processes import command_of, positions_in
from tartapefs.base.text import moment, printable
from tartapefs.index.recording import Recording
from tartapefs.mount.hold import HeldRead, Hold
from tartapefs.mount.read_statistics import ReaderProgress, ReadStatistics
from tartapefs.play.engine import TapePlayer

log = logging.getLogger("tartapefs")

FORMAT = 1
_CLIENT_TIMEOUT = 1.0  # seconds that a client may take; others wait in the socket's backlog
_ANSWER_TIMEOUT = 5.0  # seconds that a daemon may take, which may serve a slow client or two first
_MAX_READERS = 1000  # in a document: the latest


def facts(player: TapePlayer, files: Files, at: int | None = None) -> dict[str, str | int]:
    """The tape, its archive's name, and its `state`: "valid", or "invalid: " and the drift.

    And its parts or shards, if it has any; or, of the one `at`, its name and the range of the archive that it has.
    """
    of_parts: dict[str, str | int] = {}
    if files.is_split:
        of_parts = {"parts": files.count}
        of_parts |= {"part_size": files.part_size} if files.part_size else {"shard_size": files.shard_size or 0}
        if at is not None:
            of_parts = {"start": files.extent(at).start, "stop": files.extent(at).stop}
    return {
        "state": "valid" if player.drift is None else f"invalid: {player.drift}",
        "name": printable(files.name if at is None else files.name_of(at)),
        **of_parts,
        "source": printable(player.source.root),
        "fingerprint": player.tape.fingerprint,
        **({"seal": player.tape.seal} if player.tape.seal else {}),
        "members": player.tape.member_count,
        "recorded": moment(player.tape.recorded_ns),
    }


def summary(player: TapePlayer, statistics: ReadStatistics, hold: Hold | None = None) -> dict[str, str | int]:
    """What has been delivered, in a few numbers: bytes, except for the counts `readers` and `held`, and `pid`."""
    delivered, coverage, readers = statistics.snapshot()
    return {
        "pid": os.getpid(),
        "size": player.tape.total_size,
        "delivered": delivered,
        "covered": coverage.size,
        "readers": len(readers),
        "position": _latest(readers).last.position if readers else 0,
        **({"held": len(hold.reads())} if hold else {}),
    }


def document(
    player: TapePlayer,
    files: Files,
    statistics: ReadStatistics,
    hold: Hold | None = None,
    device: str | None = None,
    read_ahead: int | None = 0,
) -> dict[str, Any]:
    """The whole status of a mount. Times are in seconds, rates in bytes a second, other numbers in bytes or counts.

    `device`: of the mount. `read_ahead`: that of the kernel, in bytes; None if unknown.
    """
    delivered, coverage, readers = statistics.snapshot()
    now, tape = time.monotonic(), player.tape
    shown = readers[-_MAX_READERS:]
    reached = _reached(shown, device, files) if device else {}
    return {
        "format": FORMAT,
        **facts(player, files),
        "pid": os.getpid(),
        "size": tape.total_size,
        "delivered": delivered,
        "coverage": {"size": coverage.size, "unsure": coverage.unsure, "ranges": coverage.ranges},
        "position": _latest(readers).last.position if readers else None,
        "member": _member_at(tape, _latest(readers).last.position) if readers else None,
        "rate": round(sum(reader.rate(now) for reader in readers)),
        "read_ahead": read_ahead,
        **({"additions": _additions(player)} if player.inspector.additions.count else {}),
        **({"scrub": player.scrubbed._asdict()} if player.scrubbed != (0, 0) else {}),
        "readers": [_reader(reader, files, tape, now, reached.get((reader.pid, reader.part))) for reader in shown],
        **({"held": [_held_read(read, tape, now) for read in hold.reads()[:_MAX_READERS]]} if hold else {}),
    }


def _additions(player: TapePlayer) -> dict[str, Any]:
    additions = player.inspector.additions
    return {"count": additions.count, "paths": [printable(os.fsdecode(path)) for path in additions.paths]}


def _latest(readers: list[ReaderProgress]) -> ReaderProgress:
    return max(readers, key=lambda reader: reader.last.when)


def _reached(readers: list[ReaderProgress], device: str, files: Files) -> dict[tuple[int, int], int]:
    """The positions up to which processes have read, by pid and part, as their descriptors tell it.

    A process that has a part open more than once is left out: nothing tells which reader has which descriptor.
    """
    opened = Counter((reader.pid, reader.part) for reader in readers)
    once = [(pid, part) for (pid, part), times in opened.items() if pid and times == 1]
    positions = {(pid, part): positions_in(pid, device, files.inode(part)) for pid, part in once}
    extents = {key: files.extent(key[1]) for key in positions}
    return {key: extents[key].locate(found[0], 0)[0] for key, found in positions.items() if len(found) == 1}


def _reader(reader: ReaderProgress, files: Files, tape: Recording, now: float, reached: int | None) -> dict[str, Any]:
    seconds_left = reader.seconds_left(now, files.extent(reader.part).stop)
    return {
        "pid": reader.pid,
        "command": _command(reader.pid),
        **({"part": printable(files.name_of(reader.part))} if files.is_split else {}),
        "delivered": reader.last.delivered,
        "position": reader.last.position,
        "reached": reached,
        "member": _member_at(tape, reader.last.position),
        "rate": round(reader.rate(now)),
        "seconds_left": None if seconds_left is None else round(seconds_left, 1),
    }


def _held_read(read: HeldRead, tape: Recording, now: float) -> dict[str, Any]:
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
    """The path of the member whose byte a reader at `position` reads next."""
    try:
        member = tape.member_at(position) if position < tape.total_size else None
    except TapeError:
        return None
    return printable(member.arc_path) if member else None


# Sockets


def _socket_folders(make: bool = False) -> Iterator[int]:
    """Descriptors of this user's folders for sockets, the preferred first, each closed after its turn."""
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


def _connect(path: str, timeout: float) -> socket.socket | None:
    """A connection to the daemon at this socket; if the daemon is gone, removes its socket and returns None."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(timeout)
        client.connect(path)
    except ConnectionRefusedError:
        client.close()
        with contextlib.suppress(OSError):
            os.unlink(path)
        return None
    except BaseException:
        client.close()
        raise
    return client


def _socket_path(folder: int, name: str) -> str:
    return f"/proc/self/fd/{folder}/{name}"


def _name(device: str) -> str:
    return device.replace(":", "-")


def ask(device: str) -> dict[str, Any] | None:
    """The document of the mount whose device has this number (`major:minor`), and that this user has mounted.

    None if it has no socket. Raises OSError if nobody answers in time, and ValueError for a bad answer.
    """
    for folder in _socket_folders():
        with contextlib.suppress(FileNotFoundError):
            client = _connect(_socket_path(folder, _name(device)), _ANSWER_TIMEOUT)
            if client is not None:
                with client, client.makefile("rb") as answer:
                    found = json.loads(answer.read())
                if not isinstance(found, dict) or found.get("format") != FORMAT:
                    raise ValueError("it is of another version")
                return found
    return None


class Server:
    """Sends `report()` to each client of this user. Raises OSError if it can have no socket."""

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
            self._thread = processes.start_thread(self._serve, name="status")
        except BaseException:
            self._remove()
            raise

    def _listen(self) -> int:
        """Makes the socket, removes those of killed daemons, and returns a descriptor of their folder."""
        for folder in _socket_folders(make=True):
            for name in filter(re.compile(r"[0-9]+-[0-9]+").fullmatch, os.listdir(folder)):
                with contextlib.suppress(OSError):  # a daemon that is busy is alive
                    if client := _connect(_socket_path(folder, name), timeout=0):
                        client.close()
            unnamed = _socket_path(folder, f".{os.getpid()}")
            self._listening.bind(unnamed)
            os.chmod(unnamed, 0o600)
            self._listening.listen()
            self._inode = os.stat(unnamed).st_ino
            os.rename(unnamed, _socket_path(folder, self._name))
            return os.dup(folder)
        raise PermissionError(0, "there is no folder for it that only this user can write")

    def close(self) -> None:
        """Ends it, and removes its socket, unless another mount has one of that name by now."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # which wakes up `accept`
        self._thread.join(_CLIENT_TIMEOUT)
        self._remove()

    def _remove(self) -> None:
        path = _socket_path(self._folder, self._name)
        with contextlib.suppress(OSError):
            if os.lstat(path).st_ino == self._inode:
                os.unlink(path)
        os.close(self._folder)
        self._listening.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listening.accept()
            except OSError:  # no descriptor is free, which may change
                self._ended.wait(_CLIENT_TIMEOUT / 10)
                continue
            try:
                with client:
                    self._answer(client)
            except OSError:
                pass  # the client hung up, or reads nothing
            except Exception:
                log.exception("a defect in tartapefs; no status was given")

    def _answer(self, client: socket.socket) -> None:
        _, user, _ = struct.unpack("iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.geteuid():
            client.settimeout(_CLIENT_TIMEOUT)  # for all of `sendall`
            client.sendall(json.dumps(self._report()).encode())
