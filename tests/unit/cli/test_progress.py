"""Progress on a terminal, as a terminal shows it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
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
from wcwidth import wcswidth

from tartapefs.cli import progress


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[Callable[[], list[str]]]:
    """A terminal on standard error, and no delay; the function reads what was drawn, and gives the lines it shows."""
    master, slave = os.openpty()
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
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))  # rich asks descriptors 0 to 2, which are not this terminal
        try:
            yield lines
        finally:
            os.close(master)


def shown(lines: Callable[[], list[str]], text: str) -> str:
    """The one line that the terminal shows, once it has the text."""
    while text not in "".join(seen := lines()):
        time.sleep(0.01)
    assert len(seen) == 1, seen
    return seen[0]


LONG = "data/photographs of a long summer/" + "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 20 + "/another folder/1.bin"


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_one_line_that_is_never_wrapped(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    with terminal(monkeypatch, columns) as lines:
        with progress.progress("playing a folder with a long name", 4 << 30, is_bytes=True) as update:
            update(1 << 30, note="first")
            update(2 << 30, note=LONG)
            line = shown(lines, " 50%")
            assert wcswidth(line) <= columns
            if columns >= 60:
                assert re.search(r"playing a.*\u2501+.* 50% +[0-9.]+ [KMGTP]iB/s +[-0-9]+:[-0-9]+:[-0-9]+", line), line
            if columns >= 80:
                assert "data" in line and line.endswith("\u2026")
            update(4 << 30, note="last")
            shown(lines, "100%")
        assert lines() == []


def test_a_total_that_was_too_small_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80) as lines:
        with progress.progress("recording data", 10) as update:
            update(1)
            update(5, note="five")
            assert " 50% " in shown(lines, "five")
            update(1234, note="more")
            assert " 1,234 " in shown(lines, "more")
        assert lines() == []


def test_an_interruption_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80) as lines:
        with pytest.raises(KeyboardInterrupt), progress.progress("recording data", 10) as update:
            update(5, note="five")
            shown(lines, "five")
            raise KeyboardInterrupt
        assert lines() == []


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


def test_what_takes_longer_than_a_second_shows_progress(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the terminal, by the name that the user gave, escaped; what is on stdout stays as it is."""
    monkeypatch.setenv("COLUMNS", "200")
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


def test_a_pipe_sees_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(progress, "_DELAY", -1)
    with open(reader, "rb") as pipe, open(writer, "w") as error:
        monkeypatch.setattr(sys, "stderr", error)
        with progress.progress("playing", 10) as update:
            update(5)
        error.close()
        assert pipe.read() == b""
