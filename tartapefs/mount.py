"""Mounting and unmounting: the life of the process that serves an archive.

Rule: whoever called returns once the archive can be read, or with the reason why it cannot. The daemon ends when the
archive is unmounted, by whomever, and unmounts it when it is told to end (SIGTERM, SIGINT, SIGHUP).
"""

import contextlib
import errno
import logging
import logging.handlers
import mmap
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from tartapefs import apart, binding, notify, signals
from tartapefs import status as reports
from tartapefs.display import printable
from tartapefs.errors import MountError, TapeError
from tartapefs.fs import XATTRS, ArchiveFS, MountOptions
from tartapefs.hook import Hook
from tartapefs.player import TapePlayer

log = logging.getLogger("tartapefs")

_TYPE = "fuse.tartapefs"
_THREADS = 4  # requests served at once; most of their time is the system's, which two cores share well
_ENDS_WITHIN = 5.0  # seconds that a daemon gets to end, once it is unmounted
_GRACE = 1.0  # seconds that requests under way get to end after the unmount
_SCRUB_PAUSE = 60.0  # seconds between two scrubs
_STATE_INTERVAL = 2.0  # seconds between two looks at what the service manager should be told
_READY, _ENDED = b"R", b"E"


class MountEntry(NamedTuple):
    device: str  # major:minor, which no other mount has meanwhile
    mountpoint: str
    source: str
    owner: int  # the user who mounted it


def mounts() -> list[MountEntry]:
    """The archives mounted where this process can see them, from /proc/self/mountinfo (see proc(5))."""
    entries = []
    # The kernel escapes space, tab, newline and backslash, and no other end of a line that Python knows.
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            fstype, source, options = after.rstrip("\n").split(" ")[:3]
            if fstype == _TYPE:
                _, _, device, _, mountpoint = before.split(" ")[:5]
                owner = next(int(o[8:]) for o in options.split(",") if o.startswith("user_id="))
                entries.append(MountEntry(device, _unescaped(mountpoint), _unescaped(source), owner))
    return entries


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda digits: chr(int(digits[1], 8)), field)


def unmount(mountpoint: str, lazy: bool = False) -> None:
    """Unmounts the archive at `mountpoint`; `lazy` lets programs that read it go on until they close it.

    Else it returns once the daemon has ended, so that the source can be unmounted next, unless that takes long. Raises
    MountError where no archive is mounted there, and with what the system's own program said.
    """
    where = _mounted_at(mountpoint)
    with contextlib.ExitStack() as stack:
        daemon = None if lazy else _daemon_of(where, stack)
        _unmount(where, lazy)
        if daemon is not None:
            apart.await_end(daemon, _ENDS_WITHIN)


def _daemon_of(where: str, stack: contextlib.ExitStack) -> int | None:
    """A descriptor of the process that serves this mount, where it is ours and tells of itself."""
    entry = next(entry for entry in reversed(mounts()) if entry.mountpoint == where)
    if entry.owner == os.geteuid():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            process = os.pidfd_open((reports.ask(entry.device) or {})["pid"])
            stack.callback(os.close, process)
            return process
    return None


def _unmount(where: str, lazy: bool) -> None:
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), where]
    else:
        program = next(filter(shutil.which, ("fusermount3", "fusermount")), "fusermount3")
        command = [program, "-u", *(["-z"] if lazy else []), where]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise MountError(where, f"{command[0]} is not installed; install the package fuse3") from None
    if result.returncode:
        raise MountError(where, "; ".join(result.stderr.split("\n")[:-1]) or f"{command[0]} failed")


def status(mountpoint: str) -> dict[str, Any]:
    """What the archive mounted at `mountpoint` says of itself: `status.document`, and its `mountpoint`.

    From a daemon whose socket is not in reach, only what its extended attributes tell. Raises MountError where no
    archive is mounted, or its daemon does not answer.
    """
    where = _mounted_at(mountpoint)
    return _report(next(entry for entry in reversed(mounts()) if entry.mountpoint == where))


def statuses() -> list[dict[str, Any]]:
    """`status` of each archive that is mounted; where it is not to be had, a `state` of "unknown: " and why."""
    found = []
    for entry in mounts():
        try:
            found.append(_report(entry))
        except MountError as error:
            if entry in mounts():  # and not unmounted meanwhile
                found.append(_known(entry) | {"state": f"unknown: {error.reason}"})
    return found


def _known(entry: MountEntry) -> dict[str, Any]:
    return {"mountpoint": entry.mountpoint, "owner": entry.owner, "source": printable(entry.source)}


def _report(entry: MountEntry) -> dict[str, Any]:
    try:
        # Nobody else is in reach of the socket.
        found = reports.ask(entry.device) if entry.owner == os.geteuid() else None
        if found is None and not (found := _attributes(entry.mountpoint)):
            raise MountError(entry.mountpoint, "it was unmounted meanwhile")
        return _known(entry) | found
    except OSError as error:
        raise MountError(entry.mountpoint, f"its daemon does not answer: {error.strerror or error}") from None
    except ValueError as error:
        raise MountError(entry.mountpoint, f"its daemon does not answer well: {error}") from None


def _attributes(mountpoint: str) -> dict[str, str | int]:
    names = [name for name in sorted(os.listxattr(mountpoint)) if name.startswith(XATTRS)]
    values = {name.removeprefix(XATTRS): os.getxattr(mountpoint, name).decode() for name in names}
    return {
        name: int(value) if value.isdecimal() and name not in ("fingerprint", "name", "seal") else value
        for name, value in values.items()
    }


def _mounted_at(mountpoint: str) -> str:
    known = {entry.mountpoint for entry in mounts()}
    # By its folder first: to look at the mount point itself is to ask a daemon that may not answer any more.
    folder, name = os.path.split(os.path.abspath(mountpoint))
    where = os.path.join(os.path.realpath(folder), name)
    if where in known or (where := os.path.realpath(mountpoint)) in known:
        return where
    raise MountError(mountpoint, "no archive of tartapefs is mounted here")


def _check_mountpoint(mountpoint: str, source: str) -> str:
    where = os.path.realpath(mountpoint)
    hidden: list[str] = []
    try:
        if not os.path.isdir(where) and os.stat(where):
            raise MountError(mountpoint, "is not a folder")
        hidden = os.listdir(where)
    except FileNotFoundError:
        raise MountError(mountpoint, "no such folder") from None
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise MountError(mountpoint, error.strerror or "cannot be used") from None
        unmount(where, lazy=True)  # left behind by a daemon that was killed
        log.warning("%s: was left behind by a daemon that is gone; unmounted it", printable(mountpoint))
    if any(entry.mountpoint == where for entry in mounts()):
        raise MountError(mountpoint, "an archive is mounted here already")
    if os.path.commonpath((where, source)) == source:
        raise MountError(mountpoint, "lies inside the recorded folder, which the mount would change")
    if hidden:  # libfuse 2 would say so as well, libfuse 3 not
        raise MountError(mountpoint, "is not empty")
    return where


def close_inherited() -> None:
    """Closes what the caller of this program had open beyond the standard three: a daemon would hold it for good.

    To be called before anything else is opened.
    """
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def mount(player: TapePlayer, mountpoint: str, options: MountOptions, foreground: bool, log_file: str | None) -> int:
    """Mounts the archive; returns an exit code: 0, or 1 if the source had drifted by the time it was unmounted.

    In the background it returns 0 once the archive can be read. Raises MountError.
    """
    where = _check_mountpoint(mountpoint, player.source.root)
    try:
        binding.load()
    except ImportError as error:
        raise MountError(mountpoint, str(error)) from None
    handler = _log_handler(log_file, foreground)
    if foreground:
        log.handlers[:] = [handler]
        return _serve(player, where, options, lambda: notify.send("READY=1"))
    ready, tell = os.pipe()
    child = apart.fork()
    if child == 0:
        os.close(ready)
        _be_daemon(player, where, options, tell, handler)
    os.close(tell)
    with open(ready, "rb") as answer:
        said = answer.read()
    if said == _READY:
        return 0
    os.waitpid(child, 0)
    raise MountError(mountpoint, said.decode() or "the daemon ended before the archive could be read")


def _be_daemon(player: TapePlayer, where: str, options: MountOptions, tell: int, handler: logging.Handler) -> NoReturn:
    """The rest of the child's life. Its errors go to the parent until the archive can be read, then to the log."""
    told = False
    notify.silence()  # the service, if any, is the caller's: it waits for the caller, and not for this process

    def ready() -> None:
        nonlocal told
        os.setsid()  # not before: by its process group an automount point tells who mounts from who has to wait
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.close(null)
        log.handlers[:] = [handler]
        os.write(tell, _READY)
        os.close(tell)
        told = True

    code = 1
    try:
        code = _serve(player, where, options, ready)
    except MountError as error:
        if told:
            log.error("%s", error)
        else:
            os.write(tell, error.reason.encode())
    except BaseException as error:
        if not told:
            os.write(tell, repr(error).encode())
        log.exception("the daemon ended")
    finally:
        logging.shutdown()
        os._exit(code)  # not the parent's exit handlers, and not waiting for a reader that holds a thread


def _log_handler(log_file: str | None, foreground: bool) -> logging.Handler:
    """Where the log goes: the file, if there is one; else standard error or, once that is gone, the system's log."""
    if log_file is not None:
        try:
            to_file = logging.FileHandler(log_file)
        except OSError as error:
            raise MountError(log_file, f"cannot be the log: {error.strerror}") from None
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        return to_file
    if foreground:
        return logging.NullHandler()  # the command line's own goes to standard error
    try:
        to_syslog = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
    except OSError:
        return logging.NullHandler()
    to_syslog.ident = "tartapefs: "
    return to_syslog


def _serve(player: TapePlayer, where: str, options: MountOptions, on_ready: Callable[[], None]) -> int:
    """Serves the archive from this process until it is unmounted or a signal says so.

    Raises MountError where it could not be mounted, or not be unmounted at the end.
    """
    memory = mmap.mmap(-1, _THREADS * binding.ANSWER)
    if len(os.sched_getaffinity(0)) > 1:
        player.fork_helper(memory)
    left: MountError | None = None
    hear, speak = os.pipe()
    os.set_blocking(speak, False)
    old_wakeup = signal.set_wakeup_fd(speak, warn_on_full_buffer=False)
    old_handlers = {number: signal.signal(number, lambda *_: None) for number in signals.ENDING}
    try:
        archive = ArchiveFS(player, options)
        session = binding.Session(archive, where, player.source.root, options)
        ours = [entry for entry in mounts() if entry.mountpoint == where][-1:]
        ended = threading.Event()
        server = None
        threads = []
        hook = Hook(options.on_drift_run, player, where, archive.reading_processes) if options.on_drift_run else None
        try:
            for at in range(0, len(memory), binding.ANSWER):
                threads.append(_start(_loop, session, memoryview(memory)[at : at + binding.ANSWER], speak))
            _check_readable(os.path.join(where, options.name))
            server = _report_server(
                ours, lambda: reports.document(player, options.name, archive.activity, archive.hold)
            )
            on_ready()
            _start(_audit, player, archive, options, ended)
            _start(_drop_pages, player, session, ended)
            if archive.hold is not None:
                _start(archive.hold.watch, lambda: bool(set(ours) & set(mounts())), ended)
            if options.scrub_share:
                _start(_scrub, player, archive, options.scrub_share, ended)
            if notify.is_heard():
                _start(_tell_state, player, archive, ended)
                _start(_tell_watchdog, where, ended)
            log.info("%s: mounted", printable(where))
            os.read(hear, 1)  # until a signal comes, or the first thread finds that the archive is unmounted
        finally:
            notify.send("STOPPING=1", f"STATUS={_state(player, archive)}")
            ended.set()
            if archive.hold is not None:
                archive.hold.end()
            if server is not None:
                server.close()
            session.drop_no_more(_GRACE)
            left = _unmount_at_end(ours)
            for thread in threads:
                thread.join(_GRACE / len(threads))
            archive.ended = True
            player.end_helper()
            if hook is not None:
                hook.await_begin(_GRACE)
    finally:
        signal.set_wakeup_fd(old_wakeup)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        # The pipe stays: a thread that a reader still holds will write to it, and must not write to another file.
    if left is not None:
        raise left
    log.info("%s: unmounted", printable(where))
    return 1 if player.drift is not None else 0


def _report_server(ours: list[MountEntry], report: Callable[[], dict[str, Any]]) -> reports.Server | None:
    try:
        return reports.Server(ours[0].device, report) if ours else None
    except OSError as error:  # the extended attributes tell most of it
        log.warning("no socket for `tartapefs status`: %s", error.strerror or error)
        return None


def _audit(player: TapePlayer, archive: ArchiveFS, options: MountOptions, ended: threading.Event) -> None:
    """Audits the source at once, and then now and then while anybody has the archive open; ends at the first drift."""
    while player.drift is None:
        try:
            player.audit(options.audit_share)
        except (TapeError, OSError) as error:
            archive.errno_of(error)
        while True:
            if ended.wait(options.audit_interval):
                return
            if archive.is_open:
                break


def _drop_pages(player: TapePlayer, session: binding.Session, ended: threading.Event) -> None:
    """Ends what the kernel's cache would go on to give to programs that opened the archive before the drift."""
    player.drifted.wait()
    session.drop_pages(ended)


def _scrub(player: TapePlayer, archive: ArchiveFS, share: float, ended: threading.Event) -> None:
    """Reads all contents, again and again, until something is not as recorded; rests a minute after each time."""
    while not ended.is_set() and player.drift is None:
        try:
            player.scrub(share, ended.wait)
        except (TapeError, OSError) as error:
            archive.errno_of(error)
        ended.wait(_SCRUB_PAUSE)


def _state(player: TapePlayer, archive: ArchiveFS) -> str:
    """In a line: how much has been delivered, or what is not as recorded."""
    if player.drift is not None:
        held = len(archive.hold.reads()) if archive.hold else 0
        return f"invalid: {player.drift}" + (f"; {held} held by that" if held else "")
    delivered, coverage, _ = archive.activity.so_far()
    return f"valid; delivered {delivered:,} bytes, {100 * coverage.size // player.tape.total_size}% of the archive"


def _tell_state(player: TapePlayer, archive: ArchiveFS, ended: threading.Event) -> None:
    """Tells the service manager the state, each time that it has changed."""
    told = ""
    while True:
        state = _state(player, archive)
        if state != told:
            notify.send(f"STATUS={state}")
            told = state
        if ended.wait(_STATE_INTERVAL):
            return


def _tell_watchdog(where: str, ended: threading.Event) -> None:
    """Tells the service manager that requests are answered, as long as they are."""
    limit = notify.watchdog()
    while limit and not ended.wait(limit / 2):
        if not _failing(where):
            notify.send("WATCHDOG=1")


def _check_readable(archive: str) -> None:
    if reason := _failing(archive):
        raise MountError(archive, f"mounted, but cannot be read: {reason}")


def _failing(path: str) -> str:
    """What is wrong with a file of this process' own mount; empty if nothing is.

    Another process looks at it: one that waits for an answer of its own cannot be killed while none comes.
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
    said = result.stderr.decode(errors="replace").strip()
    return "" if result.returncode == 0 else said.rpartition(": ")[2] or "stat failed"


def _start(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _loop(session: binding.Session, memory: memoryview, speak: int) -> None:
    try:
        session.loop(memory)
    finally:
        with contextlib.suppress(OSError):  # the pipe is full or closed: the end is known already
            os.write(speak, _ENDED)


def _unmount_at_end(ours: list[MountEntry]) -> MountError | None:
    """Unmounts what this process mounted, unless somebody did already; another mount may be in its place by now.

    Returns why it could not, if it is still there.
    """
    for entry in ours:
        if entry in mounts():
            try:
                _unmount(entry.mountpoint, lazy=True)  # a reader that never closes the archive must not keep the daemon
            except MountError as error:
                if entry in mounts():
                    return error
    return None
