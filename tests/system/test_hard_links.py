"""Folders whose files have several names, recorded as hard links, from the recording to what readers make of them."""

import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.generations import Generations
from support.mounting import mountpoint as mountpoint
from support.programs import run
from support.reference import Reference, gnu_tar
from support.seals import index_of, playing, seal_again, seal_of
from support.trees import pattern, write

from tartapefs import (
    Tape,
    TapeConstraintError,
    TapeFormatError,
    TapeIntegrityError,
    TapePlayer,
    TapeRecorder,
)
from tartapefs.play.audit import verify
from tartapefs.play.inspection import Inspector
from tartapefs.source.folder import Source


def fill(root: Path) -> Path:
    """Files of all kinds of sizes with one to four names, near and far from each other; one has a name outside."""
    chance = random.Random(19)
    folders = [root / name for name in ("a", "b/c", "b", ".", "z")]
    for number in range(60):
        first = write(chance.choice(folders) / f"{number:02}", pattern(chance.choice((0, 1, 511, 512, 3000)), number))
        for name in range(chance.choice((0, 0, 1, 3))):
            os.link(first, chance.choice(folders) / f"{chance.randrange(100):02} {number:02} {name}")
    write(root / "large", pattern(200_000))
    os.link(root / "large", root / "a" / "also large")
    os.link(write(root / "shared", b"with a name outside"), root.parent / "outside")
    (root / "link").symlink_to("large")
    os.link(root / "link", root / "the same link", follow_symlinks=False)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for folder in ("a", "b/c", "z"):
        (root / folder).mkdir(parents=True)
    return fill(root)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A recorded file with two names."""
    root = tmp_path / "data"
    root.mkdir()
    os.link(write(root / "first", b"x" * 700), root / "second")
    TapeRecorder(root, hard_links=True).commit()
    return root


def inodes(root: Path) -> set[frozenset[str]]:
    """Which names are of one file each."""
    found: dict[int, set[str]] = {}
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink() and ".tartape" not in path.parts:
            found.setdefault(path.stat().st_ino, set()).add(str(path.relative_to(root)))
    return {frozenset(names) for names in found.values()}


def bodies(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for names in inodes(root) for name in names}


def drift_of(root: Path, check: str = "full") -> list[tuple[str, str]]:
    with Tape.discover(root) as tape, Source(os.fspath(root)) as source:
        return [(e.member, str(e.differences[0].what)) for e in verify(Inspector(tape, source, check == "full"))]


def test_the_archive(root: Path) -> None:
    """It is that of an implementation of its own, and of GNU tar, which has links to symbolic links, too."""
    TapeRecorder(root, hard_links=True).commit()
    expected = Reference(root, hard_links=True)
    whole = expected.read(0, expected.size)
    with playing(root) as player:
        assert player.read(0, player.tape.total_size) == whole
        assert b"".join(event.data for event in player.play()) == whole
        sums = {e.entry.arc_path: e.metadata.md5sum for e in player.play() if e.type == "file_end"}
        for name, start in expected.starts.items():
            member = player.tape.find(name)
            assert (member.start, member.header()) == (start, whole[start : start + 512])
            assert member.is_hard_link == (whole[start + 156 : start + 157] == b"1")
            assert (sums[member.arc_path] is None) == (not member.is_file)
        assert player.tape.version == 3 + 16
        assert player.tape.rows_are_sound()
        some = random.Random(2)
        for at in some.choices(range(len(whole)), k=200):
            assert player.read(at, 5000) == whole[at : at + 5000]
    (root / "the same link").unlink()
    TapeRecorder(root, overwrite=True).commit()
    with playing(root) as player:
        assert player.read(0, player.tape.total_size) == gnu_tar(root, hard_links=True)


def test_without_the_option_and_without_links(root: Path, tmp_path: Path) -> None:
    """Full copies are the default; a folder without further names has the same archive with the option."""
    TapeRecorder(root).commit()
    expected = Reference(root)
    with playing(root) as player:
        assert player.read(0, player.tape.total_size) == expected.read(0, expected.size)
        assert player.tape.version == 3
    plain = tmp_path / "plain"
    write(plain / "file", b"x")
    assert TapeRecorder(plain).commit() == TapeRecorder(plain, overwrite=True, hard_links=True).commit()


@pytest.mark.fuse
def test_mounted(root: Path, mountpoint: Path) -> None:
    expected = Reference(root, hard_links=True)
    assert run("mount", "--record", "--hard-links", root, mountpoint).returncode == 0
    try:
        assert (mountpoint / "archive.tar").read_bytes() == expected.read(0, expected.size)
    finally:
        assert run("unmount", mountpoint).returncode == 0


def test_what_commands_say(pair: Path) -> None:
    result = run("record", "--force", pair)
    assert 'as recorded before: --hard-links ("--no-hard-links" to drop)' in result.stderr
    assert "hard links: 1 further names of files are links instead of 700 bytes" in result.stderr
    assert json.loads(run("info", pair, "--json").stdout)["hard_links"] is True
    line = run("ls", pair).stdout.splitlines()[-1]
    assert line.startswith("hrw") and line.endswith("data/second link to data/first")
    facts = json.loads(run("ls", pair, "--json").stdout.splitlines()[-1])
    assert (facts["type"], facts["target"], facts["size"]) == ("hard link", "data/first", 0)
    assert run("locate", pair, "data/second").stdout.endswith("header [2048, 2560)\n")
    assert run("verify", pair).returncode == 0
    assert "no longer: --hard-links" in run("record", "--force", "--no-hard-links", pair).stderr


def split_up(root: Path) -> None:
    """The second name becomes a file of its own, with the same contents and times."""
    found = (root / "second").stat()
    (root / "second").unlink()
    shutil.copy2(root / "first", root / "second")
    os.utime(root / "second", ns=(found.st_atime_ns, found.st_mtime_ns))


def swap_first(root: Path) -> None:
    os.rename(root / "first", root / "other")
    shutil.copy2(root / "other", root / "first")
    (root / "other").unlink()


@pytest.mark.parametrize("check", ["full", "mtime"])
@pytest.mark.parametrize("change", [split_up, swap_first])
def test_names_that_are_of_two_files_by_now(pair: Path, change: object, check: str) -> None:
    """This is drift, also where inodes and ctimes are not compared, and the link's header is not served."""
    change(pair)  # type: ignore[operator]
    assert ("data/second", "target") in drift_of(pair, check)
    with Tape.discover(pair) as tape, closing(TapePlayer(tape, pair, check)) as player:  # type: ignore[arg-type]
        second = tape.find("data/second")
        with pytest.raises(TapeIntegrityError, match="second: target changed"):
            player.read(second.start, 512)


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_name_that_is_gone(pair: Path, name: str) -> None:
    (pair / name).unlink()
    with playing(pair) as player, pytest.raises(TapeIntegrityError):
        player.read(player.tape.find("data/second").start, 512)


def test_a_copy_keeps_links_or_is_another(root: Path, tmp_path: Path) -> None:
    """As cp copies: with links it is the tape's folder, without it is none."""
    TapeRecorder(root, hard_links=True).commit()
    for option, is_same in (("--preserve=links", True), ("--no-preserve=links", False)):
        copy = tmp_path / option / "data"
        copy.parent.mkdir()
        subprocess.run(["cp", "-a", option, root, copy.parent], check=True)
        found = drift_of(copy, "mtime")
        assert (found == []) == is_same
        assert {what for _, what in found} <= {"target"}


@pytest.mark.parametrize("is_sealed", [False, True], ids=["bare", "sealed"])
def test_generations(root: Path, is_sealed: bool) -> None:
    """New files with several names are links in their own generation."""
    generations = Generations(root, hard_links=True)
    TapeRecorder(root, hard_links=True).commit()
    if is_sealed:
        seal_again(root)
    generations.append()
    for folder in ("a", "new"):
        os.link(write(root / folder / "new 1", pattern(900, 7)), root / "b" / f"also {folder}")
    os.utime(root, (0, 10**9))
    TapeRecorder(root, append=True).commit()
    expected = generations.append()
    with playing(root) as player:
        assert player.tape.version == 19 + 2 + 8 + is_sealed
        assert player.read(0, player.tape.total_size) == expected
        assert player.tape.find("data/b/also new").is_file
        assert player.tape.find("data/new/new 1").target == b"data/b/also new"
        assert player.tape.rows_are_sound()
    assert run("verify", root).returncode == 0


def test_a_new_name_of_a_recorded_file(pair: Path, tmp_path: Path) -> None:
    """It moves the file's ctime, which is drift at home. In a copy it is appended as a link, if it comes later."""
    os.link(pair / "first", pair / "third")
    with pytest.raises(TapeConstraintError, match="ctime changed"):
        TapeRecorder(pair, append=True).commit()
    (pair / "third").unlink()
    TapeRecorder(pair, overwrite=True).commit()
    copy = tmp_path / "elsewhere" / "data"
    copy.parent.mkdir()
    subprocess.run(["cp", "-a", pair, copy.parent], check=True)
    os.link(copy / "first", copy / "third")
    generations = Generations(pair, hard_links=True)
    generations.append()
    TapeRecorder(copy, append=True).commit()
    with Tape.discover(copy) as tape:
        assert tape.find("data/third").target == b"data/first"
    os.link(copy / "first", copy / "a name before")
    with pytest.raises(TapeConstraintError, match="has a name before it by now"):
        TapeRecorder(copy, append=True).commit()


def test_targets_that_are_too_long(tmp_path: Path) -> None:
    """A name of 200 bytes fits, and as a target it does not: it is refused with a hint, or in a block as GNU tar's."""
    root = tmp_path / "data"
    folder = root / ("p" * 90)
    os.link(write(folder / ("n" * 95), b"x"), folder / "z")
    assert run("record", root).returncode == 0
    result = run("record", root, "--force", "--hard-links")
    assert result.returncode == 4
    assert "target has 191 bytes, at most 100 fit" in result.stderr
    assert '--force --hard-links --long-names" records names' in result.stderr
    assert run("record", root, "--force", "--hard-links", "--long-names").returncode == 0
    expected = Reference(root, hard_links=True)
    command = ["tar", "--format=gnu", "--sort=name", "--owner=root:0", "--group=root:0", "-cf", "-", "data"]
    theirs = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    with playing(root) as player:
        assert player.tape.version == 3 + 4 + 16
        whole = player.read(0, player.tape.total_size)
        member = player.tape.find(f"data/{'p' * 90}/z")
        assert whole == expected.read(0, expected.size)
        assert whole[member.start : member.body - 512] in theirs  # header and body of "K"
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", "-"], input=whole, cwd=tmp_path / "out", check=True)
    assert inodes(tmp_path / "out" / "data") == inodes(root)


def test_sealed(root: Path, tmp_path: Path) -> None:
    """The seal is that of the definition; folders are extracted with their links, and compared with them."""
    TapeRecorder(root, hard_links=True).commit()
    seal_again(root)
    copy = tmp_path / "copy.tar"
    with playing(root) as player:
        whole = player.read(0, player.tape.total_size)
        assert player.tape.seal == seal_of(whole, player.tape.algorithm, player.tape.block_size)
    copy.write_bytes(whole)
    (tmp_path / "out").mkdir()
    for force in ([], ["--force"], ["--threads", "4"]):
        result = run("extract", root, copy, "data", "-C", tmp_path / "out", *force)
        assert result.returncode == 0, result.stderr
        assert bodies(tmp_path / "out" / "data") == bodies(root)
        assert inodes(tmp_path / "out" / "data") == inodes(root)
        assert run("verify-extracted", root, tmp_path / "out" / "data").returncode == 0
    also = tmp_path / "out" / "data" / "a" / "also large"
    found = also.stat()
    also.unlink()
    also.write_bytes((root / "large").read_bytes())
    also.chmod(stat.S_IMODE(found.st_mode))
    os.utime(also, ns=(found.st_mtime_ns, found.st_mtime_ns))
    result = run("verify-extracted", root, tmp_path / "out" / "data")
    assert result.returncode == 1
    assert "data/large: target changed since recording (recorded data/a/also large" in result.stderr + result.stdout


def test_extracted_alone(pair: Path, tmp_path: Path) -> None:
    """A link says which member it needs; both are extracted in any order."""
    seal_again(pair)
    copy = tmp_path / "copy.tar"
    with playing(pair) as player:
        copy.write_bytes(player.read(0, player.tape.total_size))
    (tmp_path / "out").mkdir()
    result = run("extract", pair, copy, "data/second", "-C", tmp_path / "out")
    assert result.returncode == 1
    assert (
        "tartapefs: data/second: is another name of data/first, which has the contents: extract that one, too,"
        " or a folder with both"
    ) in result.stderr.splitlines()
    assert list((tmp_path / "out").rglob("second*")) == []
    result = run("extract", pair, copy, "data/second", "data/first", "-C", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert inodes(tmp_path / "out" / "data") == {frozenset(("first", "second"))}
    result = run("extract", pair, copy, "data/first", "data/second", "-C", tmp_path / "out")
    assert (result.returncode, "2 were there already" in result.stderr) == (0, True)
    (tmp_path / "out" / "data" / "second").unlink()
    (tmp_path / "out" / "data" / "second").write_bytes(b"x" * 700)
    result = run("extract", pair, copy, "data", "-C", tmp_path / "out")
    assert (result.returncode, "data/second: another file exists" in result.stderr) == (1, True)
    assert run("extract", pair, copy, "data", "-C", tmp_path / "out", "--force", "--threads", "3").returncode == 0
    assert inodes(tmp_path / "out" / "data") == {frozenset(("first", "second"))}


@pytest.mark.parametrize(("hard_links", "version"), [(True, 3), (False, 19), (True, 35), (True, 23)])
def test_another_format(tmp_path: Path, hard_links: bool, version: int) -> None:
    """Format and facts of an index must agree: a version that knows no hard links refuses 19 and above by number."""
    root = tmp_path / "data"
    root.mkdir()
    TapeRecorder(root, hard_links=hard_links).commit()
    with closing(sqlite3.connect(index_of(root))) as database, database:
        database.execute(f"PRAGMA user_version={version}")
    with pytest.raises(TapeFormatError):
        Tape.discover(root)


def test_append_takes_no_options(pair: Path) -> None:
    with pytest.raises(ValueError, match="keeps its options"):
        TapeRecorder(pair, append=True, hard_links=True)
    assert run("record", "--append", "--hard-links", pair).returncode == 2


READERS = {
    "tar": ["tar", "-xf"],
    "bsdtar": ["bsdtar", "-xf"],
    "7z": ["7z", "x", "-snl", "-snh", "-y"],
    "busybox": ["busybox", "tar", "-xf"],
    "python": [sys.executable, "-m", "tarfile", "-e"],
}


@pytest.mark.parametrize("reader", [pytest.param(name, marks=pytest.mark.needs(READERS[name][0])) for name in READERS])
def test_readers(root: Path, tmp_path: Path, reader: str) -> None:
    """Each makes the same files of the same names."""
    expected = Reference(root, hard_links=True)
    (tmp_path / "archive.tar").write_bytes(expected.read(0, expected.size))
    (tmp_path / "out").mkdir()
    done = subprocess.run([*READERS[reader], tmp_path / "archive.tar"], cwd=tmp_path / "out", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert bodies(tmp_path / "out" / "data") == bodies(root)
    assert inodes(tmp_path / "out" / "data") == inodes(root)
