"""The command systemd-unit: where units are printed or written. Their text is that of mount.units."""

import os
from pathlib import Path

import pytest
from support.programs import done, refused, run


def test_a_service_is_printed_with_its_place(tmp_path: Path) -> None:
    head, *lines = done(run("systemd-unit", tmp_path, "/mnt/my tape")).splitlines()
    assert head == r"# /etc/systemd/system/tartapefs-mnt-my\x20tape.service"
    (command,) = [line for line in lines if line.startswith("ExecStart=")]
    assert command.endswith(f' mount --foreground -- {tmp_path} "/mnt/my tape"')


def test_the_service_of_a_user(tmp_path: Path) -> None:
    head, *_ = done(run("systemd-unit", tmp_path, "/mnt/tape", "--user", "--options", "direct,name=x.tar")).splitlines()
    assert head == "# ~/.config/systemd/user/tartapefs-mnt-tape.service"
    assert "--direct --name=x.tar --" in done(
        run("systemd-unit", tmp_path, "/mnt/tape", "--options", "direct,name=x.tar")
    )


def test_an_automount_is_a_pair(tmp_path: Path) -> None:
    printed = done(run("systemd-unit", tmp_path, "/mnt/tape", "--automount"))
    heads = [line for line in printed.splitlines() if line.startswith("# /")]
    assert heads == ["# /etc/systemd/system/mnt-tape.mount", "# /etc/systemd/system/mnt-tape.automount"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--user", "--automount"], "--automount"),
        (["--options", "colour=red"], "colour"),
        (["--options", "record"], "record"),
        (["-o", "ro"], "--options"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: list[str], named: str) -> None:
    result = run("systemd-unit", tmp_path, "/mnt/tape", *options)
    refused(result, 2)
    assert named in result.stderr


def test_units_are_written_all_or_none_and_replaced_by_force_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "units"
    source.mkdir()
    out.mkdir()
    (out / "mnt-tape.automount").write_text("mine")
    command = ["systemd-unit", source, "/mnt/tape", "--automount", "--output", out]
    result = run(*command)
    assert result.returncode in (1, 2) and "--force" in result.stderr, result.stderr
    assert os.listdir(out) == ["mnt-tape.automount"]
    assert (out / "mnt-tape.automount").read_text() == "mine"
    result = run(*command, "--force")
    assert done(result) == ""
    assert sorted(os.listdir(out)) == ["mnt-tape.automount", "mnt-tape.mount"]
    assert "Where=/mnt/tape" in (out / "mnt-tape.automount").read_text()
    assert len(result.stderr.splitlines()) == 2


def test_no_unit_is_written_into_the_source(small: Path) -> None:
    result = run("systemd-unit", small, "/mnt/tape", "--output", small)
    refused(result, 2)
    assert os.listdir(small) == ["file"]
