"""The daemon: the life of the process that serves an archive, from the mount to the unmount.

Rule: `mount` returns once the archive can be read, or raises the reason why it cannot. The daemon ends when any program
unmounts the archive, and unmounts it itself at SIGTERM, SIGINT or SIGHUP.
"""

import contextlib
import logging
import logging.handlers
import mmap
import os
import select
import signal
import stat
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from tartapefs.base import commands, outputs, processes, signals
from tartapefs.base.errors import MountError
from tartapefs.base.tape_files import default_index, refuse_part
from tartapefs.base.text import printable
from tartapefs.mount import background, read_ahead, sd_notify
from tartapefs.mount import status as reports
from tartapefs.mount.hook import Hook
from tartapefs.mount.libfuse import load
from tartapefs.mount.mount_table import MountEntry, check_mountpoint, entries_at, mounts, unmount_own
from tartapefs.mount.operations import ArchiveFS, MountOptions
from tartapefs.mount.session import MEMORY, Session
from tartapefs.play.audit import files_of
from tartapefs.play.engine import TapePlayer

log = logging.getLogger("tartapefs")

_THREADS = 4  # that serve requests; most of their time is system time, which two cores share well
_SPARE_DESCRIPTORS = 16  # that a daemon may need in addition to those of the tape
_FIRST_AUDIT = 2.0  # seconds that the first audit gets before the caller learns that the archive can be read
_GRACE = 1.0  # seconds that requests in progress get to end after the unmount
_READY, _ENDED = b"R", b"E"


def close_inherited() -> None:
    """Closes all inherited descriptors except 0, 1 and 2: a daemon would hold them for good.

    Call it before anything else is opened.
    """
    processes.close_all_but(0, 1, 2)


def mount(player: TapePlayer, mountpoint: str, options: MountOptions, foreground: bool, log_file: str | None) -> int:
    """Mounts the archive; returns an exit code: 0, or 1 if the source had drifted by the time it was unmounted.

    In the background it returns 0 once the archive can be read. A folder found to have drifted in the first seconds is
    mounted, too, with a warning in the log. Raises MountError.
    """
    try:
        return _mount(player, mountpoint, options, foreground, log_file)
    except MountError:
        raise
    except OSError as error:
        name = f"{printable(error.filename)}: " if error.filename else ""
        raise MountError(mountpoint, f"could not be mounted: {name}{error.strerror or error}") from None


def _mount(player: TapePlayer, mountpoint: str, options: MountOptions, foreground: bool, log_file: str | None) -> int:
    where = check_mountpoint(mountpoint, player.source.root)
    try:
        load()
    except ImportError as error:
        raise MountError(mountpoint, str(error)) from None
    # A log that cannot be written, or a machine that has none, is no reason for a traceback on standard error.
    logging.raiseExceptions = False
    # Until the archive can be read, the command line's own handler gets the same lines.
    log.handlers[:] = [_log_handler(player, log_file, foreground)]
    if foreground:
        return _serve(player, where, options, lambda: sd_notify.send("READY=1"))
    result_in, result_out = os.pipe()
    child = processes.fork()
    if child == 0:
        os.close(result_in)
        _run_daemon(player, where, options, result_out)
    os.close(result_out)
    with open(result_in, "rb") as pipe:
        answer = pipe.read()
    if answer == _READY:
        return 0
    os.waitpid(child, 0)
    # A daemon that could start no process could not unmount either.
    unmount_own(entries_at(where))
    raise MountError(mountpoint, answer.decode() or "the daemon ended before the archive could be read")


def _run_daemon(player: TapePlayer, where: str, options: MountOptions, result_out: int) -> NoReturn:
    """Serves in the child, and ends it. Errors go to the parent until the archive can be read, then to the log."""
    is_reported = False
    sd_notify.disable()  # the service manager, if any, waits for the caller, not for this process

    def ready() -> None:
        nonlocal is_reported
        os.setsid()  # not before: an automount point lets the process group that mounts pass, and all others wait
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.close(null)
        os.write(result_out, _READY)
        os.close(result_out)
        is_reported = True

    code = 1
    try:
        code = _serve(player, where, options, ready)
    except (MountError, OSError, MemoryError) as error:
        if is_reported:
            log.error("%s: %s", printable(where), _reason(error))
        else:
            os.write(result_out, _reason(error).encode())
    except BaseException as error:
        if not is_reported:
            os.write(result_out, repr(error).encode())
        log.exception("the daemon ended")
    finally:
        logging.shutdown()
        os._exit(code)  # skips the parent's exit handlers, and does not wait for a thread that a reader holds


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
    """Returns the log's handler: for the file, if one is named; else for standard error or, in the background, syslog.

    Raises OutputError for a file that is part of a tape.
    """
    if log_file is not None:
        try:
            if os.path.exists(log_file) and stat.S_ISFIFO(os.stat(log_file).st_mode):  # an open would wait for a reader
                raise MountError(log_file, "cannot be the log: is a pipe")
            if (fd := outputs.open_device(log_file)) is None:
                refuse_part(log_file, files_of(player.tape, player.source, player.at_home))
                fd = outputs.open_existing(log_file, os.O_WRONLY | os.O_APPEND, create=True)
        except OSError as error:
            raise MountError(log_file, f"cannot be the log: {error.strerror}") from None
        to_file = logging.StreamHandler(os.fdopen(fd, "a", encoding="utf-8", errors="backslashreplace"))
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        return to_file
    if foreground:
        return logging.NullHandler()  # the command line's own goes to standard error
    to_syslog = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
    to_syslog.ident = "tartapefs: "
    return to_syslog


def _serve(player: TapePlayer, where: str, options: MountOptions, on_ready: Callable[[], None]) -> int:
    """Serves the archive from this process until it is unmounted or a signal arrives.

    Raises MountError if mounting, serving or the unmount at the end fails, and OSError if the system lacks a resource.
    """
    root, index = player.source.root, player.tape.index_path
    commands.given(root, None if index == default_index(root) else index)  # as they are called from any folder
    # Resources are claimed before anything is mounted.
    memory = mmap.mmap(-1, _THREADS * MEMORY)
    _check_descriptors()
    if len(os.sched_getaffinity(0)) > 1:
        player.fork_helper(memory)
    unmount_error: MountError | None = None
    wakeup_in, wakeup_out = os.pipe()
    os.set_blocking(wakeup_out, False)
    old_wakeup = signal.set_wakeup_fd(wakeup_out, warn_on_full_buffer=False)
    old_handlers = {number: signal.signal(number, lambda *_: None) for number in signals.ENDING}
    try:
        archive = ArchiveFS(player, options)
        session = Session(archive, where, player.source.root, options)
        entries = entries_at(where)[-1:]
        ended, audited = threading.Event(), threading.Event()
        server = None
        threads: list[threading.Thread] = []
        failures: list[BaseException] = []
        hook: Hook | None = None
        try:
            if options.on_drift_run:
                hook = Hook(options.on_drift_run, player, where, archive.reading_processes)
            for at in range(0, len(memory), MEMORY):
                part = memoryview(memory)[at : at + MEMORY]
                threads.append(processes.start_thread(_loop, session, part, wakeup_out, failures))
            _check_readable(os.path.join(where, archive.files.name_of(0)))
            if options.uses_page_cache:
                _enlarge_read_ahead(entries)
            server = _status_server(entries, lambda: _report(player, archive, options, entries[0].device))
            processes.start_thread(background.audit, player, archive, options, ended, audited)
            processes.start_thread(background.drop_pages, player, session, ended)
            processes.start_thread(background.drop_footers, session, ended)
            if archive.hold is not None:
                devices = {entry.device for entry in entries}
                processes.start_thread(
                    archive.hold.watch, lambda: any(entry.device in devices for entry in mounts()), ended
                )
            if options.scrub_share:
                processes.start_thread(background.scrub, player, archive, options.scrub_share, ended)
            if sd_notify.is_enabled():
                processes.start_thread(background.report_state, player, archive, ended)
                processes.start_thread(background.feed_watchdog, where, ended)
            audited.wait(_FIRST_AUDIT)
            audited.set()
            if player.drift is not None:
                becomes = "fails" if archive.hold is None else "waits"
                log.warning("%s: mounted, but no longer as recorded: every read %s", printable(where), becomes)
            if select.select([wakeup_in], [], [], 0)[0]:
                raise MountError(where, _reason(failures[0]) if failures else "ended before it could be read")
            on_ready()
            log.info("%s: mounted", printable(where))
            os.read(wakeup_in, 1)  # until a signal arrives, or a thread finds the archive unmounted
            if failures:
                raise MountError(where, f"not served any more: {_reason(failures[0])}")
        finally:
            sd_notify.send("STOPPING=1", f"STATUS={background.state_line(player, archive)}")
            ended.set()
            if archive.hold is not None:
                archive.hold.end()
            if server is not None:
                server.close()
            session.drop_no_more(_GRACE)
            session.end(_GRACE)
            unmount_error = unmount_own(entries)
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
        # The pipe stays open: a thread that a reader still holds will write to its descriptor.
    if unmount_error is not None:
        raise unmount_error
    log.info("%s: unmounted", printable(where))
    return 1 if player.drift is not None else 0


def _check_descriptors() -> None:
    """Raises OSError unless there are enough free descriptors to serve, and to unmount at the end."""
    with contextlib.ExitStack() as stack:
        for _ in range(_SPARE_DESCRIPTORS):
            stack.enter_context(open(os.devnull, "rb", buffering=0))


def _status_server(entries: list[MountEntry], report: Callable[[], dict[str, Any]]) -> reports.Server | None:
    try:
        return reports.Server(entries[0].device, report) if entries else None
    except OSError as error:  # the extended attributes tell most of it
        log.warning("no socket for `tartapefs status`: %s", error.strerror or error)
        return None


def _report(player: TapePlayer, archive: ArchiveFS, options: MountOptions, device: str) -> dict[str, Any]:
    ahead = read_ahead.current(device) if options.uses_page_cache else 0
    return reports.document(player, archive.files, archive.statistics, archive.hold, device, ahead)


def _enlarge_read_ahead(entries: list[MountEntry]) -> None:
    for entry in entries:
        size = read_ahead.enlarge(entry.device)
        if size is not None and size < read_ahead.ENOUGH:
            where, kib = printable(entry.mountpoint), size >> 10
            log.info("%s: the kernel reads ahead %d KiB; root can have it read more", where, kib)


def _check_readable(archive: str) -> None:
    if reason := background.failure_of(archive):
        raise MountError(archive, f"mounted, but cannot be read: {reason}")


def _loop(session: Session, memory: memoryview, wakeup_out: int, failures: list[BaseException]) -> None:
    try:
        session.loop(memory)
    except BaseException as error:
        failures.append(error)
    finally:
        with contextlib.suppress(OSError):  # the pipe is full or closed: the end is known already
            os.write(wakeup_out, _ENDED)
