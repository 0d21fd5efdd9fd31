"""The limits of an S3 multipart upload, and the part size that follows from them.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
"""

MOST_PARTS = 10_000
SMALLEST_PART = 5 << 20  # bytes; the last part may be smaller
LARGEST_PART = 5 << 30
_USUAL_PART = 64 << 20
_MIB = 1 << 20


def part_size_for(total_size: int) -> int:
    """The part size for an object of `total_size` bytes: 64 MiB, or the whole MiB that 10,000 parts need.

    >>> part_size_for(1 << 30) >> 20, part_size_for(1 << 40) >> 20
    (64, 105)
    """
    return max(_USUAL_PART, -(-total_size // (MOST_PARTS * _MIB)) * _MIB)
