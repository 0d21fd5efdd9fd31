"""The folder for the index within the recorded one."""

import os
import shutil
from pathlib import Path

import pytest
from support.recordings import nothing_written, played, whole
from support.users import as_nobody, give_to_nobody

from tartapefs import (
    TapeIntegrityError,
    TapeRecorder,
)


def test_root_mtime_is_left_as_found(tree: Path) -> None:
    """The first time, when the folder for the index is made, and each time after."""
    os.utime(tree, ns=(123, 1_234_567_890_123_456_789))
    fingerprints = {TapeRecorder(tree, overwrite=True).commit() for _ in range(3)}
    assert len(fingerprints) == 1
    assert tree.stat().st_mtime_ns == 1_234_567_890_123_456_789


def test_tape_folder_that_is_a_link_is_not_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tree / ".tartape").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError):
        TapeRecorder(tree).commit()
    assert os.listdir(tmp_path / "elsewhere") == []


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


def test_index_folder_taken_away_meanwhile(tree: Path) -> None:
    """Whoever removes the unfinished index gets an error, not half a tape."""

    def meanwhile(path: str) -> bool:
        shutil.rmtree(tree / ".tartape", ignore_errors=True)
        return False

    with pytest.raises((OSError, TapeIntegrityError)):
        TapeRecorder(tree, exclude=meanwhile).commit()
    assert not os.path.lexists(tree / ".tartape" / "index.db")
