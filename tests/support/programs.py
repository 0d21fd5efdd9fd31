"""Programs that tests run, mounts that they look at, and events that they wait for."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.forking import Server

TARTAPEFS = [sys.executable, "-m", "tartapefs"]


server: Server | None = None  # of this session


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """`tartapefs` with these arguments; its output as text. The exit code is the caller's to check.

    It is started if it has `options` of its own, which are those of `subprocess.run`; else forked.
    """
    if server and not options and server.is_like_a_start():
        return server.run([*map(os.fspath, command)])  # type: ignore[call-overload]
    text = {"text": True, "errors": "surrogateescape", "capture_output": True, "timeout": 120}
    return subprocess.run([*TARTAPEFS, *map(os.fspath, command)], **(text | options))  # type: ignore[arg-type]


def under_strace(*options: str | Path, log: str | Path = "/dev/null") -> list[str]:
    """`tartapefs` as strace runs it with these options.

    Only the calls it traces are slowed, unless it injects signals, which get lost at the stops that a filter makes.
    """
    chosen = [] if any("signal=" in os.fspath(option) for option in options) else ["--seccomp-bpf"]
    return [*map(os.fspath, ["strace", "-f", *chosen, "-qq", "-o", log, *options]), *TARTAPEFS]


needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a helper needs a second core")


def our_mounts() -> list[str]:
    lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")
    escaped = [line.split(" ")[4] for line in lines if " - fuse.tartapefs " in line]
    return [re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path) for path in escaped]


def wait_until(true: Callable[[], object], seconds: float = 30) -> None:
    """Fails unless `true()` becomes true within `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.01)


def umount(place: str | Path) -> None:
    """Unmounts `place`, once nothing uses it.

    The daemon of an archive that was unmounted goes on for as long as another mount namespace has its mount, too, and
    tests that run at the same time make such namespaces.
    """
    wait_until(lambda: subprocess.run(["umount", place], capture_output=True).returncode == 0, 60)


def with_programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which a shell finds `tartapefs`, and `aws` as its package installs it."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tartapefs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tartapefs "$@"\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


FORGING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\udc80-\udcff]")


def quiet(result: subprocess.CompletedProcess[str]) -> None:
    """No traceback, and nothing on either stream that could forge a line or drive a terminal."""
    for text in (result.stdout or "", result.stderr or ""):
        assert "Traceback" not in text and "Exception ignored" not in text, text
        assert not FORGING.search(text), ascii(text)


def refused(result: subprocess.CompletedProcess[str], code: int) -> None:
    """Ended with this exit code and a reason, and gave no data."""
    quiet(result)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.strip()


def done(result: subprocess.CompletedProcess[str]) -> str:
    quiet(result)
    assert result.returncode == 0, result.stderr
    return result.stdout
