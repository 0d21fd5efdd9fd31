"""Speed against a peer, measured in turn in one run: `python tests/bench/bench.py [NAME ...]`.

Every figure is a ratio: the peer's time divided by ours, pair by pair, so above 1 is faster than the peer. Machines are
shared and noisy: an absolute time means nothing, and the two are run alternately so that both see the same noise. The
inputs are made in a temporary folder (option --dir) and removed. Nothing here is a test.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tartapefs import TapeRecorder

TAPEFS = [sys.executable, "-m", "tartapefs"]


def run(command: str, folder: Path) -> None:
    subprocess.run(command, shell=True, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def compare(name: str, ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> None:
    """Runs both once to warm up, then in turn; prints the median ratio of the pairs and its range."""
    ratios, our_times, peer_times = [], [], []
    for warm_up in [True] + [False] * rounds:
        times = []
        for work in (ours, peer):
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
        if not warm_up:
            our_times.append(times[0])
            peer_times.append(times[1])
            ratios.append(times[1] / times[0])
    print(
        f"{name:34} {statistics.median(ratios):5.2f} times the peer's speed"
        f" (pairs {min(ratios):.2f} to {max(ratios):.2f};"
        f" medians {statistics.median(our_times):.3f} s against {statistics.median(peer_times):.3f} s)",
        flush=True,
    )


@contextlib.contextmanager
def mounted(source: Path, mountpoint: Path) -> Iterator[Path]:
    mountpoint.mkdir(exist_ok=True)
    subprocess.run([*TAPEFS, "mount", source, mountpoint], check=True)
    try:
        yield mountpoint / "archive.tar"
    finally:
        subprocess.run([*TAPEFS, "unmount", mountpoint], check=True)


def against_tar(name: str, source: Path, work: Path, rounds: int) -> None:
    """Reading the mounted archive against GNU tar making one, both warm, both through a dd of 1 MiB blocks."""
    TapeRecorder(source, overwrite=True).commit()
    with mounted(source, work / "mnt") as archive:
        compare(
            name,
            lambda: run(f"dd if={archive} of=/dev/null bs=1M", work),
            lambda: run(f"tar --format=ustar -cf - {source.name} | dd of=/dev/null bs=1M", source.parent),
            rounds,
        )


def make_small(folder: Path, count: int = 20_000) -> Path:
    """`count` files of 4 KiB in folders of 200."""
    for number in range(count):
        place = folder / f"{number // 200:04}"
        if number % 200 == 0:
            place.mkdir(parents=True)
        (place / f"file-{number:06}.bin").write_bytes(os.urandom(4096))
    return folder


def large(work: Path, rounds: int) -> None:
    source = work / "large"
    source.mkdir()
    with (source / "one.bin").open("wb") as file:
        for _ in range(1024):
            file.write(os.urandom(1 << 20))
    against_tar("read, one file of 1 GiB", source, work, rounds)


def small(work: Path, rounds: int) -> None:
    against_tar("read, 20,000 files of 4 KiB", make_small(work / "small"), work, rounds)


def tree(work: Path, rounds: int) -> None:
    subprocess.run(["cp", "-a", "/usr/share", work / "share"], check=True)
    against_tar("read, a copy of /usr/share", work / "share", work, rounds)


def record(work: Path, rounds: int) -> None:
    source = make_small(work / "record")
    time.sleep(61)  # files changed within the last minute cost a write-back each, which is not the common case
    members = TapeRecorder(source, overwrite=True)
    members.commit()
    times = []

    def ours() -> None:
        begun = time.perf_counter()
        TapeRecorder(source, overwrite=True).commit()
        times.append(time.perf_counter() - begun)

    compare(
        "record, 20,000 files (against find)",
        ours,
        lambda: run(f"find {source.name} -printf '%s %T@ %p\\n' > {work}/found", work),
        rounds,
    )
    print(f"{'':34} {members.member_count / statistics.median(times[1:]):,.0f} members a second")


BENCHES = {bench.__name__: bench for bench in (large, small, tree, record)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=list(BENCHES), help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", help="where to make the inputs")
    arguments = parser.parse_args()
    for name in arguments.names:
        with tempfile.TemporaryDirectory(prefix="tartapefs-bench-", dir=arguments.dir) as work:
            BENCHES[name](Path(work), arguments.rounds)


if __name__ == "__main__":
    main()
