"""Speed against peers, measured in turn in one run: `bench.py [ROW ...]`, or `bench.py compare OLD.json NEW.json`.

Every row knows its target. A peer that is not installed is named, and its rows are left out. The inputs are made in a
temporary folder and removed, or kept for the next run with --data. Nothing here is a test.
"""

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path

import measure
import plot
from measure import Result, duration, pairs, seconds, speed
from programs import PROGRAMS, Program, nginx, seaweedfs, shell, with_processor_time, works
from synthetic import SIZE, Synthetic, SyntheticGenerations

from tartapefs import Tape, TapePlayer, TapeRecorder
from tartapefs.archive.layout import BLOCK
from tartapefs.verify.seal import seal

MIB = 1 << 20
TAPEFS = [sys.executable, "-m", "tartapefs"]
SETTLED = 61  # seconds; to record a file that changed later than that costs more, which is not the common case
_NOT_FULL = 64 << 10  # bytes of pages that are not, in the tables of digests


def run(command: str, folder: Path) -> None:
    subprocess.run(command, shell=True, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read(path: Path, blocks: str = "") -> Callable[[], None]:
    """Reading the file, or some of its blocks of 1 MiB, with dd."""
    return partial(run, f"dd if={path} of=/dev/null bs=1M {blocks}", path.parent)


def tar(source: Path) -> Callable[[], None]:
    """Reading, in the same way, what GNU tar makes of the folder."""
    return partial(run, f"tar --format=ustar -cf - {source.name} | dd of=/dev/null bs=1M", source.parent)


@contextlib.contextmanager
def mounted(source: Path, mountpoint: Path, index: Path | None = None, *options: str) -> Iterator[Path]:
    """The archive, served by a daemon in the background, past the page cache by default; yields its path."""
    mountpoint.mkdir(exist_ok=True)
    options = options or ("--direct",)
    subprocess.run([*TAPEFS, "mount", *options, "--index", index or index_of(source), source, mountpoint], check=True)
    try:
        yield mountpoint / "archive.tar"
    finally:
        subprocess.run([*TAPEFS, "unmount", mountpoint], check=True)


@contextlib.contextmanager
def cached(source: Path, mountpoint: Path, index: Path | None = None, read_ahead: int = 0) -> Iterator[Path]:
    """The archive with the options that a mount has by default; `read_ahead`: another one, in KiB."""
    with mounted(source, mountpoint, index, "--mode=0400") as archive:
        if read_ahead:
            device = os.stat(mountpoint).st_dev
            place = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
            place.write_text(str(read_ahead))
        yield archive


@contextlib.contextmanager
def served(command: list[object], mountpoint: Path) -> Iterator[int]:
    """A file system that stays in the foreground until the block ends; yields its process's number."""
    mountpoint.mkdir(exist_ok=True)
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not os.path.ismount(mountpoint):
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended before its file system was mounted")
            time.sleep(0.05)
        yield process.pid
    finally:
        subprocess.run(["umount", mountpoint], check=process.poll() is None)
        process.wait()


def index_of(source: Path) -> Path:
    """Beside the folder and not in it: the peers shall not read it."""
    return source.with_suffix(".db")


def sealed_index_of(source: Path) -> Path:
    return source.with_suffix(".sealed.db")


def record(source: Path) -> None:
    TapeRecorder(source, index_of(source), overwrite=True, processes=2).commit()


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


class Bench:
    """The rows, one method each, and their inputs, which are made when a row first needs them."""

    def __init__(self, data: Path, rounds: int, members: list[int]) -> None:
        self.data = data
        self.rounds = rounds
        self.members = members
        self.mnt = data / "mnt"
        self.bound = data / "bound"

    def _recorded(self, name: str, make: Callable[[Path], None]) -> Path:
        source = self.data / name
        if not source.exists():
            unfinished = self.data / "unfinished" / name
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.parent.mkdir(exist_ok=True)
            make(unfinished)
            unfinished.rename(source)
        record(source)
        return source

    @cached_property
    def small_files(self) -> Path:
        return self._recorded("small", partial(make_small, count=20_000))

    @cached_property
    def large_file(self) -> Path:
        return self._recorded("large", make_large)

    @cached_property
    def real_tree(self) -> Path:
        return self._recorded("share", lambda folder: run(f"cp -a /usr/share {folder}", self.data))

    @contextlib.contextmanager
    def _beside_bindfs(self) -> Iterator[tuple[Path, Path]]:
        """The large file's archive, and the finished one through bindfs; both past the kernel's cache."""
        finished = self.data / "finished"
        with mounted(self.large_file, self.mnt) as archive:
            if not finished.exists():
                finished.mkdir()
                run(f"cp {archive} finished/archive.tar", self.data)
            command = ["bindfs", "-f", "-o", "direct_io", finished, self.bound]
            with served(command, self.bound):
                yield archive, self.bound / "archive.tar"

    def programs(self) -> Iterator[Result]:
        """With the options that a mount has by default, by root: read-ahead is 4 MiB."""
        for name, source in self._trees():
            with cached(source, self.mnt) as archive:
                for program in PROGRAMS:
                    yield from self._program(program, name, archive, source, program.target)
                yield from self._nginx(name, archive, source)

    def _trees(self) -> Iterator[tuple[str, Path]]:
        yield "1 GiB in one file", self.large_file
        yield "20,000 files of 4 KiB", self.small_files
        yield "a copy of /usr/share", self.real_tree

    def _program(
        self, program: Program, name: str, archive: Path, source: Path, target: float, note: str = ""
    ) -> Iterator[Result]:
        if shutil.which(program.command.split()[0]) is None:
            print(f"{program.name} is left out; not installed", file=sys.stderr)
            return
        ours, peer, before = works(program, archive, source, self.data / "out")
        taken = pairs(ours, peer, self.rounds, before)
        yield speed(f"{program.name}, {name}{note}", program.peer, taken, target)

    def _nginx(self, name: str, archive: Path, source: Path) -> Iterator[Result]:
        if shutil.which("nginx") is None or shutil.which("curl") is None:
            return
        equal = source.with_suffix(".copy")
        with (
            nginx(archive.parent, self.data / "nginx") as ours,
            nginx(self.data, self.data / "nginx-beside") as beside,
        ):
            get = "curl -fso /dev/null"
            taken = pairs(
                partial(shell, f"{get} {ours}/{archive.name}"),
                partial(shell, f"{get} {beside}/{equal.name}"),
                self.rounds,
            )
        yield speed(f"nginx and curl, {name}", "a finished archive", taken, 0.8)

    def user(self) -> Iterator[Result]:
        """With the read-ahead of 128 KiB that an archive has which no root has mounted."""
        for name, source in self._trees():
            with cached(source, self.mnt, read_ahead=128) as archive:
                for program in PROGRAMS[:4]:
                    yield from self._program(program, name, archive, source, 0.8, ", by a user")

    def direct(self) -> Iterator[Result]:
        with cached(self.large_file, self.mnt) as archive, mounted(self.large_file, self.data / "bare") as direct:
            yield speed("dd bs=1M, 1 GiB in one file", "--direct", pairs(read(archive), read(direct), self.rounds), 0.8)
            first, second = (f"md5sum < <(tail -c +{at} {archive} | head -c 536870912)" for at in (1, 536870912))
            taken = pairs(
                partial(shell, f"{first} & {second} & wait"), partial(shell, f"{first}; {second}"), self.rounds
            )
            yield speed("two readers at once, half of 1 GiB each", "one after the other", taken, 1.3)

    def processor(self) -> Iterator[Result]:
        """Of all processes that take part."""
        dd = Program("dd bs=1M", "dd if={file} of=/dev/null bs=1M", "dd of=/dev/null bs=1M")
        for name, source in self._trees():
            command = [*TAPEFS, "mount", "--foreground", "--index", index_of(source), source, self.mnt]
            with served(command, self.mnt) as daemon:
                pids = [daemon, *map(int, Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split())]
                for program in (dd, PROGRAMS[0]):
                    ours, peer, _ = works(program, self.mnt / "archive.tar", source, self.data / "out")
                    taken = [
                        (with_processor_time(ours, pids), with_processor_time(peer, [])) for _ in range(self.rounds)
                    ]
                    yield duration(f"processor time, {program.name}, {name}", "the pipe", taken, 1.0)

    def fresh(self) -> Iterator[Result]:
        """Files that changed within the last minute: the recorder takes a lease of each."""
        source = self.data / "fresh"
        taken = []
        for _ in range(min(self.rounds, 5)):
            shutil.rmtree(source, ignore_errors=True)
            make_small(source, count=50_000)
            ours = seconds(partial(record, source))
            taken.append((ours, seconds(partial(run, f"find {source.name} -printf '%s %T@ %p\\n' > found", self.data))))
        shutil.rmtree(source)
        yield duration("record 50,000 files of the last minute", "find", taken, 3.5)

    def _against_tar(self, name: str, source: Path, target: float) -> Iterator[Result]:
        with mounted(source, self.mnt) as archive:
            yield speed(name, "tar", pairs(read(archive), tar(source), self.rounds), target)

    def small(self) -> Iterator[Result]:
        yield from self._against_tar("read 20,000 files of 4 KiB", self.small_files, 1.1)

    def tree(self) -> Iterator[Result]:
        yield from self._against_tar("read a copy of /usr/share", self.real_tree, 1.1)

    def large(self) -> Iterator[Result]:
        yield from self._against_tar("read one file of 1 GiB", self.large_file, 1.1)

    def bindfs(self) -> Iterator[Result]:
        with self._beside_bindfs() as (archive, bound):
            taken = pairs(read(archive), read(bound), self.rounds)
            yield speed("read one file of 1 GiB, beside bindfs", "bindfs", taken, 1.2)

    def readers(self) -> Iterator[Result]:
        with mounted(self.large_file, self.mnt) as archive:
            one = f"dd if={archive} of=/dev/null bs=1M"
            eight = " & ".join(f"{one} skip={128 * part} count=128" for part in range(8))
            taken = pairs(partial(run, f"{eight} & wait", self.data), read(archive, "count=1024"), self.rounds)
            yield speed("8 readers, an eighth of 1 GiB each", "one", taken, 1.3)

    def random(self) -> Iterator[Result]:
        with self._beside_bindfs() as (archive, bound):
            taken = pairs(partial(read_at_random, archive), partial(read_at_random, bound), self.rounds)
            yield duration("4 KiB at random", "bindfs", taken, 0.8)

    def sealed(self) -> Iterator[Result]:
        """With digests of contents beside without, of the same folder, both mounted."""
        with self._beside_sealed(self.large_file) as (sealed, bare):
            taken = pairs(read(sealed), read(bare), self.rounds)
            yield speed("read one sealed file of 1 GiB", "one without digests", taken, 0.7)
            with (
                cached(self.large_file, self.data / "mnt2", index=sealed_index_of(self.large_file)) as ahead,
                cached(self.large_file, self.data / "bare2") as bare_ahead,
            ):
                taken = pairs(partial(shell, f"md5sum {ahead}"), partial(shell, f"md5sum {bare_ahead}"), self.rounds)
                yield speed("md5sum of one sealed file of 1 GiB", "one without digests", taken, 0.9)
            some = partial(read_at_random, count=1000)
            taken = pairs(partial(some, sealed), partial(some, bare), self.rounds)
            yield duration("4 KiB at random of a sealed file", "one without digests", taken, 3)
        with self._beside_sealed(self.small_files) as (sealed, bare):
            taken = pairs(read(sealed), read(bare), self.rounds)
            yield speed("read 20,000 sealed files of 4 KiB", "ones without digests", taken, 0.5)
        for name, source, unit, most in (
            ("20,000 files of 4 KiB", self.small_files, "bytes a member", 46),
            ("1 GiB in one file", self.large_file, "bytes a block", 36),
        ):
            with Tape.discover(source, sealed_index_of(source)) as tape:
                count = tape.member_count if unit == "bytes a member" else tape.total_size // tape.block_size
                more = os.stat(tape.index_path).st_size - os.stat(index_of(source)).st_size - _NOT_FULL
            yield Result(f"what digests of {name} add beyond 64 KiB", unit, (more / count,), "at most", most)

    @contextlib.contextmanager
    def _beside_sealed(self, source: Path) -> Iterator[tuple[Path, Path]]:
        shutil.copy(index_of(source), sealed_index_of(source))
        with Tape.discover(source, sealed_index_of(source)) as tape, closing(TapePlayer(tape, source)) as player:
            seal(tape, player.source, player.at_home, processes=2)
        with (
            mounted(source, self.mnt, sealed_index_of(source)) as sealed,
            mounted(source, self.data / "bare") as bare,
        ):
            yield sealed, bare

    def slow(self) -> Iterator[Result]:
        if not (self.data / "origin").exists():
            make_small(self.data / "origin" / "slowed", count=2000)
        mountpoint = self.data / "latency"
        with served(
            [sys.executable, Path(__file__).with_name("slowfs.py"), self.data / "origin", mountpoint], mountpoint
        ):
            source = mountpoint / "slowed"
            TapeRecorder(source, self.data / "slowed.db", overwrite=True, processes=2).commit()
            with mounted(source, self.mnt, self.data / "slowed.db") as archive:
                taken = pairs(read(archive), tar(source), min(self.rounds, 5))
            yield speed("read 2,000 files, 1 ms per open and read", "tar", taken, 8)
            with cached(source, self.mnt, index=self.data / "slowed.db") as archive:
                ours, peer, _ = works(PROGRAMS[0], archive, source, self.data / "out", beside=False)
                taken = pairs(ours, peer, min(self.rounds, 5))
            yield speed("md5sum, 2,000 files, 1 ms per open and read", "the pipe", taken, 8)

    def cold(self) -> Iterator[Result]:
        with mounted(self.small_files, self.mnt) as archive:
            taken = pairs(read(archive), tar(self.small_files), self.rounds, drop_caches)
        yield speed("read 20,000 files of 4 KiB, cold", "tar", taken, 1.5)

    def record(self) -> Iterator[Result]:
        for name, source in (("20,000 files", self.small_files), ("a copy of /usr/share", self.real_tree)):
            age = time.time() - max(os.lstat(path).st_ctime for path in source.rglob("*"))
            time.sleep(max(0.0, SETTLED - age))
            find = f"find {source.name} -printf '%s %T@ %p\\n' > found"
            taken = pairs(partial(record, source), partial(run, find, self.data), self.rounds)
            yield duration(f"record {name}", "find", taken, 4)
            with Tape.discover(source, index_of(source)) as tape:
                rates = tuple(tape.member_count / ours for ours, _ in taken)
            yield Result(f"record {name}: rate", "members a second", rates, "at least", 100_000)

    def md5(self) -> Iterator[Result]:
        for name, source in (("1 GiB in one file", self.large_file), ("20,000 files of 4 KiB", self.small_files)):
            sums = f"find {source.name} -type f -print0 | xargs -0 md5sum"
            # To a new file each time: to give back the pages of an old one is the file system's work, and takes long.
            # And into memory that is there: what a virtual machine gave back to its host costs 3 s a GiB to get again.
            played = self.data / "played"
            fresh = partial(run, "rm -f played; dd if=/dev/zero of=filled bs=1M count=1024; rm filled", self.data)
            taken = pairs(partial(play, source, played), partial(run, sums, self.data), self.rounds, fresh)
            yield duration(f"play() with MD5, {name}", "md5sum", taken, 1.3)
        played.unlink(missing_ok=True)

    def upload(self) -> Iterator[Result]:
        """To one server, against programs that send the finished archive, each as it does by default."""
        record(self.large_file)
        finished = self.data / "archive.tar"
        ours, index = " ".join(TAPEFS), index_of(self.large_file)
        run(f"{ours} play {self.large_file} --index {index} -o {finished} --force", self.data)
        with seaweedfs(self.data / "seaweedfs") as url:
            names = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
            os.environ |= names | {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
            remote = f":s3,provider=SeaweedFS,env_auth,endpoint='{url}':tapes"
            empty = partial(run, f'rclone delete "{remote}"', self.data)
            upload = partial(run, f"{ours} upload {self.large_file} s3://tapes/ours.tar --index {index}", self.data)
            for peer, command in (
                ("rclone copyto", f'rclone copyto {finished} "{remote}/peer.tar"'),
                ("aws s3 cp", f"aws s3 cp {finished} s3://tapes/peer.tar"),
            ):
                taken = pairs(upload, partial(run, command, self.data), min(self.rounds, 3), empty)
                yield speed(f"upload 1 GiB to SeaweedFS, beside {peer}", peer, taken, 1)

    def index(self) -> Iterator[Result]:
        for name, source in (("20,000 files", self.small_files), ("a copy of /usr/share", self.real_tree)):
            with Tape.discover(source, index_of(source)) as tape:
                size = os.stat(tape.index_path).st_size / tape.member_count
            yield Result(f"index of {name}", "bytes a member", (size,), "at most", 100)

    def append(self) -> Iterator[Result]:
        """A thousandth is added to a folder, round by round, which is then recorded anew as well."""
        for members in self.members:
            source, new = self.data / f"grown-{members}", self.data / f"new-{members}"
            grown, anew = source.with_suffix(".append.db"), index_of(source)
            shutil.rmtree(new, ignore_errors=True)
            if not source.exists():
                make_small(source, members, b"x")
            for number in range(self.rounds):
                make_small(new / f"{number}", members // 1000, b"x")
            time.sleep(SETTLED)
            subprocess.run([*TAPEFS, "record", "--force", "--index", grown, source], check=True, capture_output=True)
            taken = []
            for number in range(self.rounds):
                (new / f"{number}").rename(source / f"{time.time_ns()}")
                taken.append([cost("--append", grown, source), cost("--force", anew, source)])
            for at, what in enumerate(("time", "processor time")):
                both = [(one[at], other[at]) for one, other in taken]
                name = f"record --append of {members // 1000:,} to {members:,}: {what}"
                yield duration(name, "record --force", both, 1.3)

    def names(self) -> Iterator[Result]:
        """Lookups by name in 100 generations: the first of a process, others, and of names that are missing."""
        for members in self.members:
            tape, some = SyntheticGenerations(self.data / f"generations-{members}", members, 100), random.Random(1)
            tape.make()
            taken: dict[str, list[float]] = {"first": [], "another": [], "missing": []}
            worst = dict.fromkeys(taken, 0.0)
            for _ in range(10 * self.rounds):
                with Tape.from_index(tape.index) as opened:
                    names = [tape.random_name(some) for _ in range(100)]
                    wanted = {"first": names[:1], "another": names[1:], "missing": [f"{name}.gone" for name in names]}
                    for what, these in wanted.items():
                        found = [1000 * seconds(partial(look_up, opened, name)) for name in these]
                        taken[what].append(sum(found) / len(found))
                        worst[what] = max(worst[what], *found)
            for what, means in taken.items():
                note = f"the slowest took {worst[what]:.2f}"
                yield Result(f"{what} name, {members:,} members", "ms", tuple(means), "at most", 10, note)

    def scale(self) -> Iterator[Result]:
        for members in self.members:
            tape = Synthetic(self.data / f"members-{members}", members)
            tape.make()
            size = os.stat(tape.index).st_size / (tape.folders * 1000 + 1)
            yield Result(f"index of {members:,} members", "bytes a member", (size,), "at most", 100)
            yield from self._beginnings(tape)
            yield from self._memory(tape)

    def _beginnings(self, tape: Synthetic) -> Iterator[Result]:
        """From `mount` to the first block, and then, as the second thing that this daemon reads, one at 99%."""
        to_readable, first_bytes = [], []
        for round_ in range(self.rounds):
            self.mnt.mkdir(exist_ok=True)
            begun = time.perf_counter()
            with mounted(tape.root, self.mnt, tape.index) as archive:
                read_block(archive, 0)
                to_readable.append(time.perf_counter() - begun)
                offset = tape.start(tape.last_folder, 100 * round_) + BLOCK
                first_bytes.append(1000 * seconds(partial(read_block, archive, offset)))
        yield Result(f"mount to readable, {tape.members:,} members", "s", tuple(to_readable), "at most", 0.5)
        yield Result(f"first byte at 99%, {tape.members:,} members", "ms", tuple(first_bytes), "at most", 2)

    def _memory(self, tape: Synthetic) -> Iterator[Result]:
        command = [*TAPEFS, "mount", "--foreground", "--index", tape.index, tape.root, self.mnt]
        with served(command, self.mnt) as daemon:
            time.sleep(1)
            yield memory(f"memory, {tape.members:,} members, idle", daemon)
            use(self.mnt / "archive.tar", tape)
            yield memory(f"memory, {tape.members:,} members, after use", daemon)


PEERS = {
    "programs": ("tar", "bash"),  # what users run comes first
    "user": ("tar", "bash"),
    "direct": ("dd", "bash", "tail", "head"),
    "processor": ("tar", "dd"),
    "fresh": ("find",),
    "small": ("tar", "dd"),
    "tree": ("tar", "dd"),
    "large": ("tar", "dd"),
    "bindfs": ("bindfs", "dd"),
    "readers": ("dd",),
    "random": ("bindfs",),
    "sealed": ("dd",),
    "slow": ("tar", "dd"),
    "record": ("find",),
    "md5": ("md5sum", "find", "xargs"),
    "upload": ("weed", "rclone", "aws"),
    "index": (),
    "append": (),
    "names": (),
    "scale": (),
    "cold": ("tar", "dd"),  # the last: it takes what the others keep in the page cache
}


def make_small(folder: Path, count: int, content: bytes = b"") -> None:
    """`count` files in folders of 200, of this content, or 4 KiB each."""
    for number in range(count):
        place = folder / f"{number // 200:04}"
        if number % 200 == 0:
            place.mkdir(parents=True)
        (place / f"file-{number:06}.bin").write_bytes(content or os.urandom(4096))


def cost(how: str, index: Path, source: Path) -> tuple[float, float]:
    """The seconds that `record` takes, and those of processors."""
    before = os.times()
    subprocess.run([*TAPEFS, "record", how, "--index", index, source], check=True, capture_output=True)
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return after.elapsed - before.elapsed, processor


def make_large(folder: Path) -> None:
    """One file of 1 GiB."""
    folder.mkdir()
    with (folder / "one.bin").open("wb") as file:
        for _ in range(1024):
            file.write(os.urandom(MIB))


def look_up(tape: Tape, name: str) -> None:
    """Finds the member, or that there is none."""
    with contextlib.suppress(KeyError):
        tape.find(name)


def read_block(path: Path, offset: int) -> None:
    with path.open("rb", buffering=0) as file:
        if len(os.pread(file.fileno(), BLOCK, offset)) != BLOCK:
            raise RuntimeError(f"{path}: a short read")


def read_at_random(path: Path, count: int = 5000) -> None:
    some = random.Random(1)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for _ in range(count):
            os.pread(file.fileno(), 4096, some.randrange(size - 4096))


def play(source: Path, target: Path) -> None:
    with (
        Tape.discover(source, index_of(source)) as tape,
        closing(TapePlayer(tape)) as player,
        target.open("wb", buffering=MIB) as file,
    ):
        for event in player.play(processes=2):
            if event.type == "file_data":
                file.write(event.data)


def use(path: Path, tape: Synthetic, count: int = 10_000) -> None:
    """Reads headers and bodies of real members all over the tape, and ten times a stretch of them in order."""
    some = random.Random(1)
    with path.open("rb", buffering=0) as file:
        for _ in range(count):
            folder = some.randrange(tape.folders)
            start = tape.start(folder, some.randrange(tape.real(folder)))
            offset, size = some.choice(((start, BLOCK), (start + BLOCK, SIZE)))
            os.pread(file.fileno(), size, offset)
        begin, end = tape.start(tape.last_folder, 0), tape.start(tape.last_folder, tape.real(tape.last_folder))
        for _ in range(10):
            for offset in range(begin, end, MIB):
                os.pread(file.fileno(), min(MIB, end - offset), offset)


def memory(name: str, daemon: int) -> Result:
    """What daemon and helper take: all that the daemon has, and what the helper has beyond it.

    The sum of both RSS would count twice what they share; PSS gives a part of it to other programs.
    """
    (helper,) = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    ours, theirs = pages(daemon), pages(int(helper))
    total = ours["Rss"] + theirs["Private_Clean"] + theirs["Private_Dirty"]
    note = f"RSS {ours['Rss']:.1f} + {theirs['Rss']:.1f}; PSS {ours['Pss']:.1f} + {theirs['Pss']:.1f}"
    return Result(name, "MiB", (total,), "at most", 64, note)


def pages(pid: int) -> dict[str, float]:
    """The kinds of memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(size.split()[0]) / 1024 for name, size in (line.split(":") for line in lines)}


def lacking(row: str) -> str:
    """Why the row cannot be measured here, if so."""
    missing = [peer for peer in PEERS[row] if shutil.which(peer) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if row in ("cold", "programs", "user", "direct") and os.geteuid() != 0:
        return "only root can empty the page cache, or set read-ahead"
    return ""


def compare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py compare", description="Exits 1 if NEW is slower, beyond noise.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args(arguments)
    old, new = measure.load(given.old), measure.load(given.new)
    for name in sorted({result.name for result in old} ^ {result.name for result in new}):
        print(f"in one of them only: {name}", file=sys.stderr)
    found = measure.regressions(old, new)
    print("\n".join(found) or "no regression")
    return 1 if found else 0


def main() -> int:
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(PEERS)}; all by default")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs in each row")
    parser.add_argument(
        "--members", type=int, nargs="*", default=[10_000, 1_000_000],
        help="sizes of the tapes for the rows `scale`, `append` and `names`; one of 10000000 takes minutes to make",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="a folder for the inputs, which are kept there and used again")
    parser.add_argument("--json", type=Path, help="adds the results to this file, in place of older ones")
    parser.add_argument("--plot", type=Path, help="draws all results, those added to the file included, as SVG")
    given = parser.parse_args()
    if unknown := set(given.rows) - set(PEERS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    results = {result.name: result for result in measure.load(given.json)} if given.json and given.json.exists() else {}
    print(measure.HEAD, flush=True)
    with contextlib.ExitStack() as stack:
        if given.data is None:
            given.data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tartapefs-bench-")))
        given.data.mkdir(parents=True, exist_ok=True)
        bench = Bench(given.data.resolve(), given.rounds, given.members)
        for row in given.rows or PEERS:
            if reason := lacking(row):
                print(f"{row} is left out; {reason}", file=sys.stderr)
                continue
            for result in getattr(bench, row)():
                print(result.line(), flush=True)
                results[result.name] = result
    if given.json:
        measure.save(given.json, list(results.values()))
    if given.plot:
        plot.save(given.plot, list(results.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
