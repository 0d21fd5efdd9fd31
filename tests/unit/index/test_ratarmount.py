"""The index for ratarmount is the one that ratarmount itself makes, and ratarmount opens members by it."""

import io
import json
import os
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ratarmountcore.mountsource.formats.tar import SQLiteIndexedTar
from support.command_line import grow
from support.generations import Generations
from support.long_names import fill
from support.pack_trees import deep
from support.recordings import bodies, whole
from support.reference import Reference
from support.seals import seal_again

from tartapefs import Tape, TapeError, TapeRecorder
from tartapefs.archive.member import Member
from tartapefs.base.outputs import Unfinished
from tartapefs.index import ratarmount

TABLES = ("files", "xattrkeys", "xattrsdata", "xattrs")
EXPECTED_TO_DIFFER = ("tarstats", "tartapefs.fingerprint", "tartapefs.seal")


@pytest.fixture(autouse=True)
def without_index_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ratarmount finds and leaves no index in the user's own folders."""
    monkeypatch.setenv("HOME", os.fspath(tmp_path))


def export(root: Path, output: Path) -> Path:
    with Tape.discover(root) as tape, Unfinished(os.fspath(output)) as unfinished:
        ratarmount.write(tape, unfinished, lambda count, position: None)
        unfinished.commit(replace=False)
    return output


def theirs(archive: Path, output: Path) -> Path:
    """The index that ratarmount makes of an archive."""
    with SQLiteIndexedTar(os.fspath(archive), writeIndex=True, indexFilePath=os.fspath(output)):
        return output


def rows(index: Path, table: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(index)) as database:
        return sorted(database.execute(f"SELECT * FROM {table}"), key=repr)


def columns(index: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The columns of each table and view, with types, keys and whether they may be NULL."""
    with closing(sqlite3.connect(index)) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall()
        return {name: database.execute(f"PRAGMA table_info({name})").fetchall() for (name,) in names}


def odd(root: Path) -> bytes:
    """Every kind of member; names that are no UTF-8, or look like one of those; times before 1970."""
    grow(root)
    os.mkdir(os.fsencode(root) + b"/not \xff utf-8")
    for name in (b"\xfe", b"\xc3", b"\\xfe", "é".encode(), "\u2028".encode()):
        with open(os.fsencode(root) + b"/not \xff utf-8/" + name, "wb") as file:
            file.write(name)
    os.utime(root / "empty.txt", (0, -(10**9)))
    os.utime(root / "script.sh", ns=(0, 8**11 * 10**9 + 5))
    (root / "script.sh").chmod(0o6711)
    (root / "empty-folder").chmod(0o1777)
    TapeRecorder(root).commit()
    return whole(root)


def long_names(root: Path) -> bytes:
    root.mkdir()
    fill(root, 300, 7)
    TapeRecorder(root, long_names=True).commit()
    return whole(root)


def hard_links(root: Path) -> bytes:
    root.mkdir()
    deep(root)
    for number, path in enumerate(sorted(path for path in root.rglob("*") if path.is_file())[:30]):
        os.link(path, root / f"{number} {path.name}")
    TapeRecorder(root, hard_links=True).commit()
    return Reference(root, hard_links=True).read(0, 1 << 30)


def sealed(root: Path) -> bytes:
    root.mkdir()
    deep(root)
    TapeRecorder(root).commit()
    seal_again(root)
    return whole(root)


def generations(root: Path) -> bytes:
    """Folders whose headers are superseded, and one in a folder that a later generation has without its header."""
    root.mkdir()
    deep(root)
    made = Generations(root)
    made.append()
    TapeRecorder(root).commit()
    for number in range(2):
        (root / "a1" / f"new {number}").mkdir()
        (root / "a1" / f"new {number}" / "file").write_bytes(b"z" * 1000)
        os.utime(root / "a1", (0, 10**9 + number))
        made.append()
        TapeRecorder(root, append=True).commit()
    return made.archive


def owners(root: Path) -> bytes:
    grow(root)
    for number, path in enumerate(sorted(root.rglob("*"))):
        os.chown(path, 3 * number, 2**32 - 2 - number, follow_symlinks=False)
    TapeRecorder(root, anonymize=False).commit()
    command = ["tar", "--format=gnu", "--sort=name", "-b1", "--exclude=.tartape", "-cf", "-", root.name]
    return subprocess.run(command, cwd=root.parent, check=True, capture_output=True).stdout


TREES: list[Any] = [odd, long_names, hard_links, sealed, generations, pytest.param(owners, marks=pytest.mark.root)]


@pytest.mark.parametrize("tree", TREES)
def test_each_table_is_as_ratarmount_makes_it(tmp_path: Path, tree: Callable[[Path], bytes]) -> None:
    """The archive is made without the code under test."""
    archive = tmp_path / "archive.tar"
    archive.write_bytes(tree(tmp_path / "data"))
    expected, found = theirs(archive, tmp_path / "theirs"), export(tmp_path / "data", tmp_path / "ours")
    assert len(rows(found, "files")) > 20
    for table in TABLES:
        assert rows(found, table) == rows(expected, table)
    assert columns(found) == columns(expected)
    ours, its = dict(rows(found, "metadata")), dict(rows(expected, "metadata"))
    for key in EXPECTED_TO_DIFFER:
        ours.pop(key, None)
        its.pop(key, None)
    ours["arguments"], its["arguments"] = json.loads(ours["arguments"]), json.loads(its["arguments"])
    assert ours == its
    assert set(rows(found, "versions")) <= set(rows(expected, "versions"))


def test_which_tape_it_belongs_to(tmp_path: Path) -> None:
    """And what the archive's `stat` is where it is mounted: ratarmount compares the size and, if asked to, the time."""
    size = len(sealed(tmp_path / "data"))
    facts = dict(rows(export(tmp_path / "data", tmp_path / "ours"), "metadata"))
    with Tape.discover(tmp_path / "data") as tape:
        assert (facts["tartapefs.fingerprint"], facts["tartapefs.seal"]) == (tape.fingerprint, tape.seal)
        os.utime(tmp_path / "ours", ns=(0, tape.recorded_ns))
    found = os.stat(tmp_path / "ours")
    expected = {"st_mtime": found.st_mtime, "st_mtime_ns": found.st_mtime_ns, "st_size": size}
    assert json.loads(facts["tarstats"]) == expected


class Counted(io.FileIO):
    """A file that counts the bytes that are read of it."""

    count = 0

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer) or 0
        self.count += size
        return size


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[Counted]:
    (tmp_path / "archive.tar").write_bytes(long_names(tmp_path / "data"))
    with Counted(tmp_path / "archive.tar") as file:
        yield file


def test_ratarmount_reads_by_it(tmp_path: Path, counted: Counted, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes it as it is, reads next to nothing of the archive for that, and then gets every file."""
    index = export(tmp_path / "data", tmp_path / "ours")
    before = index.read_bytes()
    with SQLiteIndexedTar(
        os.fspath(tmp_path / "archive.tar"), io.BufferedReader(counted), indexFilePath=os.fspath(index), writeIndex=True
    ) as mounted:
        said = capsys.readouterr()
        assert "Successfully loaded offset dictionary" in said.out and "Creating" not in said.out
        assert counted.count < 100_000 < os.stat(counted.name).st_size
        for name, content in bodies(tmp_path / "data").items():
            found = mounted.lookup(f"/{name}")
            assert found is not None
            if content is not None:
                assert stat.S_ISREG(found.mode)
                with mounted.open(found) as file:
                    assert file.read() == content
    assert index.read_bytes() == before


MEMBER = Member(0, b"data/x", stat.S_IFREG | 0o644, 0, 0, 1, 0, b"", None)


def test_a_kind_that_it_does_not_know() -> None:
    """No row is better than a wrong one."""
    with pytest.raises(TapeError, match=r"^data/x: members of its kind cannot be exported"):
        ratarmount.row_of(MEMBER._replace(mode=stat.S_IFIFO | 0o644))
