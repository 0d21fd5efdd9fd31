"""Ray reads the archive by its URL: tasks in several processes, ranges, `ray.data`. `make clients` runs this."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
import pytest
import ray
from support.reference import Reference

from tartapefs import TapeIntegrityError, TapeRecorder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A local instance of two worker processes."""
    workers = {"env_vars": {"PYTHONPATH": os.fspath(Path(__file__).parents[1])}}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            runtime_env=workers,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """In the place of what all other tests have: Ray keeps descriptors and processes until its end."""


@pytest.fixture
def root(tree: Path) -> Path:
    (tree / "larger.bin").write_bytes(os.urandom(3_000_001))
    TapeRecorder(tree).commit()
    return tree


def whole(root: Path) -> bytes:
    reference = Reference(root)
    return reference.read(0, reference.size)


def read(url: str, start: int, stop: int) -> tuple[int, bytes]:
    with fsspec.open(url, block_size=1 << 16) as file:
        file.seek(start)
        return os.getpid(), file.read(stop - start)


def test_tasks_read_ranges(root: Path) -> None:
    archive, url = whole(root), f"tartape://{root}/archive.tar"
    task: Any = ray.remote(read)
    starts = range(0, len(archive), 100_000)
    got = ray.get([task.remote(url, start, min(start + 100_000, len(archive))) for start in starts])
    assert b"".join(data for _, data in got) == archive
    assert {pid for pid, _ in got}.isdisjoint({os.getpid()})


def test_a_file_system_crosses_to_tasks(root: Path) -> None:
    fs = fsspec.filesystem("tartape")
    task: Any = ray.remote(lambda fs, path: fs.cat_file(path, -1024, None))
    assert ray.get(task.remote(fs, f"{root}/archive.tar")) == bytes(1024)


def test_ray_data(root: Path) -> None:
    """As docs/python.md has it."""
    arrow = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("tartape")))
    rows = ray.data.read_binary_files(f"{root}/archive.tar", filesystem=arrow, include_paths=True).take_all()
    assert [bytes(row["bytes"]) for row in rows] == [whole(root)]
    assert rows[0]["path"].endswith("data/archive.tar")


def test_drift_comes_through(root: Path) -> None:
    (root / "larger.bin").write_bytes(b"other")
    task: Any = ray.remote(max_retries=0)(read)
    with pytest.raises(TapeIntegrityError, match=r"larger\.bin"):
        ray.get(task.remote(f"tartape://{root}/archive.tar", 1_000_000, 1_100_000))
