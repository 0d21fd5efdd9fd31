"""Comparing all contents with their digests, or a sample of them."""

import json
import os
from pathlib import Path

from support.programs import run
from support.seals import BLOCK, MIXED, flip, make, sealed

from tartapefs import Tape
from tartapefs.play.verified_blocks import damage
from tartapefs.verify.content_scan import VerificationState


def test_verify_deep_lists_all_damage(mixed: Path) -> None:
    assert run("verify", mixed, "--deep").returncode == 0
    flip(mixed / "folder 000" / "00005", 9)
    flip(mixed / "folder 000" / "00010", 2 * BLOCK)
    flip(mixed / "folder 001" / "00012", 299_999)
    (mixed / "folder 000" / "00003").chmod(0o600)
    os.utime(mixed / "folder 000" / "00004")  # which is no difference
    quick = run("verify", mixed)
    assert quick.returncode == 1
    assert len(quick.stdout.splitlines()) == 1, "size and mtime show the mode alone"
    found = json.loads(run("verify", mixed, "--deep", "--json").stdout)
    names = [drift["member"] for drift in found["drift"]]
    assert sorted(names) == [f"data/folder {f}" for f in ("000/00003", "000/00005", "000/00010", "001/00012")]
    assert found["blocks"] == sum(-(-size // BLOCK) for size in MIXED)
    assert "block 4 " in run("verify", mixed, "--deep").stdout
    assert len(json.loads(run("verify", mixed, "--sample", "100%", "--json").stdout)["drift"]) == 4
    assert "mtime" in run("verify", mixed, "--strict").stdout


def test_verify_sees_a_touched_file_that_changed_without_reading_the_others(mixed: Path) -> None:
    flip(mixed / "folder 000" / "00005", 9)
    os.utime(mixed / "folder 000" / "00010")
    assert run("verify", mixed).returncode == 0
    flip(mixed / "folder 000" / "00010", BLOCK)
    os.utime(mixed / "folder 000" / "00010")
    result = run("verify", mixed)
    assert (result.returncode, len(result.stdout.splitlines())) == (1, 1)
    assert "00010: the contents of block 1 " in result.stdout


def test_a_sample_reads_about_as_much_as_it_says(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [BLOCK * 200, *[10] * 300])
    sealed(root)
    counts = [json.loads(run("verify", root, "--sample", "10", "--json").stdout)["blocks"] for _ in range(3)]
    assert all(25 < count < 90 for count in counts), counts
    for share in ("0", "101%", "x"):
        assert run("verify", root, "--sample", share).returncode == 2


def test_verify_deep_goes_on_where_it_stopped(mixed: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    flip(mixed / "folder 000" / "00005", 9)
    flip(mixed / "folder 001" / "00012", 9)
    with Tape.discover(mixed) as tape, VerificationState(tape, os.fspath(state)) as first:
        found = damage(tape.find("data/folder 000/00005"), 0, BLOCK)
        first.add(tape.find("data/folder 000/00010").start, [found])
        first.save()
    result = json.loads(run("verify", mixed, "--deep", "--state", state, "--json").stdout)
    assert [drift["member"] for drift in result["drift"]] == ["data/folder 000/00005", "data/folder 001/00012"]
    assert all("the contents of block 0" in drift["differences"][0]["what"] for drift in result["drift"])
    assert 0 < result["blocks"] < sum(-(-size // BLOCK) for size in MIXED) - 8
    assert not state.exists()
    state.write_bytes(b"garbage\n")
    assert run("verify", mixed, "--deep", "--state", state).returncode == 2
    assert state.read_bytes() == b"garbage\n"
