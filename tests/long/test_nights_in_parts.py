"""A folder that grows while rclone sends its archive in parts: each night costs what was added, and one part at most.

`TARTAPEFS_NIGHTS=30` makes 30 nights; with `-s` it prints the table of docs/parts.md.
"""

import os
import random
import subprocess
from pathlib import Path

import pytest
from support.generations import Generations
from support.nights import NIGHTS, add, read_for
from support.programs import done, run, wait_until
from support.sending import copy_by_rclone, cut

PART = 1_000_000  # bytes: a multiple of nothing
FIRST = 20_000_000  # bytes

pytestmark = [pytest.mark.timeout(1800), pytest.mark.fuse, pytest.mark.needs("rclone", "tar")]


def test_nights_in_parts(tmp_path: Path) -> None:
    chance = random.Random(os.environ.get("TARTAPEFS_SEED", "nights"))
    root, far, mountpoint = tmp_path / "data", tmp_path / "far", tmp_path / "mnt"
    (root / "photos").mkdir(parents=True)
    far.mkdir()
    mountpoint.mkdir()
    (root / "photos" / "first.jpg").write_bytes(chance.randbytes(FIRST))
    expected, before = Generations(root), 1024
    for night in range(1, int(NIGHTS or 3) + 1):
        add(root, chance, night, "evening")
        done(run("record", root, *(["--append"] if night > 1 else [])))
        archive = expected.append()
        parts, added = cut(archive, PART), len(archive) - before
        done(run("mount", root, mountpoint, "--allow-additions", "--part-size", str(PART)))
        begun = read_for(mountpoint)
        names: list[str] = []
        if night % 3 == 0:  # the first try breaks off
            with subprocess.Popen(
                ["rclone", "copy", "--config=/dev/null", "--transfers=1", "--bwlimit=1M", mountpoint, far]
            ) as broken:
                already = set(os.listdir(far))
                wait_until(lambda: set(os.listdir(far)) - already)  # noqa: B023
                broken.terminate()
        add(root, chance, night, "during")
        names, sent = copy_by_rclone(mountpoint, far)
        read = read_for(mountpoint) - begun
        done(run("unmount", mountpoint))
        assert {path.name: path.read_bytes() for path in far.iterdir()} == parts
        assert set(names) <= set(sorted(parts)[(before - 1024) // PART :])
        assert sent <= added + PART
        assert read < 1.5 * (added + PART) + 3_000_000
        print(f"| {night} | {added:,} | {sent:,} | {read:,} | {len(parts)} |")
        before = len(archive)
        add(root, chance, night, "after")
    (tmp_path / "extracted").mkdir()
    joined = f'cat "{far}"/archive.tar.* | tar -xp --delay-directory-restore -C "{tmp_path}/extracted"'
    subprocess.run(["bash", "-o", "pipefail", "-c", joined], check=True)
    for path in (tmp_path / "extracted").rglob("*.jpg"):
        assert path.read_bytes() == (tmp_path / path.relative_to(tmp_path / "extracted")).read_bytes()
    assert len(list((tmp_path / "extracted").rglob("*.jpg"))) == sum(len(names) for names in expected.names) - sum(
        name.endswith(b"/") for names in expected.names for name in names
    )
