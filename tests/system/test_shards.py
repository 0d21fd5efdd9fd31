"""The archive in shards, on a real mount and by URL: bytes, names, attributes, and what programs for training read."""

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import webdataset as wds
from support.generations import Generations
from support.programs import done, run
from support.readme import README, Scratch
from support.readme import scratch as scratch
from support.reference import Reference
from support.shards import fill, shards

import tartapefs.webdataset  # noqa: F401  # as docs/webdataset.md says

pytestmark = pytest.mark.fuse
SIZE = 20_000

Mount = Callable[..., Path]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A recorded folder of samples of one or more files."""
    root = tmp_path / "data"
    for number in range(120):
        folder = root / f"class.{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        for ending in ("bin", "cls", "meta.json")[: 1 + number % 3]:
            (folder / f"{number:03}.{ending}").write_bytes(os.urandom(number * 40))
    done(run("record", root))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [(), ("--direct",)], ids=["cached", "direct"])
def test_shards_are_archives(tmp_path: Path, mount: Mount, options: tuple[str, ...]) -> None:
    """For GNU tar, too; together they have the archive's members, before an append and after it."""
    root = tmp_path / "data"
    root.mkdir()
    fill(root, 80, 1)
    done(run("record", root))
    generations, before = Generations(root), dict[str, bytes]()
    generations.append()
    for time in range(2):
        if time:
            fill(root / "new", 20, 2)
            done(run("record", root, "--append"))
            generations.append()
        expected = shards(generations.archive, SIZE, {0, *generations.ends})
        folder = mount(root, "--shard-size", str(SIZE), *options).parent
        found = contents(folder)
        assert found == {f"archive.{at:05}.tar": shard for at, shard in enumerate(expected, 1)}
        assert [path.stat().st_size for path in sorted(folder.iterdir())] == list(map(len, expected))
        listed = b"".join(
            subprocess.run(["tar", "-tf", folder / name], check=True, capture_output=True).stdout
            for name in sorted(found)
        )
        assert listed.splitlines() == [name for names in generations.names for name in names]
        assert all(found[name] == before[name] for name in sorted(before)[:-1])
        before = found
    assert os.getxattr(folder, "user.tartape.parts") == str(len(expected)).encode()
    assert os.getxattr(folder, "user.tartape.shard_size") == str(SIZE).encode()


def test_drift_fails_every_shard(samples: Path, mount: Mount) -> None:
    folder = mount(samples, "--shard-size", str(SIZE)).parent
    (samples / "class.1" / "001.bin").write_bytes(b"other")
    with pytest.raises(OSError, match="Input/output error"):
        contents(folder)
    with pytest.raises(OSError, match="Input/output error"):
        (folder / "archive.00001.tar").open("rb")


def read_share(worker: int, workers: int, urls: list[str]) -> list[tuple[str, str, bytes]]:
    """What webdataset reads in one of several workers: of each sample, its key, and each file's ending and content."""
    os.environ |= {"WORKER": str(worker), "NUM_WORKERS": str(workers)}
    found = []
    for sample in wds.WebDataset(urls, shardshuffle=False):
        found += [(sample["__key__"], name, data) for name, data in sample.items() if name[:2] != "__"]
    return found


@pytest.fixture(params=["mount", "url"])
def urls(request: pytest.FixtureRequest, samples: Path, mount: Mount) -> Iterator[list[str]]:
    if request.param == "mount":
        folder = mount(samples, "--shard-size", str(SIZE)).parent
        yield [str(path) for path in sorted(folder.iterdir())]
        return
    reference = Reference(samples)
    count = len(shards(reference.read(0, reference.size), SIZE))
    yield [f"tartape://{samples}/shard_size={SIZE}/archive.{number:05}.tar" for number in range(1, count + 1)]


def test_webdataset_reads_every_sample_once(samples: Path, urls: list[str]) -> None:
    """In several workers, each of which has a share of the shards."""
    workers = 3
    assert len(urls) > 2 * workers
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        shares = list(pool.map(read_share, range(workers), [workers] * workers, [urls] * workers))
    assert all(shares)
    found = sorted((f"{key}.{ending}", data) for share in shares for key, ending, data in share)
    files = [path for path in samples.rglob("*") if path.is_file() and ".tartape" not in path.parts]
    assert found == sorted((str(path.relative_to(samples.parent)), path.read_bytes()) for path in files)
    keys = [{key for key, _, _ in share} for share in shares]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 120


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset closes nothing
def test_the_page_as_printed(scratch: Scratch, capsys: pytest.CaptureFixture[str]) -> None:
    scratch.run_all((README.parent / "docs" / "webdataset.md").read_text())
    assert capsys.readouterr().out.splitlines() == [f"data/photos/{number} 700000" for number in [0, 1, 2, 3]] * 2
    assert len(scratch.names["urls"]) == 4  # type: ignore[arg-type]
