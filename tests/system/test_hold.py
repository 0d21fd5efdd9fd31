"""Readers that are held when there is drift (`--on-drift hold`), and the program that is run then."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.daemon import daemon_of, descriptors, foreground, is_gone
from support.programs import run, wait_until
from support.reference import Reference

from tartapefs.base.errors import MountError
from tartapefs.mount import mount_table as mounting

Mount = Callable[..., Path]
PIECE = 1 << 16
# Reads a piece for each line that it gets, and says how many bytes that were, or the name of the error. It handles
# SIGTERM. By the C library, since Python itself reads again after EINTR.
_READER = f"""
import ctypes, errno, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: None)
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer({PIECE})
fd = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
for _ in sys.stdin:
    count = libc.read(fd, buffer, {PIECE})
    print(count if count >= 0 else errno.errorcode[ctypes.get_errno()], flush=True)
"""


class Reader(subprocess.Popen[str]):
    """A process that has the archive open, and reads when it is told to."""

    def __init__(self, archive: Path) -> None:
        super().__init__(
            [sys.executable, "-c", _READER, archive], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.answer() == "open"

    def begin(self) -> None:
        assert self.stdin
        self.stdin.write("\n")
        self.stdin.flush()

    def answer(self) -> str:
        assert self.stdout
        return self.stdout.readline().strip()

    def read(self) -> str:
        self.begin()
        return self.answer()


@contextmanager
def reading(archive: Path) -> Iterator[Reader]:
    with Reader(archive) as reader:
        try:
            yield reader
        finally:
            reader.kill()


@pytest.fixture(params=["fusepy", "mfusepy"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARTAPEFS_BINDING", request.param)


@pytest.fixture
def archive(tree: Path, mount: Mount) -> Path:
    """Of 314 KB, mounted so that it holds."""
    assert run("record", tree).returncode == 0
    return mount(tree, "--on-drift", "hold")


def drift(root: Path) -> None:
    (root / "photos" / "2024" / "large.bin").write_bytes(b"shorter")


def report(archive: Path) -> dict[str, Any]:
    return mounting.status(mounting.entry_of(os.fspath(archive.parent)))


def held(archive: Path) -> list[int]:
    return sorted(found["pid"] for found in report(archive)["held"])


@pytest.mark.usefixtures("library")
def test_a_reader_that_meets_drift_waits(archive: Path, tree: Path) -> None:
    """What it got before is right. `status` says who waits, since when, where, and why."""
    with reading(archive) as reader:
        assert report(archive)["held"] == []
        assert reader.read() == str(PIECE)
        drift(tree)
        reader.begin()
        wait_until(lambda: held(archive) == [reader.pid])
        found = report(archive)
        assert "large.bin" in found["state"]
        (one,) = found["held"]
        assert one["command"] == Path(f"/proc/{reader.pid}/comm").read_text().strip()
        assert (one["position"], one["size"]) == (PIECE, PIECE)
        assert one["member"] == "data/photos/2024/large.bin"
        assert one["seconds"] >= 0
        text = run("status", archive.parent)
        assert text.returncode == 1
        assert f"held {reader.pid}" in text.stdout
        assert os.getxattr(archive.parent, "user.tartape.held") == b"1"
        for _ in range(2):  # a signal that it handles interrupts it; a read after that waits again
            reader.terminate()
            assert reader.answer() == "EINTR"
            assert held(archive) == []
            reader.begin()
            wait_until(lambda: held(archive) == [reader.pid])
        reader.kill()
        assert reader.wait() == -signal.SIGKILL
    wait_until(lambda: held(archive) == [])
    assert report(archive)["coverage"]["ranges"] == [[0, PIECE]]


def test_drift_that_an_audit_finds_holds_as_well(tree: Path, mount: Mount) -> None:
    assert run("record", tree).returncode == 0
    archive = mount(tree, "--on-drift", "hold", "--audit-interval", "0.1")
    with reading(archive) as reader:
        (tree / "added").touch()
        wait_until(lambda: report(archive)["state"] != "valid")
        reader.begin()
        wait_until(lambda: held(archive) == [reader.pid])


def test_everything_else_goes_on_however_many_are_held(archive: Path, tree: Path) -> None:
    """More readers than the daemon has threads, each interrupted on its own; who comes anew gets an error at once."""
    with ExitStack() as stack:
        readers = [stack.enter_context(reading(archive)) for _ in range(12)]
        drift(tree)
        for reader in readers:
            reader.begin()
        wait_until(lambda: held(archive) == sorted(reader.pid for reader in readers))
        assert os.listdir(archive.parent) == [archive.name]
        os.statvfs(archive.parent)
        for call in (os.stat, lambda path: os.close(os.open(path, os.O_RDONLY))):
            with pytest.raises(OSError) as raised:
                call(archive)
            assert raised.value.errno == errno.EIO
        for reader in readers[::2]:
            reader.terminate()
            assert reader.answer() == "EINTR"
        assert held(archive) == sorted(reader.pid for reader in readers[1::2])
        assert os.listdir(archive.parent) == [archive.name]


def end_lazily(mountpoint: Path) -> None:
    assert run("unmount", "--lazy", mountpoint).returncode == 0


def end_by_another_program(mountpoint: Path) -> None:
    subprocess.run(
        ["umount", "-l", mountpoint] if os.geteuid() == 0 else ["fusermount3", "-uz", mountpoint], check=True
    )


def end_by_signal(mountpoint: Path) -> None:
    os.kill(daemon_of(mountpoint), signal.SIGTERM)


@pytest.mark.long(but=1)
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("end", [end_lazily, end_by_another_program, end_by_signal])
def test_the_end_of_the_mount_ends_it(archive: Path, tree: Path, end: Callable[[Path], None]) -> None:
    """With an error, which each further read gets at once."""
    daemon = daemon_of(archive.parent)
    with reading(archive) as one, reading(archive) as another:
        drift(tree)
        one.begin()
        another.begin()
        wait_until(lambda: held(archive) == sorted([one.pid, another.pid]))
        end(archive.parent)
        assert one.answer() == another.answer() == "EIO"
        assert one.read() in ("EIO", "ENOTCONN", "ECONNABORTED")  # the daemon may have ended
    wait_until(lambda: is_gone(daemon))


@pytest.mark.long
def test_unmount_says_that_somebody_is_held(archive: Path, tree: Path) -> None:
    with reading(archive) as reader:
        drift(tree)
        reader.begin()
        wait_until(lambda: held(archive) == [reader.pid])
        result = run("unmount", archive.parent)
        assert result.returncode == 5
        assert str(reader.pid) in result.stderr
        assert "--lazy" in result.stderr


@pytest.mark.long(but=1)
@pytest.mark.parametrize("how", ["mapping", "sendfile"])
def test_what_reads_by_the_page_cache_fails(archive: Path, tree: Path, how: str) -> None:
    """No signal that it handles could end its wait for a page: it gets the error that it would get without hold."""
    program = (
        "import mmap, os, sys\nfile = open(sys.argv[1], 'rb')\n"
        "pages = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)\n"
        "print(flush=True); sys.stdin.readline()\n"
    )
    program += {
        "mapping": "pages[100_000]",
        "sendfile": "os.sendfile(os.open('/dev/null', os.O_WRONLY), file.fileno(), 0, 1 << 16)",
    }[how]
    command = [sys.executable, "-c", program, archive]
    with (
        reading(archive) as reader,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as other,
    ):
        assert other.stdin and other.stdout and other.stderr and other.stdout.readline()
        drift(tree)
        reader.begin()
        wait_until(lambda: held(archive) == [reader.pid])
        other.stdin.write(b"\n")
        other.stdin.flush()
        said = other.stderr.read()
        assert other.wait() == (-signal.SIGBUS if how == "mapping" else 1)
        assert how == "mapping" or b"Input/output error" in said


@pytest.mark.long
def test_without_the_option_reads_fail(tree: Path, mount: Mount) -> None:
    assert run("record", tree).returncode == 0
    archive = mount(tree)
    with reading(archive) as reader:
        drift(tree)
        assert reader.read() == "EIO"
        assert "held" not in report(archive)


@pytest.mark.long
def test_hold_goes_past_the_page_cache(archive: Path) -> None:
    """A reader that waited for a page there could not be ended by a signal that it handles."""
    for _ in range(2):
        with reading(archive) as reader, reading(archive) as another:
            assert reader.read() == another.read() == str(PIECE)
    wait_until(lambda: report(archive)["delivered"] == 4 * PIECE)


@pytest.mark.needs("cp")
@pytest.mark.usefixtures("library")
def test_cp_can_be_ended(tree: Path, mount: Mount) -> None:
    """By Ctrl-C, and what it leaves is right, as far as it goes."""
    (tree / "photos" / "2024" / "large.bin").write_bytes(os.urandom(5_000_000))
    reference = Reference(tree)
    expected = reference.read(0, reference.size)
    assert run("record", tree).returncode == 0
    archive = mount(tree, "--on-drift", "hold")
    with subprocess.Popen(["cp", archive, "/dev/stdout"], stdout=subprocess.PIPE) as copying:
        assert copying.stdout
        got = copying.stdout.read(PIECE)
        drift(tree)  # cp waits for room in the pipe
        rest: list[bytes] = []
        draining = threading.Thread(target=lambda: rest.append(copying.stdout.read()))  # type: ignore[union-attr]
        draining.start()
        wait_until(lambda: held(archive) == [copying.pid])
        copying.send_signal(signal.SIGINT)
        assert copying.wait() == -signal.SIGINT
        draining.join()
    got += rest[0]
    assert got == expected[: len(got)]


# The program that is run


@pytest.fixture
def place(tree: Path, tmp_path: Path) -> Iterator[Path]:
    assert run("record", tree).returncode == 0
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    yield mountpoint
    with suppress(MountError):
        mounting.unmount(mounting.entry_of(os.fspath(mountpoint)), lazy=True)


def meet_drift(root: Path, archive: Path) -> None:
    drift(root)
    with pytest.raises(OSError):
        archive.read_bytes()


def test_a_program_is_run_once(tree: Path, place: Path, tmp_path: Path) -> None:
    """It learns what and where; has no descriptor of the daemon's, and a session of its own; failing is logged."""
    wrote = tmp_path / "wrote"
    command = (
        f'printf "%s\\n" "$TARTAPEFS_DRIFT" "$TARTAPEFS_MOUNTPOINT" "$TARTAPEFS_SOURCE" "$PWD" $PPID $$ >> {wrote};'
        f"ls /proc/self/fd >> {wrote}; cut -d' ' -f6 /proc/$$/stat >> {wrote}; echo so it is >&2; exit 7"
    )
    log = tmp_path / "log"
    assert run("mount", tree, place, "--on-drift-run", command, "--log", log).returncode == 0
    daemon = daemon_of(place)
    before = len(descriptors(daemon))
    assert not wrote.exists()
    meet_drift(tree, place / "archive.tar")
    wait_until(lambda: "failed with exit code 7: so it is" in log.read_text())
    with pytest.raises(OSError):
        (place / "archive.tar").read_bytes()
    what, where, source, folder, parent, own, *rest = wrote.read_text().splitlines()
    assert "large.bin: size changed since recording" in what
    assert f"invalid: {what}" == report(place / "archive.tar")["state"]
    assert (where, source, folder) == (str(place), str(tree), "/")
    assert int(parent) == daemon
    assert rest == ["0", "1", "2", "3", own]  # 3 is ls' own; the last is its session
    assert is_gone(int(own))
    assert not Path(f"/proc/{own}").exists()
    assert len(descriptors(daemon)) == before
    assert run("unmount", place).returncode == 0


def test_the_program_may_end_all_readers(tree: Path, mount: Mount) -> None:
    """They are held until then, so that none fills what it does not get with something else."""
    assert run("record", tree).returncode == 0
    archive = mount(tree, "--on-drift", "hold", "--on-drift-run", "kill -KILL $TARTAPEFS_READERS")
    with reading(archive) as held_one, reading(archive) as idle:
        drift(tree)
        held_one.begin()
        assert held_one.wait() == idle.wait() == -signal.SIGKILL
        assert held_one.answer() == ""


@pytest.mark.long
def test_nothing_waits_for_the_program(tree: Path, place: Path, tmp_path: Path) -> None:
    """Requests are answered while it runs, and it goes on when the daemon has ended."""
    go, done = tmp_path / "go", tmp_path / "done"
    os.mkfifo(go)
    command = f"echo begun; read line < {go}; echo said; echo $line > {done}"
    assert run("mount", tree, place, "--on-drift-run", command).returncode == 0
    daemon = daemon_of(place)
    meet_drift(tree, place / "archive.tar")
    assert os.listdir(place) == ["archive.tar"]
    assert report(place / "archive.tar")["state"].startswith("invalid")
    assert run("unmount", place).returncode == 0
    wait_until(lambda: is_gone(daemon))
    go.write_text("after its end\n")
    wait_until(lambda: done.exists() and done.read_text() == "after its end\n")


def test_a_program_may_unmount(tree: Path, place: Path) -> None:
    """Also where the daemon is ended at once: the program is started before it ends."""
    command = f'{sys.executable} -m tartapefs unmount --lazy "$TARTAPEFS_MOUNTPOINT"'
    with foreground(tree, place, "--on-drift-run", command) as daemon:
        meet_drift(tree, place / "archive.tar")
        assert daemon.wait(60) == 1


@pytest.mark.long
def test_a_program_that_does_not_exist(tree: Path, place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run("mount", tree, place, "--on-drift-run", "/nowhere/at all", "--log", log).returncode == 0
    meet_drift(tree, place / "archive.tar")
    wait_until(lambda: "failed with exit code 127" in log.read_text())
    assert run("unmount", place).returncode == 0


@pytest.mark.long
def test_both_together(tree: Path, place: Path) -> None:
    """The program ends the mount, and so who is held."""
    command = f'{sys.executable} -m tartapefs unmount --lazy "$TARTAPEFS_MOUNTPOINT"'
    with foreground(tree, place, "--on-drift", "hold", "--on-drift-run", command) as daemon:
        with reading(place / "archive.tar") as reader:
            drift(tree)
            assert reader.read() == "EIO"
        assert daemon.wait(60) == 1
