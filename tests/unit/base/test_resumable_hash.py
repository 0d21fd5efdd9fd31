"""Hashes that are saved half way and restored."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartapefs.base import resumable_hash as hashstate


@given(st.sampled_from(("md5", "sha256")), st.binary(max_size=300), st.binary(max_size=300), st.booleans())
def test_saved_hashes(name: str, first: bytes, second: bytes, writable: bool) -> None:
    """Saved after any byte and restored, they give what hashlib gives."""
    begun = hashstate.SavableHash(name)
    begun.update(bytearray(first) if writable else first)
    restored = hashstate.SavableHash.restore(name, begun.save())
    restored.update(memoryview(second))
    assert restored.hexdigest() == hashlib.new(name, first + second).hexdigest()
    assert begun.hexdigest() == hashlib.new(name, first).hexdigest()


@pytest.mark.parametrize("state", ["", "x", ":", "::", "00:0:", "0" * 64 + ":1:", "0" * 64 + ":-64:", "g" * 64 + ":0:"])
def test_no_state_of_a_hash(state: str) -> None:
    with pytest.raises(ValueError):
        hashstate.SavableHash.restore("sha256", state)


def test_counts_beyond_4_gib() -> None:
    """The number of bits takes both words of OpenSSL's struct."""
    zeros = bytes(1 << 24)
    begun, plain = hashstate.SavableHash("md5"), hashlib.md5()
    for _ in range(33):  # 528 MiB are more than 2^32 bits
        begun.update(zeros)
        plain.update(zeros)
    assert int(begun.save().split(":")[1]) == 33 << 24
    restored = hashstate.SavableHash.restore("md5", begun.save())
    restored.update(b"end")
    plain.update(b"end")
    assert restored.hexdigest() == plain.hexdigest()
