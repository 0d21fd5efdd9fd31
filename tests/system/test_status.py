"""What a mount tells of itself, on real mounts: `status`, its socket, and clients that are slow, hostile or others."""

import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from support.daemon import daemon_of, force_unmount, sockets
from support.programs import TARTAPEFS, run, wait_until
from support.terminals import CTRL_C, Terminal

Mount = Callable[..., Path]
PIECE = 1 << 16


@pytest.fixture
def archive(tree: Path, mount: Mount) -> Path:
    """Of 314 KB, mounted so that each read is delivered, and nothing besides."""
    assert run("record", tree).returncode == 0
    return mount(tree, "--direct")


def report(archive: Path) -> dict[str, Any]:
    result = run("status", archive.parent, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


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
        wait_until(lambda: report(archive)["delivered"] == 2700)  # it is counted once it has been delivered
        assert os.pread(second.fileno(), 5000, size - 2000)
        wait_until(lambda: report(archive)["delivered"] == 4700)
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


def test_what_is_read_ahead_is_told_apart(tree: Path, mount: Mount) -> None:
    """The position is that of what the kernel was given; beside it is that of the reader's descriptor."""
    (tree / "photos" / "2024" / "large.bin").write_bytes(os.urandom(3_000_000))
    assert run("record", tree).returncode == 0
    archive = mount(tree)
    with archive.open("rb", buffering=0) as file:
        assert len(file.read(1000)) == 1000
        wait_until(lambda: report(archive)["delivered"])
        found = report(archive)
        assert found["read_ahead"] in (None, 4 << 20, 128 << 10)
        (reader,) = found["readers"]
        assert reader["reached"] == 1000
        assert reader["position"] > 4096
        assert reader["delivered"] == found["delivered"] >= reader["position"]
        assert "of it ahead" in run("status", archive.parent).stdout
        with archive.open("rb", buffering=0):  # of one process: nothing tells whose position is whose
            assert [reader["reached"] for reader in report(archive)["readers"]] == [None, None]


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


def test_metrics_of_all_mounts(tree: Path, archive: Path) -> None:
    """With the exit code 0, whatever they are: a timer that writes them has not failed."""
    archive.read_bytes()
    (tree / "new").touch()
    with pytest.raises(OSError), archive.open("rb", buffering=0) as file:
        file.read()
    result = run("status", "--openmetrics")
    assert result.returncode == 0
    line = f'tartapefs_%s{{mountpoint="{archive.parent}",source="{tree}"}} %d'
    lines = result.stdout.splitlines()
    assert line % ("up", 1) in lines and line % ("valid", 0) in lines
    assert set(run("status", "--openmetrics", archive.parent).stdout.splitlines()) <= set(lines)
    assert run("status", "--openmetrics", "--json").returncode == 2


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


def watching(archive: Path, columns: int, rows: int = 24, **environment: str) -> Terminal:
    return Terminal(*TARTAPEFS, "status", "--watch", archive.parent, columns=columns, rows=rows, **environment)


def labels(lines: list[str]) -> list[str]:
    return [line[:15].strip() for line in lines if line[0] != " "]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_watch_shows_it_live_until_it_is_interrupted(archive: Path, columns: int) -> None:
    """Over itself, as wide as the terminal is then; at the end each line is there once."""
    with watching(archive, columns, 50) as terminal:
        terminal.until(lambda lines: any(line.endswith(". 0.0 %") for line in lines))
        archive.read_bytes()
        terminal.until(lambda lines: any(line.endswith("# 100.0 %") for line in lines))
        for width in (50, 100, columns):
            terminal.resize(width, 50)
            terminal.until(
                lambda lines, width=width: [len(line) for line in lines if line.endswith("# 100.0 %")] == [width]
            )
            assert len(set(labels(terminal.lines))) == len(labels(terminal.lines))
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        *report, last = terminal.lines
        assert last == "tartapefs: interrupted"
        assert report[0].startswith("mountpoint ") and len(set(labels(report))) == len(labels(report))


def test_watch_shows_it_live_until_it_is_unmounted(archive: Path) -> None:
    with watching(archive, 80) as terminal:
        terminal.until(lambda lines: any(line.endswith(". 0.0 %") for line in lines))
        assert run("unmount", archive.parent).returncode == 0
        assert terminal.end() == 0
        assert len(set(labels(terminal.lines))) == len(labels(terminal.lines))
        assert "no archive of tartapefs is mounted here" in "".join(terminal.lines)


def test_watch_in_a_window_that_is_not_high_enough(archive: Path) -> None:
    """Shows the beginning, and at the end all."""
    with watching(archive, 80, 6) as terminal:
        terminal.until(lambda lines: len(lines) == 6 and lines[-1] == "…")
        assert labels(terminal.lines)[0] == "mountpoint"
        terminal.resize(80, 50)
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        assert labels(terminal.lines)[-3:-1] == ["rate", "read_ahead"]


def test_watch_where_nothing_can_be_drawn_over(archive: Path) -> None:
    """One report below the other: in a pipe, and on a dumb terminal."""
    with watching(archive, 80, TERM="dumb") as terminal:
        terminal.until(lambda lines: terminal.seen.count(b"mountpoint ") == 2)
        assert b"\x1b" not in terminal.seen
    with subprocess.Popen([*TARTAPEFS, "status", "--watch", archive.parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == b"\n":
                break
            assert b"\x1b" not in line
        assert process.stdout.readline().startswith(b"mountpoint ")
        process.terminate()


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
