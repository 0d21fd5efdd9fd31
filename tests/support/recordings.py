"""Recordings against the archives that they should have."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from support.reference import Reference
from tartapefs import Tape, TapePlayer, TapeRecorder


def played(root: Path, index: Path | None = None) -> bytes:
    """The whole archive, through tape and player."""
    with Tape.discover(root, index) as tape:
        player = TapePlayer(tape)
        try:
            return player.read(0, tape.total_size)
        finally:
            player.close()


def fingerprint_of(expected: Reference) -> str:
    """SHA-256 over all headers, in order."""
    digest = hashlib.sha256()
    for start in expected.starts.values():
        digest.update(expected.read(start, 512))
    return digest.hexdigest()


def whole(root: Path, left_out: tuple[bytes, ...] = ()) -> bytes:
    expected = Reference(root, left_out)
    return expected.read(0, expected.size)


def record(root: Path, index: Path | None = None, **options: object) -> bytes:
    """Records the folder; the archive that it must have."""
    TapeRecorder(root, index, **options).commit()  # type: ignore[arg-type]
    return whole(root)


@contextmanager
def player_of(root: Path, check: str = "full", index: Path | None = None) -> Iterator[TapePlayer]:
    with Tape.discover(root, index) as tape, closing(TapePlayer(tape, root, check)) as player:  # type: ignore[arg-type]
        yield player


COPIES = [
    pytest.param(["cp", "-a"], id="cp"),
    pytest.param(["rsync", "-a"], id="rsync", marks=pytest.mark.needs("rsync")),
]


def copied(command: list[str], tree: Path) -> Path:
    copy = tree.parent / "elsewhere" / "data"
    copy.parent.mkdir()
    subprocess.run([*command, tree, copy.parent], check=True)
    return copy


def assert_recorded(root: Path, left_out: tuple[bytes, ...] = ()) -> None:
    """The tape of `root` has the archive, size, count and fingerprint that it should have."""
    expected = Reference(root, left_out)
    assert played(root) == expected.read(0, expected.size)
    with Tape.discover(root) as tape:
        assert tape.total_size == expected.size
        assert tape.member_count == len(expected.starts)
        assert tape.fingerprint == fingerprint_of(expected)
        assert [(m.name, m.start) for m in tape.members()] == list(expected.starts.items())


def nothing_written(root: Path, mtime_ns: int) -> None:
    """No folder for the index, and the root's own time as it was."""
    assert not os.path.lexists(root / ".tartape")
    assert root.stat().st_mtime_ns == mtime_ns


def around_blocks(size: int) -> list[int]:
    """Every multiple of 512 up to the end of the archive, and the offsets one below and one above it."""
    places = {block + side for block in range(0, size + 1, 512) for side in (-1, 0, 1)}
    return sorted(place for place in places if 0 <= place <= size)


def bodies(root: Path) -> dict[str, bytes | None]:
    """The content of each file of the folder by its name in the archive; None for folders and links."""
    found: dict[str, bytes | None] = {root.name: None}
    for path in root.rglob("*"):
        if ".tartape" not in path.parts:
            found[str(path.relative_to(root.parent))] = (
                None if path.is_symlink() or path.is_dir() else path.read_bytes()
            )
    return found
