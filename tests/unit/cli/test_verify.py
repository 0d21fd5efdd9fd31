"""`tartapefs verify` lists all drift, each difference once, and calls nothing drift that is none."""

import json
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from support.changes import (
    add_file,
    below,
    empty,
    overwrite,
    overwrite_keeping_times,
    remove,
    replace_by_copy,
    replace_by_file,
    replace_by_pipe,
    replace_folder_by_link,
    retarget,
    touch,
)
from support.packed import edit
from support.programs import done, quiet, refused, run
from support.users import give_to_nobody, tartapefs_as_nobody


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A recorded folder."""
    root = tmp_path / "data"
    (root / "folder" / "deep").mkdir(parents=True)
    for name in ("a", "b", "folder/c", "folder/deep/d", "folder/deep/z"):
        (root / name).write_bytes(name.encode() * 100)
    (root / "link").symlink_to("a")
    done(run("record", root))
    return root


def drift(root: Path, *options: object) -> dict[str, set[str]]:
    """What `verify` finds: for each member the facts that differ."""
    result = run("verify", root, "--json", *options)
    quiet(result)
    found = json.loads(result.stdout)
    assert result.returncode == (1 if found["drift"] else 0), result.stderr
    assert found["valid"] is (not found["drift"])
    members = [entry["member"] for entry in found["drift"]]
    assert len(set(members)) == len(members), "a member is listed twice"
    return {entry["member"]: {each["what"] for each in entry["differences"]} for entry in found["drift"]}


def test_a_folder_that_agrees(root: Path) -> None:
    """Exit 0, nothing on stdout, and the number of members as a message."""
    result = run("verify", root)
    assert done(result) == ""
    assert "as recorded: 9 members" in result.stderr and len(result.stderr.splitlines()) == 1
    assert json.loads(done(run("verify", root, "--json"))) == {
        "valid": True,
        "members": 9,
        "drift": [],
        "additions": [],
    }


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, set[str]]]] = {
    "written over": (below("b", overwrite), {"data/b": {"mtime"}}),
    "grown": (lambda root: (root / "b").write_bytes(bytes(1000)), {"data/b": {"size", "mtime"}}),
    "cut": (below("b", empty), {"data/b": {"size", "mtime"}}),
    "touched": (below("folder/c", touch), {"data/folder/c": {"mtime"}}),
    "set back by a nanosecond": (
        lambda root: os.utime(root / "b", ns=(0, (root / "b").stat().st_mtime_ns - 1)),
        {"data/b": {"mtime"}},
    ),
    "chmod of a file": (below("b", os.chmod, 0o640), {"data/b": {"mode"}}),
    "setuid": (below("b", os.chmod, 0o4644), {"data/b": {"mode"}}),
    "chmod of a folder": (below("folder", os.chmod, 0o700), {"data/folder": {"mode"}}),
    "chmod of the root": (lambda root: root.chmod(0o700), {"data": {"mode"}}),
    "deleted": (
        below("folder/deep/d", remove),
        {"data/folder/deep": {"mtime"}, "data/folder/deep/d": {"type"}},
    ),
    "a folder deleted": (
        below("folder/deep", remove),
        {"data/folder": {"mtime"}} | {f"data/folder/deep{name}": {"type"} for name in ("", "/d", "/z")},
    ),
    "added": (add_file, {"data": {"mtime"}, "data/new": {"type"}}),
    "added in a folder": (
        lambda root: (root / "folder" / "0").symlink_to("a"),
        {"data/folder": {"mtime"}, "data/folder/0": {"type"}},
    ),
    "a folder added": (
        lambda root: (root / "folder" / "new" / "below").mkdir(parents=True),
        {"data/folder": {"mtime"}, "data/folder/new": {"type"}},
    ),
    "renamed": (
        lambda root: (root / "b").rename(root / "x"),
        {"data": {"mtime"}, "data/b": {"type"}, "data/x": {"type"}},
    ),
    "a file for a folder": (
        below("folder", replace_by_file),
        {"data": {"mtime"}}
        | {f"data/folder{name}": {"type"} for name in ("", "/c", "/deep", "/deep/d", "/deep/z")},
    ),
    "a link for a folder": (
        below("folder", replace_folder_by_link),
        {"data": {"mtime"}}
        | {f"data/folder{name}": {"type"} for name in ("", "/c", "/deep", "/deep/d", "/deep/z")},
    ),
    "a pipe for a file": (
        below("b", replace_by_pipe),
        {"data": {"mtime"}, "data/b": {"type"}},
    ),
    "a pipe added": (lambda root: os.mkfifo(root / "pipe"), {}),
    "replaced by an equal file": (below("b", replace_by_copy), {"data": {"mtime"}, "data/b": {"inode"}}),
    "written over and the time set back": (
        below("b", overwrite_keeping_times),
        {"data/b": {"ctime"}},
    ),
}  # fmt: skip


@pytest.mark.long(but=8)
@pytest.mark.parametrize("change", CHANGES)
def test_each_kind_of_drift(root: Path, change: str) -> None:
    """The member, what differs of it, and nothing else but the folder that shows it."""
    make, expected = CHANGES[change]
    make(root)
    found = drift(root)
    if change == "a link for a folder":  # what lies behind it is as it was, but cannot be played
        assert found["data/folder"] == {"type"} and set(found) <= set(expected)
    else:
        assert found == expected


def test_a_link_that_leads_elsewhere(root: Path) -> None:
    retarget(root / "link", "b")
    found = drift(root)
    assert "data/link" in found and set(found) <= {"data", "data/link"}  # the new one may have the inode of the old
    assert {"target", "mtime"} <= found["data/link"] <= {"target", "mtime", "inode"}
    text = run("verify", root).stdout
    assert re.search(r"^data/link: target changed since recording \(recorded a, found b\)", text, re.MULTILINE)


def test_all_of_several_drifts_are_listed(root: Path) -> None:
    """One line each, in the archive's order, on stdout; the number as a message; exit 1."""
    (root / "a").unlink()
    (root / "b").chmod(0o600)
    (root / "folder" / "deep" / "d").write_bytes(b"short")
    (root / "folder" / "deep" / "new\nfile").touch()
    result = run("verify", root)
    quiet(result)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "data",
        "data/a",
        "data/b",
        "data/folder/deep",
        "data/folder/deep/new\\nfile",
        "data/folder/deep/d",
    ]
    assert "mode changed since recording (recorded 0644, found 0600)" in lines[2]
    assert "size changed since recording (recorded 1300, found 5)" in lines[5]
    assert "gone since recording (recorded regular file)" in lines[1]
    assert f'added since recording (found regular file); run "tartapefs record --append {root}"' in lines[4]
    assert all(f'run "tartapefs record --force {root}"' in line for line in lines[:4] + lines[5:])
    assert "6" in result.stderr and len(result.stderr.splitlines()) == 1
    facts = json.loads(run("verify", root, "--json").stdout)
    (b,) = (entry for entry in facts["drift"] if entry["member"] == "data/b")
    assert b["differences"] == [{"what": "mode", "recorded": "0644", "found": "0600"}]


def test_drift_and_back(root: Path) -> None:
    """`verify` keeps no state: recording again ends the drift."""
    (root / "new").touch()
    assert drift(root)
    done(run("record", "--force", root))
    assert drift(root) == {}


def test_what_was_excluded_is_not_called_added(root: Path) -> None:
    """Nor what may not be recorded at all; what no pattern names still is."""
    done(run("record", "--force", root, "--exclude", "*.log", "--exclude", "/cache/"))
    (root / "x.log").touch()
    (root / "folder" / "y.log").touch()
    (root / "cache").mkdir()
    (root / "folder" / "cache").mkdir()
    assert drift(root) == {"data/folder": {"mtime"}, "data/folder/cache": {"type"}}


def test_an_excluded_file_may_change(root: Path) -> None:
    (root / "folder" / "y.log").touch()
    done(run("record", "--force", root, "--exclude", "*.log"))
    (root / "folder" / "y.log").write_text("changed")
    assert drift(root) == {}


def test_reading_is_no_drift(root: Path) -> None:
    for path in root.rglob("*"):
        if stat.S_ISREG(path.lstat().st_mode):
            path.read_bytes()
    assert run("play", root, text=False, errors=None).returncode == 0
    assert drift(root) == {}


def test_a_copy_is_compared_by_all_but_inode_and_ctime(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "data"
    shutil.copytree(root, copy, symlinks=True)
    assert drift(copy) == {}
    overwrite_keeping_times(copy / "b")  # nothing that a copy can show
    (copy / "a").chmod(0o600)
    assert drift(copy) == {"data/a": {"mode"}}
    assert drift(copy, "--index", root / ".tartape" / "index.db") == {"data/a": {"mode"}}


@pytest.mark.root
def test_what_cannot_be_looked_at_does_not_end_the_list(root: Path, public: Path) -> None:
    """Drift before and after a folder that this user may not enter any more is listed too."""
    copy = public / "data"
    shutil.copytree(root, copy, symlinks=True)
    give_to_nobody(copy)
    done(tartapefs_as_nobody("record", "--force", copy))
    (copy / "a").chmod(0o600)
    (copy / "folder").chmod(0)
    (copy / "link").unlink()
    result = tartapefs_as_nobody("verify", copy)
    quiet(result)
    assert result.returncode == 1
    named = [line.partition(": ")[0] for line in result.stdout.splitlines()]
    assert {"data/a", "data/folder", "data/link"} <= set(named), result.stderr


@pytest.mark.long(but=3)
@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM pack WHERE start = (SELECT max(start) FROM pack)",
        "DELETE FROM pack WHERE start = (SELECT min(start) FROM pack WHERE start > 0)",
        "DELETE FROM pack WHERE start = 0",
        "DELETE FROM pack",
        "UPDATE pack SET start = start + 512 WHERE start = (SELECT max(start) FROM pack)",
        "UPDATE pack SET count = count + 1",
        "UPDATE pack SET folders = folders + 1",
        "UPDATE pack SET crc = crc + 1 WHERE start = (SELECT max(start) FROM pack)",
    ],
)
def test_missing_or_moved_rows_exit_3(root: Path, statement: str) -> None:
    for number in range(100):
        (root / f"file {number}").touch()
    done(run("record", "--force", root))
    with closing(sqlite3.connect(root / ".tartape" / "index.db")) as database, database:
        assert database.execute("SELECT count(*) FROM pack").fetchone()[0] > 3
        assert database.execute(statement).rowcount
    refused(run("verify", root), 3)


@pytest.mark.long(but=3)
@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM member WHERE number = (SELECT max(number) FROM member)",
        "DELETE FROM member WHERE number = 4",
        "DELETE FROM member",
        "UPDATE member SET mode = mode | 1 WHERE name = x'61'",
        "UPDATE member SET ino = ino + 1 WHERE name = x'61'",
        "UPDATE member SET name = x'62' WHERE name = x'61'",
        "INSERT INTO member SELECT 99, pack, folder, x'7a7a', mode, 0, mtime, mtime_nsec, ino, ctime, ctime_nsec,"
        " target, owner FROM member WHERE name = x'61'",
    ],
)
def test_members_missing_added_or_changed_exit_3(root: Path, statement: str) -> None:
    """In a row whose own checksum is right."""
    edit(root / ".tartape" / "index.db", statement)
    refused(run("verify", root), 3)


@pytest.mark.parametrize("name", [b"deep", b"link", b"folder"])
def test_a_damaged_row_exits_3(root: Path, name: bytes) -> None:
    """One wrong bit in a member's name is neither drift nor agreement."""
    index = root / ".tartape" / "index.db"
    content = bytearray(index.read_bytes())
    content[content.rindex(name)] ^= 1
    index.write_bytes(content)
    result = run("verify", root)
    refused(result, 3)
    assert str(index) in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_source_that_is_gone(root: Path, tmp_path: Path) -> None:
    """With the index elsewhere, a source that vanished is an error in one line, and no agreement."""
    index = tmp_path / "index.db"
    done(run("record", root, "--index", index))
    shutil.rmtree(root)
    for command in ("verify", "play"):
        result = run(command, root, "--index", index)
        quiet(result)
        assert result.returncode == 1 and result.stdout == ""
        assert str(root) in result.stderr and len(result.stderr.splitlines()) == 1
    assert done(run("ls", root, "--index", index)).count("\n") == 9
