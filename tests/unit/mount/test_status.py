"""The document that tells of a mount, and the server that sends it, without a mount."""

import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.daemon import sockets
from support.users import as_nobody

from tartapefs.api.files import Files
from tartapefs.mount import status as module
from tartapefs.mount.read_statistics import Coverage, ReadStatistics
from tartapefs.mount.status import Server, ask, document

USER = 1_000_000 + os.getpid()  # a user of this process alone: others have a folder in /tmp too


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], str]]:
    """`served(answer)` serves it; the name of the device."""
    with ExitStack() as stack:

        def serve(answer: object) -> str:
            device = f"{os.getpid()}:{time.monotonic_ns()}"
            stack.callback(Server(device, lambda: answer).close)
            return device

        yield serve


def place_of(device: str) -> Path:
    (found,) = [path for path in sockets() if path.name == device.replace(":", "-")]
    return found


def test_a_slow_client_is_given_up(served: Callable[[object], str]) -> None:
    """A client that does not take its answer, which no buffer holds: the server hangs up on it, and serves the next."""
    device = served({"format": 1, "text": "x" * 5_000_000})
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(place_of(device)))
        assert slow.recv(1)
        found = ask(device)
        assert found is not None
        assert len(found["text"]) == 5_000_000
        left = 0
        while data := slow.recv(1 << 20):
            left += len(data)
        assert left < 5_000_000


@pytest.mark.root
def test_another_user_is_hung_up_on(served: Callable[[object], str]) -> None:
    """Even where the modes of folder and socket let it in."""
    place = place_of(served({"format": 1}))
    place.chmod(0o666)
    place.parent.chmod(0o711)
    try:
        child = os.fork()
        if child == 0:
            try:
                os.setresuid(USER, USER, USER)
                client = socket.socket(socket.AF_UNIX)
                client.connect(str(place))
                os._exit(0 if client.recv(10) == b"" else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        place.parent.chmod(0o700)


@pytest.mark.parametrize("answer", [[], {}, {"format": 2}, {"format": "1"}])
def test_an_answer_of_another_version_is_refused(served: Callable[[object], str], answer: object) -> None:
    with pytest.raises(ValueError, match="version"):
        ask(served(answer))


def test_a_report_that_fails_does_not_end_the_server(caplog: pytest.LogCaptureFixture) -> None:
    fails = True

    def answer() -> dict[str, Any]:  # other tests' `tartapefs status` may ask for it, too
        if fails:
            raise ZeroDivisionError
        return {"format": 1}

    server = Server("1:1000001", answer)
    try:
        with pytest.raises(ValueError):
            ask("1:1000001")
        fails = False
        assert ask("1:1000001") == {"format": 1}
        assert "a defect in tartapefs" in caplog.text
    finally:
        server.close()
    assert ask("1:1000001") is None


def test_a_server_leaves_the_socket_of_its_successor() -> None:
    """The number of a device is used again once it is unmounted."""
    first = Server("1:1000002", lambda: {"format": 1, "which": 1})
    second = Server("1:1000002", lambda: {"format": 1, "which": 2})
    first.close()
    assert ask("1:1000002") == {"format": 1, "which": 2}
    second.close()


@pytest.fixture
def runtime(public: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The $XDG_RUNTIME_DIR of nobody."""
    os.chown(public, USER, USER)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(public))
    fallback = Path(f"/tmp/tartapefs-{USER}")
    shutil.rmtree(fallback, ignore_errors=True)
    yield public
    shutil.rmtree(fallback, ignore_errors=True)


def serves_in(folder: Path) -> None:
    server = Server("1:5", lambda: {"format": 1})
    assert [path.name for path in folder.iterdir()] == ["1-5"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert ask("1:5") == {"format": 1}
    server.close()
    assert not list(folder.iterdir())


@pytest.mark.root
def test_a_user_has_it_in_the_runtime_folder(runtime: Path) -> None:
    as_nobody(lambda: serves_in(runtime / "tartapefs"), USER)


@pytest.mark.root
def test_a_path_longer_than_sockets_allow(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = runtime / ("d" * 200)
    deep.mkdir()
    os.chown(deep, USER, USER)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    as_nobody(lambda: serves_in(deep / "tartapefs"), USER)


@pytest.mark.root
@pytest.mark.parametrize("spoilt", ["nothing set", "absent", "somebody else's", "open to others", "a link"])
def test_where_that_is_not_safe_it_is_in_a_folder_of_its_own(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    taken = runtime / "tartapefs"
    match spoilt:
        case "nothing set":
            monkeypatch.delenv("XDG_RUNTIME_DIR")
        case "absent":
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / "absent"))
        case "somebody else's":
            taken.mkdir(0o777)
        case "open to others":
            taken.mkdir()
            os.chown(taken, USER, USER)
            taken.chmod(0o770)
        case "a link":
            (runtime / "own").mkdir()
            os.chown(runtime / "own", USER, USER)
            taken.symlink_to("own")
    as_nobody(lambda: serves_in(Path(f"/tmp/tartapefs-{USER}")), USER)


@pytest.mark.root
def test_no_safe_folder_at_all_is_an_error_and_no_more(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who made it first in /tmp gets nothing; a mount goes on without a socket."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    taken = Path(f"/tmp/tartapefs-{USER}")
    taken.mkdir(0o777)
    taken.chmod(0o777)

    def refused() -> None:
        with pytest.raises(OSError):
            Server("1:5", dict)
        assert ask("1:5") is None

    as_nobody(refused, USER)
    assert not list(taken.iterdir())


def test_a_document_is_never_large() -> None:
    """Whatever was read, by however many: what a client has to take in a second."""
    activity = ReadStatistics()
    handles = [activity.opened(1) for _ in range(5000)]
    for at in range(50_000):
        activity.delivered(handles[at % 5000], at * 20_000_000_000, 10)
    player: Any = SimpleNamespace(
        drift=None,
        scrubbed=(0, 0),
        inspector=SimpleNamespace(additions=SimpleNamespace(count=0)),
        source=SimpleNamespace(root="/data"),
        tape=SimpleNamespace(
            total_size=1 << 60,
            fingerprint="0" * 64,
            seal="",
            member_count=1,
            recorded_ns=0,
            member_at=lambda offset: None,
            generations=[SimpleNamespace(start=0, recorded_ns=0)],
        ),
    )
    found = document(player, Files(player.tape, "archive.tar", None), activity)
    assert len(found["readers"]) == 1000
    assert len(found["coverage"]["ranges"]) <= 4096
    assert len(json.dumps(found)) < 1 << 20


def test_coverage_is_not_changed_by_who_asked() -> None:
    activity = ReadStatistics()
    activity.delivered(1, 0, 10)
    _, before, _ = activity.snapshot()
    activity.delivered(1, 50, 10)
    _, after, _ = activity.snapshot()
    assert isinstance(before, Coverage)
    assert (before.ranges, after.ranges) == ([(0, 10)], [(0, 10), (50, 60)])
    assert module.FORMAT == 1
