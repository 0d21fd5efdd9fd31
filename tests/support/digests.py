"""Digests of an archive as hashlib, zlib and the documentations of S3 and of CRCs have them."""

import base64
import hashlib
import zlib
from functools import cache, lru_cache

PART_SIZES = (1, 1000, 65_536, 1 << 20, 1 << 40)


def expected_etag(archive: bytes, size: int) -> str:
    """As the S3 documentation has it."""
    md5s = [hashlib.md5(archive[at : at + size]).digest() for at in range(0, len(archive), size)]
    return f"{hashlib.md5(b''.join(md5s)).hexdigest()}-{len(md5s)}"


# Of the catalogue of parametrised CRC algorithms: all are reflected, begin with ones, and are inverted at the end.
_POLYNOMIALS = {"crc32c": (32, 0x1EDC6F41), "crc64nvme": (64, 0xAD93D23594C93659)}


@cache
def _table(bits: int, polynomial: int) -> list[int]:
    """What each byte adds, bit by bit."""
    reflected, table = int(f"{polynomial:0{bits}b}"[::-1], 2), []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ reflected * (value & 1)
        table.append(value)
    return table


@lru_cache(2)  # an archive is often looked at twice
def slow_crc(algorithm: str, data: bytes) -> str:
    """CRC-32 is zlib's; the others byte by byte."""
    if algorithm == "crc32":
        return f"{zlib.crc32(data):08x}"
    bits, polynomial = _POLYNOMIALS[algorithm]
    table, crc = _table(bits, polynomial), (1 << bits) - 1
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return f"{crc ^ (1 << bits) - 1:0{bits // 4}x}"


def in_base64(hexdigest: str) -> str:
    return base64.b64encode(bytes.fromhex(hexdigest)).decode()


def expected(
    archive: bytes, part_sizes: tuple[int, ...] = PART_SIZES[1:], crcs: tuple[str, ...] = ()
) -> dict[str, str]:
    """All hashes of `archive`, and these CRCs, by the names that `Digests.results` has for them."""
    import blake3  # which not every environment has that needs only an ETag

    whole = {
        "md5": hashlib.md5(archive).hexdigest(),
        "sha256": hashlib.sha256(archive).hexdigest(),
        "blake3": blake3.blake3(archive).hexdigest(),
    }
    return (
        whole
        | {crc: slow_crc(crc, archive) for crc in crcs}
        | {f"s3:{size}": expected_etag(archive, size) for size in part_sizes}
    )
