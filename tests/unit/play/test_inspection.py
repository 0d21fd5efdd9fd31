"""A folder of which nothing but times differ is judged by its names: in audits, reads, `verify`, and mounted."""

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support import recordings
from support.programs import run

from tartapefs import TapeIntegrityError, TapePlayer
from tartapefs.play import inspection
from tartapefs.source.exclusion import recorded_exclusion
from tartapefs.source.folder import Folder

EXCLUDED = ["*.tmp", "/cache/", "!keep.tmp", "deep/er/*.bak"]
Change = Callable[[Path], object]


def record(tree: Path, **options: object) -> bytes:
    """Records the folder, with the index elsewhere; the archive that it must have."""
    return recordings.record(tree, tree.parent / "index.db", **options)


def player_of(tree: Path, check: str = "full") -> AbstractContextManager[TapePlayer]:
    return recordings.player_of(tree, check, tree.parent / "index.db")


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(path))


def put_back(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.with_name("other").rename(path)


AS_RECORDED: dict[str, Change] = {
    "an excluded file": lambda tree: (tree / "x.tmp").touch(),
    "an excluded file deep down": lambda tree: (tree / "photos" / "2024" / "x.tmp").touch(),
    "an excluded file in an empty folder": lambda tree: (tree / "empty-folder" / "0.tmp").touch(),
    "an excluded link": lambda tree: (tree / "photos" / "x.tmp").symlink_to("1.bin"),
    "an excluded folder": lambda tree: (tree / "cache" / "below").mkdir(parents=True),
    "an excluded name that sorts first": lambda tree: (tree / "!.tmp").touch(),
    "a pipe": lambda tree: os.mkfifo(tree / "photos" / "pipe"),
    "a socket": lambda tree: bind(tree / "photos" / "socket"),
    "a folder for an index": lambda tree: (tree / ".tartape").mkdir(),
    "added and removed": lambda tree: ((tree / "photos" / "new").mkdir(), (tree / "photos" / "new").rmdir()),
    "touched": lambda tree: os.utime(tree / "photos", (1, 1)),
    "mode and back": lambda tree: ((tree / "photos").chmod(0o700), (tree / "photos").chmod(0o755)),
    "a folder renamed and back": lambda tree: put_back(tree / "photos" / "2024"),
}

DIFFERS: dict[str, Change] = {
    "a file": lambda tree: (tree / "new").touch(),
    "a name that is excluded from exclusion": lambda tree: (tree / "keep.tmp").touch(),
    "a file named as an excluded folder": lambda tree: (tree / "cache").touch(),
    "a folder excluded in the root alone": lambda tree: (tree / "photos" / "cache").mkdir(),
    "a folder named as the index's deep down": lambda tree: (tree / "photos" / ".tartape").mkdir(),
    "a file named as the index's folder": lambda tree: (tree / ".tartape").touch(),
    "a name after all others": lambda tree: (tree / "photos" / "zzz").symlink_to("1.bin"),
    "removed": lambda tree: (tree / "photos" / "1.bin").unlink(),
    "the last one removed": lambda tree: (tree / "script.sh").unlink(),
    "made an excluded one": lambda tree: (tree / "script.sh").rename(tree / "script.tmp"),
    "a folder with all in it removed": lambda tree: shutil.rmtree(tree / "photos" / "2024"),
    "two files exchanged": lambda tree: (
        (tree / "photos" / "1.bin").rename(tree / "x.tmp"),
        (tree / "photos" / "511.bin").rename(tree / "photos" / "1.bin"),
        (tree / "x.tmp").rename(tree / "photos" / "511.bin"),
    ),
    "a folder swapped for a link to it": lambda tree: (
        (tree / "photos").rename(tree / "x.tmp"),
        (tree / "photos").symlink_to("x.tmp"),
    ),
    "a file swapped for a folder": lambda tree: ((tree / "script.sh").unlink(), (tree / "script.sh").mkdir()),
    "mode": lambda tree: (tree / "photos").chmod(0o700),
}


@pytest.fixture
def folders(tree: Path) -> Path:
    (tree / "photos").chmod(0o755)
    return tree


@pytest.mark.parametrize("check", ["full", "mtime"])
@pytest.mark.parametrize("name", AS_RECORDED)
def test_what_changes_no_folder(folders: Path, name: str, check: str) -> None:
    """It is as recorded for audits, for who reads its header, and for who reads the footer."""
    expected = record(folders, exclude=EXCLUDED)
    AS_RECORDED[name](folders)
    with player_of(folders, check) as player:
        player.audit()
        for start in range(0, len(expected), 512):
            assert player.read(start, 512) == expected[start : start + 512]
        assert player.read(0, len(expected)) == expected
        AS_RECORDED[name](folders) if name == "touched" else (folders / "photos" / "y.tmp").touch()
        assert player.read(0, len(expected)) == expected
    assert player.drift is None


@pytest.mark.parametrize("check", ["full", "mtime"])
@pytest.mark.parametrize("name", DIFFERS)
def test_what_changes_a_folder(folders: Path, name: str, check: str) -> None:
    """Though an excluded name came as well."""
    expected = record(folders, exclude=EXCLUDED)
    for folder in (folders, folders / "photos", folders / "empty-folder"):
        (folder / "x.tmp").touch()
    with player_of(folders, check) as player:
        player.audit()
    (folders / "x.tmp").unlink()
    DIFFERS[name](folders)
    with player_of(folders, check) as player:
        if name != "two files exchanged" or check == "full":  # else it is seen by who reads them
            with pytest.raises(TapeIntegrityError):
                player.audit()
    with player_of(folders, check) as player, pytest.raises(TapeIntegrityError):
        player.read(0, len(expected))


@pytest.mark.parametrize("name", ["an excluded file", "an excluded folder", "a pipe", "touched", "a file"])
def test_verify(folders: Path, name: str) -> None:
    """The command agrees with the audits, and names what was added."""
    record(folders, exclude=EXCLUDED)
    (AS_RECORDED | DIFFERS)[name](folders)
    result = run("verify", folders, "--index", folders.parent / "index.db")
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == (name == "a file") * ["data", "data/new"]
    assert result.returncode == (name == "a file")


@pytest.mark.fuse
def test_mounted(folders: Path, mount: Callable[..., Path]) -> None:
    """The tape stays valid while excluded names come and go; one that counts ends it."""
    expected = record(folders, exclude=EXCLUDED)
    archive = mount(folders, "--index", folders.parent / "index.db")
    for number in range(3):
        (folders / "photos" / f"{number}.tmp").touch()
        assert archive.read_bytes() == expected
        (folders / "photos" / f"{number}.tmp").unlink()
        assert archive.read_bytes() == expected
    assert os.getxattr(archive.parent, "user.tartape.state") == b"valid"
    (folders / "photos" / "counts").touch()
    with pytest.raises(OSError, match="Input/output error"):
        archive.read_bytes()


def test_what_a_function_excluded(folders: Path) -> None:
    """It cannot be asked again: a name that was not recorded is drift. Without one there is nothing to ask."""
    expected = record(folders, exclude=lambda path: path.endswith(".tmp"))
    os.utime(folders / "photos")
    with player_of(folders) as player:
        assert player.read(0, len(expected)) == expected
        (folders / "photos" / "x.tmp").touch()
        with pytest.raises(TapeIntegrityError, match="data/photos: mtime changed"):
            player.audit()


@pytest.mark.parametrize("excluded", [("!",), ("function leaves_out",)])
def test_patterns_that_are_none(excluded: tuple[str, ...]) -> None:
    """Nobody can tell what they would leave out; that is no error of who reads the tape."""
    assert recorded_exclusion(excluded) is None


def test_names_are_looked_at_once(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folders that changed, until they change again; while the clock can give the same stamp, each time."""
    record(folders, exclude=EXCLUDED)
    looks: list[int] = []
    names, now, late = Folder.names, inspection.time.time_ns(), 0

    def counted(folder: Folder, one_file_system: bool) -> list[bytes]:
        looks.append(folder.stat().st_ino)
        return names(folder)

    monkeypatch.setattr(Folder, "names", counted)
    monkeypatch.setattr(inspection.time, "time_ns", lambda: now + late)
    photos = (folders / "photos").stat().st_ino
    with player_of(folders) as player:
        player.audit()
        assert looks == []
        (folders / "photos" / "x.tmp").touch()
        for count in (1, 2):
            player.audit()
            assert looks == count * [photos]
        late = 3600 * 10**9
        looks.clear()
        for _ in range(3):
            player.audit()
            assert looks == [photos]
        (folders / "photos" / "counts").touch()
        with pytest.raises(TapeIntegrityError):
            player.audit()


@pytest.mark.parametrize("seen", ["before", "after"])
def test_a_name_that_comes_during_the_look(folders: Path, monkeypatch: pytest.MonkeyPatch, seen: str) -> None:
    """A look at a folder that changed meanwhile is none: it is looked at again."""
    record(folders, exclude=EXCLUDED)
    (folders / "photos" / "x.tmp").touch()
    names = Folder.names

    def changing(folder: Folder, one_file_system: bool) -> list[bytes]:
        monkeypatch.setattr(Folder, "names", names)
        found = names(folder)
        if seen == "after":
            (folders / "photos" / "counts").touch()
            return found
        return [*found, b"zzz, which is not there"]

    monkeypatch.setattr(Folder, "names", changing)
    with player_of(folders) as player:
        if seen == "before":
            player.audit()
        else:
            with pytest.raises(TapeIntegrityError):
                player.audit()


def test_a_folder_swapped_before_it_is_listed(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is listed is what the tape recorded, not another with the same names."""
    record(folders, exclude=EXCLUDED)
    (folders / "empty-folder" / "x.tmp").touch()
    opened = inspection.Source.folder

    def swapping(source: inspection.Source, path: bytes = b"") -> Folder:
        monkeypatch.setattr(inspection.Source, "folder", opened)
        (folders / "empty-folder").rename(folders.parent / "aside")
        (folders / "empty-folder").mkdir(mode=0o700)
        return opened(source, path)

    monkeypatch.setattr(inspection.Source, "folder", swapping)
    with player_of(folders) as player, pytest.raises(TapeIntegrityError):
        player.audit()
    with player_of(folders) as player, pytest.raises(TapeIntegrityError):
        player.audit()
