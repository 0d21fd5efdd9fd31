"""A scratch folder in which the commands and examples of a document are run as they are printed."""

import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.programs import our_mounts, run

README = Path(__file__).parents[2] / "README.md"
FENCE = re.compile(r"^```(sh|python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKIPPED = ("make", "apt", "apt-get", "pip", "git clone", "sudo", "systemctl")  # they change the machine
STILL_MOUNTED = "it is still mounted in the mount namespace of"  # unmount; another test has made one meanwhile
# In a mount namespace of its own, since other tests' mounts are broken on purpose, which it would tell of.
ALONE = """exec unshare --mount --propagation private bash -c '
    findmnt --raw --noheadings --output TARGET --types fuse.tartapefs | while read -r mountpoint; do
        umount --lazy --internal-only --no-canonicalize "$(printf %b "$mountpoint")"
    done; exec "$@"' bash """
EXIT = re.compile(r"#.*\bexits?\b\D*(\d+)")  # a comment that names another exit code than 0


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each block that is to be run."""
    return FENCE.findall(text)


def commands(block: str) -> list[str]:
    """Its lines without comments and without those that are skipped; one that ends in a backslash goes on."""
    lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
    return [
        line for line in lines if line and not line.startswith("#") and not re.match(rf"({'|'.join(SKIPPED)})\b", line)
    ]


class Scratch:
    """A folder with `data` in it, in which `/mnt/tape`, `host:`, `remote:` and `/backup` there are its own places."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        program = folder / "bin" / "tartapefs"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tartapefs "$@"\n')
        program.chmod(0o755)
        (folder / "work" / "data" / "photos").mkdir(parents=True)
        for number in range(4):
            (folder / "work" / "data" / "photos" / f"{number}.bin").write_bytes(os.urandom(700_000))
        (folder / "bin" / "ssh").write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
        (folder / "bin" / "ssh").chmod(0o755)
        self.environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RCLONE_CONFIG": "/dev/null"}
        self.names: dict[str, object] = {}
        self.run = 0

    def here(self, text: str) -> str:
        """The text with its places replaced; those that it copies to exist."""
        for place in re.findall(r"\bhost:/?([\w/.-]*/)", text):
            (self.folder / "host" / place).mkdir(parents=True, exist_ok=True)
        text = re.sub(r"(?<![\w:/])/backup\b", f"{self.folder}/host/backup", text)
        text = re.sub(r"\bhost:/?", f"{self.folder}/host/", text)
        text = re.sub(r"\bremote:/?", f"{self.folder}/remote/", text)
        return text.replace("/mnt/tape", f"{self.folder}/mnt/tape")

    def run_all(self, text: str) -> None:
        for language, block in blocks(text):
            if language == "console":
                self.run_console(block)
                continue
            if language == "python":
                exec(compile(self.here(block), "README", "exec"), self.names)
                self.run += 1
                continue
            for line in commands(block):
                self.run_line(line)

    def run_console(self, block: str) -> None:
        """Runs what stands behind `$ `; it must print the lines that follow, in which `…` stands for anything."""
        for command, *expected in (part.splitlines() for part in block.split("$ ")[1:]):
            printed = self.run_line(f"{{ {command}; }} 2>&1").splitlines()
            printed = [line for line in printed if STILL_MOUNTED not in line]
            patterns = [re.escape(line).replace("…", ".*") for line in expected]
            assert len(printed) == len(patterns) and all(map(re.fullmatch, patterns, printed)), (command, printed)

    def run_line(self, line: str) -> str:
        expected = EXIT.search(line)
        alone = ALONE if line.startswith("tartapefs doctor") and os.geteuid() == 0 else ""
        result = subprocess.run(
            ["bash", "-c", alone + self.here(line)], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == int(expected[1] if expected else 0), f"{line}\n{result.stdout}\n{result.stderr}"
        self.run += 1
        return result.stdout


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scratch]:
    scratch = Scratch(tmp_path)
    monkeypatch.chdir(tmp_path / "work")
    yield scratch
    scratch.names.clear()
    gc.collect()  # the examples close nothing
    for mountpoint in our_mounts():
        if mountpoint.startswith(f"{tmp_path}/"):
            assert run("unmount", mountpoint).returncode == 0
