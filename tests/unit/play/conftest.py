"""A small recorded folder, its archive, and a player of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.recordings import whole
from support.trees import pattern

from tartapefs import Tape, TapePlayer, TapeRecorder
from tartapefs.source import folder as source


@pytest.fixture(params=[True, False], ids=["openat2", "by component"])
def way_to_open(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Files are opened by one system call, or as on a kernel that does not have it."""
    if request.param and not source.has_openat2():
        pytest.skip("this kernel has no openat2")
    monkeypatch.setattr(source, "has_openat2", lambda: request.param)
    return bool(request.param)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recorded folder whose archive is of some 20 KiB and has each kind of segment, next to each other kind."""
    root = tmp_path / "data"
    (root / "photos" / "2024").mkdir(parents=True)
    (root / "empty folder").mkdir()
    for size in (0, 1, 511, 512, 513, 1024):
        (root / "photos" / f"{size}").write_bytes(pattern(size))
    (root / "photos" / "2024" / "a").write_bytes(pattern(3000))
    (root / "photos" / "2024" / "b").write_bytes(pattern(700))
    (root / "link").symlink_to("photos/512")
    (root / "z").write_bytes(pattern(1500))
    TapeRecorder(root).commit()
    return root


@pytest.fixture
def player(small: Path) -> Iterator[TapePlayer]:
    with Tape.discover(small) as tape:
        player = TapePlayer(tape, source_root=small)
        yield player
        player.close()


@pytest.fixture
def archive(small: Path) -> bytes:
    """The archive that the small folder has."""
    return whole(small)
