"""Recording real folders: the archive is the expected one to the byte, or the refusal names all that is in the way."""

import contextlib
import fcntl
import gc
import hashlib
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from errno import EAGAIN, EEXIST, ENOSPC
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import reference
from support.filesystems import loop, mounted
from support.reference import Reference, gnu_tar
from support.trees import TREES
from support.users import as_nobody, give_to_nobody

import tartapefs
from tartapefs import (
    OutputError,
    SourceUnreadableError,
    Tape,
    TapeBusyError,
    TapeConstraintError,
    TapeExistsError,
    TapeFormatError,
    TapeIntegrityError,
    TapePlayer,
    TapeRecorder,
)

GIB = 1 << 30


def played(root: Path, index: Path | None = None) -> bytes:
    """The whole archive, through tape and player."""
    with Tape.discover(root, index) as tape:
        player = TapePlayer(tape)
        try:
            return player.read(0, tape.total_size)
        finally:
            player.close()


def fingerprint_of(expected: Reference) -> str:
    """SHA-256 over all headers, in order."""
    digest = hashlib.sha256()
    for start in expected.starts.values():
        digest.update(expected.read(start, 512))
    return digest.hexdigest()


def whole(root: Path, left_out: tuple[bytes, ...] = ()) -> bytes:
    expected = Reference(root, left_out)
    return expected.read(0, expected.size)


def assert_recorded(root: Path, left_out: tuple[bytes, ...] = ()) -> None:
    """The tape of `root` has the archive, size, count and fingerprint that it should have."""
    expected = Reference(root, left_out)
    assert played(root) == expected.read(0, expected.size)
    with Tape.discover(root) as tape:
        assert tape.total_size == expected.size
        assert tape.member_count == len(expected.starts)
        assert tape.fingerprint == fingerprint_of(expected)
        assert [(m.name, m.start) for m in tape.members()] == list(expected.starts.items())


def nothing_written(root: Path, mtime_ns: int) -> None:
    """No folder for the index, and the root's own time as it was."""
    assert not os.path.lexists(root / ".tartape")
    assert root.stat().st_mtime_ns == mtime_ns


# The archive


@pytest.fixture(params=["just made", "at rest"])
def age(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been at rest for long takes a shorter way through the recorder than what changed lately."""
    if request.param == "at rest":
        monkeypatch.setattr("tartapefs.record.settling._RECENT_NS", -(10**18))


@pytest.mark.usefixtures("age")
@pytest.mark.parametrize("name", TREES)
def test_trees(tmp_path: Path, name: str) -> None:
    """Each hard folder has the archive that the format says, checked against an implementation of its own."""
    root = tmp_path / "tree"
    root.mkdir()
    TREES[name](root)
    fingerprint = TapeRecorder(root).commit()
    assert_recorded(root)
    with Tape.discover(root) as tape:
        assert tape.fingerprint == fingerprint


@pytest.mark.usefixtures("age")
# What GNU tar cannot write as ustar: times outside of 1970 to 2242. What it writes and the format leaves out: pipes.
@pytest.mark.needs("tar")
@pytest.mark.parametrize("name", [name for name in TREES if name not in ("mtimes", "special_files")])
def test_trees_as_gnu_tar_writes_them(tmp_path: Path, name: str) -> None:
    """The archive is the one of GNU tar, but for the two fields that the format leaves empty."""
    root = tmp_path / "tree"
    root.mkdir()
    TREES[name](root)
    TapeRecorder(root).commit()
    assert played(root) == gnu_tar(root)


@pytest.mark.needs("tar")
@pytest.mark.parametrize("moment", [0, 999_999_999, 10**9 - 1, 10**9, (8**11 - 1) * 10**9 + 999_999_999])
def test_mtimes_as_gnu_tar_writes_them(tmp_path: Path, moment: int) -> None:
    """Fractions of a second are cut off, up to the last second that has an octal form."""
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"x")
    os.utime(root / "file", ns=(moment, moment))
    if (root / "file").stat().st_mtime_ns != moment:
        pytest.skip("this file system cannot hold the time")
    TapeRecorder(root).commit()
    assert played(root) == gnu_tar(root)


def test_siblings_are_ordered_by_their_bytes(tmp_path: Path) -> None:
    """By `memcmp` of the names alone: what a folder contains follows it at once, whatever its siblings are called."""
    root = tmp_path / "tree"
    for folder in ("a", "b", "Z", "é", "aa"):
        (root / folder).mkdir(parents=True)
        (root / folder / "within").write_bytes(b"1")
    for name in ("a.b", "a-b", "a b", "a0", "ab", "A", "_", "\udcff", "\x01", "10", "9", "b.", "e\u0301"):
        (root / name).write_bytes(b"2")
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        names = [member.name for member in tape.members()]
    assert names == sorted(names, key=lambda name: name.rstrip(b"/").split(b"/"))
    at = names.index(b"tree/a/")
    assert names[at : at + 5] == [b"tree/a/", b"tree/a/within", b"tree/a b", b"tree/a-b", b"tree/a.b"]
    assert_recorded(root)


@pytest.mark.usefixtures("age")
def test_sockets_and_pipes_are_left_out_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    (root / "below").mkdir(parents=True)
    for name, kind in (("pipe", stat.S_IFIFO), ("socket", stat.S_IFSOCK), ("below/pipe", stat.S_IFIFO)):
        os.mknod(root / name, kind | 0o600)
    recorder = TapeRecorder(root)
    recorder.commit()
    assert recorder.left_out == 3
    assert recorder.skipped == ()
    assert recorder.member_count == 2
    with Tape.discover(root) as tape:
        assert tape.left_out == 3
    assert_recorded(root)


@pytest.mark.usefixtures("age")
@pytest.mark.root
def test_devices_are_left_out_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    os.mknod(root / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        assert (tape.left_out, tape.member_count) == (1, 1)


def test_sparse_files(tmp_path: Path) -> None:
    """Sizes at and beyond what octal holds; read at the places where something begins or ends."""
    root = tmp_path / "tree"
    root.mkdir()
    for name, size in (("a", 8 * GIB - 1), ("b", 8 * GIB), ("c", 1 << 40), ("d", 3)):
        with open(root / name, "wb") as file:
            file.truncate(size)
            for at in (0, size // 2, size - 3):
                file.seek(at)
                file.write(b"end")
    TapeRecorder(root).commit()
    expected = Reference(root)
    with Tape.discover(root) as tape:
        assert tape.total_size == expected.size
        assert tape.fingerprint == fingerprint_of(expected)
        player = TapePlayer(tape)
        halves = [member.start + 512 + member.size // 2 for member in tape.members()]
        for place in [*expected.boundaries(), *halves]:
            low = max(0, place - 1500)
            assert player.read(low, 3000) == expected.read(low, 3000), f"at {place}"
        player.close()


def test_tape_folder_is_left_out_of_the_root_only(tmp_path: Path) -> None:
    """Deeper down, a folder of that name is data like any other."""
    root = tmp_path / "tree"
    (root / "below" / ".tartape").mkdir(parents=True)
    (root / "below" / ".tartape" / "index.db").write_bytes(b"data")
    (root / ".tartape").mkdir()
    (root / ".tartape" / "something else").write_bytes(b"no data")
    (root / ".tartapes").write_bytes(b"data")
    TapeRecorder(root).commit()
    assert_recorded(root)
    with Tape.discover(root) as tape:
        assert tape.find("tree/below/.tartape/index.db").size == 4
        with pytest.raises(KeyError):
            tape.find("tree/.tartape")


def test_recorder_reports_what_it_recorded(tree: Path) -> None:
    expected = Reference(tree)
    recorder = TapeRecorder(tree)
    assert recorder.commit() == fingerprint_of(expected)
    assert (recorder.total_size, recorder.member_count) == (expected.size, len(expected.starts))
    assert (recorder.left_out, recorder.skipped) == (0, ())


def test_progress(tmp_path: Path) -> None:
    """Told members and bytes so far, never less than before, and at the end all of them."""
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(2500):
        (root / f"{number}").write_bytes(b"")
    told: list[tuple[int, int]] = []
    recorder = TapeRecorder(root, on_progress=lambda members, size: told.append((members, size)))
    recorder.commit()
    assert told == sorted(told)
    assert told[-1] == (recorder.member_count, recorder.total_size)
    assert len(told) > 1


# The root and its name


@pytest.mark.parametrize(
    "given", [".", "x/..", "./x/../", "{parent}/link", "link", "{root}/", "{root}//", "{root}/x/.", "link/x/.."]
)
def test_root_given_in_other_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """The root's name in the archive is that of the folder itself, whatever way leads to it."""
    root = tmp_path / "the folder"
    (root / "x").mkdir(parents=True)
    (root / "x" / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("the folder")
    monkeypatch.chdir(tmp_path if given.startswith("link") else root)
    shown = given.format(root=root, parent=tmp_path)
    TapeRecorder(shown).commit()
    expected_root = root / "x" if given.endswith("/x/.") else root
    assert_recorded(expected_root)
    with Tape.discover(shown) as tape:
        assert tape.root_name == expected_root.name


@pytest.mark.parametrize(
    "name", ["-rf", "new\nline", "\udcff\udcfe", " ", "a" * 99, "b" * 100, "c" * 155, "...", "tree.tar", "café", "\\"]
)
def test_root_names(tmp_path: Path, name: str) -> None:
    """Raw bytes, as the file system has them; a slash after them, which is no place to split."""
    root = tmp_path / name
    root.mkdir()
    (root / "file").write_bytes(b"1")
    if len(name) > 99:
        with pytest.raises(TapeConstraintError):
            TapeRecorder(root).commit()
        return
    TapeRecorder(root).commit()
    assert_recorded(root)


def test_root_as_text_and_as_path(tree: Path) -> None:
    assert TapeRecorder(str(tree)).commit() == TapeRecorder(tree, overwrite=True).commit()


def test_root_of_the_file_system_is_refused(tmp_path: Path) -> None:
    """It has no name, so its members would have none."""
    recorder = TapeRecorder("/", tmp_path / "index.db", exclude=lambda path: True)
    with pytest.raises(TapeConstraintError, match="name"):
        recorder.commit()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["missing", "file", "dangling"])
def test_root_that_is_no_folder(tmp_path: Path, what: str) -> None:
    root = tmp_path / "root"
    if what == "file":
        root.write_bytes(b"")
    elif what == "dangling":
        root.symlink_to("nowhere")
    with pytest.raises(NotADirectoryError if what == "file" else FileNotFoundError):
        TapeRecorder(root).commit()


# Excluding


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("a.log", "keep.txt", "b/a.log", "b/c.txt", "build/x", "build/y/z", "b/build/x", "b/build.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        ("*.log", [b"a.log", b"b/a.log"]),
        ("/a.log", [b"a.log"]),
        ("build/", [b"build", b"b/build"]),
        (["*.log", "/build"], [b"a.log", b"b/a.log", b"build"]),
        (("*.log", "!b/a.log"), [b"a.log"]),
        (["build", "!build/x"], [b"build", b"b/build"]),  # what lies in a folder that is left out is left out
        ("b", [b"b"]),
        ([], []),
        ("# no pattern", []),
        ("nothing of this name", []),
    ],
    ids=str,
)
def test_exclude_by_pattern(varied: Path, exclude: Any, left_out: list[bytes]) -> None:
    """As .gitignore would; the index tells which patterns they were."""
    TapeRecorder(varied, exclude=exclude).commit()
    assert_recorded(varied, tuple(left_out))
    with Tape.discover(varied) as tape:
        assert tape.excluded == ((exclude,) if isinstance(exclude, str) else tuple(exclude))


def test_exclude_by_function(varied: Path) -> None:
    """It is given each path below the root once, and not what lies in a folder that it left out."""
    seen: list[str] = []

    def is_build(path: str) -> bool:
        seen.append(path)
        return path.endswith("build")

    TapeRecorder(varied, exclude=is_build).commit()
    assert_recorded(varied, (b"build", b"b/build"))
    assert sorted(seen) == ["a.log", "b", "b/a.log", "b/build", "b/build.txt", "b/c.txt", "build", "keep.txt"]
    with Tape.discover(varied) as tape:
        (excluded,) = tape.excluded
        assert "is_build" in excluded


def test_malformed_pattern_is_refused_at_once(varied: Path) -> None:
    with pytest.raises(ValueError):
        TapeRecorder(varied, exclude="!")


# Owners


@pytest.mark.root
@pytest.mark.parametrize("uid", [0, 1, 1000, 2_097_151, 2_097_152, 3_000_000_000])
def test_owners_kept(tmp_path: Path, uid: int) -> None:
    """With `anonymize=False` the header has the real owner, by number and, where there is one, by name."""
    root = tmp_path / "tree"
    root.mkdir()
    file = root / "file"
    file.write_bytes(b"1")
    os.chown(file, uid, uid)
    scrubbed = TapeRecorder(root).commit()
    kept = TapeRecorder(root, anonymize=False, overwrite=True).commit()
    try:
        uname, gname = pwd.getpwuid(uid).pw_name, "root" if uid == 0 else None
    except KeyError:
        uname, gname = "", None
    with Tape.discover(root) as tape:
        assert tape.owners_kept
        member = tape.find("tree/file")
        player = TapePlayer(tape)
        header = player.read(member.start, 512)
        player.close()
    if gname is None:
        gname = header[297:329].rstrip(b"\0").decode()  # of a machine's own choice
    assert header == reference.header(b"tree/file", file.stat(), owner=(uid, uid, uname, gname))
    assert (kept == scrubbed) == (uid == 0)


# The fingerprint, and recording again


def test_fingerprint_of_an_equal_copy(tree: Path, tmp_path: Path) -> None:
    """The same on two machines that hold equal copies; another once anything of a header differs."""
    fingerprint = TapeRecorder(tree).commit()
    copy = tmp_path / "elsewhere" / tree.name
    copy.parent.mkdir()
    subprocess.run(["cp", "-a", tree, copy], check=True)
    shutil.rmtree(copy / ".tartape")
    os.utime(copy, ns=(0, tree.stat().st_mtime_ns))
    assert TapeRecorder(copy).commit() == fingerprint
    (copy / "script.sh").chmod(0o700)
    assert TapeRecorder(copy, overwrite=True).commit() != fingerprint


def test_fingerprint_is_of_headers_alone(tmp_path: Path) -> None:
    """Content that differs under equal facts does not show in it: that is what the witnesses are for."""
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"1")
    os.utime(root / "file", ns=(5, 5))
    fingerprint = TapeRecorder(root).commit()
    (root / "file").write_bytes(b"2")
    os.utime(root / "file", ns=(5, 5))
    assert TapeRecorder(root, overwrite=True).commit() == fingerprint
    assert_recorded(root)


def test_root_mtime_is_left_as_found(tree: Path) -> None:
    """The first time, when the folder for the index is made, and each time after."""
    os.utime(tree, ns=(123, 1_234_567_890_123_456_789))
    fingerprints = {TapeRecorder(tree, overwrite=True).commit() for _ in range(3)}
    assert len(fingerprints) == 1
    assert tree.stat().st_mtime_ns == 1_234_567_890_123_456_789


def test_recording_again_keeps_the_time_of_an_equal_tape(tree: Path) -> None:
    """So that the archive's own time, which a mount shows, changes exactly when the archive does."""
    before = time.time_ns()
    first = TapeRecorder(tree).commit()
    with Tape.discover(tree) as tape:
        recorded_ns = tape.recorded_ns
    assert before <= recorded_ns <= time.time_ns()
    assert TapeRecorder(tree, overwrite=True).commit() == first
    with Tape.discover(tree) as tape:
        assert tape.recorded_ns == recorded_ns
    (tree / "one more").write_bytes(b"")
    assert TapeRecorder(tree, overwrite=True).commit() != first
    with Tape.discover(tree) as tape:
        assert tape.recorded_ns > recorded_ns


def test_recording_again_over_a_bad_index(tree: Path) -> None:
    """What is there is replaced when asked to, even if nobody can read it."""
    (tree / ".tartape").mkdir()
    (tree / ".tartape" / "index.db").write_bytes(b"no index")
    with pytest.raises(TapeExistsError):
        TapeRecorder(tree).commit()
    TapeRecorder(tree, overwrite=True).commit()
    assert_recorded(tree)


def test_existing_tape_is_not_replaced_unasked(tree: Path) -> None:
    TapeRecorder(tree).commit()
    index = tree / ".tartape" / "index.db"
    before = index.read_bytes()
    with pytest.raises(TapeExistsError, match="--force") as caught:
        TapeRecorder(tree).commit()
    assert isinstance(caught.value, FileExistsError)
    assert (caught.value.path, caught.value.errno) == (str(index), EEXIST)
    assert index.read_bytes() == before
    assert os.listdir(tree / ".tartape") == ["index.db"]


# Two recorders, and killed ones

HOLD = """
import sys
from tartapefs.base.saved_state import SavedState
state = SavedState(sys.argv[1], "recording")
print("held", flush=True)
sys.stdin.read()
"""


def test_two_recorders_at_once(tree: Path) -> None:
    """While one records, another is told so, and disturbs neither it nor the tape that is there."""
    TapeRecorder(tree).commit()
    index = tree / ".tartape" / "index.db"
    before = index.read_bytes()
    command = [sys.executable, "-c", HOLD, f"{index}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(TapeBusyError, match="another recording") as caught:
            TapeRecorder(tree, overwrite=True).commit()
        assert isinstance(caught.value, BlockingIOError)
        assert (caught.value.path, caught.value.errno) == (str(index), EAGAIN)
        assert os.path.exists(f"{index}.lock")
        assert index.read_bytes() == before
    TapeRecorder(tree, overwrite=True).commit()  # its file is there, but nobody holds it
    assert_recorded(tree)
    assert os.listdir(tree / ".tartape") == ["index.db"]


def test_recorder_within_a_recorder(tree: Path) -> None:
    """The lock is between recorders, not between processes."""
    caught: list[BaseException] = []

    def record_too(path: str) -> bool:
        if not caught:
            with pytest.raises(TapeBusyError) as error:
                TapeRecorder(tree).commit()
            caught.append(error.value)
        return False

    TapeRecorder(tree, exclude=record_too).commit()
    assert len(caught) == 1
    assert_recorded(tree)


KILLED = """
import os, signal, sys
from tartapefs import TapeRecorder
TapeRecorder(sys.argv[1], overwrite=True, exclude=lambda path: os.kill(os.getpid(), signal.SIGKILL)).commit()
"""


@pytest.mark.parametrize("had_tape", [False, True])
def test_killed_recorder(tree: Path, had_tape: bool) -> None:
    """What it leaves is the old index or none; its unfinished files are removed by the next recorder."""
    folder = tree / ".tartape"
    if had_tape:
        TapeRecorder(tree).commit()
        before = (folder / "index.db").read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED, tree], env=os.environ | {"PYTHONPATH": package_path()})
    assert killed.returncode == -signal.SIGKILL
    *found, part, lock = sorted(os.listdir(folder))
    assert found == ["index.db"] * had_tape and lock == "index.db.lock"
    assert re.fullmatch(r"index\.db\.[0-9a-f]{16}\.part", part)
    if had_tape:
        assert (folder / "index.db").read_bytes() == before
        assert_recorded(tree)
    TapeRecorder(tree, overwrite=had_tape).commit()
    assert os.listdir(folder) == ["index.db"]
    assert_recorded(tree)


def package_path() -> str:
    return str(Path(tartapefs.__file__).parents[1])


_INTERRUPTIBLE = tuple(
    module.__file__
    for module in (
        tartapefs.record.recorder,
        tartapefs.record.options,
        tartapefs.record.settling,
        tartapefs.record.tape_folder,
        tartapefs.index.writer,
        tartapefs.base.forked_work,
        contextlib,
    )
)


def _interrupted_after(moments: int, recorder: TapeRecorder) -> bool:
    """Records, with a SIGINT in the given one of the moments in which Python handles signals; whether it had less.

    These are the beginning of each function, and the end of each that is not written in Python, its result still at
    hand.
    """
    left = moments

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename in _INTERRUPTIBLE:
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)

    try:
        sys.setprofile(profile)
        recorder.commit()
    except KeyboardInterrupt:
        return False
    finally:
        sys.setprofile(None)
    return left > 0


# Python drops what a handler raises within a destructor: then the recording goes on.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_interrupt_at_any_moment(tmp_path: Path, elsewhere: bool) -> None:
    """Whenever it comes, there is no index, or the new one; nothing else is left behind, and the root is as it was."""
    root, place = tmp_path / "data", tmp_path / "place"
    root.mkdir()
    place.mkdir()
    (root / "file").write_bytes(b"content")
    os.utime(root, (10**9, 10**9))
    time.sleep(0.05)  # until nothing of it is fresh
    index = place / "index" if elsewhere else None
    folder, name = (place, "index") if elsewhere else (root / ".tartape", "index.db")
    moments, ended = 1, False
    while not ended:
        ended = _interrupted_after(moments, TapeRecorder(root, index))
        found = os.listdir(folder) if folder.exists() else []
        assert found in ([], [name]), moments
        assert root.stat().st_mtime == 10**9, moments
        if found:
            with Tape.discover(root, index) as tape:
                assert tape.member_count == 2
            (folder / name).unlink()
            if not elsewhere:
                folder.rmdir()
        assert os.listdir(root) == ["file"], moments
        os.utime(root, (10**9, 10**9))
        moments += 1
    assert moments > 100, "it was not interrupted often"
    gc.collect()  # of descriptors within reference cycles of tracebacks


@pytest.mark.parametrize("content", [b"", b"somebody's" * 5000])
def test_files_of_others_beside_the_index(tree: Path, content: bytes) -> None:
    """Another file of any name stays as it is; one in the place of the lock is refused, and stays too."""
    folder = tree / ".tartape"
    folder.mkdir()
    for name in ("index.db.new", "index.db.part", "index.db.0123456789abcdef.part"):
        (folder / name).write_bytes(content)
    TapeRecorder(tree).commit()
    (folder / "index.db.lock").write_bytes(content)
    with pytest.raises(OutputError, match="no file that a recording keeps; move or remove it"):
        TapeRecorder(tree, overwrite=True).commit()
    assert {path.read_bytes() for path in folder.iterdir() if path.name != "index.db"} == {content}
    assert len(os.listdir(folder)) == 5
    assert_recorded(tree)


def test_lock_that_is_a_link_is_not_followed(tree: Path, tmp_path: Path) -> None:
    """Whoever may write in the folder of the index cannot have another file emptied."""
    (tmp_path / "precious").write_bytes(b"precious")
    (tree / ".tartape").mkdir()
    for target in (tmp_path / "precious", tmp_path / "nothing"):
        (tree / ".tartape" / "index.db.lock").symlink_to(target)
        with pytest.raises(OutputError, match="symbolic link"):
            TapeRecorder(tree).commit()
        (tree / ".tartape" / "index.db.lock").unlink()
    assert (tmp_path / "precious").read_bytes() == b"precious" and not (tmp_path / "nothing").exists()


def test_tape_folder_that_is_a_link_is_not_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tree / ".tartape").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError):
        TapeRecorder(tree).commit()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_index_at_rest_is_a_single_file(tree: Path) -> None:
    """No write-ahead log, journal or unfinished file beside it, after recording and after reading."""
    TapeRecorder(tree).commit()
    assert os.listdir(tree / ".tartape") == ["index.db"]
    assert_recorded(tree)
    assert os.listdir(tree / ".tartape") == ["index.db"]


# What cannot be recorded


def test_all_problems_are_reported_in_one_go(tmp_path: Path) -> None:
    """Each path with its reason, the fitting ones not among them, and nothing written."""
    root = tmp_path / "tree"
    (root / "fits").mkdir(parents=True)
    (root / "fits" / "file").write_bytes(b"1")
    (root / ("n" * 96)).write_bytes(b"fits")
    (root / ("n" * 101)).write_bytes(b"1")
    (root / "fits" / ("m" * 101)).write_bytes(b"1")
    (root / ("d" * 200)).mkdir()
    (root / ("d" * 200) / "below").write_bytes(b"1")
    (root / "link").symlink_to("t" * 101)
    (root / "last").symlink_to("t" * 4000)
    os.utime(root, ns=(0, 77))
    with pytest.raises(TapeConstraintError) as caught:
        TapeRecorder(root).commit()
    problems = {problem.path: problem.reason for problem in caught.value.problems}
    assert set(problems) == {
        "n" * 101,
        "fits/" + "m" * 101,
        "d" * 200,
        "d" * 200 + "/below",
        "link",
        "last",
    }
    assert "101 bytes" in problems["link"]
    assert "100" in problems["link"]
    assert f"{len('tree/fits/') + 101} bytes" in problems["fits/" + "m" * 101]
    assert str(caught.value.problems[0].path) in str(caught.value)
    assert "5 more" in str(caught.value)
    nothing_written(root, 77)


def test_problem_with_the_last_of_many(tmp_path: Path) -> None:
    """Nothing is written either if the one problem comes after all else."""
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(300):
        (root / f"{number}").write_bytes(b"")
    (root / ("z" * 150)).write_bytes(b"")
    mtime_ns = root.stat().st_mtime_ns
    with pytest.raises(TapeConstraintError):
        TapeRecorder(root).commit()
    nothing_written(root, mtime_ns)


def test_problem_when_there_is_a_tape(tree: Path) -> None:
    """The old tape stays, to the byte."""
    TapeRecorder(tree).commit()
    index = tree / ".tartape" / "index.db"
    before = index.read_bytes()
    (tree / ("z" * 150)).write_bytes(b"")
    mtime_ns = tree.stat().st_mtime_ns
    with pytest.raises(TapeConstraintError):
        TapeRecorder(tree, overwrite=True).commit()
    assert index.read_bytes() == before
    assert os.listdir(tree / ".tartape") == ["index.db"]
    assert tree.stat().st_mtime_ns == mtime_ns


def test_problem_that_is_excluded_is_none(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    (root / ("d" * 200)).mkdir(parents=True)
    (root / ("d" * 200) / "below").write_bytes(b"1")
    TapeRecorder(root, exclude="ddd*").commit()
    assert_recorded(root, (b"d" * 200,))


def test_archive_larger_than_any_file(tmp_path: Path) -> None:
    """Sizes that add up to more than an offset can say are a problem to report, not a crash."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("no file system at hand that has files so large")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        root = Path(folder) / "tree"
        root.mkdir()
        for name in "abcd":
            with open(root / name, "wb") as file:
                file.truncate(2**62)
        mtime_ns = root.stat().st_mtime_ns
        with pytest.raises(TapeConstraintError, match="bytes"):
            TapeRecorder(root).commit()
        nothing_written(root, mtime_ns)


# An unprivileged user


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A folder that other users can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder).resolve()


@pytest.fixture
def partly_unreadable(open_tmp: Path) -> Iterator[Path]:
    """A folder of nobody's, in which some things cannot be read by nobody."""
    root = open_tmp / "tree"
    (root / "locked" / "within").mkdir(parents=True)
    (root / "no listing").mkdir()
    (root / "names only").mkdir()
    for name in ("readable", "secret", "no listing/file", "names only/file", "other's secret", "other's", "z"):
        (root / name).write_bytes(name.encode())
    give_to_nobody(root)
    (root / "secret").chmod(0o000)
    (root / "locked").chmod(0o000)
    (root / "no listing").chmod(0o300)
    (root / "names only").chmod(0o400)
    if os.geteuid() == 0:
        for name in ("other's secret", "other's"):
            os.chown(root / name, 0, 0)
        (root / "other's secret").chmod(0o600)
        (root / "other's").chmod(0o644)
    else:
        (root / "other's secret").chmod(0o000)
    yield root
    for name in ("locked", "no listing", "names only"):
        (root / name).chmod(0o700)


UNREADABLE = {"secret", "locked", "no listing", "names only/file", "other's secret"}


def test_unreadable_paths_are_reported_in_one_go(partly_unreadable: Path) -> None:
    """Files that cannot be opened and folders that cannot be listed, each with the reason, and nothing written."""
    mtime_ns = partly_unreadable.stat().st_mtime_ns

    def record() -> tuple[dict[str, str], str]:
        with pytest.raises(SourceUnreadableError) as caught:
            TapeRecorder(partly_unreadable).commit()
        return {problem.path: problem.reason for problem in caught.value.problems}, str(caught.value)

    problems, message = as_nobody(record)
    assert set(problems) == UNREADABLE
    assert set(problems.values()) == {os.strerror(13)}
    assert "4 more" in message
    nothing_written(partly_unreadable, mtime_ns)


def test_unreadable_paths_are_skipped_when_asked(partly_unreadable: Path) -> None:
    """Left out, counted and listed; all the rest is recorded."""

    def record() -> tuple[set[str], int, bytes, int]:
        recorder = TapeRecorder(partly_unreadable, skip_unreadable=True)
        recorder.commit()
        with Tape.discover(partly_unreadable) as tape:
            left_out = tape.left_out
        return {p.path for p in recorder.skipped}, recorder.left_out, played(partly_unreadable), left_out

    skipped, left_out, archive, on_tape = as_nobody(record)
    assert skipped == UNREADABLE
    assert left_out == on_tape == len(UNREADABLE)
    assert archive == whole(partly_unreadable, tuple(map(os.fsencode, UNREADABLE)))


def test_unreadable_but_excluded(partly_unreadable: Path) -> None:
    """What is excluded need not be readable."""

    def record() -> bytes:
        TapeRecorder(partly_unreadable, exclude=lambda path: path in UNREADABLE).commit()
        return played(partly_unreadable)

    assert as_nobody(record) == whole(partly_unreadable, tuple(map(os.fsencode, UNREADABLE)))


def test_both_kinds_of_problems_at_once(partly_unreadable: Path) -> None:
    """One run tells everything there is to repair."""
    (partly_unreadable / "link").symlink_to("t" * 101)
    give_to_nobody(partly_unreadable / "link")

    def record() -> set[str]:
        with pytest.raises(TapeConstraintError) as caught:
            TapeRecorder(partly_unreadable).commit()
        return {problem.path for problem in caught.value.problems}

    assert as_nobody(record) == {*UNREADABLE, "link"}


def test_unreadable_root(open_tmp: Path) -> None:
    """An error that names the folder, and nothing written."""
    root = open_tmp / "tree"
    root.mkdir()
    give_to_nobody(root)
    root.chmod(0o300)

    def record() -> tuple[bool, str]:
        with pytest.raises((SourceUnreadableError, PermissionError)) as caught:
            TapeRecorder(root).commit()
        return os.path.lexists(root / ".tartape"), str(caught.value)

    has_folder, message = as_nobody(record)
    root.chmod(0o700)
    assert not has_folder
    assert "tree" in message


@pytest.mark.root
def test_root_of_another_user(open_tmp: Path) -> None:
    """Who may not write in the folder is told so; with the index elsewhere it is recorded."""
    root = open_tmp / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"1")
    mine = open_tmp / "mine"
    mine.mkdir()
    give_to_nobody(mine)

    def record() -> bytes:
        with pytest.raises(PermissionError):
            TapeRecorder(root).commit()
        TapeRecorder(root, mine / "index.db").commit()
        return played(root, mine / "index.db")

    mtime_ns = root.stat().st_mtime_ns
    assert as_nobody(record) == whole(root)
    nothing_written(root, mtime_ns)


@pytest.mark.root
def test_writable_root_of_another_user(open_tmp: Path) -> None:
    """Who may write in it but not set its time back does not record into it, and leaves its time alone."""
    root = open_tmp / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"1")
    os.utime(root, ns=(5, 5))
    root.chmod(0o777)

    def record() -> None:
        with pytest.raises(PermissionError):
            TapeRecorder(root).commit()

    as_nobody(record)
    nothing_written(root, 5)


# A folder that changes while it is recorded


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("moved away"))
    path.symlink_to("moved away")


def replace_by_file(path: Path) -> None:
    remove(path)
    path.write_bytes(b"a file now")


def replace_by_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def add_beside(path: Path) -> None:
    path.with_name("added").write_bytes(b"1")


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"X")


DURING = [  # when the function is called for the first, the second is changed
    ("m/file", remove, "m/file"),
    ("m/empty", remove, "m/empty"),
    ("m", remove, "m"),
    ("a", remove, "m"),
    ("a", remove, "z"),
    ("m/a", remove, "m/file"),
    ("m/a", remove, "m/link"),
    ("m/file", remove, "m/a"),
    ("m/link", remove, "m/link"),
    ("m", replace_by_file, "m"),
    ("m", replace_by_link, "m"),
    ("m", replace_by_pipe, "m"),
    ("m/file", replace_by_link, "m/file"),
    ("m/file", replace_by_pipe, "m/file"),
    ("m/file", replace_by_folder, "m/file"),
    ("m/a", add_beside, "m/a"),
]
AFTER = [  # when the function is called for the first, the second was recorded before
    ("z", append, "m/a"),
    ("z", overwrite, "m/a"),
    ("z", remove, "m/a"),
    ("z", remove, "m"),
    ("z", replace_by_file, "m"),
    ("z", replace_by_link, "m/a"),
    ("z", replace_by_pipe, "m/a"),
    ("z", add_beside, "m"),
]


@pytest.fixture
def at_rest(tmp_path: Path) -> Path:
    """A folder that nobody has touched for longer than any clock's tick."""
    root = tmp_path / "tree"
    (root / "m").mkdir(parents=True)
    for name in ("a", "m/a", "m/file", "z"):
        (root / name).write_bytes(b"content")
    (root / "m" / "empty").write_bytes(b"")
    (root / "m" / "link").symlink_to("file")
    time.sleep(0.05)
    return root


def changed_while_recorded(root: Path, trigger: str, change: Callable[[], None]) -> TapeIntegrityError:
    """Records `root`, with `change` happening as the scan arrives at `trigger`; it must be found out."""
    called = []

    def meanwhile(path: str) -> bool:
        if path == trigger and not called:
            called.append(path)
            change()
        return False

    with pytest.raises(TapeIntegrityError) as caught:
        TapeRecorder(root, exclude=meanwhile).commit()
    assert called
    assert not os.path.lexists(root / ".tartape")
    return caught.value


def ids(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("trigger", "change", "victim"), DURING, ids=ids)
def test_change_during_the_scan(at_rest: Path, trigger: str, change: Callable[[Path], None], victim: str) -> None:
    """A file or folder that vanishes, comes, or becomes another while its folder is scanned: drift, nothing written."""
    error = changed_while_recorded(at_rest, trigger, lambda: change(at_rest / victim))
    assert "record again" in str(error)
    assert error.differences


@pytest.mark.long(but=2)
@pytest.mark.parametrize(("trigger", "change", "victim"), AFTER, ids=ids)
def test_change_of_what_was_scanned_just_now(
    at_rest: Path, monkeypatch: pytest.MonkeyPatch, trigger: str, change: Callable[[Path], None], victim: str
) -> None:
    """A fresh file is looked at again at the end, so a change after the scan passed it is drift as well."""
    # On a busy machine it is fresh no more after a clock's own tick.
    monkeypatch.setattr("tartapefs.record.settling._TICK_NS", 10**9)
    inside = at_rest / "m" / "a"
    inside.write_bytes(b"written a moment ago")
    error = changed_while_recorded(at_rest, trigger, lambda: change(at_rest / victim))
    assert "record again" in str(error)


def test_change_of_what_was_scanned_long_ago(at_rest: Path) -> None:
    """Not seen by the recorder, which looks once at what is at rest; seen by the first read."""
    called = []

    def meanwhile(path: str) -> bool:
        if path == "z":
            called.append(path)
            append(at_rest / "m" / "a")
        return False

    TapeRecorder(at_rest, exclude=meanwhile).commit()
    assert called
    with pytest.raises(TapeIntegrityError, match="size"):
        played(at_rest)


def test_index_folder_taken_away_meanwhile(at_rest: Path) -> None:
    """Whoever removes the unfinished index gets an error, not half a tape."""

    def meanwhile(path: str) -> bool:
        shutil.rmtree(at_rest / ".tartape", ignore_errors=True)
        return False

    with pytest.raises((OSError, TapeIntegrityError)):
        TapeRecorder(at_rest, exclude=meanwhile).commit()
    assert not os.path.lexists(at_rest / ".tartape" / "index.db")


def test_function_that_raises(tree: Path) -> None:
    """Its own error comes through, and nothing is written."""
    mtime_ns = tree.stat().st_mtime_ns
    with pytest.raises(ZeroDivisionError):
        TapeRecorder(tree, exclude=lambda path: bool(1 / 0)).commit()
    nothing_written(tree, mtime_ns)


# Changes that could hide from `stat`


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_fresh_files_are_settled(tmp_path: Path, keep_mtime: bool) -> None:
    """Recorded right after it was written, changed right after that, at equal size: the change shows."""
    root = tmp_path / "tree"
    root.mkdir()
    for turn in range(8):
        file = root / f"{turn}"
        file.write_bytes(b"before")
        TapeRecorder(root, overwrite=True).commit()
        mtime_ns = file.stat().st_mtime_ns
        file.write_bytes(b"after!")
        if keep_mtime:
            os.utime(file, ns=(mtime_ns, mtime_ns))
        with pytest.raises(TapeIntegrityError):
            played(root)


@pytest.mark.parametrize(
    "mtime", [-5, 0, 2_000_000_000, int(time.time()) + 3600], ids=["before", "epoch", "coarse", "now"]
)
def test_fresh_files_of_any_mtime_are_settled(tmp_path: Path, mtime: int) -> None:
    """Also where the time of change is fresh, and the modification time was set to be anything else."""
    root = tmp_path / "tree"
    root.mkdir()
    file = root / "file"
    for _ in range(8):
        file.write_bytes(b"before")
        os.utime(file, (mtime, mtime))
        TapeRecorder(root, overwrite=True).commit()
        file.write_bytes(b"after!")
        os.utime(file, (mtime, mtime))
        with pytest.raises(TapeIntegrityError):
            played(root)


# Where the index is


def test_index_elsewhere(tree: Path, tmp_path: Path) -> None:
    """The source is not touched at all, and the tape is opened by naming both."""
    index = tmp_path / "indexes" / "of data.db"
    index.parent.mkdir()
    before = os.stat(tree)
    TapeRecorder(tree, index).commit()
    after = os.stat(tree)
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
    assert os.listdir(index.parent) == ["of data.db"]
    assert not os.path.lexists(tree / ".tartape")
    assert played(tree, index) == whole(tree)
    with Tape.from_index(index) as tape:
        player = TapePlayer(tape, source_root=tree)
        assert player.at_home
        assert player.read(0, tape.total_size) == whole(tree)
        player.close()


def test_index_by_a_relative_path(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TapeRecorder("data", "index.db").commit()
    assert played(Path("data"), Path("index.db")) == whole(tree)


@pytest.mark.parametrize("where", ["index.db", "photos/index.db", "../to photos/index.db", "../data/index.db"])
def test_index_inside_the_source_is_refused(tree: Path, where: str) -> None:
    """It would change what it records; also where a link leads there."""
    (tree.parent / "to photos").symlink_to("data/photos")
    mtime_ns = tree.stat().st_mtime_ns
    with pytest.raises(TapeConstraintError, match="index"):
        TapeRecorder(tree, tree / where).commit()
    assert not os.path.exists(tree / where)
    nothing_written(tree, mtime_ns)


def test_index_in_a_folder_that_is_missing(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TapeRecorder(tree, tmp_path / "missing" / "index.db").commit()


def test_index_elsewhere_keeps_out_the_tape_folder(tree: Path, tmp_path: Path) -> None:
    """A folder `.tartape` in the root is no data, wherever the index is; both indexes describe the same archive."""
    first = TapeRecorder(tree).commit()
    assert TapeRecorder(tree, tmp_path / "index.db").commit() == first


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 192 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k,nr_inodes=0", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.root
def test_full_disk(small_disk: Path) -> None:
    """An OSError that says so; no index and no folder for it is left."""
    root = small_disk / "tree"
    root.mkdir()
    for number in range(4000):
        os.mknod(root / f"a file with a name of some length, the number of which is {number}")
    mtime_ns = root.stat().st_mtime_ns
    with pytest.raises(OSError, match="No space") as caught:
        TapeRecorder(root).commit()
    assert caught.value.errno == ENOSPC
    nothing_written(root, mtime_ns)


@pytest.mark.root
def test_full_disk_when_there_is_a_tape(tree: Path, small_disk: Path) -> None:
    """The old index stays, and plays what did not change."""
    index = small_disk / "index.db"
    TapeRecorder(tree, index).commit()
    before = index.read_bytes()
    for number in range(3000):
        os.mknod(tree / f"a file with a name of some length, the number of which is {number}")
    with pytest.raises(OSError, match="No space") as caught:
        TapeRecorder(tree, index, overwrite=True).commit()
    assert caught.value.errno == ENOSPC
    assert index.read_bytes() == before
    assert os.listdir(small_disk) == ["index.db"]


@pytest.mark.root
@pytest.mark.parametrize("reserve", [0, 1, 2, 4, 8])
def test_disk_that_fills_up_at_any_point(tree: Path, small_disk: Path, reserve: int) -> None:
    """However few pages are left: the new index, or none."""
    index = small_disk / "index.db"
    (small_disk / "ballast").write_bytes(bytes((192 - 4 * reserve) * 1024))
    try:
        TapeRecorder(tree, index).commit()
    except OSError as error:
        assert error.errno == ENOSPC
        assert os.listdir(small_disk) == ["ballast"]
    else:
        assert reserve > 1
        assert played(tree, index) == whole(tree)


@pytest.mark.root
def test_read_only_file_system(tree: Path, tmp_path: Path) -> None:
    """A tape on one plays; a folder on one is recorded with the index elsewhere, and refused without."""
    TapeRecorder(tree).commit()
    seen = tmp_path / "read-only"
    seen.mkdir()
    (tmp_path / "other" / "data").mkdir(parents=True)
    (tmp_path / "other" / "data" / "file").write_bytes(b"1")
    subprocess.run(["mount", "--bind", tmp_path, seen], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", seen], check=True)
        assert played(seen / "data") == whole(tree)
        bare = seen / "other" / "data"
        with pytest.raises(OSError, match="Read-only"):
            TapeRecorder(bare).commit()
        TapeRecorder(bare, tmp_path / "index.db").commit()
        assert played(bare, tmp_path / "index.db") == whole(bare)
    finally:
        subprocess.run(["umount", seen], check=True)
    assert os.listdir(tmp_path / "other" / "data") == ["file"]


# Memory


def recording_peak(root: Path) -> int:
    """The most memory, in bytes, that recording `root` had allocated at once."""
    TapeRecorder(root, overwrite=True).commit()  # what is loaded once is not counted
    tracemalloc.start()
    try:
        TapeRecorder(root, overwrite=True).commit()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_tree(tmp_path: Path) -> None:
    """Bounded by the deepest path and the largest folder: ten times the folders need not ten times the memory."""
    peaks = []
    for name, folders in (("small", 20), ("large", 200)):
        for folder in range(folders):
            (tmp_path / name / f"{folder}").mkdir(parents=True)
            for number in range(100):
                os.mknod(tmp_path / name / f"{folder}" / f"{number}")
        time.sleep(0.05)  # until the last of them is not fresh any more
        peaks.append(recording_peak(tmp_path / name))
    assert peaks[1] < peaks[0] + 1_000_000  # 18,000 more members at 56 bytes would be more
    assert peaks[1] < 4_000_000


def test_lock_is_held_as_long_as_it_records(tree: Path) -> None:
    """The file is locked as long as the recorder is at work, by `flock`."""
    locked = []

    def is_locked(path: str) -> bool:
        with open(tree / ".tartape" / "index.db.lock", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked.append(False)
            except BlockingIOError:
                locked.append(True)
        return False

    TapeRecorder(tree, exclude=is_locked).commit()
    assert locked
    assert all(locked)


def test_old_tape_stays_open_while_a_new_one_is_recorded(tree: Path) -> None:
    """A tape that is open goes on reading its own index, which the new one replaced but did not change."""
    TapeRecorder(tree).commit()
    with Tape.discover(tree) as tape:
        members = list(tape.members())
        (tree / "one more").write_bytes(b"")
        TapeRecorder(tree, overwrite=True).commit()
        assert [tape.member_at(member.start) for member in members] == members
        assert tape.rows_are_sound()
    with Tape.discover(tree) as tape:
        assert tape.member_count == len(members) + 1


def test_index_that_grew_into_a_bad_one_is_not_kept_in_time(tree: Path) -> None:
    """The time of recording is taken over from a good index only."""
    TapeRecorder(tree).commit()
    index = tree / ".tartape" / "index.db"
    data = bytearray(index.read_bytes())
    data[-100:] = bytes(100)
    data[100:200] = bytes(100)
    index.write_bytes(data)
    with pytest.raises(TapeFormatError):
        played(tree)
    before = time.time_ns()
    TapeRecorder(tree, overwrite=True).commit()
    with Tape.discover(tree) as tape:
        assert tape.recorded_ns >= before


@pytest.mark.root
@pytest.mark.needs("mkfs.btrfs", "btrfs")
def test_a_snapshot_that_holds_no_subvolume(tmp_path: Path) -> None:
    """What btrfs shows in its place is never at rest: it is named, with the way out; without it all is recorded."""
    index = tmp_path / "index.db"
    with loop("btrfs", tmp_path) as disk:
        for made in ("data", "data/nested", "data/deep/nested"):
            (disk / made).parent.mkdir(exist_ok=True)
            subprocess.run(["btrfs", "subvolume", "create", disk / made], check=True, capture_output=True)
        (disk / "data" / "file").write_bytes(b"x" * 600)
        made = ["btrfs", "subvolume", "snapshot", "-r", disk / "data", disk / "snapshot"]
        subprocess.run(made, check=True, capture_output=True)
        with pytest.raises(TapeConstraintError) as caught:
            TapeRecorder(disk / "snapshot", index).commit()
        assert [problem.path for problem in caught.value.problems] == ["deep/nested", "nested"]
        assert all("subvolume" in str(problem) and "--exclude" in str(problem) for problem in caught.value.problems)
        assert not index.exists()
        TapeRecorder(disk / "snapshot", index, exclude="nested").commit()
        expected = Reference(disk / "snapshot", (b"nested", b"deep/nested"))
        with Tape.discover(disk / "snapshot", index) as tape, closing(TapePlayer(tape)) as player:
            assert player.read(0, tape.total_size) == expected.read(0, expected.size)
        TapeRecorder(disk / "data", index, overwrite=True).commit()  # where it is whole


@pytest.mark.root
@pytest.mark.parametrize("kind", ["proc", "sysfs", "cgroup2"])
def test_what_the_kernel_makes_up(tmp_path: Path, kind: str) -> None:
    """Is refused in one line, wherever it is mounted, unless it is excluded."""
    root, index = tmp_path / "data", tmp_path / "index.db"
    (root / "a" / "mounted").mkdir(parents=True)
    (root / "b").touch()
    with mounted("-t", kind, kind, root / "a" / "mounted"):
        for folder, path in ((root, "a/mounted"), (root / "a" / "mounted", ".")):
            with pytest.raises(TapeConstraintError) as caught:
                TapeRecorder(folder, index).commit()
            assert [problem.path for problem in caught.value.problems] == [path]
            assert kind in str(caught.value) and "--exclude" in str(caught.value)
        TapeRecorder(root, index, exclude="/a/mounted").commit()
    with Tape.discover(root, index) as tape:
        assert [member.path for member in tape.members()] == [b"", b"a", b"b"]
