"""The part size of an upload keeps S3's limits."""

from hypothesis import example, given
from hypothesis import strategies as st

from tartapefs.transfer.s3_limits import LARGEST_PART, MOST_PARTS, SMALLEST_PART, part_size_for


@given(st.integers(1024, 5 << 40))  # the largest object has 5 TiB
@example(64 << 20)
@example(10_000 * (64 << 20))
@example(10_000 * (64 << 20) + 1)
@example(5 << 40)
def test_part_size(total_size: int) -> None:
    size = part_size_for(total_size)
    assert SMALLEST_PART <= size <= LARGEST_PART and size % (1 << 20) == 0
    assert -(-total_size // size) <= MOST_PARTS
    assert size == 64 << 20 or -(-total_size // (size - (1 << 20))) > MOST_PARTS, "no larger than it has to be"
