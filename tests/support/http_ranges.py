"""A real HTTP server on loopback for one file: with ranges or without, over a link that breaks."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HttpFile:
    """Serves `data` at `url`.

    `status`: of the answers, if it is to be another. `breaks(start)`: after how many bytes of an answer from `start` on
    the link breaks, None if it does not. `ranges`: what was asked for, as (start, stop). `sent`: bytes of all bodies.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.etag, self.status = data, '"1"', 206
        self.ignores_ranges = False
        self.range_is = ""  # what it says of it, if not the truth
        self.breaks: Callable[[int], int | None] = lambda start: None
        self.headers: list[dict[str, str]] = []
        self.ranges: list[tuple[int, int]] = []
        self.sent = 0
        file = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                file.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}/archive.tar"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.headers.append(dict(request.headers))
        start, stop, size = 0, len(self.data), len(self.data)
        request.close_connection = True
        if (status := self.status) not in (200, 206):
            self.status = 206 if status == 302 else status  # before the client hears of it, and asks again
            request.send_response(status)
            request.send_header("Location", f"{self.url}?moved")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        asked = re.fullmatch("bytes=([0-9]+)-([0-9]+)", request.headers["Range"] or "")
        if asked and not self.ignores_ranges:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, size)
            request.send_response(206)
            request.send_header("Content-Range", self.range_is or f"bytes {start}-{stop - 1}/{size}")
        else:
            request.send_response(200)
        self.ranges.append((start, stop))
        request.send_header("ETag", self.etag)
        request.send_header("Content-Length", str(stop - start))
        request.end_headers()
        cut = self.breaks(start)
        with suppress(OSError):
            for at in range(start, stop if cut is None else min(stop, start + cut), 1 << 16):
                end = min(at + (1 << 16), stop if cut is None else min(stop, start + cut))
                self.sent += end - at  # before the client has it, and counts
                request.wfile.write(self.data[at:end])

    def forget(self) -> None:
        self.ranges.clear()
        self.headers.clear()
        self.sent = 0

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def http_file(data: bytes) -> Iterator[HttpFile]:
    file = HttpFile(data)
    try:
        yield file
    finally:
        file.close()
