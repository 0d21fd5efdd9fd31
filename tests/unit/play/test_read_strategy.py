"""Requests that are filled by several hands: the helper process of a mount, and threads where the source is slow."""

import ctypes
import mmap
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import daemon_of, helper_of, is_gone
from support.programs import needs_two_cores, run, wait_until
from support.reference import Reference

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.play import read_strategy as crews
from tartapefs.source.folder import Source

MIB = 1 << 20


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """3,000 small files of all sizes up to 3,000 bytes, in folders of 100, recorded."""
    root, some = tmp_path / "many", random.Random(1)
    for number in range(3000):
        folder = root / f"{number // 100:02}"
        if number % 100 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number}.bin").write_bytes(some.randbytes(some.randrange(3000)))
    TapeRecorder(root).commit()
    return root


def cpu_time(pid: int) -> int:
    """Of user and system, in ticks of the clock."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


@needs_two_cores
def test_a_helper_takes_its_share_of_small_members(many: Path, mount: Callable[..., Path]) -> None:
    """Right bytes, whatever is asked for, and some of the work is the helper's."""
    archive = mount(many)
    helper = helper_of(daemon_of(archive.parent))
    reference, before, some = Reference(many), cpu_time(helper), random.Random(2)
    whole = reference.read(0, reference.size)
    fd = os.open(archive, os.O_RDONLY)
    try:
        for _ in range(5):
            assert b"".join(iter(lambda: os.read(fd, MIB), b"")) == whole
            os.lseek(fd, 0, os.SEEK_SET)
        for _ in range(100):
            at, size = some.randrange(reference.size), some.choice((100_000, 300_000, MIB))
            assert os.pread(fd, size, at) == whole[at : at + size]
    finally:
        os.close(fd)
    wait_until(lambda: archive.read_bytes() and cpu_time(helper) > before, 60)  # unless the machine is busy, at once


@needs_two_cores
def test_a_helper_that_dies_is_done_without(many: Path, mount: Callable[..., Path]) -> None:
    """In the middle of a read, too."""
    archive = mount(many)
    helper = helper_of(daemon_of(archive.parent))
    reference = Reference(many)
    whole = reference.read(0, reference.size)
    killer = threading.Timer(0.02, os.kill, (helper, signal.SIGKILL))
    killer.start()
    for _ in range(3):
        assert archive.read_bytes() == whole
    killer.join()
    assert is_gone(helper)
    assert archive.read_bytes() == whole


@needs_two_cores
@pytest.mark.parametrize("where", [0.1, 0.9])
def test_drift_is_seen_by_whoever_fills_that_part(many: Path, mount: Callable[..., Path], where: float) -> None:
    """In the first and in the last part of a request; the culprit is named, and the tape is invalid."""
    archive = mount(many)
    fd = os.open(archive, os.O_RDONLY)
    try:
        for at in range(0, 2 * MIB, MIB):  # from here on requests are shared
            os.pread(fd, MIB, at)
        with Tape.discover(many) as tape:
            members = [member for member in tape.members(2 * MIB, 3 * MIB) if member.size]
        culprit = members[int(len(members) * where)]
        path = many / os.fsdecode(culprit.path)
        path.write_bytes(b"\0" * culprit.size)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, MIB, 2 * MIB)
    finally:
        os.close(fd)
    status = run("status", archive.parent)
    assert status.returncode == 1
    assert culprit.arc_path in status.stdout


@needs_two_cores
def test_a_helper_ends_with_its_daemon(many: Path, mount: Callable[..., Path]) -> None:
    """However that ends: nothing is left of a daemon that was killed."""
    archive = mount(many)
    daemon = daemon_of(archive.parent)
    helper = helper_of(daemon)
    os.kill(helper, signal.SIGTERM)  # as a service manager sends it to all processes: the daemon decides
    assert archive.stat().st_size
    assert not is_gone(helper)
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: is_gone(helper))
    assert run("unmount", archive.parent).returncode == 0


@needs_two_cores
def test_unmount_returns_once_all_have_ended(many: Path, mount: Callable[..., Path]) -> None:
    """So that the disk that the source lies on can be unmounted next."""
    archive = mount(many)
    daemon = daemon_of(archive.parent)
    helper = helper_of(daemon)
    assert run("unmount", archive.parent).returncode == 0
    assert is_gone(daemon)
    assert is_gone(helper)


@needs_two_cores
def test_they_meet(many: Path) -> None:
    """However late the helper is: what it cannot do is done here, and nothing is left out."""
    text = """
        import mmap, os, signal, sys, threading, time
        from tartapefs import Tape
        from tartapefs.play.helper_process import HelperProcess
        from tartapefs.play.engine import TapePlayer
        with Tape.discover(sys.argv[1]) as tape:
            player, stop = TapePlayer(tape), 400_000
            members = list(tape.headed(0, stop))
            helper = HelperProcess(player._filler, mmap.mmap(-1, 1 << 20))
            helper.begin(0, 0, stop)
            while helper._claims.first_from_back() > 0:
                time.sleep(0.01)
            assert list(helper.our_members(members)) == []
            assert helper.end() == len(members)
            os.kill(helper._pid, signal.SIGSTOP)
            helper.begin(0, 0, stop)
            assert list(helper.our_members(members)) == members
            threading.Timer(0.2, os.kill, (helper._pid, signal.SIGCONT)).start()
            assert helper.end() == 0
            for _ in range(100):
                helper.begin(0, 0, stop)
                ours = []
                for member in helper.our_members(members):
                    ours.append(member)
                    time.sleep(1e-5)
                theirs = helper.end()
                assert ours == members[: len(ours)]
                assert len(members) <= len(ours) + theirs <= len(members) + 1
            helper.close()
            player.close()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), many], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


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
        for at, size in ((12_345, 400_001), (MIB - 1, 2 * crews._SMALLEST_PART), (reference.size - 100_000, MIB)):
            assert player.read(at, size) == reference.read(at, size)
        player.close()


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
        wait_until(lambda: not any("_serve" in thread.name for thread in threading.enumerate()))
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
        for _ in range(crews._SLOW_REQUESTS + 2):
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
