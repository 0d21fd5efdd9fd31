"""Files that commands write: names, temporary names, what is replaced, and what is refused."""

import errno
import os
import stat
from pathlib import Path

import pytest

from tartapefs import OutputBusyError, OutputError
from tartapefs.base import outputs


def test_unfinished(tmp_path: Path) -> None:
    """It gets its name when it is committed or not at all, and replaces no file unasked."""
    target = os.fspath(tmp_path / "file")
    with outputs.Unfinished(target) as one, outputs.Unfinished(target) as other:
        assert one.temporary != other.temporary
        os.write(one.fd, b"1")
        os.write(other.fd, b"2")
        one.commit(replace=False)
        with pytest.raises(FileExistsError):
            other.commit(replace=False)
    assert Path(target).read_bytes() == b"1" and os.listdir(tmp_path) == ["file"]
    with outputs.Unfinished(target) as one:
        os.write(one.fd, b"3")
        one.commit(replace=True)
    assert Path(target).read_bytes() == b"3" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError) as caught:
        outputs.Unfinished(os.fspath(tmp_path / "nowhere" / "file"))
    assert caught.value.filename == os.fspath(tmp_path / "nowhere" / "file")


def test_an_unfinished_file_is_resumed_by_its_token(tmp_path: Path) -> None:
    """Or removed, if the next run does not resume. Other unfinished files stay."""
    target = os.fspath(tmp_path / "file")
    first = outputs.Unfinished(target, "0" * 16)
    os.write(first.fd, b"half")
    first.close()
    first.discard()  # is closed: stays
    other = outputs.Unfinished(target, "1" * 16)
    other.close()
    with outputs.Unfinished(target, "0" * 16, resume=True) as resumed:
        assert os.read(resumed.fd, 10) == b"half"
        resumed.close()
    with outputs.Unfinished(target, "0" * 16) as anew:
        assert os.read(anew.fd, 10) == b""
    assert os.listdir(tmp_path) == ["file." + "1" * 16 + ".part"]


def test_permissions_are_those_of_the_replaced_file(tmp_path: Path) -> None:
    (tmp_path / "old").touch(mode=0o640)
    (tmp_path / "old").chmod(0o640)
    for name, mode, expected in (("old", None, 0o640), ("new", 0o600, 0o600)):
        with outputs.Unfinished(os.fspath(tmp_path / name), mode=mode) as file:
            assert stat.S_IMODE(os.fstat(file.fd).st_mode) == expected
            file.commit(replace=True)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected


def test_a_long_name_leaves_room_for_the_token(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 255)
    with outputs.Unfinished(os.fspath(target)) as file:
        file.commit(replace=False)
    assert target.exists()


def test_an_existing_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "file")
    assert outputs.refuse_existing(path, force=False) is None
    os.close(outputs.create(path))
    assert outputs.refuse_existing(path, force=False) == 0
    os.close(outputs.create(path))  # is empty
    Path(path).write_bytes(b"mine")
    assert outputs.refuse_existing(path, force=True) == 4
    for refused in (lambda: outputs.refuse_existing(path, force=False), lambda: outputs.create(path)):
        with pytest.raises(OutputError, match='is there already; "--force" replaces it'):
            refused()
    assert Path(path).read_bytes() == b"mine"


def test_links_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(OutputError, match=r"is a symbolic link; name what it leads to: .*/nothing"):
        outputs.refuse_existing(os.fspath(tmp_path / "link"), force=True)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        outputs.create(os.fspath(tmp_path / "link"))
    with pytest.raises(OutputError, match="is a symbolic link"):
        outputs.open_existing(os.fspath(tmp_path / "link"), create=True)
    with pytest.raises(OutputError, match="is not a regular file"):
        outputs.refuse_existing(os.fspath(tmp_path), force=True)
    assert os.listdir(tmp_path) == ["link"]


def test_a_file_is_continued_as_it_is(tmp_path: Path) -> None:
    """Also by a link to it."""
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        outputs.open_existing(os.fspath(path))
    os.close(outputs.open_existing(os.fspath(path), create=True))
    path.write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    fd = outputs.open_existing(os.fspath(tmp_path / "link"))
    try:
        assert os.read(fd, 10) == b"content"
    finally:
        os.close(fd)


def test_a_file_is_removed_only_if_it_is_still_ours(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "file")
    fd = outputs.create(path)
    try:
        os.rename(path, path + ".moved")
        outputs.remove(path, fd)
        Path(path).write_bytes(b"another")
        outputs.remove(path, fd)
        assert Path(path).read_bytes() == b"another"
        os.rename(path + ".moved", path)
        outputs.remove(path, fd)
        assert os.listdir(tmp_path) == []
    finally:
        os.close(fd)


def test_one_process_at_a_time_has_the_lock(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "file")
    first = outputs.create(path)
    second = outputs.create(path)
    outputs.lock(first, path)
    with pytest.raises(OutputBusyError, match="is being written by another program"):
        outputs.lock(second, path)
    os.close(first)
    outputs.lock(second, path)
    os.close(second)


def test_devices_and_descriptors_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert outputs.open_device(os.fspath(tmp_path / "file")) is None
    assert outputs.open_device(os.fspath(tmp_path / "nothing")) is None
    with pytest.raises(IsADirectoryError):
        outputs.open_device(os.fspath(tmp_path))
    reading, writing = os.pipe()
    try:
        for name in (f"/dev/fd/{writing}", f"/proc/self/fd/{writing}"):
            fd = outputs.open_device(name)
            assert fd is not None and os.path.samestat(os.fstat(fd), os.fstat(writing))
            os.close(fd)
        fd = outputs.open_device("/dev/null")
        assert fd is not None and stat.S_ISCHR(os.fstat(fd).st_mode)
        os.close(fd)
    finally:
        os.close(reading)
        os.close(writing)
