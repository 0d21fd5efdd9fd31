"""Programs that read a mount whose source fails half way, and what each leaves of its copy."""

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.programs import run
from support.reference import Reference

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Failing:
    """A mounted archive, which is read up to `good` bytes and not beyond, and what it should hold."""

    archive: Path
    expected: bytes
    good: int  # where the header of the file that drifted ends: at most these bytes can be had
    folder: Path  # an empty one, for copies


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended, and what it left of the copy: `None` if nothing."""

    code: int
    copy: bytes | None
    right: bool  # what it made is right: an equal copy, or the right digest

    def describe(self, expected: bytes) -> str:
        if self.copy is None:
            return "nothing"
        prefix = common_prefix(self.copy, expected)
        rest = self.copy[prefix:]
        text = f"{len(self.copy):,} bytes" + (", full size" if len(self.copy) == len(expected) else "")
        if not rest:
            return f"{text}: a good prefix" if self.copy else "an empty file"
        return f"{text}: {prefix:,} good, then {'zeros' if not rest.strip(bytes(1)) else 'other bytes'}"


def common_prefix(one: bytes, other: bytes) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def shell(command: str, **variables: object) -> Callable[[Failing], int]:
    """A program as a shell command, with $A for the archive and $OUT for the copy."""

    def start(failing: Failing) -> int:
        environment = os.environ | {"A": str(failing.archive), "OUT": str(failing.folder / "copy"), "LC_ALL": "C"}
        environment |= {"DIR": str(failing.archive.parent), "TO": str(failing.folder), "HOME": str(failing.folder)}
        environment |= {"PYTHON": sys.executable, "GOOD": str(failing.folder / "expected")}
        (failing.folder / "expected").write_bytes(failing.expected)
        done = subprocess.run(
            ["/bin/sh", "-c", command], env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=100
        )
        (failing.folder / "expected").unlink()
        return done.returncode

    return start


def copied(failing: Failing) -> tuple[bytes | None, bool]:
    try:
        copy = (failing.folder / "copy").read_bytes()
    except FileNotFoundError:
        return None, False
    return copy, copy == failing.expected


def digest_of(name: str) -> Callable[[Failing], tuple[bytes | None, bool]]:
    def made(failing: Failing) -> tuple[bytes | None, bool]:
        printed = (failing.folder / "copy").read_text().split()
        return None, bool(printed) and printed[0] == hashlib.new(name, failing.expected).hexdigest()

    return made


def no_copy(failing: Failing) -> tuple[bytes | None, bool]:
    """For a program that says by its exit code alone whether all was well."""
    return None, False


RCLONE = "rclone --config /dev/null --retries 1 --low-level-retries 1"
Program = tuple[str, Callable[[Failing], int], Callable[[Failing], tuple[bytes | None, bool]]]


@contextmanager
def failing_mount(folder: Path, *options: str) -> Iterator[Failing]:
    """Mounts an archive of some 3 MiB in `folder`, in the middle of which a file then drifts."""
    root, mountpoint, copies = folder / "data", folder / "mnt", folder / "copies"
    for path in (root, mountpoint, copies):
        path.mkdir()
    content = random.Random(11)
    for name in ("a.bin", "m.bin", "z.bin"):
        (root / name).write_bytes(content.randbytes(MIB))
    result = run("record", root)
    assert result.returncode == 0, result.stderr
    reference = Reference(root)
    expected = reference.read(0, reference.size)
    result = run("mount", root, mountpoint, *options)
    assert result.returncode == 0, result.stderr
    try:
        os.truncate(root / "m.bin", MIB // 2)
        yield Failing(mountpoint / "archive.tar", expected, reference.starts[b"data/m.bin"] + 512, copies)
    finally:
        result = run("unmount", mountpoint)
        if result.returncode:
            subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)
        assert result.returncode == 0, result.stderr
