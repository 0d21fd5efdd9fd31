"""The binding of the file system to libfuse: 2 through fusepy, or 3 through its fork mfusepy. Nothing else knows which.

Whichever libfuse is there mounts. Where both are, 2 does, or 3 if 2 is refused the mount point.

Rule: each request is answered by `ArchiveFS`, or with the errno that it gives for what was raised; neither module's own
treatment of exceptions is ever reached (mfusepy's answers EINVAL, and ends the process at a SystemExit).

Of the modules we use the C structures and the conversion of arguments. Their `FUSE` calls libfuse's `fuse_main_real`,
whose threads Python does not know, so that each callback makes and unmakes a thread state. `Session` stops short of
that: it only mounts, and threads of Python's take the requests from the kernel. Reads, which are nearly all, they
answer themselves, from the memory that the player filled; every other request they hand to libfuse
(`docs/decisions/0010-reads-past-libfuse.md`). The kernel is told to ask for 1 MiB at a time where libfuse 2 would have
it ask for 128 KiB.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tartapefs.base.errors import MountError, TapeIntegrityError
from tartapefs.base.text import printable
from tartapefs.mount.hold import Hold
from tartapefs.mount.operations import IO_SIZE, ArchiveFS, MountOptions


def _fusepy() -> Any:
    with _library("libfuse.so.2") as found:
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
    with _library("libfuse3.so.4", "libfuse3.so.3") as found:
        if not found:
            raise ImportError(
                "libfuse 3 is not installed "
                "(Debian: apt install fuse3; Fedora: dnf install fuse3; Arch: pacman -S fuse3; Alpine: apk add fuse3)"
            )
        try:
            import mfusepy
        except Exception as error:
            raise ImportError(f"mfusepy cannot be imported ({error}): pip install mfusepy") from None
    _fuse_new(mfusepy._libfuse)
    return mfusepy


def _fuse_new(libfuse: Any) -> Any:
    """`fuse_new` of libfuse 3; from 3.17 on, a program that looks for it at run time finds it by the other name alone.

    Raises ImportError where there is neither.
    """
    for name in ("fuse_new_31", "fuse_new"):
        if hasattr(libfuse, name):
            return getattr(libfuse, name)
    raise ImportError(f"{printable(libfuse._name)} has no function fuse_new")


@contextlib.contextmanager
def _library(*names: str) -> Iterator[bool]:
    """Has a module that is imported meanwhile use the first of these libraries that is there, and says if one is."""
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

    Raises ImportError where there is none. Its text is a line that says what to install.
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
    """The module that mounts first. Raises ImportError, whose text is a line that says what to install."""
    return next(_modules())


_OPERATIONS = ("getattr", "readdir", "open", "release", "statfs", "getxattr", "listxattr")

# Where things stand in linux/fuse.h: `fuse_in_header` and `fuse_read_in`, and `fuse_out_header`.
# Opcode, numbers of the request, the file and the thread that asks; of a read: handle, offset, size, flags. (Of an
# interrupt: in the place of the handle, the number of the request that it is about.)
_REQUEST = struct.Struct("=4xIQQ8xI4xQqII")
_OF_READER = 2  # FUSE_READ_LOCKOWNER: the flag of a read that goes to a reader's memory, not to the page cache
_ANSWER = struct.Struct("=IiQ")  # its length, minus an errno or 0, number of the request
_READ, _RELEASE, _INTERRUPT, _INIT = 15, 18, 36, 26
# `fuse_notify_inval_inode_out` behind such a head: a number of the file, and a range that is all of it.
_DROP = struct.Struct("=IiQQqq")
_NOTIFY_INVAL_INODE = 2
_UNDER_WAY_PAUSE = 0.01  # seconds between two looks at whether reads have ended
_REST = 0.05  # seconds; so long requests may wait, should the one thread that serves be held up by the source
_LARGEST_REQUEST = IO_SIZE + mmap.PAGESIZE  # bytes: what libfuse 3 allows a write to have, and its head
# Bytes of memory for the answer to a read: its head ends, and its body begins, where a page does.
_ANSWER_SIZE = mmap.PAGESIZE + IO_SIZE
MEMORY = _ANSWER_SIZE + _LARGEST_REQUEST
_HEAD, _BODY = mmap.PAGESIZE - _ANSWER.size, mmap.PAGESIZE


class Session:
    """A mounted archive. `loop` serves requests until it is unmounted; each thread that should serve calls it.

    Raises MountError, with what libfuse had to say, if it cannot be mounted, and ImportError as `load` does.
    """

    def __init__(self, archive: ArchiveFS, mountpoint: str, source: str, options: MountOptions) -> None:
        self._archive = archive
        self._direct = not options.cached
        self.hold = archive.hold = Hold(self._fail) if options.holds else None
        refusals = []
        for module in _modules():
            with _stderr_captured() as said:
                self._mount(module, os.fsencode(mountpoint), ",".join(_fuse_options(source, options)))
            if self._fuse:
                break
            refusals.append("; ".join(said()) or "libfuse could not mount it")
        else:
            raise MountError(mountpoint, refusals[0])
        self._serving = 0  # threads that do not rest
        self._counting = threading.Lock()
        self._files: dict[int, int] = {}  # by a handle that is open and was read: the number of its file
        self._under_way: set[int] = set()  # the numbers of reads
        self._dropping = threading.Lock()
        self._device, self._pass_on = (_device_3 if self._is_3 else _device_2)(self._libfuse, self._fuse)

    def _mount(self, module: Any, mountpoint: bytes, options: str) -> None:
        """Mounts by way of this module, or leaves `_fuse` false."""
        self._libfuse = module._libfuse
        self._is_3 = getattr(module, "fuse_version_major", 2) == 3
        self._archive.caller = lambda: int(module.fuse_get_context()[2])
        self._callbacks = self._bound(module)
        self._fuse = ctypes.c_void_p((self._mount_3 if self._is_3 else self._mount_2)(mountpoint, options))

    def _bound(self, module: Any) -> Any:
        """The table of callbacks: the module's conversion of arguments, our operations and our errors."""
        operations = module.fuse_operations()
        types = dict(field[:2] for field in module.fuse_operations._fields_)
        # Not by its own __init__: that one returns only after the mount has ended.
        converting = module.FUSE.__new__(module.FUSE)
        converting.operations = self._archive if self._is_3 else lambda name, *rest: getattr(self._archive, name)(*rest)
        converting.encoding, converting.errors = "latin-1", "strict"
        converting.raw_fi, converting.use_ns = False, True
        for name in _OPERATIONS:
            convert = getattr(converting, name + "_fuse_3", None) or getattr(converting, name)
            setattr(operations, name, types[name](self._answering(convert)))
        if self._is_3:
            operations.init = types["init"](self._configure)
        return operations

    def _configure(self, connection: Any, config: Any) -> None:
        """libfuse 3 asks here for what libfuse 2 takes as options; it derives the size of a read from a write's."""
        connection.contents.max_write = IO_SIZE
        config.contents.use_ino = 1
        config.contents.direct_io = int(self._direct)

    def _mount_2(self, mountpoint: bytes, options: str) -> int | None:
        options += ",use_ino" + ",direct_io" * self._direct
        words, libfuse = _strings(b"tartapefs", b"-f", b"-o", os.fsencode(options), mountpoint), self._libfuse
        libfuse.fuse_setup.restype = ctypes.c_void_p
        fuse: int | None = libfuse.fuse_setup(
            len(words),
            words,
            ctypes.byref(self._callbacks),
            ctypes.c_size_t(ctypes.sizeof(self._callbacks)),
            ctypes.byref(ctypes.c_void_p()),  # where it was mounted
            ctypes.byref(ctypes.c_int()),  # whether -s was among the arguments
            None,
        )
        if fuse:
            _accept_more(libfuse, ctypes.c_void_p(fuse))
        return fuse

    def _mount_3(self, mountpoint: bytes, options: str) -> int | None:
        words, libfuse = _strings(b"tartapefs", b"-o", os.fsencode(options)), self._libfuse
        fuse_new = _fuse_new(libfuse)
        fuse_new.restype = ctypes.c_void_p
        fuse: int | None = fuse_new(
            ctypes.byref(_Arguments(len(words), words)),
            ctypes.byref(self._callbacks),
            ctypes.c_size_t(ctypes.sizeof(self._callbacks)),
            None,
        )
        if fuse and libfuse.fuse_mount(ctypes.c_void_p(fuse), mountpoint) != 0:
            libfuse.fuse_destroy(ctypes.c_void_p(fuse))
            return None
        return fuse

    def loop(self, memory: memoryview) -> None:
        """Answers requests until the archive is unmounted, with the help of `memory`, of `MEMORY` bytes."""
        memory, request = memory[:_ANSWER_SIZE], memory[_ANSWER_SIZE:]
        address = ctypes.addressof(ctypes.c_char.from_buffer(request))
        with self._counting:
            self._serving += 1
        while True:
            try:
                length = os.readv(self._device, (request,))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.ENOENT, errno.EAGAIN):  # the request was withdrawn before it was taken
                    continue
                raise
            if not length:
                return
            opcode, number, file, thread, handle, offset, size, flags = _REQUEST.unpack_from(request)
            if opcode == _READ:
                self._files[handle] = file
                self._under_way.add(number)
                # Whoever waits for a page of the cache could not be interrupted.
                hold = self.hold if flags & _OF_READER else None
                self._answer_read(memory, number, thread, handle, offset, size, hold)
                self._under_way.discard(number)
                if self._archive.is_served_by_one:
                    self._rest()
            elif opcode != _INTERRUPT:
                self._pass_on(address, length)
                if opcode == _RELEASE:
                    self._files.pop(handle, None)
            elif self.hold is not None:  # other answers come soon, or wait for the source, which nothing interrupts
                self.hold.interrupt(handle)

    def drop_pages(self, ended: threading.Event) -> None:
        """Has the kernel drop its pages of the archive, once every read fails; by a thread that serves no requests.

        The kernel waits for pages that a read under way will fill. Nothing interrupts that wait, and the process does
        not end before. So reads that began before they fail are awaited here, unless the event `ended` is set
        meanwhile. Whoever sets it calls `drop_no_more`, and only then unmounts.
        """
        earlier = set(self._under_way)
        while earlier & self._under_way:
            if ended.wait(_UNDER_WAY_PAUSE):
                return
        with self._dropping:
            for file in set(self._files.values()):
                if not ended.is_set():
                    with contextlib.suppress(OSError):  # the kernel has forgotten the file, or the archive is unmounted
                        os.write(self._device, _DROP.pack(_DROP.size, _NOTIFY_INVAL_INODE, 0, file, 0, -1))

    def drop_no_more(self, seconds: float) -> None:
        """Returns once the kernel is not dropping pages for `drop_pages`, or after so long."""
        if self._dropping.acquire(timeout=seconds):
            self._dropping.release()

    def _rest(self) -> None:
        """Leaves Python to another thread for a while, if there is one that does not rest."""
        with self._counting:
            if self._serving < 2:
                return
            self._serving -= 1
        time.sleep(_REST)
        with self._counting:
            self._serving += 1

    def _answer_read(
        self, memory: memoryview, number: int, thread: int, handle: int, offset: int, size: int, hold: Hold | None
    ) -> None:
        if _BODY + size > len(memory):  # no kernel asks for so much
            memory = memoryview(bytearray(_BODY + size))
        try:
            count = self._archive.readinto(memory[_BODY : _BODY + size], offset)
            _ANSWER.pack_into(memory, _HEAD, _ANSWER.size + count, 0, number)
            answer = memory[_HEAD : _BODY + count]
        except BaseException as error:
            failure = self._archive.errno_of(error)
            if hold is not None and isinstance(error, TapeIntegrityError):
                hold.add(number, thread, offset, size)
            else:
                self._fail(number, failure)
            return
        if self._write(answer):
            self._archive.activity.delivered(handle, offset, count)

    def _fail(self, number: int, failure: int) -> None:
        self._write(_ANSWER.pack(_ANSWER.size, -failure, number))

    def _write(self, answer: memoryview | bytes) -> bool:
        """Gives an answer to the kernel; returns whether anybody waited for it."""
        try:
            os.write(self._device, answer)
        except OSError:  # who asked was killed meanwhile, or the archive unmounted
            return False
        return True

    def _answering(self, operation: Callable[..., int | None]) -> Callable[..., int]:
        def answer(*arguments: Any) -> int:
            try:
                return operation(*arguments) or 0
            except BaseException as error:
                return -self._archive.errno_of(error)

        return answer


class _Arguments(ctypes.Structure):
    """`struct fuse_args`."""

    _fields_ = (("argc", ctypes.c_int), ("argv", ctypes.POINTER(ctypes.c_char_p)), ("allocated", ctypes.c_int))


def _strings(*words: bytes) -> "ctypes.Array[ctypes.c_char_p]":
    return (ctypes.c_char_p * len(words))(*words)


# As `_REQUEST` and `_ANSWER`, for `fuse_init_in` and `fuse_init_out`.
_OFFER = struct.Struct("=4xI44xI")  # opcode, flags that the kernel offers
_ACCEPTANCE = struct.Struct("=I24sI")  # its length, what stays as it is, flags that are accepted
_ACCEPTANCE_SIZE = 16 + 64  # bytes
_MAX_PAGES = 1 << 22  # the flag that the number at this place counts; kernels know it since 4.20
_MAX_PAGES_AT = 16 + 28
_ASYNC_DIO = 1 << 15  # without it a read across the end by io_uring gives too much: it is repeated at the same offset


def _channel(libfuse: Any, fuse: ctypes.c_void_p) -> tuple[int, ctypes.c_void_p, ctypes.c_void_p]:
    """Of libfuse 2: the descriptor of /dev/fuse, its session and its channel."""
    for function in (libfuse.fuse_get_session, libfuse.fuse_session_next_chan):
        function.restype = ctypes.c_void_p
    session = ctypes.c_void_p(libfuse.fuse_get_session(fuse))
    channel = ctypes.c_void_p(libfuse.fuse_session_next_chan(session, None))
    return libfuse.fuse_chan_fd(channel), session, channel


def _device_2(libfuse: Any, fuse: ctypes.c_void_p) -> tuple[int, Callable[[int, int], None]]:
    """The descriptor of /dev/fuse, and what answers a request of this address and length."""
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
    """As `_device_2`, of libfuse 3."""
    libfuse.fuse_get_session.restype = ctypes.c_void_p
    session = ctypes.c_void_p(libfuse.fuse_get_session(fuse))
    process = libfuse.fuse_session_process_buf
    return (
        libfuse.fuse_session_fd(session),
        lambda address, length: process(session, ctypes.byref(_Buffer(length, 0, address, -1, 0, length))),
    )


def _accept_more(libfuse: Any, fuse: ctypes.c_void_p) -> None:
    """Answers the kernel's first request, FUSE_INIT, as libfuse 3 would, where libfuse 2 knows of less.

    The kernel asks for 32 pages at most unless this answer has a number, whose absence doubles the time that a large
    file takes. So libfuse 2 answers into a socket that stands in the place of its /dev/fuse meanwhile, and what it does
    not know is put in on the way. Whatever fails here leaves the request, or the error, to libfuse's loop.
    """
    place, session, channel = _channel(libfuse, fuse)
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        kernel = stack.enter_context(open(os.dup(place), "r+b", buffering=0))
        ours, theirs = map(stack.enter_context, socket.socketpair(type=socket.SOCK_SEQPACKET))
        ours.setblocking(False)
        request = os.read(kernel.fileno(), _LARGEST_REQUEST)
        os.dup2(theirs.fileno(), place, inheritable=False)
        libfuse.fuse_session_process(session, request, ctypes.c_size_t(len(request)), channel)
        os.dup2(kernel.fileno(), place, inheritable=False)
        answer = ours.recv(_ACCEPTANCE_SIZE)
        opcode, offered = _OFFER.unpack_from(request)
        if opcode == _INIT and len(answer) >= _ACCEPTANCE.size:
            _, between, accepted = _ACCEPTANCE.unpack_from(answer)
            accepted |= offered & (_MAX_PAGES | _ASYNC_DIO)
            complete = bytearray(answer.ljust(_ACCEPTANCE_SIZE, b"\0"))
            _ACCEPTANCE.pack_into(complete, 0, len(complete), between, accepted)
            struct.pack_into("=H", complete, _MAX_PAGES_AT, IO_SIZE // mmap.PAGESIZE)
            answer = bytes(complete)
        os.write(kernel.fileno(), answer)


def _fuse_options(source: str, options: MountOptions) -> Iterator[str]:
    # libfuse splits at commas and knows the backslash as their escape.
    yield "fsname=" + source.replace("\\", "\\\\").replace(",", "\\,")
    yield "subtype=tartapefs"
    yield "ro"
    yield "noexec"  # nosuid and nodev come by themselves
    yield "default_permissions"  # always: without it `allow_other` shows a 0400 file to everyone
    yield "attr_timeout=0"  # so that `stat` and `open` see at once that the tape became invalid
    yield "entry_timeout=0"
    if options.allow_other:
        yield "allow_other"


@contextlib.contextmanager
def _stderr_captured() -> Iterator[Callable[[], list[str]]]:
    """What libfuse and fusermount write on descriptor 2 meanwhile, as lines, once the block has ended."""
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
