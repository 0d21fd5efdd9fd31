"""Speed against a peer, measured in turn in one run: `python tests/bench/bench.py [NAME ...]`.

Every figure is a ratio: the peer's time divided by ours, pair by pair, so above 1 is faster than the peer. Machines are
shared and noisy: an absolute time means nothing, and the two are run alternately so that both see the same noise. The
inputs are made in a temporary folder (option --dir) and removed. Nothing here is a test.
"""

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tartapefs import TapeRecorder

TAPEFS = [sys.executable, "-m", "tartapefs"]


def run(command: str, folder: Path) -> None:
    subprocess.run(command, shell=True, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Runs both once to warm up, then in turn, `before` ahead of each; prints the median ratio and its range."""
    ratios, our_times, peer_times = [], [], []
    for warm_up in [True] + [False] * rounds:
        times = []
        for work in (ours, peer):
            before()
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
def mounted(source: Path, mountpoint: Path, *options: object) -> Iterator[Path]:
    mountpoint.mkdir(exist_ok=True)
    subprocess.run([*TAPEFS, "mount", source, mountpoint, *map(str, options)], check=True)
    try:
        yield mountpoint / "archive.tar"
    finally:
        subprocess.run([*TAPEFS, "unmount", mountpoint], check=True)


def against_tar(name: str, source: Path, work: Path, rounds: int) -> None:
    """Reading the mounted archive against GNU tar making one, both warm, both through a dd of 1 MiB blocks."""
    TapeRecorder(source, overwrite=True).commit()
    with mounted(source, work / "mnt") as archive:
        compare_reading(name, archive, source, work, rounds)


def compare_reading(
    name: str, archive: Path, source: Path, work: Path, rounds: int, before: Callable[[], object] = lambda: None
) -> None:
    compare(
        name,
        lambda: run(f"dd if={archive} of=/dev/null bs=1M", work),
        lambda: run(f"tar --format=ustar -cf - {source.name} | dd of=/dev/null bs=1M", source.parent),
        rounds,
        before,
    )


def make_small(folder: Path, count: int = 20_000) -> Path:
    """`count` files of 4 KiB in folders of 200."""
    for number in range(count):
        place = folder / f"{number // 200:04}"
        if number % 200 == 0:
            place.mkdir(parents=True)
        (place / f"file-{number:06}.bin").write_bytes(os.urandom(4096))
    return folder


def make_large(folder: Path) -> Path:
    """One file of 1 GiB."""
    folder.mkdir()
    with (folder / "one.bin").open("wb") as file:
        for _ in range(1024):
            file.write(os.urandom(1 << 20))
    return folder


def large(work: Path, rounds: int) -> None:
    against_tar("read, one file of 1 GiB", make_large(work / "large"), work, rounds)


def small(work: Path, rounds: int) -> None:
    against_tar("read, 20,000 files of 4 KiB", make_small(work / "small"), work, rounds)


def tree(work: Path, rounds: int) -> None:
    subprocess.run(["cp", "-a", "/usr/share", work / "share"], check=True)
    against_tar("read, a copy of /usr/share", work / "share", work, rounds)


@contextlib.contextmanager
def served(command: list[object], mountpoint: Path) -> Iterator[None]:
    """A file system that stays in the foreground, until the block ends."""
    mountpoint.mkdir(exist_ok=True)
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not os.path.ismount(mountpoint):
            time.sleep(0.05)
        yield
    finally:
        subprocess.run(["umount", mountpoint], check=True)
        process.wait()


@contextlib.contextmanager
def beside_bindfs(source: Path, work: Path) -> Iterator[tuple[Path, Path]]:
    """The mounted archive, and the finished one through bindfs, which reads it past the kernel's cache as we do."""
    TapeRecorder(source, overwrite=True).commit()
    (work / "finished").mkdir()
    with mounted(source, work / "mnt") as archive:
        run(f"cp {archive} finished/archive.tar", work)
        bindfs = ["bindfs", "-f", "-o", "direct_io", work / "finished", work / "bound"]
        with served(bindfs, work / "bound"):
            yield archive, work / "bound" / "archive.tar"


def bindfs(work: Path, rounds: int) -> None:
    with beside_bindfs(make_large(work / "large"), work) as (archive, bound):
        read = "dd if={} of=/dev/null bs=1M"
        ours, peer = (partial(run, read.format(path), work) for path in (archive, bound))
        compare("read, one file of 1 GiB (bindfs)", ours, peer, rounds)


def read_at_random(path: Path, count: int = 5000) -> None:
    some, fd = random.Random(1), os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    try:
        for _ in range(count):
            os.pread(fd, 4096, some.randrange(size - 4096))
    finally:
        os.close(fd)


def scattered(work: Path, rounds: int) -> None:
    with beside_bindfs(make_large(work / "large"), work) as (archive, bound):
        compare("4 KiB at random (bindfs)", partial(read_at_random, archive), partial(read_at_random, bound), rounds)


def readers(work: Path, rounds: int) -> None:
    """Eight readers, an eighth of the archive each, against one that reads all of it: the ratio of total speeds."""
    source = make_large(work / "large")
    TapeRecorder(source, overwrite=True).commit()
    with mounted(source, work / "mnt") as archive:
        eight = " & ".join(f"dd if={archive} of=/dev/null bs=1M skip={part * 128} count=128" for part in range(8))
        one = f"dd if={archive} of=/dev/null bs=1M count=1024"
        compare("8 readers (one)", partial(run, f"{eight} & wait", work), partial(run, one, work), rounds)


def slow(work: Path, rounds: int) -> None:
    """A source of which each `open` and `read` takes 1 ms more."""
    make_small(work / "origin" / "small", 2000)
    with served([sys.executable, Path(__file__).with_name("slowfs.py"), work / "origin", work / "slow"], work / "slow"):
        source, index = work / "slow" / "small", work / "slow.db"
        TapeRecorder(source, index, overwrite=True).commit()
        with mounted(source, work / "mnt", "--index", index) as archive:
            compare_reading("read, a source with latency", archive, source, work, rounds)


def cold(work: Path, rounds: int) -> None:
    """With nothing in the page cache; only root can empty it."""
    source = make_small(work / "small")
    TapeRecorder(source, overwrite=True).commit()
    with mounted(source, work / "mnt") as archive:
        compare_reading("read, 20,000 of 4 KiB, cold", archive, source, work, rounds, before=drop_caches)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


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


BENCHES = {bench.__name__: bench for bench in (large, small, tree, bindfs, scattered, readers, slow, cold, record)}


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
