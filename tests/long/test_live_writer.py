"""A live writer: a folder is changed at random under concurrent readers. Recorded bytes or an error, never others.

What a byte should be is known without the code under test: the archive of each recording is kept from an independent
reference, made before the next change, and no two writes ever have the same content. `TARTAPEFS_LIVE_MUTATIONS` says
how many changes, `TARTAPEFS_LIVE_SEED` which.
"""

import ctypes
import errno
import io
import mmap
import os
import random
import shutil
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.mounting import mountpoint as mountpoint
from support.programs import run, wait_until
from support.reference import Reference

from tartapefs import Tape, TapeError, TapeIntegrityError, TapePlayer, TapeRecorder

MUTATIONS = int(os.environ.get("TARTAPEFS_LIVE_MUTATIONS", "1500"))
BURSTS = (1, 3, 10, 40)  # changes between two recordings
MOUNTED_MUTATIONS = MUTATIONS // 5
REST = 0.003  # seconds, of a reader that met drift, so that others get on
READERS = 3
SIZES = (1, 511, 512, 4096, 9000, 70_000)


def content(generation: int, size: int) -> bytes:
    return (b"%015d\n" % generation * (size // 16 + 1))[:size]


class Writer:
    """Changes the folder at random, each time in one of many ways."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.aside = root, root.parent / "aside"
        self.choose = random.Random(seed)
        self.generation = 0
        self.now: list[Path] = []
        self.done: Counter[str] = Counter()
        self.mappings: list[mmap.mmap] = []
        self.actions = [getattr(self, name) for name in sorted(vars(Writer)) if name.startswith("do_")]
        self.aside.mkdir()
        for number in range(12):
            folder = root / f"folder{number % 4}" / "deep"[: 4 * (number % 2)]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"file{number}").write_bytes(self.fresh(self.choose.choice(SIZES)))
        (root / "link").symlink_to("folder0")

    def close(self) -> None:
        """Closes all mappings: a recording refuses files that a program can still write."""
        while self.mappings:
            self.mappings.pop().close()

    def fresh(self, size: int) -> bytes:
        self.generation += 1
        return content(self.generation, size)

    def step(self) -> None:
        """One change that really happened."""
        while True:
            action = self.choose.choice(self.actions)
            self.now = self.listed()
            try:
                if action() is None:
                    self.done[action.__name__] += 1
                    return
            except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
                continue  # the folder has nothing like it just now
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EINVAL):
                    raise

    def listed(self) -> list[Path]:
        found = []
        for folder, folders, files in os.walk(self.root):
            if ".tartape" in folders:
                folders.remove(".tartape")
            found += [Path(folder, name) for name in sorted(folders + files)]
        return found

    def some(self, kind: Callable[[Path], bool]) -> Path:
        found = list(filter(kind, self.now))
        if not found:
            raise FileNotFoundError
        return self.choose.choice(found)

    def file(self) -> Path:
        return self.some(lambda path: path.is_file() and not path.is_symlink())

    def folder(self) -> Path:
        return self.some(lambda path: path.is_dir() and not path.is_symlink())

    def name(self) -> Path:
        self.generation += 1
        return self.folder() / f"new{self.generation}"

    def do_rewrite_in_place(self) -> None:
        path = self.file()
        with path.open("r+b", buffering=0) as file:
            file.write(self.fresh(path.stat().st_size))

    def do_rewrite_and_put_mtime_back(self) -> None:
        path = self.file()
        before = path.stat()
        with path.open("r+b", buffering=0) as file:
            file.write(self.fresh(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def do_write_a_part(self) -> None:
        path = self.file()
        with path.open("r+b", buffering=0) as file:
            file.seek(self.choose.randrange(path.stat().st_size + 1))
            file.write(self.fresh(100))

    def do_store_through_a_mapping(self) -> bool | None:
        path = self.file()
        if path.stat().st_size == 0:
            return False
        with path.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), 0)
        self.mappings.append(mapping)
        mapping[0:16] = self.fresh(16)[: len(mapping)].ljust(len(mapping[0:16]))
        while len(self.mappings) > 4:
            self.mappings.pop(0).close()
        return None

    def do_store_through_an_old_mapping(self) -> bool | None:
        if not self.mappings:
            return False
        mapping = self.choose.choice(self.mappings)
        if mapping.size() < len(mapping):  # truncated since: a store could be fatal
            return False
        mapping[0:16] = self.fresh(16)[: len(mapping)].ljust(len(mapping[0:16]))
        return None

    def do_truncate(self) -> None:
        path = self.file()
        if any(mapping.size() for mapping in self.mappings):
            self.close()
        os.truncate(path, self.choose.randrange(path.stat().st_size + 1))

    def do_append(self) -> None:
        with self.file().open("ab", buffering=0) as file:
            file.write(self.fresh(self.choose.choice(SIZES)))

    def do_punch_a_hole(self) -> None:
        path = self.file()
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        with path.open("r+b") as file:
            assert fallocate(file.fileno(), 3, 0, 4096) == 0 or ctypes.get_errno() == errno.EOPNOTSUPP

    def do_touch(self) -> None:
        os.utime(self.file())

    def do_chmod(self) -> None:
        self.some(lambda path: not path.is_symlink()).chmod(self.choose.choice((0o700, 0o711, 0o755, 0o750)))

    def do_rename(self) -> None:
        self.file().rename(self.name())

    def do_rename_a_folder(self) -> None:
        self.folder().rename(self.name())

    def do_move_a_folder_away_and_back(self) -> None:
        path = self.folder()
        path.rename(self.aside / "away")
        (self.aside / "away").rename(path)

    def do_replace(self) -> None:
        path = self.file()
        (self.aside / "other").write_bytes(self.fresh(path.stat().st_size))
        shutil.copystat(path, self.aside / "other")
        (self.aside / "other").replace(path)

    def do_replace_by_another(self) -> None:
        self.file().replace(self.file())

    def do_swap_for_a_link(self) -> None:
        path = self.file()
        other = self.aside / f"target{self.generation}"
        path.rename(other)
        path.symlink_to(f"../aside/{other.name}")

    def do_swap_for_a_pipe(self) -> None:
        path = self.file()
        path.unlink()
        os.mkfifo(path)

    def do_swap_for_a_folder(self) -> None:
        path = self.file()
        path.unlink()
        path.mkdir()

    def do_retarget(self) -> None:
        path = self.some(Path.is_symlink)
        self.generation += 1
        (self.aside / "link").symlink_to(f"somewhere{self.generation}")
        (self.aside / "link").replace(path)

    def do_delete(self) -> None:
        if len(self.now) < 30:
            raise FileNotFoundError
        self.some(lambda path: not path.is_dir() or path.is_symlink()).unlink()

    def do_delete_a_folder(self) -> None:
        self.folder().rmdir()

    def do_add(self) -> None:
        if len(self.now) > 60:
            raise FileExistsError
        self.name().write_bytes(self.fresh(self.choose.choice(SIZES)))

    def do_add_in_the_root(self) -> None:
        if len(self.now) > 60:
            raise FileExistsError
        self.generation += 1
        (self.root / f"top{self.generation}").write_bytes(self.fresh(self.choose.choice(SIZES)))

    def do_add_a_folder(self) -> None:
        if len(self.now) > 60:
            raise FileExistsError
        self.name().mkdir()

    def do_hard_link(self) -> None:
        os.link(self.file(), self.name())


@contextmanager
def errors_are_drift() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise TapeIntegrityError("archive.tar", []) from None


class Opened:
    """A mounted archive that one reader has open, used as a player is."""

    def __init__(self, archive: Path) -> None:
        with errors_are_drift():
            self._fd = os.open(archive, os.O_RDONLY)

    def read(self, at: int, size: int) -> bytes:
        data = b""
        with errors_are_drift():  # a read of several pages may end before the one that fails
            while len(data) < size and (more := os.pread(self._fd, size - len(data), at + len(data))):
                data += more
        return data

    def close(self) -> None:
        os.close(self._fd)


@dataclass
class Recording:
    """A tape, the archive that it must have, and what its readers met."""

    tape: Tape
    root: Path
    expected: bytes
    open: Callable[[], "TapePlayer | Opened"]
    reads: int = 0
    drifted: int = 0
    completed: int = 0
    wrong: list[str] = field(default_factory=list)

    def read_at_random(self, seed: int, ended: threading.Event) -> None:
        """Reads anywhere, whole ranges and small ones, until it drifts, and then with a new player."""
        choose = random.Random(seed)
        while not ended.is_set():
            try:
                with closing(self.open()) as player:
                    while not ended.is_set():
                        at = choose.randrange(len(self.expected))
                        self.check(player, at, choose.choice((1, 512, 3000, 100_000)))
            except TapeIntegrityError:
                self.drifted += 1
            ended.wait(REST)

    def read_in_order(self, ended: threading.Event) -> None:
        while not ended.is_set():
            at = 0
            try:
                with closing(self.open()) as player:
                    while at < len(self.expected) and not ended.is_set():
                        at += self.check(player, at, 20_000)
                    self.completed += at >= len(self.expected)
            except TapeIntegrityError:
                self.drifted += 1
            ended.wait(REST)

    def whole(self) -> bytes:
        with closing(self.open()) as player:
            return player.read(0, len(self.expected))

    def check(self, player: "TapePlayer | Opened", at: int, size: int) -> int:
        data = player.read(at, size)
        self.reads += 1
        if data != self.expected[at : at + size]:
            self.wrong.append(f"{size} bytes at {at}")
        return len(data)


def record(root: Path) -> Recording:
    """Records the folder, which nobody changes meanwhile."""
    TapeRecorder(root, overwrite=True).commit()
    reference = Reference(root)
    tape = Tape.discover(root)
    return Recording(tape, root, reference.read(0, reference.size), lambda: TapePlayer(tape, root))


def put_times_back(root: Path, archive: bytes) -> None:
    """Gives all folders the times that they have in the archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isdir():
                os.utime(root.parent / member.name, (member.mtime, member.mtime))


def readers_of(
    recording: Recording, seed: int, ended: threading.Event, failures: list[Exception]
) -> list[threading.Thread]:
    def reads(number: int) -> None:
        try:
            if number == 0:
                recording.read_in_order(ended)
            else:
                recording.read_at_random(seed + number, ended)
        except Exception as error:
            failures.append(error)
            raise

    return [threading.Thread(target=reads, args=(number,)) for number in range(READERS)]


def change_while_it_is_read(
    recording: Recording, writer: Writer, seed: int, most: int, failures: list[Exception]
) -> None:
    """A burst of changes, `most` at most, while readers of all kinds read; all of them have ended after it."""
    ended = threading.Event()
    readers = readers_of(recording, seed + writer.generation, ended, failures)
    for reader in readers:
        reader.start()
    try:
        wait_until(lambda: recording.reads >= 10)
        for _ in range(min(writer.choose.choice(BURSTS), most)):
            writer.step()
            time.sleep(writer.choose.choice((0, 0, 0.0005, 0.002)))
    finally:
        ended.set()
        for reader in readers:
            reader.join(30)
    assert not any(reader.is_alive() for reader in readers)


def test_never_a_wrong_byte(tmp_path: Path) -> None:
    """Bursts of random changes, each on a new recording and under its readers; every read is right or raises."""
    root = tmp_path / "data"
    root.mkdir()
    seed = int(os.environ.get("TARTAPEFS_LIVE_SEED", "1"))
    total: Counter[str] = Counter()
    wrong: list[str] = []
    failures: list[Exception] = []
    writer = Writer(root, seed)
    with closing(writer):
        while writer.done.total() < MUTATIONS:
            writer.close()
            recording = record(root)
            with closing(recording.tape):
                change_while_it_is_read(recording, writer, seed, MUTATIONS - writer.done.total(), failures)
                # After the burst nobody gets the whole archive any more: the first drift is enough, and there was some.
                with closing(TapePlayer(recording.tape, root)) as player:
                    try:
                        played = b"".join(event.data for event in player.play())
                    except TapeIntegrityError:
                        total["refused at the end"] += 1
                    else:
                        # A change that changed nothing, such as a file renamed to itself, or a folder's time alone.
                        put_times_back(root, recording.expected)
                        now = Reference(root)
                        assert played == recording.expected == now.read(0, now.size)
                        total["unchanged at the end"] += 1
            wrong += recording.wrong
            total += Counter(
                reads=recording.reads, drifted=recording.drifted, completed=recording.completed, recordings=1
            )
    print(f"seed {seed}: {writer.done.total()} changes {dict(writer.done)}; {dict(total)}")
    assert not failures
    assert not wrong
    assert writer.done.total() == MUTATIONS
    assert total["refused at the end"] > total["unchanged at the end"]


@pytest.mark.fuse
@pytest.mark.matrix(but="cached")
@pytest.mark.parametrize("options", [("--direct",), ()], ids=["direct", "cached"])
def test_never_a_wrong_byte_of_a_mount(tmp_path: Path, mountpoint: Path, options: tuple[str, ...]) -> None:
    """The same through a mount of each recording; once it is at rest, a reader of the whole is told."""
    root = tmp_path / "data"
    root.mkdir()
    seed = int(os.environ.get("TARTAPEFS_LIVE_SEED", "1"))
    total: Counter[str] = Counter()
    wrong: list[str] = []
    failures: list[Exception] = []
    writer = Writer(root, seed)
    with closing(writer):
        while writer.done.total() < MOUNTED_MUTATIONS:
            writer.close()
            recording = record(root)
            assert run("mount", *options, root, mountpoint).returncode == 0
            recording.open = lambda: Opened(mountpoint / "archive.tar")
            with closing(recording.tape):
                change_while_it_is_read(recording, writer, seed, MOUNTED_MUTATIONS - writer.done.total(), failures)
                total[refused_or_unchanged(recording)] += 1
            assert run("unmount", mountpoint).returncode in (0, 1)
            wrong += recording.wrong
            total += Counter(reads=recording.reads, drifted=recording.drifted, completed=recording.completed)
    print(f"seed {seed}: {writer.done.total()} changes; {dict(total)}")
    assert not failures
    assert not wrong
    assert total["refused"] > total["unchanged"]


def refused_or_unchanged(recording: Recording) -> str:
    """How a mount ends of whose source nothing changes any more: within some seconds, an audit's."""
    is_refused = False

    def is_known() -> bool:
        nonlocal is_refused
        try:
            assert recording.whole() == recording.expected
        except TapeIntegrityError:
            is_refused = True
            return True
        put_times_back(recording.root, recording.expected)
        now = Reference(recording.root)
        return now.read(0, now.size) == recording.expected

    wait_until(is_known)
    return "refused" if is_refused else "unchanged"


def test_a_recording_under_a_live_writer(tmp_path: Path) -> None:
    """A folder that changes while it is recorded is refused, or its tape gives what is there or an error."""
    root = tmp_path / "data"
    root.mkdir()
    writer = Writer(root, 3)
    ended = threading.Event()
    failures: list[Exception] = []

    def writes() -> None:
        try:
            while not ended.is_set():
                writer.step()
                if writer.choose.random() < 0.2:
                    writer.close()
                time.sleep(writer.choose.choice((0, 0.001, 0.05)))
        except Exception as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=writes)
    outcomes: Counter[str] = Counter()
    thread.start()
    try:
        for _ in range(60):
            try:
                TapeRecorder(root, overwrite=True).commit()
            except (TapeError, OSError) as error:
                outcomes[type(error).__name__] += 1
                continue
            outcomes["recorded"] += 1
            with Tape.discover(root) as tape, closing(TapePlayer(tape, root)) as player:
                read: dict[int, bytes] = {}
                try:
                    for _ in range(3):  # the same bytes each time, whatever is there now
                        for at in range(0, tape.total_size, 5000):
                            data = player.read(at, 5000)
                            assert read.setdefault(at, data) == data
                except TapeIntegrityError:
                    outcomes["drifted"] += 1
    finally:
        ended.set()
        thread.join(10)
        writer.close()
    print(dict(outcomes))
    assert not failures
    assert not thread.is_alive()
    refused = {"TapeIntegrityError", "SourceBusyError", "FileNotFoundError", "NotADirectoryError"}
    assert set(outcomes) <= {"recorded", "drifted"} | refused
