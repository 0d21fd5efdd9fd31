"""A file system that shows another folder, slowly: each `open` and each `read` takes a while more.

    python tests/bench/slowfs.py SOURCE MNT [MILLISECONDS]

Stays in the foreground until it is unmounted. What a network file system does to a reader, without a network.
"""

import ctypes
import errno
import heapq
import itertools
import os
import select
import sys
import time
from typing import Any

import fuse

_LARGEST = (1 << 17) + (1 << 12)  # bytes of a request
_SLOW = {14, 15}  # FUSE_OPEN and FUSE_READ


class SlowFS:
    """`root`; `serve` adds `delay` seconds to each `open` and `read`.

    No `fuse.Operations`, whose defaults for everything else would each cost a call: most of the time of this file
    system shall be its delay.
    """

    use_ns = True
    delay = 0.001

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)

    def __call__(self, operation: str, path: str, *arguments: Any) -> Any:
        return getattr(self, operation)(self.root + path, *arguments)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        found = os.lstat(path)
        times = {name: getattr(found, name + "_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return times | {
            name: getattr(found, name)
            for name in ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        }

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(path)]

    def readlink(self, path: str) -> str:
        return os.readlink(path)

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)


def serve(count: int, *arguments: object) -> int:
    """libfuse's `fuse_main_real`, in one thread that waits for many requests at once.

    A thread for each that waits would be more work than the requests: this file system would be busy, where it is meant
    to wait.
    """
    libfuse = fuse._libfuse
    for function in (libfuse.fuse_setup, libfuse.fuse_get_session, libfuse.fuse_session_next_chan):
        function.restype = ctypes.c_void_p
    mounted, multithreaded = ctypes.c_void_p(), ctypes.c_int()
    handle = libfuse.fuse_setup(count, *arguments[:3], ctypes.byref(mounted), ctypes.byref(multithreaded), None)
    if not handle:
        return 1
    session = ctypes.c_void_p(libfuse.fuse_get_session(ctypes.c_void_p(handle)))
    channel = ctypes.c_void_p(libfuse.fuse_session_next_chan(session, None))
    device, order = libfuse.fuse_chan_fd(channel), itertools.count()
    waiting: list[tuple[float, int, bytes]] = []  # when each is to be answered

    def answer(request: bytes) -> None:
        libfuse.fuse_session_process(session, request, ctypes.c_size_t(len(request)), channel)

    while True:
        timeout = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        if select.select([device], [], [], timeout)[0]:
            try:
                request = os.read(device, _LARGEST)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return 0
                continue
            if int.from_bytes(request[4:8], sys.byteorder) in _SLOW:
                heapq.heappush(waiting, (time.monotonic() + SlowFS.delay, next(order), request))
            else:
                answer(request)
        while waiting and waiting[0][0] <= time.monotonic():
            answer(heapq.heappop(waiting)[2])


def main() -> None:
    fuse._libfuse.fuse_main_real = serve
    source, mountpoint, *delay = sys.argv[1:]
    if delay:
        SlowFS.delay = float(delay[0]) / 1000
    fuse.FUSE(SlowFS(source), mountpoint, foreground=True, ro=True, use_ino=True, attr_timeout=3600, entry_timeout=3600)


if __name__ == "__main__":
    main()
