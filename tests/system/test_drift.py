"""Drift under a mount: EIO and a line in the log, never a byte that was not recorded; and errors that are no drift."""

import errno
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.changes import (
    add_file,
    append,
    below,
    empty,
    overwrite,
    overwrite_keeping_times,
    remove,
    rename,
    replace,
    replace_by_copy,
    replace_by_file,
    replace_by_folder,
    replace_by_link_to_a_copy,
    replace_by_pipe,
    replace_by_socket,
    replace_folder_by_link,
    retarget,
    shrink,
    touch,
    touch_by_a_nanosecond,
)
from support.daemon import daemon_of
from support.drifting import REMEDY, Mounted, failing, opened
from support.programs import run, wait_until
from support.reference import Reference

Mount = Callable[..., Path]
pytestmark = pytest.mark.fuse
SIZE = 20_000


def make_source(root: Path) -> None:
    (root / "photos" / "deep").mkdir(parents=True)
    (root / "photos").chmod(0o755)
    (root / "gone").mkdir()
    content = random.Random(7)
    for name in ("a.bin", "b.bin", "deep/c.bin", "z.bin"):
        (root / "photos" / name).write_bytes(content.randbytes(SIZE))
        (root / "photos" / name).chmod(0o644)
    (root / "photos" / "link").symlink_to("b.bin")


@pytest.fixture
def mounted(tmp_path: Path, mount: Mount, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A recorded and mounted folder; a parameter is an option for the mount, `--direct` by default."""
    root, log = tmp_path / "data", tmp_path / "drift.log"
    make_source(root)
    assert run("record", root).returncode == 0
    options = filter(None, [getattr(request, "param", "--direct")])
    with opened(root, mount(root, "--log", log, *options), log) as made:
        yield made


BOTH_MODES = pytest.mark.parametrize("mounted", ["--direct", None], indirect=True, ids=["direct", "cached"])

# Each kind of change

B, C, LINK, PHOTOS, TOP = "data/photos/b.bin", "data/photos/deep/c.bin", "data/photos/link", "data/photos/", "data/"
BODY = 512
FILE = "photos/b.bin"


# Change, the member that is read and from where on, what the log says of it: what, recorded, found.
CHANGES: dict[str, tuple[Callable[[Path], object], str, int, str, str, str]] = {
    "overwritten": (below(FILE, overwrite, 10_000, b"not what was there"), B, BODY, "mtime", "", ""),
    "overwritten, times put back": (
        below(FILE, overwrite_keeping_times, 10_000, b"not what was there"), B, BODY + 9000, "ctime", "", "",
    ),
    "grown": (below(FILE, append), B, BODY, "size", "20000", "20004"),
    "grown, header read": (below(FILE, append), B, 0, "size", "20000", "20004"),
    "shrunk": (below(FILE, shrink), B, BODY, "size", "20000", "19999"),
    "shrunk, last bytes read": (below(FILE, os.truncate, 1), B, SIZE, "size", "20000", "1"),
    "emptied": (below(FILE, empty), B, BODY, "size", "20000", "0"),
    "touched": (below(FILE, touch), B, BODY, "mtime", "", ""),
    "touched by a nanosecond": (below(FILE, touch_by_a_nanosecond), B, 0, "mtime", "", ""),
    "chmod": (below(FILE, os.chmod, 0o640), B, BODY, "mode", "0644", "0640"),
    "chmod, header read": (below(FILE, os.chmod, 0o640), B, 0, "mode", "0644", "0640"),
    "a hard link more": (lambda root: os.link(root / "photos/b.bin", root.parent / "x"), B, BODY, "ctime", "", ""),
    "replaced": (below(FILE, replace), B, BODY, "mtime", "", ""),
    "replaced by an equal copy": (below(FILE, replace_by_copy), B, BODY, "inode", "", ""),
    "replaced by an equal copy, header read": (below(FILE, replace_by_copy), B, 0, "inode", "", ""),
    "deleted": (below(FILE, remove), B, BODY, "type", "regular file", "nothing"),
    "deleted, header read": (below(FILE, remove), B, 0, "type", "regular file", "nothing"),
    "swapped for a link": (below(FILE, replace_by_link_to_a_copy), B, BODY, "type", "regular file", "symbolic link"),
    "swapped for a folder": (below(FILE, replace_by_folder), B, BODY, "type", "regular file", "directory"),
    "swapped for a pipe": (below(FILE, replace_by_pipe), B, BODY, "type", "regular file", "pipe"),
    "swapped for a socket": (below(FILE, replace_by_socket), B, BODY, "type", "regular file", "socket"),
    "a link retargeted": (below("photos/link", retarget, "a.bin"), LINK, 0, "target", "b.bin", "a.bin"),
    "a link swapped for a file": (
        below("photos/link", replace_by_file), LINK, 0, "type", "symbolic link", "regular file",
    ),
    "a folder renamed": (below("photos/deep", rename), C, BODY, "type", "regular file", "nothing"),
    "a folder renamed, its header read": (
        below("photos/deep", rename),
        "data/photos/deep/", 0, "type", "directory", "nothing",
    ),
    "a folder swapped for a link to it": (below("photos/deep", replace_folder_by_link), C, BODY, "path", "", ""),
    "a folder swapped for a file": (below("photos/deep", replace_by_file), C, BODY, "type", "regular file", "nothing"),
    "a file added": (below("photos", add_file), PHOTOS, 0, "mtime", "", ""),
    "a folder's mode": (below("photos", os.chmod, 0o700), PHOTOS, 0, "mode", "0755", "0700"),
    "an empty folder removed": (
        below("gone", remove), "data/gone/", 0, "type", "directory", "nothing",
    ),
    "the source moved away": (lambda root: root.rename(root.parent / "moved"), B, BODY, "source", "", ""),
    "the source swapped for an equal copy": (
        lambda root: (root.rename(root.parent / "moved"), shutil.copytree(root.parent / "moved", root, symlinks=True)),
        B, BODY, "source", "", "",
    ),
}  # fmt: skip


@pytest.mark.long(but=5)
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_under_the_mount(
    mounted: Mounted, change: tuple[Callable[[Path], object], str, int, str, str, str]
) -> None:
    """EIO where the changed member is read, a line with path, recorded, found and remedy; then nothing any more."""
    change_it, member, shift, what, recorded, found = change
    at = mounted.starts[os.fsencode(member)] + shift
    size = 400 if shift == 0 else 2000
    assert os.pread(mounted.fd, size, at) == mounted.expected[at : at + size]
    change_it(mounted.root)
    mounted.fails(lambda: os.pread(mounted.fd, size, at))
    (line,) = mounted.lines()
    assert f"recorded {recorded}" in line
    if found == "nothing":
        assert "gone since recording" in line
    else:
        assert f"{what} " in line and f"found {found}" in line
    culprit = "data" if what == "source" else member.rstrip("/")
    mounted.check_invalid_for_good(culprit)


@pytest.mark.matrix(but=12)
@pytest.mark.long(but=5)
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("mounted", [None], indirect=True, ids=["cached"])
def test_a_change_under_the_page_cache(
    mounted: Mounted, change: tuple[Callable[[Path], object], str, int, str, str, str]
) -> None:
    """What the kernel has is as recorded; once it asks again, there is EIO and a line, and then nothing any more."""
    change_it, member, shift, *_ = change
    at, size = mounted.starts[os.fsencode(member)] + shift, 400
    assert mounted.read_all() == mounted.expected
    change_it(mounted.root)
    with suppress(OSError):  # found by an audit: the footer's page is asked for again
        assert os.pread(mounted.fd, size, at) == mounted.expected[at : at + size]
    os.posix_fadvise(mounted.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    mounted.fails(lambda: os.pread(mounted.fd, size, at))
    assert mounted.state().startswith("invalid: data")
    for fails_too in (
        lambda: os.stat(mounted.archive),
        lambda: os.open(mounted.archive, os.O_RDONLY),
        lambda: os.pread(mounted.fd, 1, 0),
        lambda: os.pread(mounted.fd, 1, len(mounted.expected) - 1),
    ):
        mounted.fails(fails_too)
    (line,) = mounted.lines()
    assert REMEDY in line


@pytest.mark.long(but=2)
@pytest.mark.parametrize("name", ["overwritten", "shrunk", "deleted", "swapped for a link", "the source moved away"])
@BOTH_MODES
def test_reading_on_gives_recorded_bytes_until_it_fails(mounted: Mounted, name: str) -> None:
    """In order from the start, whether or not the kernel may keep pages."""
    before = os.pread(mounted.fd, 1000, 0)
    assert before == mounted.expected[:1000]
    CHANGES[name][0](mounted.root)
    got = mounted.read_all()
    assert mounted.expected.startswith(got)
    assert len(got) < len(mounted.expected)
    assert mounted.state().startswith("invalid: ")


@pytest.mark.long(but=1)
@pytest.mark.parametrize("name", ["overwritten", "shrunk", "deleted", "replaced"])
def test_a_reader_in_the_middle_of_a_body(mounted: Mounted, name: str) -> None:
    """Half of the file was read; the other half is an error, not another file's."""
    half = mounted.read(B, BODY, SIZE // 2)
    at = mounted.starts[B.encode()] + BODY
    assert half == mounted.expected[at : at + SIZE // 2]
    CHANGES[name][0](mounted.root)
    mounted.fails(lambda: mounted.read(B, BODY + SIZE // 2, 1000))
    mounted.check_invalid_for_good(B)


def test_other_members_are_read_until_the_drift_is_met(mounted: Mounted) -> None:
    """A change is found where it is; before that, bytes that are as recorded are served."""
    os.truncate(mounted.root / "photos" / "z.bin", 5)
    at = mounted.starts[B.encode()]
    assert mounted.read(B, 0, 5000) == mounted.expected[at : at + 5000]
    assert mounted.state() == "valid"
    mounted.fails(lambda: mounted.read("data/photos/z.bin", BODY))
    mounted.fails(lambda: mounted.read(B, 0, 5000))
    mounted.check_invalid_for_good("data/photos/z.bin")


@pytest.mark.long(but="direct")
@BOTH_MODES
def test_what_was_undone_stays_invalid(mounted: Mounted) -> None:
    """The tape is invalid for good in this process, even if the folder looks right again."""
    away = mounted.root.parent / "moved"
    mounted.root.rename(away)
    mounted.fails(lambda: mounted.read(B, BODY))
    away.rename(mounted.root)
    mounted.check_invalid_for_good("data")


@pytest.mark.long(but="direct")
@BOTH_MODES
def test_a_new_recording_is_for_a_new_mount(mounted: Mounted, mount: Mount) -> None:
    """The old mount stays invalid, the remedy works, and a new mount plays what is there now."""
    overwrite(mounted.root / FILE)
    mounted.fails(lambda: mounted.read(B, BODY, SIZE))
    assert run("record", "--force", mounted.root).returncode == 0
    again = mount(mounted.root)
    reference = Reference(mounted.root)
    assert again.read_bytes() == reference.read(0, reference.size) != mounted.expected
    mounted.check_invalid_for_good(B)


@pytest.mark.long(but="direct")
@BOTH_MODES
def test_a_new_recording_while_mounted_changes_no_byte(mounted: Mounted) -> None:
    """The mount goes on with the index that it opened: recorded bytes or EIO."""
    os.truncate(mounted.root / "photos" / "a.bin", 5)
    assert run("record", "--force", mounted.root).returncode == 0
    assert mounted.expected.startswith(mounted.read_all())


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("name", "shown"), [(b"two\nlines", r"two\nlines"), (b"\xff\x1b[31m", r"\xff\x1b[31m"), ("ä".encode(), "ä")]
)
def test_names_in_the_log_and_the_state(tmp_path: Path, mount: Mount, name: bytes, shown: str) -> None:
    """One line that says exactly which bytes are meant, once escaped, the same in both."""
    root, log = tmp_path / "data", tmp_path / "drift.log"
    make_source(root)
    path = root / os.fsdecode(name)
    path.write_bytes(b"x" * 600)
    assert run("record", root).returncode == 0
    with opened(root, mount(root, "--log", log), log) as mounted:
        path.write_bytes(b"y" * 700)
        mounted.fails(lambda: mounted.read(os.fsdecode(b"data/" + name), BODY, 100))
        mounted.check_invalid_for_good(f"data/{shown}")


def test_a_copy_of_the_tape_is_checked_too(tmp_path: Path, mount: Mount) -> None:
    """Away from home inode and ctime are not compared, but all else is."""
    original, root, log = tmp_path / "first" / "data", tmp_path / "second" / "data", tmp_path / "drift.log"
    make_source(original)
    assert run("record", original).returncode == 0
    root.parent.mkdir()
    subprocess.run(["cp", "-a", original, root], check=True)
    with opened(original, mount(root, "--direct", "--log", log), log) as mounted:
        assert mounted.read_all() == mounted.expected
        replace_by_copy(root / FILE)
        at = mounted.starts[B.encode()]
        assert mounted.read(B, BODY, SIZE) == mounted.expected[at + BODY : at + BODY + SIZE]
        (root / "photos" / "b.bin").chmod(0o600)
        mounted.fails(lambda: mounted.read(B, BODY))
        mounted.check_invalid_for_good(B)


@pytest.mark.long(but="direct")
@pytest.mark.parametrize("how", ["overwrite", "replace", "swap for a link"])
@BOTH_MODES
def test_a_change_in_the_middle_of_reading(mounted: Mounted, how: str) -> None:
    """Readers that race with a writer see recorded bytes, then EIO; no byte of the writer's, ever."""
    path, other = mounted.root / "photos" / "b.bin", mounted.root.parent / "other"
    start = mounted.starts[B.encode()]
    right = mounted.expected[start : start + BODY + SIZE]
    wrong: list[int] = []
    reading = threading.Barrier(5)

    def reads(seed: int) -> None:
        choose = random.Random(seed)
        fd = os.open(mounted.archive, os.O_RDONLY)
        reading.wait(60)
        try:
            while True:
                at = choose.randrange(len(right))
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what the page cache has would be read for ever
                data = os.pread(fd, 4096, start + at)  # through the page cache it may end before the page that failed
                if not data or not data.startswith(right[at : at + len(data)]):
                    wrong.append(at)
        except OSError as error:
            assert error.errno == errno.EIO
        finally:
            os.close(fd)

    readers = [threading.Thread(target=reads, args=(seed,)) for seed in range(4)]
    for reader in readers:
        reader.start()
    reading.wait(60)
    other.write_bytes(b"z" * SIZE)
    match how:
        case "overwrite":
            with path.open("r+b", buffering=0) as file:
                for _ in range(50):
                    file.seek(0)
                    file.write(b"z" * SIZE)
        case "replace":
            other.replace(path)
        case _:
            link = mounted.root.parent / "link"
            link.symlink_to(other)
            link.replace(path)
    for reader in readers:
        reader.join(30)
        assert not reader.is_alive()
    assert not wrong
    wait_until(lambda: not mounted.holds_pages())
    # The folder changes with the name; the page with the file's header may begin with the folder's.
    found = B if mounted.state().startswith(f"invalid: {B}: ") else f"{B.rpartition('/')[0]}/"
    mounted.check_invalid_for_good(found)


# Errors that are no drift


READ = ["-e", "trace=pread64,preadv,preadv2"]
OPEN = ["-e", "trace=openat,openat2"]


@pytest.mark.long(but=2)
@pytest.mark.needs("strace")
@pytest.mark.parametrize(
    ("calls", "number", "on_the_file"),
    [(READ, "EIO", True), (OPEN, "EMFILE", False), (OPEN, "EIO", False), (OPEN, "ESTALE", False)],
    ids=["read EIO", "open EMFILE", "open EIO", "open ESTALE"],
)
def test_an_error_of_the_source_is_no_drift(mounted: Mounted, calls: list[str], number: str, on_the_file: bool) -> None:
    """EIO and a line that names the file; the tape stays valid, and what can be read again is right."""
    at = mounted.starts[B.encode()] + BODY
    expected = mounted.expected[at : at + 4096]
    assert mounted.read(B, BODY) == expected
    inject = [*calls, "-e", f"inject={calls[1].removeprefix('trace=')}:error={number}"]
    only = ["-P", mounted.root / "photos" / "b.bin"] if on_the_file else []
    with failing(daemon_of(mounted.archive.parent), *only, *inject):
        for _ in range(3):
            mounted.fails(lambda: mounted.read(B, BODY))
        if on_the_file:
            other = mounted.starts[C.encode()]
            assert mounted.read(C) == mounted.expected[other : other + 4096]
        os.stat(mounted.archive)
        assert mounted.state() == "valid"
    assert mounted.read(B, BODY) == expected
    assert mounted.read_all() == mounted.expected
    if on_the_file:
        (line,) = mounted.lines()
        assert "b.bin" in line
        assert os.strerror(getattr(errno, number)) in line


@pytest.mark.needs("strace")
def test_a_read_that_ends_early_is_no_answer(mounted: Mounted) -> None:
    """The file system gives nothing where there was something: an error, not zeros and not fewer bytes."""
    inject = [*READ, "-e", "inject=pread64,preadv,preadv2:retval=0"]
    with failing(daemon_of(mounted.archive.parent), "-P", mounted.root / "photos" / "b.bin", *inject):
        mounted.fails(lambda: mounted.read(B, BODY))
    assert mounted.read_all() == mounted.expected


@pytest.mark.needs("strace")
def test_drift_seen_while_the_file_cannot_be_read(mounted: Mounted) -> None:
    """A changed file whose bytes fail too is drift, not a passing error."""
    overwrite(mounted.root / FILE)
    inject = [*READ, "-e", "inject=pread64,preadv,preadv2:error=EIO"]
    with failing(daemon_of(mounted.archive.parent), "-P", mounted.root / "photos" / "b.bin", *inject):
        mounted.fails(lambda: mounted.read(B, BODY))
    mounted.check_invalid_for_good(B)
