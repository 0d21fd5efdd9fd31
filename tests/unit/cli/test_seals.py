"""The commands that make and expect seals."""

import json
import os
from pathlib import Path

from support.programs import run
from support.seals import BLOCK, MIXED, make, seal_of, whole

from tartapefs import Tape, TapeRecorder


def test_record_and_seal_by_command(tmp_path: Path) -> None:
    root = make(tmp_path / "data", MIXED)
    result = run("record", root, "--digest", "sha256")
    assert result.returncode == 0, result.stderr
    fingerprint, made = result.stdout.split()
    assert made == seal_of(whole(root), "sha256", 1 << 17)
    facts = json.loads(run("info", root, "--json").stdout)
    assert (facts["fingerprint"], facts["seal"]) == (fingerprint, made)
    assert "sha256" in facts["digests"]
    assert run("record", root, "--force", "--no-digest").returncode == 0
    assert json.loads(run("info", root, "--json").stdout)["seal"] is None
    result = run("seal", root, "--block-size", "64K", "--json")
    assert json.loads(result.stdout)["seal"] == seal_of(whole(root), "blake3", BLOCK)
    assert run("seal", root).returncode == 4
    assert run("seal", root, "--block-size", "1000").returncode == 2


def test_without_blake3_sha256_is_used(tmp_path: Path) -> None:
    """And it says so; where BLAKE3 was asked for, it is an error."""
    root = make(tmp_path / "data", MIXED)
    TapeRecorder(root).commit()
    (tmp_path / "blake3.py").write_text("raise ImportError\n")
    without = os.environ | {"PYTHONPATH": str(tmp_path)}
    asked = run("seal", root, "--digest", "blake3", env=without)
    assert asked.returncode == 2 and "tartapefs[blake3]" in asked.stderr
    result = run("seal", root, env=without)
    assert result.returncode == 0 and "SHA-256" in result.stderr
    with Tape.discover(root) as tape:
        assert tape.algorithm == "sha256"


def test_verify_expects(mixed: Path) -> None:
    facts = json.loads(run("info", mixed, "--json").stdout)
    result = run("verify", mixed, "--expect", facts["seal"].upper())
    assert (result.returncode, "covers contents" in result.stderr) == (0, True)
    result = run("verify", mixed, "--expect", facts["fingerprint"])
    assert (result.returncode, "no contents" in result.stderr) == (0, True)
    for command in (["verify"], ["mount", mixed.parent / "nowhere"], ["check", mixed / "link"]):
        name, *rest = command
        result = run(name, mixed, *rest, "--expect", "0" * 64)
        assert result.returncode == 1, result.stderr
        assert "not the tape that was expected" in result.stderr


def test_what_needs_digests_says_so(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [5])
    TapeRecorder(root).commit()
    for command in (["verify", root, "--deep"], ["verify", root, "--sample", "1%"],
                    ["verify-extracted", root, root], ["extract", root, root / "link", "data/link"],
                    ["mount", root, tmp_path, "--scrub-share", "5"]):  # fmt: skip
        result = run(*command)
        assert result.returncode == 2, command
        assert "tartapefs seal" in result.stderr
