"""A folder that grows while its archive is sent, night after night: each night costs what was added.

`TARTAPEFS_NIGHTS=30` makes 30 nights; with `-s` it prints the tables of docs/growing.md.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.generations import Generations
from support.nights import NIGHTS, add, read_for
from support.programs import done, quiet, run, wait_until
from support.s3 import S3, environment
from support.s3 import s3 as s3
from support.sshd import SSHD, sshd
from support.uploads import PART

FOOTER = 1024
FIRST = 20_000_000  # bytes

pytestmark = pytest.mark.timeout(1800)


def sent(statistics: str) -> int:
    (found,) = re.findall(r"^Total bytes sent: ([\d,]+)", statistics, re.MULTILINE)
    return int(found.replace(",", ""))


@pytest.mark.fuse
@pytest.mark.needs("rsync", "ssh", "tar", SSHD)
def test_nights(tmp_path: Path) -> None:
    chance = random.Random(os.environ.get("TARTAPEFS_SEED", "nights"))
    root, far, mountpoint = tmp_path / "data", tmp_path / "far.tar", tmp_path / "mnt"
    (root / "photos").mkdir(parents=True)
    mountpoint.mkdir()
    (root / "photos" / "first.jpg").write_bytes(chance.randbytes(FIRST))
    expected, before = Generations(root), FOOTER
    with sshd(tmp_path) as host:
        for night in range(1, int(NIGHTS or 5) + 1):
            add(root, chance, night, "evening")
            done(run("record", root, *(["--append"] if night > 1 else [])))
            archive = expected.append()
            added = len(archive) - before
            if far.exists():
                hint = json.loads(done(run("resume-hint", root, "--have", str(far.stat().st_size), "--json")))
                assert hint["have"] == before - FOOTER
                subprocess.run([*host.ssh.split(), "host", f"truncate -s {hint['have']} {far}"], check=True)
            done(run("mount", root, mountpoint, "--allow-additions", "--on-drift", "hold"))
            begun = read_for(mountpoint)
            command = ["rsync", "-e", host.ssh, "--append", "--stats", f"--bwlimit={max(500, added // 1000)}"]
            with subprocess.Popen(
                [*command, mountpoint / "archive.tar", f"host:{far}"], stdout=subprocess.PIPE, text=True
            ) as rsync:
                wait_until(lambda: far.exists() and far.stat().st_size > before)  # noqa: B023
                add(root, chance, night, "during")
                assert rsync.poll() is None, "it was sent before the folder grew"
                statistics, _ = rsync.communicate(timeout=120)
            read = read_for(mountpoint) - begun
            done(run("unmount", mountpoint))
            assert rsync.returncode == 0
            digest = done(run("digest", root, "--allow-additions", "--state", tmp_path / "state", "--name", far))
            subprocess.run(
                [*host.ssh.split(), "host", "sha256sum --check --quiet"], input=digest, text=True, check=True
            )
            assert far.read_bytes() == archive
            assert sent(statistics) < 1.01 * added + 10_000
            assert read < 1.5 * added + 3_000_000
            print(f"| {night} | {added:,} | {sent(statistics):,} | {read:,} | {len(archive):,} |")
            before = len(archive)
            add(root, chance, night, "after")
    done(run("record", root, "--append"))
    done(run("resume", root, far))
    assert far.read_bytes() == expected.append()
    (tmp_path / "extracted").mkdir()
    subprocess.run(["tar", "-xpf", far, "-C", tmp_path / "extracted", "--delay-directory-restore"], check=True)
    compared = subprocess.run(
        ["rsync", "-rlptni", "--delete", "--checksum", "--exclude=/.tartape", f"{root}/", tmp_path / "extracted/data"],
        capture_output=True,
        text=True,
    )
    assert (compared.returncode, compared.stdout) == (0, "")


COUNTING = """
import atexit, pathlib, sys

counted = sys.argv.pop()
atexit.register(lambda: pathlib.Path(counted).write_text(pathlib.Path("/proc/self/io").read_text().split()[1]))
from tartapefs.__main__ import main

main()
"""


def test_nights_to_s3(tmp_path: Path, s3: S3) -> None:
    """Read: what the process read, less what it reads to send nothing."""
    chance = random.Random(os.environ.get("TARTAPEFS_SEED", "nights"))
    root = tmp_path / "data"
    (root / "photos").mkdir(parents=True)
    (root / "photos" / "first.jpg").write_bytes(chance.randbytes(FIRST))
    expected, before = Generations(root), FOOTER

    def upload() -> tuple[int, int, int]:
        """The exit code, the bytes that S3 got, and those that were read."""
        arguments = ["upload", root, "s3://tapes/a.tar", "--part-size", str(PART), "--allow-additions"]
        s3.forget()
        names = environment(s3) | {"AWS_MAX_ATTEMPTS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", COUNTING, *arguments, tmp_path / "read"], env=names, capture_output=True, text=True
        )
        quiet(result)
        return result.returncode, s3.received_bytes, int((tmp_path / "read").read_text())

    for night in range(1, int(os.environ.get("TARTAPEFS_NIGHTS", "3")) + 1):
        add(root, chance, night, "evening")
        done(run("record", root, *(["--append"] if night > 1 else [])))
        archive = expected.append()
        added = len(archive) - before
        during = iter([night])
        s3.on_part = lambda number: [add(root, chance, each, "during") for each in during] and None  # noqa: B023
        code, sent_bytes, read = upload()
        assert code == 0 and next(during, None) is None
        assert s3.object("a.tar") == archive
        code, nothing, unread = upload()
        assert (code, nothing) == (0, 0)
        read -= unread
        print(f"| {night} | {added:,} | {sent_bytes:,} | {read:,} | {len(archive):,} |")
        assert sent_bytes < added + PART + 20_000
        assert read < added + 3 * PART  # a part that fails on the way is read once more
        before = len(archive)
        add(root, chance, night, "after")
