"""Generations: what is new is added to a recording; what was there stays a prefix of the archive, byte for byte."""

import os
import random
import shutil
import sqlite3
import struct
import subprocess
from collections.abc import Callable
from contextlib import closing
from itertools import chain
from pathlib import Path
from zlib import crc32

import pytest
from support.generations import Generations

from tartapefs import (
    Tape,
    TapeConstraintError,
    TapeFormatError,
    TapeIntegrityError,
    TapeNotFoundError,
    TapePlayer,
    TapeRecorder,
)
from tartapefs.play.audit import verify
from tartapefs.verify.seal import seal

FOOTER = 1024


@pytest.fixture
def expected(tree: Path) -> Generations:
    """The folder is recorded, as one generation."""
    TapeRecorder(tree).commit()
    generations = Generations(tree)
    generations.append()
    return generations


def archive(tree: Path) -> bytes:
    """The whole archive, after an audit, a comparison of all members and of the digests of the index."""
    with Tape.discover(tree) as tape, closing(TapePlayer(tape)) as player:
        player.audit()
        assert list(verify(player.inspector)) == []
        assert tape.rows_are_sound() and tape.has_fingerprint()
        return player.read(0, tape.total_size)


def append(tree: Path, processes: int = 1) -> str:
    return TapeRecorder(tree, append=True, processes=processes).commit()


def grow(tree: Path, number: int = 0) -> None:
    """New names at the root and below, in old folders and new ones, of each kind, between the names that are there."""
    (tree / f"a new file {number}").write_bytes(os.urandom(700))
    (tree / "photos" / f"new{number}.bin").write_bytes(os.urandom(5000))
    (tree / "photos" / f"new{number}").mkdir()
    (tree / "photos" / f"new{number}" / "deep.txt").write_text("deep")
    (tree / "empty-folder" / f"link{number}").symlink_to("nowhere")
    (tree / f"zzz{number}").mkdir(mode=0o750)
    for folder in (tree, tree / "photos", tree / "empty-folder"):
        os.utime(folder, (0, 10**9 + number))  # a clock that moves by whole seconds


def test_one_generation_more(tree: Path, expected: Generations) -> None:
    before = archive(tree)
    assert before == expected.archive
    grow(tree)
    fingerprint = append(tree)
    after = archive(tree)
    assert after == expected.append()
    assert after.startswith(before[:-FOOTER])
    with Tape.discover(tree) as tape:
        assert [g.start for g in tape.generations] == [0, len(before) - FOOTER]
        assert [g.stop for g in tape.generations] == expected.ends
        assert [g.members for g in tape.generations] == [len(names) for names in expected.names]
        assert tape.generations[-1].fingerprint == tape.fingerprint == fingerprint
        assert [m.name for m in tape.members()] == list(chain.from_iterable(expected.names))


@pytest.mark.parametrize("processes", [1, 2])
def test_many_generations(tree: Path, expected: Generations, processes: int) -> None:
    fingerprints = []
    with Tape.discover(tree) as tape:
        fingerprints.append(tape.fingerprint)
    for number in range(12):
        before = expected.archive
        grow(tree, number)
        fingerprints.append(append(tree, processes))
        assert archive(tree) == expected.append()
        assert expected.archive.startswith(before[:-FOOTER])
    with Tape.discover(tree) as tape:
        assert [g.fingerprint for g in tape.generations] == fingerprints


def test_lookups(tree: Path, expected: Generations) -> None:
    """By name the latest of each path; children of a folder from all generations, in order; folders once."""
    for number in range(4):
        grow(tree, number)
        append(tree)
        expected.append()
    latest = {}
    position = 0
    with Tape.discover(tree) as tape:
        for member in tape.members():
            assert member.start == position
            position = member.stop
            latest[member.name] = member
        for name, member in latest.items():
            assert tape.find(name) == member
            assert tape.find(name.rstrip(b"/")) == member
        for missing in (b"data/zzz9", b"data/photos/new0/deep", b"data/photos\0new0", b"other", b"data/a"):
            with pytest.raises(KeyError):
                tape.find(missing)
        assert list(tape.folders()) == sorted(
            (m for m in latest.values() if m.is_directory), key=lambda member: member.start
        )
        for folder in [m for m in latest.values() if m.is_directory]:
            names = sorted(
                (name for name in latest if name != folder.name and name.startswith(folder.name)),
                key=lambda name: name.rstrip(b"/"),
            )
            direct = [name for name in names if b"/" not in name[len(folder.name) :].rstrip(b"/")]
            assert [child.name for child in tape.children(folder)] == direct
            assert all(child == latest[child.name] for child in tape.children(folder))
        assert sorted(tape.latest_members()) == sorted(latest.values())


def test_nothing_new(tree: Path, expected: Generations) -> None:
    grow(tree)
    append(tree)
    index = tree / ".tartape" / "index.db"
    before, found = index.read_bytes(), index.stat()
    recorder = TapeRecorder(tree, append=True)
    with Tape.discover(tree) as tape:
        assert recorder.commit() == tape.fingerprint
        assert recorder.member_count == tape.member_count
    assert index.read_bytes() == before
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (found.st_ino, found.st_mtime_ns)
    assert os.listdir(tree / ".tartape") == ["index.db"]


def test_only_a_folder_that_changed(tree: Path, expected: Generations) -> None:
    (tree / "photos").chmod(0o700)
    append(tree)
    assert archive(tree) == expected.append()
    assert expected.names[1] == [b"data/photos/"]


def test_within_one_second(tree: Path, expected: Generations) -> None:
    """A folder whose header stays as it was is not repeated, and its new names belong to it all the same."""
    found = tree.stat()
    (tree / "new").write_text("new")
    os.utime(tree, ns=(found.st_atime_ns, found.st_mtime_ns // 10**9 * 10**9 + (found.st_mtime_ns + 1) % 10**9))
    append(tree)
    assert archive(tree) == expected.append()
    assert expected.names[1] == [b"data/new"]
    (tree / "another").touch()
    with Tape.discover(tree) as tape, closing(TapePlayer(tape)) as player, pytest.raises(TapeIntegrityError):
        player.audit()


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": lambda tree: (tree / "script.sh").write_text("another"),
    "gone": lambda tree: (tree / "script.sh").unlink(),
    "touched": lambda tree: os.utime(tree / "script.sh", (0, 0)),
    "mode": lambda tree: (tree / "script.sh").chmod(0o644),
    "link": lambda tree: ((tree / "link").unlink(), (tree / "link").symlink_to("elsewhere")),
    "replaced": lambda tree: (shutil.copy2(tree / "script.sh", tree / "x"), (tree / "x").rename(tree / "script.sh")),
    "file to folder": lambda tree: ((tree / "script.sh").unlink(), (tree / "script.sh").mkdir()),
    "folder to file": lambda tree: (shutil.rmtree(tree / "empty-folder"), (tree / "empty-folder").touch()),
    "folder gone": lambda tree: shutil.rmtree(tree / "photos"),
    "renamed": lambda tree: (tree / "script.sh").rename(tree / "renamed"),
}


@pytest.mark.parametrize("generation", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_recorded_must_be_there(tree: Path, expected: Generations, change: str, generation: int) -> None:
    """All reasons at once, the index untouched."""
    if generation:
        (tree / "script.sh").unlink()
        (tree / "link").unlink()
        TapeRecorder(tree, overwrite=True).commit()
        (tree / "script.sh").write_text("#!/bin/sh\n")
        (tree / "link").symlink_to("photos")
        append(tree)
    grow(tree)
    CHANGES[change](tree)
    (tree / "empty.txt").unlink()
    index = tree / ".tartape" / "index.db"
    before = index.read_bytes()
    with pytest.raises(TapeConstraintError) as caught:
        append(tree)
    assert "empty.txt" in {problem.path for problem in caught.value.problems}
    assert len(caught.value.problems) == 2
    assert index.read_bytes() == before
    assert os.listdir(tree / ".tartape") == ["index.db"]


def test_what_is_gone_is_named_once(tree: Path, expected: Generations) -> None:
    """From whichever generation, also while another waits for what is gone, and without what lies in a folder."""
    for number in range(3):
        grow(tree, number)
        append(tree)
    for path in ("a new file 2", "empty.txt", "zzz0"):
        shutil.rmtree(tree / path) if (tree / path).is_dir() else (tree / path).unlink()
    for path in ("photos", "empty-folder"):
        shutil.rmtree(tree / path)
    (tree / "empty-folder").touch()
    os.utime(tree, (0, 10**9 + 2))
    with pytest.raises(TapeConstraintError) as caught:
        append(tree)
    assert [(problem.path, "type" in problem.reason) for problem in caught.value.problems] == [
        ("a new file 2", False), ("empty-folder", True), ("empty.txt", False), ("photos", False), ("zzz0", False),
    ]  # fmt: skip


def test_a_folder_is_compared_with_its_latest_header(tree: Path, expected: Generations) -> None:
    """While the generation that has it waits for something else that is gone."""
    for number in range(2):
        grow(tree, number)
        append(tree)
    (tree / "a new file 1").unlink()
    os.utime(tree, (0, 10**9 + 1))
    with pytest.raises(TapeConstraintError) as caught:
        append(tree)
    assert [problem.path for problem in caught.value.problems] == ["a new file 1"]


def test_first_differences_give_the_valid_prefix(tree: Path, expected: Generations) -> None:
    (tree / "photos" / "511.bin").write_bytes(b"another")
    recorder = TapeRecorder(tree, append=True)
    with pytest.raises(TapeConstraintError):
        recorder.commit()
    before = expected.archive
    TapeRecorder(tree, overwrite=True).commit()
    after = archive(tree)
    assert 0 < recorder.valid_prefix < len(before)
    assert after[: recorder.valid_prefix] == before[: recorder.valid_prefix]
    assert after[: recorder.valid_prefix + 512] != before[: recorder.valid_prefix + 512]


def test_without_a_tape(tree: Path) -> None:
    with pytest.raises(TapeNotFoundError):
        append(tree)
    assert not (tree / ".tartape").exists()


@pytest.mark.parametrize(
    "options", [{"exclude": "x"}, {"exclude": ()}, {"anonymize": True}, {"overwrite": True}, {"digest": ""}]
)
def test_options_are_the_tapes_own(tree: Path, expected: Generations, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="keeps its options"):
        TapeRecorder(tree, append=True, **options)  # type: ignore[arg-type]


def test_excluded_names_stay_out(tree: Path) -> None:
    TapeRecorder(tree, exclude="*.tmp").commit()
    (tree / "new.tmp").touch()
    (tree / "new.txt").touch()
    append(tree)
    with Tape.discover(tree) as tape:
        assert tape.excluded == ("*.tmp",)
        assert tape.find("data/new.txt")
        with pytest.raises(KeyError):
            tape.find("data/new.tmp")


def test_at_random(tmp_path: Path) -> None:
    """Random folders that grow by random names, in random generations."""
    chance = random.Random(os.environ.get("TARTAPEFS_SEED", "generations"))
    for case in range(15):
        root = tmp_path / f"case{case}"
        root.mkdir()
        expected, folders, clock = Generations(root), [root], 10**9
        for generation in range(chance.randint(1, 6)):
            for _ in range(chance.randint(0, 12)):
                folder = chance.choice(folders)
                place = folder / "".join(chance.choice("ab-.~ \x7f") for _ in range(chance.randint(1, 4)))
                if place.name in (".", "..") or os.path.lexists(place):
                    continue
                kind = chance.randrange(3)
                if kind == 0:
                    place.mkdir()
                    folders.append(place)
                elif kind == 1:
                    place.symlink_to("target")
                else:
                    place.write_bytes(chance.randbytes(chance.choice((0, 1, 511, 512, 513, 3000))))
                clock += 1
                os.utime(folder, (0, clock))
            if generation:
                append(root)
            else:
                TapeRecorder(root).commit()
            assert archive(root) == expected.append(), (case, generation)


@pytest.mark.parametrize("block_size", [1 << 16, 1 << 17])
@pytest.mark.long
def test_a_sealed_tape_stays_sealed(tree: Path, tmp_path: Path, block_size: int) -> None:
    """The seal is the one that an equal tape without digests gets when it is sealed as a whole."""
    (tree / "many").mkdir()
    for number in range(300):
        (tree / "many" / f"{number:03}").write_bytes(b"%d" % number)
    twin = tmp_path / "twin" / "data"
    twin.mkdir(parents=True)
    synchronise(tree, twin)
    TapeRecorder(tree).commit()
    TapeRecorder(twin).commit()
    seal_now(tree, block_size)
    expected = Generations(tree)
    expected.append()
    for number in range(6):
        grow(tree, number)
        for other in range(number * 40):
            (tree / "photos" / f"new{number}" / f"{other}").write_bytes(os.urandom(other))
        (tree / f"large{number}").write_bytes(os.urandom(200_000 * number))
        (tree / "photos" / "new0.bin").read_bytes()
        synchronise(tree, twin)
        append(tree)
        append(twin)
        assert archive(tree) == archive(twin) == expected.append()
        with Tape.discover(tree) as tape:
            assert (tape.algorithm, tape.block_size) == ("sha256", block_size)
            sealed, index = tape.seal, (twin / ".tartape" / "index.db").read_bytes()
        assert seal_now(twin, block_size) == sealed
        assert archive(twin) == expected.archive
        (twin / ".tartape" / "index.db").write_bytes(index)  # without digests again


def test_contents_that_change_while_they_are_hashed_for_a_sealed_tape(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TapeRecorder(tree).commit()
    seal_now(tree, 1 << 17)
    before = (tree / ".tartape" / "index.db").read_bytes()
    (tree / "new").write_bytes(bytes(1000))
    preadv = os.preadv

    def changing(fd: int, buffers: list[memoryview], offset: int) -> int:
        (tree / "new").write_bytes(bytes(1001))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", changing)
    with pytest.raises(TapeIntegrityError, match="new: size changed"):
        append(tree)
    assert (tree / ".tartape" / "index.db").read_bytes() == before


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("UPDATE pack SET crc = crc + 1 WHERE start = 0", "open"),
        ("UPDATE generation SET crc = crc + 1 WHERE start = 0", "open"),
        ("UPDATE generation SET fingerprint = zeroblob(32) WHERE start = 0", "open"),
        ("UPDATE generation SET start = start + 512 WHERE start > 0", "open"),
        ("DELETE FROM generation WHERE start = 0", "open"),
        ("DELETE FROM generation", "open"),
        ("UPDATE superseded SET crc = crc + 1", "audit"),
        ("UPDATE superseded SET crc = x'00'", "audit"),
        ("UPDATE superseded SET crc = x'00'", "verify"),
        ("UPDATE superseded SET crc = 9e999", "verify"),
        ("DELETE FROM superseded", "verify"),
        ("DELETE FROM name_filter", "find"),
        ("UPDATE name_filter SET bits = zeroblob(length(bits))", "find"),
        ("UPDATE name_filter SET bits = 1", "find"),
        ("UPDATE name_filter SET crc = crc + 1", "find"),
        ("UPDATE name_filter SET crc = x'00'", "verify"),
        ("DELETE FROM name_filter", "verify"),
        ("UPDATE pack SET start = start + 512 WHERE start > 0", "open"),
    ],
)
def test_a_damaged_index(tree: Path, expected: Generations, statement: str, seen: str) -> None:
    """It is refused, or says drift; it is never extended."""
    grow(tree)
    append(tree)
    with closing(sqlite3.connect(tree / ".tartape" / "index.db")) as database, database:
        database.execute(statement)
    if seen == "open":
        with pytest.raises(TapeFormatError):
            Tape.discover(tree)
    elif seen == "audit":
        with Tape.discover(tree) as tape, closing(TapePlayer(tape)) as player:
            with pytest.raises((TapeFormatError, TapeIntegrityError)):
                player.audit()
            with pytest.raises(TapeFormatError):
                list(tape.superseded())
    elif seen == "find":
        with Tape.discover(tree) as tape, pytest.raises(TapeFormatError):
            tape.find("data/zzz0")
    else:
        with Tape.discover(tree) as tape:
            assert not tape.rows_are_sound()


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_were_exchanged_are_not_extended(tree: Path, processes: int) -> None:
    """With right checksums: the digest of all rows tells."""
    for number in range(600):
        (tree / f"{number:03}").touch()
    TapeRecorder(tree).commit()
    with closing(sqlite3.connect(tree / ".tartape" / "index.db")) as database, database:
        start, count, folders, members = database.execute(
            "SELECT start, count, folders, members FROM pack ORDER BY start DESC LIMIT 1"
        ).fetchone()
        damaged = members.replace(b"script.sh", b"scripx.sh")
        assert damaged != members
        crc = crc32(struct.pack("<qHH", start, count, folders) + damaged)
        database.execute("UPDATE pack SET members = ?, crc = ? WHERE start = ?", (damaged, crc, start))
    (tree / "script.sh").rename(tree / "scripx.sh")
    (tree / "new").touch()
    before = (tree / ".tartape" / "index.db").read_bytes()
    with pytest.raises(TapeFormatError, match="its rows fail their digest"):
        append(tree, processes)
    assert (tree / ".tartape" / "index.db").read_bytes() == before


def synchronise(tree: Path, twin: Path) -> None:
    subprocess.run(["rsync", "-a", "--exclude=/.tartape", f"{tree}/", twin], check=True)


def seal_now(tree: Path, block_size: int) -> str:
    with Tape.discover(tree) as tape, closing(TapePlayer(tape)) as player:
        return seal(tape, player.source, player.at_home, "sha256", block_size)
