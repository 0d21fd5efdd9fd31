"""The helper process of a mount: it takes its share, with every check, and leaves nothing behind."""

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import bytes_read, daemon_of, helper_of, is_gone
from support.programs import needs_two_cores, run, wait_until
from support.reference import Reference
from support.trees import make_many

from tartapefs import Tape, TapeRecorder

MIB = 1 << 20
pytestmark = pytest.mark.fuse


@pytest.fixture
def many(tmp_path: Path) -> Path:
    root = make_many(tmp_path / "many")
    TapeRecorder(root).commit()
    return root


@needs_two_cores
def test_a_helper_takes_its_share_of_small_members(many: Path, mount: Callable[..., Path]) -> None:
    """The bytes are right, whatever is requested, and the helper reads some of them."""
    archive = mount(many)
    helper = helper_of(daemon_of(archive.parent))
    reference, before, some = Reference(many), bytes_read(helper), random.Random(2)
    whole = reference.read(0, reference.size)
    fd = os.open(archive, os.O_RDONLY)
    try:
        for _ in range(5):
            assert b"".join(iter(lambda: os.read(fd, MIB), b"")) == whole
            os.lseek(fd, 0, os.SEEK_SET)
        for _ in range(100):
            at, size = some.randrange(reference.size), some.choice((100_000, 300_000, MIB))
            assert os.pread(fd, size, at) == whole[at : at + size]
    finally:
        os.close(fd)
    wait_until(
        lambda: archive.read_bytes() and bytes_read(helper) > before + MIB, 60
    )  # unless the machine is busy, at once


@needs_two_cores
def test_reads_go_on_without_a_helper_that_was_killed(many: Path, mount: Callable[..., Path]) -> None:
    """Also if it ends in the middle of a read."""
    archive = mount(many)
    helper = helper_of(daemon_of(archive.parent))
    reference = Reference(many)
    whole = reference.read(0, reference.size)
    killer = threading.Timer(0.02, os.kill, (helper, signal.SIGKILL))
    killer.start()
    for _ in range(3):
        assert archive.read_bytes() == whole
    killer.join()
    assert is_gone(helper)
    assert archive.read_bytes() == whole


@needs_two_cores
@pytest.mark.parametrize("where", [0.1, 0.9])
def test_drift_is_found_in_each_part(many: Path, mount: Callable[..., Path], where: float) -> None:
    """In the first and in the last part of a request; the culprit is named, and the tape is invalid."""
    archive = mount(many, "--direct")
    fd = os.open(archive, os.O_RDONLY)
    try:
        for at in range(0, 2 * MIB, MIB):  # from here on requests are shared
            os.pread(fd, MIB, at)
        with Tape.discover(many) as tape:
            members = [member for member in tape.members(2 * MIB, 3 * MIB) if member.size]
        culprit = members[int(len(members) * where)]
        path = many / os.fsdecode(culprit.path)
        path.write_bytes(b"\0" * culprit.size)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, MIB, 2 * MIB)
    finally:
        os.close(fd)
    status = run("status", archive.parent)
    assert status.returncode == 1
    assert culprit.arc_path in status.stdout


@needs_two_cores
def test_a_helper_ends_with_its_daemon(many: Path, mount: Callable[..., Path]) -> None:
    """However that ends: nothing is left of a daemon that was killed."""
    archive = mount(many)
    daemon = daemon_of(archive.parent)
    helper = helper_of(daemon)
    os.kill(helper, signal.SIGTERM)  # as a service manager sends it to all processes: the daemon decides
    assert archive.stat().st_size
    assert not is_gone(helper)
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: is_gone(helper))
    assert run("unmount", archive.parent).returncode == 0


@needs_two_cores
def test_unmount_returns_once_all_have_ended(many: Path, mount: Callable[..., Path]) -> None:
    """So that the disk that the source lies on can be unmounted next."""
    archive = mount(many)
    daemon = daemon_of(archive.parent)
    helper = helper_of(daemon)
    assert run("unmount", archive.parent).returncode == 0
    assert is_gone(daemon)
    assert is_gone(helper)
