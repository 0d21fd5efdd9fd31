"""Progress on a terminal, as a terminal shows it."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyte
import pytest
from support.command_line import (
    READERS,
    on_terminal,
)
from support.programs import done, run, under_strace
from support.reference import Reference
from support.terminals import CTRL_C, Terminal, give_size
from wcwidth import wcswidth

from tartapefs.cli import progress
from tartapefs.cli.common import say


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[Callable[[], list[str]]]:
    """A terminal on standard error, and no delay; the function reads what was drawn, and gives the lines it shows."""
    master, slave = os.openpty()
    give_size(slave, columns, 24)
    os.set_blocking(master, False)
    screen = pyte.Screen(columns, 24)
    stream = pyte.ByteStream(screen)

    def lines() -> list[str]:
        with suppress(BlockingIOError):
            while part := os.read(master, 65536):
                stream.feed(part)
        # Others are made for a dark terminal, or for a light one.
        assert {cell.fg for row in screen.buffer.values() for cell in row.values()} <= {"default"}
        return [line.rstrip() for line in screen.display if line.strip()]

    with open(slave, "w") as error:
        monkeypatch.setattr(sys, "stderr", error)
        monkeypatch.setattr(progress, "_DELAY", -1)
        monkeypatch.setattr(progress, "_INTERVAL", 0)
        monkeypatch.setenv("TERM", "xterm-256color")
        try:
            yield lines
        finally:
            os.close(master)


LONG = "data/photographs of a long summer/" + "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 20 + "/another folder/1.bin"


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_one_line_that_is_never_wrapped(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Bar, percent, rate, time left, and as much of the member's name as there is room; no number is cut."""
    numbers = r"(#+)(\.+)   50%  +[0-9.]+ ([KMGTP]i)?B/s  [0-9]+:[0-9]{2}:[0-9]{2}"
    with terminal(monkeypatch, columns) as lines:
        with progress.progress("playing", 4 << 30, is_bytes=True) as update:
            update(1 << 30, note="first")
            update(2 << 30, note=LONG)
            (line,) = lines()
            assert wcswidth(line) <= columns
            found = re.fullmatch(rf"{numbers}(  .+)?", line)
            assert found and len(found[1]) + len(found[2]) == columns // 8 and abs(len(found[1]) - len(found[2])) <= 1
            if columns >= 60:
                assert "  playing data/" in line if columns == 120 else "  data/" in line
                assert line.endswith("\u2026") and wcswidth(line) >= columns - 1
            update(4 << 30, note="last")
            assert "100%" in lines()[0]
        assert lines() == []


@pytest.mark.parametrize("rate", [1, 1000, 1023.95 * 2**20, 10.0**7])
@pytest.mark.parametrize("is_bytes", [False, True])
def test_no_width_is_too_small(is_bytes: bool, rate: float) -> None:
    for columns in range(1, 130):
        text = progress.line(columns, "playing", LONG, 10, 10**13, rate, is_bytes)
        assert wcswidth(text) <= columns
        assert columns < 80 or "data" in text


def test_a_total_that_was_too_small_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80) as lines:
        with progress.progress("recording", 10) as update:
            update(1)
            update(5, note="five")
            assert " 50% " in lines()[0]
            update(1234, note="more")
            assert lines()[0].startswith("1,234 ") and lines()[0].endswith("  more")
        assert lines() == []


def test_a_message_takes_the_place_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80) as lines:
        with progress.progress("recording", 10) as update:
            update(5, note="five")
            say("a message")
            assert lines() == ["tartapefs: a message"]
            update(6, note="six")
            assert len(lines()) == 2 and lines()[1].endswith("six")
        assert lines() == ["tartapefs: a message"]


@pytest.mark.parametrize("term", ["dumb", "unknown", None])
def test_a_terminal_that_cannot_move_its_cursor_sees_none(monkeypatch: pytest.MonkeyPatch, term: str | None) -> None:
    with terminal(monkeypatch, 80) as lines:
        monkeypatch.setenv("TERM", term) if term else monkeypatch.delenv("TERM")
        with progress.progress("recording", 10) as update:
            update(5)
        assert lines() == []


# A command with progress that never ends; it says when it begins, and what it does after an interruption.
ENDLESS = """
import sys, time, click
from tartapefs import cli
from tartapefs.cli import progress
from tartapefs.cli.common import show
progress._DELAY, progress._INTERVAL = {delay}, 0
@click.command()
def endless():
    with progress.progress("reading", 100, True) as update:
        show("begun")
        try:
            done = 0
            while True:
                update(done := (done + 1) % 100, note="data/a member whose name is too long/" * 9)
        finally:
            update(100)
            show("ending")
sys.argv[1:] = []
cli._run(endless, "endless")
"""


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize("how", [CTRL_C, signal.SIGINT, signal.SIGTERM], ids=["key", "INT", "TERM"])
def test_an_interruption_leaves_nothing_behind(how: bytes | signal.Signals, moment: str, columns: int) -> None:
    """Nor does the ^C that the terminal shows: it would wrap a line of full width."""
    program = ENDLESS.format(delay=3600 if moment == "before" else -1)
    with Terminal(sys.executable, "-c", program, columns=columns) as terminal:
        terminal.until(lambda lines: any("begun" in line if moment == "before" else "%" in line for line in lines))
        terminal.type(how) if isinstance(how, bytes) else os.kill(terminal.pid, how)
        assert terminal.end() == (143 if how == signal.SIGTERM else 130)
        said = [] if how == signal.SIGTERM else ["tartapefs: interrupted"]
        assert [line for line in terminal.lines if line not in ("begun", "ending")] == said
        assert b"\x1b[3" not in terminal.seen  # no colours


def on_a_slow_disk(calls: str, milliseconds: int, *command: object) -> tuple[int, bytes]:
    """Runs it with these system calls so much slower; the exit code, and what a terminal on stderr saw, uncoloured."""
    master, slave = os.openpty()
    give_size(slave, 200, 24)
    slowly = under_strace("-e", f"trace={calls}", "-e", f"inject={calls}:delay_enter={1000 * milliseconds}")
    process = subprocess.Popen(
        [*slowly, *map(os.fspath, command)],
        stdout=subprocess.DEVNULL,
        stderr=slave,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(slave)
    seen = b""
    with suppress(OSError):  # the terminal's other side is closed
        while part := os.read(master, 65536):
            seen += part
    os.close(master)
    return process.wait(60), re.sub(rb"\x1b\[[\d;]*m", b"", seen)


@pytest.mark.long
@pytest.mark.needs("strace")
@pytest.mark.parametrize("command", ["resume", "digest"])
def test_progress_names_the_member(larger: tuple[Path, bytes], tmp_path: Path, command: str) -> None:
    """On a terminal, once it takes longer than a second: percentage, rate, time left, and the member that is read."""
    root, _ = larger
    arguments = {"resume": [tmp_path / "copy"], "digest": ["-a", "md5"]}[command]
    code, seen = on_a_slow_disk("preadv,preadv2", 30, command, root, *arguments)
    assert code == 0
    assert b"larger/5" in seen and b"% " in seen and b" MiB/s" in seen and b"0:00:0" in seen, seen


@pytest.mark.long
@pytest.mark.needs("strace")
@pytest.mark.parametrize("command", ["record", "verify", "diff"])
def test_progress_through_members(tmp_path: Path, command: str) -> None:
    """The same where it is members that take the time."""
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
    assert b"% " in seen and b" members/s" in seen and b" 0:00:0" in seen, seen
    name = rb"[KM]iB  [12]\d\d\d" if command == "record" else rb" many/[12]\d\d\d"
    assert re.search(name, seen), seen


@pytest.mark.parametrize("command", ["record", *READERS])
def test_what_is_short_shows_no_progress(data: Path, small: Path, command: str) -> None:
    code, seen, _ = on_terminal(command, small if command == "record" else data, *READERS.get(command, []))
    assert code == 0
    assert "\x1b" not in seen
    assert len(seen.splitlines()) == (1 if command in ("record", "verify") else 0), seen


def test_what_takes_longer_than_a_second_shows_progress(large: Path, tmp_path: Path) -> None:
    """On the terminal, with names escaped; what is on stdout stays as it is."""
    name = tmp_path / "[red]{0}{task.x}[b]\n"
    name.symlink_to(large)
    code, seen, out = on_terminal("play", name.name, hold=1.3, cwd=tmp_path)
    assert code == 0 and "Traceback" not in seen, seen
    assert "\x1b[" in seen and "%" in seen
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


def test_a_pipe_sees_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(progress, "_DELAY", -1)
    with open(reader, "rb") as pipe, open(writer, "w") as error:
        monkeypatch.setattr(sys, "stderr", error)
        with progress.progress("playing", 10) as update:
            update(5)
        error.close()
        assert pipe.read() == b""
