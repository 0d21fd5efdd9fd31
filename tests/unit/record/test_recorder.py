"""The recorder: options, indexes, and the archive as a whole; what cannot be recorded is named all at once."""

import os
import shutil
import subprocess
import tempfile
import time
import tracemalloc
from errno import EEXIST
from pathlib import Path

import pytest
from support.recordings import assert_recorded, fingerprint_of, nothing_written, played, whole
from support.reference import Reference

from tartapefs import (
    Tape,
    TapeConstraintError,
    TapeExistsError,
    TapeFormatError,
    TapePlayer,
    TapeRecorder,
)


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


# What ends a recording


def test_function_that_raises(tree: Path) -> None:
    """Its own error comes through, and nothing is written."""
    mtime_ns = tree.stat().st_mtime_ns
    with pytest.raises(ZeroDivisionError):
        TapeRecorder(tree, exclude=lambda path: bool(1 / 0)).commit()
    nothing_written(tree, mtime_ns)


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


# Memory


def recording_peak(root: Path) -> int:
    """The most memory, in bytes, that recording `root` had allocated at once."""
    tracemalloc.start()
    try:
        TapeRecorder(root).commit()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_tree(tmp_path: Path) -> None:
    """Bounded by the deepest path and the largest folder: five times the folders need no more memory."""
    (tmp_path / "none").mkdir()
    recording_peak(tmp_path / "none")  # what is loaded once is not counted
    peaks = []
    for name, folders in (("small", 10), ("large", 50)):
        for folder in range(folders):
            (tmp_path / name / f"{folder}").mkdir(parents=True)
            for number in range(100):
                os.mknod(tmp_path / name / f"{folder}" / f"{number}")
        time.sleep(0.05)  # until the last of them is not fresh any more
        peaks.append(recording_peak(tmp_path / name))
    assert peaks[1] < peaks[0] + 200_000  # 4,000 more members at 56 bytes would be more
    assert peaks[1] < 4_000_000


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
