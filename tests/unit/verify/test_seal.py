"""Seals: what they are made of, how they come about, and that nothing is read of a tape that does not belong to it.

`seal_of` is the definition in docs/verified.md once more, applied to an archive that `tarfile` takes apart.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from support.packed import edit
from support.programs import TARTAPEFS, run, umount, under_strace
from support.reference import Reference

from tartapefs import (
    OutputError,
    Tape,
    TapeBusyError,
    TapeError,
    TapeFormatError,
    TapeIntegrityError,
    TapePlayer,
    TapeRecorder,
    TapeSealedError,
    UnexpectedTapeError,
)
from tartapefs.archive import hash_tree as tree
from tartapefs.verify.seal import seal

BLOCK, FANOUT = 1 << 16, 62
PAGE = 1 << 14  # bytes of a page of the index
OLD_NS = 1_600_000_000_123_456_789
HASHES: dict[str, Callable[[bytes], bytes]] = {
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake3": lambda data: blake3(data).digest(),
}


def number(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "big") for value in values)


def seal_of(archive: bytes, algorithm: str, block_size: int) -> str:
    h = HASHES[algorithm]
    children: list[tuple[int, bytes]] = []
    run_start, run, count = 0, b"", 0
    pieces: list[tuple[int, bytes]] = []
    with tarfile.open(fileobj=io.BytesIO(archive), ignore_zeros=False) as tar:
        members = tar.getmembers()
    position = 0
    for member in members:
        header, body = archive[position : position + 512], archive[position + 512 :][: member.size]
        blocks = [h(body[at : at + block_size]) for at in range(0, len(body), block_size)]
        for at in range(0, len(blocks), FANOUT) if len(blocks) > 1 else ():
            start = position + 512 + at * block_size
            stop = min(start + FANOUT * block_size, position + 512 + member.size)
            pieces.append((start, h(b"piece" + number(start, stop) + b"".join(blocks[at : at + FANOUT]))))
        run += header + (b"".join(blocks) if len(blocks) < 2 else h(b"".join(blocks)))
        count += 1
        position += 512 + -(-member.size // 512) * 512
        if count == 8 or len(blocks) > 1 or member is members[-1]:
            children += [(run_start, h(b"leaf" + number(run_start, position) + run)), *pieces]
            run_start, run, count, pieces = position, b"", 0, []
    level = 0
    while level == 0 or len(children) > 1:
        level += 1
        groups = [children[at : at + FANOUT] for at in range(0, len(children), FANOUT)]
        children = [
            (group[0][0], h(b"node" + number(level, group[0][0]) + b"".join(digest for _, digest in group)))
            for group in groups
        ]
    return h(b"seal" + number(len(archive), len(members), block_size, level) + children[0][1]).hex()


def whole(root: Path) -> bytes:
    reference = Reference(root)
    return reference.read(0, reference.size)


def sealed(root: Path, algorithm: str = "blake3", block_size: int = BLOCK) -> str:
    """Records and seals the folder; returns the seal."""
    TapeRecorder(root, overwrite=True).commit()
    return seal_again(root, algorithm, block_size)


def seal_again(root: Path, algorithm: str = "blake3", block_size: int = BLOCK, **options: Any) -> str:
    with Tape.discover(root) as tape, closing(TapePlayer(tape, root)) as player:
        return seal(tape, player.source, player.at_home, algorithm, block_size, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def playing(root: Path, **options: Any) -> Iterator[TapePlayer]:
    with Tape.discover(root) as tape, closing(TapePlayer(tape, root, **options)) as player:
        yield player


def index_of(root: Path) -> Path:
    return root / ".tartape" / "index.db"


def make(root: Path, sizes: list[int]) -> Path:
    """Files of these sizes, eleven in a folder; old, so that nothing waits for the clock."""
    content = random.Random(len(sizes))
    for at, size in enumerate(sizes):
        path = root / f"folder {at // 11:03}" / f"{at:05}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.randbytes(size))
    root.mkdir(exist_ok=True)
    (root / "link").symlink_to("folder 000")
    for path in (*root.rglob("*"), root):
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    return root


def flip(path: Path, at: int, bit: int = 1) -> None:
    """Another byte there; the times are put back, as far as they can be."""
    before = path.stat()
    with path.open("r+b", buffering=0) as file:
        (old,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([old ^ bit]), at)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


MIXED = [0, 1, 511, 512, 513, 5000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7, 0, 300_000, 7]


@pytest.fixture(scope="module")
def _mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make(tmp_path_factory.mktemp("mixed") / "data", MIXED)
    sealed(root)
    return root


@pytest.fixture
def mixed(_mixed: Path, tmp_path: Path) -> Path:
    """A sealed tape of files of all kinds of sizes; it was copied here, so it is not at home."""
    return Path(shutil.copytree(_mixed, tmp_path / "data", symlinks=True))


# What a seal is


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


# Sealing


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
    """Seals, until so many stretches have been read."""
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


def pieces_of(root: Path) -> Iterator[bytes]:
    with playing(root) as player:
        for at in range(0, player.tape.total_size, 1 << 20):
            yield player.read(at, 1 << 20)


def test_a_state_that_is_torn_or_of_another_tape_is_not_believed(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [BLOCK * 70, 5, 5])
    expected = sealed(root)
    TapeRecorder(root, overwrite=True).commit()
    bare = index_of(root).read_bytes()
    state = index_of(root).with_name("index.db.seal")
    interrupted(root, 2)
    kept = state.read_bytes()
    head = kept.index(b'"}') + 2  # what makes it a state of ours
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


# Contents decide


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


# A damaged, or forged, index


def forge(index: Path, sql: str, *values: object) -> None:
    """Changes rows of the tables of digests, with checksums that are right again."""
    with closing(sqlite3.connect(index, isolation_level=None)) as database:
        assert database.execute(sql, values).rowcount
        for table, key in (("leaf", "start"), ("piece", "start"), ("node", "place")):
            for row in database.execute(f"SELECT * FROM {table}").fetchall():
                *numbers, digests, _ = row
                crc = zlib.crc32(digests + b"".join(value.to_bytes(8, "little") for value in numbers))
                database.execute(f"UPDATE {table} SET crc = ? WHERE {key} = ?", (crc, row[0]))


CHANGED = "CAST(substr({0}, 1, 32 * {1}) || ? || substr({0}, 32 * {1} + 33) AS BLOB)"


@pytest.mark.parametrize("table", ["leaf", "piece", "node"])
def test_another_digest_in_the_index(mixed: Path, table: str) -> None:
    """In any row, at any place, with a checksum that is right: what depends on it is not served."""
    good, expected = index_of(mixed).read_bytes(), whole(mixed)
    key = "place" if table == "node" else "start"
    with closing(sqlite3.connect(index_of(mixed))) as database:
        rows = database.execute(f"SELECT {key}, length(digests) / 32 FROM {table}").fetchall()
    assert rows
    for where, count in rows:
        for at in range(count):
            forge(
                index_of(mixed),
                f"UPDATE {table} SET digests = {CHANGED.format('digests', at)} WHERE {key} = ?",
                os.urandom(32),
                where,
            )
            with pytest.raises(TapeFormatError), playing(mixed) as player:
                assert player.read(0, len(expected)) == expected
            with contextlib.suppress(TapeFormatError), Tape.discover(mixed) as tape:
                assert not tape.rows_are_sound()
            index_of(mixed).write_bytes(good)


@pytest.mark.parametrize("table", ["leaf", "piece", "node"])
def test_digests_too_many(mixed: Path, table: str) -> None:
    forge(index_of(mixed), f"UPDATE {table} SET digests = CAST(digests || zeroblob(32) AS BLOB)")
    with pytest.raises(TapeFormatError), playing(mixed) as player:
        player.read(0, player.tape.total_size)


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM leaf WHERE start > 0",
        "DELETE FROM leaf WHERE start = 0",
        "DELETE FROM leaf WHERE start = (SELECT max(start) FROM leaf)",
        "DELETE FROM leaf WHERE start = (SELECT min(start) FROM leaf WHERE start > 0)",
        "DELETE FROM piece",
        "DELETE FROM node",
        "UPDATE leaf SET stop = stop + 512",
        "UPDATE leaf SET stop = NULL",
        "UPDATE leaf SET digests = digests || zeroblob(32)",
        "UPDATE leaf SET digests = 'text'",
        "UPDATE leaf SET crc = crc + 1",
        "UPDATE piece SET digests = NULL",
        "UPDATE piece SET digests = digests || zeroblob(32)",
        "UPDATE piece SET crc = 1",
        "UPDATE node SET place = place + (1 << 54)",
        "UPDATE node SET digests = 7",
        "UPDATE node SET crc = 'x'",
        "INSERT INTO piece VALUES (77, x'00', 0)",
        "INSERT INTO node VALUES (77, x'00', 0)",
    ],
)
def test_tables_of_digests_that_make_no_sense(mixed: Path, sql: str) -> None:
    with closing(sqlite3.connect(index_of(mixed), isolation_level=None)) as database:
        assert database.execute(sql).rowcount
    is_refused = False
    try:
        with playing(mixed) as player:
            is_refused = not player.tape.rows_are_sound()
            assert player.read(0, player.tape.total_size) == whole(mixed)
    except TapeFormatError:
        is_refused = True
    assert is_refused


def test_bits_that_flip_in_the_index(mixed: Path) -> None:
    good, expected, some = index_of(mixed).read_bytes(), whole(mixed), random.Random(5)
    used = [at for at in range(len(good)) if any(good[max(at - 16, 0) : at + 16])]  # most of a page is free
    refused = 0
    for _ in range(int(os.environ.get("TARTAPEFS_BIT_FLIPS", "300"))):
        changed = bytearray(good)
        changed[some.choice(used)] ^= 1 << some.randrange(8)
        index_of(mixed).write_bytes(changed)
        try:
            with playing(mixed) as player:
                assert player.read(0, player.tape.total_size) == expected
        except TapeError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("algorithm", "md5"),
        ("algorithm", None),
        ("block_size", 1 << 15),
        ("block_size", (1 << 16) + 1),
        ("block_size", "x"),
        ("levels", 0),
        ("levels", 99),
        ("levels", 2),
        ("seal", "0" * 64),
        ("seal", "short"),
    ],
)
def test_facts_of_a_seal_that_make_no_sense(mixed: Path, fact: str, value: object) -> None:
    from tartapefs.index import reader as module

    with closing(sqlite3.connect(index_of(mixed), isolation_level=None)) as database:
        database.execute("UPDATE tape SET value = ? WHERE fact = ?", (value, fact))
        facts = dict(database.execute("SELECT fact, value FROM tape WHERE fact != 'facts_digest'"))
        database.execute("UPDATE tape SET value = ? WHERE fact = 'facts_digest'", (module._digest(facts),))
    with pytest.raises(TapeFormatError):
        Tape.discover(mixed)


def test_a_forger_who_makes_every_digest_anew(mixed: Path) -> None:
    """Nothing but the seal, kept elsewhere, tells this tape from the other."""
    with Tape.discover(mixed) as tape:
        kept, fingerprint = tape.seal, tape.fingerprint
    flip(mixed / "folder 000" / "00008", 9)
    forged = sealed(mixed)
    assert forged != kept
    with playing(mixed, expect=forged) as player:
        player.read(0, player.tape.total_size)
    with Tape.discover(mixed) as tape:
        assert tape.expect(fingerprint) == "fingerprint", "which covers no contents"
        with pytest.raises(UnexpectedTapeError, match=kept):
            TapePlayer(tape, mixed, expect=kept)


def test_an_index_that_is_changed_under_a_player(mixed: Path) -> None:
    """Whatever the index becomes after it was opened: the bytes that belong to the seal, or an error."""
    expected = whole(mixed)
    small = mixed / "folder 000" / "00005"
    with Tape.discover(mixed) as tape, closing(TapePlayer(tape, mixed, expect=tape.seal)) as player:
        assert player.read(0, 512) == expected[:512]
        flip(small, 9)
        other = mixed.parent / "other.db"
        TapeRecorder(mixed, other).commit()
        with Tape.discover(mixed, other) as bare, closing(TapePlayer(bare, mixed)) as reader:
            seal(bare, reader.source, reader.at_home, "blake3", BLOCK)
        index_of(mixed).write_bytes(other.read_bytes())  # the same file, with all that a forger can make right
        start = expected.index(b"data/folder 000/00005")
        with pytest.raises(TapeError):
            player.read(start, 5000)


def test_the_first_fingerprint_is_compared_before_the_footer(mixed: Path) -> None:
    """Of a tape without digests a mount cannot look at all rows at once; who reads to the end is told in the end."""
    TapeRecorder(mixed, overwrite=True).commit()
    expected = whole(mixed)
    with Tape.discover(mixed) as tape:
        fingerprint = tape.fingerprint
    with playing(mixed, expect=fingerprint) as player:
        assert player.read(0, len(expected)) == expected
    edit(index_of(mixed), f"UPDATE member SET mode = {0o120755} WHERE name = x'6c696e6b'")
    with playing(mixed, expect=fingerprint) as player:
        player.read(0, 512)
        with pytest.raises(TapeIntegrityError, match="the index changed"):
            player.audit()


def test_blake3_that_is_not_installed(mixed: Path) -> None:
    code = (
        "import sys; sys.modules['blake3'] = None\n"
        "from tartapefs import Tape, TapeError\n"
        "try: Tape.discover(sys.argv[1])\n"
        "except TapeError as error: print(error)"
    )
    result = subprocess.run([TARTAPEFS[0], "-c", code, mixed], capture_output=True, text=True)
    assert 'pip install "tartapefs[blake3]"' in result.stdout, result.stderr


def test_a_checker_takes_no_hash_across_two_others() -> None:
    one, other = os.urandom(32), os.urandom(32)
    assert tree._is_among(one, other + one)
    assert not tree._is_among((one + other)[5:37], one + other)
    assert not tree._is_among(one, b"")


# The commands


def test_record_and_seal_by_command(tmp_path: Path) -> None:
    root = make(tmp_path / "data", MIXED)
    result = run("record", root, "--digest", "sha256")
    assert result.returncode == 0, result.stderr
    fingerprint, made = result.stdout.split()
    assert made == seal_of(whole(root), "sha256", 1 << 17)
    facts = json.loads(run("info", root, "--json").stdout)
    assert (facts["fingerprint"], facts["seal"]) == (fingerprint, made)
    assert "sha256" in facts["digests"]
    assert run("record", root, "--force", "--no-digest").returncode == 0
    assert json.loads(run("info", root, "--json").stdout)["seal"] is None
    result = run("seal", root, "--block-size", "64K", "--json")
    assert json.loads(result.stdout)["seal"] == seal_of(whole(root), "blake3", BLOCK)
    assert run("seal", root).returncode == 4
    assert run("seal", root, "--block-size", "1000").returncode == 2


def test_verify_expects(mixed: Path) -> None:
    facts = json.loads(run("info", mixed, "--json").stdout)
    result = run("verify", mixed, "--expect", facts["seal"].upper())
    assert (result.returncode, "covers contents" in result.stderr) == (0, True)
    result = run("verify", mixed, "--expect", facts["fingerprint"])
    assert (result.returncode, "no contents" in result.stderr) == (0, True)
    for command in (["verify"], ["mount", mixed.parent / "nowhere"], ["check", mixed / "link"]):
        name, *rest = command
        result = run(name, mixed, *rest, "--expect", "0" * 64)
        assert result.returncode == 1, result.stderr
        assert "not the tape that was expected" in result.stderr


def test_verify_deep_lists_all_damage(mixed: Path) -> None:
    assert run("verify", mixed, "--deep").returncode == 0
    flip(mixed / "folder 000" / "00005", 9)
    flip(mixed / "folder 000" / "00010", 2 * BLOCK)
    flip(mixed / "folder 001" / "00012", 299_999)
    (mixed / "folder 000" / "00003").chmod(0o600)
    os.utime(mixed / "folder 000" / "00004")  # which is no difference
    quick = run("verify", mixed)
    assert quick.returncode == 1
    assert len(quick.stdout.splitlines()) == 1, "size and mtime show the mode alone"
    found = json.loads(run("verify", mixed, "--deep", "--json").stdout)
    names = [drift["member"] for drift in found["drift"]]
    assert sorted(names) == [f"data/folder {f}" for f in ("000/00003", "000/00005", "000/00010", "001/00012")]
    assert found["blocks"] == sum(-(-size // BLOCK) for size in MIXED)
    assert "block 4 " in run("verify", mixed, "--deep").stdout
    assert len(json.loads(run("verify", mixed, "--sample", "100%", "--json").stdout)["drift"]) == 4
    assert "mtime" in run("verify", mixed, "--strict").stdout


def test_verify_sees_a_touched_file_that_changed_without_reading_the_others(mixed: Path) -> None:
    flip(mixed / "folder 000" / "00005", 9)
    os.utime(mixed / "folder 000" / "00010")
    assert run("verify", mixed).returncode == 0
    flip(mixed / "folder 000" / "00010", BLOCK)
    os.utime(mixed / "folder 000" / "00010")
    result = run("verify", mixed)
    assert (result.returncode, len(result.stdout.splitlines())) == (1, 1)
    assert "00010: the contents of block 1 " in result.stdout


def test_a_sample_reads_about_as_much_as_it_says(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [BLOCK * 200, *[10] * 300])
    sealed(root)
    counts = [json.loads(run("verify", root, "--sample", "10", "--json").stdout)["blocks"] for _ in range(3)]
    assert all(25 < count < 90 for count in counts), counts
    for share in ("0", "101%", "x"):
        assert run("verify", root, "--sample", share).returncode == 2


def test_verify_deep_goes_on_where_it_stopped(mixed: Path, tmp_path: Path) -> None:
    from tartapefs.verify.content_scan import DeepState

    state = tmp_path / "state"
    flip(mixed / "folder 000" / "00005", 9)
    flip(mixed / "folder 001" / "00012", 9)
    with Tape.discover(mixed) as tape, DeepState(tape, os.fspath(state)) as first:
        found = TapeIntegrityError("data/folder 000/00005", [])
        first.passed(tape.find("data/folder 000/00010").start, [found])
        first.save()
    result = json.loads(run("verify", mixed, "--deep", "--state", state, "--json").stdout)
    assert [drift["member"] for drift in result["drift"]] == ["data/folder 000/00005", "data/folder 001/00012"]
    assert 0 < result["blocks"] < sum(-(-size // BLOCK) for size in MIXED) - 8
    assert not state.exists()
    state.write_bytes(b"garbage\n")
    assert run("verify", mixed, "--deep", "--state", state).returncode == 2
    assert state.read_bytes() == b"garbage\n"


def test_what_needs_digests_says_so(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [5])
    TapeRecorder(root).commit()
    for command in (["verify", root, "--deep"], ["verify", root, "--sample", "1%"],
                    ["verify-extracted", root, root], ["extract", root, root / "link", "data/link"],
                    ["mount", root, tmp_path, "--scrub-share", "5"]):  # fmt: skip
        result = run(*command)
        assert result.returncode == 2, command
        assert "tartapefs seal" in result.stderr
