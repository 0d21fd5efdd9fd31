"""Seals: what they are made of, how they come about, and what interrupts or refuses them."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest
from support.programs import run, umount, under_strace
from support.seals import BLOCK, MIXED, flip, index_of, make, pieces_of, playing, seal_again, seal_of, sealed, whole

from tartapefs import OutputError, Tape, TapeBusyError, TapeIntegrityError, TapePlayer, TapeRecorder, TapeSealedError
from tartapefs.verify.seal import seal

PAGE = 1 << 14  # bytes of a page of the index


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0] * 6,
        [5] * 7,
        [9] * 700,  # two levels
        MIXED,
        [BLOCK * 62, BLOCK * 62 + 1, 3, BLOCK * 200 + 5],  # pieces, whole ones and others
    ],
    ids=["nothing", "a leaf", "a leaf and a member", "700 files", "all sizes", "large files"],
)
def test_the_seal_is_that_of_the_archive(tmp_path: Path, sizes: list[int], algorithm: str) -> None:
    root = make(tmp_path / "data", sizes)
    made = sealed(root, algorithm)
    archive = whole(root)
    assert made == seal_of(archive, algorithm, BLOCK)
    with playing(root) as player:
        tape = player.tape
        assert (tape.seal, tape.algorithm, tape.block_size) == (made, algorithm, BLOCK)
        assert tape.rows_are_sound()
        assert player.at_home
        assert player.read(0, tape.total_size) == archive


def test_other_blocks_give_another_seal_and_other_metadata_too(tmp_path: Path) -> None:
    root = make(tmp_path / "data", MIXED)
    seals = {sealed(root, block_size=size) for size in (BLOCK, 1 << 17, 1 << 20)}
    (root / "folder 000" / "00003").chmod(0o600)
    seals.add(sealed(root))
    assert len(seals) == 4


def test_equal_folders_have_equal_seals(tmp_path: Path) -> None:
    one = make(tmp_path / "one" / "data", MIXED)
    other = Path(shutil.copytree(one, tmp_path / "other" / "data", symlinks=True))
    assert sealed(one) == sealed(other)


def test_sealing_keeps_what_is_known_of_the_tape(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [*MIXED, *[9] * 90])  # more than a pack, and cut into others when sealed
    TapeRecorder(root, exclude="*7", anonymize=False).commit()
    mtime = root.stat().st_mtime_ns
    with Tape.discover(root) as before:
        seal_again(root)
        with Tape.discover(root) as after:
            assert list(after.members()) == list(before.members())
            for fact in (
                "fingerprint",
                "rows_digest",
                "root_ino",
                "recorded_ns",
                "excluded",
                "left_out",
                "owners_kept",
            ):
                assert getattr(after, fact) == getattr(before, fact), fact
    assert os.listdir(root / ".tartape") == ["index.db"]
    assert root.stat().st_mtime_ns == mtime


def test_a_tape_that_is_not_at_home_stays_so(mixed: Path) -> None:
    TapeRecorder(mixed, overwrite=True).commit()
    copy = mixed.parent / "elsewhere.db"
    shutil.copy(index_of(mixed), copy)
    with Tape.discover(mixed, copy) as tape, closing(TapePlayer(tape, mixed)) as player:
        assert not player.at_home
        seal(tape, player.source, player.at_home)
    with Tape.discover(mixed, copy) as tape, closing(TapePlayer(tape, mixed)) as player:
        assert tape.seal
        assert not player.at_home


def test_what_an_index_without_digests_costs_and_says(tmp_path: Path) -> None:
    """It is of a format of its own, and no table is there for what it has not."""
    root = make(tmp_path / "data", [100] * 2000)
    TapeRecorder(root).commit()
    with closing(sqlite3.connect(index_of(root))) as database:
        assert [name for (name,) in database.execute("SELECT name FROM sqlite_master ORDER BY 1")] == ["pack", "tape"]
        assert database.execute("PRAGMA user_version").fetchone() == (3,)
    bare = index_of(root).stat().st_size
    assert bare / 2000 < 100, "bytes a member"
    seal_again(root)
    with closing(sqlite3.connect(index_of(root))) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (4,)  # which a reader of 3 alone refuses
    # Of each of three tables, a page that is not full.
    assert 32 <= (index_of(root).stat().st_size - bare - 3 * PAGE) / 2000 <= 44, "bytes a member"


def test_what_a_large_file_costs(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [1])
    os.truncate(root / "folder 000" / "00000", BLOCK * 4000)
    TapeRecorder(root).commit()
    bare = index_of(root).stat().st_size
    seal_again(root)
    # Of each of three tables, a page that is not full, and of one, the page that leads to its others.
    assert (index_of(root).stat().st_size - bare - 4 * PAGE) / 4000 <= 36, "bytes a block"


def test_a_member_that_changed_refuses_the_seal(tmp_path: Path) -> None:
    root = make(tmp_path / "data", MIXED)
    TapeRecorder(root).commit()
    before = index_of(root).read_bytes()
    flip(root / "folder 000" / "00008", 100)
    with pytest.raises(TapeIntegrityError, match=r"00008.*ctime"):
        seal_again(root)
    assert index_of(root).read_bytes() == before


def test_sealing_twice_is_refused(mixed: Path) -> None:
    before = index_of(mixed).read_bytes()
    with pytest.raises(TapeSealedError):
        seal_again(mixed)
    assert index_of(mixed).read_bytes() == before


class _Interrupted(Exception):
    pass


def interrupted(root: Path, after: int) -> None:
    """Seals, until so many extents have been read."""
    left = after

    def on_progress(position: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        seal_again(root, on_progress=on_progress)


def test_an_interrupted_seal_goes_on(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [BLOCK * 250, *MIXED, BLOCK * 100 + 1])
    expected = sealed(root)
    TapeRecorder(root, overwrite=True).commit()
    bare = index_of(root).read_bytes()
    state = index_of(root).with_name("index.db.seal")
    interrupted(root, 5)
    kept = state.stat().st_size
    assert kept > 4 * 32 * 32
    interrupted(root, 3)
    assert state.stat().st_size > kept
    assert index_of(root).read_bytes() == bare
    seen: list[int] = []
    assert seal_again(root, on_progress=seen.append) == expected
    assert seen[0] > 7 * 32 * BLOCK, "what was read before is not read again"
    assert not state.exists()
    assert whole(root) == b"".join(pieces_of(root))


def test_a_state_that_is_torn_or_of_another_tape_is_not_believed(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [BLOCK * 70, 5, 5])
    expected = sealed(root)
    TapeRecorder(root, overwrite=True).commit()
    bare = index_of(root).read_bytes()
    state = index_of(root).with_name("index.db.seal")
    interrupted(root, 2)
    kept = state.read_bytes()
    head = kept.index(b'"}', kept.index(b'{"token"')) + 2  # what makes it a state of ours
    some = random.Random(3)
    for case in range(60):
        torn = bytearray(kept)
        if case % 2:
            del torn[some.randrange(len(torn)) :]
        else:
            torn[some.randrange(len(torn))] ^= 1 << some.randrange(8)
        index_of(root).write_bytes(bare)
        state.write_bytes(torn)
        if torn[:head] != kept[:head]:
            with pytest.raises(OutputError, match="remove it"):
                seal_again(root)
            assert state.read_bytes() == torn
            state.unlink()
        assert seal_again(root) == expected, case
    flip(root / "folder 000" / "00000", 5)
    TapeRecorder(root, overwrite=True).commit()
    state.write_bytes(kept)
    assert seal_again(root) not in (expected, "")
    assert b"".join(pieces_of(root)) == whole(root)


@pytest.mark.long(but=1)
@pytest.mark.needs("strace")
@pytest.mark.parametrize("call", ["write", "pwrite64", "fsync", "rename", "unlink", "ftruncate"])
def test_a_seal_killed_at_each_change(tmp_path: Path, call: str) -> None:
    """Whenever it is killed there is a whole tape, without digests or with them, and sealing again ends well."""
    root = make(tmp_path / "data", [BLOCK * 40, *[9] * 40])
    expected = sealed(root)
    TapeRecorder(root, overwrite=True).commit()
    bare = index_of(root).read_bytes()
    for at in range(1, 9 if os.environ.get("TARTAPEFS_LONG") == "1" else 4):
        command = under_strace("-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={at}")
        killed = subprocess.run([*command, "seal", root, "--block-size", "64K"], capture_output=True, timeout=60)
        with Tape.discover(root) as tape:
            assert tape.seal in ("", expected)
            assert tape.rows_are_sound()
            was_sealed = bool(tape.seal)
        result = run("seal", root, "--block-size", "64K")
        assert result.returncode == (4 if was_sealed else 0), result.stderr
        assert sorted(os.listdir(root / ".tartape"))[:1] == ["index.db"]
        assert b"".join(pieces_of(root)) == whole(root)
        index_of(root).write_bytes(bare)
        if killed.returncode != -signal.SIGKILL and killed.returncode != 128 + signal.SIGKILL:
            assert at > 1, killed.stderr
            break  # there are no more of these calls
    else:
        assert call in ("write", "pwrite64", "ftruncate", "unlink")


def test_two_that_seal_one_tape(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [BLOCK * 100])
    TapeRecorder(root).commit()
    begun, end = threading.Event(), threading.Event()

    def wait(position: int) -> None:
        begun.set()
        end.wait(60)

    thread = threading.Thread(target=seal_again, args=(root,), kwargs={"on_progress": wait})
    thread.start()
    try:
        assert begun.wait(60)
        with pytest.raises(TapeBusyError):
            seal_again(root)
    finally:
        end.set()
        thread.join()
    with Tape.discover(root) as tape:
        assert tape.seal


def test_a_tape_that_is_recorded_again_meanwhile_is_not_sealed_over(tmp_path: Path) -> None:
    root = make(tmp_path / "data", MIXED)
    TapeRecorder(root).commit()

    def again(position: int) -> None:
        (root / "new").write_bytes(b"new")
        TapeRecorder(root, overwrite=True).commit()

    with pytest.raises((TapeBusyError, TapeIntegrityError)):
        seal_again(root, on_progress=again)
    with Tape.discover(root) as tape:
        assert not tape.seal
        assert tape.find("data/new")


@pytest.mark.root
def test_a_full_disk_leaves_the_tape(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [9] * 3000)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", disk], check=True)
    try:
        index = disk / "index.db"
        TapeRecorder(root, index).commit()
        before = index.read_bytes()
        result = run("seal", root, "--index", index)
        assert result.returncode == 1
        assert "No space left" in result.stderr
        assert index.read_bytes() == before
        assert not (disk / "index.db.new").exists()
    finally:
        umount(disk)
