"""The program as a whole: usage, exit codes, streams, and no traceback ever."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import CLOSED, COMMANDS, ODD, READERS, closed, fingerprint, on_terminal
from support.programs import FORGING, done, quiet, refused, run
from support.reference import Reference
from support.users import tartapefs_as_nobody

from tartapefs.cli import COMMANDS as PROGRAM
from tartapefs.cli import _is_run_by_mount, _unraisable

COMMANDS += ["mount", "unmount"]


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
    assert done(run("-V")) == done(run("--version"))


def test_the_list_of_commands_is_not_cut() -> None:
    """At the width that a terminal usually has."""
    text = done(run("--help", env=os.environ | {"COLUMNS": "80"}))
    for name, (_, summary) in PROGRAM.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE), name


def test_help_and_an_alias(tmp_path: Path) -> None:
    assert done(run("help")) == done(run("--help"))
    assert done(run("help", "mount")) == done(run("mount", "--help"))
    assert run("help", "no-such-command").returncode == 2
    umount, unmount = run("umount", tmp_path), run("unmount", tmp_path)
    assert (umount.returncode, umount.stderr) == (unmount.returncode, unmount.stderr) == (5, unmount.stderr)


def test_quiet_prints_data_and_errors_alone(data: Path, tmp_path: Path) -> None:
    for arguments in (["-q", "record", data, "--force"], ["record", "-q", data, "--force"]):
        result = run(*arguments)
        assert re.fullmatch(r"[0-9a-f]{64}\n", done(result)) and result.stderr == ""
    result = run("-q", "info", tmp_path)
    assert result.returncode == 3 and "no tape here" in result.stderr


# What takes long to import, with what only needs it; a command that needs none of that may import it.
SLOW = {"fuse", "mfusepy", "pathspec", "secrets", "subprocess", "tarfile", "tempfile", "urllib.parse"}
ENGINE = {"ctypes", "sqlite3", "tartapefs.index", "tartapefs.play", "tartapefs.record", "tartapefs.source"}
SCANS = {"tartapefs.cli.seals", "tartapefs.record", "tartapefs.transfer.copies", "tartapefs.verify"}


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        (["--help"], SLOW | ENGINE | SCANS),
        (["--version"], SLOW | ENGINE | SCANS),
        (["no-such-command"], SLOW | ENGINE | SCANS),
        (["info"], SLOW | SCANS | {"tartapefs.mount.libfuse"}),
        (["ls"], SLOW | SCANS | {"tartapefs.mount.libfuse"}),
        (["play", "--output", "/dev/null"], SLOW | SCANS | {"tartapefs.mount.libfuse"}),
        (["record"], SLOW | {"tartapefs.mount.libfuse"}),
        (["status"], SLOW - {"subprocess"} | SCANS | {"tartapefs.mount.libfuse"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_imports_no_more_than_it_needs(command: list[str], unneeded: set[str], data: Path) -> None:
    argument = [] if command[0] in ("--help", "--version", "no-such-command", "status") else [data]
    result = run(*command, *argument, env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", result.stderr, re.MULTILINE))
    assert "tartapefs.cli" in imported
    assert not unneeded & imported


@pytest.mark.parametrize(
    ("argv", "called"),
    [
        (["/srv", "/mnt", "-o", "ro"], True),
        (["/srv", "/mnt"], False),
        (["mount", "/srv", "-o", "ro"], False),
        (["/srv", "-o", "ro"], False),
        ([], False),
    ],
)
def test_a_call_by_mount_fuse3_is_known_by_its_form(argv: list[str], called: bool) -> None:
    assert _is_run_by_mount(argv) is called


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


@pytest.mark.parametrize("command", [["info"], ["record", "--force"], ["verify"], ["play"]], ids=lambda c: c[0])
def test_an_empty_folder_name_is_not_the_current_folder(command: list[str], data: Path) -> None:
    """An empty DIR is an unset variable of a script; programs like tar and cp refuse it."""
    before = (data / ".tartape" / "index.db").stat()
    result = run(*command, "", cwd=data)
    quiet(result)
    assert result.returncode in (2, 3) and result.stdout == ""
    assert os.path.samestat((data / ".tartape" / "index.db").stat(), before)


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


@pytest.mark.parametrize(
    "command", ['{} play "$DIR" | head -c 10', '{} play --events "$DIR" | head -1', '{} ls "$DIR" | head -1']
)
def test_a_reader_of_the_pipe_that_leaves_is_no_error(large: Path, command: str) -> None:
    line = command.replace("{}", f"{sys.executable} -m tartapefs", 1)
    result = subprocess.run(["sh", "-c", line], env=os.environ | {"DIR": str(large)}, capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout


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


@pytest.mark.matrix(but=10)
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


@pytest.mark.parametrize(("error", "told"), [(KeyboardInterrupt, ""), (ValueError, "Exception ignored in: <generator")])
def test_a_second_signal_while_a_generator_is_thrown_away(
    error: type[BaseException], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generator() -> Iterator[int]:
        try:
            yield 1
        finally:
            raise error

    monkeypatch.setattr(sys, "unraisablehook", _unraisable)
    running = generator()
    next(running)
    del running
    said = capsys.readouterr().err
    assert said.startswith(told) if told else not said
