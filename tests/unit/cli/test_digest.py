"""The command digest: its lines and files, killed and run again, on full disks."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.digests import expected, expected_etag, in_base64, slow_crc
from support.programs import run, umount, under_strace, wait_until
from support.reference import Reference, gnu_tar

from tartapefs import TapeRecorder
from tartapefs.base.saved_state import SavedState
from tartapefs.transfer.digests import ALGORITHMS, CRCS


@pytest.mark.long
def test_the_command(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """Its lines are what `sha256sum -c` and `md5sum -c` read; --json has the same."""
    (tmp_path / "archive.tar").write_bytes(archive)
    options = [option for name in ALGORITHMS for option in ("-a", name)]
    options += ["--s3-part-size", "64KiB", "--s3-part-size", "1M"]
    found = run("digest", recorded, *options)
    assert found.returncode == 0, found.stderr
    wanted = expected(archive, (65_536, 1 << 20), CRCS)
    assert found.stdout.splitlines() == [
        f"MD5 (archive.tar) = {wanted['md5']}",
        f"SHA256 (archive.tar) = {wanted['sha256']}",
        f"BLAKE3 (archive.tar) = {wanted['blake3']}",
        f"CRC64NVME (archive.tar) = {wanted['crc64nvme']}",
        f"S3-CRC64NVME (archive.tar) = {in_base64(wanted['crc64nvme'])}",
        f"CRC32C (archive.tar) = {wanted['crc32c']}",
        f"S3-CRC32C (archive.tar) = {in_base64(wanted['crc32c'])}",
        f"CRC32 (archive.tar) = {wanted['crc32']}",
        f"S3-CRC32 (archive.tar) = {in_base64(wanted['crc32'])}",
        f"S3-ETAG-65536 (archive.tar) = {wanted['s3:65536']}",
        f"S3-ETAG-1048576 (archive.tar) = {wanted['s3:1048576']}",
    ]
    for program in ("md5sum", "sha256sum"):
        checked = subprocess.run([program, "-c"], input=found.stdout, cwd=tmp_path, capture_output=True, text=True)
        assert checked.returncode == 0 and checked.stdout == "archive.tar: OK\n", checked.stderr
    hashed = subprocess.run(["rclone", "hashsum", "crc32", tmp_path / "archive.tar"], capture_output=True, text=True)
    assert hashed.stdout == f"{wanted['crc32']}  archive.tar\n"
    facts = json.loads(run("digest", recorded, *options, "--json").stdout)
    assert facts["s3"] == [
        {"part_size": 65_536, "parts": -(-len(archive) // 65_536), "etag": wanted["s3:65536"]},
        {"part_size": 1 << 20, "parts": -(-len(archive) >> 20), "etag": wanted["s3:1048576"]},
    ]
    assert facts["s3_checksum"] == {
        "ChecksumCRC64NVME": in_base64(wanted["crc64nvme"]),
        "ChecksumCRC32C": in_base64(wanted["crc32c"]),
        "ChecksumCRC32": in_base64(wanted["crc32"]),
    }
    assert {name: facts[name] for name in ALGORITHMS} == {name: wanted[name] for name in ALGORITHMS}
    assert run("digest", recorded).stdout == f"SHA256 (archive.tar) = {wanted['sha256']}\n"


@pytest.mark.long
def test_sums_by_the_command(recorded: Path, tmp_path: Path) -> None:
    sums, state = tmp_path / "SHA256SUMS", tmp_path / "state"
    shown = run("digest", recorded, "--sums", "-")
    assert run("digest", recorded, "--sums", sums, "--state", state).returncode == 0
    assert sums.read_text() == shown.stdout
    assert (
        run("digest", recorded, "--sums", sums, "--state", state, "--force").returncode == 0
    )  # again, with nothing to go on from
    assert sums.read_text() == shown.stdout and sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "state"]
    checked = subprocess.run(["sha256sum", "-c", "--strict", sums], cwd=recorded.parent, capture_output=True)
    assert checked.returncode == 0
    (tmp_path / "folder").mkdir()
    for options in (["--sums", recorded / "x"], ["--state", recorded / "x"], ["--sums", "-", "-a", "md5"],
                    ["--sums", tmp_path / "one", "--state", tmp_path / "folder" / ".." / "one"],
                    ["--s3-part-size", "0"], ["--s3-part-size", "8MB"], ["-a", "crc16"]):  # fmt: skip
        result = run("digest", recorded, *options)
        assert result.returncode == 2 and "Traceback" not in result.stderr
    state.write_text("{}")
    result = run("digest", recorded, "--state", state)
    assert result.returncode == 2 and "remove it" in result.stderr


@pytest.mark.root
def test_on_a_full_disk(recorded: Path, tmp_path: Path) -> None:
    """One line that names the file, nothing half written, and the state that was there stays."""
    place = tmp_path / "tmpfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    try:
        state = place / "state"
        assert run("digest", recorded, "-a", "md5", "--state", state).returncode == 0
        before = state.read_bytes()
        (place / "filling").write_bytes(bytes(60 << 10))
        for options, name in ((["--sums", place / "sums"], "sums"), (["--state", state, "-a", "sha256"], "state")):
            result = run("digest", recorded, *options)
            assert (result.returncode, result.stdout) == (1, "")
            assert result.stderr == f"tartapefs: {place / name}: No space left on device\n"
            assert sorted(os.listdir(place)) == ["filling", "state"] and state.read_bytes() == before
    finally:
        umount(place)


@pytest.mark.long
def test_what_is_no_place_for_a_file(recorded: Path, tmp_path: Path) -> None:
    """A device, a pipe or a folder is not replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    for option in ("--sums", "--state"):
        for place in (Path("/dev/null"), Path("/dev/zero"), tmp_path, tmp_path / "pipe"):
            result = run("digest", recorded, option, place)
            assert result.returncode == 2 and "is not a regular file" in result.stderr
    assert Path("/dev/null").is_char_device()


@pytest.mark.long
@pytest.mark.needs("strace")
def test_killed_and_run_again(tmp_path: Path) -> None:
    """Terminated half way, it keeps what it reached; killed at random moments, it still ends with the right digests."""
    root = tmp_path / "many"
    root.mkdir()
    for number in range(3):
        (root / f"{number}").write_bytes(os.urandom(30_000_000))
    TapeRecorder(root).commit()
    archive = gnu_tar(root)[: Reference(root).size]
    state, sums, calls = tmp_path / "state", tmp_path / "sums", tmp_path / "calls"
    command = ["digest", root, "-a", "sha256", "-a", "crc32", "--s3-part-size", "1M", "--state", state, "--sums", sums]
    slowly = under_strace("-e", "trace=preadv,preadv2", "-e", "inject=preadv,preadv2:delay_enter=100000", log=calls)
    choose, last = random.Random(5), 0
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        with subprocess.Popen([*slowly, *map(os.fspath, command)], stderr=subprocess.DEVNULL) as process:
            # Who has read four chunks has hashed the first.
            wait_until(lambda: calls.exists() and calls.read_text().count(" = ") >= 4, 60)
            time.sleep(choose.random() / 3)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), number)
            process.wait(60)
        calls.unlink()
        reached = 0
        if state.exists():
            with SavedState(os.fspath(state), "digest") as kept:
                for record in kept.records():
                    reached = json.loads(record)["digests"]["sha256"]["position"]
        assert reached >= last
        if number != signal.SIGKILL:
            assert reached > 0 and not sums.exists()
        last = reached
    assert last >= 1 << 20
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"SHA256 (archive.tar) = {hashlib.sha256(archive).hexdigest()}"
    assert result.stdout.splitlines()[1] == f"CRC32 (archive.tar) = {slow_crc('crc32', archive)}"
    assert result.stdout.splitlines()[3].endswith(expected_etag(archive, 1 << 20))
    assert subprocess.run(["sha256sum", "-c", "--quiet", sums], cwd=tmp_path).returncode == 0


def test_drift_gives_no_digest(tree: Path, tmp_path: Path) -> None:
    TapeRecorder(tree).commit()
    (tree / "script.sh").write_bytes(b"shorter")
    result = run("digest", tree, "-a", "md5", "--s3-part-size", "1M", "--state", tmp_path / "state")
    assert result.returncode == 1 and result.stdout == "" and "script.sh" in result.stderr
