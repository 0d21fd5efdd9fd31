"""The bindings to libfuse: 2 through fusepy, or 3 through its fork mfusepy. Nothing else knows which is used.

Whichever libfuse is installed mounts. If both are, 2 does, or 3 if 2 is refused the mount point.

Rule: each request is answered by `ArchiveFS`, or with the errno that it gives for what was raised; neither module's own
treatment of exceptions is ever reached (mfusepy's answers EINVAL, and ends the process at a SystemExit).

Of the modules we use the C structures and the conversion of arguments. Their `FUSE` calls libfuse's `fuse_main_real`,
whose threads Python does not know, so that each callback makes and unmakes a thread state. `connect` stops short of
that: it only mounts, and threads of Python's take the requests from the kernel (`Session`). The kernel is told to ask
for 1 MiB at a time, since libfuse 2 would have it ask for 128 KiB; and to have up to 64 requests of the page cache in
progress, since beyond the 9 of libfuse it would leave gaps in what it reads ahead.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tartapefs.base.distribution import install_fuse
from tartapefs.base.errors import MountError
from tartapefs.base.text import printable
from tartapefs.mount import kernel_abi
from tartapefs.mount.operations import IO_SIZE, ArchiveFS, MountOptions

LARGEST_REQUEST = IO_SIZE + mmap.PAGESIZE  # bytes: what libfuse 3 allows a write to have, and its head
_IN_PROGRESS = 64  # requests of the page cache, for all readers: 64 MiB
_READ_AHEAD = 64 << 20  # bytes: more than anybody sets for a mount, so that the answer to INIT lowers nothing
_SHORTEST_INIT_ANSWER = 16 + 24  # bytes: of libfuse 2, its header included
_AUTO_INVAL_DATA = 1 << 12  # libfuse 3's FUSE_CAP_AUTO_INVAL_DATA
_OPERATIONS = ("getattr", "open", "release", "statfs", "getxattr", "listxattr")


def _fusepy() -> Any:
    with _library_chosen("libfuse.so.2") as found:
        if not found:
            raise ImportError("libfuse 2 is not installed")
        try:
            import fuse
        except Exception as error:  # a foreign module may raise anything
            raise ImportError(f"fusepy cannot be imported ({error}): pip install fusepy") from None
    if not hasattr(fuse, "fuse_operations"):
        raise ImportError(
            f"the module {printable(str(fuse.__file__))} is not fusepy's but of another package, such as "
            "Debian's python3-fuse: pip install fusepy in a virtual environment without that one"
        )
    return fuse


def _mfusepy() -> Any:
    with _library_chosen("libfuse3.so.4", "libfuse3.so.3") as found:
        if not found:
            raise ImportError(f"libfuse 3 is not installed: {install_fuse()}")
        try:
            import mfusepy
        except Exception as error:
            raise ImportError(f"mfusepy cannot be imported ({error}): pip install mfusepy") from None
    _fuse_new(mfusepy._libfuse)
    return mfusepy


def _fuse_new(libfuse: Any) -> Any:
    """`fuse_new` of libfuse 3; from 3.17 on, a lookup at run time finds it only as `fuse_new_31`.

    Raises ImportError if there is neither.
    """
    for name in ("fuse_new_31", "fuse_new"):
        if hasattr(libfuse, name):
            return getattr(libfuse, name)
    raise ImportError(f"{printable(libfuse._name)} has no function fuse_new")


@contextlib.contextmanager
def _library_chosen(*names: str) -> Iterator[bool]:
    """Has a module imported meanwhile use the first of these libraries that is installed; yields whether one is."""
    before = os.environ.get("FUSE_LIBRARY_PATH")
    for name in names:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            os.environ["FUSE_LIBRARY_PATH"] = name
            break
    else:
        yield False
        return
    try:
        yield True
    finally:
        del os.environ["FUSE_LIBRARY_PATH"]
        if before is not None:
            os.environ["FUSE_LIBRARY_PATH"] = before


_BINDINGS = {"fusepy": _fusepy, "mfusepy": _mfusepy}


def _modules() -> Iterator[Any]:
    """The modules that can be used, fusepy first; `TARTAPEFS_BINDING` chooses one.

    Raises ImportError if there is none, with a line that says what to install.
    """
    chosen = os.environ.get("TARTAPEFS_BINDING")
    reasons, found = [], False
    for name, imported in _BINDINGS.items():
        if chosen in (None, "", name):
            try:
                module = imported()
            except ImportError as error:
                reasons.append(str(error))
            else:
                found = True
                yield module
    if not found:
        raise ImportError("; ".join(reasons) or f"TARTAPEFS_BINDING is neither {' nor '.join(_BINDINGS)}")


@functools.cache
def load() -> Any:
    """The module that mounts first. Raises ImportError with a line that says what to install."""
    return next(_modules())


@dataclass(frozen=True, slots=True)
class Connection:
    """The connection of a mounted archive to the kernel.

    `device`: the descriptor of /dev/fuse. `process(address, length)` has libfuse answer the request in this memory.
    `callbacks`: the table that libfuse calls, kept for as long as it may.
    """

    device: int
    process: Callable[[int, int], None]
    callbacks: Any


def connect(archive: ArchiveFS, mountpoint: str, source: str, options: MountOptions) -> Connection:
    """Mounts the archive by the first library that can.

    Raises MountError, with what the first one said, if none can, and ImportError as `load` does.
    """
    text = ",".join(_fuse_options(source, options))
    refusals = []
    for module in _modules():
        with _stderr_captured() as said:
            connection = _connect_by(module, archive, os.fsencode(mountpoint), text, not options.uses_page_cache)
        if connection is not None:
            return connection
        refusals.append("; ".join(said()) or "libfuse could not mount it")
    raise MountError(mountpoint, f'{refusals[0]}; "tartapefs doctor" finds what this machine lacks')


def _connect_by(module: Any, archive: ArchiveFS, mountpoint: bytes, options: str, direct: bool) -> Connection | None:
    """Mounts by this module; None if its library cannot. `direct`: past the page cache."""
    libfuse = module._libfuse
    is_3 = getattr(module, "fuse_version_major", 2) == 3
    archive.caller = lambda: int(module.fuse_get_context()[2])
    callbacks = _callbacks(module, archive, is_3, direct)
    if is_3:
        fuse = ctypes.c_void_p(_mount_3(libfuse, callbacks, mountpoint, options))
    else:
        fuse = ctypes.c_void_p(_mount_2(libfuse, callbacks, mountpoint, options + ",direct_io" * direct))
    if not fuse:
        return None
    device, process = (_device_3 if is_3 else _device_2)(libfuse, fuse)
    return Connection(device, process, callbacks)


def _callbacks(module: Any, archive: ArchiveFS, is_3: bool, direct: bool) -> Any:
    """The table of callbacks: the module's conversion of arguments, our operations and our errors."""
    operations = module.fuse_operations()
    types = dict(field[:2] for field in module.fuse_operations._fields_)
    # Not by its own __init__: that one returns only after the mount has ended.
    converting = module.FUSE.__new__(module.FUSE)
    converting.operations = archive if is_3 else lambda name, *rest: getattr(archive, name)(*rest)
    converting.encoding, converting.errors = "latin-1", "strict"
    converting.raw_fi, converting.use_ns = False, True
    for name in _OPERATIONS:
        convert = getattr(converting, name + "_fuse_3", None) or getattr(converting, name)
        setattr(operations, name, types[name](_answering(convert, archive)))

    def readdir(path: bytes, buffer: int, fill: Any, offset: int, *_: Any) -> None:
        """By offsets, which fusepy does not pass on: libfuse would keep all names of a folder that is open."""
        for name, inode, mode, following in archive.readdir(offset):
            entry = module.c_stat(st_ino=inode, st_mode=mode)
            if fill(buffer, name, entry, following, *[0] * is_3):
                break

    operations.readdir = types["readdir"](_answering(readdir, archive))

    def configure(connection: Any, config: Any) -> None:
        """libfuse 3 asks here for what libfuse 2 takes as options; it derives the size of a read from a write's."""
        connection.contents.max_write = IO_SIZE
        connection.contents.max_background = connection.contents.congestion_threshold = _IN_PROGRESS
        connection.contents.max_readahead = _READ_AHEAD
        # Or each read of the page cache asks for the archive's attributes first.
        connection.contents.want &= ~_AUTO_INVAL_DATA
        config.contents.use_ino = 1
        config.contents.direct_io = int(direct)

    if is_3:
        operations.init = types["init"](configure)
    return operations


def _answering(operation: Callable[..., int | None], archive: ArchiveFS) -> Callable[..., int]:
    def answer(*arguments: Any) -> int:
        try:
            return operation(*arguments) or 0
        except BaseException as error:
            return -archive.errno_of(error)

    return answer


def _mount_2(libfuse: Any, callbacks: Any, mountpoint: bytes, options: str) -> int | None:
    words = _strings(b"tartapefs", b"-f", b"-o", os.fsencode(options + ",use_ino"), mountpoint)
    libfuse.fuse_setup.restype = ctypes.c_void_p
    fuse: int | None = libfuse.fuse_setup(
        len(words),
        words,
        ctypes.byref(callbacks),
        ctypes.c_size_t(ctypes.sizeof(callbacks)),
        ctypes.byref(ctypes.c_void_p()),  # where it was mounted
        ctypes.byref(ctypes.c_int()),  # whether -s was among the arguments
        None,
    )
    if fuse:
        _negotiate(libfuse, ctypes.c_void_p(fuse))
    return fuse


def _mount_3(libfuse: Any, callbacks: Any, mountpoint: bytes, options: str) -> int | None:
    words = _strings(b"tartapefs", b"-o", os.fsencode(options))
    fuse_new = _fuse_new(libfuse)
    fuse_new.restype = ctypes.c_void_p
    fuse: int | None = fuse_new(
        ctypes.byref(_Arguments(len(words), words)),
        ctypes.byref(callbacks),
        ctypes.c_size_t(ctypes.sizeof(callbacks)),
        None,
    )
    if fuse and libfuse.fuse_mount(ctypes.c_void_p(fuse), mountpoint) != 0:
        libfuse.fuse_destroy(ctypes.c_void_p(fuse))
        return None
    return fuse


class _Arguments(ctypes.Structure):
    """`struct fuse_args`."""

    _fields_ = (("argc", ctypes.c_int), ("argv", ctypes.POINTER(ctypes.c_char_p)), ("allocated", ctypes.c_int))


def _strings(*words: bytes) -> "ctypes.Array[ctypes.c_char_p]":
    return (ctypes.c_char_p * len(words))(*words)


def _channel(libfuse: Any, fuse: ctypes.c_void_p) -> tuple[int, ctypes.c_void_p, ctypes.c_void_p]:
    """Of libfuse 2: the descriptor of /dev/fuse, its session and its channel."""
    for function in (libfuse.fuse_get_session, libfuse.fuse_session_next_chan):
        function.restype = ctypes.c_void_p
    session = ctypes.c_void_p(libfuse.fuse_get_session(fuse))
    channel = ctypes.c_void_p(libfuse.fuse_session_next_chan(session, None))
    return libfuse.fuse_chan_fd(channel), session, channel


def _device_2(libfuse: Any, fuse: ctypes.c_void_p) -> tuple[int, Callable[[int, int], None]]:
    """Of libfuse 2: the descriptor of /dev/fuse, and the function that answers the request at an address."""
    device, session, channel = _channel(libfuse, fuse)
    process = libfuse.fuse_session_process
    return device, lambda address, length: process(session, ctypes.c_void_p(address), ctypes.c_size_t(length), channel)


class _Buffer(ctypes.Structure):
    """`struct fuse_buf`, up to what later versions added."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("memory", ctypes.c_void_p),
        ("descriptor", ctypes.c_int),
        ("position", ctypes.c_int64),
        ("memory_size", ctypes.c_size_t),
    )


def _device_3(libfuse: Any, fuse: ctypes.c_void_p) -> tuple[int, Callable[[int, int], None]]:
    """As `_device_2`, for libfuse 3."""
    libfuse.fuse_get_session.restype = ctypes.c_void_p
    session = ctypes.c_void_p(libfuse.fuse_get_session(fuse))
    process = libfuse.fuse_session_process_buf
    return (
        libfuse.fuse_session_fd(session),
        lambda address, length: process(session, ctypes.byref(_Buffer(length, 0, address, -1, 0, length))),
    )


def _negotiate(libfuse: Any, fuse: ctypes.c_void_p) -> None:
    """Answers the kernel's first request, FUSE_INIT, as libfuse 3 would: libfuse 2 knows of fewer flags.

    The kernel asks for 32 pages at most unless this answer has a number, whose absence doubles the time that a large
    file takes. So a socket takes the place of libfuse 2's /dev/fuse meanwhile: libfuse answers into it, and the flags
    that it does not know are added on the way. Any failure here leaves the request, or the error, to libfuse's loop.
    """
    device, session, channel = _channel(libfuse, fuse)
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        kernel = stack.enter_context(open(os.dup(device), "r+b", buffering=0))
        ours, theirs = map(stack.enter_context, socket.socketpair(type=socket.SOCK_SEQPACKET))
        ours.setblocking(False)
        request = os.read(kernel.fileno(), LARGEST_REQUEST)
        os.dup2(theirs.fileno(), device, inheritable=False)
        libfuse.fuse_session_process(session, request, ctypes.c_size_t(len(request)), channel)
        os.dup2(kernel.fileno(), device, inheritable=False)
        answer = ours.recv(kernel_abi.INIT_ANSWER_SIZE)
        opcode, offered = kernel_abi.INIT_REQUEST.unpack_from(request)
        if opcode == kernel_abi.INIT and len(answer) >= _SHORTEST_INIT_ANSWER:
            complete = bytearray(answer.ljust(kernel_abi.INIT_ANSWER_SIZE, b"\0"))
            _, first, _, accepted, _, _, second, _ = kernel_abi.INIT_ANSWER.unpack_from(complete)
            accepted |= offered & (kernel_abi.MAX_PAGES | kernel_abi.ASYNC_DIO)
            own = _READ_AHEAD, accepted, _IN_PROGRESS, _IN_PROGRESS, second, IO_SIZE // mmap.PAGESIZE
            kernel_abi.INIT_ANSWER.pack_into(complete, 0, len(complete), first, *own)
            answer = bytes(complete)
        os.write(kernel.fileno(), answer)


def _fuse_options(source: str, options: MountOptions) -> Iterator[str]:
    # libfuse splits options at commas; a backslash escapes one.
    yield "fsname=" + source.replace("\\", "\\\\").replace(",", "\\,")
    yield "subtype=tartapefs"
    yield "ro"
    yield "noexec"  # nosuid and nodev are implied
    yield "noforget"  # file handles, as NFS servers keep them, outlive the kernel's cache
    yield "default_permissions"  # always: without it `allow_other` shows a 0400 file to everyone
    yield "attr_timeout=0"  # so that `stat` and `open` see at once that the tape became invalid
    yield "entry_timeout=0"
    if options.allow_other:
        yield "allow_other"


@contextlib.contextmanager
def _stderr_captured() -> Iterator[Callable[[], list[str]]]:
    """Captures what libfuse and fusermount write to descriptor 2; the lines are there once the block has ended."""
    with open(os.memfd_create("stderr"), "w+b") as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        lines: list[str] = []
        try:
            yield lambda: lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines += [printable(line) for line in file.read().splitlines() if line]
