"""Fixtures that tests of several packages share."""

import shutil
from pathlib import Path

import pytest
from support.seals import MIXED, make, sealed

from tartapefs.base import commands


@pytest.fixture(scope="session")
def _mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make(tmp_path_factory.mktemp("mixed") / "data", MIXED)
    sealed(root)
    return root


@pytest.fixture
def mixed(_mixed: Path, tmp_path: Path) -> Path:
    """A sealed tape of files of all kinds of sizes; it was copied here, so it is not at home."""
    return Path(shutil.copytree(_mixed, tmp_path / "data", symlinks=True))


@pytest.fixture(autouse=True)
def _no_folder_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that a test calls in this process tells its folder, which no message of a later test may name."""
    monkeypatch.setattr(commands, "_given", ())
