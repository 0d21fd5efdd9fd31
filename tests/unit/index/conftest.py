"""Recorded folders for the tests of the index."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.pack_trees import TREES, recorded_tree

from tartapefs import Tape, TapeRecorder, cli
from tartapefs.base import signals
from tartapefs.index import row_codec


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recorded folder: some files, a link, folders in folders; in packs of three, so that there is more than one."""
    root = tmp_path / "data"
    (root / "a" / "deep" / "er").mkdir(parents=True)
    (root / "a" / "deep" / "er" / "file").write_bytes(b"x" * 700)
    (root / "b").write_bytes(b"y" * 512)
    (root / "c").symlink_to("b")
    (root / "d").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(row_codec, "MOST", 3)
        TapeRecorder(root).commit()
    return root


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`program(*arguments)` is `tartapefs` in this process: its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGPIPE, *signals.ENDING)}

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tartapefs", *map(os.fspath, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    gc.freeze()  # of all that thousands of tests have, nothing is looked at below
    yield run
    gc.collect()  # what the program left to the end of its process
    gc.unfreeze()
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
