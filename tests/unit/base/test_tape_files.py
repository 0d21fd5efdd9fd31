"""Files of a tape: no output may be one of them, by whatever path it is reached.

The same for each command, with bind mounts, is in tests/system/test_outputs.py.
"""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tartapefs import OutputError, TapeRecorder
from tartapefs.base.tape_files import (
    TAPE_FOLDER,
    TapeFiles,
    default_index,
    has_index_mark,
    is_index,
    refuse_below,
    refuse_part,
)


@pytest.fixture
def tape(tmp_path: Path) -> TapeFiles:
    """A recorded folder with two files, one of which has a hard link outside."""
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (root / "alone").write_bytes(b"content")
    (root / "sub" / "file").write_bytes(b"content")
    os.link(root / "sub" / "file", tmp_path / "hard link")
    TapeRecorder(root).commit()
    file = os.stat(root / "sub" / "file")
    return TapeFiles(os.fspath(root), default_index(os.fspath(root)), lambda found: os.path.samestat(found, file))


def below(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sub" / "new"


def source_file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "alone"


def by_a_link_to_its_folder(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to("data/sub")
    return tmp_path / "link" / "new"


def the_index(tmp_path: Path) -> Path:
    return tmp_path / "data" / ".tartape" / "index.db"


def beside_the_index(tmp_path: Path) -> Path:
    return tmp_path / "data" / ".tartape" / "new"


def copy_of_the_index(tmp_path: Path) -> Path:
    (tmp_path / "copy").write_bytes(the_index(tmp_path).read_bytes())
    return tmp_path / "copy"


def hard_link(tmp_path: Path) -> Path:
    return tmp_path / "hard link"


def in_another_tape(tmp_path: Path) -> Path:
    (tmp_path / "other" / "sub").mkdir(parents=True)
    TapeRecorder(tmp_path / "other").commit()
    return tmp_path / "other" / "sub" / "new"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (below, "the folder of the tape, and would change it"),
        (source_file, "the folder of the tape, and would change it"),
        (by_a_link_to_its_folder, "the folder of the tape, and would change it"),
        (the_index, "is the index of a tape"),
        (beside_the_index, "the folder of the tape, and would change it"),
        (copy_of_the_index, "is the index of a tape"),
        (hard_link, "is a file of .*/data, by another name"),
        (in_another_tape, "which is recorded, and would change it"),
    ],
)
def test_a_part_of_a_tape_is_refused(
    tape: TapeFiles, tmp_path: Path, output: Callable[[Path], Path], reason: str
) -> None:
    with pytest.raises(OutputError, match=reason):
        refuse_part(os.fspath(output(tmp_path)), tape)


def test_other_files_are_not_refused(tape: TapeFiles, tmp_path: Path) -> None:
    (tmp_path / "free").mkdir()
    (tmp_path / "free" / "old").write_bytes(b"x")
    os.link(tmp_path / "free" / "old", tmp_path / "free" / "its link")
    for name in ("old", "its link", "new"):
        refuse_part(os.fspath(tmp_path / "free" / name), tape)
    with pytest.raises(FileNotFoundError) as caught:
        refuse_part(os.fspath(tmp_path / "nowhere" / "new"), tape)
    assert caught.value.filename == os.fspath(tmp_path / "nowhere" / "new")


def test_the_folder_for_the_index_may_hold_other_indexes(tape: TapeFiles, tmp_path: Path) -> None:
    """But no folder below the source may, nor one of the same name deeper."""
    refuse_below(os.fspath(beside_the_index(tmp_path)), tape, in_tape_folder=True)
    deeper = tmp_path / "data" / "sub" / os.fsdecode(TAPE_FOLDER)
    deeper.mkdir()
    for output in (below(tmp_path), deeper / "new"):
        with pytest.raises(OutputError):
            refuse_below(os.fspath(output), tape, in_tape_folder=True)


def test_an_index_is_known_by_its_mark(tape: TapeFiles, tmp_path: Path) -> None:
    """Damaged or not; a link to one, another database, and a folder are none."""
    head = Path(tape.index).read_bytes()[:100]
    (tmp_path / "damaged").write_bytes(head)
    (tmp_path / "short").write_bytes(head[:71])
    (tmp_path / "link").symlink_to(tape.index)
    with closing(sqlite3.connect(tmp_path / "other")) as db:
        db.execute("CREATE TABLE t (x)")
    assert has_index_mark(head) and is_index(tape.index)
    names = ("damaged", "short", "link", "other", "data", "nothing")
    assert [name for name in names if is_index(os.fspath(tmp_path / name))] == ["damaged"]
