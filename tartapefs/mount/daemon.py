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
import select
import shutil
import signal
import stat
import subprocess
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from tartapefs.base import forked_work, outputs, processes, signals
from tartapefs.base.errors import MountError, TapeError
from tartapefs.base.tape_files import refuse_part
from tartapefs.base.text import printable
from tartapefs.mount import sd_notify
from tartapefs.mount import status as reports
from tartapefs.mount.hook import Hook
from tartapefs.mount.operations import XATTRS, ArchiveFS, MountOptions
from tartapefs.mount.session import MEMORY, Session, load
from tartapefs.play.audit import files_of
from tartapefs.play.engine import TapePlayer

log = logging.getLogger("tartapefs")

_TYPE = "fuse.tartapefs"
_THREADS = 4  # requests served at once; most of their time is the system's, which two cores share well
_ENDS_SOON, _ENDS_WITHIN = 0.5, 5.0  # seconds in which a daemon ends, once it is unmounted: most of them, and any
_ROOM = 16  # descriptors that a daemon may need besides those of the tape
_FIRST_LOOK = 2.0  # seconds that the first audit gets before the caller is told that the archive can be read
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
    MountError where no archive is mounted there, and with what the system's own program said. A daemon that goes on,
    since it is mounted in some other place too, is logged with that place.
    """
    entry = _mounted_at(mountpoint)
    pid = None if lazy else _daemon_of(entry)
    with contextlib.ExitStack() as stack:
        daemon = None
        if pid is not None:
            with contextlib.suppress(OSError):
                daemon = os.pidfd_open(pid)
                stack.callback(os.close, daemon)
        _unmount(entry, lazy)
        if daemon is None or forked_work.await_end(daemon, _ENDS_SOON):
            return
        place = _other_place(entry.device)
        if place is None and forked_work.await_end(daemon, _ENDS_WITHIN - _ENDS_SOON):
            return
    why = f"it is still mounted {place}" if place else "it takes longer than usual"
    log.warning(
        "%s: unmounted here, but its daemon, process %d, has the source in use until it ends: %s",
        printable(entry.mountpoint),
        pid,
        why,
    )


def _daemon_of(entry: MountEntry) -> int | None:
    """The process that serves this mount, where it is ours and tells of itself."""
    if entry.owner == os.geteuid():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int((reports.ask(entry.device) or {})["pid"])
    return None


def _other_place(device: str) -> str | None:
    """Where else the file system of this device is mounted, as far as this user may see: here, or in a namespace."""
    for entry in mounts():
        if entry.device == device:
            return f"at {printable(entry.mountpoint)}"
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{process}/mountinfo", "rb") as lines:
            if any(line.split(b" ", 3)[2] == device.encode() for line in lines):
                name = printable(processes.command_of(int(process)) or "?")
                return f"in the mount namespace of process {process} ({name})"
    return None


def _unmount(entry: MountEntry, lazy: bool) -> None:
    """Unmounts it; nothing is wrong if somebody else has done so meanwhile."""
    try:
        _run_umount(entry.mountpoint, lazy)
    except MountError:
        if entry in mounts():
            raise


def _run_umount(where: str, lazy: bool) -> None:
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
    return _report(_mounted_at(mountpoint))


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


def _mounted_at(mountpoint: str) -> MountEntry:
    known = {entry.mountpoint: entry for entry in mounts()}  # of several at one place the last, which is on top
    # By its folder first: to look at the mount point itself is to ask a daemon that may not answer any more.
    folder, name = os.path.split(os.path.abspath(mountpoint))
    where = os.path.join(os.path.realpath(folder), name)
    if where in known or (where := os.path.realpath(mountpoint)) in known:
        return known[where]
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
        left = [entry for entry in mounts() if entry.mountpoint == where]
        if error.errno != errno.ENOTCONN or not left:
            raise MountError(mountpoint, error.strerror or "cannot be used") from None
        _unmount(left[-1], lazy=True)
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
    forked_work.close_all_but(0, 1, 2)


def mount(player: TapePlayer, mountpoint: str, options: MountOptions, foreground: bool, log_file: str | None) -> int:
    """Mounts the archive; returns an exit code: 0, or 1 if the source had drifted by the time it was unmounted.

    In the background it returns 0 once the archive can be read. A folder that has drifted, as far as the first seconds
    tell, is mounted, and logged. Raises MountError.
    """
    try:
        return _mount(player, mountpoint, options, foreground, log_file)
    except MountError:
        raise
    except OSError as error:
        name = f"{printable(error.filename)}: " if error.filename else ""
        raise MountError(mountpoint, f"could not be mounted: {name}{error.strerror or error}") from None


def _mount(player: TapePlayer, mountpoint: str, options: MountOptions, foreground: bool, log_file: str | None) -> int:
    where = _check_mountpoint(mountpoint, player.source.root)
    try:
        load()
    except ImportError as error:
        raise MountError(mountpoint, str(error)) from None
    log.handlers[:] = [
        _log_handler(player, log_file, foreground)
    ]  # what comes before the archive can be read goes to both
    if foreground:
        return _serve(player, where, options, lambda: sd_notify.send("READY=1"))
    ready, tell = os.pipe()
    child = forked_work.fork()
    if child == 0:
        os.close(ready)
        _be_daemon(player, where, options, tell)
    os.close(tell)
    with open(ready, "rb") as answer:
        said = answer.read()
    if said == _READY:
        return 0
    os.waitpid(child, 0)
    # What the daemon may not have had the means for, when it failed for want of processes.
    _unmount_at_end([entry for entry in mounts() if entry.mountpoint == where])
    raise MountError(mountpoint, said.decode() or "the daemon ended before the archive could be read")


def _be_daemon(player: TapePlayer, where: str, options: MountOptions, tell: int) -> NoReturn:
    """The rest of the child's life. Its errors go to the parent until the archive can be read, then to the log."""
    told = False
    sd_notify.silence()  # the service, if any, is the caller's: it waits for the caller, and not for this process

    def ready() -> None:
        nonlocal told
        os.setsid()  # not before: by its process group an automount point tells who mounts from who has to wait
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.close(null)
        os.write(tell, _READY)
        os.close(tell)
        told = True

    code = 1
    try:
        code = _serve(player, where, options, ready)
    except (MountError, OSError, MemoryError) as error:
        if told:
            log.error("%s: %s", printable(where), _reason(error))
        else:
            os.write(tell, _reason(error).encode())
    except BaseException as error:
        if not told:
            os.write(tell, repr(error).encode())
        log.exception("the daemon ended")
    finally:
        logging.shutdown()
        os._exit(code)  # not the parent's exit handlers, and not waiting for a reader that holds a thread


def _reason(error: BaseException) -> str:
    match error:
        case MountError():
            return error.reason
        case MemoryError():
            return "there is not enough memory"
        case OSError():
            return error.strerror or str(error)
        case _:
            return repr(error)


def _log_handler(player: TapePlayer, log_file: str | None, foreground: bool) -> logging.Handler:
    """Where the log goes: the file, if there is one; else standard error or, once that is gone, the system's log.

    Raises OutputError for a file that is part of a tape.
    """
    if log_file is not None:
        try:
            if os.path.exists(log_file) and stat.S_ISFIFO(os.stat(log_file).st_mode):  # which nobody may be reading
                raise MountError(log_file, "cannot be the log: is a pipe")
            if (fd := outputs.descriptor(log_file)) is None:
                refuse_part(log_file, files_of(player.tape, player.source, player.at_home))
                fd = outputs.going_on(log_file, os.O_WRONLY | os.O_APPEND, create=True)
        except OSError as error:
            raise MountError(log_file, f"cannot be the log: {error.strerror}") from None
        to_file = logging.StreamHandler(os.fdopen(fd, "a", encoding="utf-8", errors="backslashreplace"))
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

    Raises MountError where it could not be mounted, not be served any more, or not be unmounted at the end, and OSError
    where the system has not enough of something.
    """
    # What it needs is there, or nothing is mounted.
    memory = mmap.mmap(-1, _THREADS * MEMORY)
    _check_room()
    if len(os.sched_getaffinity(0)) > 1:
        player.fork_helper(memory)
    left: MountError | None = None
    hear, speak = os.pipe()
    os.set_blocking(speak, False)
    old_wakeup = signal.set_wakeup_fd(speak, warn_on_full_buffer=False)
    old_handlers = {number: signal.signal(number, lambda *_: None) for number in signals.ENDING}
    try:
        archive = ArchiveFS(player, options)
        session = Session(archive, where, player.source.root, options)
        ours = [entry for entry in mounts() if entry.mountpoint == where][-1:]
        ended, looked = threading.Event(), threading.Event()
        server = None
        threads: list[threading.Thread] = []
        failures: list[BaseException] = []
        hook: Hook | None = None
        try:
            if options.on_drift_run:
                hook = Hook(options.on_drift_run, player, where, archive.reading_processes)
            for at in range(0, len(memory), MEMORY):
                part = memoryview(memory)[at : at + MEMORY]
                threads.append(forked_work.thread(_loop, session, part, speak, failures))
            _check_readable(os.path.join(where, options.name))
            server = _report_server(
                ours, lambda: reports.document(player, options.name, archive.activity, archive.hold)
            )
            forked_work.thread(_audit, player, archive, options, ended, looked)
            forked_work.thread(_drop_pages, player, session, ended)
            if archive.hold is not None:
                devices = {entry.device for entry in ours}
                forked_work.thread(
                    archive.hold.watch, lambda: any(entry.device in devices for entry in mounts()), ended
                )
            if options.scrub_share:
                forked_work.thread(_scrub, player, archive, options.scrub_share, ended)
            if sd_notify.is_heard():
                forked_work.thread(_tell_state, player, archive, ended)
                forked_work.thread(_tell_watchdog, where, ended)
            looked.wait(_FIRST_LOOK)
            looked.set()
            if player.drift is not None:
                becomes = "fails" if archive.hold is None else "waits"
                log.warning("%s: mounted, but no longer as recorded: every read %s", printable(where), becomes)
            if select.select([hear], [], [], 0)[0]:
                raise MountError(where, _reason(failures[0]) if failures else "ended before it could be read")
            on_ready()
            log.info("%s: mounted", printable(where))
            os.read(hear, 1)  # until a signal comes, or the first thread finds that the archive is unmounted
            if failures:
                raise MountError(where, f"not served any more: {_reason(failures[0])}")
        finally:
            sd_notify.send("STOPPING=1", f"STATUS={_state(player, archive)}")
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


def _check_room() -> None:
    """Raises OSError unless there may be as many descriptors more as are needed to serve, and to unmount at the end."""
    with contextlib.ExitStack() as stack:
        for _ in range(_ROOM):
            stack.enter_context(open(os.devnull, "rb", buffering=0))


def _report_server(ours: list[MountEntry], report: Callable[[], dict[str, Any]]) -> reports.Server | None:
    try:
        return reports.Server(ours[0].device, report) if ours else None
    except OSError as error:  # the extended attributes tell most of it
        log.warning("no socket for `tartapefs status`: %s", error.strerror or error)
        return None


def _audit(
    player: TapePlayer, archive: ArchiveFS, options: MountOptions, ended: threading.Event, looked: threading.Event
) -> None:
    """Audits the source at once, and then now and then while anybody has the archive open; ends at the first drift.

    `looked`: the first audit has ended, or need not be waited for. Until then it takes no rest.
    """
    while player.drift is None:
        try:
            player.audit(options.audit_share, lambda seconds: looked.is_set() and ended.wait(seconds))
        except (TapeError, OSError) as error:
            archive.errno_of(error)
        looked.set()
        while True:
            if ended.wait(options.audit_interval):
                return
            if archive.is_open:
                break


def _drop_pages(player: TapePlayer, session: Session, ended: threading.Event) -> None:
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
            sd_notify.send(f"STATUS={state}")
            told = state
        if ended.wait(_STATE_INTERVAL):
            return


def _tell_watchdog(where: str, ended: threading.Event) -> None:
    """Tells the service manager that requests are answered, as long as they are."""
    limit = sd_notify.watchdog()
    while limit and not ended.wait(limit / 2):
        if not _failing(where):
            sd_notify.send("WATCHDOG=1")


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
    except OSError as error:
        return f"stat could not be run: {error.strerror}"
    said = result.stderr.decode(errors="replace").strip()
    return "" if result.returncode == 0 else said.rpartition(": ")[2] or "stat failed"


def _loop(session: Session, memory: memoryview, speak: int, failures: list[BaseException]) -> None:
    try:
        session.loop(memory)
    except BaseException as error:
        failures.append(error)
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
                _unmount(entry, lazy=True)  # a reader that never closes the archive must not keep the daemon
            except MountError as error:
                return error
    return None
