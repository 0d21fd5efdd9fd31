"""What an audit finds, and with which share of a core."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.changes import add_file, add_file_keeping_times, below, remove
from support.recordings import player_of, record

from tartapefs import TapeIntegrityError
from tartapefs.play.audit import Throttle, audit

PHOTOS, DEEP = "data/photos", "data/photos/2024"


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "file added": (below("photos", add_file), PHOTOS),
    "file added in the root": (add_file, "data"),
    "file added deep down": (below("photos/2024", add_file), DEEP),
    "file added in an empty folder": (below("empty-folder", add_file), "data/empty-folder"),
    "link added": (lambda root: (root / "photos" / "new").symlink_to("1.bin"), PHOTOS),
    "hard link added": (lambda root: os.link(root / "script.sh", root / "photos" / "new"), PHOTOS),
    "folder added": (lambda root: (root / "photos" / "new").mkdir(), PHOTOS),
    "folder named as the index's added deep down": (lambda root: (root / "photos" / ".tartape").mkdir(), PHOTOS),
    "file removed": (below("photos/1.bin", remove), PHOTOS),
    "link removed": (below("dangling", remove), "data"),
    "empty folder removed": (below("empty-folder", remove), "data"),
    "folder removed": (below("photos/2024", remove), PHOTOS),
    "file renamed": (lambda root: (root / "photos" / "1.bin").rename(root / "photos" / "2.bin"), PHOTOS),
    "file replaced by rename": (lambda root: (root / "photos" / "1.bin").rename(root / "photos" / "511.bin"), PHOTOS),
    "file moved away": (lambda root: (root / "photos" / "1.bin").rename(root.parent / "1.bin"), PHOTOS),
    "folder renamed": (lambda root: (root / "photos" / "2024").rename(root / "photos" / "2025"), PHOTOS),
    "folder moved within": (lambda root: (root / "photos" / "2024").rename(root / "empty-folder" / "2024"), "data"),
    "folder swapped for a link to it": (
        lambda root: (
            (root / "photos" / "2024").rename(root.parent / "2024"),
            (root / "photos" / "2024").symlink_to(root.parent / "2024"),
        ),
        PHOTOS,
    ),
    "mode of a folder": (below("photos/2024", os.chmod, 0o700), DEEP),
    "file added, mtime put back": (below("photos", add_file_keeping_times), PHOTOS),
    "the source moved away": (lambda root: root.rename(root.parent / "moved"), "data"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_directory_is_found(tree: Path, name: str) -> None:
    """It names a directory that differs, and makes the tape invalid for good."""
    (tree / "photos" / "2024").chmod(0o755)
    expected = record(tree)
    change, culprit = CHANGES[name]
    with player_of(tree) as player:
        player.audit()
        assert player.drift is None
        assert player.read(0, len(expected)) == expected
        change(tree)
        with pytest.raises(TapeIntegrityError) as caught:
            player.audit()
        if name == "folder moved within":
            assert caught.value.member in ("data", "data/empty-folder", PHOTOS)
        else:
            assert caught.value.member == culprit
        assert str(caught.value).startswith(f"{caught.value.member}: ")
        with pytest.raises(TapeIntegrityError):
            player.read(0, 1)


def test_what_an_audit_does_not_look_at(tree: Path) -> None:
    """A file rewritten in place changes no directory; it is found when it is read."""
    record(tree)
    with player_of(tree) as player, (tree / "photos" / "5000.bin").open("r+b") as file:
        file.write(b"x")
        file.flush()
        player.audit()
        with pytest.raises(TapeIntegrityError):
            player.read(player.get_offset_of("data/photos/5000.bin"), 512)


@pytest.mark.parametrize(
    ("share", "rest"),
    [(1.0, 0.0), (0.5, 1.0), (0.05, 19.0), (1e-9, None)],
)
def test_the_share_limits_the_processor_time(share: float, rest: float | None) -> None:
    """At 5 % the thread rests 19 times as long as it works: after 10 ms of work, and for an hour at most."""
    worked, pauses = 0.0, []
    throttle = Throttle(share, pauses.append, lambda: worked)
    for _ in range(1000):
        worked += 0.001
        throttle()
    if rest is None:
        assert set(pauses) == {3600.0}
    elif rest:
        assert sum(pauses) == pytest.approx(rest * worked, rel=0.02)  # no rest after the last stretch of work
        assert 85 <= len(pauses) <= 100
    else:
        assert pauses == []


@pytest.mark.parametrize("share", [0, -0.1, 1.01])
def test_no_share(share: float) -> None:
    with pytest.raises(ValueError, match="a share of one core is above 0"):
        Throttle(share)


def test_an_audit_is_throttled_at_every_directory(tree: Path) -> None:
    record(tree)
    calls: list[None] = []
    with player_of(tree) as player:
        audit(player.inspector, lambda: calls.append(None))
        assert len(calls) == len(list(player.tape.folders())) == 4
