"""Sources on sshfs and `rclone mount`, changed on the server while they are read."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support import behind
from support.behind import NEVER, shown, warm
from support.programs import run
from support.reference import Reference
from support.sshd import Host, sshd

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.play.audit import verify
from tartapefs.verify.seal import seal

pytestmark = [pytest.mark.wild, pytest.mark.fuse, pytest.mark.root]
real = behind.real  # a fixture
Change = Callable[[Path], None]
Show = Callable[..., object]
RCLONES = {  # Debian's, and the one of PyPI that is installed beside the tests
    "rclone of Debian": "/usr/bin/rclone",
    "rclone of PyPI": os.path.join(os.path.dirname(sys.executable), "rclone"),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with sshd(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture
def show(host: Host, tmp_path: Path) -> Show:
    """`show(folder, program, *options)` shows the folder at `tmp_path`/shown, by sshfs or one of `RCLONES`."""

    def show(folder: Path, program: str, *options: str) -> object:
        place = tmp_path / "shown"
        if program == "sshfs":
            return shown(place, "sshfs", "-f", "-F", host.config, "-o", ",".join(options), f"host:{folder}", place)
        cache = ("--cache-dir", tmp_path / "cache", "--config", "/dev/null")
        if not os.path.exists(RCLONES[program]):
            pytest.skip(f"there is no {RCLONES[program]}")
        return shown(place, RCLONES[program], "mount", f":local:{folder}", place, *cache, *options)

    return show


ON_OPENING = [behind.rewritten, behind.grown, behind.removed]
ASKED = [
    *ON_OPENING,
    behind.mode_changed,
    behind.link_changed,
    behind.added,
    behind.folder_mode_changed,
]
SEEN = [
    *((("sshfs", "ro"), change) for change in ON_OPENING),  # sshfs itself keeps the rest for 20 s
    *((("sshfs", "dir_cache=no", "ro", NEVER), change) for change in ASKED),
    *((("sshfs", "dir_cache=no", NEVER), change) for change in ASKED),
    *((("rclone of PyPI", "--read-only"), change) for change in ON_OPENING[:2]),
    *((("rclone of PyPI",), change) for change in ON_OPENING[:2]),
]
NAMES = {"ids": lambda value: value.__name__ if callable(value) else " ".join(value)}


@pytest.mark.parametrize(("program", "change"), SEEN, **NAMES)
def test_a_change_on_the_server_is_seen(
    show: Show, real: Path, tmp_path: Path, program: tuple[str, ...], change: Change
) -> None:
    with show(real.parent, *program) as place, recorded(place / "data", tmp_path, False) as player:  # type: ignore[attr-defined]
        before = player.read(0, player.tape.total_size)
        warm(place / "data")
        change(real)
        with pytest.raises(TapeIntegrityError):
            player.read(0, len(before))
        if "dir_cache=no" in program:
            assert list(verify(player.inspector))


@pytest.mark.parametrize(
    "program",
    [
        ("sshfs", "ro"),
        ("sshfs", "kernel_cache", "ro", NEVER),
        ("rclone of Debian",),
        ("rclone of Debian", "--vfs-cache-mode", "full"),
        ("rclone of PyPI", "--read-only"),
        ("rclone of PyPI", "--vfs-cache-mode", "full"),
    ],
    **NAMES,
)
@pytest.mark.parametrize("change", list(behind.CHANGES)[:6], **NAMES)
def test_a_sealed_tape_serves_what_was_recorded_or_nothing(
    show: Show, real: Path, tmp_path: Path, program: tuple[str, ...], change: Change
) -> None:
    """Also where the file system tells of nothing, and shows old contents, or new ones, or zeros."""
    with show(real.parent, *program) as place, recorded(place / "data", tmp_path, True) as player:  # type: ignore[attr-defined]
        tape, start = player.tape, player.tape.find("data/folder/file").start
        before = player.read(0, tape.total_size)
        warm(place / "data")
        change(real)
        for at in range(start, start + 512 + behind.SIZE, 1 << 15):
            try:
                assert player.read(at, 1 << 15) == before[at : at + (1 << 15)]
            except OSError:
                continue
            except TapeIntegrityError:
                break


@pytest.mark.parametrize("program", RCLONES)
def test_a_source_on_rclone(show: Show, real: Path, tmp_path: Path, program: str) -> None:
    """Its inodes are of 2^63 and above."""
    (real / "folder" / "link").unlink()  # which it does not show
    copy, mnt, index = tmp_path / "copy.tar", tmp_path / "mnt", tmp_path / "index.db"
    mnt.mkdir()
    with show(real.parent, program) as place:  # type: ignore[attr-defined]
        root = place / "data"
        assert os.lstat(root).st_ino >= 1 << 63
        told = run("record", root, "--index", index)
        assert told.returncode == 0
        assert "fuse.rclone: a change there may be seen late; a sealed tape is beyond that" in told.stderr
        assert run("mount", root, mnt, "--index", index).returncode == 0
        subprocess.run(["cp", mnt / "archive.tar", copy], check=True)
        assert run("unmount", mnt).returncode == 0
        reference = Reference(root)
        assert copy.read_bytes() == reference.read(0, reference.size)
        assert run("verify", root, "--index", index).returncode == 0


@contextmanager
def recorded(root: Path, tmp_path: Path, is_sealed: bool) -> Iterator[TapePlayer]:
    index = tmp_path / "index.db"
    TapeRecorder(root, index).commit()
    if is_sealed:
        with Tape.discover(root, index) as tape, closing(TapePlayer(tape, root)) as player:
            seal(tape, player.source, player.at_home)
    with Tape.discover(root, index) as tape, closing(TapePlayer(tape, root)) as player:
        yield player
