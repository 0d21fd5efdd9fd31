"""The matrix: every kind of change, at every moment, on every file system. Recorded bytes or an error.

Expected bytes are kept from an independent reference that is made before the change. A reader that goes on to the end,
footer included, meets an error that names a path; the few cases where that cannot be are in `NOT_PROMISED`.
"""

import ctypes
import errno
import mmap
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.changes import (
    append,
    chmod_and_back,
    empty,
    overwrite,
    replace_by_folder,
    replace_by_pipe,
    retarget,
    shrink,
    times_kept,
    touch,
)
from support.filesystems import KINDS, Filesystem, filesystem_of
from support.programs import umount
from support.reference import Reference

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.play import assemble as fill

B, C, TOP, PHOTOS, DEEP = "data/photos/b.bin", "data/photos/deep/c.bin", "data", "data/photos", "data/photos/deep"
LINK, EMPTY = "data/photos/link", "data/empty"
SIZE = 40_000  # bytes of the file that is changed, over several pages
AT = 8192  # where in it: a whole page, since a hole is punched in pages
BODY = 512  # where it starts in its member


@dataclass
class Source:
    """A recorded folder `root`, of its own in `aside`, on the same file system; and what its archive must hold."""

    root: Path
    expected: bytes = b""
    starts: dict[bytes, int] = field(default_factory=dict)
    at_the_end: ExitStack = field(default_factory=ExitStack)

    @property
    def aside(self) -> Path:
        return self.root.parent

    @property
    def b(self) -> Path:
        return self.root / "photos" / "b.bin"

    def close(self) -> None:
        self.at_the_end.close()


def make_source(aside: Path) -> Source:
    root = aside / "data"
    (root / "photos" / "deep").mkdir(parents=True)
    (root / "empty").mkdir()
    content = random.Random(5)
    for name, size in {"a.bin": 3000, "b.bin": SIZE, "deep/c.bin": 3000, "z.bin": 3000}.items():
        (root / "photos" / name).write_bytes(content.randbytes(size))
        (root / "photos" / name).chmod(0o644)
    (root / "photos" / "link").symlink_to("b.bin")
    source = Source(root)
    TapeRecorder(root).commit()
    reference = Reference(root)
    source.expected, source.starts = reference.read(0, reference.size), reference.starts
    return source


def map_file(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


# The changes


def of_b(change: Callable[..., object], *arguments: object) -> Callable[[Source], object]:
    return lambda source: change(source.b, *arguments)


def keeping_times(change: Callable[[Source], object]) -> Callable[[Source], None]:
    def changed(source: Source) -> None:
        with times_kept(source.b):
            change(source)

    return changed


def rewrite_by_the_kernel(source: Source) -> None:
    """No byte passes through the program that does it."""
    other = source.aside / "other"
    other.write_bytes(b"z" * SIZE)
    with other.open("rb") as read, source.b.open("r+b") as write:
        assert os.copy_file_range(read.fileno(), write.fileno(), SIZE) == SIZE


def grow_and_shrink(source: Source) -> None:
    """Nothing differs in the end but the times; of what was in between nobody knows."""
    os.truncate(source.b, SIZE + 1)
    os.truncate(source.b, SIZE)


def replace(source: Source) -> None:
    other = source.aside / "other"
    other.write_bytes(b"z" * SIZE)
    other.chmod(0o644)
    other.replace(source.b)


def replace_by_equal_copy(source: Source) -> None:
    shutil.copy2(source.b, source.aside / "other")
    (source.aside / "other").replace(source.b)


def exchange(source: Source) -> None:
    """Two files change places."""
    other = source.b.parent / "z.bin"
    source.b.rename(source.aside / "other")
    other.rename(source.b)
    (source.aside / "other").rename(other)


def swap_for_link(source: Source) -> None:
    shutil.copy2(source.b, source.aside / "other")
    source.b.unlink()
    source.b.symlink_to(source.aside / "other")


def retarget_by_rename(source: Source) -> None:
    (source.aside / "other").symlink_to("z.bin")
    (source.aside / "other").rename(source.b.parent / "link")


def store_through_new_mapping(source: Source) -> None:
    with map_file(source.b) as mapping:
        mapping[AT : AT + 5] = b"other"


def store_after_a_read(source: Source) -> None:
    """Through one mapping, whose page the read has made present."""
    with map_file(source.b) as mapping:
        assert mapping[AT : AT + 5] != b"other"
        mapping[AT : AT + 5] = b"other"


def punch_hole(source: Source) -> None:
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with source.b.open("r+b") as file:
        keep_size, punch = 1, 2
        assert fallocate(file.fileno(), punch | keep_size, AT, 4096) == 0, os.strerror(ctypes.get_errno())


def swap_folder_for_copy(source: Source) -> None:
    deep = source.root / "photos" / "deep"
    deep.rename(source.aside / "moved")
    subprocess.run(["cp", "-a", source.aside / "moved", deep], check=True)


def link_instead_of_folder(source: Source) -> None:
    deep = source.root / "photos" / "deep"
    deep.rename(source.aside / "moved")
    deep.symlink_to(source.aside / "moved")


def mount_over(source: Source, folder: Path, *command: object) -> None:
    subprocess.run(["mount", *map(os.fspath, command), folder], check=True)
    source.at_the_end.callback(umount, folder)


def empty_mount_over_folder(source: Source) -> None:
    mount_over(source, source.root / "photos" / "deep", "-t", "tmpfs", "tmpfs")


def copy_mounted_over_folder(source: Source) -> None:
    subprocess.run(["cp", "-a", source.root / "photos" / "deep", source.aside / "copy"], check=True)
    (source.aside / "copy" / "c.bin").write_bytes(b"z" * 3000)
    shutil.copystat(source.root / "photos" / "deep" / "c.bin", source.aside / "copy" / "c.bin")
    mount_over(source, source.root / "photos" / "deep", "--bind", source.aside / "copy")


def mount_over_the_root(source: Source) -> None:
    mount_over(source, source.root, "-t", "tmpfs", "tmpfs")


def file_mounted_over_file(source: Source) -> None:
    other = source.aside / "other"
    other.write_bytes(b"z" * SIZE)
    shutil.copystat(source.b, other)
    mount_over(source, source.b, "--bind", other)


def swap_the_root(source: Source) -> None:
    source.root.rename(source.aside / "moved")
    subprocess.run(["cp", "-a", source.aside / "moved", source.root], check=True)


# What is done, and the members one of which the error names.
CHANGES: dict[str, tuple[Callable[[Source], object], tuple[str, ...]]] = {
    "overwritten": (of_b(overwrite, AT, b"not what was there"), (B,)),
    "overwritten, mtime put back": (keeping_times(of_b(overwrite, AT, b"not what was there")), (B,)),
    "rewritten whole": (of_b(Path.write_bytes, b"z" * SIZE), (B,)),
    "rewritten whole, mtime put back": (keeping_times(of_b(Path.write_bytes, b"z" * SIZE)), (B,)),
    "rewritten by the kernel, mtime put back": (keeping_times(rewrite_by_the_kernel), (B,)),
    "truncated": (of_b(os.truncate, AT), (B,)),
    "truncated, mtime put back": (keeping_times(of_b(shrink)), (B,)),
    "emptied": (of_b(empty), (B,)),
    "appended to": (of_b(append), (B,)),
    "appended to, mtime put back": (keeping_times(of_b(append)), (B,)),
    "grown and shrunk, mtime put back": (keeping_times(grow_and_shrink), (B,)),
    "touched": (of_b(touch), (B,)),
    "mode": (of_b(os.chmod, 0o600), (B,)),
    "mode and back": (of_b(chmod_and_back), (B,)),
    "owner": (lambda source: os.chown(source.b, 1000, 1000), (B,)),
    "mode of its folder": (lambda source: source.b.parent.chmod(0o700), (PHOTOS,)),
    "hard link added": (lambda source: os.link(source.b, source.aside / "other"), (B,)),
    "renamed": (lambda source: source.b.rename(source.b.parent / "bb.bin"), (B, PHOTOS)),
    "renamed and back": (
        lambda source: source.b.rename(source.b.parent / "bb.bin").rename(source.b), (B, PHOTOS),
    ),
    "moved away": (lambda source: source.b.rename(source.aside / "b.bin"), (B, PHOTOS)),
    "replaced": (replace, (B, PHOTOS)),
    "replaced, mtime put back": (keeping_times(replace), (B, PHOTOS)),
    "replaced by an equal copy": (replace_by_equal_copy, (B, PHOTOS)),
    "exchanged": (exchange, (B, PHOTOS)),
    "swapped for a link to an equal copy": (swap_for_link, (B, PHOTOS)),
    "swapped for a folder": (of_b(replace_by_folder), (B, PHOTOS)),
    "swapped for a pipe": (of_b(replace_by_pipe), (B, PHOTOS)),
    "deleted": (lambda source: source.b.unlink(), (B, PHOTOS)),
    "added beside": (lambda source: (source.b.parent / "new").touch(), (PHOTOS,)),
    "added in the root": (lambda source: (source.root / "new").touch(), (TOP,)),
    "added in an empty folder": (lambda source: (source.root / "empty" / "new").touch(), (EMPTY,)),
    "link retargeted": (lambda source: retarget(source.b.parent / "link", "a.bin"), (LINK, PHOTOS)),
    "link retargeted by rename": (retarget_by_rename, (LINK, PHOTOS)),
    "store through a new mapping": (store_through_new_mapping, (B,)),
    "store through a new mapping, mtime put back": (keeping_times(store_through_new_mapping), (B,)),
    "store through a mapping that was read": (store_after_a_read, (B,)),
    "store through a mapping that was read, mtime put back": (keeping_times(store_after_a_read), (B,)),
    "hole punched": (punch_hole, (B,)),
    "hole punched, mtime put back": (keeping_times(punch_hole), (B,)),
    "folder moved": (
        lambda source: (source.root / "photos" / "deep").rename(source.root / "deep"), (TOP, PHOTOS, DEEP, C),
    ),
    "folder swapped for a copy": (swap_folder_for_copy, (PHOTOS, DEEP, C)),
    "folder swapped for a link to it": (link_instead_of_folder, (PHOTOS, DEEP, C)),
    "empty mount over a folder": (empty_mount_over_folder, (DEEP, C)),
    "changed copy mounted over a folder": (copy_mounted_over_folder, (DEEP, C)),
    "changed copy mounted over a file": (file_mounted_over_file, (B,)),
    "mount over the root": (mount_over_the_root, (TOP,)),
    "root swapped for an equal copy": (swap_the_root, (TOP,)),
    "root swapped for a changed copy": (lambda source: (swap_the_root(source), append(source.b)), (TOP, B)),
}  # fmt: skip
# On tmpfs a mapping is told of the first access to a page only: after a read, a store moves no timestamp, and nothing
# that `stat` shows differs.
NOT_PROMISED = {("tmpfs", "store through a mapping that was read")}
# A whole copy of the tape is a tape too, for a player that opens it; only one that had the other open objects.
STILL_A_TAPE = "root swapped for an equal copy"


# The moments. Each reads `[at, ...)` before, changes, and gives the bytes that were read meanwhile with their offsets.

Pieces = list[tuple[int, bytes]]


def before_opening(source: Source, change: Callable[[], object], read: Callable[[int, int], bytes]) -> int:
    change()
    return 0


def between_two_reads(source: Source, change: Callable[[], object], read: Callable[[int, int], bytes]) -> int:
    """The reader is at the member that is changed."""
    start = source.starts[B.encode()]
    at = 0
    while at < start:
        at += len(read(at, min(5000, start - at)))
    change()
    return start


def inside_a_body(source: Source, change: Callable[[], object], read: Callable[[int, int], bytes]) -> int:
    """One request ended in the middle of the body, and the next starts there."""
    start = source.starts[B.encode()]
    read(start, BODY + 5000)
    change()
    return start + BODY + 5000


def inside_one_read(source: Source, change: Callable[[], object], read: Callable[[int, int], bytes]) -> int:
    """The system gives the first half of the body; the change comes before the second."""
    start, real = source.starts[B.encode()], os.preadv

    def stopping(fd: int, buffers: list[memoryview], offset: int) -> int:
        (buffer,) = buffers
        count = real(fd, [buffer[: len(buffer) // 2]], offset)
        os.preadv = real
        change()
        return count

    os.preadv = stopping  # type: ignore[assignment]
    try:
        read(start, BODY + SIZE)
        assert os.preadv is real, "the body was not read"
    finally:
        os.preadv = real
    return start + BODY + SIZE


MOMENTS = {
    "before": before_opening,
    "between reads": between_two_reads,
    "inside a body": inside_a_body,
    "inside a body that is kept open": inside_a_body,
    "inside one read": inside_one_read,
}
MODES = {"direct": ("--direct",), "cached": ()}
MOUNTED = {  # change, moment: each once in each mode of a real mount
    "overwritten, mtime put back": "inside a body",
    "replaced, mtime put back": "between reads",
    "added in an empty folder": "before",
    "deleted": "inside a body",
}


@pytest.fixture(scope="session", params=KINDS)
def filesystem(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filesystem]:
    """Each file system in turn; its tests run together, and it is gone when they have ended."""
    with filesystem_of(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture(scope="session")
def sources(filesystem: Filesystem, request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Source]]:
    """A recorded folder for every case. All are recorded at once, since a recording waits for the clock."""
    cases = [item.callspec.params for item in request.session.items if "sources" in getattr(item, "fixturenames", ())]
    keys = [
        (case["name"], case.get("moment") or case["mode"]) for case in cases if case["filesystem"] == filesystem.name
    ]

    def make(key: tuple[str, str]) -> Source:
        return make_source(filesystem.folder / f"{'-'.join(key)}".replace(" ", "_"))

    with ThreadPoolExecutor(len(keys) if filesystem.whole_seconds else 8) as pool:
        made = dict(zip(keys, pool.map(make, keys), strict=True))
    yield made
    for source in made.values():
        source.close()


@pytest.mark.matrix(but=r"\[ext4-(?!seconds)|between reads")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change(
    filesystem: Filesystem,
    sources: dict[tuple[str, str], Source],
    name: str,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each byte that is returned is the recorded one, and who reads on to the end gets an error that names a path."""
    if "kept open" in moment:
        monkeypatch.setattr(fill, "LARGE", 1)
    source = sources[name, moment]
    change, culprits = CHANGES[name]
    returned: Pieces = []
    with closing(source), Tape.discover(source.root) as tape:
        players = [] if moment == "before" else [TapePlayer(tape)]

        def read(at: int, size: int) -> bytes:
            if not players:
                players.append(TapePlayer(tape, source.root))
            data = players[0].read(at, size)
            returned.append((at, data))
            return data

        def read_on(at: int) -> None:
            while at < len(source.expected):
                at += len(read(at, 3000))

        assert tape.total_size == len(source.expected)
        try:
            if (filesystem.name, name) in NOT_PROMISED:
                read_on(MOMENTS[moment](source, lambda: change(source), read))
                assert any(data != source.expected[at : at + len(data)] for at, data in returned)
                return
            if name == STILL_A_TAPE and moment == "before":
                read_on(MOMENTS[moment](source, lambda: change(source), read))
                assert b"".join(data for _, data in returned) == source.expected
                return
            with pytest.raises(TapeIntegrityError) as caught:
                read_on(MOMENTS[moment](source, lambda: change(source), read))
            for at, data in returned:
                assert data == source.expected[at : at + len(data)]
            assert caught.value.member in culprits
            assert str(caught.value).startswith(f"{caught.value.member}: ")
            for at in (0, len(source.expected) - 1):
                with pytest.raises(TapeIntegrityError):
                    players[0].read(at, 1)
            if name != STILL_A_TAPE:  # nor does it get past a player that is new
                players.append(TapePlayer(tape, source.root))
                with pytest.raises(TapeIntegrityError):
                    for at in range(0, len(source.expected), 3000):
                        assert players[1].read(at, 3000) == source.expected[at : at + 3000]
        finally:
            for player in players:
                player.close()


@pytest.mark.fuse
@pytest.mark.matrix(but=r"\[ext4-(?!seconds)|cached")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MOUNTED)
def test_a_change_under_a_mount(
    sources: dict[tuple[str, str], Source], mount: Callable[..., Path], name: str, mode: str
) -> None:
    """The same by a slow reader of a real mount: the bytes before the error are the recorded ones, the error is EIO.

    What the kernel read ahead before the change may come to its end; it is then of the recorded folder, and the next
    program gets the error.
    """
    source = sources[name, mode]
    change, culprits = CHANGES[name]
    archive = mount(source.root, *MODES[mode]) if MOUNTED[name] != "before" else None
    returned: Pieces = []
    fd = -1

    def read(at: int, size: int) -> bytes:
        nonlocal fd, archive
        if archive is None:
            archive = mount(source.root, *MODES[mode])
        if fd < 0:
            fd = os.open(archive, os.O_RDONLY)
        data = os.pread(fd, size, at)
        assert data
        returned.append((at, data))
        return data

    failure = None
    try:
        at = MOMENTS[MOUNTED[name]](source, lambda: change(source), read)
        while at < len(source.expected):
            at += len(read(at, 3000))
    except OSError as error:
        failure = error
    finally:
        if fd >= 0:
            os.close(fd)
    for at, data in returned:
        assert data == source.expected[at : at + len(data)]
    assert archive
    if failure is None and mode == "cached":
        with pytest.raises(OSError) as caught:
            archive.read_bytes()
        failure = caught.value
    assert failure
    assert failure.errno == errno.EIO
    state = os.getxattr(archive.parent, "user.tartape.state").decode()
    assert state.startswith(tuple(f"invalid: {culprit}: " for culprit in culprits))
