"""The program of `mount --on-drift-run`, without a mount."""

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.programs import wait_until

from tartapefs.mount.hook import Hook


@pytest.fixture
def player() -> Any:
    """A player that has no drift yet, of a source in /srv/data."""
    return SimpleNamespace(drift=None, drifted=threading.Event(), source=SimpleNamespace(root="/srv/data"))


def meet_drift(player: Any) -> None:
    player.drift = "data/a: size changed"
    player.drifted.set()


def ended() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name == "hook"]


def test_the_program_learns_what_drifted_and_who_reads(
    player: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown reader, 0, is left out: kill(2) takes 0 for the whole process group. Nothing runs before the drift."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@of-the-daemon-alone")
    out = tmp_path / "out"
    command = f"(env | grep -E '^(TARTAPEFS_[DMSR]|NOTIFY)' | sort; pwd) > {out}.new; mv {out}.new {out}"
    hook = Hook(command, player, "/mnt/tape", lambda: {30, 0, 4})
    hook.await_begin(0)  # no drift: does not wait
    assert not out.exists()
    meet_drift(player)
    hook.await_begin(60)
    wait_until(out.exists)
    assert out.read_text().splitlines() == [
        "TARTAPEFS_DRIFT=data/a: size changed",
        "TARTAPEFS_MOUNTPOINT=/mnt/tape",
        "TARTAPEFS_READERS=4 30",
        "TARTAPEFS_SOURCE=/srv/data",
        "/",
    ]
    wait_until(ended)


@pytest.mark.parametrize(
    ("command", "logged"),
    [
        ("exit 3", "exit 3: failed with exit code 3"),
        ("echo first; echo last >&2; exit 1", "failed with exit code 1: last"),
        ("printf '\\033[1m\\n'; exit 1", r"failed with exit code 1: \x1b[1m"),
        ("head -c 9000 /dev/zero | tr '\\0' x; echo; echo end; exit 1", "failed with exit code 1: end"),
        ("kill -9 $$", "was ended by signal 9"),
        ("no-such-program-at-all", "failed with exit code 127: "),
    ],
)
def test_a_program_that_fails_is_logged_with_its_last_line(
    player: Any, caplog: pytest.LogCaptureFixture, command: str, logged: str
) -> None:
    Hook(command, player, "/mnt/tape", set)
    meet_drift(player)
    wait_until(ended)
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert logged in error.getMessage()
    assert len(error.getMessage()) < 5000 and "\n" not in error.getMessage()


def test_one_that_succeeds_is_no_error(player: Any, caplog: pytest.LogCaptureFixture) -> None:
    Hook("echo done", player, "/mnt/tape", set)
    meet_drift(player)
    wait_until(ended)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
