"""CRCs that can be joined: those of two pieces and a length give that of both, so pieces are made in any order.

CRC-64/NVME, CRC-32C and CRC-32 are the checksums that S3 gives of a whole object. The package awscrt computes them
without Python's lock, and joins them since version 0.31.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tartapefs.base.errors import TapeError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CrcAlgorithm = Literal["crc64nvme", "crc32c", "crc32"]
NOT_INSTALLED = 'needs the package awscrt, 0.31 or later: pip install "tartapefs[crc]"'
SIZES: dict[CrcAlgorithm, int] = {"crc64nvme": 8, "crc32c": 4, "crc32": 4}  # bytes


@dataclass(frozen=True, slots=True)
class Crc:
    """The functions of one CRC, which is an integer, and 0 of nothing.

    Attributes: `size`, in bytes; `update(data, crc)`, of the bytes that have `crc` and of `data` behind them;
    `join(first, second, length)`, of two pieces from their CRCs, the second of `length` bytes.
    """

    size: int
    update: "Callable[[ReadableBuffer, int], int]"
    join: Callable[[int, int, int], int]


def crc_of(algorithm: CrcAlgorithm) -> Crc:
    """Raises TapeError if awscrt is not installed, or too old."""
    try:
        from awscrt import checksums

        return Crc(SIZES[algorithm], getattr(checksums, algorithm), getattr(checksums, f"combine_{algorithm}"))
    except (ImportError, AttributeError):
        raise TapeError(f"{algorithm.upper()} {NOT_INSTALLED}") from None


def s3_checksum(hexdigest: str) -> str:
    """A CRC as S3 writes it: base64 of its bytes, the most significant one first.

    >>> s3_checksum("ae8b14860a799888")
    'rosUhgp5mIg='
    """
    return base64.b64encode(bytes.fromhex(hexdigest)).decode()


def from_s3_checksum(text: str) -> int:
    """The CRC that S3 wrote. Raises ValueError if it is none.

    >>> hex(from_s3_checksum("rosUhgp5mIg="))
    '0xae8b14860a799888'
    """
    return int.from_bytes(base64.b64decode(text, validate=True))
