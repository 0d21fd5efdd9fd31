"""What is read of a sealed tape belongs to it: contents decide, not times."""

import os
import random
import threading
from pathlib import Path

import pytest
from support.seals import BLOCK, MIXED, OLD_NS, flip, make, playing, sealed, whole

from tartapefs import TapeIntegrityError, TapePlayer


def test_every_byte_of_a_tape_flipped_in_turn(mixed: Path, tmp_path: Path) -> None:
    """No byte of another file's is ever served, though size and mtime are as recorded."""
    root = make(tmp_path / "small" / "data", [1, 3, 0, 40, 600])
    sealed(root)
    expected = whole(root)
    for path in sorted(path for path in root.rglob("0*") if path.is_file()):
        for at in range(path.stat().st_size):
            flip(path, at)
            with playing(root, check="mtime") as player:
                start = player.get_offset_of(os.path.relpath(path, root.parent)) + 512
                with pytest.raises(TapeIntegrityError, match=r"block 0 \(bytes 0 to .*timestamps do not show"):
                    player.read(start + at, 1)
                with pytest.raises(TapeIntegrityError):
                    player.read(0, 1)
            flip(path, at)
    with playing(root) as player:
        assert player.read(0, len(expected)) == expected


def test_random_flips_in_large_files(mixed: Path) -> None:
    """Whatever is read, at any offset and of any size: the recorded bytes, or an error, and that if it was hit."""
    expected, some = whole(mixed), random.Random(11)
    files = [path for path in mixed.rglob("0*") if path.is_file() and path.stat().st_size > BLOCK]
    refused = 0
    for _ in range(150):
        path = some.choice(files)
        at = some.randrange(path.stat().st_size)
        flip(path, at, 1 << some.randrange(8))
        with playing(mixed, check="mtime") as player:
            hit = player.get_offset_of(os.path.relpath(path, mixed.parent)) + 512 + at
            for _ in range(20):
                size = some.choice((1, 512, 4096, BLOCK, 200_000, 1 << 20))
                low = max(0, min(hit - some.randrange(-3000, size), len(expected) - 1))
                try:
                    assert player.read(low, size) == expected[low : low + size]
                    assert not low <= hit < low + size
                except TapeIntegrityError as error:
                    refused += 1
                    assert error.member == os.path.relpath(path, mixed.parent)
                    assert f"block {at // BLOCK} " in str(error)
                    break
        path.write_bytes(expected[hit - at : hit - at + path.stat().st_size])
        os.utime(path, ns=(OLD_NS, OLD_NS))
    assert refused > 100


def test_a_file_that_was_only_touched(mixed: Path) -> None:
    expected = whole(mixed)
    touched = mixed / "folder 000" / "00008"
    os.utime(touched)
    os.utime(mixed / "link", follow_symlinks=False)
    os.utime(mixed / "folder 001" / "00011")  # of no bytes
    with playing(mixed) as player:
        assert player.read(0, len(expected)) == expected
    with playing(mixed, strict=True) as player, pytest.raises(TapeIntegrityError, match="00008: mtime changed"):
        player.read(0, len(expected))
    with playing(mixed, strict=True) as player:
        start = player.get_offset_of("data/link")
        with pytest.raises(TapeIntegrityError, match="link: mtime changed"):
            player.read(start, 512)


def test_a_file_that_was_replaced_by_an_equal_one(tmp_path: Path) -> None:
    """At home, where inodes and change times count: contents decide there, too."""
    root = make(tmp_path / "data", MIXED)
    sealed(root)
    expected = whole(root)
    path = root / "folder 000" / "00010"
    same = path.read_bytes()
    path.rename(tmp_path / "away")
    path.write_bytes(same)
    os.utime(path.parent, ns=(OLD_NS, OLD_NS))
    with playing(root) as player:
        assert player.at_home
        start = player.get_offset_of("data/folder 000/00010")
        assert player.read(start, 200_000) == expected[start : start + 200_000]
        player.drift = None
    with playing(root, strict=True) as player, pytest.raises(TapeIntegrityError, match=r"00010: .*inode"):
        player.read(start, 512)


@pytest.mark.parametrize("change", ["size", "mode", "type", "gone"])
def test_what_contents_cannot_mend(mixed: Path, change: str) -> None:
    path = mixed / "folder 000" / "00008"
    match change:
        case "size":
            with path.open("ab") as file:
                file.write(b"x")
        case "mode":
            path.chmod(0o600)
        case "type":
            path.unlink()
            path.symlink_to("00009")
        case "gone":
            path.unlink()
    with playing(mixed) as player:
        start = player.get_offset_of("data/folder 000/00008")
        for offset in (start, start + 600):
            with pytest.raises(TapeIntegrityError, match=r"folder 000/00008: "):
                player.read(offset, 100)


def test_a_folder_that_has_more(mixed: Path) -> None:
    """A name that was added counts, whatever contents say."""
    with playing(mixed) as player:
        (mixed / "folder 001" / "more").touch()
        start = player.get_offset_of("data/folder 001")
        with pytest.raises(TapeIntegrityError, match="folder 001: mtime changed"):
            player.read(start, 512)


def test_a_change_of_a_file_of_which_a_block_is_kept(tmp_path: Path) -> None:
    """What is kept for the neighbouring reads hides no change that the file's times show."""
    root = make(tmp_path / "data", [300_000])
    sealed(root)
    with playing(root) as player:
        start = player.get_offset_of("data/folder 000/00000") + 512
        assert player.read(start + 5, 10)
        flip(root / "folder 000" / "00000", 7)
        with pytest.raises(TapeIntegrityError, match=r"block 0 .*; ctime changed"):
            player.read(start + 5, 10)


def test_many_threads_read_one_large_file(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [BLOCK * 60 + 99])
    sealed(root)
    expected = whole(root)
    wrong: list[object] = []

    def in_order(player: TapePlayer, size: int) -> None:
        try:
            for at in range(0, len(expected), size):
                if player.read(at, size) != expected[at : at + size]:
                    wrong.append(at)
        except BaseException as error:
            wrong.append(error)

    with playing(root) as player:
        threads = [threading.Thread(target=in_order, args=(player, size)) for size in (1 << 20, 100_000, 70_001, 4096)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_damage_that_was_read_ahead_is_an_error_when_it_is_asked_for(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [BLOCK * 60])
    sealed(root)
    expected = whole(root)
    flip(root / "folder 000" / "00000", BLOCK * 30 + 5)
    served = 0
    with playing(root, check="mtime") as player, pytest.raises(TapeIntegrityError, match="block 30 "):
        for at in range(0, len(expected), 200_000):
            assert player.read(at, 200_000) == expected[at : at + 200_000]
            served = at + 200_000
    assert BLOCK * 25 < served < BLOCK * 31
