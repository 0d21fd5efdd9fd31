"""A copy of an archive and its index, without the folder they were made from."""

import shutil
from pathlib import Path

import pytest
from support.seals import MIXED, index_of, make, sealed, whole


@pytest.fixture(scope="session")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive and an index, and nothing else of the folder that they were made from."""
    place = tmp_path_factory.mktemp("kept")
    root = make(place / "data", MIXED)
    sealed(root)
    (place / "copy.tar").write_bytes(whole(root))
    shutil.move(index_of(root), place / "index.db")
    shutil.move(root, place / "moved")
    return place


@pytest.fixture
def kept(_kept: Path, tmp_path: Path) -> Path:
    """A folder with `copy.tar`, `index.db`, and `moved`, which is what the archive was made from."""
    return Path(shutil.copytree(_kept, tmp_path / "kept", symlinks=True))
