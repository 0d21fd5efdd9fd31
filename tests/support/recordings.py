"""Recordings against the archives that they should have."""

import hashlib
import os
from pathlib import Path

from support.reference import Reference
from tartapefs import Tape, TapePlayer


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
