"""What is served of a source that drifts, or that cannot be read: the recorded bytes, or an error."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from support.changes import (
    Change,
    add_file,
    append,
    chmod,
    chmod_and_back,
    chown,
    empty,
    overwrite,
    overwrite_keeping_times,
    remove,
    rename,
    replace,
    replace_by_copy,
    replace_by_copy_keeping_folder_times,
    replace_by_copy_of_folder,
    replace_by_file,
    replace_by_folder,
    replace_by_link,
    replace_by_link_to_a_copy,
    replace_by_pipe,
    replace_by_socket,
    replace_folder_by_link,
    replace_folder_by_link_to_a_copy,
    retarget,
    retarget_keeping_times,
    shrink,
    touch,
    touch_by_a_nanosecond,
)
from support.daemon import open_in
from support.filesystems import is_on_a_local_disk
from support.recordings import whole
from support.trees import pattern

from tartapefs import Tape, TapeError, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.play import assemble


def of_parent(change: Change) -> Change:
    """The change to the folder of the path."""

    def changed(path: Path) -> None:
        change(path.parent)

    changed.__name__ = f"parent_{change.__name__}"
    return changed


def of_root(change: Change) -> Change:
    """The change to the root, the folder above that of the path."""

    def changed(path: Path) -> None:
        change(path.parents[1])

    changed.__name__ = f"root_{change.__name__}"
    return changed


def move_beside(path: Path) -> None:
    path.rename(path.with_name("moved"))


replace_parent_by_link_to_a_copy = of_parent(replace_folder_by_link_to_a_copy)


move_root = of_root(move_beside)


FILE_CHANGES: dict[Change, str] = {  # and what the message must say of it
    append: "size",
    shrink: "size",
    empty: "size",
    touch: "mtime",
    touch_by_a_nanosecond: "mtime",
    chmod: "mode",
    chmod_and_back: "ctime",
    chown: "ctime",
    overwrite: "mtime",
    overwrite_keeping_times: "ctime",
    replace: "inode",
    replace_by_copy: "inode",
    replace_by_copy_keeping_folder_times: "inode",
    remove: "gone since recording",
    rename: "gone since recording",
    replace_by_link: "symbolic link",
    replace_by_link_to_a_copy: "symbolic link",
    replace_by_folder: "directory",
    replace_by_pipe: "pipe",
    replace_by_socket: "socket",
    of_parent(replace_folder_by_link): "path",
    replace_parent_by_link_to_a_copy: "",
    of_parent(replace_by_link): "path",
    of_parent(replace_by_file): "gone since recording",
    of_parent(remove): "gone since recording",
    move_root: "moved",
    of_root(replace_by_copy_of_folder): "moved",
    of_root(replace_by_link): "moved",
}


def assert_invalid(player: TapePlayer, size: int) -> None:
    """Each read of whatever place fails, by whatever way it is asked for, with the same words."""
    message = str(player.drift)
    for offset in (0, 600, size // 2, size - 1024, size - 1):
        with pytest.raises(TapeIntegrityError) as caught:
            player.read(offset, 1)
        assert str(caught.value) == message
        with pytest.raises(TapeIntegrityError):
            player.readinto(bytearray(10), offset)
        with pytest.raises(TapeIntegrityError):
            for _ in player.play(offset):
                pass


def assert_drift(player: TapePlayer, offset: int, size: int, member: str, says: str) -> None:
    """A read there raises; the line tells member, what was recorded, what was found and what to do; and it stays so."""
    assert player.drift is None
    with pytest.raises(TapeIntegrityError) as caught:
        player.read(offset, size)
    error = caught.value
    line = str(error)
    assert error.member == member
    assert line.startswith(f"{member}: ")
    assert says in line
    assert error.differences
    for difference in error.differences:
        if difference.found == "nothing":
            assert f"gone since recording (recorded {difference.recorded})" in line
        else:
            assert f"(recorded {difference.recorded}, found {difference.found})" in line
            assert difference.what in line
        assert difference.recorded != difference.found
    assert "tartapefs record --force" in line
    assert "\n" not in line
    assert isinstance(error, RuntimeError)
    assert player.drift is not None
    assert_invalid(player, player.tape.total_size)


@pytest.mark.long(but=70)
@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("part", ["body", "end of the body", "all", "two files at once", "kept open"])
@pytest.mark.parametrize("change", FILE_CHANGES, ids=lambda change: change.__name__)
def test_drift_of_a_file(tmp_path: Path, change: Change, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a file, or the way to it, is changed: its bytes are not served, and from then on nothing is."""
    if part == "kept open":
        monkeypatch.setattr(assemble, "LARGE", 3000)
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (root / "folder" / name).write_bytes(pattern(3000))
    (root / "z").write_bytes(pattern(600))
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        player = TapePlayer(tape)
        before = whole(root)
        a, b = tape.find("data/folder/a"), tape.find("data/folder/b")
        offset, size = {
            "body": (b.start + 512 + 1000, 100),
            "end of the body": (b.start + 512 + 2999, 1),
            "all": (b.start, b.stop - b.start),
            "two files at once": (a.start + 600, 3000 + 1024),
            "kept open": (b.start + 512 + 1, 1000),
        }[part]
        if part == "two files at once":  # the first one is as recorded unless the folder is not
            member = "data/folder/a" if change.__name__.startswith("parent") else "data/folder/b"
        else:
            member = "data/folder/b"
        assert player.read(offset, size) == before[offset : offset + size]
        is_kept = part == "kept open" and is_on_a_local_disk(root)
        assert open_in(root) == ([f"{root}/folder/b"] if is_kept else [])
        change(root / "folder" / "b")
        if change.__name__.startswith("root"):
            member = "data"
        assert_drift(player, offset, size, member, FILE_CHANGES[change])
        player.close()


@pytest.mark.parametrize(
    "change",
    [append, touch, chmod, chmod_and_back, replace_by_copy, remove, replace_by_link, move_root],
    ids=lambda change: change.__name__,
)
def test_drift_shows_at_the_header(player: TapePlayer, small: Path, change: Change) -> None:
    """A header is not served either once the file is not the recorded one."""
    member = player.tape.find("data/photos/512")
    change(small / "photos" / "512")
    name = "data" if change is move_root else member.arc_path
    assert_drift(player, member.start + 100, 1, name, FILE_CHANGES[change])


@pytest.mark.parametrize("change", [touch, remove, chmod, append], ids=lambda change: change.__name__)
def test_drift_of_an_empty_file(player: TapePlayer, small: Path, change: Change) -> None:
    member = player.tape.find("data/photos/0")
    change(small / "photos" / "0")
    assert_drift(player, member.start, 512, member.arc_path, FILE_CHANGES[change])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("photos", add_file, "mtime"),
        ("photos", chmod, "mode"),
        ("photos", remove, "gone since recording"),
        ("photos/2024", add_file, "mtime"),
        ("empty folder", add_file, "mtime"),
        ("", add_file, "mtime"),
        ("", chmod, "mode"),
        ("link", retarget, "target"),
        ("link", retarget_keeping_times, "target"),
        ("link", replace_by_file, "regular file"),
        ("link", remove, "gone since recording"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_drift_of_folders_and_links(player: TapePlayer, small: Path, name: str, change: Change, says: str) -> None:
    """What has no body is judged where its header is served."""
    change(small / name)
    member = player.tape.find(f"data/{name}")
    assert_drift(player, member.start, 512, member.arc_path, says)


def test_change_back_is_drift_too(player: TapePlayer, small: Path) -> None:
    """A file that was renamed and renamed back is not the recorded one any more: it may have had visitors."""
    (small / "photos" / "512").rename(small / "away")
    (small / "away").rename(small / "photos" / "512")
    with pytest.raises(TapeIntegrityError):
        player.read(0, player.tape.total_size)


def test_root_that_was_away(player: TapePlayer, small: Path) -> None:
    """The failure is for good: the folder's return does not make the tape valid again; a new player may try."""
    small.rename(small.with_name("moved"))
    with pytest.raises(TapeIntegrityError):
        player.read(0, 10)
    small.with_name("moved").rename(small)
    assert_invalid(player, player.tape.total_size)
    again = TapePlayer(player.tape)
    assert again.drift is None
    again.close()


def test_drift_elsewhere_is_not_met(player: TapePlayer, small: Path, archive: bytes) -> None:
    """A read is judged by the members that it touches."""
    append(small / "z")
    z = player.tape.find("data/z")
    assert player.read(0, z.start) == archive[: z.start]
    with pytest.raises(TapeIntegrityError):
        player.read(0, z.start + 1)


def test_padding_is_checked(player: TapePlayer, small: Path) -> None:
    """Bytes that are always zero are those of a member nevertheless."""
    append(small / "photos" / "1")
    member = player.tape.find("data/photos/1")
    with pytest.raises(TapeIntegrityError):
        player.read(member.stop - 1, 1)


def test_drift_message_of_odd_names(tmp_path: Path) -> None:
    """One line that hides nothing, whatever the name."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "line\nbreak\x1b[31m\udcff").write_bytes(b"12")
    TapeRecorder(root).commit()
    (root / "line\nbreak\x1b[31m\udcff").write_bytes(b"123")
    with Tape.discover(root) as tape:
        player = TapePlayer(tape)
        with pytest.raises(TapeIntegrityError) as caught:
            player.read(600, 400)
        player.close()
    assert str(caught.value).isprintable()
    assert r"line\nbreak\x1b[31m\xff" in str(caught.value)
    assert "recorded 2, found 3" in str(caught.value)


@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.ESTALE])
def test_error_of_the_disk_is_not_drift(
    player: TapePlayer, archive: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It comes through as it is, says nothing of the tape, and the next read is served."""
    preadv, failures = os.preadv, [number]

    def failing(*arguments: object) -> int:
        if failures:
            raise OSError(failures.pop(), os.strerror(number))
        return preadv(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        player.read(0, len(archive))
    assert not isinstance(caught.value, TapeError)
    assert caught.value.errno == number
    assert player.drift is None
    assert player.read(0, len(archive)) == archive


def test_error_while_the_file_drifts(player: TapePlayer, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file is not as recorded, that is what is said."""

    def failing(*arguments: object) -> int:
        append(small / "z")
        raise OSError(errno.EIO, "the disk")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(TapeIntegrityError, match="data/z"):
        player.read(player.get_offset_of("data/z") + 512, 100)


@pytest.mark.parametrize("most", [1, 7, 511, 512])
def test_short_answers_of_the_system(
    player: TapePlayer, archive: bytes, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """What one system call gave in part is completed, in the right places."""
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert player.read(0, len(archive)) == archive
    assert player.read(700, 5000) == archive[700:5700]


def test_file_that_ends_early(player: TapePlayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that gives no more bytes of a file of the recorded size makes an error, never a short read."""
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    with pytest.raises(OSError, match="ended early") as caught:
        player.read(player.get_offset_of("data/z") + 512, 100)
    assert caught.value.errno == errno.EIO
    assert player.drift is None


@pytest.mark.usefixtures("way_to_open")
def test_too_few_descriptors(player: TapePlayer, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of descriptors is an error of this moment, not of the tape."""
    opening, failures = os.open, [True]

    def failing(*arguments: object, **options: object) -> int:
        if failures:
            failures.pop()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opening(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", failing)
    try:
        assert player.read(0, len(archive)) == archive  # by a system call that is not `os.open`
    except OSError as error:
        assert error.errno == errno.EMFILE
    failures.clear()
    assert player.drift is None
    assert player.read(0, len(archive)) == archive


@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("change", FILE_CHANGES, ids=lambda change: change.__name__)
def test_no_file_stays_open_after_drift(tmp_path: Path, change: Change) -> None:
    """A read that fails closes what it opened."""
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (root / "folder" / name).write_bytes(pattern(3000))
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        player = TapePlayer(tape)
        change(root / "folder" / "b")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(TapeIntegrityError):
            player.read(0, tape.total_size)
        assert len(os.listdir("/proc/self/fd")) == before
        player.close()


@pytest.mark.usefixtures("way_to_open")
@pytest.mark.parametrize("change", [replace_by_link_to_a_copy, replace_parent_by_link_to_a_copy, replace_by_pipe],
                         ids=lambda change: change.__name__)  # fmt: skip
def test_no_link_is_followed_in_a_copy(small: Path, tmp_path: Path, change: Change) -> None:
    """Nor where no inode tells the difference."""
    copy = tmp_path / "elsewhere" / "data"
    copy.parent.mkdir()
    subprocess.run(["cp", "-a", small, copy], check=True)
    with Tape.discover(copy) as tape:
        player = TapePlayer(tape)
        change(copy / "photos" / "513")
        with pytest.raises(TapeIntegrityError):
            player.read(tape.find("data/photos/513").start + 512, 100)
        player.close()
