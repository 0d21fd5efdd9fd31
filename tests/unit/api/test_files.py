"""The files that an archive is shown as, computed from their numbers."""

import bisect
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tartapefs.api import files as module
from tartapefs.api.files import Files


def tape(total: int, *generations: tuple[int, int]) -> Any:
    """A tape of `total` bytes with these generations: where each starts, and when it was recorded."""
    found = [SimpleNamespace(start=start, recorded_ns=recorded) for start, recorded in generations or [(0, 7)]]
    return SimpleNamespace(total_size=total, generations=found)


def test_the_archive_is_one_file() -> None:
    files = Files(tape(10_240, (0, 7), (5120, 9)), "archive.tar", None)
    assert (files.count, files.extent(0).size, files.is_split) == (1, 10_240, False)
    assert (files.name_of(0), files.extent(0), files.inode(0), files.recorded_ns(0)) == (
        "archive.tar", (0, 10_240, 0), 2, 9
    )  # fmt: skip
    assert files.find(b"archive.tar") == 0
    assert files.find(b"archive.tar.00001") is None


@pytest.mark.parametrize("size", [1, 511, 1000, 1024, 4096, 10_239, 10_240, 10_241, 2**62])
def test_parts_are_the_archive_in_order(size: int) -> None:
    files = Files(tape(10_240), "a", size)
    bounds = [files.extent(at)[:2] for at in range(files.count)]
    assert [byte for start, stop in bounds for byte in range(start, stop)] == list(range(10_240))
    assert {stop - start for start, stop in bounds[:-1]} <= {size}
    names = [files.name_of(at) for at in range(files.count)]
    assert names == sorted(names) and names[0] == "a.00001"
    assert [files.find(name.encode()) for name in names] == list(range(files.count))
    assert len({files.inode(at) for at in range(files.count)} | {1}) == files.count + 1
    assert files.find(b"a") is files.find(b"a.%05d" % (files.count + 1)) is files.find(b"a.00000") is None


def test_names_are_bytes() -> None:
    files = Files(tape(10_240), "\udcff\n", 5000)
    assert files.find(b"\xff\n.00003") == 2
    assert files.find(b"\xff\n.00004") is files.find("ÿ\n.00003".encode()) is None


def changed(before: bytes, after: bytes, size: int, at: int) -> bool:
    """Whether part `at` of `after` is not that of `before`."""
    return before[at * size : (at + 1) * size] != after[at * size : (at + 1) * size]


@pytest.mark.parametrize("size", [100, 511, 512, 1000, 1024, 1536, 5000, 10**6])
def test_the_time_of_a_part_is_that_of_the_generation_that_changed_it_last(size: int) -> None:
    """By comparing the archive after each generation with the one before; the footer is of zeros, nothing else."""
    chance = random.Random(size)
    archive, begins, last_changed = b"", [], dict[int, int]()
    for when in range(1, 20):
        begins.append((max(0, len(archive) - 1024), when))
        after = archive[:-1024] + bytes([when]) * 512 * chance.randint(1, 9) + bytes(1024)
        last_changed |= {at: when for at in range(-(-len(after) // size)) if changed(archive, after, size, at)}
        archive = after
        files = Files(tape(len(archive), *begins), "a", size)
        found = {at: files.recorded_ns(at) for at in range(files.count)}
        # A part that has only zeros of the footer did not change; it is of the last generation all the same.
        of_footer = bisect.bisect_left([files.extent(at)[:2][0] for at in found], len(archive) - 1024)
        assert {at: found[at] for at in found if at < of_footer} == {
            at: last_changed[at] for at in found if at < of_footer
        }
        assert {found[at] for at in found if at >= of_footer} <= {when}


def test_the_last_number_and_no_more() -> None:
    files = Files(tape(99_999 * 512), "a", 512)
    assert (files.count, files.name_of(99_998), files.find(b"a.99999")) == (99_999, "a.99999", 99_998)
    with pytest.raises(ValueError, match="more than 99,999; a part needs 512 bytes or more"):
        Files(tape(99_999 * 512), "a", 511)
    with pytest.raises(ValueError, match="at least 1"):
        Files(tape(1024), "a", 0)


def test_many_parts_take_the_memory_of_one_file() -> None:
    def held(files: Files) -> int:
        return sum(map(sys.getsizeof, vars(files).values()))

    one, many = Files(tape(99_999 * 512), "a", None), Files(tape(99_999 * 512), "a", 512)
    assert held(many) <= held(one) + 64


def test_shards_are_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one ends with the archive's own footer."""
    monkeypatch.setattr(module, "shard_starts", lambda tape, size: [0, 2048, 5120])
    files = Files(tape(10_240, (0, 7), (5120, 9)), "photos.tar", shard_size=3500)
    assert [files.extent(at) for at in range(files.count)] == [(0, 2048, 1024), (2048, 5120, 1024), (5120, 10_240, 0)]
    assert [files.name_of(at) for at in range(3)] == [f"photos.0000{number}.tar" for number in (1, 2, 3)]
    assert [files.find(files.name_of(at).encode()) for at in range(3)] == [0, 1, 2]
    assert files.find(b"photos.tar") is files.find(b"photos.00004.tar") is files.find(b"photos.tar.00001") is None
    assert [files.recorded_ns(at) for at in range(3)] == [7, 7, 9]
    with pytest.raises(ValueError, match="parts or in shards"):
        Files(tape(10_240), "a", 512, 512)
