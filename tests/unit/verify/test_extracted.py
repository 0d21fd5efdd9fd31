"""What tar extracted from a copy, against the tape's digests; the source is gone."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.programs import run
from support.seals import BLOCK, flip

Change = Callable[[Path], None]


def extracted(kept: Path) -> Path:
    subprocess.run(["tar", "-xpf", kept / "copy.tar"], cwd=kept, check=True)
    return kept / "data"


def verify(kept: Path, where: Path, *options: str) -> list[dict[str, object]]:
    result = run("verify-extracted", kept / "nowhere", where, "--index", kept / "index.db", "--json", *options)
    found = json.loads(result.stdout)
    assert result.returncode == (0 if found["valid"] else 1), result.stderr
    drift: list[dict[str, object]] = found["drift"]
    assert found["valid"] is (not drift)
    return drift


def test_what_tar_extracted_agrees(kept: Path) -> None:
    where = extracted(kept)
    assert verify(kept, where) == []
    assert verify(kept, kept) == [], "the folder that it was extracted into will do"


def store(path: Path) -> None:
    flip(path / "folder 000" / "00010", BLOCK + 1)


def shorten(path: Path) -> None:
    os.truncate(path / "folder 000" / "00005", 4999)


def remove(path: Path) -> None:
    (path / "folder 001" / "00012").unlink()


def add(path: Path) -> None:
    before = (path / "folder 001").stat()
    (path / "folder 001" / "more").write_bytes(b"")
    os.utime(path / "folder 001", ns=(before.st_atime_ns, before.st_mtime_ns))


def retarget(path: Path) -> None:
    before = path.stat()
    (path / "link").unlink()
    (path / "link").symlink_to("folder 001")
    os.utime(path / "link", ns=(1_600_000_000 * 10**9,) * 2, follow_symlinks=False)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def chmod(path: Path) -> None:
    (path / "folder 000" / "00005").chmod(0o640)


def touch(path: Path) -> None:
    os.utime(path / "folder 000" / "00005")


@pytest.mark.parametrize(
    ("change", "member", "what"),
    [
        (store, "data/folder 000/00010", "the contents of block 1 (bytes 65536 to 131072 of its body)"),
        (shorten, "data/folder 000/00005", "size"),
        (remove, "data/folder 001/00012", "type"),
        (add, "data/folder 001/more", "type"),
        (retarget, "data/link", "target"),
        (chmod, "data/folder 000/00005", "mode"),
        (touch, "data/folder 000/00005", "mtime"),
    ],
)
def test_each_change_is_listed(kept: Path, change: Change, member: str, what: str) -> None:
    where = extracted(kept)
    change(where)
    found = {drift["member"]: [d["what"] for d in drift["differences"]] for drift in verify(kept, where)}  # type: ignore[index,attr-defined]
    assert what in found.pop(member)
    assert set(found) <= {"data/folder 001"}, "whose own time a change in it moves"


def test_modes_and_times_can_be_ignored(kept: Path) -> None:
    where = extracted(kept)
    chmod(where)
    os.utime(where / "folder 001" / "00012")
    assert len(verify(kept, where)) == 2
    assert verify(kept, where, "--ignore", "mode", "--ignore", "mtime") == []
    store(where)
    assert len(verify(kept, where, "--ignore", "mode", "--ignore", "mtime")) == 1


def test_an_index_that_is_not_the_expected_one(kept: Path) -> None:
    where = extracted(kept)
    result = run("verify-extracted", "x", where, "--index", kept / "index.db", "--expect", "1" * 64)
    assert (result.returncode, "not the tape" in result.stderr) == (1, True)
