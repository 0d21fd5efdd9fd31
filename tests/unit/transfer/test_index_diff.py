"""Two recordings compared: against the archives of both, byte by byte, as GNU tar makes them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.programs import run
from support.reference import Reference, gnu_tar

from tartapefs import Tape, TapeRecorder
from tartapefs.transfer.index_diff import Comparison, first_difference


def archive_of(root: Path) -> bytes:
    return gnu_tar(root)[: Reference(root).size]


def starts_of(root: Path) -> dict[str, int]:
    """Where each member starts, by its path below `data`."""
    return {os.fsdecode(n).removeprefix("data/").rstrip("/"): s for n, s in Reference(root).starts.items()}


def common(one: bytes, other: bytes) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(st.binary(max_size=50), st.binary(max_size=50), st.binary(max_size=50))
def test_first_difference(start: bytes, one: bytes, other: bytes) -> None:
    assert first_difference(start + one, start + other) == common(start + one, start + other)


NAMES = ("a", "b", "b c", "b\n", "d/e", "d/f", "d-", "z")
CONTENTS = st.sampled_from((0, 1, 511, 512, 513, 2000))


@pytest.mark.long(but=1)
@pytest.mark.parametrize("part", range(3))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(NAMES), CONTENTS),
    st.dictionaries(st.sampled_from(NAMES), st.one_of(st.none(), CONTENTS), max_size=3),
    st.booleans(),
)
def test_prefix_and_changes(
    part: int, tmp_path: Path, before: dict[str, int], change: dict[str, int | None], copied: bool
) -> None:
    """Files made, removed and rewritten, in place or in a copy of the folder: the prefix never exceeds the real one,
    and is the real one unless it ends in a body; each change is in the list, and nothing else."""
    shutil.rmtree(tmp_path / "one", ignore_errors=True)
    shutil.rmtree(tmp_path / "two", ignore_errors=True)
    root = tmp_path / "one" / "data"
    root.mkdir(parents=True)
    index = tmp_path / "old.db"

    def write(name: str, size: int, root: Path) -> None:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(size))

    def settle(root: Path) -> None:
        """All times alike: only contents, names and sizes tell two archives apart, and what `stat` knows besides."""
        for path in [root, *root.rglob("*")]:
            os.utime(path, ns=(10**18, 10**18))

    for name, size in before.items():
        write(name, size, root)
    settle(root)
    old_archive, old_starts = archive_of(root), starts_of(root)
    TapeRecorder(root, index, overwrite=True).commit()
    if copied:
        shutil.copytree(root, tmp_path / "two" / "data", symlinks=True, dirs_exist_ok=True)
        root = tmp_path / "two" / "data"
    for name, size in change.items():
        if size is None:
            (root / name).unlink(missing_ok=True)
        else:
            (root / name).unlink(missing_ok=True)
            write(name, size, root)
            if copied:  # where inodes say nothing, the time must
                os.utime(root / name, ns=(10**18 + 10**9, 10**18 + 10**9))
    changed_times = {name for name, size in change.items() if size is not None}
    for path in [root, *root.rglob("*")]:
        if not (copied and os.fspath(path.relative_to(root)) in changed_times):
            found = path.lstat()
            if found.st_mtime_ns != 10**18:
                os.utime(path, ns=(10**18, 10**18))
    new_archive = archive_of(root)
    TapeRecorder(root, tmp_path / "new.db", overwrite=True).commit()

    real = common(old_archive, new_archive)
    with Tape.from_index(index) as old, Tape.from_index(tmp_path / "new.db") as new:
        comparison = Comparison(old, new)
        prefix = comparison.prefix()
        assert prefix <= real
        if prefix < real:
            member = old.member_at(prefix)
            assert member is not None and prefix == member.start + 512, "it ends early only where a body begins"
            assert os.fsdecode(member.name).removeprefix("data/") in change
        listed = {(found.kind, found.member.arc_path.removeprefix("data/")) for found in comparison.changes()}
        new_starts = starts_of(root)
        assert {name for kind, name in listed if kind == "added"} == {
            name for name in changed_times if name not in before
        } | {"d" for name in changed_times if name.startswith("d/") and not any(b.startswith("d/") for b in before)}
        assert {name for kind, name in listed if kind == "removed"} == {
            name for name, size in change.items() if size is None and name in before
        }
        assert {name for kind, name in listed if kind == "changed"} >= {
            name for name, size in change.items() if size and name in before
        }
        assert {name for kind, name in listed if kind == "moved"} == {
            name
            for name in old_starts.keys() & new_starts.keys() - change.keys()
            if old_starts[name] != new_starts[name]
        } | {name for kind, name in listed if kind == "moved" and change.get(name) == 0}
        for found in comparison.changes():
            name = found.member.arc_path.removeprefix("data/")
            assert found.old is None or found.old.start == old_starts[name]
            assert found.new is None or found.new.start == new_starts[name]


def test_a_content_that_only_inode_and_ctime_tell(tree: Path, tmp_path: Path) -> None:
    """Rewritten with its size and time kept: seen in the same folder, not with `--source-check mtime`, as it says."""
    TapeRecorder(tree, tmp_path / "one").commit()
    path = tree / "photos" / "5000.bin"
    found = path.stat()
    path.write_bytes(os.urandom(5000))
    os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns))
    TapeRecorder(tree, tmp_path / "two").commit()
    with Tape.from_index(tmp_path / "one") as old, Tape.from_index(tmp_path / "two") as new:
        assert Comparison(old, new).prefix() == old.find("data/photos/5000.bin").start + 512
        assert [change.kind for change in Comparison(old, new).changes()] == ["changed"]
        assert Comparison(old, new, "mtime").prefix() == old.total_size
        assert list(Comparison(old, new, "mtime").changes()) == []


def test_the_same_twice(tree: Path, tmp_path: Path) -> None:
    TapeRecorder(tree, tmp_path / "one").commit()
    TapeRecorder(tree, tmp_path / "two").commit()
    shutil.copytree(tree, tmp_path / "copy" / "data", symlinks=True)
    TapeRecorder(tmp_path / "copy" / "data", tmp_path / "three").commit()
    for other in ("two", "three"):
        with Tape.from_index(tmp_path / "one") as old, Tape.from_index(tmp_path / other) as new:
            comparison = Comparison(old, new)
            assert comparison.prefix() == old.total_size
            assert list(comparison.changes()) == []


def test_rewritten_within_the_second(tree: Path, tmp_path: Path) -> None:
    """The header is the same, and the time differs by less than it holds: the body is not believed."""
    TapeRecorder(tree, tmp_path / "one").commit()
    path = tree / "photos" / "5000.bin"
    found = path.stat()
    path.write_bytes(os.urandom(5000))
    os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns // 10**9 * 10**9 + (found.st_mtime_ns + 1) % 10**9))
    TapeRecorder(tree, tmp_path / "two").commit()
    with Tape.from_index(tmp_path / "one") as old, Tape.from_index(tmp_path / "two") as new:
        assert old.fingerprint == new.fingerprint
        for check in ("full", "mtime"):
            comparison = Comparison(old, new, check)  # type: ignore[arg-type]
            assert comparison.prefix() == old.find("data/photos/5000.bin").start + 512
            assert [change.kind for change in comparison.changes()] == ["changed"]


def test_diff_and_forced_recording(tree: Path, tmp_path: Path) -> None:
    """`record --force` tells the same prefix as `diff`; a copy of the old archive agrees that far, and no further."""
    index, old = tree / ".tartape" / "index.db", tmp_path / "old index.db"
    assert run("record", tree).returncode == 0
    before = archive_of(tree)
    shutil.copy(index, old)
    same = run("diff", old, tree)
    assert same.returncode == 0 and same.stdout.splitlines()[0] == "0 added, 0 removed, 0 changed, 0 moved"
    (tree / "photos" / "new\n.bin").write_bytes(b"new")
    (tree / "photos" / "511.bin").unlink()
    os.utime(tree / "photos", ns=(10**18, 10**18))
    again = run("record", tree, "--force", "--json")
    after = archive_of(tree)
    prefix = common(before, after)
    assert json.loads(again.stdout)["valid_prefix"] == prefix
    assert f"existing copies stay valid up to byte {prefix:,} of {len(before):,}" in again.stderr
    result = run("diff", old, index)
    assert result.returncode == 1
    assert f"{prefix} bytes of the old archive, of {len(before)}, begin" in result.stdout
    lines = [json.loads(line) for line in run("diff", old, index, "--json").stdout.splitlines()]
    summary = lines.pop()
    assert summary == {
        "valid_prefix": prefix,
        "old_size": len(before),
        "new_size": len(after),
        "added": 1,
        "removed": 1,
        "changed": 1,
        "moved": len(lines) - 3,
    }
    assert {(line["change"], line["path"]) for line in lines if line["change"] != "moved"} == {
        ("added", "data/photos/new\n.bin"),
        ("removed", "data/photos/511.bin"),
        ("changed", "data/photos"),
    }
    assert r"new\n.bin" in result.stdout
    third = run("record", tree, "--force")
    assert "every copy stays valid" in third.stderr


@pytest.mark.parametrize("broken", ["nowhere", "text"])
def test_diff_of_what_is_no_index(tree: Path, tmp_path: Path, broken: str) -> None:
    (tmp_path / "text").write_text("no index")
    assert run("record", tree).returncode == 0
    result = run("diff", tree, tmp_path / broken)
    assert result.returncode == 3 and "Traceback" not in result.stderr and result.stdout == ""


def test_forced_over_a_damaged_recording(tree: Path) -> None:
    """Nothing can be told of it, and it is replaced."""
    assert run("record", tree).returncode == 0
    (tree / ".tartape" / "index.db").write_bytes(b"SQLite format 3\0" + bytes(200))
    result = run("record", tree, "--force", "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["valid_prefix"] is None
