"""The command export-index: what it writes, what it needs, and what it leaves alone."""

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.command_line import a_tmpfs
from support.programs import done, refused, run
from support.reference import Reference


def starts_in(index: Path) -> set[int]:
    with closing(sqlite3.connect(index)) as database:
        return {start for (start,) in database.execute("SELECT offsetheader FROM files")}


def test_only_the_index_is_needed(data: Path, reference: Reference, tmp_path: Path) -> None:
    """Neither the folder, nor that it is still as recorded."""
    shutil.copyfile(data / ".tartape" / "index.db", tmp_path / "index.db")
    result = run("export-index", tmp_path / "gone", "--index", tmp_path / "index.db", "--ratarmount", tmp_path / "out")
    assert done(result) == ""
    assert result.stderr.startswith(f"tartapefs: wrote {tmp_path}/out: {len(reference.starts)} members, ")
    assert starts_in(tmp_path / "out") == set(reference.starts.values())
    assert sorted(os.listdir(tmp_path)) == ["index.db", "out"]


def test_what_is_there_is_replaced_if_asked_to(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    out.chmod(0o600)
    result = run("export-index", data, "--ratarmount", out)
    refused(result, 2)
    assert 'is there already; "--force" replaces it' in result.stderr
    assert out.read_bytes() == b"mine"
    done(run("export-index", data, "--ratarmount", out, "--force"))
    assert starts_in(out) and out.stat().st_mode & 0o777 == 0o600
    refused(run("export-index", data, "--ratarmount", "-"), 2)
    assert os.listdir(tmp_path) == ["out"]


def test_another_tape_than_expected(data: Path, tmp_path: Path) -> None:
    refused(run("export-index", data, "--ratarmount", tmp_path / "out", "--expect", "0" * 64), 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.root
def test_a_full_disk(data: Path, tmp_path: Path) -> None:
    """Nothing is left, and what was there stays."""
    with a_tmpfs(tmp_path / "disk", "size=16k") as disk:
        (disk / "old").write_bytes(b"mine")
        for name, options in (("new", ()), ("old", ("--force",))):
            result = run("export-index", data, "--ratarmount", disk / name, *options)
            refused(result, 1)
            assert result.stderr == f"tartapefs: {disk}/{name}: No space left on device\n"
        assert os.listdir(disk) == ["old"] and (disk / "old").read_bytes() == b"mine"
