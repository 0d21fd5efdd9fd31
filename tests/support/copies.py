"""Copies of an archive, and how they are wrong."""

ROOT = "data 'odd' \n$HOME [1]"  # as a folder's name; most tests run with it


def first_wrong(copy: bytes, archive: bytes) -> int | None:
    """Where the copy first differs from the archive; None if one begins the other."""
    if archive.startswith(copy[: len(archive)]):
        return None
    low, high = 0, min(len(copy), len(archive))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if copy[:middle] == archive[:middle] else (low, middle)
    return low
