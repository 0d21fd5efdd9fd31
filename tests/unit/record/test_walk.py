"""The walk of real folders: the archive is the expected one to the byte, or the error names all that is in the way."""

import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.changes import (
    add_beside,
    append,
    overwrite,
    remove,
    replace_by_file,
    replace_by_folder,
    replace_by_link,
    replace_by_pipe,
)
from support.filesystems import loop, mounted
from support.recordings import assert_recorded, fingerprint_of, nothing_written, played, whole
from support.reference import Reference, gnu_tar
from support.trees import TREES
from support.users import as_nobody, give_to_nobody

from tartapefs import (
    SourceUnreadableError,
    Tape,
    TapeConstraintError,
    TapeIntegrityError,
    TapePlayer,
    TapeRecorder,
)

GIB = 1 << 30


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


# An unprivileged user


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


# A folder that changes while it is recorded


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
    monkeypatch.setattr("tartapefs.record.settling.Settling.check", lambda self, members: None)  # it was before
    inside = at_rest / "m" / "a"
    inside.write_bytes(b"written a moment ago")
    error = changed_while_recorded(at_rest, trigger, lambda: change(at_rest / victim))
    assert "record again" in str(error)


def test_change_of_what_was_scanned_long_ago(at_rest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not seen by the recorder, which looks once at what is at rest; seen by the first read."""
    monkeypatch.setattr("tartapefs.record.settling._RECENT_NS", 0)
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
