"""Trees of samples, and where an archive is to be cut into shards, found by reading the whole archive with tarfile."""

import io
import random
import re
import tarfile
from collections.abc import Collection
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

FOOTER = 1024
_SAMPLE = re.compile(r"((?:.*/|)[^./]+)([.][^/]*)?", re.DOTALL)  # webdataset's own, and names without a dot


def fill(root: Path, count: int, seed: int) -> None:
    """Fills the folder with files that are samples of one to four, some of them in folders, and what is no sample."""
    some = random.Random(seed)
    for number in range(count):
        folder = root / some.choice(["", "", "a", "a/b.c", "dog.7"])
        folder.mkdir(parents=True, exist_ok=True)
        stem = some.choice([f"{number:03}", f"{number:03}", "same", ""])
        endings = some.sample(["jpg", "json", "cls.txt", "txt", "x.y.z"], some.randint(1, 4))
        for ending in endings:
            (folder / f"{stem}.{ending}").write_bytes(some.randbytes(some.choice([0, 1, 511, 512, 700, 3000])))
        if some.random() < 0.1:
            (folder / f"{number:03}.link").symlink_to("nowhere")
        if some.random() < 0.1:
            (folder / f"{number:03}.d").mkdir(exist_ok=True)
        if some.random() < 0.1:
            (folder / f"{number:03}").write_bytes(b"no dot")


def sample_of(name: str) -> str:
    found = _SAMPLE.fullmatch(name)
    return found[1] if found else name


@lru_cache(2)
def _members(archive: bytes) -> list[tuple[int, str]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        return [(member.offset, member.name) for member in members]


def cut(archive: bytes, size: int, begins: Collection[int] = ()) -> list[tuple[int, int]]:
    """The ranges of the archive that its shards have; `begins`: where generations begin."""
    found = _members(archive)
    end = len(archive) - FOOTER
    samples = [0]
    samples += [
        at for (_, before), (at, name) in pairwise(found) if at in begins or sample_of(before) != sample_of(name)
    ]
    starts = [0]
    for start, stop in pairwise([*samples, end]):
        if start != starts[-1] and stop - starts[-1] + FOOTER > size:
            starts.append(start)
    return list(pairwise([*starts, end]))


def shards(archive: bytes, size: int, begins: Collection[int] = ()) -> list[bytes]:
    """The bytes of its shards."""
    return [archive[start:stop] + bytes(FOOTER) for start, stop in cut(archive, size, begins)]
