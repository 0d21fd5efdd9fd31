"""README's own commands and examples, run as they are printed, in a scratch folder that has what they speak of."""

import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.programs import our_mounts, run
from support.reference import Reference

README = Path(__file__).parents[2] / "README.md"
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKIPPED = ("make", "apt", "apt-get", "pip", "git clone", "sudo", "systemctl")  # they change the machine
# In a mount namespace of its own, since other tests' mounts are broken on purpose, which it would tell of.
ALONE = """exec unshare --mount --propagation private bash -c '
    findmnt --raw --noheadings --output TARGET --types fuse.tartapefs | while read -r mountpoint; do
        umount --lazy --internal-only --no-canonicalize "$(printf %b "$mountpoint")"
    done; exec "$@"' bash """
EXIT = re.compile(r"#.*\bexits?\b\D*(\d+)")  # a comment that names another exit code than 0

pytestmark = [pytest.mark.fuse, pytest.mark.needs("rsync", "rclone", "dd", "tar")]


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each block that is to be run."""
    return FENCE.findall(text)


def make_commands(text: str) -> set[str]:
    """What the document tells to `make`, in blocks of any kind and between backticks."""
    return set(re.findall(r"(?:^ *|`)(make [\w-]+)", text, re.MULTILINE))


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
            if language == "python":
                exec(compile(self.here(block), "README", "exec"), self.names)
                self.run += 1
                continue
            for line in commands(block):
                self.run_line(line)

    def run_line(self, line: str) -> None:
        expected = EXIT.search(line)
        alone = ALONE if line.startswith("tartapefs doctor") and os.geteuid() == 0 else ""
        result = subprocess.run(
            ["bash", "-c", alone + self.here(line)], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == int(expected[1] if expected else 0), f"{line}\n{result.stdout}\n{result.stderr}"
        self.run += 1


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


def test_everything_in_the_readme_works(scratch: Scratch) -> None:
    text = README.read_text()
    assert {language for language, _ in blocks(text)} == {"sh", "python"}
    scratch.run_all(text)
    assert scratch.run >= 10


@pytest.mark.needs("rsync", "rclone")
@pytest.mark.parametrize(("program", "code", "place"), [("rsync", 23, "host/backup"), ("rclone", 1, "remote/backup")])
def test_a_copy_as_printed_is_right_after_drift(scratch: Scratch, program: str, code: int, place: str) -> None:
    """The source drifts half way; the same line, once it was put back, makes or mends the copy."""
    (line,) = re.findall(rf"^{program} .*/mnt/tape.*$", README.read_text(), re.MULTILINE)
    reference = Reference(scratch.folder / "work" / "data")
    archive = reference.read(0, reference.size)
    changed, saved = scratch.folder / "work" / "data" / "photos" / "2.bin", scratch.folder / "saved"
    copy = scratch.folder / place / "archive.tar"
    shutil.copy2(changed, saved)
    scratch.run_all("```sh\ntartapefs record ./data\nmkdir -p /mnt/tape\ntartapefs mount ./data /mnt/tape\n```")
    changed.write_bytes(bytes(700_000))
    scratch.run_line(f"{line} # exits with {code}")
    if program == "rsync":  # zeros, in full size
        wrong = copy.read_bytes()
        assert len(wrong) == len(archive) and not wrong[-1_000_000:].strip(b"\0")
    shutil.copy2(saved, changed)
    scratch.run_line("tartapefs unmount /mnt/tape")
    scratch.run_line("tartapefs mount ./data /mnt/tape --check mtime")
    scratch.run_line(line)
    assert copy.read_bytes() == archive


def test_the_comparison_as_printed(scratch: Scratch) -> None:
    """It succeeds for an equal copy alone, and not where the archive cannot be read to its end."""
    (line,) = re.findall(r"^.* \| ssh .*$", README.read_text(), re.MULTILINE)
    scratch.run_all("```sh\ntartapefs record ./data\n```")
    backup = scratch.folder / "host" / "backup"
    backup.mkdir(parents=True)
    scratch.run_line(f"tartapefs play ./data -o {backup}/archive.tar")
    scratch.run_line(line)
    with open(backup / "archive.tar", "r+b") as copy:
        copy.seek(1_000_000)
        copy.write(b"wrong")
    scratch.run_line(f"{line} # exits with 1")
    (scratch.folder / "work" / "data" / "photos" / "2.bin").write_bytes(b"other")
    scratch.run_line(f"{line} # exits with 1")


def test_everything_on_the_page_on_copies_works(scratch: Scratch) -> None:
    scratch.run_all((README.parent / "docs" / "copies.md").read_text())
    assert scratch.run >= 15


def test_everything_on_the_page_on_verified_tapes_works(scratch: Scratch) -> None:
    scratch.run_all((README.parent / "docs" / "verified.md").read_text())
    assert scratch.run >= 15


def test_the_set_up_is_two_commands() -> None:
    assert make_commands(README.read_text()) == {"make demo", "make test"}


SAMPLE = """
# Sample

    make demo    # indented

Run `make test`, and make sure that this is no command.

```sh
make demo
pip install .
tartapefs record ./data
mkdir -p /mnt/tape
tartapefs record ./data   # exits with 4: it is recorded
# a comment alone
tartapefs mount ./data \\
    /mnt/tape
rsync --partial /mnt/tape/archive.tar host:/backup/
rclone copy /mnt/tape/archive.tar remote:backup
```

```python
from tartapefs import Tape, TapePlayer

player = TapePlayer(Tape.discover("./data"))
```

```python
from pathlib import Path

assert Path("/mnt/tape/archive.tar").read_bytes() == player.read(0, player.tape.total_size)
```

```text
exit 1
```
"""


def test_a_sample_is_run_whole(scratch: Scratch) -> None:
    """What the document does to its places happens to the scratch folder's."""
    scratch.run_all(SAMPLE)
    assert scratch.run == 8
    copied = (scratch.folder / "host" / "backup" / "archive.tar").read_bytes()
    assert copied == (scratch.folder / "remote" / "backup" / "archive.tar").read_bytes()
    assert make_commands(SAMPLE) == {"make demo", "make test"}


@pytest.mark.parametrize("line", ["false", "true # exits with 1", "tartapefs info ./nowhere", "exit 2 # exits with 3"])
def test_a_command_that_ends_otherwise_than_printed_fails(scratch: Scratch, line: str) -> None:
    with pytest.raises(AssertionError):
        scratch.run_all(f"```sh\n{line}\n```\n")


def test_an_example_that_fails_fails(scratch: Scratch) -> None:
    with pytest.raises(ZeroDivisionError):
        scratch.run_all("```python\n1 / 0\n```\n")
