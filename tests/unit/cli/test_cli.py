"""The command line, through the real program: exit codes, what goes to which stream, and no traceback ever."""

import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.programs import FORGING, TARTAPEFS, done, quiet, refused, run, wait_until
from support.reference import Reference, header
from support.users import give_to_nobody, tartapefs_as_nobody

BLOCK = 512
COMMANDS = ["record", "info", "ls", "locate", "verify", "play", "check", "resume", "resume-hint", "diff", "digest"]
COMMANDS += ["mount", "unmount"]
READERS = {"info": [], "ls": [], "locate": ["0"], "verify": [], "play": []}  # and the arguments after DIR

ODD = {
    "newline": b"two\nlines",
    "escape": b"\x1b[2J\x1b]0;title\x07",
    "bidi": "gpj.\u202eexe".encode(),
    "not-utf-8": b"caf\xe9",
    "backslash": b"back\\nslash",
    "dash": b"-rf",
    "markup": b"[red]{0}{task.fields[x]}%s[b]",
    "space": b" \t ",
}


def grow(root: Path) -> Path:
    """A small folder with each kind of member, each kind of segment, and odd names."""
    (root / "photos" / "2024").mkdir(parents=True)
    (root / "empty-folder").mkdir()
    (root / "empty.txt").write_bytes(b"")
    for size in (1, 512, 513, 5000):
        (root / "photos" / f"{size}.bin").write_bytes(os.urandom(size))
    (root / "photos" / "2024" / "large.bin").write_bytes(os.urandom(300_001))
    (root / "link").symlink_to("photos/512.bin")
    (root / "script.sh").write_text("#!/bin/sh\n")
    (root / "script.sh").chmod(0o755)
    odd = os.fsencode(root / "odd")
    os.mkdir(odd)
    for name in ODD.values():
        with open(odd + b"/" + name, "wb") as file:
            file.write(name)
    os.symlink(b"to\n\x1b[1m\xff", odd + b"/odd-link")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder that no test changes."""
    root = grow(tmp_path_factory.mktemp("cli") / "data")
    done(run("record", root))
    return root


@pytest.fixture(scope="module")
def reference(data: Path) -> Reference:
    return Reference(data)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of one file, not recorded."""
    root = tmp_path / "small"
    root.mkdir()
    (root / "file").write_bytes(b"content")
    return root


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that takes a while to record. Its files are links to one, which are quickly made."""
    root = tmp_path_factory.mktemp("many") / "many"
    root.mkdir()
    (root / "0").write_bytes(b"")
    for number in range(1, 30_000):
        os.link(root / "0", root / f"{number}")
    return root


@contextmanager
def a_tmpfs(where: Path, options: str) -> Iterator[Path]:
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@contextmanager
def at_work(*command: object, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """`tartapefs` running; ended by force if the block leaves it running."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*TARTAPEFS, *map(os.fspath, command)], **(streams | options)) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def fingerprint(reference: Reference) -> str:
    digest = hashlib.sha256()
    for start in reference.starts.values():
        digest.update(reference.read(start, BLOCK))
    return digest.hexdigest()


# ---- usage


@pytest.mark.long(but=3)
@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=lambda c: c[0] if c else "alone")
def test_every_command_has_help(command: list[str]) -> None:
    """`-h` explains on stdout, each option and argument included, and is no error."""
    short = run(*command, "-h")
    assert done(short).startswith("Usage: tartapefs")
    assert short.stderr == ""
    if not command:
        assert all(name in short.stdout for name in COMMANDS)
        assert done(run("--help")) == short.stdout


def test_version() -> None:
    assert re.fullmatch(r"tartapefs\W.*\d+\.\d+.*\n", done(run("--version")))


@pytest.mark.long(but=4)
@pytest.mark.parametrize(
    "command",
    [
        [],
        ["nonsense"],
        ["--nonsense"],
        ["record"],
        ["record", "--nonsense", "."],
        ["record", ".", "extra"],
        ["record", "no-such-folder"],
        ["record", "/etc/passwd"],
        ["info"],
        ["ls"],
        ["locate", "."],
        ["verify"],
        ["play"],
        ["play", ".", "--start", "x"],
        ["mount", "."],
        ["unmount"],
    ],
    ids=lambda command: " ".join(command) or "nothing",
)
def test_wrong_usage_exits_2_and_shows_the_usage(command: list[str], tmp_path: Path) -> None:
    result = run(*command, cwd=tmp_path)
    refused(result, 2)
    assert "Usage: tartapefs" in result.stderr


@pytest.mark.long(but=3)
@pytest.mark.parametrize("text", ["-1", "x", "", "1.5", "0x10", "1KB", "K", "1iB", "٣", "9" * 5000, "1\n\x1b[1m"])
def test_what_is_no_number_of_bytes_is_wrong_usage(data: Path, text: str) -> None:
    refused(run("play", data, "--start", text), 2)


@pytest.mark.parametrize("text", ["-1", "1e3"])
def test_what_is_no_length_is_wrong_usage(data: Path, text: str) -> None:
    refused(run("play", data, "--length", text), 2)


@pytest.mark.parametrize("text", ["5G", "5GiB", "9223372036854775808", "9" * 19 + "P"])
def test_a_start_beyond_the_archive_is_wrong_usage(data: Path, text: str) -> None:
    refused(run("play", data, "--start", text), 2)


@pytest.mark.parametrize("command", [["info"], ["record", "--force"], ["verify"], ["play"]], ids=lambda c: c[0])
def test_an_empty_folder_name_is_not_the_current_folder(command: list[str], data: Path) -> None:
    """An empty DIR is an unset variable of a script; programs like tar and cp refuse it."""
    before = (data / ".tartape" / "index.db").stat()
    result = run(*command, "", cwd=data)
    quiet(result)
    assert result.returncode in (2, 3) and result.stdout == ""
    assert os.path.samestat((data / ".tartape" / "index.db").stat(), before)


def test_an_empty_index_name_is_not_the_default(small: Path) -> None:
    """Nothing may be written into a source because a script's variable was empty."""
    for recorded in (False, True):
        result = run("record", small, "--force", "--index", "")
        quiet(result)
        assert result.returncode in (2, 4) and result.stdout == ""
        if not recorded:
            assert os.listdir(small) == ["file"]
            done(run("record", small))
            before = (small / ".tartape" / "index.db").stat()
    assert os.path.samestat((small / ".tartape" / "index.db").stat(), before)


# ---- no tape


@pytest.mark.long(but=1)
@pytest.mark.parametrize("command", READERS)
def test_a_folder_without_a_tape_exits_3_and_says_what_to_run(command: str, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    result = run(command, "new", *READERS[command], cwd=tmp_path)
    refused(result, 3)
    assert 'run "tartapefs record new" first' in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.long(but=1)
@pytest.mark.parametrize("command", READERS)
def test_a_folder_that_is_not_there_exits_3(command: str, tmp_path: Path) -> None:
    refused(run(command, tmp_path / "nowhere", *READERS[command]), 3)


def _cut(index: Path) -> None:
    os.truncate(index, index.stat().st_size // 2)


def _flip(index: Path, part: bytes) -> None:
    """Changes one bit within `part` of the file."""
    content = bytearray(index.read_bytes())
    content[content.index(part) + 2] ^= 1
    index.write_bytes(content)


def _in_its_place(index: Path, make: object) -> None:
    index.unlink()
    make(index)  # type: ignore[operator]


def _sqlite(index: Path) -> None:
    code = "import sqlite3,sys; c=sqlite3.connect(sys.argv[1]); c.execute('create table t (a)'); c.commit()"
    subprocess.run([sys.executable, "-c", code, index], check=True)


NOT_TAPES = {
    "text": lambda index: index.write_text("not a tape\n" * 100),
    "empty": lambda index: os.truncate(index, 0),
    "short": lambda index: os.truncate(index, 50),
    "cut": _cut,
    "zeros": lambda index: index.write_bytes(bytes(index.stat().st_size)),
    "another database": lambda index: _in_its_place(index, _sqlite),
    "a folder": lambda index: _in_its_place(index, os.mkdir),
    "a pipe": lambda index: _in_its_place(index, os.mkfifo),
    "a link": lambda index: _in_its_place(index, lambda path: path.symlink_to("/etc/passwd")),
    "a link to itself": lambda index: _in_its_place(index, lambda path: path.symlink_to(path.name)),
    "another fingerprint": lambda index: _flip(index, b"fingerprint"),
}


@pytest.mark.long(but=3)
@pytest.mark.parametrize(
    ("kind", "command"), [(kind, [*READERS][at % len(READERS)]) for at, kind in enumerate(NOT_TAPES)]
)
def test_what_is_not_a_tape_exits_3(data: Path, tmp_path: Path, kind: str, command: str) -> None:
    index = tmp_path / "index.db"
    shutil.copyfile(data / ".tartape" / "index.db", index)
    NOT_TAPES[kind](index)
    result = run(command, data, *READERS[command], "--index", index)
    refused(result, 3)
    assert str(index) in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["ls", "locate", "play"])
def test_a_damaged_row_exits_3_once_it_is_used(data: Path, tmp_path: Path, command: str) -> None:
    index = tmp_path / "index.db"
    shutil.copyfile(data / ".tartape" / "index.db", index)
    _flip(index, b"script.sh")
    result = run(command, data, *(["data/script.sh"] if command == "locate" else []), "--index", index)
    quiet(result)
    assert result.returncode == 3, result.stderr
    assert str(index) in result.stderr


# ---- record


def test_record_prints_the_fingerprint_and_nothing_else_on_stdout(small: Path) -> None:
    before = small.stat().st_mtime_ns
    result = run("record", small)
    assert done(result) == fingerprint(Reference(small)) + "\n"
    assert "2 members" in result.stderr and f"{Reference(small).size:,} bytes" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert small.stat().st_mtime_ns == before
    assert os.listdir(small / ".tartape") == ["index.db"]


def test_record_json(small: Path) -> None:
    os.mkfifo(small / "pipe")
    found = json.loads(done(run("record", small, "--json")))
    reference = Reference(small)
    assert found == {
        "fingerprint": fingerprint(reference),
        "total_size": reference.size,
        "member_count": 2,
        "index": str(small / ".tartape" / "index.db"),
        "valid_prefix": None,
        "left_out": 1,
        "skipped": [],
    }


def test_a_second_recording_needs_force(small: Path) -> None:
    """Exit 4 and the old recording stays; `--force` of the same archive keeps the time of recording."""
    first = done(run("record", small))
    before = (small / ".tartape" / "index.db").read_bytes()
    result = run("record", small)
    refused(result, 4)
    assert "already recorded" in result.stderr and "--force" in result.stderr
    assert (small / ".tartape" / "index.db").read_bytes() == before
    recorded = json.loads(done(run("info", small, "--json")))["recorded"]
    assert done(run("record", small, "--force")) == first
    assert json.loads(done(run("info", small, "--json")))["recorded"] == recorded
    (small / "file").write_bytes(b"other content")
    assert done(run("record", "--force", small)) == fingerprint(Reference(small)) + "\n" != first
    assert json.loads(done(run("info", small, "--json")))["recorded"] != recorded


def test_exclude_may_be_repeated(tmp_path: Path) -> None:
    """Patterns are those of .gitignore: by name anywhere, anchored by a slash, a folder with its content."""
    root = tmp_path / "root"
    (root / "build" / "deep").mkdir(parents=True)
    (root / "src" / "build").mkdir(parents=True)
    for name in ("a.log", "src/b.log", "build/deep/x", "src/build/kept", "kept.txt"):
        (root / name).write_text(name)
    done(run("record", root, "--exclude", "*.log", "--exclude", "/build/"))
    reference = Reference(root, left_out=(b"a.log", b"src/b.log", b"build"))
    assert b"root/src/build/kept" in reference.starts
    played = run("play", root, text=False, errors=None).stdout
    assert played == reference.read(0, reference.size)  # type: ignore[comparison-overlap]
    assert json.loads(done(run("info", root, "--json")))["excluded"] == ["*.log", "/build/"]


@pytest.mark.long(but=3)
@pytest.mark.parametrize(
    "pattern", ["!", "\\", "a\n\x1b[1m!", "[", "***", "", " ", "#", "/", "//", "!*", "a" * 5000, "[z-a]"]
)
def test_an_odd_pattern_is_a_pattern_or_wrong_usage(small: Path, pattern: str) -> None:
    result = run("record", small, "--exclude", pattern)
    quiet(result)
    assert result.returncode in (0, 2), result.stderr
    assert (small / ".tartape").exists() == (result.returncode == 0)


@pytest.mark.root
def test_keep_owners(small: Path) -> None:
    """Owners go into the headers; a number without a name has an empty name."""
    os.chown(small / "file", 0o1234567, 0o7654321 % 2**21)
    reference = Reference(small)
    kept = header(b"small/file", (small / "file").stat(), owner=(0o1234567, 0o7654321 % 2**21, "", ""))
    expected = hashlib.sha256(reference.read(0, BLOCK) + kept).hexdigest()
    assert done(run("record", small, "--keep-owners")).strip() == expected != fingerprint(reference)
    assert json.loads(done(run("info", small, "--json")))["owners"] == "kept"


def test_an_index_elsewhere_leaves_the_source_alone(small: Path, tmp_path: Path) -> None:
    before, index = small.stat(), tmp_path / "elsewhere.db"
    done(run("record", small, "--index", index))
    assert os.listdir(small) == ["file"]
    assert small.stat().st_ctime_ns == before.st_ctime_ns
    refused(run("info", small), 3)
    assert done(run("verify", small, "--index", index)) == ""
    found = json.loads(done(run("info", small, "--index", index, "--json")))
    assert found["index"] == str(index) and found["at_home"] is True
    assert done(run("ls", small, "--index", index)).count("\n") == 2
    played = run("play", small, "--index", index, text=False, errors=None).stdout
    assert played == Reference(small).read(0, 10**6)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("place", ["small/index.db", "small/below/index.db", "nowhere/index.db"])
def test_an_index_in_a_wrong_place_is_refused(small: Path, tmp_path: Path, place: str) -> None:
    """Inside the source it would change what it records; a folder for it is not made."""
    (small / "below").mkdir()
    result = run("record", small, "--index", place, cwd=tmp_path)
    refused(result, 4)
    assert "index" in result.stderr or "nowhere" in result.stderr
    assert sorted(os.listdir(small)) == ["below", "file"] and os.listdir(small / "below") == []
    assert os.listdir(tmp_path) == ["small"]


def test_what_does_not_fit_is_listed_in_one_go_and_nothing_written(small: Path) -> None:
    (small / ("n" * 120)).write_text("")
    (small / "long-link").symlink_to("t" * 101)
    (small / "line\nbreak").symlink_to("t" * 102)
    before = small.stat().st_mtime_ns
    result = run("record", small)
    refused(result, 4)
    *problems, summary = result.stderr.splitlines()
    assert [problem.partition(": ")[0] for problem in problems] == ["line\\nbreak", "long-link", "n" * 120]
    assert "3" in summary and "nothing was written" in summary
    assert not (small / ".tartape").exists() and small.stat().st_mtime_ns == before


@pytest.mark.long(but=1)
@pytest.mark.root
@pytest.mark.parametrize("room", ["size=64k", "size=8k", "nr_inodes=1"])
def test_a_full_disk_is_refused_and_leaves_nothing(many: Path, tmp_path: Path, room: str) -> None:
    with a_tmpfs(tmp_path / "disk", room) as disk:
        result = run("record", many, "--index", disk / "index.db")
        refused(result, 4)
        assert "No space left on device" in result.stderr and "nothing was written" in result.stderr
        assert os.listdir(disk) == []


@pytest.mark.root
def test_a_full_disk_keeps_the_old_recording(tmp_path: Path) -> None:
    with a_tmpfs(tmp_path / "disk", "size=128k") as disk:
        (disk / "file").write_bytes(b"content")
        first = done(run("record", disk))
        before = (disk / ".tartape" / "index.db").read_bytes()
        (disk / "fill").write_bytes(bytes(128 * 1024 - 3 * 4096 - len(before) // 4096 * 4096))
        with open(disk / "rest", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        refused(run("record", disk, "--force"), 4)
        assert os.listdir(disk / ".tartape") == ["index.db"]
        assert (disk / ".tartape" / "index.db").read_bytes() == before
        assert json.loads(done(run("info", disk, "--json")))["fingerprint"] == first.strip()


@pytest.mark.root
def test_any_time_that_a_file_can_have_is_listed_whole(tmp_path: Path) -> None:
    with a_tmpfs(tmp_path / "disk", "size=1m") as disk:
        for second in (2**62, -(2**62)):
            (disk / f"{second}").touch()
            os.utime(disk / f"{second}", ns=(second * 10**9, second * 10**9))
        done(run("record", disk))
        for line in done(run("ls", disk)).splitlines()[1:]:
            assert f" @{line.rpartition('/')[2]}" in line
        for line in done(run("ls", disk, "--json")).splitlines()[1:]:
            assert json.loads(line)["mtime"] == f"@{json.loads(line)['path'].rpartition('/')[2]}.000000000"


# ---- another user


@pytest.mark.root
def test_what_cannot_be_read_is_refused_or_left_out_by_name(small: Path, public: Path) -> None:
    root = Path(shutil.copytree(small, public / "root"))
    (root / "folder").mkdir()
    (root / "folder" / "below").touch()
    (root / "secret\n1").write_text("x")
    give_to_nobody(root)
    (root / "secret\n1").chmod(0)
    (root / "folder").chmod(0)
    result = tartapefs_as_nobody("record", root)
    refused(result, 4)
    *problems, summary = result.stderr.splitlines()
    assert problems == ["folder: Permission denied", "secret\\n1: Permission denied"]
    assert "nothing was written" in summary and not (root / ".tartape").exists()

    result = tartapefs_as_nobody("record", root, "--skip-unreadable", "--json")
    found = json.loads(done(result))
    assert found["skipped"] == [
        {"path": "folder", "reason": "Permission denied"},
        {"path": "secret\n1", "reason": "Permission denied"},
    ]
    left_out = [line for line in result.stderr.splitlines() if "left out" in line]
    assert len(left_out) == 2 and "folder" in left_out[0] and "secret\\n1" in left_out[1]
    assert found["left_out"] == 2 and found["member_count"] == 2
    assert found["fingerprint"] == fingerprint(Reference(root, left_out=(b"folder", b"secret\n1")))


@pytest.mark.long(but=1)
@pytest.mark.root
@pytest.mark.parametrize("command", ["record", *READERS])
def test_a_folder_of_another_user_is_refused(small: Path, public: Path, command: str) -> None:
    root = Path(shutil.copytree(small, public / "root"))
    done(run("record", root))
    root.chmod(0o700)
    result = tartapefs_as_nobody(command, root, *READERS.get(command, ["--force"]))
    quiet(result)
    assert result.returncode in (1, 3, 4) and result.stdout == ""
    assert "Permission denied" in result.stderr or "not permitted" in result.stderr
    assert str(root) in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.root
def test_a_folder_that_may_not_be_written_is_refused_unchanged(small: Path, public: Path) -> None:
    root = Path(shutil.copytree(small, public / "root"))
    before = root.stat()
    result = tartapefs_as_nobody("record", root)
    refused(result, 4)
    assert str(root) in result.stderr
    assert os.listdir(root) == ["file"] and root.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.root
def test_an_output_need_not_be_readable(small: Path, public: Path) -> None:
    """A file that this user may only write, as a drop box has it, will do."""
    root = Path(shutil.copytree(small, public / "root"))
    done(run("record", root))
    (public / "out").touch()
    (public / "out").chmod(0o222)
    done(tartapefs_as_nobody("play", root, "-o", public / "out"))
    assert (public / "out").read_bytes() == Reference(root).read(0, 10**6)


# ---- signals, and two at once


def _in_the_middle(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Stops the recorder while it writes its index."""
    wait_until(lambda: folder.exists() and os.listdir(folder))
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: "(stopped)" in Path(f"/proc/{process.pid}/status").read_text())
    assert "index.db" not in os.listdir(folder), "the recording ended too early for this test"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_recording_leaves_nothing_behind(many: Path, number: int, code: int) -> None:
    before = many.stat().st_mtime_ns
    with at_work("record", many) as process:
        _in_the_middle(process, many / ".tartape")
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b"")
    assert b"Traceback" not in err and len(err.split()) <= 10
    assert not (many / ".tartape").exists() and many.stat().st_mtime_ns == before


def test_force_replaces_nothing_but_an_index(data: Path, tmp_path: Path) -> None:
    """A file of the user's that is no index stays as it is, and the line says why."""
    notes = tmp_path / "notes.txt"
    notes.write_text("dear diary")
    for options in ([], ["--force"]):
        result = run("record", data, "--index", notes, *options)
        refused(result, 4)
        assert "in the way" in result.stderr
    assert notes.read_text() == "dear diary"


def test_two_recordings_at_once(many: Path, tree: Path, tmp_path: Path) -> None:
    """The second is refused with exit 4; the first is not disturbed, and its interruption keeps the old index."""
    index = tmp_path / "tape" / "index"
    index.parent.mkdir()
    done(run("record", tree, "--index", index))
    old = index.read_bytes()
    with at_work("record", many, "--index", index, "--force") as process:
        wait_until(lambda: len(os.listdir(index.parent)) > 1)
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: "(stopped)" in Path(f"/proc/{process.pid}/status").read_text())
        result = run("record", many, "--index", index, "--force")
        refused(result, 4)
        assert "another recording" in result.stderr
        assert index.read_bytes() == old
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert index.read_bytes() == old and os.listdir(index.parent) == ["index"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder whose archive no pipe can hold, nor its events, of many small files and a large one."""
    root = tmp_path_factory.mktemp("large") / "large"
    root.mkdir()
    for number in range(500):
        (root / f"{number:03}").write_bytes(b"%d" % number)
    with open(root / "sparse", "wb") as file:
        file.truncate(64 << 20)
    done(run("record", root))
    return root


@pytest.mark.long(but=1)
@pytest.mark.parametrize("options", [[], ["--events"]], ids=["bytes", "events"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_play_that_nobody_reads_on_can_be_interrupted(
    large: Path, options: list[str], number: int, code: int
) -> None:
    """It ends at once although its pipe is full, with the exit code of an interruption and no more than a line."""
    with at_work("play", large, *options) as process:
        assert process.stdout and process.stderr and len(os.read(process.stdout.fileno(), 10)) == 10
        wait_until(lambda: "pipe" in Path(f"/proc/{process.pid}/wchan").read_text())
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        error = process.stderr.read()
    assert b"Traceback" not in error and b"Exception" not in error and len(error.split()) <= 2


@pytest.mark.parametrize(
    "command", ['{} play "$DIR" | head -c 10', '{} play --events "$DIR" | head -1', '{} ls "$DIR" | head -1']
)
def test_a_reader_of_the_pipe_that_leaves_is_no_error(large: Path, command: str) -> None:
    line = command.replace("{}", f"{sys.executable} -m tartapefs", 1)
    result = subprocess.run(["sh", "-c", line], env=os.environ | {"DIR": str(large)}, capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout


# ---- streams


@pytest.mark.long(but=2)
@pytest.mark.parametrize(
    "command", [["record", "--force"], ["info"], ["ls"], ["ls", "--json"], ["locate"], ["play"], ["play", "--events"]]
)
def test_a_full_output_is_one_line_and_exit_1(small: Path, command: list[str]) -> None:
    """What could not be written is never reported as done."""
    done(run("record", small))
    with open("/dev/full", "w") as full:
        result = run(
            *command, small, *(["0"] if command == ["locate"] else []), capture_output=False, stdout=full, stderr=-1
        )
    quiet(result)
    assert result.returncode == 1
    assert "No space left on device" in result.stderr.splitlines()[-1]


CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}


def closed(streams: str, *command: object) -> subprocess.CompletedProcess[bytes]:
    line = f'exec "$@" {CLOSED[streams]}'
    return subprocess.run(
        ["sh", "-c", line, "sh", *TARTAPEFS, *map(os.fspath, command)], capture_output=True, timeout=60
    )


@pytest.mark.long(but=2)
@pytest.mark.parametrize("streams", CLOSED)
@pytest.mark.parametrize("command", ["record", *READERS])
def test_closed_streams(data: Path, small: Path, streams: str, command: str) -> None:
    """What does not need the closed stream works; what does fails without a traceback."""
    where = small if command == "record" else data
    result = closed(streams, command, where, *READERS.get(command, []))
    assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr, result.stderr.decode()
    if streams in ("stdin", "stderr") or command in ("record", "verify"):
        assert result.returncode == 0, result.stderr.decode()
    elif command == "play":
        assert result.returncode == 1, "the archive went nowhere"
    else:
        assert result.returncode in (0, 1)
    if streams in ("stdin", "stderr") and command == "play":
        assert result.stdout == Reference(data).read(0, 10**9)
    if command == "record":
        assert done(run("verify", small)) == ""
        assert os.listdir(small / ".tartape") == ["index.db"]


@pytest.mark.parametrize("streams", ["stdout", "all"])
def test_playing_into_a_file_needs_no_stdout(data: Path, reference: Reference, tmp_path: Path, streams: str) -> None:
    result = closed(streams, "play", data, "-o", tmp_path / "out.tar")
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "out.tar").read_bytes() == reference.read(0, reference.size)


ENVIRONMENTS = [
    {"LANG": "C"},
    {"LC_ALL": "POSIX"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "no_SUCH.locale"},
    {"TERM": "dumb", "COLUMNS": "1"},
    {},
]


@pytest.mark.long(but=1)
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_every_environment_will_do(tmp_path: Path, environment: dict[str, str]) -> None:
    """Names of any language are listed, recorded and found whatever the locale says."""
    root = tmp_path / "日本 ü"
    root.mkdir()
    (root / "ñandú").write_text("x")
    (root / os.fsdecode(b"caf\xe9")).write_text("y")
    env = {"PATH": os.environ["PATH"]} | environment
    for command in (
        ["record", root],
        ["info", root],
        ["ls", root],
        ["ls", "--json", root],
        ["locate", root, "1024"],
        ["locate", root, "日本 ü/ñandú"],
        ["play", "--events", root],
        ["verify", root],
    ):
        result = run(*command, env=env)
        quiet(result)
        assert result.returncode in (0, 4), (command, result.stderr)
    (root / "ñandú").write_text("changed")
    for command in ("verify", "play"):
        result = run(command, root, env=env, errors="backslashreplace")
        assert result.returncode == 1 and "Traceback" not in result.stderr


# ---- hostile names


@pytest.mark.long(but=2)
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_name_of_the_folder(tmp_path: Path, kind: str) -> None:
    """A folder of any name is recorded, and each message that names it is one line without raw controls."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + ODD[kind]))
    missing = run("info", root)
    refused(missing, 3)
    assert len(missing.stderr.splitlines()) == 1
    root.mkdir()
    (root / "file").write_bytes(b"content")
    result = run("record", "--", root.name, cwd=tmp_path)
    assert done(result).strip() == fingerprint(Reference(root))
    assert len(result.stderr.splitlines()) == 1
    again = run("record", root)
    refused(again, 4)
    assert len(again.stderr.splitlines()) == 1
    assert len(done(run("ls", root)).splitlines()) == 2
    assert done(run("verify", root)) == ""
    facts = done(run("info", root)).splitlines()
    assert len(facts) == 13
    (root / "file").unlink()
    for command in ("verify", "play"):
        result = run(command, root, errors="backslashreplace")
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert not FORGING.search(result.stderr)


@pytest.mark.long(but=6)
@pytest.mark.parametrize(
    "command",
    [
        ["record", "\n\x1b[1m"],
        ["nonsense\n\x1b[1m"],
        ["record", "--nonsense\n\x1b[1m", "."],
        ["record", ".", "extra\n\x1b[1m\u202e"],
        ["play", "{data}", "--start", "\n\x1b[1m"],
        ["play", "{data}", "-o", "nowhere\n\x1b[1m/file"],
        ["play", "{data}", "-o", "."],
        ["locate", "{data}", "no\n\x1b[1m\udcff\u202e"],
        ["locate", "{data}", ""],
        ["record", "{data}", "--index"],
        ["locate", "{data}", "9" * 5000],
        ["locate", "{data}", "9" * 30],
        ["locate", "{data}", "-1"],
        ["locate", "{data}", "x" * 5000],
        ["info", "x" * 5000],
        ["record", "x" * 5000],
        ["info", "{data}/photos/1.bin"],
        ["info", "{data}", "--index", "/dev/null"],
        ["info", "{data}", "--index", "\n\x1b[1m"],
        ["info", "/proc/self/mem/x"],
        ["record", "/proc/self/fdinfo"],
        ["record", "/"],
    ],
    ids=lambda command: ascii(" ".join(command))[:40],
)
def test_hostile_arguments(data: Path, tmp_path: Path, command: list[str]) -> None:
    """Refused by a message that is plain text, whatever was asked."""
    result = run(*(word.format(data=data) for word in command), cwd=tmp_path)
    quiet(result)
    assert result.returncode in (1, 2, 3, 4) and result.stderr
    assert result.stdout == ""
    assert os.listdir(tmp_path) == []


# ---- terminals


def on_terminal(
    *command: object, hold: float = 0, stdout: bool = False, cwd: Path | None = None
) -> tuple[int, str, bytes]:
    """Runs it with stderr, and stdout if asked, on a terminal. Gives exit code, what the terminal saw, and stdout.

    `hold`: how many seconds after its first bytes a stdout that is a pipe is not read.
    """
    master, slave = pty.openpty()
    seen, out = b"", bytearray()
    try:
        environment = os.environ | {"TERM": "xterm"}
        streams = {"stdin": subprocess.DEVNULL, "stdout": slave if stdout else subprocess.PIPE, "stderr": slave}
        with at_work(*command, env=environment, cwd=cwd, **streams) as process:
            os.close(slave)
            slave = -1
            sources = [master] if stdout else [master, process.stdout.fileno()]  # type: ignore[union-attr]
            resume = None
            while sources:
                ready, _, _ = select.select(sources, [], [], 0.05)
                for source in ready:
                    try:
                        got = os.read(source, 1 << 16)
                    except OSError:  # the terminal's other side is closed
                        got = b""
                    if not got:
                        sources.remove(source)
                    elif source == master:
                        seen += got
                    else:
                        out += got
                        if hold and resume is None:
                            resume = time.monotonic() + hold
                            sources.remove(source)
                if resume and time.monotonic() >= resume:
                    resume = float("inf")
                    sources.append(process.stdout.fileno())  # type: ignore[union-attr]
            code = process.wait(timeout=60)
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)
    return code, seen.decode(errors="surrogateescape"), bytes(out)


@pytest.mark.parametrize("command", ["record", *READERS])
def test_what_is_short_shows_no_progress(data: Path, small: Path, command: str) -> None:
    code, seen, _ = on_terminal(command, small if command == "record" else data, *READERS.get(command, []))
    assert code == 0
    assert "\x1b" not in seen
    assert len(seen.splitlines()) == (1 if command in ("record", "verify") else 0), seen


def test_what_takes_longer_than_a_second_shows_progress(large: Path, tmp_path: Path) -> None:
    """On the terminal, by the name that the user gave, escaped; what is on stdout stays as it is."""
    name = tmp_path / "[red]{0}{task.x}[b]\n"
    name.symlink_to(large)
    code, seen, out = on_terminal("play", name.name, hold=1.3, cwd=tmp_path)
    assert code == 0 and "Traceback" not in seen, seen
    assert "\x1b[" in seen and r"[red]{0}{task.x}[b]\n" in seen
    reference = Reference(large)
    assert len(out) == reference.size
    assert hashlib.md5(out).digest() == hashlib.md5(reference.read(0, reference.size)).digest()


def test_progress_takes_nothing_away_from_stdout(large: Path) -> None:
    """Every event is on stdout also while a terminal on stderr shows progress."""
    code, seen, out = on_terminal("play", large, "--events", hold=1.3)
    assert code == 0 and "Traceback" not in seen, seen
    assert [json.loads(line) for line in out.splitlines()] == [
        json.loads(line) for line in done(run("play", large, "--events")).splitlines()
    ]
    assert "file_data" not in seen


def test_a_pipe_sees_no_progress(large: Path) -> None:
    with at_work("play", large) as process:
        assert process.stdout and process.stderr
        os.read(process.stdout.fileno(), 10)
        time.sleep(1.3)  # longer than what starts progress on a terminal
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"")


@pytest.mark.parametrize(
    "command",
    [
        ["info", "{}"],
        ["record", "{}"],
        ["record", ".", "{}"],
        ["{}"],
        ["--{}"],
        ["play", ".", "--start", "{}"],
        ["record", ".", "--index", "{}/x"],
        ["locate", "{data}", "{}"],
        ["play", "{data}", "-o", "{}/x"],
        ["unmount", "{}"],
    ],
    ids=" ".join,
)
def test_no_message_drives_the_terminal(data: Path, tmp_path: Path, command: list[str]) -> None:
    """Whatever a user, or a script with names from elsewhere, passes."""
    hostile = "\x1b[2J\x1b]0;x\x07\u202e"
    code, seen, _ = on_terminal(*(word.format(hostile, data=data) for word in command), cwd=tmp_path, stdout=True)
    assert code not in (0, -signal.SIGPIPE) and "Traceback" not in seen
    assert not FORGING.search(seen.replace("\r\n", "\n")), ascii(seen)


def test_an_archive_is_not_played_to_a_terminal(data: Path) -> None:
    code, seen, _ = on_terminal("play", data, stdout=True)
    assert code == 2
    assert "terminal" in seen and "ustar" not in seen


def test_events_may_go_to_a_terminal(data: Path) -> None:
    code, seen, _ = on_terminal("play", data, "--events", stdout=True)
    assert code == 0 and "tape_completed" in seen


# ---- info


def test_info_in_words(data: Path, reference: Reference) -> None:
    """One fact a line."""
    result = run("info", data)
    lines = done(result).splitlines()
    assert result.stderr == ""
    facts = {line[:14].strip(): line[14:] for line in lines}
    assert list(facts) == [
        "source", "index", "fingerprint", "seal", "digests", "total size", "member count", "recorded",
        "excluded", "left out", "owners", "at home", "checks",
    ]  # fmt: skip
    assert facts["source"] == str(data)
    assert facts["fingerprint"] == fingerprint(reference)
    assert facts["total size"].startswith(f"{reference.size} (") and "KiB" in facts["total size"]
    assert facts["member count"] == str(len(reference.starts))
    assert (facts["excluded"], facts["left out"], facts["owners"], facts["at home"]) == (
        "nothing",
        "0",
        "scrubbed",
        "yes",
    )


def test_info_as_json(data: Path, reference: Reference) -> None:
    facts = json.loads(done(run("info", data, "--json")))
    assert facts.pop("checks")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{9}Z", facts.pop("recorded"))
    assert facts == {
        "source": str(data),
        "index": str(data / ".tartape" / "index.db"),
        "fingerprint": fingerprint(reference),
        "seal": None,
        "digests": None,
        "total_size": reference.size,
        "member_count": len(reference.starts),
        "excluded": [],
        "left_out": 0,
        "owners": "scrubbed",
        "at_home": True,
        "late_on": [],
    }


def test_a_copied_tape_is_not_at_home_but_works(data: Path, reference: Reference, tmp_path: Path) -> None:
    subprocess.run(["cp", "-a", data, tmp_path / "data"], check=True)
    facts = json.loads(done(run("info", tmp_path / "data", "--json")))
    assert facts["at_home"] is False and "not inode" in facts["checks"]
    assert facts["fingerprint"] == fingerprint(reference)
    assert done(run("verify", tmp_path / "data")) == ""
    played = run("play", tmp_path / "data", text=False, errors=None).stdout
    assert played == reference.read(0, reference.size)  # type: ignore[comparison-overlap]


# ---- ls and locate


def test_ls_has_one_line_for_each_member(data: Path, reference: Reference) -> None:
    lines = done(run("ls", data)).splitlines()
    assert len(lines) == len(reference.starts)
    assert [int(line.split()[4]) for line in lines] == list(reference.starts.values())
    for line, name in zip(lines, reference.starts, strict=True):
        path = os.fsencode(data.parent) + b"/" + name
        found = os.lstat(path.rstrip(b"/"))
        mode, size, day, clock, _ = line.split()[:5]
        assert mode[0] == {0o04: "d", 0o10: "-", 0o12: "l"}[found.st_mode >> 12]
        assert int(size) == (found.st_size if mode[0] == "-" else 0)
        assert f"{day} {clock}" == time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(found.st_mtime_ns // 10**9))
    assert "-rwxr-xr-x" in next(line for line in lines if line.endswith("data/script.sh"))
    assert any(line.endswith("data/link -> photos/512.bin") for line in lines)
    assert any(line.endswith(r"data/odd/two\nlines") for line in lines)
    assert any(line.endswith(r"data/odd/back\\nslash") for line in lines)
    assert any(line.endswith(r"data/odd/odd-link -> to\n\x1b[1m\xff") for line in lines)


def test_ls_as_json_is_one_object_a_line(data: Path, reference: Reference) -> None:
    found = [json.loads(line) for line in done(run("ls", data, "--json")).splitlines()]
    assert {os.fsencode(member["path"]): member["start"] for member in found} == {
        name.rstrip(b"/"): start for name, start in reference.starts.items()
    }
    starts = [*reference.starts.values(), reference.size - 2 * BLOCK]
    assert [member["stop"] for member in found] == starts[1:]
    kinds = {member["path"]: member["type"] for member in found}
    assert (kinds["data"], kinds["data/link"], kinds["data/script.sh"]) == ("directory", "link", "file")
    link = next(member for member in found if member["path"] == "data/link")
    assert link["target"] == "photos/512.bin"
    script = next(member for member in found if member["path"] == "data/script.sh")
    assert (script["mode"], script["size"]) == ("0755", 10)


def locate(data: Path, where: str) -> dict[str, object]:
    return json.loads(done(run("locate", data, where, "--json")))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("after", "segment", "start", "stop"),
    [(0, "header", 0, 512), (511, "header", 0, 512), (512, "body", 512, 1025), (1024, "body", 512, 1025),
     (1025, "padding", 1025, 1536), (1535, "padding", 1025, 1536)],
)  # fmt: skip
def test_locate_an_offset(data: Path, reference: Reference, after: int, segment: str, start: int, stop: int) -> None:
    """A file of 513 bytes has a header, a body and padding."""
    first = reference.starts[b"data/photos/513.bin"]
    found = locate(data, str(first + after))
    member = found.pop("member")
    assert found == {
        "offset": first + after,
        "segment": segment,
        "start": first + start,
        "stop": first + stop,
        "position": after - start,
    }
    assert isinstance(member, dict) and member["path"] == "data/photos/513.bin"


def test_locate_the_footer_and_what_lies_beyond(data: Path, reference: Reference) -> None:
    end = reference.size
    for offset in (end - 1024, end - 1):
        found = locate(data, str(offset))
        assert (found["segment"], found["start"], found["stop"], found["member"]) == ("footer", end - 1024, end, None)
    assert "footer" in done(run("locate", data, str(end - 1)))
    refused(run("locate", data, str(end)), 2)
    refused(run("locate", data, str(end + 1)), 2)


@pytest.mark.parametrize(
    "name", ["data/photos/513.bin", "data/photos", "data/photos/", "data", "data/", "data/odd/caf\udce9"]
)
def test_locate_a_member(data: Path, reference: Reference, name: str) -> None:
    """By its name with or without a folder's slash."""
    found = locate(data, name)
    stored = os.fsencode(name).rstrip(b"/")
    start = reference.starts.get(stored, reference.starts.get(stored + b"/"))
    assert (found["path"], found["start"]) == (os.fsdecode(stored), start)
    assert found["segments"]["header"] == [start, start + BLOCK]  # type: ignore[index,operator]
    assert len(done(run("locate", data, name)).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["data/none", "photos", "data/photos/513.bi", "dat", "data//photos", "/data", "zzz", "./data"]
)
def test_locate_a_member_that_is_not_there(data: Path, name: str) -> None:
    refused(run("locate", data, name), 1)


def test_locate_in_a_folder_whose_name_is_a_number(tmp_path: Path) -> None:
    root = tmp_path / "512"
    root.mkdir()
    (root / "file").write_text("x")
    done(run("record", root))
    assert locate(root, "512")["offset"] == 512
    assert locate(root, "512/")["path"] == "512"
    assert locate(root, "512/file")["start"] == 512


# ---- play


def play(*command: object) -> bytes:
    result = run("play", *command, text=False, errors=None)
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("options", "start", "length"),
    [
        ([], 0, 10**9),
        (["--start", "0"], 0, 10**9),
        (["--start", "1"], 1, 10**9),
        (["--start", "1K"], 1024, 10**9),
        (["--start", "64KiB"], 65536, 10**9),
        (["--start=513", "--length=1"], 513, 1),
        (["--length", "0"], 0, 0),
        (["--length", "1K"], 0, 1024),
        (["--start", "1K", "--length", "1M"], 1024, 10**9),
        (["--length", "5G"], 0, 10**9),
        (["--length", "8191P"], 0, 10**9),
    ],
    ids=str,
)
def test_play_a_part(data: Path, reference: Reference, options: list[str], start: int, length: int) -> None:
    assert play(data, *options) == reference.read(start, length)


def test_play_near_the_end(data: Path, reference: Reference) -> None:
    """The footer can be played from any byte; from the archive's size on there is nothing; beyond it is an error."""
    assert play(data, "--start", str(reference.size - 1)) == b"\0"
    assert play(data, "--start", str(reference.size)) == b""
    refused(run("play", data, "--start", str(reference.size + 1)), 2)


def test_play_into_a_file(data: Path, reference: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out.tar"
    assert play(data, "-o", out) == b""
    assert out.read_bytes() == reference.read(0, reference.size)
    assert play(data, "--output", out, "--start", "600", "--length", "100", "--force") == b""
    assert out.read_bytes() == reference.read(600, 100)


@pytest.mark.parametrize("out", ["/dev/full", "nowhere/out.tar", "."])
def test_play_into_what_cannot_be_written(data: Path, tmp_path: Path, out: str) -> None:
    result = run("play", data, "-o", out, cwd=tmp_path)
    refused(result, 1)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.long(but=1)
@pytest.mark.parametrize("out", ["file", ".tartape/index.db", "new", "../through/file"])
def test_a_play_does_not_write_over_what_it_plays(small: Path, out: str) -> None:
    """Refused before anything is opened for writing, as cp and tar do."""
    done(run("record", small))
    (small.parent / "through").symlink_to(small)
    result = run("play", small, "-o", small / out)
    refused(result, 2)
    assert done(run("verify", small)) == ""
    assert (small / "file").read_bytes() == b"content" and not (small / "new").exists()


def _events(data: Path, *options: object) -> list[dict[str, object]]:
    result = run("play", data, "--events", *options)
    assert result.stderr == ""
    return [json.loads(line) for line in done(result).splitlines()]


def _follow(events: list[dict[str, object]], start: int) -> int:
    """Checks the order of the events and that data follows data; returns where it ends."""
    position, within = start, None
    for event in events:
        match event["type"]:
            case "file_start":
                assert within is None
                within = event["path"]
                assert event["resumed"] is (position > event["start_offset"])  # type: ignore[operator]
            case "file_data":
                assert event["offset"] == position and event["size"] > 0  # type: ignore[operator]
                position += event["size"]  # type: ignore[operator]
            case "file_end":
                assert within == event["path"] and event["end_offset"] == position
                within = None
            case "tape_completed":
                assert within is None and event is events[-1]
            case other:
                pytest.fail(f"an event of type {other}")
    return position


def test_events(data: Path, reference: Reference, tmp_path: Path) -> None:
    """In order, without a gap, with the MD5 of each file's content; the archive goes to the file."""
    events = _events(data, "-o", tmp_path / "out.tar")
    assert (tmp_path / "out.tar").read_bytes() == reference.read(0, reference.size)
    assert _follow(events, 0) == reference.size
    assert [os.fsencode(event["path"]) for event in events if event["type"] == "file_start"] == [  # type: ignore[arg-type]
        name.rstrip(b"/") for name in reference.starts
    ]
    assert [event["start_offset"] for event in events if event["type"] == "file_start"] == [*reference.starts.values()]
    for event in events:
        if event["type"] == "file_end":
            path = data.parent / event["path"]  # type: ignore[operator]
            plain = path.is_file() and not path.is_symlink()
            assert event["md5sum"] == (hashlib.md5(path.read_bytes()).hexdigest() if plain else None)
            assert event["is_complete"] is True
    assert events[-1]["type"] == "tape_completed"


def test_events_from_the_middle_of_a_file(data: Path, reference: Reference) -> None:
    """A body that was not sent from its first byte has no MD5; one whose header alone was passed over has."""
    first = reference.starts[b"data/photos/5000.bin"]
    for offset, has_md5 in ((first + 100, True), (first + 512, True), (first + 513, False)):
        events = _events(data, "--start", str(offset))
        assert _follow(events, offset) == reference.size
        end = next(event for event in events if event["type"] == "file_end")
        assert (end["path"], end["is_complete"], end["md5sum"] is not None) == ("data/photos/5000.bin", False, has_md5)
    assert [event["type"] for event in _events(data, "--start", str(reference.size))] == ["tape_completed"]


def test_events_of_a_length(data: Path, reference: Reference, tmp_path: Path) -> None:
    first = reference.starts[b"data/photos/5000.bin"]
    out = tmp_path / "part"
    events = _events(data, "--start", str(first), "--length", "1000", "-o", out)
    assert _follow(events, first) == first + 1000
    assert out.read_bytes() == reference.read(first, 1000)
    assert not [event for event in events if event["type"] in ("file_end", "tape_completed")]


@pytest.mark.long(but=3)
@pytest.mark.parametrize("options", [[], ["--events"]], ids=["bytes", "events"])
@pytest.mark.parametrize("change", ["content", "size", "gone", "replaced", "mode"])
def test_drift_on_the_way_ends_a_play(tmp_path: Path, options: list[str], change: str) -> None:
    """Exit 1, the reason in one line, and what was written is a true beginning of the archive."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(os.urandom(3 << 20))
    (root / "b").write_bytes(os.urandom(1 << 20))
    done(run("record", root))
    reference = Reference(root)
    expected = reference.read(0, reference.size)
    match change:
        case "content":
            with open(root / "b", "r+b") as file:
                file.write(b"changed")
        case "size":
            os.truncate(root / "b", 100)
        case "gone":
            (root / "b").unlink()
        case "replaced":
            (root / "b").unlink()
            (root / "b").symlink_to("a")
        case "mode":
            (root / "b").chmod(0o600)
    # A folder's header comes first, so its own drift must not hide that of the file.
    start = reference.starts[b"root/a"]
    out = tmp_path / "out.tar"
    result = run("play", root, "--start", str(start), "-o", out, *options)
    quiet(result)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "root/b" in result.stderr and "recorded" in result.stderr
    written = out.read_bytes()
    assert written == expected[start : start + len(written)]
    assert len(written) >= 2 << 20
    if options:
        events = [json.loads(line) for line in result.stdout.splitlines()]
        assert sum(event.get("size", 0) for event in events if event["type"] == "file_data") == len(written)
        assert events[-1]["type"] != "tape_completed"
