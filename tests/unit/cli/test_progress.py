"""Progress on a terminal."""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from support.programs import run, under_strace


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
