"""Reads a mounted archive at random for as long as it is told, and watches the daemon's memory and descriptors.

    cd tests && python -m long.soak --seconds 3600

Exits 1 if a byte is wrong, if the resident memory grows by more than --bound MiB after the first tenth of the time, or
if the number of descriptors is not constant while nobody reads.
"""

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from support.daemon import daemon_of, descriptors, force_unmount, resident
from support.programs import run
from support.reference import Reference

MIB = 1 << 20
SETTLED = 0.1  # of the time: until then what is kept grows slowly
WARM = 8000  # reads before the first sample, in which it grows fast


@dataclass
class Soak:
    """What was seen: samples of (seconds, resident bytes, descriptors), reads and what went wrong."""

    samples: list[tuple[float, int, int]] = field(default_factory=list)
    reads: int = 0
    bytes: int = 0
    wrong: list[str] = field(default_factory=list)

    def failures(self, bound: float) -> list[str]:
        """Why it failed, in words; empty if all is well. `bound` in MiB."""
        found = list(self.wrong[:5])
        end = self.samples[-1][0]
        settled = [memory for second, memory, _ in self.samples if second >= end * SETTLED]
        grown = max(settled) - settled[0]
        if grown > bound * MIB:
            found.append(f"memory grew by {grown / MIB:.1f} MiB, from {settled[0] / MIB:.1f} MiB")
        counts = {count for *_, count in self.samples}
        if len(counts) > 1:
            found.append(f"descriptors were not constant: {sorted(counts)}")
        return found


def make_source(root: Path) -> None:
    """Some 20 MiB: thousands of small files, folders, links, and some larger ones."""
    some = random.Random(21)
    for number in range(3000):
        folder = root / f"folder {number % 60:02}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.bin").write_bytes(some.randbytes(some.choice((0, 1, 511, 512, 513, 3000, 8000))))
    for number in range(4):
        (root / f"large {number}").write_bytes(some.randbytes(3 * MIB + number))
        (root / f"link {number}").symlink_to(f"large {number}")


def read_for(seconds: float, archive: Path, expected: bytes, soak: Soak, seed: int) -> None:
    """Reads, at random, through descriptors that are opened and closed on the way; a few runs in order."""
    some = random.Random(seed)
    end = time.monotonic() + seconds
    count = total = 0
    while time.monotonic() < end and not soak.wrong:
        fd = os.open(archive, os.O_RDONLY)
        try:
            for _ in range(some.choice((1, 10, 200))):
                at, size = some.randrange(len(expected) + 2000), some.choice((1, 512, 4096, 65_536, 300_000))
                data = os.pread(fd, size, at)
                count, total = count + 1, total + len(data)
                if data != expected[at : at + size]:
                    soak.wrong.append(f"wrong bytes at {at}, size {size}")
        except OSError as error:
            soak.wrong.append(f"a read failed: {error}")
        finally:
            os.close(fd)
    soak.reads += count
    soak.bytes += total


def descriptors_at_rest(pid: int, known: int) -> int:
    """The least number within ten seconds, or `known` as soon as it is reached: an audit may be at work."""
    least, end = len(descriptors(pid)), time.monotonic() + 10
    while least > known and time.monotonic() < end:
        time.sleep(0.02)
        least = min(least, len(descriptors(pid)))
    return least


def soak_mount(
    archive: Path, expected: bytes, seconds: float, interval: float, threads: int = 4, show: bool = False
) -> Soak:
    """Reads until it is warm, and for `seconds`; every `interval` seconds all readers pause, and a sample is taken."""
    soak, pid = Soak(), daemon_of(archive.parent)
    begun = time.monotonic()
    turn = 0
    while not soak.wrong:
        turn += 1
        readers = [
            threading.Thread(target=read_for, args=(interval, archive, expected, soak, turn * threads + number))
            for number in range(threads)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        if not soak.samples and soak.reads < WARM:
            begun = time.monotonic()
            continue
        known = soak.samples[0][2] if soak.samples else 0
        count = descriptors_at_rest(pid, known)
        now = time.monotonic() - begun
        memory = resident(pid)
        soak.samples.append((now, memory, count))
        if show:
            print(
                f"{now:8.1f} s  {memory / MIB:7.2f} MiB  {count:3} descriptors  {soak.reads:,} reads"
                f"  {soak.bytes / 2**30:.2f} GiB",
                flush=True,
            )
        if now + interval / 2 >= seconds:
            break
    return soak


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600, metavar="N", help="how long (default: %(default)s)")
    parser.add_argument("--bound", type=float, default=4, metavar="MIB", help="allowed growth (default: %(default)s)")
    parser.add_argument("--interval", type=float, metavar="N", help="seconds between samples (default: a sixtieth)")
    parser.add_argument("--direct", action="store_true", help="mount past the kernel's page cache")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root, mountpoint = Path(folder) / "data", Path(folder).resolve() / "mnt"
        mountpoint.mkdir()
        make_source(root)
        for command in (
            ("record", root),
            ("mount", root, mountpoint, "--audit-interval", "1", *(["--direct"] if options.direct else [])),
        ):
            result = run(*command)
            if result.returncode:
                print(result.stderr, file=sys.stderr)
                return 1
        try:
            reference = Reference(root)
            expected = reference.read(0, reference.size)
            interval = options.interval or max(0.5, options.seconds / 60)
            soak = soak_mount(mountpoint / "archive.tar", expected, options.seconds, interval, show=True)
        finally:
            if run("unmount", mountpoint).returncode:
                force_unmount(mountpoint)
    failures = soak.failures(options.bound)
    for failure in failures:
        print(f"FAILED: {failure}")
    if not failures:
        print(f"{soak.reads:,} reads, all right; memory and descriptors constant")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
