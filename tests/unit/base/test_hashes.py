"""Hashes by name: those that other programs compute."""

import hashlib
import sys

import pytest
from blake3 import blake3

from tartapefs import TapeError
from tartapefs.base.hashes import constructor, is_installed

DATA = bytes(range(256)) * 300


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("md5", hashlib.md5(DATA).hexdigest()),
        ("sha256", hashlib.sha256(DATA).hexdigest()),
        ("blake3", blake3(DATA).hexdigest()),
    ],
)
def test_at_once_and_piece_by_piece(algorithm: str, expected: str) -> None:
    new_hash = constructor(algorithm)
    assert new_hash(DATA).hexdigest() == expected
    hash_ = new_hash()
    for start in range(0, len(DATA), 1000):
        hash_.update(memoryview(DATA)[start : start + 1000])
    assert hash_.hexdigest() == hash_.digest().hex() == expected


def test_blake3_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(TapeError, match=r'pip install "tartapefs\[blake3\]"'):
        constructor("blake3")
    assert [is_installed(algorithm) for algorithm in ("blake3", "sha256", "crc32c")] == [False, True, True]
