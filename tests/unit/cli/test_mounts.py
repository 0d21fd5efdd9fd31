"""The commands mount and unmount, as far as they need no mount: options, refusals, and the hint about held reads."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from support.programs import refused, run, under_strace

from tartapefs.base.errors import MountError
from tartapefs.cli import mounts
from tartapefs.mount import mount_table
from tartapefs.mount.mount_table import MountEntry


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("4294967294", 4294967294), ("root", 0), ("007", 7)])
def test_a_user_is_a_number_or_a_name(text: str, number: int) -> None:
    assert mounts._id_of({"root": 0}.__getitem__)(text) == number


@pytest.mark.parametrize("text", ["", "-1", "4294967295", "99999999999", "no-such-user", "٣"])
def test_what_is_no_user(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not known on this machine"):
        mounts._id_of({"root": 0}.__getitem__)(text)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--cached", "--on-drift", "hold"], "--cached"),
        (["--scrub-share", "5"], "tartapefs seal"),
        (["--audit-share", "0"], "--audit-share"),
        (["--audit-interval", "nan"], "--audit-interval"),
        (["--mode", "0888"], "--mode"),
        (["--name", "a/b"], "--name"),
        (["--part-size", "1M", "--shard-size", "1M"], "--shard-size"),
        (["--shard-size", "0"], "--shard-size"),
        (["--name", "{nonsense}"], "--name"),
        (["--on-drift", "wait"], "--on-drift"),
        (["--log", ""], "--log"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_are_refused(data: Path, tmp_path: Path, options: list[str], named: str) -> None:
    """Before anything is mounted."""
    (tmp_path / "mnt").mkdir()
    result = run("mount", data, tmp_path / "mnt", *options)
    refused(result, 2)
    assert named in result.stderr


def test_what_was_not_recorded_is_not_mounted(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    result = run("mount", small, tmp_path / "mnt")
    refused(result, 3)
    assert f'run "tartapefs record {small}" first' in result.stderr


@pytest.mark.parametrize("place", ["none", "full", "file"])
def test_what_is_no_mount_point(data: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "full" / "something").mkdir(parents=True)
    (tmp_path / "file").touch()
    refused(run("mount", data, tmp_path / place), 5)
    refused(run("unmount", tmp_path / place), 5)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("command", ["unmount", "status"])
def test_one_look_at_the_mount_table(tmp_path: Path, command: str) -> None:
    log = tmp_path / "log"
    traced = [*under_strace("-e", "trace=openat", log=log), command, tmp_path]
    assert subprocess.run(traced, capture_output=True, timeout=60).returncode == 5
    assert log.read_text().count('"/proc/self/mountinfo"') == 1


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An archive that is mounted and busy; `held` is what its daemon says of reads."""
    entry = MountEntry("0:57", "/mnt/tape", "/srv/data", 0)
    state = SimpleNamespace(held=None, readers=None, lazily=[])

    def fail(found: MountEntry, lazy: bool) -> None:
        assert found is entry
        state.lazily.append(lazy)
        raise MountError("/mnt/tape", "target is busy.")

    monkeypatch.setattr(mount_table, "entry_of", lambda mountpoint: entry)
    monkeypatch.setattr(mount_table, "unmount", fail)
    monkeypatch.setattr(mount_table, "status", lambda found: vars(state))
    return state


def error_of(*arguments: str) -> str:
    error: Any = CliRunner().invoke(mounts.unmount, arguments).exception
    assert isinstance(error, MountError)
    return str(error)


@pytest.mark.parametrize("held", [None, [], 3])
def test_a_busy_archive_is_reported_as_it_is(busy: SimpleNamespace, held: object) -> None:
    """3: all that the extended attributes tell is how many reads are held."""
    busy.held = busy.readers = held
    assert error_of("/mnt/tape") == "/mnt/tape: target is busy."
    assert error_of("/mnt/tape", "--lazy") == "/mnt/tape: target is busy."
    assert busy.lazily == [False, True]


def test_readers_are_named(busy: SimpleNamespace) -> None:
    busy.readers = [{"pid": 7, "command": "rsync"}]
    message = error_of("/mnt/tape")
    assert message.startswith("/mnt/tape: target is busy. It is read by rsync (7);") and "--lazy" in message


def test_held_readers_are_named_with_the_remedy(busy: SimpleNamespace) -> None:
    busy.held = [{"pid": 7, "command": "cp"}, {"pid": 0, "command": None}]
    message = error_of("/mnt/tape")
    assert message.startswith("/mnt/tape: target is busy. ")
    assert "cp (7), ? (0)" in message and "--lazy" in message
