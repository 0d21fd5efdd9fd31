"""A file system that shows another folder, slowly: each `open` and each `read` takes a while more.

    python tests/bench/slowfs.py SOURCE MNT [MILLISECONDS]

Stays in the foreground until it is unmounted. What a network file system does to a reader, without a network.
"""

import ctypes
import os
import sys
import threading
import time
from typing import Any

import fuse

_THREADS = 32


class SlowFS:
    """`root`, with `delay` seconds added to `open` and `read`.

    No `fuse.Operations`, whose defaults for everything else would each cost a call: most of the time of this file
    system shall be its delay.
    """

    use_ns = True

    def __init__(self, root: str, delay: float) -> None:
        self.root = os.path.realpath(root)
        self.delay = delay

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
        time.sleep(self.delay)
        return os.open(path, flags)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        time.sleep(self.delay)
        return os.pread(fh, size, offset)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)


def serve_by_threads(count: int, *arguments: object) -> int:
    """libfuse's `fuse_main_real`, with threads of Python's in place of its own.

    Those are as many as wait at a time, and each call on them costs a new thread state: this file system would be
    busy, where it is meant to wait.
    """
    mounted, multithreaded = ctypes.c_void_p(), ctypes.c_int()
    fuse._libfuse.fuse_setup.restype = ctypes.c_void_p
    handle = fuse._libfuse.fuse_setup(count, *arguments[:3], ctypes.byref(mounted), ctypes.byref(multithreaded), None)
    if handle:
        threads = [
            threading.Thread(target=fuse._libfuse.fuse_loop, args=(ctypes.c_void_p(handle),)) for _ in range(_THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return 0 if handle else 1


def main() -> None:
    fuse._libfuse.fuse_main_real = serve_by_threads
    source, mountpoint, *delay = sys.argv[1:]
    slow = SlowFS(source, float(*delay or ["1"]) / 1000)
    fuse.FUSE(slow, mountpoint, foreground=True, ro=True, use_ino=True, attr_timeout=3600, entry_timeout=3600)


if __name__ == "__main__":
    main()
