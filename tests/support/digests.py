"""Digests of an archive as hashlib and the S3 documentation have them."""

import hashlib

PART_SIZES = (1, 1000, 65_536, 1 << 20, 1 << 40)


def expected_etag(archive: bytes, size: int) -> str:
    """As the S3 documentation has it."""
    md5s = [hashlib.md5(archive[at : at + size]).digest() for at in range(0, len(archive), size)]
    return f"{hashlib.md5(b''.join(md5s)).hexdigest()}-{len(md5s)}"


def expected(archive: bytes, part_sizes: tuple[int, ...] = PART_SIZES[1:]) -> dict[str, str]:
    """All digests of `archive`, by the names that `Digests.results` has for them."""
    import blake3  # which not every environment has that needs only an ETag

    whole = {
        "md5": hashlib.md5(archive).hexdigest(),
        "sha256": hashlib.sha256(archive).hexdigest(),
        "blake3": blake3.blake3(archive).hexdigest(),
    }
    return whole | {f"s3:{size}": expected_etag(archive, size) for size in part_sizes}
