"""Files that are added while an archive is read: accepted where that was asked for, and nothing else is."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from support.programs import run
from support.reference import Reference

from tartapefs import Tape, TapeIntegrityError, TapePlayer

Mount = Callable[..., Path]


@pytest.fixture
def archive(tree: Path) -> bytes:
    """Records the folder; the archive that it must have from then on."""
    assert run("record", tree).returncode == 0
    reference = Reference(tree)
    return reference.read(0, reference.size)


def grow(tree: Path) -> list[str]:
    """Adds a file, a link and a folder with content; the paths that count as added."""
    (tree / "new.txt").write_text("new")
    (tree / "photos" / "new link").symlink_to("1.bin")
    (tree / "empty-folder" / "new").mkdir()
    (tree / "empty-folder" / "new" / "deep.txt").write_text("deep")
    return ["data/empty-folder/new", "data/new.txt", "data/photos/new link"]


def read(tree: Path) -> bytes:
    """The whole archive, by a player that allows additions."""
    with Tape.discover(tree) as tape, closing(TapePlayer(tape, allow_additions=True)) as player:
        player.audit()
        return player.read(0, tape.total_size)


def test_a_folder_that_grew_reads_as_recorded(tree: Path, archive: bytes) -> None:
    grow(tree)
    assert read(tree) == archive
    with Tape.discover(tree) as tape, closing(TapePlayer(tape)) as player, pytest.raises(TapeIntegrityError):
        player.audit()


def remove(tree: Path) -> None:
    (tree / "photos" / "1.bin").unlink()


def replace_with_a_copy(tree: Path) -> None:
    """With equal contents and times, and another inode."""
    shutil.copy2(tree / "photos" / "1.bin", tree / "photos" / "aside")
    (tree / "photos" / "aside").rename(tree / "photos" / "1.bin")


def change_type(tree: Path) -> None:
    (tree / "photos" / "1.bin").unlink()
    (tree / "photos" / "1.bin").mkdir()


def change_mode(tree: Path) -> None:
    (tree / "photos").chmod(0o700)


def replace_folder(tree: Path) -> None:
    (tree / "photos").rename(tree / "aside")
    shutil.copytree(tree / "aside", tree / "photos", symlinks=True)


def remove_folder(tree: Path) -> None:
    (tree / "empty-folder").rmdir()


def rename_away_and_back_with_another(tree: Path) -> None:
    (tree / "photos" / "1.bin").rename(tree / "photos" / "2.bin")


CHANGES = [
    remove,
    replace_with_a_copy,
    change_type,
    change_mode,
    replace_folder,
    remove_folder,
    rename_away_and_back_with_another,
]


@pytest.mark.parametrize("also_grows", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_recorded_is_compared_as_ever(
    tree: Path, archive: bytes, change: Callable[[Path], None], also_grows: bool
) -> None:
    if also_grows:
        (tree / "photos" / "new.txt").write_text("new")
        (tree / "new.txt").write_text("new")
    change(tree)
    with Tape.discover(tree) as tape, closing(TapePlayer(tape, allow_additions=True)) as player:  # noqa: SIM117
        with pytest.raises(TapeIntegrityError):
            player.audit()


def test_what_comes_and_goes_while_it_is_read(tree: Path, archive: bytes) -> None:
    """The folder's times move at each request."""
    with Tape.discover(tree) as tape, closing(TapePlayer(tape, allow_additions=True)) as player:
        for start in range(0, tape.total_size, 20_000):
            (tree / f"new{start}").write_text("new")
            (tree / "photos" / "coming").mkdir()
            assert player.read(start, 20_000) == archive[start : start + 20_000]
            (tree / "photos" / "coming").rmdir()
        player.audit()
        assert player.inspector.additions.count == len(range(0, tape.total_size, 20_000))
        (tree / "photos" / "1.bin").unlink()
        with pytest.raises(TapeIntegrityError):
            player.audit()


def test_names_that_are_told_of_are_few(tree: Path, archive: bytes) -> None:
    for number in range(50):
        (tree / f"new{number:02}").touch()
    with Tape.discover(tree) as tape, closing(TapePlayer(tape, allow_additions=True)) as player:
        player.audit()
        additions = player.inspector.additions
    assert (additions.count, additions.paths) == (50, tuple(b"new%02d" % number for number in range(10)))


@pytest.mark.fuse
def test_a_mounted_archive_while_the_folder_grows(tree: Path, archive: bytes, mount: Mount) -> None:
    """Before the mount, under it, and before the footer; `status` counts and names what was added."""
    (tree / "early").touch()
    mounted = mount(tree, "--allow-additions")
    with mounted.open("rb", buffering=0) as file:
        assert file.read(5000) == archive[:5000]
        added = grow(tree)
        assert os.pread(file.fileno(), len(archive), 0) == archive
    listed = subprocess.run(["tar", "-tf", mounted], capture_output=True, check=True).stdout
    assert b"new" not in listed
    state = json.loads(run("status", mounted.parent, "--json").stdout)
    assert state["state"] == "valid"
    expected = sorted([*(path.removeprefix("data/") for path in added), "early"])
    assert state["additions"] == {"count": 4, "paths": expected}
    text = run("status", mounted.parent).stdout
    assert f"additions      4: {', '.join(expected)}\n" in text
    (tree / "photos" / "1.bin").unlink()
    with pytest.raises(OSError, match="Input/output error"), mounted.open("rb", buffering=0) as file:
        os.pread(file.fileno(), len(archive), 0)
    assert run("status", mounted.parent).returncode == 1


def test_verify_lists_what_was_added(tree: Path, archive: bytes) -> None:
    assert json.loads(run("verify", tree, "--allow-additions", "--json").stdout)["additions"] == []
    added = grow(tree)
    result = run("verify", tree, "--allow-additions")
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == [f"{path}: added since the recording" for path in added]
    assert result.stderr.endswith("; added since: 3\n")
    assert sorted(json.loads(run("verify", tree, "--allow-additions", "--json").stdout)["additions"]) == added
    (tree / "photos" / "1.bin").unlink()
    result = run("verify", tree, "--allow-additions", "--json")
    assert result.returncode == 1
    assert {error["member"] for error in json.loads(result.stdout)["drift"]} >= {"data/photos/1.bin"}
    assert run("verify", tree).returncode == 1


@pytest.mark.parametrize("command", ["play", "resume", "check", "digest"])
def test_commands_that_read(tree: Path, archive: bytes, tmp_path: Path, command: str) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(archive[:100_000] if command == "resume" else archive)
    arguments = [command, tree] if command in ("play", "digest") else [command, tree, copy]
    grow(tree)
    assert run(*arguments, "--allow-additions", stdout=subprocess.DEVNULL, capture_output=False).returncode == 0
    if command == "resume":
        assert copy.read_bytes() == archive
        copy.write_bytes(archive[:100_000])
    assert run(*arguments, stdout=subprocess.DEVNULL, capture_output=False).returncode == 1


@pytest.mark.root
@pytest.mark.fuse
def test_mount8_and_units(tree: Path, archive: bytes, tmp_path: Path) -> None:
    unit = run("systemd-unit", tree, tmp_path, "--options", "allow_additions,ro")
    assert (unit.returncode, "--allow-additions" in unit.stdout) == (0, True), unit.stderr
    automount = run("systemd-unit", tree, tmp_path, "--automount", "--options", "allow_additions,ro")
    assert "Options=allow_additions,ro" in automount.stdout
