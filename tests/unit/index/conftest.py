"""Recorded folders for the tests of the index."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.damaged_index import index_of
from support.pack_trees import TREES, recorded_tree

from tartapefs import Tape, TapeRecorder, cli
from tartapefs.base import signals
from tartapefs.index import row_codec


def record(root: Path) -> Path:
    """Some files, a link, folders in folders; in packs of three, so that there is more than one."""
    (root / "a" / "deep" / "er").mkdir(parents=True)
    (root / "a" / "deep" / "er" / "file").write_bytes(b"x" * 700)
    (root / "b").write_bytes(b"y" * 512)
    (root / "c").symlink_to("b")
    (root / "d").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_codec, "MOST", 3)
        TapeRecorder(root).commit()
    return root


def facts(root: Path) -> list[tuple[object, ...]]:
    """Of the files of its tape; what is in them aside."""
    folder = root / ".tartape"
    return [(name, (folder / name).lstat().st_ino, (folder / name).lstat().st_mode) for name in os.listdir(folder)]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A recorded folder, see `record`."""
    return record(tmp_path / "data")


@pytest.fixture(scope="session")
def _damageable(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    made: list[tuple[Path, object, bytes]] = []

    def damageable() -> Path:
        if made:
            root, before, content = made[-1]
            if facts(root) == before:
                index_of(root).write_bytes(content)
                return root
        root = record(tmp_path_factory.mktemp("damageable") / "data")
        made.append((root, facts(root), index_of(root).read_bytes()))
        return root

    return damageable


@pytest.fixture
def damageable(_damageable: Callable[[], Path]) -> Path:
    """The same folder, of which a test may change only the index; most of them leave it where it is."""
    return _damageable()


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`program(*arguments)` is `tartapefs` in this process: its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGPIPE, *signals.ENDING)}

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tartapefs", *map(os.fspath, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    yield run
    gc.collect()  # what the program left to the end of its process
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", params=[f"{name}, {kind}" for name in TREES for kind in ("bare", "sealed")])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder of each of the trees, bare and sealed."""
    name, _, kind = request.param.partition(", ")
    return recorded_tree(tmp_path_factory.mktemp("packs") / "tree", TREES[name], kind == "sealed")


@pytest.fixture
def tape(root: Path) -> Iterator[Tape]:
    with Tape.discover(root) as tape:
        yield tape
