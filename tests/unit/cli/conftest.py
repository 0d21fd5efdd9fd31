"""Folders that tests of several commands read."""

import os
from pathlib import Path

import pytest
from support.command_line import grow
from support.programs import done, run
from support.reference import Reference


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder that no test changes."""
    root = grow(tmp_path_factory.mktemp("cli") / "data")
    done(run("record", root))
    return root


@pytest.fixture(scope="session")
def reference(data: Path) -> Reference:
    return Reference(data)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of one file, not recorded."""
    root = tmp_path / "small"
    root.mkdir()
    (root / "file").write_bytes(b"content")
    return root


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that takes a while to record. Its files are links to one, which are quickly made."""
    root = tmp_path_factory.mktemp("many") / "many"
    root.mkdir()
    (root / "0").write_bytes(b"")
    for number in range(1, 30_000):
        os.link(root / "0", root / f"{number}")
    return root


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder whose archive no pipe can hold, nor its events, of many small files and a large one."""
    root = tmp_path_factory.mktemp("large") / "large"
    root.mkdir()
    for number in range(500):
        (root / f"{number:03}").write_bytes(b"%d" % number)
    with open(root / "sparse", "wb") as file:
        file.truncate(64 << 20)
    done(run("record", root))
    return root
