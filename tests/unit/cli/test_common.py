"""What commands share: parsing of options, sizes for people, progress on a terminal."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import click
import pytest
from support.command_line import (
    READERS,
    at_work,
    on_terminal,
)
from support.programs import done, run, under_strace
from support.reference import Reference

from tartapefs.cli import common
from tartapefs.mount import sd_notify


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 60, "1024.0 PiB"),
    ],
)
def test_a_size_for_people(count: int, text: str) -> None:
    assert common.size_text(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("512", 512),
        ("007", 7),
        ("1K", 1 << 10),
        ("64KiB", 1 << 16),
        ("3M", 3 << 20),
        ("2G", 2 << 30),
        ("1TiB", 1 << 40),
        ("8191P", 8191 << 50),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_a_number_of_bytes(text: str, count: int) -> None:
    assert common.byte_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1.5", "1e3", "0x10", "K", "1iB", "1k", "1KB", " 1", "1\n", "٣", "8192P", "9" * 5000]
)
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(click.BadParameter):
        common.byte_count(text)


@pytest.mark.parametrize(("text", "mode"), [("0", 0), ("0440", 0o440), ("777", 0o777), ("000644", 0o644)])
def test_a_mode(text: str, mode: int) -> None:
    assert common.octal_mode(text) == mode


@pytest.mark.parametrize("text", ["", "8", "0o440", "1000", "-1", "u+r", "٤"])
def test_what_is_no_mode(text: str) -> None:
    with pytest.raises(click.BadParameter):
        common.octal_mode(text)


@pytest.mark.parametrize("text", ["nan", "-1", "101", "x", ""])
def test_a_number_out_of_its_range(text: str) -> None:
    with pytest.raises(click.BadParameter):
        common.Number(0, 100).convert(text, None, None)
    assert common.Number(0, 100).convert("1e1", None, None) == 10


def test_a_template_of_a_name() -> None:
    assert common.name_template("{root}-{fingerprint}.tar") == "{root}-{fingerprint}.tar"
    for text in ("", "a/b", "{none}", "..", "x" * 256):
        with pytest.raises(click.BadParameter):
            common.name_template(text)


@pytest.mark.parametrize("in_journal", [False, True])
def test_a_message_has_its_level_in_the_journal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_journal: bool
) -> None:
    monkeypatch.setattr(sd_notify, "to_journal", lambda: in_journal)
    common.say("it went wrong", logging.ERROR)
    assert capsys.readouterr() == ("", "<3>it went wrong\n" if in_journal else "tartapefs: it went wrong\n")


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
    """On a terminal, once it takes longer than a second: bytes, rate, time left, members and the one that is read."""
    root, _ = larger
    arguments = {"resume": [tmp_path / "copy"], "digest": ["-a", "md5"]}[command]
    code, seen = on_a_slow_disk("preadv,preadv2", 30, command, root, *arguments)
    assert code == 0
    assert b"larger/5" in seen and b"/7 members" in seen and b"MB/s" in seen and b"0:00:0" in seen, seen


@pytest.mark.long
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
