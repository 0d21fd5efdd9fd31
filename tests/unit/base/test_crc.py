"""CRCs by name: those that other implementations compute, of pieces and joined."""

import random
import sys
from types import ModuleType

import pytest
from support.digests import slow_crc

from tartapefs import TapeError
from tartapefs.base.crc import SIZES, CrcAlgorithm, crc_of, s3_checksum

# Of the string "123456789", as the catalogue of parametrised CRC algorithms has them.
CHECKS: dict[CrcAlgorithm, str] = {"crc64nvme": "ae8b14860a799888", "crc32c": "e3069283", "crc32": "cbf43926"}


@pytest.mark.parametrize("algorithm", SIZES)
def test_as_published(algorithm: CrcAlgorithm) -> None:
    crc = crc_of(algorithm)
    assert f"{crc.update(b'123456789', 0):0{2 * crc.size}x}" == CHECKS[algorithm] == slow_crc(algorithm, b"123456789")


@pytest.mark.parametrize("algorithm", SIZES)
def test_pieces_joined(algorithm: CrcAlgorithm) -> None:
    crc, choose = crc_of(algorithm), random.Random(1)
    for _ in range(50):
        first, second = (choose.randbytes(choose.randrange(200)) for _ in range(2))
        whole = int(slow_crc(algorithm, first + second), 16)
        assert crc.join(crc.update(first, 0), crc.update(memoryview(second), 0), len(second)) == whole
        assert crc.update(second, crc.update(first, 0)) == whole


def test_of_ten_terabytes() -> None:
    """Lengths beyond 32 bits: all zeros, doubled by joining, which the length counts for alone."""
    crc = crc_of("crc64nvme")
    value, length = crc.update(bytes(1 << 20), 0), 1 << 20
    one = value
    while length < 10 << 40:
        value, length = crc.join(value, value, length), 2 * length
    assert crc.join(one, value, length) == crc.join(value, one, 1 << 20) != value


def test_in_base64() -> None:
    assert s3_checksum("00000001") == "AAAAAQ=="


@pytest.mark.parametrize("algorithm", SIZES)
@pytest.mark.parametrize("older", [False, True])
def test_not_installed_or_too_old(algorithm: CrcAlgorithm, older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("awscrt")
    package.checksums = ModuleType("awscrt.checksums")  # type: ignore[attr-defined]
    setattr(package.checksums, algorithm, lambda data, crc: 0)
    monkeypatch.setitem(sys.modules, "awscrt", package if older else None)
    with pytest.raises(
        TapeError, match=rf'{algorithm.upper()} needs .*, 0.31 or later: pip install "tartapefs\[crc\]"'
    ):
        crc_of(algorithm)
