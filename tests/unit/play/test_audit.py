"""The audits, in the player and in the daemon, and which facts they and the reads compare: at home, away, by mtime."""

import errno
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.daemon import foreground
from support.programs import run, wait_until
from support.reference import Reference

from tartapefs import Tape, TapeIntegrityError, TapePlayer, TapeRecorder
from tartapefs.mount.background import audit
from tartapefs.mount.operations import MountOptions
from tartapefs.play.events import TapeCompleted

FOOTER = 1024
PHOTOS, DEEP = "data/photos", "data/photos/2024"


def record(root: Path) -> bytes:
    """Records the folder; the archive that it must have."""
    TapeRecorder(root).commit()
    reference = Reference(root)
    return reference.read(0, reference.size)


@contextmanager
def player_of(root: Path, check: str = "full") -> Iterator[TapePlayer]:
    with Tape.discover(root) as tape, closing(TapePlayer(tape, root, check)) as player:  # type: ignore[arg-type]
        yield player


def state_of(archive: Path) -> str:
    return os.getxattr(archive.parent, "user.tartape.state").decode()


# What an audit finds

CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "file added": (lambda root: (root / "photos" / "new").touch(), PHOTOS),
    "file added in the root": (lambda root: (root / "new").touch(), "data"),
    "file added deep down": (lambda root: (root / "photos" / "2024" / "new").touch(), DEEP),
    "file added in an empty folder": (lambda root: (root / "empty-folder" / "new").touch(), "data/empty-folder"),
    "link added": (lambda root: (root / "photos" / "new").symlink_to("1.bin"), PHOTOS),
    "hard link added": (lambda root: os.link(root / "script.sh", root / "photos" / "new"), PHOTOS),
    "folder added": (lambda root: (root / "photos" / "new").mkdir(), PHOTOS),
    "folder named as the index's added deep down": (lambda root: (root / "photos" / ".tartape").mkdir(), PHOTOS),
    "file removed": (lambda root: (root / "photos" / "1.bin").unlink(), PHOTOS),
    "link removed": (lambda root: (root / "dangling").unlink(), "data"),
    "empty folder removed": (lambda root: (root / "empty-folder").rmdir(), "data"),
    "folder removed": (lambda root: shutil.rmtree(root / "photos" / "2024"), PHOTOS),
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
    "mode of a folder": (lambda root: (root / "photos" / "2024").chmod(0o700), DEEP),
    "file added, mtime put back": (
        lambda root: putting_time_back(root / "photos", lambda folder: (folder / "new").touch()),
        PHOTOS,
    ),
    "the source moved away": (lambda root: root.rename(root.parent / "moved"), "data"),
}


def putting_time_back(path: Path, change: Callable[[Path], object]) -> None:
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


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


def test_the_share_limits_the_processor_time(tmp_path: Path) -> None:
    """At 5 % an audit rests 19 times as long as it works."""
    root = tmp_path / "data"
    for high in range(40):
        for low in range(100):
            (root / str(high) / str(low)).mkdir(parents=True)
    record(root)
    with player_of(root) as player:
        shares = []
        for share in (1.0, 0.05):
            cpu, begun = time.thread_time(), time.monotonic()
            player.audit(share)
            shares.append((time.thread_time() - cpu, time.monotonic() - begun))
    (_, quick), (cpu, slow) = shares
    assert cpu <= 0.1 * slow  # the last stretch of work has no rest after it
    assert slow > 4 * quick


# The footer


def read_to(player: TapePlayer, stop: int, size: int = 4000) -> None:
    for at in range(0, stop, size):
        player.read(at, min(size, stop - at))


@pytest.mark.parametrize("footer_in", ["a request of its own", "two requests", "the last request"])
@pytest.mark.parametrize("audited_before", [False, True], ids=["first time", "audited before"])
def test_no_footer_without_an_audit_that_began_later(tree: Path, footer_in: str, audited_before: bool) -> None:
    """A file is added in a folder that was read already: not seen by any later read but the footer's."""
    expected = record(tree)
    end = len(expected) - FOOTER
    with player_of(tree) as player:
        if audited_before:
            player.audit()
            read_to(player, len(expected))
        read_to(player, end if footer_in != "the last request" else end - 700)
        (tree / "empty-folder" / "new").touch()
        with pytest.raises(TapeIntegrityError) as caught:
            match footer_in:
                case "a request of its own":
                    player.read(end, FOOTER)
                case "two requests":
                    player.read(end, 1)
                case _:
                    player.read(end - 700, 700 + FOOTER)
        assert caught.value.member == "data/empty-folder"


def test_an_audit_is_not_repeated_for_every_look_at_the_end(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that looks at the end again and again costs one audit a second at most."""
    expected = record(tree)
    begun = time.monotonic()
    with player_of(tree) as player:
        audits = []
        real = player.audit
        monkeypatch.setattr(player, "audit", lambda: (audits.append(1), real()))
        for _ in range(200):
            assert player.read(len(expected) - 10, 10) == bytes(10)
    assert 1 <= len(audits) <= 1 + (time.monotonic() - begun)


def test_the_footer_read_first_says_nothing_of_what_is_read_later(tree: Path) -> None:
    """Not promised: who reads the end before the rest is told of what is added meanwhile by later audits only."""
    expected = record(tree)
    end = len(expected) - FOOTER
    with player_of(tree) as player:
        assert player.read(end, FOOTER) == bytes(FOOTER)
        (tree / "empty-folder" / "new").touch()
        start = player.get_offset_of(PHOTOS)
        assert player.read(start, end - start) == expected[start:end]
        with pytest.raises(TapeIntegrityError):
            player.read(end, FOOTER)


def test_play_does_not_complete(tree: Path) -> None:
    """No `tape_completed` for a folder to which a file was added behind the reader."""
    expected = record(tree)
    played, seen = b"", []
    with player_of(tree) as player, pytest.raises(TapeIntegrityError):
        for event in player.play():
            seen.append(event)
            played += event.data
            if len(played) == len(expected) - FOOTER and not (tree / "empty-folder" / "new").exists():
                (tree / "empty-folder" / "new").touch()
    assert played == expected[:-FOOTER]
    assert not any(isinstance(event, TapeCompleted) for event in seen)


def test_cat_fails(tree: Path, mount: Callable[..., Path]) -> None:
    """A file is added in a folder that `cat` has copied already, while it waits for the reader of its pipe."""
    (tree / "zz").write_bytes(os.urandom(3_000_000))
    expected = record(tree)
    archive = mount(tree)
    with subprocess.Popen(["cat", archive], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as cat:
        assert cat.stdout and cat.stderr
        got = cat.stdout.read(400_000)  # everything but the last file
        (tree / "empty-folder" / "new").touch()
        got += cat.stdout.read()
        assert b"Input/output error" in cat.stderr.read()
    assert cat.returncode == 1
    assert len(got) < len(expected)
    assert expected.startswith(got)
    assert state_of(archive).startswith("invalid: data/empty-folder: ")


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_an_error_during_the_audit_is_no_drift(tree: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The error passes through, the footer is not served; once the fault is gone the tape plays to its end."""
    expected = record(tree)
    end = len(expected) - FOOTER
    with player_of(tree) as player:
        read_to(player, end)
        real = player.source.lstat

        def failing(path: bytes) -> os.stat_result:
            if path == b"photos/2024":
                raise OSError(number, os.strerror(number), path)
            return real(path)

        with monkeypatch.context() as patch:
            patch.setattr(player.source, "lstat", failing)
            for action in (player.audit, lambda: player.read(end, FOOTER)):
                with pytest.raises(OSError) as caught:
                    action()
                assert caught.value.errno == number
                assert not isinstance(caught.value, TapeIntegrityError)
        assert player.drift is None
        assert player.read(0, len(expected)) == expected


# In the daemon


def test_the_background_audit_finds_what_nobody_reads(tree: Path, tmp_path: Path, mount: Callable[..., Path]) -> None:
    """The archive is open, and not read: state, log, `status` and every later read tell of the added file's folder."""
    record(tree)
    log = tmp_path / "drift.log"
    archive = mount(tree, "--audit-interval", "0.2", "--log", log)
    with archive.open("rb") as opened:
        before = run("status", archive.parent)
        assert before.returncode == 0
        assert "valid" in before.stdout
        (tree / "photos" / "new").touch()
        wait_until(lambda: state_of(archive) != "valid")
        with pytest.raises(OSError) as caught:
            os.pread(opened.fileno(), 1, 0)
        assert caught.value.errno == errno.EIO
    assert state_of(archive).startswith(f"invalid: {PHOTOS}: mtime changed")
    after = run("status", archive.parent)
    assert after.returncode == 1
    assert f"invalid: {PHOTOS}: mtime changed" in after.stdout
    as_json = run("status", archive.parent, "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["state"] == state_of(archive)
    (line,) = log.read_text().splitlines()
    assert f" {PHOTOS}: mtime changed" in line


def test_the_audit_at_mount(tree: Path, mount: Callable[..., Path]) -> None:
    """What was added between recording and mounting is found although nobody opens the archive."""
    record(tree)
    (tree / "photos" / "new").touch()
    archive = mount(tree)
    wait_until(lambda: state_of(archive).startswith(f"invalid: {PHOTOS}: "))


class Counted:
    """Stands for a player, and counts its audits; or for an archive that `is_open` or not."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.drift: object = None
        self.is_open = False
        self.audits: list[float] = []
        self.errors: list[BaseException] = []
        self.failure = failure

    def audit(self, share: float, pause: Callable[[float], object]) -> None:
        self.audits.append(share)
        if self.failure is not None:
            raise self.failure

    def errno_of(self, error: BaseException) -> int:
        self.errors.append(error)
        return errno.EIO


@contextmanager
def auditing(player: Counted) -> Iterator[threading.Thread]:
    ended = threading.Event()
    options = MountOptions(audit_interval=0.01, audit_share=0.5)
    thread = threading.Thread(target=audit, args=(player, player, options, ended, threading.Event()))
    thread.start()
    try:
        yield thread
    finally:
        ended.set()
        thread.join(60)
    assert not thread.is_alive()


def test_no_audit_while_nobody_has_it_open() -> None:
    """One at mount, none then; every interval once it is open; and none again when it is closed."""
    player = Counted()
    with auditing(player):
        wait_until(lambda: player.audits)
        time.sleep(0.3)
        assert player.audits == [0.5]
        player.is_open = True
        wait_until(lambda: len(player.audits) > 5)
        player.is_open = False
        time.sleep(0.1)
        count = len(player.audits)
        time.sleep(0.3)
        assert len(player.audits) == count


def test_the_audits_go_on_after_an_error_and_end_at_drift() -> None:
    """A disk that fails is reported each time; after drift there is nothing left to look for."""
    player = Counted(OSError(errno.EIO, "fails"))
    player.is_open = True
    with auditing(player) as thread:
        wait_until(lambda: len(player.errors) > 3)
        player.drift = object()
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.fuse
def test_a_foreground_daemon_tells_of_drift_that_an_audit_found(tree: Path, tmp_path: Path) -> None:
    """Nobody reads a byte; it exits with 1 when it is told to end."""
    record(tree)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    (tree / "photos" / "new").touch()
    with foreground(tree, mountpoint) as daemon:
        wait_until(lambda: state_of(mountpoint / "archive.tar") != "valid")
    assert daemon.returncode == 1


# Which facts are compared

BY_CTIME: dict[str, Callable[[Path], object]] = {
    "mode of a file and back": lambda root: ((root / "script.sh").chmod(0o700), (root / "script.sh").chmod(0o755)),
    "hard link of a file added": lambda root: os.link(root / "script.sh", root.parent / "other"),
    "owner of a file": lambda root: os.chown(root / "script.sh", os.geteuid(), os.getegid()),
    "extended attribute": lambda root: os.setxattr(root / "script.sh", "user.note", b"x"),
}


@pytest.mark.parametrize("name", BY_CTIME)
def test_a_change_of_ctime_alone(tree: Path, name: str) -> None:
    """Drift by default, with a line that names the way out; nothing at all with `--check mtime`."""
    (tree / "photos").chmod(0o755)
    expected = record(tree)
    BY_CTIME[name](tree)
    with player_of(tree) as player, pytest.raises(TapeIntegrityError) as caught:
        player.read(0, len(expected))
    assert [difference.what for difference in caught.value.differences] == ["ctime"]
    assert "ctime changed since recording" in str(caught.value)
    assert '--check mtime"' in str(caught.value)
    assert caught.value.member == "data/script.sh"
    with player_of(tree, "mtime") as player:
        assert b"".join(event.data for event in player.play()) == expected
        player.audit()


def test_the_option_on_the_command_line(tree: Path, mount: Callable[..., Path]) -> None:
    """The line of `play` and of `verify` names it; `play`, `verify` and `mount` take it."""
    expected = record(tree)
    BY_CTIME["hard link of a file added"](tree)
    for command in ("play", "verify"):
        failed = run(command, tree, text=False, errors=None)
        assert failed.returncode == 1
        assert b'--check mtime"' in failed.stderr + failed.stdout
        assert run(command, "--check", "mtime", tree, text=False, errors=None).returncode == 0
    assert run("play", "--check", "mtime", tree, text=False, errors=None).stdout == expected
    archive = mount(tree, "--check", "mtime")
    assert archive.read_bytes() == expected
    assert run("status", archive.parent).returncode == 0


@pytest.mark.parametrize(
    ("what", "change"),
    {
        "size": lambda path: os.truncate(path, 5),
        "mtime": lambda path: path.write_bytes(path.read_bytes()),
        "mode": lambda path: path.chmod(0o600),
        "type": lambda path: path.unlink(),
    }.items(),
)
def test_by_mtime_everything_else_counts(tree: Path, what: str, change: Callable[[Path], object]) -> None:
    expected = record(tree)
    change(tree / "photos" / "5000.bin")
    with player_of(tree, "mtime") as player, pytest.raises(TapeIntegrityError) as caught:
        read_to(player, len(expected))
    # A file that is gone is seen by its folder's mtime first.
    assert caught.value.differences[0].what == ("mtime" if what == "type" else what)


def test_a_hard_linked_snapshot_plays_by_mtime(tree: Path) -> None:
    """As backup programs make them: each file is one more name of the same inode, which changes its ctime."""
    expected = record(tree)
    subprocess.run(["cp", "-al", tree, tree.parent / "snapshot"], check=True)
    with player_of(tree) as player, pytest.raises(TapeIntegrityError, match="--check mtime"):
        player.read(0, len(expected))
    with player_of(tree, "mtime") as player:
        assert player.read(0, len(expected)) == expected


COPIES = [
    pytest.param(["cp", "-a"], id="cp"),
    pytest.param(["rsync", "-a"], id="rsync", marks=pytest.mark.needs("rsync")),
]


@pytest.fixture
def old_tree(tree: Path) -> Path:
    """Not changed in this second: rsync leaves such a folder or link with the nanoseconds of the copying."""
    for path in (*tree.rglob("*"), tree):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789), follow_symlinks=False)
    return tree


def copied(command: list[str], tree: Path) -> Path:
    copy = tree.parent / "elsewhere" / "data"
    copy.parent.mkdir()
    subprocess.run([*command, tree, copy.parent], check=True)
    return copy


@pytest.mark.parametrize("command", COPIES)
def test_a_copy_plays(old_tree: Path, mount: Callable[..., Path], command: list[str]) -> None:
    """A tape that was copied with its folder has the same bytes, by the library and through a mount."""
    expected = record(old_tree)
    copy = copied(command, old_tree)
    with player_of(copy) as player:
        assert not player.at_home
        assert player.read(0, len(expected)) == expected
        player.audit()
    assert mount(copy).read_bytes() == expected


@pytest.mark.long(but=1)
@pytest.mark.parametrize("command", COPIES)
def test_info_says_which_checks_apply(old_tree: Path, command: list[str]) -> None:
    """At home inode and change time too; in a copy neither."""
    record(old_tree)
    copy = copied(command, old_tree)
    for folder, at_home in ((old_tree, True), (copy, False)):
        facts = json.loads(run("info", "--json", folder).stdout)
        assert facts["at_home"] is at_home
        assert ("not inode and ctime" in facts["checks"]) is not at_home
        assert facts["checks"].startswith("type, size, mtime, mode, link target")
        shown = run("info", folder).stdout
        assert facts["checks"] in shown


@pytest.mark.parametrize("command", COPIES)
def test_a_copy_is_checked_too(old_tree: Path, command: list[str]) -> None:
    expected = record(old_tree)
    copy = copied(command, old_tree)
    with player_of(copy) as player:
        (copy / "empty-folder" / "new").touch()
        with pytest.raises(TapeIntegrityError):
            read_to(player, len(expected))


def test_what_a_copy_cannot_tell(tree: Path) -> None:
    """Not promised: away from home, and with `--check mtime`, a rewrite of equal size whose mtime was put back."""
    expected = record(tree)
    copy = copied(["cp", "-a"], tree)
    for root, check in ((tree, "mtime"), (copy, "full")):
        putting_time_back(root / "photos" / "5000.bin", lambda path: path.write_bytes(b"x" * 5000))
        with player_of(root, check) as player:
            at = player.get_offset_of("data/photos/5000.bin") + 512
            assert player.read(0, len(expected)) == expected[:at] + b"x" * 5000 + expected[at + 5000 :]
