"""A source that tries to escape: parts of a path are swapped for links that lead outside, while it is read.

Outside lie files of the same names, sizes, modes and times, so that nothing but the way there tells them apart. Another
process swaps as fast as it can. Not one byte from outside may be read, through whatever opens the source; and an open
that takes no care does get outside, so the race is one.

`TARTAPEFS_RACING_READS` is the number of reads in each case, 20,000 by default.
"""

import ctypes
import errno
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from support.reference import Reference

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.source.folder import Source
from tartapefs.source.system_calls import has_openat2

READS = int(os.environ.get("TARTAPEFS_RACING_READS", 20_000))
SIZE = 3000
INSIDE, OUTSIDE = (b"inside. " * SIZE)[:SIZE], (b"outside!" * SIZE)[:SIZE]
NAMES = (b"one", b"two")
TIME = 1_600_000_000_123_456_789

SWAPPER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
one, other = map(os.fsencode, sys.argv[1:])
parent = os.getppid()
count = 0
print(flush=True)
while count % 1000 or os.getppid() == parent:
    if libc.renameat2(-100, one, -100, other, 2):  # AT_FDCWD, RENAME_EXCHANGE
        sys.exit(os.strerror(ctypes.get_errno()))
    count += 1
"""

# What is swapped, as a path below the folder, and the link that it is swapped for.
SWAPS = {"first folder": (b"first", "absolute"), "last folder": (b"first/last", "relative"),
         "file": (b"first/last/one", "absolute"), "link to file": (b"first/last/two", "relative")}  # fmt: skip
WAYS = {"openat2": True, "by component": False}


class Scene(NamedTuple):
    root: Path
    reference: Reference  # of the folder before anything is swapped

    def body(self, name: bytes) -> int:
        return self.reference.starts[b"data/first/last/" + name] + 512


def grow(folder: Path, content: bytes) -> None:
    last = folder / "first" / "last"
    last.mkdir(parents=True)
    for name in NAMES:
        path = last / os.fsdecode(name)
        path.write_bytes(content)
        path.chmod(0o640)
        os.utime(path, ns=(TIME, TIME))
    for below in (last, last.parent, folder):
        below.chmod(0o750)
        os.utime(below, ns=(TIME, TIME))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    root = tmp_path / "data"
    grow(root, INSIDE)
    grow(tmp_path / "outside", OUTSIDE)
    TapeRecorder(root).commit()
    return Scene(root, Reference(root))


@contextmanager
def swapping(scene: Scene, swap: str) -> Iterator[None]:
    """Another process exchanges the part of the path and a link to the same part outside, until the block ends."""
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("this libc has no renameat2")
    part, kind = SWAPS[swap]
    inside, outside = scene.root / os.fsdecode(part), scene.root.parent / "outside" / os.fsdecode(part)
    link = scene.root.parent / "link"
    link.symlink_to(outside if kind == "absolute" else os.path.relpath(outside, inside.parent))
    process = subprocess.Popen([sys.executable, "-c", SWAPPER, inside, link], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield
        assert process.poll() is None, "nothing was swapped any more"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def content(fd: int) -> bytes:
    try:
        return os.pread(fd, SIZE, 0)
    finally:
        os.close(fd)


def outcome(read: Callable[[], bytes], expected: bytes = INSIDE) -> str:
    try:
        return "inside" if read() == expected else "OUTSIDE"
    except TapeIntegrityError:
        return "refused"
    except OSError as error:
        assert error.errno in (errno.ELOOP, errno.EXDEV, errno.ENOTDIR), error
        return "refused"


def enough(counts: Counter[str], at_least: int) -> bool:
    """So many reads and, on a busy machine, as many more as it takes to see the race."""
    seen = counts["inside"] > 0 and counts["refused"] > 0
    return counts.total() >= at_least * (1 if seen else 200)


def check(counts: Counter[str], at_least: int) -> None:
    print(dict(counts))
    assert counts["OUTSIDE"] == 0
    assert counts["inside"] > 0, "nothing was ever read"
    assert counts["refused"] > 0, "the race was none"
    assert counts.total() >= at_least


@pytest.fixture(params=WAYS)
def source(scene: Scene, request: pytest.FixtureRequest) -> Iterator[Source]:
    if WAYS[request.param] and not has_openat2():
        pytest.skip("this kernel has no openat2")
    with Source(os.fspath(scene.root), use_openat2=WAYS[request.param]) as source:
        yield source


def naive(scene: Scene, name: bytes, flags: int) -> bytes:
    return content(os.open(os.fsencode(scene.root) + b"/first/last/" + name, os.O_RDONLY | flags))


@pytest.mark.parametrize("swap", SWAPS)
def test_an_open_without_care_gets_outside(scene: Scene, swap: str) -> None:
    """The check on these tests."""
    counts: Counter[str] = Counter()
    with swapping(scene, swap):
        while counts.total() < 200_000 and not (counts["OUTSIDE"] and counts["inside"]):
            counts[outcome(lambda: naive(scene, NAMES[swap == "link to file"], 0))] += 1
    assert counts["OUTSIDE"] > 0
    assert counts["inside"] > 0


def test_an_open_that_looks_at_the_last_part_alone_gets_outside(scene: Scene) -> None:
    """Why `O_NOFOLLOW` is not enough."""
    counts: Counter[str] = Counter()
    with swapping(scene, "first folder"):
        while counts.total() < 200_000 and not counts["OUTSIDE"]:
            counts[outcome(lambda: naive(scene, b"one", os.O_NOFOLLOW))] += 1
    assert counts["OUTSIDE"] > 0


@pytest.mark.long(but=2)
@pytest.mark.parametrize("swap", SWAPS)
def test_no_read_of_the_source_gets_outside(scene: Scene, source: Source, swap: str) -> None:
    """Neither by the path, nor through the folder's descriptor, nor through fresh players."""
    counts: Counter[str] = Counter()

    def through_folder(name: bytes) -> bytes:
        folder = source.folder_descriptor(b"first/last")
        try:
            return content(source.open_in(folder, name))
        finally:
            os.close(folder)

    with swapping(scene, swap):
        while not enough(counts, READS // 4 * 4):
            for name in NAMES:
                counts[outcome(lambda name=name: content(source.open(b"first/last/" + name)))] += 1  # type: ignore[misc]
                counts[outcome(lambda name=name: through_folder(name))] += 1  # type: ignore[misc]
    check(counts, READS // 4 * 4)


@pytest.mark.long(but=2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("swap", SWAPS)
def test_no_player_gets_outside(scene: Scene, swap: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for both files, of a new player each time since drift is for good; inodes are not compared."""
    if WAYS[way] and not has_openat2():
        pytest.skip("this kernel has no openat2")
    start, stop = scene.body(b"one"), scene.body(b"two") + SIZE
    expected = scene.reference.read(start, stop - start)
    assert INSIDE in expected
    monkeypatch.setattr("tartapefs.source.folder.has_openat2", lambda: WAYS[way])
    counts: Counter[str] = Counter()
    with Tape.discover(scene.root) as tape, swapping(scene, swap):

        def read() -> bytes:
            player = TapePlayer(tape, scene.root, check="mtime")
            try:
                return player.read(start, stop - start)
            finally:
                player.close()

        while not enough(counts, READS // 20):
            counts[outcome(read, expected)] += 1
    check(counts, READS // 20)


@pytest.mark.parametrize("swap", ["first folder", "last folder"])
def test_no_listing_gets_outside(scene: Scene, source: Source, swap: str) -> None:
    """A folder opened for listing is the one inside, or refused."""
    for name in (b"secret", b"three"):
        (scene.root.parent / "outside" / "first" / "last" / os.fsdecode(name)).write_bytes(OUTSIDE)

    def names() -> bytes:
        folder = source.folder(b"first/last")
        try:
            return b" ".join(folder.names())
        finally:
            folder.close()

    counts: Counter[str] = Counter()
    with swapping(scene, swap):
        while not enough(counts, READS // 20):
            counts[outcome(names, b"one two")] += 1
    check(counts, READS // 20)
