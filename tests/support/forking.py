"""Runs `tartapefs` in forks of one process that has imported it, which takes a tenth of the processor time of a start.

Each run is a process as ever, with descriptors, signals, an exit code and, in /proc, a command line of its own.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


class Server:
    """The process that forks, and how this one asks it."""

    def __init__(self) -> None:
        self._owner, self._environment = os.getpid(), _environment()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), " " * 4096],  # room for command lines
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # as the programs have
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        self.pid = self._process.pid

    def is_like_a_start(self) -> bool:
        """Whether a program that this process starts would have the environment that the server has."""
        return os.getpid() == self._owner and _environment() == self._environment

    def run(self, arguments: list[str | bytes], timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """`subprocess.run` of `tartapefs` with its output as text. Raises subprocess.TimeoutExpired."""
        text = json.dumps([os.getcwd(), *map(os.fsdecode, arguments)])
        readers, writers = zip(*(os.pipe() for _ in range(3)), strict=True)
        try:
            socket.send_fds(self._channel, [text.encode()], writers)
        finally:
            for writer in writers:
                os.close(writer)
        read = {reader: bytearray() for reader in readers}
        end, open_ends = time.monotonic() + timeout, set(readers)
        try:
            while open_ends:
                ready, _, _ = select.select(open_ends, (), (), max(0, end - time.monotonic()))
                if not ready:
                    os.kill(int(read[readers[2]].split()[0]), signal.SIGKILL)
                    raise subprocess.TimeoutExpired(["tartapefs", *arguments], timeout)
                for reader in ready:
                    got = os.read(reader, 1 << 16)
                    read[reader] += got
                    if not got:
                        open_ends.remove(reader)
        finally:
            for reader in readers:
                os.close(reader)
        out, err = (
            bytes(read[reader]).decode(errors="surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
            for reader in readers[:2]
        )
        code = int(read[readers[2]].split()[1])
        return subprocess.CompletedProcess(["tartapefs", *arguments], code, out, err)

    def close(self) -> None:
        self._channel.close()
        out, _ = self._process.communicate()
        assert not out, out


def _show_command_line(*arguments: str) -> None:
    """Has /proc show these in place of those that this process was started with, see proc(5)."""
    start, stop = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    line = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), line[: stop - start - 1].ljust(stop - start, b"\0"), start)


def _serve(channel: socket.socket) -> bool:
    """Forks a program for each request; True in that program."""
    programs: dict[int, tuple[int, int]] = {}  # by the descriptors of the processes: pid, and where to tell the code
    events = select.poll()
    events.register(channel, select.POLLIN)
    while True:
        for fd, _ in events.poll():
            if fd in programs:
                pid, status = programs.pop(fd)
                events.unregister(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(BrokenPipeError):  # the caller waits no longer
                    os.write(status, b"%d" % code)
                os.close(status)
                os.close(fd)
                continue
            message, descriptors, _, _ = socket.recv_fds(channel, 1 << 18, 3)
            if not message:
                return False
            pid = os.fork()
            if pid == 0:
                os.dup2(descriptors[0], 1)
                os.dup2(descriptors[1], 2)
                os.closerange(3, 1 << 16)
                folder, *sys.argv[1:] = json.loads(message)
                os.chdir(folder)
                _show_command_line(sys.executable, "-m", "tartapefs", *sys.argv[1:])
                return True
            out, err, status = descriptors
            os.close(out)
            os.close(err)
            os.write(status, b"%d " % pid)
            ended = os.pidfd_open(pid)
            programs[ended] = pid, status
            events.register(ended, select.POLLIN)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tartapefs import __main__, cli

    for module in (*(f"cli.{module}" for module, _ in cli.COMMANDS.values()), "mount.daemon"):
        import_module(f"tartapefs.{module}")
    channel = socket.socket(fileno=int(sys.argv[1]))
    sys.argv[0] = __main__.__file__
    gc.freeze()
    if _serve(channel):
        channel.detach()
        __main__.main()
