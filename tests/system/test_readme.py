"""README's own commands and examples, run as they are printed, in a scratch folder that has what they speak of."""

import re
import shutil

import pytest
from support.readme import README, Scratch, blocks
from support.readme import scratch as scratch
from support.reference import Reference

pytestmark = [pytest.mark.fuse, pytest.mark.needs("rsync", "rclone", "dd", "tar")]


def make_commands(text: str) -> set[str]:
    """What the document tells to `make`, in blocks of any kind and between backticks."""
    return set(re.findall(r"(?:^ *|`)(make [\w-]+)", text, re.MULTILINE))


def test_everything_in_the_readme_works(scratch: Scratch) -> None:
    text = README.read_text()
    assert {language for language, _ in blocks(text)} == {"console", "sh"}
    scratch.run_all(re.sub(r"^```console.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    assert scratch.run >= 10


def test_what_the_readme_prints_is_printed(scratch: Scratch) -> None:
    """What it begins with."""
    for language, block in blocks(README.read_text()):
        if language == "console":
            scratch.run_console(block)
    assert scratch.run == 5


@pytest.mark.long(but=1)
@pytest.mark.needs("rsync", "rclone")
@pytest.mark.parametrize(("program", "code", "place"), [("rsync", 23, "host/backup"), ("rclone", 1, "remote/backup")])
def test_a_copy_as_printed_is_right_after_drift(scratch: Scratch, program: str, code: int, place: str) -> None:
    """The source drifts half way; the same line, once it was put back, makes or mends the copy."""
    (line,) = re.findall(rf"^{program} .* tape/archive.tar .*$", README.read_text(), re.MULTILINE)
    reference = Reference(scratch.folder / "work" / "data")
    archive = reference.read(0, reference.size)
    changed, saved = scratch.folder / "work" / "data" / "photos" / "2.bin", scratch.folder / "saved"
    copy = scratch.folder / place / "archive.tar"
    shutil.copy2(changed, saved)
    scratch.run_all("```sh\ntartapefs record ./data\nmkdir tape\ntartapefs mount ./data tape\n```")
    changed.write_bytes(bytes(700_000))
    scratch.run_line(f"{line} # exits with {code}")
    if program == "rsync":  # in full size, with zeros where a read failed; what the kernel had read ahead is right
        wrong = copy.read_bytes()
        assert len(wrong) == len(archive) and wrong != archive
        assert all(found in (byte, 0) for found, byte in zip(wrong, archive, strict=True))
        assert copy.stat().st_mode & 0o200, "only root can mend it"
    shutil.copy2(saved, changed)
    scratch.run_line("tartapefs unmount tape")
    scratch.run_line("tartapefs mount ./data tape --source-check mtime")
    scratch.run_line(line)
    assert copy.read_bytes() == archive


def test_the_comparison_as_printed(scratch: Scratch) -> None:
    """It succeeds for an equal copy alone, and not where the archive cannot be read to its end."""
    (line,) = re.findall(r"^tartapefs digest .* \| ssh .*$", README.read_text(), re.MULTILINE)
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


def test_going_on_over_ssh_as_printed(scratch: Scratch) -> None:
    """A copy that broke off anywhere, one that drift ended, and one that is complete."""
    (line,) = re.findall(r"^tartapefs play .* \| ssh .*$", README.read_text(), re.MULTILINE)
    reference = Reference(scratch.folder / "work" / "data")
    archive = reference.read(0, reference.size)
    changed, saved = scratch.folder / "work" / "data" / "photos" / "2.bin", scratch.folder / "saved"
    copy = scratch.folder / "host" / "backup" / "archive.tar"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(archive[:1_000_001])
    shutil.copy2(changed, saved)
    scratch.run_line("tartapefs record ./data")
    changed.write_bytes(bytes(700_000))
    scratch.run_line(f"set -o pipefail; {line} # exits with 1")
    assert archive.startswith(copy.read_bytes())
    shutil.copy2(saved, changed)
    line = line.replace("play ./data", "play ./data --source-check mtime")
    for _ in range(2):
        scratch.run_line(line)
        assert copy.read_bytes() == archive


@pytest.mark.long
def test_everything_on_the_page_on_copies_works(scratch: Scratch) -> None:
    scratch.run_all((README.parent / "docs" / "copies.md").read_text())
    assert scratch.run >= 15


def test_everything_on_the_page_on_what_the_archive_holds_works(scratch: Scratch) -> None:
    text = (README.parent / "docs" / "what-it-holds.md").read_text()
    text = re.sub(r"^```console.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    scratch.run_all(text.replace("tartapefs record ", "tartapefs record --force "))  # each as if it was the first
    assert scratch.run == 2


@pytest.mark.long
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

```console
$ echo 1; echo 2 >&2
1
…
$ true
```

```text
exit 1
```
"""


def test_a_sample_is_run_whole(scratch: Scratch) -> None:
    """What the document does to its places happens to the scratch folder's."""
    scratch.run_all(SAMPLE)
    assert scratch.run == 10
    copied = (scratch.folder / "host" / "backup" / "archive.tar").read_bytes()
    assert copied == (scratch.folder / "remote" / "backup" / "archive.tar").read_bytes()
    assert make_commands(SAMPLE) == {"make demo", "make test"}


@pytest.mark.long(but=1)
@pytest.mark.parametrize("line", ["false", "true # exits with 1", "tartapefs info ./nowhere", "exit 2 # exits with 3"])
def test_a_command_that_ends_otherwise_than_printed_fails(scratch: Scratch, line: str) -> None:
    with pytest.raises(AssertionError):
        scratch.run_all(f"```sh\n{line}\n```\n")


@pytest.mark.parametrize("printed", ["1\n", "1\n3\n", "1\n2\n3\n"])
def test_a_command_that_prints_something_else_than_printed_fails(scratch: Scratch, printed: str) -> None:
    with pytest.raises(AssertionError):
        scratch.run_all(f"```console\n$ echo 1; echo 2\n{printed}```\n")


def test_an_example_that_fails_fails(scratch: Scratch) -> None:
    with pytest.raises(ZeroDivisionError):
        scratch.run_all("```python\n1 / 0\n```\n")
