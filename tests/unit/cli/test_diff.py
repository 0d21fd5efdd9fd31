"""The command diff: a line for each change, with offsets that `tarfile` confirms, and what copies keep."""

import json
import shutil
from pathlib import Path

import pytest
from support.programs import done, quiet, refused, run
from support.reference import Reference

Recordings = tuple[Path, Path, Reference, Reference]


@pytest.fixture
def recordings(tmp_path: Path) -> Recordings:
    """An index of before, the folder as it was recorded again, and both archives; that of before in a file, too."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a", "b", "c\n1", "d"):
        (root / name).write_bytes(name.encode() * 300)
    done(run("record", root))
    shutil.copyfile(root / ".tartape" / "index.db", tmp_path / "old.db")
    before = Reference(root)
    (tmp_path / "old.tar").write_bytes(before.read(0, before.size))
    (root / "b").unlink()
    (root / "c\n1").write_bytes(b"other content")
    (root / "e").write_bytes(b"new")
    done(run("record", root, "--force"))
    return tmp_path / "old.db", root, before, Reference(root)


def test_each_change_has_a_line_with_both_offsets(recordings: Recordings) -> None:
    old, root, before, after = recordings
    result = run("diff", old, root)
    quiet(result)
    assert result.returncode == 1
    *changes, counts, summary = result.stdout.splitlines()
    found = {line.split(maxsplit=3)[3]: tuple(line.split(maxsplit=3)[:3]) for line in changes}
    was = {name.decode(): str(start) for name, start in before.starts.items()}
    now = {name.decode(): str(start) for name, start in after.starts.items()}
    assert found.pop("root/", None) in (None, ("!", was["root/"], now["root/"]))  # its time may have moved
    assert found == {
        "root/b": ("-", was["root/b"], "-"),
        r"root/c\n1": ("!", was["root/c\n1"], now["root/c\n1"]),
        "root/d": (">", was["root/d"], now["root/d"]),
        "root/e": ("+", "-", now["root/e"]),
    }
    assert counts.startswith("1 added, 1 removed, ") and counts.endswith("1 moved")
    one, other = old.with_suffix(".tar").read_bytes(), after.read(0, after.size)
    prefix = next(at for at in range(before.size) if one[at] != other[at])
    assert summary == f"{prefix} bytes of the old archive, of {before.size}, begin the new one, of {after.size}"


def test_as_json_the_summary_comes_last(recordings: Recordings) -> None:
    old, root, before, after = recordings
    result = run("diff", old, root, "--json")
    *changes, summary = [json.loads(line) for line in result.stdout.splitlines()]
    found = {change["path"]: change for change in changes}
    assert found["root/b"] == {
        "change": "removed",
        "path": "root/b",
        "old_start": before.starts[b"root/b"],
        "new_start": None,
        "old_size": 300,
        "new_size": None,
    }
    assert found["root/e"]["new_start"] == after.starts[b"root/e"]
    assert (summary["old_size"], summary["new_size"]) == (before.size, after.size)
    assert (summary["added"], summary["removed"], summary["moved"]) == (1, 1, 1)
    assert sum(summary[kind] for kind in ("added", "removed", "changed", "moved")) == len(changes)


def test_equal_recordings(recordings: Recordings) -> None:
    _, root, _, after = recordings
    result = run("diff", root, root / ".tartape" / "index.db")
    assert done(result).splitlines() == [
        "0 added, 0 removed, 0 changed, 0 moved",
        f"{after.size} bytes of the old archive, of {after.size}, begin the new one, of {after.size}",
    ]


@pytest.mark.parametrize("place", ["none", "root/d", "root"])
def test_what_is_no_recording(recordings: Recordings, tmp_path: Path, place: str) -> None:
    if place == "root":
        shutil.rmtree(tmp_path / "root" / ".tartape")
    refused(run("diff", recordings[0], tmp_path / place), 3)
