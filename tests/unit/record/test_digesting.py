"""Digests of what is added to a sealed tape, against hashlib; a file that changes meanwhile is refused."""

import hashlib
import os
from contextlib import closing
from pathlib import Path

import pytest

from tartapefs import Tape, TapeIntegrityError, TapeRecorder
from tartapefs.archive import hash_tree
from tartapefs.record.digesting import extended_tree
from tartapefs.source.folder import Source

BLOCK = 1 << 16


def rows(tree: Path) -> list[hash_tree.Row]:
    """The rows of the hash tree over all of the folder."""
    builder = hash_tree.Builder("sha256", BLOCK)
    with Tape.discover(tree) as tape, closing(Source(str(tree))) as source:
        return list(extended_tree(source, tape.members(), builder, hash_tree.hasher("sha256"), BLOCK))


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_digests_are_those_of_the_contents(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    contents = {
        f"{size:07}": os.urandom(size) for size in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 70 * BLOCK + 3)
    }
    for name, data in contents.items():
        (root / name).write_bytes(data)
    TapeRecorder(root).commit()
    blocks = {
        name: [sha256(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)] for name, data in contents.items()
    }
    expected = b"".join(sha256(b"".join(of)) if len(of) > 1 else of[0] for of in blocks.values() if of)
    found = rows(root)
    assert b"".join(row.digests for row in found if row.kind == "leaf") == expected
    pieces = b"".join(b"".join(of) for of in blocks.values() if len(of) > 1)
    assert b"".join(row.digests for row in found if row.kind == "piece") == pieces


@pytest.mark.parametrize("data", [b"", b"short", b"x" * 1000, b"y" * 1001])
def test_a_file_that_changed_since_it_was_recorded(tree: Path, data: bytes) -> None:
    (tree / "new").write_bytes(b"x" * 1000)
    TapeRecorder(tree).commit()
    (tree / "new").write_bytes(data)
    with pytest.raises(TapeIntegrityError, match=r"new: .* changed"):
        rows(tree)
