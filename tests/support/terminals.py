"""Programs on a terminal of their own, and what it shows."""

import fcntl
import os
import pty
import signal
import struct
import termios
from collections.abc import Callable
from contextlib import suppress

import pyte

CTRL_C = b"\x03"


def give_size(terminal: int, columns: int, rows: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Terminal:
    """A program that a terminal controls; the block ends with it. `lines`: what is on the screen, but empty lines."""

    def __init__(self, *command: object, columns: int, rows: int = 24, **environment: str) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._code: int | None = None
        self.seen = b""
        self.pid, self._ours = pty.fork()
        if self.pid == 0:
            try:
                give_size(0, columns, rows)
                os.environ.update({"TERM": "xterm"} | environment)
                os.execvp(os.fspath(command[0]), [*map(os.fspath, command)])  # type: ignore[call-overload]
            finally:
                os._exit(127)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display if line.strip()]

    def _read(self) -> bool:
        part = b""
        with suppress(OSError):  # the program has ended
            part = os.read(self._ours, 1 << 16)
        self.seen += part
        self._stream.feed(part)
        return bool(part)

    def until(self, true: Callable[[list[str]], object]) -> None:
        while not true(self.lines):
            assert self._read(), self.lines

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def resize(self, columns: int, rows: int = 24) -> None:
        self._screen.resize(rows, columns)
        give_size(self._ours, columns, rows)

    def end(self) -> int:
        """Waits for the end; the exit code."""
        while self._read():
            pass
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.end()
        os.close(self._ours)
