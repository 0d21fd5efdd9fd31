"""What runs in the daemon's background, with a player and an event that the test leads."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tartapefs.base.errors import TapeFormatError
from tartapefs.mount import background, sd_notify
from tartapefs.mount.read_statistics import ReadStatistics


class Clock:
    """An event for which nobody waits: it is set once these pauses have been asked for."""

    def __init__(self, pauses: int) -> None:
        self.left, self.pauses = pauses, list[float]()

    def is_set(self) -> bool:
        return len(self.pauses) >= self.left

    def wait(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        return self.is_set()


class Player:
    """Fails at the audits and scrubs of these numbers, and has drift from one of them on."""

    def __init__(self, drifts_at: int = 1000, fails_at: tuple[int, ...] = ()) -> None:
        self.drift: object = None
        self.looks: list[float] = []
        self._drifts_at, self._fails_at = drifts_at, fails_at
        self.tape = SimpleNamespace(total_size=1000)

    def audit(self, share: float, pause: Any) -> None:
        self.looks.append(share)
        if len(self.looks) >= self._drifts_at:
            self.drift = "data/a: size changed"
        if len(self.looks) in self._fails_at:
            raise TapeFormatError("index.db", "is damaged")

    scrub = audit


class Archive:
    """What is open at each look in turn, and the errors that it was told."""

    def __init__(self, *is_open: bool) -> None:
        self._is_open, self.errors = list(is_open), list[BaseException]()
        self.hold: Any = None
        self.statistics = ReadStatistics()

    @property
    def is_open(self) -> bool:
        return self._is_open.pop(0) if self._is_open else True

    def errno_of(self, error: BaseException) -> int:
        self.errors.append(error)
        return 5


OPTIONS: Any = SimpleNamespace(audit_share=0.05, audit_interval=60.0)


def audit(player: Any, archive: Any, ended: Any) -> threading.Event:
    audited = threading.Event()
    background.audit(player, archive, OPTIONS, ended, audited)
    return audited


def test_audits_go_on_at_intervals_until_the_end() -> None:
    player, ended = Player(), Clock(3)
    assert audit(player, Archive(), ended).is_set()
    assert player.looks == [0.05] * 3
    assert ended.pauses == [60.0] * 3


def test_audits_rest_while_nobody_has_the_archive_open() -> None:
    player, ended = Player(), Clock(5)
    audit(player, Archive(False, False, True), ended)
    assert (len(player.looks), len(ended.pauses)) == (3, 5)


def test_audits_end_at_the_first_drift() -> None:
    player, ended = Player(drifts_at=2), Clock(10)
    audit(player, Archive(), ended)
    assert (len(player.looks), len(ended.pauses)) == (2, 2)


def test_an_audit_that_fails_is_logged_and_done_again() -> None:
    player, archive, ended = Player(fails_at=(1,)), Archive(), Clock(3)
    assert audit(player, archive, ended).is_set()
    assert [str(error) for error in archive.errors] == [str(TapeFormatError("index.db", "is damaged"))]
    assert len(player.looks) == 3


def test_the_first_audit_does_not_pause_while_the_caller_waits_for_it() -> None:
    """Its share is kept only once the caller waits no longer."""
    asked = []

    class FirstAudit(Player):
        def audit(self, share: float, pause: Any) -> None:
            asked.append(pause(7.0))
            audited.set()
            asked.append(pause(7.0))
            self.drift = "data/a"

    audited, ended = threading.Event(), Clock(2)
    player: Any = FirstAudit()
    archive: Any = Archive()
    background.audit(player, archive, OPTIONS, ended, audited)  # type: ignore[arg-type]
    assert asked == [False, False]
    assert ended.pauses == [7.0, 60.0]


def test_a_scrub_pauses_after_each_pass_and_ends_at_drift() -> None:
    player: Any = Player(drifts_at=3, fails_at=(2,))
    archive: Any = Archive()
    ended: Any = Clock(10)
    background.scrub(player, archive, 0.2, ended)
    assert player.looks == [0.2] * 3
    assert ended.pauses == [60.0] * 3
    assert len(archive.errors) == 1


def test_pages_are_dropped_once_there_is_drift() -> None:
    drifted, dropped = threading.Event(), threading.Event()
    player: Any = SimpleNamespace(drifted=drifted)
    session: Any = SimpleNamespace(drop_pages=lambda ended: dropped.set())
    thread = threading.Thread(target=background.drop_pages, args=(player, session, threading.Event()))
    thread.start()
    assert not dropped.wait(0.05)
    drifted.set()
    thread.join(30)
    assert dropped.is_set()


def test_the_state_in_a_line() -> None:
    player: Any = Player()
    archive: Any = Archive()
    assert background.state_line(player, archive) == "valid; delivered 0 bytes, 0% of the archive"
    archive.statistics.delivered(1, 0, 999)
    archive.statistics.delivered(1, 0, 999)
    assert background.state_line(player, archive) == "valid; delivered 1,998 bytes, 99% of the archive"
    player.drift = "data/a: size changed"
    assert background.state_line(player, archive) == "invalid: data/a: size changed"
    archive.hold = SimpleNamespace(reads=lambda: [1, 2])
    assert background.state_line(player, archive) == "invalid: data/a: size changed; 2 held by that"


def test_the_service_manager_is_told_of_each_change_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sd_notify, "send", said.append)
    states = ["valid", "valid", "invalid", "invalid"]
    monkeypatch.setattr(background, "state_line", lambda player, archive: states.pop(0))
    player: Any = Player()
    archive: Any = Archive()
    ended: Any = Clock(4)
    background.report_state(player, archive, ended)
    assert said == ["STATUS=valid", "STATUS=invalid"]


def test_the_watchdog_is_fed_while_requests_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sd_notify, "send", said.append)
    failures = ["", "Transport endpoint is not connected", ""]
    monkeypatch.setattr(background, "failure_of", lambda path: failures.pop(0))
    monkeypatch.setattr(sd_notify, "watchdog", lambda: 120.0)
    ended: Any = Clock(4)
    background.feed_watchdog("/mnt/tape", ended)
    assert said == ["WATCHDOG=1"] * 2
    assert ended.pauses == [60.0] * 4
    monkeypatch.setattr(sd_notify, "watchdog", lambda: None)
    never: Any = Clock(0)
    background.feed_watchdog("/mnt/tape", never)
    assert never.pauses == []


def test_why_a_file_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert background.failure_of(str(tmp_path)) == ""
    assert background.failure_of(str(tmp_path / "none: x")) == "No such file or directory"
    assert background.failure_of("-rf") == "No such file or directory"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert background.failure_of(str(tmp_path)) == "the program stat is not installed"


class Footers(threading.Event):
    """Of a session, in whose page cache there is a footer again each time that one was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.set()
        self.footer_cached, self.dropped = self, 0

    def drop_footer(self, ended: Any) -> None:
        self.dropped += 1
        self.set()


def test_footers_are_dropped_as_soon_as_an_audit_is_old() -> None:
    session, ended = Footers(), Clock(3)
    background.drop_footers(session, ended)  # type: ignore[arg-type]
    assert ended.pauses == [background.FOOTER_AUDIT_AGE] * 3
    assert session.dropped == 2
