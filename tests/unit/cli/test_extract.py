"""The command that restores members out of a copy: patterns, what is there already, tapes without digests."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.programs import refused, run
from support.seals import MIXED, flip, make, whole

from tartapefs import Tape, TapeRecorder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(mixed: Path, tmp_path: Path) -> Path:
    """A folder with a sealed tape; `copy.tar` and an empty `out` lie beside it."""
    (tmp_path / "copy.tar").write_bytes(whole(mixed))
    (tmp_path / "out").mkdir()
    return mixed


def extract(root: Path, *arguments: object) -> list[object]:
    return ["extract", root, root.parent / "copy.tar", *arguments, "-C", root.parent / "out"]


@pytest.mark.parametrize("threads", [1, 3])
def test_patterns_and_threads(copied: Path, threads: int) -> None:
    out = copied.parent / "out"
    result = run(*extract(copied, "data/folder */*1", "data/folder 001", "--json", "--threads", str(threads)))
    assert result.returncode == 0, result.stderr
    expected = {name: data for name, data in files(copied).items() if name.startswith("folder")}
    expected = {name: data for name, data in expected.items() if name.endswith("1") or name.startswith("folder 001")}
    assert files(out / "data") == expected
    paths = [json.loads(line)["path"] for line in result.stdout.splitlines()]
    assert sorted(paths) == sorted(["data/folder 001", *(f"data/{name}" for name in expected)])
    for names in (["data/nobody*"], ["data/link", "data/folder 000/[x]"]):
        result = run(*extract(copied, *names))
        refused(result, 1)
        assert names[-1] in result.stderr and "no such member" in result.stderr
    assert not (out / "data" / "link").is_symlink()


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_it_goes_on_where_it_was(copied: Path, options: list[str]) -> None:
    """Files that are there, and right, are not read from the copy again; whatever looks like one is."""
    out = copied.parent / "out" / "data"
    assert run(*extract(copied, "data")).returncode == 0
    with Tape.discover(copied) as tape:
        there, missing = tape.find("data/folder 000/00010"), tape.find("data/folder 000/00009")
    flip(copied.parent / "copy.tar", there.start)
    (out / "folder 000" / "00009").unlink()
    result = run(*extract(copied, "data", *options))
    assert result.returncode == 0, result.stderr
    assert "extracted 4 members" in result.stderr and "14 were there already" in result.stderr
    flip(out / "folder 000" / "00009", missing.size - 1)  # its size and time are as they were
    result = run(*extract(copied, "data", *options))
    assert (result.returncode, "exists" in result.stderr) == ((0, False) if options else (1, True))
    is_right = (out / "folder 000" / "00009").read_bytes() == (copied / "folder 000" / "00009").read_bytes()
    assert is_right == bool(options)


def test_one_that_is_damaged_leaves_the_others(copied: Path) -> None:
    out = copied.parent / "out" / "data"
    with Tape.discover(copied) as tape:
        for name in ("data/folder 000/00008", "data/folder 000/00010"):
            flip(copied.parent / "copy.tar", tape.find(name).stop - 1000)
    for threads in (1, 3):
        result = run(*extract(copied, "data", "--json", "--threads", str(threads)))
        assert (result.returncode, "2 members are not extracted" in result.stderr) == (1, True)
        expected = files(copied)
        for name in ("00008", "00010"):
            assert f"data/folder 000/{name}: the contents of block" in result.stderr
            del expected[f"folder 000/{name}"]
        assert sum("error" in json.loads(line) for line in result.stdout.splitlines()) == 2
        assert files(out) == {name: data for name, data in expected.items() if not name.startswith(".tartape")}
        shutil.rmtree(out)


def test_without_digests(tmp_path: Path) -> None:
    """Only if the user says so; then headers are compared, and the size of the copy."""
    root = make(tmp_path / "data", MIXED)
    TapeRecorder(root).commit()
    copy = tmp_path / "copy.tar"
    copy.write_bytes(whole(root))
    (tmp_path / "out").mkdir()
    result = run(*extract(root, "data"))
    refused(result, 2)
    assert "tartapefs seal" in result.stderr and "--no-digests" in result.stderr
    for said in ("contents are not", "15 were there already"):
        result = run(*extract(root, "data", "--no-digests"))
        assert result.returncode == 0 and said in result.stderr
        assert files(tmp_path / "out" / "data") == {k: v for k, v in files(root).items() if k[0] != "."}
    with Tape.discover(root) as tape:
        flip(copy, tape.find("data/link").start + 3)
    (tmp_path / "out" / "data" / "link").unlink()
    result = run(*extract(root, "data/link", "--no-digests"))
    assert (result.returncode, "its header" in result.stderr) == (1, True)
    os.truncate(copy, 100_000)
    result = run(*extract(root, "data/folder 000/00000", "--no-digests"))
    refused(result, 1)
    assert "has 100,000 bytes" in result.stderr
    part = run(*extract(root, "data/folder 000/00000", "--no-digests", "--offset", "0"))
    assert part.returncode == 0, part.stderr


def test_a_copy_of_another_size_is_told(copied: Path) -> None:
    """Its members are checked, so those that are there are extracted."""
    os.truncate(copied.parent / "copy.tar", os.path.getsize(copied.parent / "copy.tar") - 1024)
    result = run(*extract(copied, "data/folder 000/00010"))
    assert (result.returncode, "not complete" in result.stderr) == (0, True)
