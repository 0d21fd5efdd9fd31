"""Where an archive is cut into shards, compared with what reading the whole archive says."""

import os
from array import array
from pathlib import Path

import pytest
from support.generations import Generations
from support.reference import Reference
from support.shards import cut, fill

from tartapefs import TapeRecorder
from tartapefs.index import shards as module
from tartapefs.index.reader import Index
from tartapefs.index.shards import shard_starts

SIZES = [1, 1024, 1536, 3000, 5000, 5120, 20_000, 100_000, 10**6, 10**12]


def starts(root: Path, size: int) -> list[int]:
    index = Index(str(root / ".tartape" / "index.db"))
    try:
        return list(shard_starts(index, size))
    finally:
        index.close()


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    return root


@pytest.mark.parametrize("digest", ["", "sha256"])
@pytest.mark.parametrize("seed", range(2))
def test_every_shard_has_as_many_samples_as_fit(samples: Path, seed: int, digest: str) -> None:
    fill(samples, 120, seed)
    TapeRecorder(samples, digest=digest).commit()
    reference = Reference(samples)
    archive = reference.read(0, reference.size)
    for size in SIZES:
        assert starts(samples, size) == [start for start, _ in cut(archive, size)]
    for start, stop in cut(archive, 20_000)[
        -3:
    ]:  # an archive that ends exactly where a shard is full, or one byte later
        for size in (stop - start + 1024, stop - start + 1023):
            assert starts(samples, size) == [start for start, _ in cut(archive, size)]


def test_a_long_sample_is_one_shard(samples: Path) -> None:
    """Of more members than a row of the index has, and with others before and behind it."""
    for number in range(200):
        (samples / f"frame.{number:03}.jpg").write_bytes(bytes(600))
    for name in ("a.jpg", "a.txt", "z.jpg"):
        (samples / name).write_bytes(bytes(600))
    TapeRecorder(samples).commit()
    reference = Reference(samples)
    assert starts(samples, 10_000) == [
        0, reference.starts[b"data/frame.000.jpg"], reference.starts[b"data/z.jpg"]
    ]  # fmt: skip


def test_shards_stay_when_the_folder_grows(samples: Path) -> None:
    """All but the last, and that is not cut shorter, also if a sample seems to go on in the next generation."""
    expected = Generations(samples)
    before = list[tuple[int, int]]()
    for number, name in enumerate(["m.a", "m.b", "a.jpg", "m.c", "z.jpg", "z.txt"]):
        fill(samples / f"{number}", 10, number)
        (samples / name).write_bytes(bytes(3000))
        TapeRecorder(samples, append=number > 0).commit()
        archive = expected.append()
        found = cut(archive, 9000, {0, *expected.ends})
        assert starts(samples, 9000) == [start for start, _ in found]
        if before:
            assert found[: len(before) - 1] == before[:-1]
            assert found[len(before) - 1][0] == before[-1][0] and found[len(before) - 1][1] >= before[-1][1]
        before = found


def test_a_sample_ends_with_its_generation(samples: Path) -> None:
    """Even where no folder's header lies between the members of one stem."""
    (samples / "z.a").write_bytes(bytes(600))
    TapeRecorder(samples).commit()
    found = samples.stat()
    (samples / "z.b").write_bytes(bytes(600))

    os.utime(samples, ns=(found.st_atime_ns, found.st_mtime_ns))
    TapeRecorder(samples, append=True).commit()
    assert starts(samples, 1) == [0, 512, 512 + 1536]


def test_too_many(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names a size that is enough."""
    fill(samples, 120, 1)
    TapeRecorder(samples).commit()
    for most in (2, 3, 7, 20):
        monkeypatch.setattr(module, "MOST_PARTS", most)
        monkeypatch.setattr(module, "_found", {})
        with pytest.raises(ValueError, match="are always enough") as caught:
            starts(samples, 1)
        enough = int(str(caught.value).split(";")[1].split()[0].replace(",", ""))
        assert 0 < len(starts(samples, enough)) <= most
    with pytest.raises(ValueError, match="at least 1"):
        starts(samples, 0)


def test_they_are_found_once(samples: Path) -> None:
    """By whoever opens one shard after the other by its name; and again after a new recording."""
    fill(samples, 50, 1)
    TapeRecorder(samples).commit()
    index, told = Index(str(samples / ".tartape" / "index.db")), list[int]()
    assert shard_starts(index, 5000, told.append) == shard_starts(index, 5000, told.append) == array("q", told)
    index.close()
    (samples / "000000").write_bytes(bytes(4000))
    TapeRecorder(samples, overwrite=True).commit()
    reference = Reference(samples)
    assert starts(samples, 5000) == [start for start, _ in cut(reference.read(0, reference.size), 5000)]


def test_a_tape_with_hard_links_has_none(samples: Path) -> None:
    """A reader of one shard would miss what lies in another, and webdataset skips links without a word."""
    fill(samples, 5, 0)
    TapeRecorder(samples, hard_links=True).commit()
    with pytest.raises(ValueError, match="record --force --no-hard-links"):
        starts(samples, 10**6)
    TapeRecorder(samples, overwrite=True, hard_links=False).commit()
    assert starts(samples, 10**6) == [0]
