"""A folder that grows while its archive is sent, night after night: each night costs what was added.

`TARTAPEFS_NIGHTS=30` makes 30 nights; with `-s` it prints the table of docs/growing.md.
"""

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
from support.generations import Generations
from support.nights import NIGHTS, add, read_for
from support.programs import done, run, wait_until
from support.sshd import SSHD, sshd

FOOTER = 1024
FIRST = 20_000_000  # bytes

pytestmark = [pytest.mark.timeout(1800), pytest.mark.fuse, pytest.mark.needs("rsync", "ssh", "tar", SSHD)]


def sent(statistics: str) -> int:
    (found,) = re.findall(r"^Total bytes sent: ([\d,]+)", statistics, re.MULTILINE)
    return int(found.replace(",", ""))


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
