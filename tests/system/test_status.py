"""What a mount tells of itself, on real mounts: `status`, its socket, and clients that are slow, hostile or others."""

import json
import os
import pty
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.daemon import daemon_of, force_unmount
from support.programs import TARTAPEFS, run, wait_until

from tartapefs.cli.status import bar
from tartapefs.mount import mount_table as mounting
from tartapefs.mount import status as module
from tartapefs.mount.read_statistics import Coverage, ReadStatistics
from tartapefs.mount.status import Server, ask, document

Mount = Callable[..., Path]
NOBODY = 1_000_000 + os.getpid()  # a user of this process alone: others have a folder in /tmp too
PIECE = 1 << 16


@pytest.fixture
def archive(tree: Path, mount: Mount) -> Path:
    """Of 314 KB, mounted."""
    assert run("record", tree).returncode == 0
    return mount(tree)


def report(archive: Path) -> dict[str, Any]:
    result = run("status", archive.parent, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def sockets() -> list[Path]:
    """Of mounts of this user."""
    folders = ["/run"] if os.geteuid() == 0 else [os.environ.get("XDG_RUNTIME_DIR", "/nowhere")]
    places = [Path(folder) / "tartapefs" for folder in folders] + [Path(f"/tmp/tartapefs-{os.geteuid()}")]
    return [path for place in places if place.exists() for path in place.iterdir()]


def socket_of(archive: Path) -> Path:
    number = os.stat(archive.parent).st_dev
    (found,) = [path for path in sockets() if path.name == f"{os.major(number)}-{os.minor(number)}"]
    return found


def test_a_report_is_that_of_what_was_read(archive: Path, tree: Path) -> None:
    """Who reads, how far, what; each byte that was delivered and none besides."""
    size = archive.stat().st_size
    with archive.open("rb", buffering=0) as first, archive.open("rb", buffering=0) as second:
        before = report(archive)
        assert (before["delivered"], before["coverage"]["ranges"], before["position"]) == (0, [], 0)
        for _ in range(2):
            assert len(os.pread(first.fileno(), 1000, 0)) == 1000
        assert os.pread(first.fileno(), 700, 900)
        assert os.pread(second.fileno(), 5000, size - 2000)
        wait_until(lambda: report(archive)["delivered"] == 4700)  # it is counted once it has been delivered
        found = report(archive)
    assert found["format"] == 1
    assert found["state"] == "valid"
    assert found["source"] == str(tree)
    assert found["mountpoint"] == str(archive.parent)
    assert found["pid"] == daemon_of(archive.parent)
    assert found["size"] == size
    assert found["delivered"] == 2 * 1000 + 700 + 2000
    assert found["coverage"] == {"ranges": [[0, 1600], [size - 2000, size]], "size": 3600, "unsure": 0}
    assert (found["position"], found["member"]) == (size, None)
    one, two = found["readers"]
    assert one["pid"] == two["pid"] == os.getpid()
    assert one["command"] == Path("/proc/self/comm").read_text().strip()
    assert (one["delivered"], one["position"], one["member"]) == (2700, 1600, "data/empty.txt")
    assert (two["delivered"], two["position"], two["member"]) == (2000, size, None)
    assert found["rate"] == pytest.approx(one["rate"] + two["rate"], abs=2)
    assert min(one["rate"], two["rate"]) > 0
    wait_until(lambda: not report(archive)["readers"])
    assert report(archive)["coverage"] == found["coverage"]


def test_the_member_that_a_reader_is_in(archive: Path) -> None:
    """The one whose byte comes next, as `locate` knows it."""
    found = json.loads(run("locate", archive.parent.parent / "data", "data/photos/2024/large.bin", "--json").stdout)
    with archive.open("rb", buffering=0) as opened:
        os.pread(opened.fileno(), 512, found["start"])
        wait_until(lambda: report(archive)["member"] == "data/photos/2024/large.bin")
        os.pread(opened.fileno(), 512, found["stop"] - 512)
        wait_until(lambda: report(archive)["member"] != "data/photos/2024/large.bin")


def test_a_thread_reads_in_the_name_of_its_process(archive: Path) -> None:
    """FUSE tells the number of the thread that opens it, which nobody knows."""
    program = (
        "import sys, threading\n"
        "kept = []\n"
        "t = threading.Thread(target=lambda: kept.append(open(sys.argv[1], 'rb')))\n"
        "t.start(); t.join(); print(flush=True); sys.stdin.read()\n"
    )
    command = [TARTAPEFS[0], "-c", program, archive]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout and reader.stdout.readline()
        assert [found["pid"] for found in report(archive)["readers"]] == [reader.pid]
        reader.communicate()


def test_a_report_as_text(archive: Path) -> None:
    with archive.open("rb", buffering=0) as opened:
        half = archive.stat().st_size // 2
        while half > 0:
            half -= len(opened.read(min(half, PIECE)))
        shown = dict(line.split(maxsplit=1) for line in run("status", archive.parent).stdout.splitlines())
    assert shown["state"] == "valid"
    assert shown["mountpoint"] == str(archive.parent)
    cells, share, _ = shown["coverage"].split()
    assert (cells.count("#"), cells.count("+"), cells.count(".")) == (25, 0, 25)
    assert share == "50.0"
    assert shown["ranges"] == f"0-{archive.stat().st_size // 2}"
    assert "data/photos/2024/large.bin" in shown["reader"]
    assert str(os.getpid()) in shown["reader"]


@pytest.mark.parametrize(
    ("ranges", "cells"),
    [
        ([], "..........."),
        ([[0, 1000]], "###########"),
        ([[0, 1]], "+.........."),
        ([[999, 1000]], "..........+"),
        ([[0, 90], [91, 1000]], "#+#########"),
        ([[10, 20], [30, 40], [500, 510]], "+....+....."),
        ([[50, 600]], "+#####+...."),
    ],
)
def test_the_bar(ranges: list[list[int]], cells: str) -> None:
    assert bar(ranges, 1000, cells=11) == cells


def test_one_that_is_unmounted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the list and the question: a plain folder is there, which has nothing to tell."""
    entry = mounting.MountEntry("0:999999", str(tmp_path), "/nowhere", os.geteuid())
    lists = [[entry], []]
    monkeypatch.setattr(mounting, "mounts", lambda: lists.pop(0))
    assert mounting.statuses() == []
    monkeypatch.setattr(mounting, "mounts", lambda: [entry])
    assert mounting.statuses()[0]["state"] == "unknown: it was unmounted meanwhile"


def test_all_mounts(tree: Path, archive: Path, mount: Mount) -> None:
    """Each in one line, or one object, with what it is mounted from."""
    other = mount(tree)
    other.read_bytes()
    wait_until(lambda: report(other)["delivered"] == other.stat().st_size)
    lines = run("status").stdout.splitlines()
    for mounted, share in ((archive, "0.0 %"), (other, "100.0 %")):
        (line,) = [line for line in lines if line.startswith(f"{mounted.parent}: ")]
        assert line.startswith(f"{mounted.parent}: {tree}, valid, {share} of ")
    found = {facts["mountpoint"]: facts for facts in json.loads(run("status", "--json").stdout)}
    assert found[str(other.parent)]["delivered"] == other.stat().st_size
    assert found[str(archive.parent)]["pid"] == daemon_of(archive.parent)


def test_drift_is_in_every_report_and_the_exit_code(tree: Path, archive: Path) -> None:
    (tree / "photos" / "1.bin").write_bytes(b"longer")
    with pytest.raises(OSError):
        archive.read_bytes()
    for arguments in ([archive.parent], [archive.parent, "--json"], [], ["--json"]):
        result = run("status", *arguments)
        assert result.returncode == 1
        assert "invalid: data/photos/1.bin: size changed" in result.stdout


@pytest.mark.fuse
def test_nothing_is_mounted_there(tmp_path: Path) -> None:
    result = run("status", tmp_path)
    assert result.returncode == 5
    assert "no archive of tartapefs is mounted here" in result.stderr
    assert run("status", tmp_path, "--watch", "--json").returncode in (2, 5)


def test_watch_shows_it_live_until_it_is_unmounted(archive: Path) -> None:
    """On a terminal, over itself."""
    ours, theirs = pty.openpty()
    command = [*TARTAPEFS, "status", "--watch", archive.parent]
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        watching = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
        os.close(theirs)
        said = b""
        while b"100.0 %" not in said:
            said += terminal.read(1000)
            if b"  0.0 %" in said.replace(b". 0.0 %", b"  0.0 %"):
                archive.read_bytes()
        assert run("unmount", archive.parent).returncode == 0
        try:
            while more := terminal.read(1000):
                said += more
        except OSError:
            pass  # the other end is closed
        assert watching.wait(60) == 0
    assert b"\x1b[1A" in said
    assert b"no archive of tartapefs is mounted here" in said


# The socket


def test_only_its_owner_can_reach_the_socket(archive: Path) -> None:
    place = socket_of(archive)
    assert stat.S_ISSOCK(place.stat().st_mode)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert place.stat().st_uid == os.geteuid()
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert os.listdir(archive.parent) == ["archive.tar"]


def test_the_socket_goes_with_the_mount(archive: Path) -> None:
    place = socket_of(archive)
    assert run("unmount", archive.parent).returncode == 0
    wait_until(lambda: not place.exists())


def test_what_a_killed_daemon_left_is_cleaned_up(tree: Path, archive: Path, mount: Mount) -> None:
    """`status` says that nobody answers; the next daemon removes what is left, and only that."""
    place, other = socket_of(archive), socket_of(mount(tree))
    os.kill(daemon_of(archive.parent), signal.SIGKILL)
    wait_until(lambda: run("status", archive.parent).returncode == 5)
    assert "Transport endpoint is not connected" in run("status", archive.parent).stderr
    (line,) = [line for line in run("status").stdout.splitlines() if line.startswith(str(archive.parent))]
    assert "unknown: its daemon does not answer" in line
    assert not place.exists()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place))
    third = mount(tree)
    assert not place.exists() or os.stat(third.parent).st_dev == os.makedev(*map(int, place.name.split("-")))
    assert other.exists()
    assert report(third)["state"] == "valid"
    force_unmount(archive.parent)


def test_without_the_socket_the_attributes_tell(archive: Path) -> None:
    """As with a daemon of before it had one."""
    archive.read_bytes()
    wait_until(lambda: report(archive)["delivered"] == archive.stat().st_size)
    socket_of(archive).unlink()
    found = report(archive)
    assert found["state"] == "valid"
    assert found["covered"] == found["delivered"] == archive.stat().st_size
    assert "coverage" not in found
    assert run("status", archive.parent).returncode == 0


@pytest.mark.long
def test_a_daemon_that_hangs_is_told_of(archive: Path) -> None:
    """Without a look at the mount, which would hang too."""
    pid = daemon_of(archive.parent)
    os.kill(pid, signal.SIGSTOP)
    try:
        result = run("status", archive.parent, timeout=30)
        assert result.returncode == 5
        assert "its daemon does not answer: timed out" in result.stderr
    finally:
        os.kill(pid, signal.SIGCONT)
    assert report(archive)["state"] == "valid"


def test_clients_that_never_read_do_no_harm(archive: Path) -> None:
    """A hundred of them: the archive is read meanwhile, none keeps a descriptor of the daemon, and status works."""
    expected, pid = archive.read_bytes(), daemon_of(archive.parent)
    with ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.connect(str(socket_of(archive)))
            with suppress(BrokenPipeError):  # it has been answered already
                client.send(b"x" * 1000)
        assert archive.read_bytes() == expected
        wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) < 30)
    assert report(archive)["state"] == "valid"


def test_clients_that_went_away_cost_nothing(archive: Path) -> None:
    """A hundred of them, before the daemon comes to answer the first: the next is served all the same."""
    place, pid = socket_of(archive), daemon_of(archive.parent)
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(100):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(place))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert report(archive)["state"] == "valid"


# The server by itself


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
                os.setresuid(NOBODY, NOBODY, NOBODY)
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


def as_nobody(work: Callable[[], None]) -> None:
    """Does it in a process of another user's."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def runtime(public: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The $XDG_RUNTIME_DIR of nobody."""
    os.chown(public, NOBODY, NOBODY)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(public))
    fallback = Path(f"/tmp/tartapefs-{NOBODY}")
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
    as_nobody(lambda: serves_in(runtime / "tartapefs"))


@pytest.mark.root
def test_a_path_longer_than_sockets_allow(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = runtime / ("d" * 200)
    deep.mkdir()
    os.chown(deep, NOBODY, NOBODY)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    as_nobody(lambda: serves_in(deep / "tartapefs"))


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
            os.chown(taken, NOBODY, NOBODY)
            taken.chmod(0o770)
        case "a link":
            (runtime / "own").mkdir()
            os.chown(runtime / "own", NOBODY, NOBODY)
            taken.symlink_to("own")
    as_nobody(lambda: serves_in(Path(f"/tmp/tartapefs-{NOBODY}")))


@pytest.mark.root
def test_no_safe_folder_at_all_is_an_error_and_no_more(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who made it first in /tmp gets nothing; a mount goes on without a socket."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    taken = Path(f"/tmp/tartapefs-{NOBODY}")
    taken.mkdir(0o777)
    taken.chmod(0o777)

    def refused() -> None:
        with pytest.raises(OSError):
            Server("1:5", dict)
        assert ask("1:5") is None

    as_nobody(refused)
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
        source=SimpleNamespace(root="/data"),
        tape=SimpleNamespace(
            total_size=1 << 60,
            fingerprint="0" * 64,
            seal="",
            member_count=1,
            recorded_ns=0,
            member_at=lambda offset: None,
        ),
    )
    found = document(player, "archive.tar", activity)
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
