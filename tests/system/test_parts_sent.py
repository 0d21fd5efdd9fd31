"""Parts of a mount, sent by the programs that users have: resumed by part, and after an append the last and the new."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.generations import Generations
from support.programs import done, run, wait_until
from support.s3 import environment, s3_server
from support.sending import copy_by_rclone, copy_by_rsync, cut
from support.sshd import SSHD, sshd

pytestmark = pytest.mark.fuse

Mount = Callable[..., Path]
SIZE = 500_001  # of a part: a multiple of nothing


class Tape:
    """A folder of seven parts that can grow, its mount, and the parts that its archive should have."""

    def __init__(self, root: Path, mount: Mount) -> None:
        self._root, self._mount = root, mount
        root.mkdir()
        self._chance = random.Random(root.name)
        self._expected = Generations(root)
        self.folder = root
        self.grow("first", 7 * SIZE - 100_000)

    def grow(self, name: str, size: int) -> int:
        """Adds a file, records and mounts; gives how many parts begin with the same bytes as before, and end so."""
        before = len(self._expected.archive)
        (self._root / name).write_bytes(self._chance.randbytes(size))
        done(run("record", self._root, *(["--append"] if before > 1024 else [])))
        if self.folder != self._root:
            done(run("unmount", self.folder))
        archive = self._expected.append()
        self.folder = self._mount(self._root, "--part-size", str(SIZE)).parent
        self.parts = cut(archive, SIZE)
        return (before - 1024) // SIZE

    def is_at(self, copy: Path) -> bool:
        return {path.name: path.read_bytes() for path in copy.iterdir()} == self.parts

    def after(self, kept: int) -> list[str]:
        return sorted(self.parts)[kept:]

    def bytes_of(self, names: list[str]) -> int:
        return sum(len(self.parts[name]) for name in names)


@pytest.fixture
def tape(tmp_path: Path, mount: Mount) -> Tape:
    return Tape(tmp_path / "data", mount)


SENDERS = [
    pytest.param(copy_by_rclone, marks=pytest.mark.needs("rclone")),
    pytest.param(copy_by_rsync, marks=pytest.mark.needs("rsync")),
]


@pytest.mark.long(but="100000-copy_by_rclone|1200000-copy_by_rsync")
@pytest.mark.parametrize("send", SENDERS)
@pytest.mark.parametrize("added", [100_000, 1_200_000])
def test_after_an_append_the_last_part_and_the_new_ones_are_sent(
    tape: Tape, tmp_path: Path, send: Callable[..., tuple[list[str], int]], added: int
) -> None:
    """And nothing at all the second time. Whether the last part gets longer or is full by then."""
    copy = tmp_path / "copy"
    assert send(tape.folder, copy) == (tape.after(0), tape.bytes_of(tape.after(0)))
    assert tape.is_at(copy)
    assert send(tape.folder, copy) == ([], 0)
    kept = tape.grow("second", added)
    assert kept == 6 and len(tape.parts) == (8 if added < SIZE else 10)
    assert send(tape.folder, copy) == (tape.after(kept), tape.bytes_of(tape.after(kept)))
    assert tape.is_at(copy)
    assert send(tape.folder, copy) == ([], 0)


@pytest.mark.parametrize("send", SENDERS)
@pytest.mark.long
def test_what_was_interrupted_goes_on_with_the_parts_that_are_missing(
    tape: Tape, tmp_path: Path, send: Callable[..., tuple[list[str], int]]
) -> None:
    copy = tmp_path / "copy"
    slowly = {
        copy_by_rclone: ["rclone", "copy", "--config=/dev/null", "--bwlimit=1M", "--transfers=1", tape.folder, copy],
        copy_by_rsync: ["rsync", "-a", "--bwlimit=1M", f"{tape.folder}/", copy],
    }[send]
    with subprocess.Popen(slowly, stderr=subprocess.DEVNULL) as sender:
        wait_until(lambda: (copy / "archive.tar.00003").exists(), 60)
        sender.send_signal(signal.SIGTERM)
        assert sender.wait(60) != 0
    there = [
        name for name in sorted(tape.parts) if (path := copy / name).exists() and path.read_bytes() == tape.parts[name]
    ]
    assert "archive.tar.00001" in there and len(there) < 7
    missing = [name for name in sorted(tape.parts) if name not in there]
    assert send(tape.folder, copy) == (missing, tape.bytes_of(missing))
    assert tape.is_at(copy)


@pytest.mark.parametrize("send", SENDERS)
def test_drift_ends_it_and_no_wrong_part_stays(
    tape: Tape, tmp_path: Path, send: Callable[..., tuple[list[str], int]]
) -> None:
    """rsync fills what it cannot read with zeros, in a temporary file that it then does not keep."""
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run(["cp", "-p", tape.folder / "archive.tar.00001", copy], check=True)
    os.truncate(tmp_path / "data" / "first", 3 * SIZE)
    with pytest.raises(subprocess.CalledProcessError):
        send(tape.folder, copy)
    assert {path.name for path in copy.iterdir()} == {"archive.tar.00001"}
    assert (copy / "archive.tar.00001").read_bytes() == tape.parts["archive.tar.00001"]


@pytest.mark.long
def test_aws_s3_sync(tape: Tape) -> None:
    """By size and time: what is there of the same size is sent again if the part is younger than the object."""
    with s3_server() as s3:

        def sync() -> list[str]:
            command = [sys.executable, "-m", "awscli", "s3", "sync", "--no-progress", f"--endpoint-url={s3.url}"]
            said = subprocess.run(
                [*command, tape.folder, "s3://tapes/"], env=environment(s3), check=True, capture_output=True, text=True
            ).stdout
            return sorted(re.findall(r"to s3://tapes/(\S+)$", said, re.MULTILINE))

        assert sync() == tape.after(0)
        assert sync() == []
        with s3.client() as client:
            client.delete_object(Bucket="tapes", Key="archive.tar.00003")
        assert sync() == ["archive.tar.00003"]
        kept = tape.grow("second", 1_200_000)
        assert sync() == tape.after(kept)
        assert {key: s3.object(key) for key in list(s3.keys())} == tape.parts


@pytest.mark.wild
@pytest.mark.needs("lftp", "ssh", SSHD)
def test_lftp_mirror(tape: Tape, tmp_path: Path) -> None:
    """By size and time, over sftp."""
    far = tmp_path / "far"
    far.mkdir()
    with sshd(tmp_path) as host:

        def mirror(*settings: str) -> list[str]:
            connect = f'set sftp:connect-program "{host.ssh} -a -x"; set net:max-retries 1; {"".join(settings)}'
            script = f"{connect}; open sftp://host; mirror -R -v --no-perms {tape.folder} {far}"
            done = subprocess.run(
                ["lftp", "-c", script], capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)}
            )
            return sorted(re.findall(r"^Transferring file `(.*)'$", done.stdout, re.MULTILINE))

        assert mirror() == tape.after(0)
        assert tape.is_at(far)
        assert mirror() == []
        kept = tape.grow("second", 1_200_000)
        assert mirror() == tape.after(kept)
        assert tape.is_at(far)
