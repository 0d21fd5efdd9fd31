"""The session of a mounted archive: Python threads take requests from the kernel and answer them.

They answer reads, which are nearly all requests, themselves, from the memory that the player filled, and hand every
other request to libfuse (`docs/decisions/0010-reads-past-libfuse.md`). Of a part or shard each read becomes one of the
archive, by its handle, before anything else is done with it; zeros may follow, which the archive does not have there.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import time

from tartapefs.archive.layout import FOOTER
from tartapefs.base import processes
from tartapefs.base.errors import TapeIntegrityError
from tartapefs.mount import libfuse
from tartapefs.mount.hold import Hold
from tartapefs.mount.kernel_abi import (
    ANSWER,
    INTERRUPT,
    INVALIDATE,
    NOTIFY_INVAL_INODE,
    READ,
    READ_LOCKOWNER,
    RELEASE,
    REQUEST,
)
from tartapefs.mount.operations import IO_SIZE, ArchiveFS, MountOptions
from tartapefs.mount.read_statistics import PART_SHIFT

_UNDER_WAY_PAUSE = 0.01  # seconds between two checks whether reads have ended
_YIELD_SECONDS = 0.05  # so long requests may wait, should the one thread that serves be held up by the source
# Bytes of memory for the answer to a read: its header ends, and its body begins, where a page does.
_ANSWER_SIZE = mmap.PAGESIZE + IO_SIZE
MEMORY = _ANSWER_SIZE + libfuse.LARGEST_REQUEST
_HEADER, _BODY = mmap.PAGESIZE - ANSWER.size, mmap.PAGESIZE


class Session:
    """A mounted archive. Each thread that serves requests calls `loop`, which returns after the unmount.

    Raises MountError, with what libfuse had to say, if it cannot be mounted, and ImportError as `load` does.
    """

    def __init__(self, archive: ArchiveFS, mountpoint: str, source: str, options: MountOptions) -> None:
        self._archive = archive
        self.hold = archive.hold = Hold(self._fail) if options.holds else None
        self._connection = libfuse.connect(archive, mountpoint, source, options)
        self._device, self._pass_on = self._connection.device, self._connection.process
        self._serving = 0  # threads in `loop`, except those in `_yield_gil`
        self._serving_lock = threading.Lock()
        self._files: dict[int, int] = {}  # the inode number of each open handle that was read
        self._under_way: set[int] = set()  # the request numbers of reads in progress
        self._drop_lock = threading.Lock()
        self._extent = archive.files.extent
        self._footer = archive.size - FOOTER
        self._footers_under_way: set[int] = set()  # the request numbers of reads of the footer for the page cache
        # By the inode number of each file of whose footer the kernel has pages: at which offset of the file it begins.
        self._files_with_footer: dict[int, int] = {}
        self.footer_cached = threading.Event()  # set when a file is added to them
        self._has_ended = False  # no more reads for the page cache are served

    def loop(self, memory: memoryview) -> None:
        """Answers requests until the archive is unmounted; `memory` is its buffer, of `MEMORY` bytes."""
        memory, request = memory[:_ANSWER_SIZE], memory[_ANSWER_SIZE:]
        address = ctypes.addressof(ctypes.c_char.from_buffer(request))
        with self._serving_lock:
            self._serving += 1
        while True:
            try:
                length = os.readv(self._device, (request,))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.ENOENT, errno.EAGAIN):  # the request was withdrawn
                    continue
                raise
            if not length:
                return
            opcode, number, file, thread, handle, offset, size, flags = REQUEST.unpack_from(request)
            if opcode == READ:
                extent = self._extent(handle >> PART_SHIFT)
                offset, size, zeros = extent.locate(offset, size)
                self._files[handle] = file
                self._under_way.add(number)
                if flags & READ_LOCKOWNER:
                    self._answer_read(memory, number, thread, handle, offset, size, zeros, self.hold)
                elif self._has_ended:
                    self._fail(number, errno.EIO)
                else:  # for the page cache: a reader that waits for it could not be interrupted
                    if offset + size > self._footer:
                        self._footers_under_way.add(number)
                    self._answer_read(memory, number, thread, handle, offset, size, zeros, None)
                    if offset + size > self._footer:
                        self._footers_under_way.discard(number)
                        self._files_with_footer[file] = max(0, self._footer - extent.start)
                        self.footer_cached.set()
                self._under_way.discard(number)
                if self._archive.is_served_by_one:
                    self._yield_gil()
            elif opcode != INTERRUPT:
                self._pass_on(address, length)
                if opcode == RELEASE:
                    self._files.pop(handle, None)
            elif self.hold is not None:  # other answers come soon, or wait for the source, which cannot be interrupted
                self.hold.interrupt(handle)

    def drop_pages(self, ended: threading.Event) -> None:
        """Has the kernel drop its pages of the archive once every read fails. For a thread that serves no requests.

        To drop a page that a read in progress will fill, the kernel waits for the read. This wait cannot be
        interrupted, and the process cannot end before. So reads that began before the drift are awaited here, unless
        `ended` is set meanwhile. The caller that sets it calls `drop_no_more`, and only then unmounts.
        """
        earlier = set(self._under_way)
        while earlier & self._under_way:
            if ended.wait(_UNDER_WAY_PAUSE):
                return
        with self._drop_lock:
            for file in set(self._files.values()):
                if not ended.is_set():
                    self._drop(file, 0)

    def drop_footer(self, ended: threading.Event) -> None:
        """Has the kernel drop the archive's footer, so that the next read of it is a request, and needs an audit.

        As for `drop_pages`; but a reader that begins to wait for the footer in this very moment is not awaited before.
        """
        with self._drop_lock:
            while self._files_with_footer:
                file, begin = self._files_with_footer.popitem()
                # The answer to one under way is dropped later: it is in `_files_with_footer` again by then.
                if not (self._footers_under_way or ended.is_set()):
                    self._drop(file, begin)

    def _drop(self, file: int, offset: int) -> None:
        """Has the kernel drop the pages of this file from the one with `offset` on."""
        with contextlib.suppress(OSError):  # the kernel has forgotten the file, or the archive is unmounted
            os.write(self._device, INVALIDATE.pack(INVALIDATE.size, NOTIFY_INVAL_INODE, 0, file, offset, -1))

    def end(self, seconds: float) -> None:
        """Ends reads through the page cache: fails them from now on, and has the kernel drop what it has for them.

        A program that has the archive open would otherwise go on to read it from the page cache, and no audit would be
        made any more. Waits for reads in progress and for the kernel, `seconds` each at most.
        """
        self._has_ended = True
        given_up = threading.Event()
        with contextlib.suppress(OSError):  # no thread can be started
            thread = processes.start_thread(self.drop_pages, given_up)
            thread.join(seconds)
            given_up.set()
            self.drop_no_more(seconds)

    def drop_no_more(self, seconds: float) -> None:
        """Waits until no `drop_pages` or `drop_footer` is in progress, at most `seconds`."""
        if self._drop_lock.acquire(timeout=seconds):
            self._drop_lock.release()

    def _yield_gil(self) -> None:
        """Leaves the GIL to the other threads for a while, unless this is the last one that serves."""
        with self._serving_lock:
            if self._serving < 2:
                return
            self._serving -= 1
        time.sleep(_YIELD_SECONDS)
        with self._serving_lock:
            self._serving += 1

    def _answer_read(
        self,
        memory: memoryview,
        number: int,
        thread: int,
        handle: int,
        offset: int,
        size: int,
        zeros: int,
        hold: Hold | None,
    ) -> None:
        if _BODY + size + zeros > len(memory):  # no known kernel asks for so much
            memory = memoryview(bytearray(_BODY + size + zeros))
        try:
            count = self._archive.readinto(memory[_BODY : _BODY + size], offset)
            stop = _BODY + count + zeros
            if zeros:
                memory[_BODY + count : stop] = bytes(zeros)
            ANSWER.pack_into(memory, _HEADER, stop - _HEADER, 0, number)
            answer = memory[_HEADER:stop]
        except BaseException as error:
            failure = self._archive.errno_of(error)
            if hold is not None and isinstance(error, TapeIntegrityError):
                hold.add(number, thread, offset, size)
            else:
                self._fail(number, failure)
            return
        if self._write(answer):
            self._archive.statistics.delivered(handle, offset, count)

    def _fail(self, number: int, failure: int) -> None:
        self._write(ANSWER.pack(ANSWER.size, -failure, number))

    def _write(self, answer: memoryview | bytes) -> bool:
        """Gives an answer to the kernel; returns whether a reader still waited for it."""
        try:
            os.write(self._device, answer)
        except OSError:  # the reader was killed meanwhile, or the archive unmounted
            return False
        return True
