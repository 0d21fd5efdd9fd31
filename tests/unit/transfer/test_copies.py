"""Copies: how far they agree, found in every way that one can be broken, and completed by real clients and by force."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import TARTAPEFS, run, umount, under_strace, wait_until
from support.reference import Reference, gnu_tar
from support.s3 import environment as s3_environment
from support.s3 import s3_server

from tartapefs import Tape, TapePlayer, TapeRecorder
from tartapefs.archive.layout import Segment
from tartapefs.transfer import copies
from tartapefs.transfer.copies import Agreement, Copy, compare, sample

ROOT = "data 'odd' \n$HOME [1]"  # as a folder's name; most tests run with it


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder that no test changes: random bodies, and one that ends in zeros."""
    root = tmp_path_factory.mktemp("copies") / ROOT
    (root / "a b").mkdir(parents=True)
    (root / "a b" / "small \n.bin").write_bytes(os.urandom(700))
    (root / "large.bin").write_bytes(os.urandom(5_000_003))
    (root / "link").symlink_to("a b")
    (root / "middle.bin").write_bytes(os.urandom(1_000_000))
    (root / "zeros").write_bytes(os.urandom(300_000) + bytes(2_000_000))
    (root / "zz last").write_bytes(os.urandom(3000))
    TapeRecorder(root).commit()
    return root


@pytest.fixture(scope="module")
def archive(recorded: Path) -> bytes:
    size = Reference(recorded).size
    return gnu_tar(recorded)[:size]


@pytest.fixture(scope="module")
def player(recorded: Path) -> Iterator[TapePlayer]:
    with Tape.discover(recorded) as tape:
        player = TapePlayer(tape)
        yield player
        player.close()


@pytest.fixture(autouse=True)
def at_rest(player: TapePlayer) -> Iterator[None]:
    """A file that a test read in part is open no longer than the test takes."""
    yield
    player.rest()


@pytest.fixture
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides so small that the sample of a small archive is one of places."""
    monkeypatch.setattr(copies, "STRIDE", 64 << 10)
    monkeypatch.setattr(copies, "TAIL", 128 << 10)
    monkeypatch.setattr(copies, "CHUNK", 16 << 10)


def first_wrong(copy: bytes, archive: bytes) -> int | None:
    if archive.startswith(copy[: len(archive)]):
        return None
    low, high = 0, min(len(copy), len(archive))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if copy[:middle] == archive[:middle] else (low, middle)
    return low


def both(player: TapePlayer, path: Path) -> tuple[Agreement, Agreement]:
    with Copy(os.fspath(path)) as copy:
        return compare(player, copy), sample(player.tape, player, copy)


DAMAGES: dict[str, Callable[[bytearray], object]] = {
    "complete": lambda copy: None,
    "empty": lambda copy: copy.clear(),
    "one byte": lambda copy: copy.__delitem__(slice(1, None)),
    "part of a header": lambda copy: copy.__delitem__(slice(700, None)),
    "part of a body": lambda copy: copy.__delitem__(slice(1_234_567, None)),
    "without its footer": lambda copy: copy.__delitem__(slice(-1024, None)),
    "without its last byte": lambda copy: copy.__delitem__(slice(-1, None)),
    "zeros from a body on": lambda copy: copy.__setitem__(slice(777_777, None), bytes(len(copy) - 777_777)),
    "zeros from a header on": lambda copy: copy.__setitem__(slice(515, None), bytes(len(copy) - 515)),
    "zeros from before zeros of its own on": lambda copy: copy.__setitem__(slice(-2_205_024, None), bytes(2_205_024)),
    "all zeros": lambda copy: copy.__setitem__(slice(0, None), bytes(len(copy))),
    "other bytes from a body on": lambda copy: copy.__setitem__(slice(3_000_001, None), b"x" * (len(copy) - 3_000_001)),
    "beyond": lambda copy: copy.extend(b"and more"),
    "far beyond": lambda copy: copy.extend(bytes(3_000_000)),
    "the last byte": lambda copy: copy.__setitem__(-1, 7),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("places", [False, True])
def test_first_wrong_byte(
    player: TapePlayer, archive: bytes, tmp_path: Path, damage: str, places: bool, request: pytest.FixtureRequest
) -> None:
    """A transfer that broke off: found exactly, by every byte and in places."""
    if places:
        request.getfixturevalue("in_small_steps")
    copy = bytearray(archive)
    DAMAGES[damage](copy)
    (tmp_path / "copy").write_bytes(copy)
    wrong = first_wrong(copy, archive)
    good = min(len(copy), len(archive)) if wrong is None else wrong
    for found in both(player, tmp_path / "copy"):
        assert (found.size, found.total_size, found.good, found.wrong) == (len(copy), len(archive), good, wrong)
        assert found.is_complete == (copy == archive)
        assert found.beyond == max(0, len(copy) - len(archive))
        assert all(not any(copy[start:stop]) and copy[start:stop] != archive[start:stop] for start, stop in found.zeros)
        assert bool(found.zeros) == ("zeros" in damage)
        if found.zeros:
            assert found.zeros[0][0] <= good and found.zeros[-1][1] == len(copy)


def test_zeros_in_the_middle(player: TapePlayer, archive: bytes, tmp_path: Path, in_small_steps: None) -> None:
    """What rsync leaves after a read that failed and then went well: each stretch, to the byte."""
    copy = bytearray(archive)
    stretches = [(262_144, 524_288), (1_000_000, 1_300_000), (5_200_000, 5_600_000)]
    for start, stop in stretches:
        copy[start:stop] = bytes(stop - start)
    (tmp_path / "copy").write_bytes(copy)
    for found in both(player, tmp_path / "copy"):
        assert found.good == found.wrong == first_wrong(copy, archive)
        assert len(found.zeros) == 3
        for (start, stop), (low, high) in zip(found.zeros, stretches, strict=True):
            assert not any(copy[start:stop]) and start <= low + 3 and stop >= high


def test_a_hole_that_no_stride_meets(player: TapePlayer, archive: bytes, tmp_path: Path, in_small_steps: None) -> None:
    """Never written, as after a preallocation: the file system says so."""
    path = tmp_path / "copy"
    path.write_bytes(archive)
    low = 1_114_112 + 8192
    try:
        subprocess.run(["fallocate", "-p", "-o", str(low), "-l", "8192", path], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        with open(path, "r+b") as file:  # a file system without: write around it
            file.truncate(low)
            file.seek(low + 8192)
            file.write(archive[low + 8192 :])
    with Copy(os.fspath(path)) as copy:
        assert (low, low + 8192) in list(copy.holes(0, len(archive)))
    for found in both(player, path):
        assert found.good == found.wrong == first_wrong(path.read_bytes(), archive)


def test_what_the_places_miss_the_whole_finds(
    player: TapePlayer, archive: bytes, tmp_path: Path, in_small_steps: None
) -> None:
    """One byte in a body between two places: the documented limit."""
    copy = bytearray(archive)
    copy[1_100_000] ^= 1
    (tmp_path / "copy").write_bytes(copy)
    whole, places = both(player, tmp_path / "copy")
    assert whole.wrong == whole.good == 1_100_000 and whole.exact
    assert places.wrong is None and places.is_complete and not places.exact
    assert places.compared < len(archive) / 3


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_break(
    player: TapePlayer, archive: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Good to any byte, then nothing, zeros or rubbish to any size: both give the prefix, and never too long a one."""
    good = data.draw(st.integers(0, len(archive)))
    size = data.draw(st.integers(good, len(archive) + 2000))
    rest = size - good
    filling = data.draw(st.sampled_from([bytes(rest), random.Random(good).randbytes(rest)]))
    copy = archive[:good] + filling
    path = tmp_path_factory.getbasetemp() / "any-break"
    path.write_bytes(copy)
    wrong = first_wrong(copy, archive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "STRIDE", 64 << 10)
        patch.setattr(copies, "TAIL", 128 << 10)
        patch.setattr(copies, "CHUNK", 16 << 10)
        whole, places = both(player, path)
    real = min(size, len(archive)) if wrong is None else wrong
    assert (whole.good, whole.wrong) == (real, wrong)
    assert places.good <= real
    if places.good < real:  # only where the tape has nothing but zeros, of which a place says nothing
        assert not any(archive[places.good : real - 4096])


def test_without_the_source(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """On the far side, with the index alone: headers and footer."""
    shutil.copy(recorded / ".tartape" / "index.db", tmp_path / "index.db")
    copy, index = tmp_path / "copy", tmp_path / "index.db"
    copy.write_bytes(archive)
    command = ("check", tmp_path / "not here" / ROOT, copy, "--index", index, "--no-source", "--json")
    found = run(*command)
    assert (
        found.returncode == 0 and json.loads(found.stdout)["compared"] == 512 * (archive.count(b"ustar\x0000")) + 1024
    )
    with Tape.from_index(index) as tape:
        large, link = tape.find(f"{ROOT}/large.bin").start, tape.find(f"{ROOT}/link").start
    copy.write_bytes(archive[:link] + bytes(len(archive) - link))
    found = run(*command)
    facts = json.loads(found.stdout)
    assert found.returncode == 1 and facts["wrong"] == link
    assert facts["good"] == large + 512, "after the last header that agrees"
    copy.write_bytes(archive[:-3] + b"xyz")
    assert json.loads(run(*command).stdout)["wrong"] == len(archive) - 3


def test_report(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    copy = tmp_path / "copy\n\x1b[31m"
    at = archive.index(b"/large.bin") // 512 * 512 + 512 + 1000
    copy.write_bytes(archive[:at])
    for options in ([], ["--full"]):
        facts = json.loads(run("check", recorded, copy, "--json", *options).stdout)
        assert facts == {
            "complete": False,
            "size": at,
            "total_size": len(archive),
            "good": at,
            "member": f"{ROOT}/large.bin",
            "segment": "body",
            "position": 1000,
            "wrong": None,
            "zeros": [],
            "beyond": 0,
            "exact": True,
            "compared": at,
        }
        result = run("check", recorded, copy, *options)
        assert result.returncode == 1 and "\x1b" not in result.stdout
        assert f"good          {at}\n" in result.stdout
        assert r"\n$HOME [1]/large.bin, at its byte 1000" in result.stdout


@pytest.mark.parametrize("kind", ["-", "pipe"])
def test_streams(recorded: Path, archive: bytes, tmp_path: Path, kind: str) -> None:
    """Every byte of what comes through a pipe, by its name or as `-`."""
    for data, code in ((archive, 0), (archive[:999_999], 1), (archive + b"x", 1), (archive[:-1] + b"x", 1), (b"", 1)):
        name = "-" if kind == "-" else "/dev/stdin"
        result = run("check", recorded, name, "--json", input=data, text=False, errors=None)
        facts = json.loads(result.stdout)
        assert result.returncode == code, result.stderr
        assert facts["size"] == len(data) and facts["exact"]
        wrong = first_wrong(data, archive)
        assert facts["good"] == (min(len(data), len(archive)) if wrong is None else wrong)


def test_truncate(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """Asked for, and never of a file that is something else, or a stream."""
    copy = tmp_path / "copy"
    copy.write_bytes(archive[:2_000_000] + bytes(1_000_000))
    refused = run("check", recorded, copy, "--truncate", stdin=subprocess.DEVNULL)
    assert refused.returncode == 2 and copy.stat().st_size == 3_000_000
    assert run("check", recorded, "-", "--truncate", "--yes", stdin=subprocess.DEVNULL).returncode == 2
    cut = run("check", recorded, copy, "--truncate", "--yes")
    assert cut.returncode == 1 and copy.read_bytes() == archive[:2_000_000], cut.stderr
    copy.write_bytes(archive + b"more")
    assert run("check", recorded, copy, "--truncate", "--yes").returncode == 0
    assert copy.read_bytes() == archive
    other = tmp_path / "other"
    other.write_bytes(b"a letter\n" * 100)
    refused = run("check", recorded, other, "--truncate", "--yes")
    assert refused.returncode == 1 and "does not begin as this archive" in refused.stderr
    assert other.read_bytes() == b"a letter\n" * 100
    assert run("check", recorded, tmp_path / "none", "--truncate", "--yes").returncode == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("answer", ["y", "n", "\x03"])
def test_truncate_asks(recorded: Path, archive: bytes, tmp_path: Path, answer: str) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(archive[:5000] + bytes(byte ^ 255 for byte in archive[5000:5005]))
    master, slave = os.openpty()
    process = subprocess.Popen(
        [*TARTAPEFS, "check", recorded, copy, "--truncate"], stdin=slave, stdout=subprocess.PIPE, stderr=slave,
        start_new_session=True, preexec_fn=lambda: __import__("fcntl").ioctl(0, 0x540E, 0),
    )  # fmt: skip
    os.close(slave)
    seen = b""
    while b"?" not in seen:
        seen += os.read(master, 1000)
    os.write(master, answer.encode() + b"\n")
    assert process.stdout is not None
    process.stdout.read()
    process.stdout.close()
    assert process.wait(60) == (130 if answer == "\x03" else 1)
    os.close(master)
    assert copy.stat().st_size == (5000 if answer == "y" else 5005)


def test_resume(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """From nothing, from any break, from a complete copy; and what it says."""
    copy = tmp_path / "co py\n"
    for before, at in (
        (None, 0),
        (b"", 0),
        (archive[:1], 1),
        (archive[:1_000_001], 1_000_001),
        (archive[:1_000_001] + bytes(5_000_000), 1_000_001),
        (archive + b"more", len(archive)),
        (archive, len(archive)),
    ):
        copy.unlink(missing_ok=True)
        if before is not None:
            copy.write_bytes(before)
        options = ["--full"] if at % 2 else []
        result = run("resume", recorded, copy, "--json", *options)
        assert result.returncode == 0, result.stderr
        facts = json.loads(result.stdout)
        assert facts["resumed_from"] == at and facts["complete"]
        assert copy.read_bytes() == archive
        assert "complete;" in result.stderr and "\n$" not in result.stderr


def test_resume_refuses(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    index = recorded / ".tartape" / "index.db"
    before = index.read_bytes(), sorted(os.listdir(recorded))
    os.link(index, tmp_path / "hard link")
    (tmp_path / "link").symlink_to(index)
    for inside in (recorded / "new", recorded / "zz last", recorded / ".tartape" / "x", index,
                   tmp_path / "hard link", tmp_path / "link"):  # fmt: skip
        assert run("resume", recorded, inside).returncode == 2
    assert (index.read_bytes(), sorted(os.listdir(recorded))) == before
    (tmp_path / "other").write_bytes(b"something else" * 100)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for place, says in (
        (tmp_path, "Is a directory"),
        (tmp_path / "other", "does not begin as this archive does"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / "no" / "copy", "No such file or directory"),
    ):
        result = run("resume", recorded, place)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(f"tartapefs: {place}: ") and says in result.stderr
    assert (tmp_path / "other").read_bytes() == b"something else" * 100


def test_a_copy_that_a_link_leads_to(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """The file itself is completed and cut, if it is there; the link stays."""
    (tmp_path / "there").write_bytes(archive[:1000] + b"wrong")
    (tmp_path / "link").symlink_to("there")
    assert run("check", recorded, tmp_path / "link", "--truncate", "--yes").returncode == 1
    assert (tmp_path / "there").read_bytes() == archive[:1000]
    assert run("resume", recorded, tmp_path / "link").returncode == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_bytes() == archive
    (tmp_path / "to nothing").symlink_to("nothing")
    result = run("resume", recorded, tmp_path / "to nothing")
    assert result.returncode == 2 and "is a symbolic link; name what it leads to" in result.stderr
    assert not (tmp_path / "nothing").exists()


@pytest.mark.root
def test_a_copy_on_a_device(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """A disk, or what stands for one, is checked as a file that goes on beyond the archive; it cannot be cut."""
    (tmp_path / "disk").write_bytes(archive[:5_000_000] + bytes(15_971_520))
    device = subprocess.run(
        ["losetup", "-f", "--show", tmp_path / "disk"], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        facts = json.loads(run("check", recorded, device, "--json").stdout)
        assert (facts["good"], facts["beyond"]) == (5_000_000, 20_971_520 - len(archive))
        for command in (["check", "--truncate", "--yes"], ["resume"]):
            result = run(command[0], recorded, device, *command[1:])
            assert (result.returncode, result.stderr) == (1, f"tartapefs: {device}: not a regular file\n")
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.needs("strace")
def test_a_copy_that_fails_to_read(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """One line that says which file: the source has many more."""
    copy = tmp_path / "copy"
    copy.write_bytes(archive)
    failing = under_strace("-P", copy, "-e", "trace=pread64", "-e", "inject=pread64:error=EIO")
    for command in (["check", "--full"], ["resume"]):
        line = [*failing, command[0], recorded, copy, *command[1:]]
        result = subprocess.run(line, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (1, f"tartapefs: {copy}: Input/output error\n")
    assert copy.read_bytes() == archive


def test_a_stream_that_is_closed(recorded: Path) -> None:
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *TARTAPEFS, "check", recorded, "-"], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (1, "tartapefs: standard input: Bad file descriptor\n")


@pytest.mark.needs("strace")
def test_killed_at_each_change(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """At every system call that changes the copy: it never loses a good byte, and what is left goes on."""
    copy, had = tmp_path / "copy", len(archive) - 3_000_000
    killed = []
    for call in ("ftruncate", "fsync", "pwrite64"):
        for number in range(1, 10):
            copy.write_bytes(archive[:had] + b"rubbish" * 1000)
            killed_there = under_strace("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}")
            code = subprocess.run([*killed_there, "resume", recorded, copy], capture_output=True).returncode
            left = copy.read_bytes()
            if code == 0:
                break
            killed.append(call)
            assert left.startswith(archive[:had])
            assert archive.startswith(left) or call == "ftruncate"
        assert left == archive
        copy.write_bytes(left[: had + 10])
        assert run("resume", recorded, copy).returncode == 0
    assert killed == ["ftruncate", *["fsync"] * 2, *["pwrite64"] * 3]


def test_one_resume_at_a_time(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with Copy(os.fspath(copy), writable=True, create=True):
        result = run("resume", recorded, copy)
        assert result.returncode == 1 and "by another program" in result.stderr
        assert run("check", recorded, copy, "--truncate", "--yes").returncode == 1
    assert run("resume", recorded, copy).returncode == 0
    assert copy.read_bytes() == archive


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    root = tmp_path_factory.mktemp("larger") / "larger"
    root.mkdir()
    for number in range(6):
        (root / f"{number}").write_bytes(os.urandom(12_000_000))
    TapeRecorder(root).commit()
    return root, gnu_tar(root)[: Reference(root).size]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted_again_and_again(larger: tuple[Path, bytes], tmp_path: Path, number: signal.Signals) -> None:
    """Killed as soon as it has written something, many times: what is there is always a prefix; at last it is whole."""
    root, archive = larger
    copy = tmp_path / "copy"
    copy.touch()
    killed = 0
    for _ in range(12 if number == signal.SIGKILL else 4):
        had = copy.stat().st_size
        process = subprocess.Popen([*TARTAPEFS, "resume", root, copy], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while process.poll() is None and copy.stat().st_size <= had and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(random.Random(killed).random() * 0.004)
        process.send_signal(number)
        code = process.wait(60)
        assert archive.startswith(copy.read_bytes())
        if code == 0:
            break
        assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        killed += 1
    assert killed >= 3
    assert run("resume", root, copy).returncode == 0
    assert copy.read_bytes() == archive


@pytest.mark.root
def test_resume_on_a_full_disk(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """One line, the copy stays a prefix, and it goes on once there is room."""
    place = tmp_path / "tmpfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], check=True)
    try:
        result = run("resume", recorded, place / "copy")
        assert (result.returncode, result.stderr) == (1, f"tartapefs: {place / 'copy'}: No space left on device\n")
        assert archive.startswith((place / "copy").read_bytes())
        subprocess.run(["mount", "-o", "remount,size=20m", place], check=True)
        assert run("resume", recorded, place / "copy").returncode == 0
        assert (place / "copy").read_bytes() == archive
    finally:
        umount(place)


def test_drift_while_resuming(tree: Path, tmp_path: Path) -> None:
    """Nothing wrong is appended; after recording anew it goes on from what stays valid."""
    TapeRecorder(tree).commit()
    size = Reference(tree).size
    copy = tmp_path / "copy"
    copy.write_bytes(gnu_tar(tree)[:2000])
    path = tree / "photos" / "5000.bin"
    path.write_bytes(os.urandom(5000))
    result = run("resume", tree, copy)
    assert result.returncode == 1 and "5000.bin" in result.stderr
    prefix = json.loads(run("record", tree, "--force", "--json").stdout)["valid_prefix"]
    os.truncate(copy, min(prefix, copy.stat().st_size))
    assert run("resume", tree, copy).returncode == 0
    assert copy.read_bytes() == gnu_tar(tree)[:size]


@pytest.mark.fuse
@pytest.mark.needs("rsync")
def test_rsync_broken_half_way(tree: Path, tmp_path: Path, mount: Callable[..., Path]) -> None:
    """With --inplace a file of full size stays behind, its end zeros; the check finds where, and resume repairs it."""
    for number in range(4):
        (tree / f"large {number}").write_bytes(os.urandom(3_000_000))
    TapeRecorder(tree).commit()
    first = mount(tree)
    size = first.stat().st_size
    expected = gnu_tar(tree)[:size]
    path = tree / "large 2"
    found = path.stat()
    os.chmod(path, 0o600)  # drift, which can be taken back but for its ctime
    copy = tmp_path / "copy of it"
    result = subprocess.run(["rsync", "--inplace", first, copy], capture_output=True)
    assert result.returncode == 23 and copy.stat().st_size == size
    os.chmod(path, found.st_mode)
    left = copy.read_bytes()
    wrong = first_wrong(left, expected)
    assert wrong is not None and not any(left[wrong:]), "rsync filled what it could not read with zeros"
    for options in ([], ["--full"]):
        result = run("check", tree, copy, "--check", "mtime", "--json", *options)
        facts = json.loads(result.stdout)
        assert result.returncode == 1 and facts["good"] == facts["wrong"] == wrong
        (stretch,) = facts["zeros"]
        assert stretch[0] <= wrong and stretch[1] == size
    assert run("resume", tree, copy, "--check", "mtime").returncode == 0
    assert copy.read_bytes() == expected


class Ranges(SimpleHTTPRequestHandler):
    """Serves files, and one range of each, as a web server does."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.fuse
@pytest.mark.needs("rsync", "rclone", "curl", "dd")
@pytest.mark.parametrize("have", [1, 1_234_567])
def test_hints_work(recorded: Path, archive: bytes, tmp_path: Path, mount: Callable[..., Path], have: int) -> None:
    """Each printed line, run by a shell as it is, completes a copy with rubbish behind its good bytes."""
    mounted = mount(recorded)
    place = tmp_path / "it's a\n place"
    place.mkdir()
    copy = "-a copy: 'x' $(false)"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(mounted.parent)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        hint = ["resume-hint", recorded, "--have", str(have), "--archive", mounted, "--copy", copy, "--json"]
        url = f"http://127.0.0.1:{server.server_address[1]}/archive.tar"
        printed = json.loads(run(*hint).stdout)["commands"]
        printed["curl over http"] = json.loads(run(*hint, "--url", url).stdout)["commands"]["curl"]
        assert set(printed) == {"dd", "rsync", "rclone", "curl", "curl over http", "tartapefs", "aws"}
        del printed["aws"]
        environment = with_programs(tmp_path) | {"RCLONE_CONFIG": "/dev/null"}
        for client, line in printed.items():
            (place / copy).write_bytes(archive[:have] + b"rubbish")
            result = subprocess.run(
                ["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, f"{client}: {line}: {result.stderr}"
            assert (place / copy).read_bytes() == archive, client
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.fuse
@pytest.mark.needs("rsync", "rclone", "curl", "dd")
def test_no_hint_hides_drift(tree: Path, tmp_path: Path, mount: Callable[..., Path]) -> None:
    """Each line exits otherwise than 0 once the archive cannot be read to its end."""
    TapeRecorder(tree).commit()
    mounted, copy = mount(tree), tmp_path / "copy"
    hint = ["resume-hint", tree, "--have", "1000", "--archive", mounted, "--copy", copy, "--json"]
    printed = json.loads(run(*hint).stdout)["commands"]
    (tree / "script.sh").write_bytes(b"other")
    environment = with_programs(tmp_path) | {"RCLONE_CONFIG": "/dev/null"}
    for client in ("tartapefs", "dd", "rsync", "rclone", "curl"):
        copy.write_bytes(bytes(1000))
        result = subprocess.run(["bash", "-c", printed[client]], env=environment, capture_output=True, timeout=120)
        assert result.returncode != 0, client


def with_programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which a shell finds `tartapefs`, and `aws` as its package installs it."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tartapefs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tartapefs "$@"\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("have", [1, 6_000_000])
def test_the_hint_for_s3_works(recorded: Path, archive: bytes, tmp_path: Path, have: int) -> None:
    """`aws` itself, on a real server: the parts that are missing, and then the whole with the ETag predicted."""
    size, key = 5 << 20, "a 'b'/$(false)"
    with s3_server() as s3, s3.client() as client:
        upload = {"Bucket": "tapes", "Key": key}
        upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]
        first = have // size
        for number in range(first):
            body = archive[number * size : (number + 1) * size]
            client.upload_part(**upload, PartNumber=number + 1, Body=body)
        s3.received.clear()
        options = ["--part-size", "5M", "--bucket", "tapes", "--key", key, "--upload-id", upload["UploadId"]]
        line = json.loads(run("resume-hint", recorded, "--have", str(have), *options, "--json").stdout)["commands"][
            "aws"
        ]
        environment = s3_environment(s3) | {"PATH": with_programs(tmp_path)["PATH"]}
        result = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        count = -(-len(archive) // size)
        assert s3.received == list(range(first + 1, count + 1))
        parts = client.list_parts(**upload)["Parts"]
        listed = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in parts]
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": listed})
        assert s3.object(key) == archive
        predicted = json.loads(run("digest", recorded, "--s3-part-size", "5M", "--json").stdout)["s3"][0]["etag"]
        assert s3.etag(key) == predicted and predicted.endswith(f"-{count}")


def test_hints_for_what_is_complete_or_cannot_be(recorded: Path, archive: bytes) -> None:
    assert run("resume-hint", recorded, "--have", str(len(archive))).stdout == ""
    assert run("resume-hint", recorded, "--have", str(len(archive) + 1)).returncode == 2
    assert run("resume-hint", recorded).returncode == 2
    assert run("resume-hint", recorded, "--have", "1", "--part-size", "0").returncode == 2
    assert "S3 takes 10,000" in run("resume-hint", recorded, "--have", "1", "--part-size", "512").stderr


def test_segments_are_told_right(player: TapePlayer, archive: bytes) -> None:
    """The report's last line of help for each kind of segment."""
    kinds = {str(player.tape.segment_at(at).kind) for at in range(0, len(archive), 100)}
    assert kinds == {"header", "body", "padding", "footer"}
    assert isinstance(player.tape.segment_at(0), Segment)


def on_a_slow_disk(calls: str, milliseconds: int, *command: object) -> tuple[int, bytes]:
    """Runs it with these system calls so much slower; the exit code, and what a terminal on stderr saw, uncoloured."""
    master, slave = os.openpty()
    slowly = under_strace("-e", f"trace={calls}", "-e", f"inject={calls}:delay_enter={1000 * milliseconds}")
    process = subprocess.Popen(
        [*slowly, *map(os.fspath, command)],
        stdout=subprocess.DEVNULL,
        stderr=slave,
        env=os.environ | {"COLUMNS": "200", "TERM": "xterm"},
    )
    os.close(slave)
    seen = b""
    with suppress(OSError):  # the terminal's other side is closed
        while part := os.read(master, 65536):
            seen += part
    os.close(master)
    return process.wait(60), re.sub(rb"\x1b\[[\d;]*m", b"", seen)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("command", ["resume", "digest"])
def test_progress_names_the_member(larger: tuple[Path, bytes], tmp_path: Path, command: str) -> None:
    """On a terminal, once it takes longer than a second: bytes, rate, time left, members and the one that is read."""
    root, _ = larger
    arguments = {"resume": [tmp_path / "copy"], "digest": ["-a", "md5"]}[command]
    code, seen = on_a_slow_disk("preadv,preadv2", 30, command, root, *arguments)
    assert code == 0
    assert b"larger/5" in seen and b"/7 members" in seen and b"MB/s" in seen and b"0:00:0" in seen, seen


@pytest.mark.needs("strace")
@pytest.mark.parametrize("command", ["record", "verify", "diff"])
def test_progress_through_members(tmp_path: Path, command: str) -> None:
    """The same where it is members that take the time: how many, rate, time left, bytes, and the member."""
    root = tmp_path / "many"
    root.mkdir()
    (root / "0000").touch()
    for number in range(1, 2200):
        os.link(root / "0000", root / f"{number:04}")
    assert run("record", root).returncode == 0
    if command == "diff":
        shutil.copy(root / ".tartape" / "index.db", tmp_path / "old")
        code, seen = on_a_slow_disk("pread64", 150, "diff", tmp_path / "old", root)  # one for some 200 members
    else:
        options = ["--force"] if command == "record" else []
        code, seen = on_a_slow_disk("newfstatat,statx,lstat", 1, command, root, *options)
    assert code == 0, seen
    assert b"/2201" in seen and b" members/s" in seen and b" 0:00:0" in seen and b"MiB" in seen, seen
    name = rb"[12]\d\d\d" if command == "record" else rb"many/[12]\d\d\d"
    assert re.search(rb"[KM]iB  " + name, seen), seen


def test_nothing_hangs_on(recorded: Path, tmp_path: Path) -> None:
    """The lock of a resume goes with it."""
    process = subprocess.Popen([*TARTAPEFS, "resume", recorded, tmp_path / "copy"], stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "copy").exists, 60)
    process.kill()
    process.wait(60)
    assert run("resume", recorded, tmp_path / "copy").returncode == 0
