"""How a request is filled: by threads if the source is slow, with the helper process, or with its failure."""

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.programs import wait_until
from support.reference import Reference
from support.trees import make_many

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.archive.layout import MAX_OFFSET
from tartapefs.play import read_policy
from tartapefs.source.folder import Source
from tartapefs.verify.seal import seal

MIB = 1 << 20


@pytest.fixture
def many(tmp_path: Path) -> Path:
    root = make_many(tmp_path / "many")
    TapeRecorder(root).commit()
    return root


class FailingHelper:
    """Stands for a helper that claims all but the first two units, writes other bytes there, and fails."""

    first_filled = MAX_OFFSET

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(MIB))
        self.begun = 0

    def memory_offset(self, view: memoryview) -> int:
        return 0

    def begin(self, memory_offset: int, start: int, stop: int, in_blocks: bool = False, sums: int = -1) -> None:
        self.memory[:] = b"\xff" * MIB
        self.begun += 1

    def our_members(self, members: Iterable[Any]) -> Iterator[Any]:
        return islice(members, 2)

    our_blocks = our_members

    def end(self) -> int:
        return -1

    def close(self) -> None:
        pass


@pytest.mark.parametrize("shared", ["members", "blocks"])
def test_a_helper_that_fails_is_not_believed(tmp_path: Path, many: Path, shared: str) -> None:
    """This thread fills the whole request then, and raises what it meets."""
    if shared == "blocks":
        many = tmp_path / "large"
        many.mkdir()
        (many / "large.bin").write_bytes(os.urandom(2 * MIB))
        TapeRecorder(many).commit()
        with Tape.discover(many) as tape, closing(TapePlayer(tape)) as player:
            seal(tape, player.source, player.at_home, "blake3", 1 << 16)
    expected = Reference(many).read(MIB, MIB)
    for is_changed in (False, True):
        helper = FailingHelper()
        with Tape.discover(many) as tape, closing(TapePlayer(tape)) as player:
            player.readinto(helper.memory, 0)
            player._strategy._helper = helper  # type: ignore[assignment]
            if is_changed:
                last = list(tape.members(MIB, 2 * MIB - 10_000))[-1]
                (many / os.fsdecode(last.path)).write_bytes(bytes(last.size))
                with pytest.raises(TapeIntegrityError, match=last.arc_path):
                    player.readinto(helper.memory, MIB)
            else:
                assert player.readinto(helper.memory, MIB) == MIB
                assert helper.memory == expected
        assert helper.begun == 1


class Slow:
    """A source of which each file takes a while to open: the threads that waited for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.002) -> None:
        self.threads: set[int] = set()
        monkeypatch.setattr(Source, "open", self._slow(Source.open, seconds))
        monkeypatch.setattr(Source, "open_in", staticmethod(self._slow(Source.open_in, seconds)))

    def _slow(self, function: Callable[..., int], seconds: float) -> Callable[..., int]:
        def slowly(*arguments: object) -> int:
            self.threads.add(threading.get_ident())
            if seconds:  # even a sleep of no time at all is waiting
                time.sleep(seconds)
            return function(*arguments)

        return slowly


def test_a_slow_source_is_read_by_threads(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first request on, after a little of it; the bytes are right, to the last, odd offsets included."""
    slow, reference = Slow(monkeypatch), Reference(many)
    with Tape.discover(many) as tape:
        player = TapePlayer(tape)
        assert player.read(0, MIB) == reference.read(0, MIB)
        assert len(slow.threads) > 8
        for at, size in ((12_345, 400_001), (MIB - 1, 2 * read_policy.SMALLEST_PART), (reference.size - 100_000, MIB)):
            assert player.read(at, size) == reference.read(at, size)
        player.close()


def no_threads() -> bool:
    return not any("_serve" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("closed", [True, False])
def test_threads_end_with_their_player(many: Path, monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    """Also if nobody closes it, and none keeps the source open."""
    slow, before = Slow(monkeypatch), len(os.listdir("/proc/self/fd"))
    with Tape.discover(many) as tape:
        player = TapePlayer(tape)
        for at in range(0, 3 * MIB, MIB):
            player.read(at, MIB)
        assert len(slow.threads) > 8
        if closed:
            player.close()
        del player
        wait_until(no_threads)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_source_that_is_fast_again_is_noticed(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, Tape.discover(many) as tape:
        slow = Slow(patch)
        player = TapePlayer(tape)
        player.read(0, MIB)
        patch.undo()
        player.read(MIB, MIB)
        assert len(slow.threads) > 1
        seen = Slow(patch, 0)
        for _ in range(read_policy.SLOW_REQUESTS + 2):
            player.read(0, MIB // 4)
        seen.threads.clear()
        player.read(0, MIB // 4)
        assert seen.threads == {threading.get_ident()}
        player.close()


def is_in_cache(path: Path) -> bool:
    """Whether the kernel has the file's first page at hand. (`RWF_NOWAIT` would tell, and have it loaded.)"""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        first, resident = ctypes.c_char.from_buffer(mapped), ctypes.c_ubyte()
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(1), ctypes.byref(resident))
        del first
        assert not failed
        return bool(resident.value & 1)


def test_a_cold_disk_is_read_ahead_by_the_kernel(many: Path) -> None:
    """Not by the player: what changes after that is seen when it is asked for."""
    os.sync()
    files = [path for path in many.rglob("*.bin") if path.stat().st_size]
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    cold = {path for path in files if not is_in_cache(path)}  # all but a few, which the kernel was busy with
    if len(cold) < len(files) / 2:
        pytest.skip("files of this file system always lie in memory")
    reference = Reference(many)
    with Tape.discover(many) as tape:
        members = [member for member in tape.members() if many / os.fsdecode(member.path) in cold]
        next_one = next(member for member in members if member.start > MIB + 50_000)
        far_away = next(member for member in members if member.start > 5 * MIB + 500_000)
        player = TapePlayer(tape)
        data = player.read(0, MIB)
        wait_until(lambda: is_in_cache(many / os.fsdecode(next_one.path)))
        assert not is_in_cache(many / os.fsdecode(far_away.path))
        (many / os.fsdecode(next_one.path)).write_bytes(b"\0" * next_one.size)
        with pytest.raises(TapeIntegrityError, match=next_one.arc_path):
            player.read(MIB, MIB)
        player.close()
    wait_until(no_threads)  # they may be in the middle of a prefetch
    assert data == reference.read(0, MIB)


def test_drift_in_any_thread_is_raised(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first in the archive's order, once all threads are done with the buffer."""
    Slow(monkeypatch)
    with Tape.discover(many) as tape:
        player = TapePlayer(tape)
        player.read(0, MIB)
        members = [member for member in tape.members(MIB, 2 * MIB) if member.size]
        culprits = [members[len(members) // 3], members[-2]]
        for culprit in culprits:
            (many / os.fsdecode(culprit.path)).write_bytes(b"\0" * culprit.size)
        with pytest.raises(TapeIntegrityError) as error:
            player.read(MIB, MIB)
        assert error.value.member == culprits[0].arc_path
        player.close()
