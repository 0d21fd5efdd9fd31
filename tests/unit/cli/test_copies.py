"""The commands check and resume: what they report and refuse, killed at any moment, on full disks."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.copies import ROOT, first_wrong
from support.programs import TARTAPEFS, done, run, umount, under_strace, wait_until
from support.reference import Reference, gnu_tar

from tartapefs import Tape, TapeRecorder
from tartapefs.transfer.copies import Copy


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
@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long(but=1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
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


def test_nothing_hangs_on(recorded: Path, tmp_path: Path) -> None:
    """The lock of a resume goes with it."""
    process = subprocess.Popen([*TARTAPEFS, "resume", recorded, tmp_path / "copy"], stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "copy").exists, 60)
    process.kill()
    process.wait(60)
    assert run("resume", recorded, tmp_path / "copy").returncode == 0


@pytest.mark.parametrize("options", [[], ["--full"], ["--json"]])
def test_check_after_drift_tells_what_the_recording_knows(small: Path, tmp_path: Path, options: list[str]) -> None:
    done(run("record", small))
    reference = Reference(small)
    archive = bytearray(reference.read(0, reference.size))
    copy = tmp_path / "copy.tar"
    (small / "file").write_bytes(b"another length")
    for damaged, good in ((None, len(archive)), (512, 512), (0, 0)):
        if damaged is not None:
            archive[damaged] ^= 1
        copy.write_bytes(archive)
        result = run("check", small, copy, *options)
        assert (result.returncode, result.stdout) == (1, "")
        told, drift = result.stderr.splitlines()
        assert f"copy.tar: its headers and footer are as recorded up to byte {good:,} of {len(archive):,};" in told
        assert "file: size changed since recording" in drift
