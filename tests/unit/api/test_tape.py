"""Short programs on a tape, with what the package exports: record, back up, resume and watch."""

import hashlib
import os
from pathlib import Path

import pytest
from support.recordings import bodies
from support.reference import Reference
from support.trees import pattern

RECORD = """
recorder = TapeRecorder("./massive_dataset"); fingerprint = recorder.commit()
"""
BACKUP = """
tape = Tape.discover("./massive_dataset"); player = TapePlayer(tape, source_root="./massive_dataset")
with open("backup.tar", "wb") as f:
    for event in player.play():
        if event.type == "file_data": f.write(event.data)
"""
RESUME = """
for event in player.play(start_offset=5 * 1024**3): upload_to_cloud(event.data)
"""
WATCH = """
for event in player.play():
    if event.type == "file_start": print(event.entry.arc_path, event.metadata.start_offset)
    elif event.type == "file_end": print(event.entry.arc_path, event.metadata.md5sum)
"""
IMPORT = "from tartapefs import TapeRecorder, Tape, TapePlayer\n"


def test_printed_programs(tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Record, back up, and watch, one after the other."""
    root = tree.rename(tree.with_name("massive_dataset"))
    monkeypatch.chdir(root.parent)
    names: dict[str, object] = {}
    for program in (IMPORT, RECORD, BACKUP, WATCH):
        exec(program, names)
    expected = Reference(root)
    assert (root.parent / "backup.tar").read_bytes() == expected.read(0, expected.size)
    headers = b"".join(expected.read(start, 512) for start in expected.starts.values())
    assert names["fingerprint"] == hashlib.sha256(headers).hexdigest()
    content = bodies(root)
    lines = []
    for name, start in expected.starts.items():
        shown = os.fsdecode(name).rstrip("/")
        body = content[shown]
        lines += [f"{shown} {start}", f"{shown} {None if body is None else hashlib.md5(body).hexdigest()}"]
    assert capsys.readouterr().out.splitlines() == lines


def test_printed_program_that_resumes_far_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 5 GiB on, what is uploaded is the rest of the archive."""
    root = tmp_path / "massive_dataset"
    root.mkdir()
    for name, size in (("a", 5 * 1024**3 - 3000), ("b", 2000), ("c", 3_000_000)):
        with open(root / name, "wb") as file:
            file.truncate(size)
            file.seek(size - 1500)
            file.write(pattern(1500))
    monkeypatch.chdir(tmp_path)
    uploaded: list[bytes] = []
    names: dict[str, object] = {"upload_to_cloud": uploaded.append}
    for program in (IMPORT, RECORD, BACKUP.splitlines()[1], RESUME):
        exec(program, names)
    expected = Reference(root)
    assert b"".join(uploaded) == expected.read(5 * 1024**3, expected.size)
    assert 3_000_000 < sum(map(len, uploaded)) == expected.size - 5 * 1024**3
