"""The command line for tests: commands at work, on a terminal, with closed streams, and folders for them."""

import hashlib
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.programs import TARTAPEFS
from support.reference import Reference

BLOCK = 512
COMMANDS = ["record", "info", "ls", "locate", "verify", "play", "check", "resume", "resume-hint", "diff", "digest"]
READERS = {"info": [], "ls": [], "locate": ["0"], "verify": [], "play": []}  # and the arguments after DIR
ODD = {
    "newline": b"two\nlines",
    "escape": b"\x1b[2J\x1b]0;title\x07",
    "bidi": "gpj.\u202eexe".encode(),
    "not-utf-8": b"caf\xe9",
    "backslash": b"back\\nslash",
    "dash": b"-rf",
    "markup": b"[red]{0}{task.fields[x]}%s[b]",
    "space": b" \t ",
}


def grow(root: Path) -> Path:
    """A small folder with each kind of member, each kind of segment, and odd names."""
    (root / "photos" / "2024").mkdir(parents=True)
    (root / "empty-folder").mkdir()
    (root / "empty.txt").write_bytes(b"")
    for size in (1, 512, 513, 5000):
        (root / "photos" / f"{size}.bin").write_bytes(os.urandom(size))
    (root / "photos" / "2024" / "large.bin").write_bytes(os.urandom(300_001))
    (root / "link").symlink_to("photos/512.bin")
    (root / "script.sh").write_text("#!/bin/sh\n")
    (root / "script.sh").chmod(0o755)
    odd = os.fsencode(root / "odd")
    os.mkdir(odd)
    for name in ODD.values():
        with open(odd + b"/" + name, "wb") as file:
            file.write(name)
    os.symlink(b"to\n\x1b[1m\xff", odd + b"/odd-link")
    return root


@contextmanager
def a_tmpfs(where: Path, options: str) -> Iterator[Path]:
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@contextmanager
def at_work(*command: object, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """`tartapefs` running; ended by force if the block leaves it running."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*TARTAPEFS, *map(os.fspath, command)], **(streams | options)) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def fingerprint(reference: Reference) -> str:
    digest = hashlib.sha256()
    for start in reference.starts.values():
        digest.update(reference.read(start, BLOCK))
    return digest.hexdigest()


CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}


def closed(streams: str, *command: object) -> subprocess.CompletedProcess[bytes]:
    line = f'exec "$@" {CLOSED[streams]}'
    return subprocess.run(
        ["sh", "-c", line, "sh", *TARTAPEFS, *map(os.fspath, command)], capture_output=True, timeout=60
    )


def on_terminal(
    *command: object, hold: float = 0, stdout: bool = False, cwd: Path | None = None
) -> tuple[int, str, bytes]:
    """Runs it with stderr, and stdout if asked, on a terminal. Gives exit code, what the terminal saw, and stdout.

    `hold`: how many seconds after its first bytes a stdout that is a pipe is not read.
    """
    master, slave = pty.openpty()
    seen, out = b"", bytearray()
    try:
        environment = os.environ | {"TERM": "xterm"}
        streams = {"stdin": subprocess.DEVNULL, "stdout": slave if stdout else subprocess.PIPE, "stderr": slave}
        with at_work(*command, env=environment, cwd=cwd, **streams) as process:
            os.close(slave)
            slave = -1
            sources = [master] if stdout else [master, process.stdout.fileno()]  # type: ignore[union-attr]
            resume = None
            while sources:
                ready, _, _ = select.select(sources, [], [], 0.05)
                for source in ready:
                    try:
                        got = os.read(source, 1 << 16)
                    except OSError:  # the terminal's other side is closed
                        got = b""
                    if not got:
                        sources.remove(source)
                    elif source == master:
                        seen += got
                    else:
                        out += got
                        if hold and resume is None:
                            resume = time.monotonic() + hold
                            sources.remove(source)
                if resume and time.monotonic() >= resume:
                    resume = float("inf")
                    sources.append(process.stdout.fileno())  # type: ignore[union-attr]
            code = process.wait(timeout=60)
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)
    return code, seen.decode(errors="surrogateescape"), bytes(out)
