"""Sources that somebody changes where this kernel does not see it: shown by bindfs, which it asks nothing twice."""

import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from support.behind import (
    CHANGES,
    NEW,
    OLD,
    SIZE,
    YEARS_AGO,
    added,
    bound,
    folder_mode_changed,
    removed,
    rewritten,
    shown,
    warm,
)
from support.behind import real as real
from support.programs import run
from support.reference import Reference
from support.seals import flip

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.play import inspection
from tartapefs.play.audit import verify
from tartapefs.source.folder import Folder, Source
from tartapefs.verify.seal import seal

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("bindfs")]


def whole(root: Path) -> bytes:
    reference = Reference(root)
    return reference.read(0, reference.size)


@pytest.mark.parametrize("options", [("ro",), ()], ids=["read-only", "writable"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_behind_the_kernel_is_seen(
    real: Path, tmp_path: Path, change: Callable[[Path], None], options: tuple[str, ...]
) -> None:
    index, member = tmp_path / "index.db", CHANGES[change]
    with bound(real.parent, tmp_path / "shown", *options) as place:
        root = place / "data"
        TapeRecorder(root, index).commit()
        before = whole(real)
        with Tape.discover(root, index) as tape, closing(TapePlayer(tape, root)) as player:
            assert player.read(0, len(before)) == before
            warm(root)
            change(real)
            found = [error.member for error in verify(player.inspector)]
            assert member in found
            warm(root)
            with pytest.raises(TapeIntegrityError) as caught:
                player.read(0, len(before))
            assert caught.value.member in found


@pytest.mark.parametrize("change", [added, removed, folder_mode_changed], ids=lambda change: change.__name__)
def test_an_audit_asks_the_file_system(real: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    with bound(real.parent, tmp_path / "shown", "ro") as place:
        root, index = place / "data", tmp_path / "index.db"
        TapeRecorder(root, index).commit()
        with Tape.discover(root, index) as tape, closing(TapePlayer(tape, root)) as player:
            player.audit()
            warm(root)
            change(real)
            with pytest.raises(TapeIntegrityError):
                player.audit()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_recording_is_of_what_is_there(real: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    with bound(real.parent, tmp_path / "shown", "ro") as place:
        root, index = place / "data", tmp_path / "index.db"
        warm(root)
        change(real)
        TapeRecorder(root, index).commit()
        with Tape.discover(root, index) as tape, closing(TapePlayer(tape, root)) as player:
            assert player.read(0, tape.total_size) == whole(real)


def test_what_is_appended_to_a_sealed_tape_is_of_what_is_there(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is rewritten on the server while it is hashed, between two of its blocks."""
    with bound(real.parent, tmp_path / "shown", "ro") as place:
        root, index = place / "data", tmp_path / "index.db"
        TapeRecorder(root, index).commit()
        with Tape.discover(root, index) as tape, closing(TapePlayer(tape, root)) as player:
            seal(tape, player.source, player.at_home, "sha256")
        before = index.read_bytes()
        (real / "new").write_bytes(OLD)
        os.utime(real / "new", ns=YEARS_AGO)
        preadv = os.preadv

        def reading(fd: int, buffers: list[memoryview], offset: int) -> int:
            found = preadv(fd, buffers, offset)
            if offset == 0:
                (real / "new").write_bytes(NEW)
            return found

        monkeypatch.setattr(os, "preadv", reading)
        with pytest.raises(TapeIntegrityError, match="new: "):
            TapeRecorder(root, index, append=True).commit()
        assert index.read_bytes() == before


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_system_mounted_within_the_source(real: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    """The root lies on a local disk, and a folder in it does not."""
    root = tmp_path / "outer"
    root.mkdir()
    with bound(real.parent, root / "inner", "ro"):
        TapeRecorder(root).commit()
        with Tape.discover(root) as tape, closing(TapePlayer(tape)) as player:
            before = player.read(0, tape.total_size)
            assert before == whole(root)
            warm(root)
            change(real)
            with pytest.raises(TapeIntegrityError):
                player.read(0, len(before))
        assert Source(str(root)).foreign_types() == ["fuse"]


def test_copies_through_a_mount(real: Path, tmp_path: Path, mount: Callable[..., Path]) -> None:
    with bound(real.parent, tmp_path / "shown", "ro") as place:
        root, index = place / "data", tmp_path / "index.db"
        assert run("record", root, "--index", index).returncode == 0
        archive = mount(root, "--index", index)
        expected = whole(real)
        assert archive.read_bytes() == expected
        warm(root)
        rewritten(real)
        with pytest.raises(OSError), archive.open("rb") as file:
            file.read()
        assert run("verify", root, "--index", index).returncode == 1
        assert run("unmount", archive.parent).returncode == 0


def test_a_listing_that_a_server_kept_is_no_last_word(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is older than the times of its folder, as sshfs may give it."""
    with bound(real.parent, tmp_path / "shown", "ro") as place:
        root, index = place / "data", tmp_path / "index.db"
        TapeRecorder(root, index, exclude="*.tmp").commit()
        with Tape.discover(root, index) as tape, closing(TapePlayer(tape, root)) as player:
            added(real)
            os.utime(real / "z-folder", ns=(10**18 + 5, 10**18 + 5))
            now = time.time_ns()
            with monkeypatch.context() as patch:
                patch.setattr(inspection.time, "time_ns", lambda: now + 10**11)  # long after the change
                patch.setattr(Folder, "names", lambda folder, one_file_system: [])
                player.audit()
            with pytest.raises(TapeIntegrityError):
                player.audit()


def test_a_sealed_tape_trusts_no_stat(real: Path, tmp_path: Path) -> None:
    """Contents are what counts, even where size and mtime are all that is compared."""
    with bound(real.parent, tmp_path / "shown", "ro") as place:
        root, index = place / "data", tmp_path / "index.db"
        for command in ("record", "seal"):
            assert run(command, root, "--index", index).returncode == 0
        flip(real / "folder" / "file", SIZE // 2)
        with Tape.discover(root, index) as tape:
            player = TapePlayer(tape, root, check="mtime")
            with closing(player), pytest.raises(TapeIntegrityError, match="its digest"):
                player.read(0, tape.total_size)


@pytest.mark.long
def test_record_mount_and_info_tell_of_it_in_a_line(real: Path, tmp_path: Path, mount: Callable[..., Path]) -> None:
    told = " is on fuse: a change there may be seen late; a sealed tape is beyond that"
    index = tmp_path / "index.db"
    with bound(real.parent, tmp_path / "sho wn", "ro") as place:
        root, mnt = place / "data", tmp_path / "mnt"
        mnt.mkdir()
        for command in (["record", root], ["mount", root, mnt]):
            lines = run(*command, "--index", index).stderr.splitlines()
            remedy = f"tartapefs seal {shlex.quote(str(root))} --index {index}"
            assert [line for line in lines if told in line] == [f'tartapefs: {root}{told} ("{remedy}")']
        assert run("unmount", mnt).returncode == 0
        assert "file system   fuse: a change there" in run("info", root, "--index", index).stdout
        with Tape.discover(root, index) as tape, Source(str(root)) as source:
            seal(tape, source, True)
        assert told not in run("mount", root, mnt, "--index", index).stderr
        assert run("unmount", mnt).returncode == 0
    assert run("record", real).stderr.count("\n") == 1
    assert "file system" not in run("info", real).stdout


ODD = [
    {"st_ino": 2**63},
    {"st_ino": 2**64 - 1},
    {"st_mtime": -(10**9)},
    {"st_mtime": -(2**55) * 10**9 + 1},
    {"st_mtime": (2**55) * 10**9 + 999_999_999, "st_ctime": -1},
]


@pytest.mark.long(but=3)
@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize("facts", ODD, ids=str)
def test_numbers_that_no_local_file_system_has(real: Path, tmp_path: Path, facts: dict[str, int], sealed: bool) -> None:
    """Inodes of 2^63 and above, as `rclone mount` gives them, and times before and after all calendars."""
    index = tmp_path / "index.db"
    command = [sys.executable, Path(__file__).parents[1] / "support" / "oddfs.py", real.parent, repr(facts)]
    with shown(tmp_path / "shown", *command, tmp_path / "shown") as place:
        root = place / "data"
        for name, value in facts.items():
            seen = os.lstat(root / "small")
            assert getattr(seen, name if name == "st_ino" else name + "_ns") == value
        fingerprint = TapeRecorder(root, index).commit()
        if sealed:
            with Tape.discover(root, index) as tape, Source(str(root)) as source:
                seal(tape, source, True)
        with Tape.discover(root, index) as tape, closing(TapePlayer(tape, root)) as player:
            assert player.at_home
            assert player.read(0, tape.total_size) == whole(root)
            assert list(verify(player.inspector)) == []
        listing = run("ls", root, "--index", index)
        assert (listing.returncode, listing.stderr, len(listing.stdout.splitlines())) == (0, "", 6)
        assert TapeRecorder(root, index, overwrite=True).commit() == fingerprint
