"""Hashes that are saved half way and restored."""

import _hashlib
import ctypes
import hashlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartapefs.base import resumable_hash


@given(st.sampled_from(("md5", "sha256")), st.binary(max_size=300), st.binary(max_size=300), st.booleans())
def test_saved_hashes(name: str, first: bytes, second: bytes, writable: bool) -> None:
    """Saved after any byte and restored, they give what hashlib gives."""
    begun = resumable_hash.ResumableHash(name)
    begun.update(bytearray(first) if writable else first)
    restored = resumable_hash.ResumableHash.restore(name, begun.save())
    restored.update(memoryview(second))
    assert restored.hexdigest() == hashlib.new(name, first + second).hexdigest()
    assert begun.hexdigest() == hashlib.new(name, first).hexdigest()


@pytest.mark.parametrize("state", ["", "x", ":", "::", "00:0:", "0" * 64 + ":1:", "0" * 64 + ":-64:", "g" * 64 + ":0:"])
def test_no_state_of_a_hash(state: str) -> None:
    with pytest.raises(ValueError):
        resumable_hash.ResumableHash.restore("sha256", state)


@pytest.mark.long
def test_counts_beyond_4_gib() -> None:
    """The number of bits takes both words of OpenSSL's struct."""
    zeros = bytes(1 << 24)
    begun, plain = resumable_hash.ResumableHash("md5"), hashlib.md5()
    for _ in range(33):  # 528 MiB are more than 2^32 bits
        begun.update(zeros)
        plain.update(zeros)
    assert int(begun.save().split(":")[1]) == 33 << 24
    restored = resumable_hash.ResumableHash.restore("md5", begun.save())
    restored.update(b"end")
    plain.update(b"end")
    assert restored.hexdigest() == plain.hexdigest()


@pytest.fixture
def looked_up_again() -> Iterator[None]:
    """What the module remembers of the library is forgotten, before the test and after it."""
    for remembered in (resumable_hash._library, resumable_hash.is_resumable):
        remembered.cache_clear()
    yield
    for remembered in (resumable_hash._library, resumable_hash.is_resumable):
        remembered.cache_clear()


@pytest.mark.usefixtures("looked_up_again")
def test_a_python_that_hides_its_openssl(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is linked in, as in the builds that uv installs: the system's library is used."""
    monkeypatch.delattr(_hashlib, "__file__")
    assert resumable_hash.is_resumable("md5") and resumable_hash.is_resumable("sha256")


@pytest.mark.usefixtures("looked_up_again")
@pytest.mark.parametrize("missing", ["library", "functions", "FIPS"])
def test_where_there_is_no_such_function(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def none(name: str) -> object:
        if missing == "library":
            raise OSError(name)
        return object()

    if missing == "FIPS":
        monkeypatch.setattr(_hashlib, "get_fips_mode", lambda: 1)
    else:
        monkeypatch.setattr(ctypes, "CDLL", none)
    assert not resumable_hash.is_resumable("md5") and not resumable_hash.is_resumable("sha256")


@pytest.mark.usefixtures("looked_up_again")
def test_a_library_with_a_larger_struct(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes behind ours, and is not used, though its digests are right."""
    update = resumable_hash.ResumableHash.update

    def write_behind(self: resumable_hash.ResumableHash, data: bytes) -> None:
        update(self, data)
        self._context.guard[3] = 1

    monkeypatch.setattr(resumable_hash.ResumableHash, "update", write_behind)
    assert not resumable_hash.is_resumable("sha256")


@pytest.mark.usefixtures("looked_up_again")
def test_a_library_whose_digests_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_hash.ResumableHash, "digest", lambda self: bytes(self.digest_size))
    assert not resumable_hash.is_resumable("sha256")
