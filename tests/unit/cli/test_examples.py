"""The examples in the help of commands, run as they are printed, in a scratch folder that has what they speak of."""

import shutil

import pytest
from support.programs import done, run
from support.readme import Scratch
from support.readme import scratch as scratch
from support.s3 import environment, s3_server

from tartapefs.cli import COMMANDS
from tartapefs.cli.examples import examples


def lines(command: str) -> list[str]:
    return [line.strip() for line in examples(command).replace(" \\\n    ", " ").splitlines()[2:]]


def test_every_command_has_examples_of_its_own() -> None:
    for command in COMMANDS:
        assert lines(command) and all(f"tartapefs {command} " in f"{line} " for line in lines(command))
        assert max(map(len, examples(command).splitlines())) <= 58, "help indents them by two"
    assert examples("digest")[2:].replace("\n", "\n  ") in done(run("help", "digest"))


@pytest.mark.long
@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.needs("jq", "tar")
def test_they_work(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `mount` each on a folder that is not mounted; `status --watch` never ends, and has a test of its own."""
    home = scratch.folder / "home"
    (home / ".local/share/bash-completion/completions").mkdir(parents=True)
    scratch.environment["HOME"] = str(home)
    for place in ("mnt/tape", "host/backup", "units", "work/restored"):
        (scratch.folder / place).mkdir(parents=True)
    data = scratch.folder / "work" / "data"
    for command in COMMANDS:
        if command == "unmount":
            continue
        for line in lines(command):
            line = line.replace("/etc/systemd/system", str(scratch.folder / "units"))
            match command:
                case "upload":
                    with s3_server() as s3:
                        scratch.environment |= {k: v for k, v in environment(s3).items() if k.startswith("AWS_")}
                        scratch.run_line(line.replace("sftp://host", f"file://{scratch.folder}/host"))
                    continue
                case "mount":
                    scratch.run_line(line)
                    scratch.run_line(lines("unmount")[0])
                    continue
                case "verify-extracted":
                    scratch.run_line("rm -r restored && mkdir restored && tar -xf backup.tar -C restored")
                case "diff":
                    shutil.copy(data / ".tartape" / "index.db", "before.db")
                    (data / "new").touch()
                    scratch.run_line("tartapefs record ./data --append")
                    line += " # exits with 1"
            if "--watch" not in line and line != "tartapefs status /mnt/tape":
                scratch.run_line(line)
    assert list((scratch.folder / "units").iterdir()) and scratch.run > len(COMMANDS)
