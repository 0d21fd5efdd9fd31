"""Clients that nobody here wrote, on an archive that drifts: held and ended (rsync, rclone, fio), or that goes on under
a new name after it was recorded again (curl, wget, aria2c).
"""

import os
import random
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.programs import run, wait_until
from support.reference import Reference
from support.sshd import sshd

from tartapefs.mount import mount_table as mounting

pytestmark = [pytest.mark.wild, pytest.mark.fuse]
Mount = Callable[..., Path]
MEGABYTE = 1_000_000
KILL = "kill $TARTAPEFS_READERS"


@dataclass(frozen=True)
class Source:
    """A recorded folder whose archive has about 9 MB, and that archive as it should be."""

    root: Path
    archive: bytes

    def drift(self) -> None:
        (self.root / "5").write_bytes(b"shorter")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    root = tmp_path / "data"
    root.mkdir()
    for at in range(9):
        (root / str(at)).write_bytes(random.Random(at).randbytes(MEGABYTE))
    assert run("record", root).returncode == 0
    reference = Reference(root)
    return Source(root, reference.read(0, reference.size))


def held(archive: Path) -> set[int]:
    return {found["pid"] for found in mounting.status(mounting.entry_of(os.fspath(archive.parent)))["held"]}


def delivered(archive: Path) -> int:
    return int(mounting.status(mounting.entry_of(os.fspath(archive.parent)))["delivered"])


@contextmanager
def rsyncd(folder: Path) -> Iterator[str]:
    """An rsync daemon for `folder`; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "rsyncd.conf"
    config.write_text(
        f"port = {port}\naddress = 127.0.0.1\nuse chroot = no\nlog file = {folder}/rsyncd.log\n"
        f"[all]\npath = {folder}\nread only = no\nuid = {os.geteuid()}\ngid = {os.getegid()}\n"
    )
    with subprocess.Popen(["rsync", "--daemon", "--no-detach", "--config", config]) as daemon:
        try:
            address = f"rsync://127.0.0.1:{port}/all"
            wait_until(lambda: subprocess.run(["rsync", "-q", address], capture_output=True).returncode == 0)
            yield address
        finally:
            daemon.terminate()


# Where rsync runs with the archive: the client, or what it starts at the other end.
WAYS = ["local", "to ssh", "from ssh", "to a daemon", "from a daemon"]


@pytest.mark.needs("rsync", "/usr/sbin/sshd")
@pytest.mark.parametrize("option", ["--inplace", "--partial"])
@pytest.mark.parametrize("way", WAYS)
def test_rsync_is_ended_and_leaves_a_good_prefix(
    source: Source, mount: Mount, tmp_path: Path, way: str, option: str
) -> None:
    """With another exit code than 0, at once. Without hold it would write zeros up to the archive's size."""
    archive = mount(source.root, "--on-drift", "hold", "--on-drift-run", KILL)
    copy = tmp_path / "copy.tar"
    with ExitStack() as stack:
        command = ["rsync", option, "--no-whole-file", "--bwlimit=2M"]
        sender, receiver = str(archive), str(copy)
        if "ssh" in way:
            host = stack.enter_context(sshd(tmp_path))
            command += ["-e", host.ssh]
            there = "host:"
        elif "daemon" in way:
            there = stack.enter_context(rsyncd(tmp_path)) + "/"
            sender, receiver = (os.path.relpath(path, tmp_path) if there else path for path in (sender, receiver))
        if way.startswith("to"):
            sender, receiver = str(archive), there + receiver
        elif way.startswith("from"):
            sender, receiver = there + sender, str(copy)
        with subprocess.Popen([*command, sender, receiver], stderr=subprocess.PIPE) as rsync:
            assert rsync.stderr
            wait_until(lambda: delivered(archive) > MEGABYTE or rsync.poll() is not None)
            source.drift()
            rsync.stderr.read()
            assert rsync.wait() in (12, 20)
        wait_until(lambda: not mounting.status(mounting.entry_of(os.fspath(archive.parent)))["readers"])
        wait_until(copy.exists)
    left = copy.read_bytes()
    assert MEGABYTE // 2 < len(left) < 6 * MEGABYTE
    assert left == source.archive[: len(left)]


@pytest.mark.needs("rsync")
def test_rsync_waits_until_it_is_interrupted(source: Source, mount: Mount, tmp_path: Path) -> None:
    """By Ctrl-C, with a good prefix. (Its --timeout does not end it: the other end keeps the connection alive.)"""
    archive = mount(source.root, "--on-drift", "hold")
    command = ["rsync", "--inplace", "--no-whole-file", "--bwlimit=2M", archive, tmp_path / "copy.tar"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as rsync:
        wait_until(lambda: delivered(archive) > MEGABYTE)
        source.drift()
        wait_until(lambda: held(archive) == {rsync.pid})
        rsync.send_signal(signal.SIGINT)
        assert rsync.stderr
        rsync.stderr.read()
        assert rsync.wait() == 20
    left = (tmp_path / "copy.tar").read_bytes()
    assert left == source.archive[: len(left)]


@pytest.mark.needs("rclone")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_rclone_can_be_ended(source: Source, mount: Mount, tmp_path: Path, number: signal.Signals) -> None:
    """It handles both signals; its threads wait for several parts."""
    archive = mount(source.root, "--on-drift", "hold")
    command = ["rclone", "--config", os.devnull, "--bwlimit", "2M", "--buffer-size", "0", "--retries", "1"]
    with subprocess.Popen([*command, "copyto", archive, tmp_path / "copy"], stderr=subprocess.PIPE) as rclone:
        wait_until(lambda: delivered(archive) > MEGABYTE)
        source.drift()
        wait_until(lambda: held(archive) == {rclone.pid})
        rclone.send_signal(number)
        assert rclone.stderr and rclone.wait() != 0
        rclone.stderr.read()
    for left in tmp_path.glob("copy*"):
        content = left.read_bytes()
        assert content == source.archive[: len(content)]


@pytest.mark.needs("fio")
@pytest.mark.parametrize("engine", ["libaio", "io_uring", "psync"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_asynchronous_readers_can_be_ended(
    source: Source, mount: Mount, tmp_path: Path, engine: str, number: signal.Signals
) -> None:
    """Of aio the kernel passes no signal on, but waits for all that was asked for before the process ends."""
    archive = mount(source.root, "--on-drift", "hold")
    command = [
        *("fio", "--name=read", "--readonly", f"--filename={archive}", f"--ioengine={engine}", "--iodepth=32"),
        *("--direct=1", "--rw=randread", "--bs=4k", "--time_based", "--runtime=1000", "--thread", "--invalidate=0"),
        *(f"--size={8 * MEGABYTE}", "--rate=20m"),
    ]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as fio:
        assert fio.stdout
        wait_until(lambda: delivered(archive) > 1 << 16 or fio.poll() is not None)
        assert fio.poll() is None, fio.stdout.read()
        source.drift()
        wait_until(lambda: fio.pid in held(archive))
        os.listdir(archive.parent)
        fio.send_signal(number)
        try:
            fio.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            assert number == signal.SIGTERM  # it waits for all that it asked for
            fio.kill()
            fio.communicate()
    wait_until(lambda: held(archive) == set())


# Names


@contextmanager
def served(folder: Path, scratch: Path) -> Iterator[str]:
    """What is in `folder`, by nginx; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = scratch / "nginx.conf"
    temporary = "".join(
        f"{kind}_temp_path {scratch}/nginx;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; master_process off; pid {scratch}/nginx.pid; error_log {scratch}/nginx.log; events {{}}\n"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    with subprocess.Popen(["nginx", "-e", scratch / "nginx.log", "-c", config]) as nginx:
        try:
            wait_until(lambda: nginx.poll() is not None or _listens(port))
            yield f"http://127.0.0.1:{port}"
        finally:
            nginx.kill()  # SIGTERM is lost if it comes just before a single nginx process waits for events


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


CLIENTS = {
    "curl": ["curl", "-sSf", "-C", "-", "-O"],
    "wget": ["wget", "-q", "-c"],
    "aria2c": ["aria2c", "-q", "-c", "--auto-file-renaming=false", "--file-allocation=none", "--timeout=20"],
}


@pytest.mark.needs("nginx", "curl", "wget", "aria2c")
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("name", ["archive.tar", "{fingerprint}.tar"])
def test_a_client_that_goes_on_by_name_alone(
    source: Source, mount: Mount, tmp_path: Path, client: str, name: str
) -> None:
    """After another recording of equal size it mixes the two, and exits with 0, unless each has its own name."""
    copies = tmp_path / "copies"
    copies.mkdir()
    (tmp_path / "nginx").mkdir()
    old = source.archive
    for content in (1, 2):
        for file in "38":  # in what is there, and in what is missing
            (source.root / file).write_bytes(random.Random(10 * content + int(file)).randbytes(MEGABYTE))
        assert run("record", "--force", source.root).returncode == 0
        reference = Reference(source.root)
        expected = reference.read(0, reference.size)
        folder = mount(source.root, "--name", name).parent
        (archive,) = folder.iterdir()
        with served(folder, tmp_path) as address:
            if content == 1:
                old = expected
                (copies / archive.name).write_bytes(expected[: 6 * MEGABYTE])  # broken off
            else:
                subprocess.run([*CLIENTS[client], f"{address}/{archive.name}"], cwd=copies, check=True, timeout=120)
                copy = (copies / archive.name).read_bytes()
        assert run("unmount", folder).returncode == 0
    assert len(old) == len(expected) == len(copy)
    assert (copy == expected) == (name != "archive.tar")
    if name == "archive.tar":
        assert copy != old
