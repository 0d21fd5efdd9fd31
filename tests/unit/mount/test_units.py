"""Units of systemd as text: the examples, names, and what no unit can be."""

import os
import subprocess
from pathlib import Path

import pytest
from support.programs import run
from support.systemd_lab import ODD

from tartapefs.mount import units

PROJECT = Path(__file__).parents[3]
MNT = "/mnt/tape"


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_the_examples_are_what_the_program_prints() -> None:
    system = files(PROJECT / "systemd")
    others = [system.pop(name) for name in list(system) if name.startswith(("tartapefs-copy@", "tartapefs-metrics"))]
    assert len(others) == 4
    assert system == units.template(user=False) | units.automount("/srv/photos", MNT, "ro")
    assert files(PROJECT / "systemd" / "user") == units.template(user=True)


@pytest.mark.needs("systemd-escape")
def test_names_are_escaped_as_by_systemd_escape() -> None:
    paths = ["/", "/a", "/.a/.b", "/a-b/c_d:e.f", *(f"/mnt/{name}" for name in ODD), "/mnt/caf\udce9"]
    paths += [f"/{character}x{character}" for character in map(chr, range(1, 128)) if character not in "/."]
    result = subprocess.run(
        ["systemd-escape", "--path", "--", *map(os.fsencode, paths)], capture_output=True, check=True
    )
    assert [units.escaped(path) for path in paths] == result.stdout.decode().split()


def test_a_unit_of_a_link_is_that_of_its_target(tmp_path: Path) -> None:
    """systemd mounts at no link, and finds the disk that a source is on by the source's own path."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    result = run("systemd-unit", "--automount", "link/src", "link/mnt", cwd=tmp_path)
    assert f"What={tmp_path}/real/src\n" in result.stdout
    assert f"Where={tmp_path}/real/mnt\n" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--user", "--automount", "/srv/a", MNT], "leave out --user or --automount"),
        (["--automount", "/srv/two\nlines", MNT], r"cannot have /srv/two\nlines/; a service can"),
        (["--automount", "/srv/a", "/mnt/$$"], "leave out --automount"),
        (["--options", "ro,colour=blue", "/srv/a", MNT], "colour"),
        (["/srv/caf\udce9", MNT], r"/srv/caf\xe9 is not UTF-8"),
        (["/srv/a", "/mnt/" + "n" * 250], "at most 255 bytes"),
        (["/srv/a"], "Missing argument 'MNT'"),
    ],
)
def test_what_no_unit_can_be_is_refused(arguments: list[str], reason: str) -> None:
    result = run("systemd-unit", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
