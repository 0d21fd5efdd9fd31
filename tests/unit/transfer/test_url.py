"""The archive by URL: what fsspec, pyarrow and Dask read of it, in ranges, from many threads and processes."""

import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from random import Random
from typing import Any

import dask.bytes
import fsspec
import pyarrow.fs
import pytest
from fsspec.asyn import get_loop
from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests
from support.reference import Reference
from support.shards import fill, shards

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.transfer.url import TapeFileSystem


@pytest.fixture
def root(tree: Path) -> Path:
    TapeRecorder(tree).commit()
    return tree


@pytest.fixture
def archive(root: Path) -> bytes:
    reference = Reference(root)
    return reference.read(0, reference.size)


@pytest.fixture
def fs() -> Iterator[TapeFileSystem]:
    yield fsspec.filesystem("tartape")
    TapeFileSystem.clear_instance_cache()


@pytest.fixture(autouse=True, scope="module")
def kept_by_libraries() -> None:
    """Descriptors that they open once, and keep as long as Python runs."""
    resource_tracker.ensure_running()
    get_loop()


def url_of(root: Path) -> str:
    return f"tartape://{root}/archive.tar"


def ranges(size: int, count: int) -> list[tuple[int, int]]:
    random = Random(1)
    return [(start := random.randrange(size), random.randrange(start, size + 1)) for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"block_size": 1000}, {"block_size": 4096, "cache_type": "blockcache"}])
def test_opened_by_url(root: Path, archive: bytes, options: dict[str, Any]) -> None:
    with fsspec.open(url_of(root), "rb", **options) as file:
        for start, stop in ranges(len(archive), 50):
            file.seek(start)
            assert file.read(stop - start) == archive[start:stop]
        file.seek(0)
        assert file.read() == archive


def test_registered_by_its_package(root: Path, archive: bytes) -> None:
    """Nothing of tartapefs has to be imported."""
    code = "import fsspec, sys; sys.stdout.buffer.write(fsspec.open(sys.argv[1]).open().read())"
    assert subprocess.run([sys.executable, "-c", code, url_of(root)], capture_output=True).stdout == archive


def test_block_size_is_what_is_read_at_once(root: Path, fs: TapeFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    with fs.open(url_of(root), block_size=10_000) as file:
        asked: list[int] = []
        fetch = file.cache.fetcher
        monkeypatch.setattr(file.cache, "fetcher", lambda start, stop: asked.append(stop - start) or fetch(start, stop))
        file.read(1)
        file.read(9000)
    assert asked == [10_001]


def test_ranges_from_many_threads(root: Path, fs: TapeFileSystem, archive: bytes) -> None:
    url, wanted = url_of(root), ranges(len(archive), 200)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda pair: fs.cat_file(url, *pair), wanted))
    assert got == [archive[start:stop] for start, stop in wanted]
    starts, stops = map(list, zip(*wanted, strict=True))
    assert fs.cat_ranges([url] * len(wanted), starts, stops) == got
    assert fs.cat_file(url, -1536, -1000) == archive[-1536:-1000]


def test_a_range_is_read_without_what_follows(root: Path, fs: TapeFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    read = TapePlayer.read
    monkeypatch.setattr(TapePlayer, "read", lambda self, *range: asked.append(range) or read(self, *range))
    fs.cat_file(url_of(root), 1000, 1700)
    assert asked == [(1000, 700)]


def test_what_is_there(root: Path, fs: TapeFileSystem, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded folder holds its archive and nothing else; whatever is not recorded is not there."""
    path = f"{root}/archive.tar"
    assert fs.ls(str(root), detail=False) == fs.ls(path, detail=False) == fs.find(str(root)) == [path]
    info = fs.info(path)
    assert (info["type"], info["size"], fs.size(path)) == ("file", len(archive), len(archive))
    assert (fs.isdir(str(root)), fs.isfile(path), fs.exists(f"{root}/photos")) == (True, True, False)
    for missing in (root / "photos", root / "photos" / "archive.tar", root.parent):
        for call in (fs.ls, fs.info, fs.open):
            with pytest.raises(FileNotFoundError):
                call(str(missing))
    with pytest.raises(IsADirectoryError):
        fs.open(str(root))
    monkeypatch.chdir(root.parent)
    assert fs.cat("tartape://data/archive.tar") == archive


def test_nothing_can_be_written(root: Path, fs: TapeFileSystem) -> None:
    url = url_of(root)
    calls: list[Callable[[], Any]] = [
        lambda: fs.open(url, "wb"),
        lambda: fs.open(url, "ab"),
        lambda: fs.pipe_file(url, b"x"),
        lambda: fs.touch(url),
        lambda: fs.rm(url),
        lambda: fs.cp_file(url, url + "2"),
    ]
    for call in calls:
        with pytest.raises((OSError, NotImplementedError)):
            call()


def test_options(root: Path, archive: bytes, tmp_path: Path) -> None:
    """An index kept elsewhere, and a source whose inodes are not those recorded."""
    index = tmp_path / "index.db"
    (root / ".tartape" / "index.db").rename(index)
    copied = tmp_path / "copied" / "data"
    subprocess.run(["cp", "-a", root, copied.parent.parent / "copy"], check=True)
    copied.parent.mkdir()
    (tmp_path / "copy").rename(copied)
    with pytest.raises(FileNotFoundError):
        fsspec.open(url_of(root)).open()
    fs = TapeFileSystem(index=str(index), check="mtime", skip_instance_cache=True)
    assert pickle.loads(pickle.dumps(fs)).cat(url_of(root)) == archive
    assert fs.cat(url_of(copied)) == archive


def test_crosses_to_another_process(root: Path, fs: TapeFileSystem, archive: bytes) -> None:
    with fs.open(url_of(root), block_size=1000) as file:
        file.seek(1000)
        with pickle.loads(pickle.dumps(file)) as other:
            assert (other.tell(), other.blocksize) == (1000, 1000)
            assert other.read() == file.read() == archive[1000:]
    assert pickle.loads(pickle.dumps(fs)) == fs


def test_drift_and_a_new_recording(root: Path, fs: TapeFileSystem) -> None:
    """Drift comes through as it is; what is opened after a new recording is the new archive."""
    url, token = url_of(root), fs.ukey(url_of(root))
    with fs.open(url, cache_type="none") as file:
        (root / "photos" / "513.bin").write_bytes(b"other")
        with pytest.raises(TapeIntegrityError, match=r"photos/513\.bin"):
            file.read()
        with pytest.raises(TapeIntegrityError, match=r"photos/513\.bin"):
            file.seek(0)
            file.read(1)
    TapeRecorder(root, overwrite=True).commit()
    reference = Reference(root)
    assert fs.cat(url) == reference.read(0, reference.size)
    assert fs.ukey(url) != token


def test_pyarrow_reads_it(root: Path, fs: TapeFileSystem, archive: bytes) -> None:
    arrow = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    path, wanted = f"{root}/archive.tar", ranges(len(archive), 50)
    assert arrow.get_file_info(path).size == len(archive)
    with arrow.open_input_file(path) as file, ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda pair: file.read_at(pair[1] - pair[0], pair[0]), wanted))
    assert [bytes(piece) for piece in got] == [archive[start:stop] for start, stop in wanted]
    with arrow.open_input_stream(path) as stream:
        assert stream.read() == archive


def test_dask_reads_it_in_blocks(root: Path, archive: bytes) -> None:
    _, ((*blocks,),) = dask.bytes.read_bytes(url_of(root), blocksize=50_000, sample=False)
    assert len(blocks) == len(archive) // 50_000
    assert b"".join(dask.compute(*blocks, scheduler="processes", num_workers=2)) == archive


def test_copied_to_another_file_system(root: Path, archive: bytes, tmp_path: Path) -> None:
    fsspec.filesystem("generic").copy(url_of(root), f"file://{tmp_path}/copy.tar")
    assert (tmp_path / "copy.tar").read_bytes() == archive


def test_got_in_every_way(root: Path, fs: TapeFileSystem, archive: bytes, tmp_path: Path) -> None:
    """By name, as a folder, by a pattern, in a list."""
    path = f"{root}/archive.tar"
    out = tmp_path / "out"
    out.mkdir()
    fs.get(path, f"{out}/")
    fs.get(url_of(root), f"{out}/named/other.tar")
    fs.get(str(root), f"{out}/folder", recursive=True)
    fs.get(f"{root}/*.tar", f"{out}/pattern/")
    fs.get([path], f"{out}/list/")
    got = sorted(str(file.relative_to(out)) for file in out.rglob("*.tar"))
    assert got == [
        "archive.tar", "folder/archive.tar", "list/archive.tar", "named/other.tar", "pattern/archive.tar"
    ]  # fmt: skip
    assert all((out / name).read_bytes() == archive for name in got)
    assert (fs.glob(f"{root}/*"), fs.du(str(root))) == ([path], len(archive))
    assert list(fs.walk(str(root))) == [(str(root), [], ["archive.tar"])]


def test_its_time(root: Path, fs: TapeFileSystem) -> None:
    """That of the recording, to whoever asks: fsspec, pyarrow."""
    path = f"{root}/archive.tar"
    with Tape.discover(root) as tape:
        recorded = tape.recorded_ns
    assert abs(fs.modified(path).timestamp() * 10**9 - recorded) < 10_000
    arrow = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    assert abs(arrow.get_file_info(path).mtime_ns - recorded) < 10_000


def test_shards(tmp_path: Path, fs: TapeFileSystem) -> None:
    """In a folder for each size, which nobody has made."""
    root = tmp_path / "data"
    root.mkdir()
    fill(root, 60, 1)
    TapeRecorder(root).commit()
    reference = Reference(root)
    for text, size in (("10000", 10_000), ("64KiB", 65_536)):
        folder = f"{root}/shard_size={text}"
        expected = shards(reference.read(0, reference.size), size)
        names = [f"{folder}/archive.{number:05}.tar" for number in range(1, len(expected) + 1)]
        assert fs.ls(folder, detail=False) == fs.glob(f"{folder}/*.tar") == fs.find(folder) == names
        assert [fs.cat_file(name) for name in names] == expected
        assert [fs.size(name) for name in names] == list(map(len, expected))
        assert fs.isdir(folder) and fs.isfile(names[0]) and not fs.exists(f"{folder}/archive.tar")
        assert fs.cat_file(names[0], -1500, -500) == expected[0][-1500:-500]
        with fs.open(names[1]) as file, pickle.loads(pickle.dumps(file)) as other:
            assert other.read() == expected[1]
    for missing in (
        f"{names[-1][:-9]}99999.tar",
        f"{folder}/archive.tar.00001",
        f"{root}/shard_size=x/archive.00001.tar",
    ):
        for call in (fs.info, fs.open):
            with pytest.raises(FileNotFoundError):
                call(missing)
    assert fs.ls(str(root), detail=False) == [f"{root}/archive.tar"]


class TestConformance(AbstractFixtures, AbstractGetTests):
    """fsspec's own tests that apply: those of `get`, on members, through its `tar` over ours.

    The others (copy, mv, open, pipe, put) write to the file system.
    """

    @pytest.fixture
    def fs_path(self) -> str:
        return "scenario"

    @pytest.fixture
    def fs(self, tmp_path: Path, local_fs: Any) -> Iterator[Any]:
        """Builds each scenario in a folder, records it, and reads it out of the archive."""
        test = self
        folder = tmp_path / "scenario"
        folder.mkdir()

        class Recorded:
            """The file system under test, once it is asked to read; until then, the folder."""

            archive: Any = None

            def __getattr__(self, name: str) -> Any:
                if name in ("makedirs", "mkdir", "touch", "pipe"):
                    return lambda path, *rest, **named: test._write(
                        getattr(local_fs, name), tmp_path, path, rest, named
                    )
                if name == "rm":
                    return lambda *_, **__: None
                if self.archive is None:
                    TapeRecorder(folder).commit()
                    self.archive = fsspec.filesystem(
                        "tar", fo=str(folder / "archive.tar"), target_protocol="tartape", skip_instance_cache=True
                    )
                return getattr(self.archive, name)

        recorded = Recorded()
        yield recorded
        recorded.archive.fo.close()
        recorded.archive.tar.close()
        recorded.archive = None
        TapeFileSystem.clear_instance_cache()

    @staticmethod
    def _write(call: Any, below: Path, path: str, rest: tuple[Any, ...], named: dict[str, Any]) -> None:
        where = below / named.pop("path", path)
        where.parent.mkdir(parents=True, exist_ok=True)
        call(str(where), *rest, **named)


def test_tar_over_it(root: Path) -> None:
    """One member by its name, out of the archive, by a chain of URLs."""
    with fsspec.open(f"tar://data/photos/2024/large.bin::{url_of(root)}") as file:
        assert file.read() == (root / "photos" / "2024" / "large.bin").read_bytes()
    with fsspec.open(url_of(root)) as file, tarfile.open(fileobj=file) as archive:
        assert "data/photos/2024/large.bin" in archive.getnames()
    assert os.listdir(root / "empty-folder") == []
