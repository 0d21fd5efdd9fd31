"""Digests: against those of the archive as GNU tar and `tarfile` make it; broken up, out of order, over sessions."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import run, umount, under_strace, wait_until
from support.reference import Reference, gnu_tar
from support.trees import odd_names

from tartapefs import Tape, TapeError, TapePlayer, TapeRecorder
from tartapefs.base import resumable_hash as hashstate
from tartapefs.base.outputs import State
from tartapefs.transfer.digests import Digests
from tartapefs.transfer.range_digests import ALGORITHMS, PartDigests, etag

PART_SIZES = (1, 1000, 65_536, 1 << 20, 1 << 40)


def expected_etag(archive: bytes, size: int) -> str:
    """As the S3 documentation has it."""
    md5s = [hashlib.md5(archive[at : at + size]).digest() for at in range(0, len(archive), size)]
    return f"{hashlib.md5(b''.join(md5s)).hexdigest()}-{len(md5s)}"


def expected(archive: bytes, part_sizes: tuple[int, ...] = PART_SIZES[1:]) -> dict[str, str]:
    whole = {
        "md5": hashlib.md5(archive).hexdigest(),
        "sha256": hashlib.sha256(archive).hexdigest(),
        "blake3": blake3.blake3(archive).hexdigest(),
    }
    return whole | {f"s3:{size}": expected_etag(archive, size) for size in part_sizes}


@pytest.fixture
def recorded(tree: Path) -> Path:
    (tree / "larger.bin").write_bytes(os.urandom(3_000_001))
    TapeRecorder(tree).commit()
    return tree


@pytest.fixture
def archive(recorded: Path) -> bytes:
    made = gnu_tar(recorded)
    reference = Reference(recorded)
    assert made[: reference.size] == reference.read(0, reference.size)
    return made[: reference.size]


def test_all_in_one_pass(recorded: Path, archive: bytes) -> None:
    with Tape.discover(recorded) as tape:
        player = TapePlayer(tape)
        seen: list[tuple[int, int]] = []
        digests = Digests(tape, ALGORITHMS, PART_SIZES[1:])
        digests.complete(player, lambda position, done: seen.append((position, done)))
        player.close()
    assert digests.results() == expected(archive)
    assert seen[-1] == (len(archive), len(archive))


def test_etag_of_tiny_parts() -> None:
    archive = os.urandom(1536)
    for size in (1, 7, 512, 1535, 1536, 1537):
        parts = PartDigests(size, len(archive))
        parts.add(0, archive)
        assert parts.hexdigest() == expected_etag(archive, size) == etag(parts.md5s[n] for n in range(parts.count))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_in_any_order_with_repeats(data: st.DataObject) -> None:
    """Pieces at random, in any order, some twice: the parts that got all their bytes in order are complete and right,
    and what is missing is told exactly enough that giving it completes every digest."""
    archive = random.Random(1).randbytes(data.draw(st.integers(1536, 4000)))
    size = data.draw(st.integers(1, 5000))
    parts = PartDigests(size, len(archive), data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(0, 12))):
        at = data.draw(st.integers(0, len(archive) - 1))
        parts.add(at, archive[at : at + data.draw(st.integers(0, 2000))])
    for number, md5 in parts.md5s.items():
        assert md5 == hashlib.md5(archive[number * size : (number + 1) * size]).digest()
    again = PartDigests(size, len(archive), True)
    again.load(json.loads(json.dumps(parts.save())))
    assert list(again.missing()) <= list(parts.missing()) or not parts._may_be_saved
    for one in (parts, again):
        for start, stop in list(one.missing()):
            one.add(start, archive[start:stop])
        assert one.hexdigest() == expected_etag(archive, size)


def test_by_several_readers_at_once(recorded: Path, archive: bytes) -> None:
    """Eight readers take pieces of it in random order; then only what is still missing is read."""
    with Tape.discover(recorded) as tape:
        player = TapePlayer(tape)
        digests = Digests(tape, ALGORITHMS, (65_536,))
        pieces = list(range(0, tape.total_size, 65_536))
        random.Random(7).shuffle(pieces)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda at: digests.add(at, player.read(at, 65_536)), pieces))
        assert len(digests.parts[65_536].md5s) == len(pieces)
        digests.complete(player)
        player.close()
    assert digests.results() == expected(archive, (65_536,))


class Stop(Exception):
    pass


def test_over_many_sessions(recorded: Path, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after every megabyte: each session goes on where the last one stopped, the sums of members too."""
    state, sums, read, sessions = tmp_path / "state", tmp_path / "sums", 0, 0
    with Tape.discover(recorded) as tape:
        player = TapePlayer(tape)
        while True:
            sessions += 1
            before = read

            def stop(position: int, done: int, before: int = before) -> None:
                nonlocal read
                read = before + done
                if done < len(archive):
                    raise Stop

            with open(sums, "ab+") as out:
                digests = Digests(tape, ("md5", "sha256"), (1000, 1 << 20), out, state)
                try:
                    digests.complete(player, stop)
                except Stop:
                    continue
                break
        player.close()
    assert sessions == -(-len(archive) // (1 << 20)) + 1
    assert read == len(archive), "no byte was read twice"
    assert digests.results().items() <= expected(archive, (1000, 1 << 20)).items()
    files = sorted(path for path in recorded.rglob("*") if path.is_file() and not path.is_symlink())
    lines = sums.read_text().splitlines()
    assert len(lines) == len([path for path in files if ".tartape" not in path.parts])
    checked = subprocess.run(["sha256sum", "-c", "--strict", sums], cwd=recorded.parent, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_blake3_begins_anew(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """It cannot be saved half way, is named as such, and still comes out right."""

    def stop(position: int, done: int) -> None:
        raise Stop

    with Tape.discover(recorded) as tape:
        player = TapePlayer(tape)
        first = Digests(tape, ("sha256", "blake3"), state=tmp_path / "state")
        assert first.not_kept == ("blake3",)
        with pytest.raises(Stop):
            first.complete(player, stop)
        shutil.copy(tmp_path / "state", tmp_path / "state of the command")
        second = Digests(tape, ("sha256", "blake3"), state=tmp_path / "state")
        assert second.read_again == 1 << 20
        assert next(second.whole["sha256"].missing())[0] == 1 << 20
        assert second.missing() == [(0, len(archive))]
        second.complete(player)
        third = Digests(tape, ("sha256", "blake3"), state=tmp_path / "state")
        assert third.missing() == []  # what is complete is kept, BLAKE3 too
        player.close()
    assert second.results() == third.results()
    assert third.results().items() <= expected(archive).items()
    options = ["-a", "sha256", "-a", "blake3", "--state", tmp_path / "state of the command"]
    result = run("digest", recorded, *options)
    assert "begins anew each time: blake3; 1,048,576 bytes are read for that alone" in result.stderr
    assert f"BLAKE3 (archive.tar) = {third.results()['blake3']}\n" in result.stdout
    assert f"SHA256 (archive.tar) = {third.results()['sha256']}\n" in result.stdout


def test_state_of_another_recording(recorded: Path, tmp_path: Path) -> None:
    """A content of the same second has the same headers and another state."""
    with Tape.discover(recorded) as tape:
        Digests(tape, ("md5",), state=tmp_path / "state").save()
        fingerprint = tape.fingerprint
    path = recorded / "photos" / "5000.bin"
    found = path.stat()
    path.write_bytes(os.urandom(5000))
    os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns))
    assert TapeRecorder(recorded, overwrite=True).commit() == fingerprint
    with Tape.discover(recorded) as tape, pytest.raises(TapeError, match="another recording"):
        Digests(tape, ("md5",), state=tmp_path / "state")


def test_damaged_states(recorded: Path, tmp_path: Path) -> None:
    """No changed byte of a state is believed, and none ends otherwise than with one clear error."""
    state = tmp_path / "state"
    with Tape.discover(recorded) as tape:
        digests = Digests(tape, ("md5", "sha256"), (1 << 16,), state=state)
        digests.add(0, bytes(100_000))
        digests.save()
        sound = state.read_bytes()
        choose = random.Random(3)
        for _ in range(300):
            damaged = bytearray(sound)
            damaged[choose.randrange(len(sound))] ^= 1 << choose.randrange(8)
            state.write_bytes(damaged)
            with pytest.raises(TapeError, match="remove it"):
                Digests(tape, ("md5", "sha256"), (1 << 16,), state=state)
        for damaged in (b"", b"[]", b"{}", b"null", sound[:-1], sound + sound, b"[" * 100_000, b"\xff"):
            state.write_bytes(damaged)
            with pytest.raises(TapeError, match="remove it"):
                Digests(tape, ("md5",), state=state)


def test_sums_of_odd_names(tmp_path: Path) -> None:
    """`sha256sum -c` finds every file of the extracted archive, whatever its name."""
    root = tmp_path / "odd"
    root.mkdir()
    odd_names(root)
    (root / "empty").write_bytes(b"")
    (root / "zz empty").write_bytes(b"")
    TapeRecorder(root).commit()
    out = io.BytesIO()
    with Tape.discover(root) as tape:
        player = TapePlayer(tape)
        Digests(tape, sums=out).complete(player)
        files = sum(member.is_file for member in tape.members())
        subprocess.run(["tar", "-xf", "-"], input=player.read(0, tape.total_size), cwd=tmp_path, check=True)
        player.close()
    (tmp_path / "SHA256SUMS").write_bytes(out.getvalue())
    result = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b": OK\n") == files == out.getvalue().count(b"\n")


@given(st.sampled_from(("md5", "sha256")), st.binary(max_size=300), st.binary(max_size=300), st.booleans())
def test_saved_hashes(name: str, first: bytes, second: bytes, writable: bool) -> None:
    """Saved after any byte and restored, they give what hashlib gives."""
    begun = hashstate.SavableHash(name)
    begun.update(bytearray(first) if writable else first)
    restored = hashstate.SavableHash.restore(name, begun.save())
    restored.update(memoryview(second))
    assert restored.hexdigest() == hashlib.new(name, first + second).hexdigest()
    assert begun.hexdigest() == hashlib.new(name, first).hexdigest()


@pytest.mark.parametrize("state", ["", "x", ":", "::", "00:0:", "0" * 64 + ":1:", "0" * 64 + ":-64:", "g" * 64 + ":0:"])
def test_no_state_of_a_hash(state: str) -> None:
    with pytest.raises(ValueError):
        hashstate.SavableHash.restore("sha256", state)


def test_counts_beyond_4_gib() -> None:
    """The number of bits takes both words of OpenSSL's struct."""
    zeros = bytes(1 << 24)
    begun, plain = hashstate.SavableHash("md5"), hashlib.md5()
    for _ in range(33):  # 528 MiB are more than 2^32 bits
        begun.update(zeros)
        plain.update(zeros)
    assert int(begun.save().split(":")[1]) == 33 << 24
    restored = hashstate.SavableHash.restore("md5", begun.save())
    restored.update(b"end")
    plain.update(b"end")
    assert restored.hexdigest() == plain.hexdigest()


def test_without_openssl(recorded: Path, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its functions are not there, the whole begins anew, and the complete parts are kept."""
    monkeypatch.setattr("tartapefs.transfer.range_digests.savable", lambda name: False)
    with Tape.discover(recorded) as tape:
        player = TapePlayer(tape)
        first = Digests(tape, ("md5",), (1 << 16,), state=tmp_path / "state")
        first.add(0, archive[: 5 << 16])
        first.save()
        second = Digests(tape, ("md5",), (1 << 16,), state=tmp_path / "state")
        assert len(second.parts[1 << 16].md5s) == 5
        second.complete(player)
        player.close()
    assert second.results().items() <= expected(archive, (1 << 16,)).items()


def test_the_command(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """Its lines are what `sha256sum -c` and `md5sum -c` read; --json has the same."""
    (tmp_path / "archive.tar").write_bytes(archive)
    options = ["-a", "md5", "-a", "sha256", "-a", "blake3", "--s3-part-size", "64KiB", "--s3-part-size", "1M"]
    found = run("digest", recorded, *options)
    assert found.returncode == 0, found.stderr
    wanted = expected(archive, (65_536, 1 << 20))
    assert found.stdout.splitlines() == [
        f"MD5 (archive.tar) = {wanted['md5']}",
        f"SHA256 (archive.tar) = {wanted['sha256']}",
        f"BLAKE3 (archive.tar) = {wanted['blake3']}",
        f"S3-ETAG-65536 (archive.tar) = {wanted['s3:65536']}",
        f"S3-ETAG-1048576 (archive.tar) = {wanted['s3:1048576']}",
    ]
    for program in ("md5sum", "sha256sum"):
        checked = subprocess.run([program, "-c"], input=found.stdout, cwd=tmp_path, capture_output=True, text=True)
        assert checked.returncode == 0 and checked.stdout == "archive.tar: OK\n", checked.stderr
    facts = json.loads(run("digest", recorded, *options, "--json").stdout)
    assert facts["s3"] == [
        {"part_size": 65_536, "parts": -(-len(archive) // 65_536), "etag": wanted["s3:65536"]},
        {"part_size": 1 << 20, "parts": -(-len(archive) >> 20), "etag": wanted["s3:1048576"]},
    ]
    assert {name: facts[name] for name in ALGORITHMS} == {name: wanted[name] for name in ALGORITHMS}
    assert run("digest", recorded).stdout == f"SHA256 (archive.tar) = {wanted['sha256']}\n"


def test_sums_by_the_command(recorded: Path, tmp_path: Path) -> None:
    sums, state = tmp_path / "SHA256SUMS", tmp_path / "state"
    shown = run("digest", recorded, "--sums", "-")
    assert run("digest", recorded, "--sums", sums, "--state", state).returncode == 0
    assert sums.read_text() == shown.stdout
    assert (
        run("digest", recorded, "--sums", sums, "--state", state, "--force").returncode == 0
    )  # again, with nothing to go on from
    assert sums.read_text() == shown.stdout and sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "data", "state"]
    checked = subprocess.run(["sha256sum", "-c", "--strict", sums], cwd=recorded.parent, capture_output=True)
    assert checked.returncode == 0
    for options in (["--sums", recorded / "x"], ["--state", recorded / "x"], ["--sums", "-", "-a", "md5"],
                    ["--sums", tmp_path / "one", "--state", tmp_path / "data" / ".." / "one"],
                    ["--s3-part-size", "0"], ["--s3-part-size", "8MB"], ["-a", "crc32"]):  # fmt: skip
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


def test_what_is_no_place_for_a_file(recorded: Path, tmp_path: Path) -> None:
    """A device, a pipe or a folder is not replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    for option in ("--sums", "--state"):
        for place in (Path("/dev/null"), Path("/dev/zero"), tmp_path, tmp_path / "pipe"):
            result = run("digest", recorded, option, place)
            assert result.returncode == 2 and "is not a regular file" in result.stderr
    assert Path("/dev/null").is_char_device()


def test_sums_that_another_began(recorded: Path, tmp_path: Path) -> None:
    """A state is no reason to believe the beginning of another file."""
    state = tmp_path / "state"
    with Tape.discover(recorded) as tape, open(tmp_path / "sums", "ab+") as out, open(tmp_path / "x", "ab+") as other:
        player = TapePlayer(tape)
        first = Digests(tape, sums=out, state=state)
        first.add(0, player.read(0, 3_300_000))
        first.save()
        assert out.tell() > 200
        other.write(b"0" * out.tell())
        again = Digests(tape, sums=other, state=state)
        assert again.missing()[0][0] < 10_000
        again.complete(player)
        Digests(tape, sums=out).complete(player)
        player.close()
    assert (tmp_path / "x").read_bytes() == (tmp_path / "sums").read_bytes()


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
    command = ["digest", root, "-a", "sha256", "--s3-part-size", "1M", "--state", state, "--sums", sums]
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
            with State(os.fspath(state), "digest") as kept:
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
    assert result.stdout.splitlines()[1].endswith(expected_etag(archive, 1 << 20))
    assert subprocess.run(["sha256sum", "-c", "--quiet", sums], cwd=tmp_path).returncode == 0


def test_drift_gives_no_digest(recorded: Path, tmp_path: Path) -> None:
    (recorded / "larger.bin").write_bytes(b"shorter")
    result = run("digest", recorded, "-a", "md5", "--s3-part-size", "1M", "--state", tmp_path / "state")
    assert result.returncode == 1 and result.stdout == "" and "larger.bin" in result.stderr
