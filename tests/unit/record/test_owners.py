"""Owners in headers, by number and by name."""

import os
import pwd
from pathlib import Path

import pytest
from support import reference

from tartapefs import (
    Tape,
    TapePlayer,
    TapeRecorder,
)


@pytest.mark.root
@pytest.mark.parametrize("uid", [0, 1, 1000, 2_097_151, 2_097_152, 3_000_000_000])
def test_owners_kept(tmp_path: Path, uid: int) -> None:
    """With `anonymize=False` the header has the real owner, by number and, where there is one, by name."""
    root = tmp_path / "tree"
    root.mkdir()
    file = root / "file"
    file.write_bytes(b"1")
    os.chown(file, uid, uid)
    scrubbed = TapeRecorder(root).commit()
    kept = TapeRecorder(root, anonymize=False, overwrite=True).commit()
    try:
        uname, gname = pwd.getpwuid(uid).pw_name, "root" if uid == 0 else None
    except KeyError:
        uname, gname = "", None
    with Tape.discover(root) as tape:
        assert tape.owners_kept
        member = tape.find("tree/file")
        player = TapePlayer(tape)
        header = player.read(member.start, 512)
        player.close()
    if gname is None:
        gname = header[297:329].rstrip(b"\0").decode()  # of a machine's own choice
    assert header == reference.header(b"tree/file", file.stat(), owner=(uid, uid, uname, gname))
    assert (kept == scrubbed) == (uid == 0)
