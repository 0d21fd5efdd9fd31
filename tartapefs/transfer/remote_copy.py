"""A copy of an archive at a URL, read by ranges.

Rule: a request whose link breaks goes on at the byte where it broke, and gives up once it failed several times without
a byte between.
"""

import re
import threading
from collections.abc import Callable
from typing import Any

from tartapefs.base.errors import CopyError
from tartapefs.transfer.range_sources import FsspecRanges, HttpRanges, RangeSource, S3Ranges

_ATTEMPTS = 4
_PAUSE = 0.5  # seconds before the second attempt; twice as long before each one after
_AT_ONCE = 1 << 18  # bytes


class RemoteCopy:
    """What `source` reads, by its `url`. Usable from many threads. Raises CopyError.

    size: in bytes. gap: see `CopyReader`. requests, received: how many there were for members, and the bytes they gave.
    """

    gap = 1 << 16

    def __init__(self, url: str, source: RangeSource) -> None:
        self._url, self._source = url, source
        self._lock = threading.Lock()  # held to count
        self._closed = threading.Event()
        self.requests = self.received = 0
        self.size = 0
        self._repeated(self._look)

    def _look(self) -> bool:
        self.size = self._source.size()
        return True

    def readinto(self, view: memoryview, position: int) -> None:
        """Fills `view` from `position` on, in bytes. Raises CopyError."""
        got = 0

        def read_on() -> bool:
            """Whether all is read now. Raises OSError if not a byte was."""
            nonlocal got
            self._count(requests=1)
            begun = got
            try:
                with self._source.get(position + got, position + len(view)) as body:
                    while got < len(view):
                        count = body.readinto(view[got : got + _AT_ONCE])
                        if not count or self._closed.is_set():
                            raise OSError("the link broke")
                        got += count
                return True
            except OSError:
                if got == begun:
                    raise
                return False
            finally:
                self._count(received=got - begun)

        while not self._repeated(read_on):
            pass

    def cost(self) -> str:
        return f"{self.received:,} bytes received in {self.requests:,} requests"

    def _count(self, requests: int = 0, received: int = 0) -> None:
        with self._lock:
            self.requests += requests
            self.received += received

    def _repeated(self, attempt: Callable[[], bool]) -> bool:
        for number in range(1, _ATTEMPTS + 1):
            try:
                return attempt()
            except OSError as error:
                reason = " ".join(str(error).split())
            if number < _ATTEMPTS and self._closed.wait(_PAUSE * 2 ** (number - 1)):
                break
        raise CopyError(self._url, f"failed {_ATTEMPTS} times, last with: {reason}")

    def close(self) -> None:
        """Ends the connections that are not in use; a thread that waits for an answer is not waited for."""
        self._closed.set()
        self._source.close()


def open_url(url: str, options: dict[str, Any], threads: int, pinned: bool) -> RemoteCopy:
    """Opens the copy at `url`, for so many threads; its size tells whether it is there.

    `options`: of boto3's client, of fsspec's file system, or headers of HTTP. `pinned`: it must not be replaced
    meanwhile, where that can be told. Raises CopyError, and TapeError if a package is not installed.
    """
    source: RangeSource
    if re.match("https?://", url, re.IGNORECASE):
        source = HttpRanges(url, options, pinned)
    elif url.startswith("s3://"):
        source = S3Ranges(url, options, pinned, threads)
    else:
        source = FsspecRanges(url, options)
    return RemoteCopy(url, source)
