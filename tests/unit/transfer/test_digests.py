"""Digests of an archive: broken up, out of order, over sessions, against those of GNU tar's archive."""

import io
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.digests import PART_SIZES, expected, slow_crc
from support.programs import run
from support.reference import Reference, gnu_tar
from support.trees import odd_names

from tartapefs import Tape, TapeError, TapePlayer, TapeRecorder
from tartapefs.transfer.digests import ALGORITHMS, CRCS, Digests


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
    assert digests.results() == expected(archive, crcs=CRCS)
    assert seen[-1] == (len(archive), len(archive))


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
        assert all(list(digests.whole[crc].missing()) == [] for crc in CRCS)
        digests.complete(player)
        player.close()
    assert digests.results() == expected(archive, (65_536,), CRCS)


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
                digests = Digests(tape, ("md5", "sha256", "crc64nvme"), (1000, 1 << 20), out, state)
                try:
                    digests.complete(player, stop)
                except Stop:
                    continue
                break
        player.close()
    assert sessions == -(-len(archive) // (1 << 20)) + 1
    assert read == len(archive), "no byte was read twice"
    assert digests.results().items() <= expected(archive, (1000, 1 << 20), CRCS).items()
    files = sorted(path for path in recorded.rglob("*") if path.is_file() and not path.is_symlink())
    lines = sums.read_text().splitlines()
    assert len(lines) == len([path for path in files if ".tartape" not in path.parts])
    checked = subprocess.run(["sha256sum", "-c", "--strict", sums], cwd=recorded.parent, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_crcs_by_many_runs_in_any_order(recorded: Path, archive: bytes, tmp_path: Path) -> None:
    """Each run gives some pieces, of any size, and saves; what no run gave is read at the end, and nothing else."""
    state, choose, there = tmp_path / "state", random.Random(8), bytearray(len(archive))
    with Tape.discover(recorded) as tape:
        player = TapePlayer(tape)
        for _ in range(10):
            digests = Digests(tape, CRCS, state=state)
            for _ in range(5):
                at, count = choose.randrange(len(archive)), choose.randrange(200_000)
                digests.add(at, player.read(at, count))
                there[at : at + count] = b"1" * len(there[at : at + count])
            digests.save()
        read: list[int] = []
        digests = Digests(tape, ("crc32c",), state=state)  # those that are not asked for are kept
        digests.complete(player, lambda position, done: read.append(done))
        assert read[-1] == there.count(0)
        last = Digests(tape, CRCS, state=state)
        last.complete(player)
        player.close()
    wanted = {name: slow_crc(name, archive) for name in CRCS}
    assert digests.results() == {"crc32c": wanted["crc32c"]}
    assert last.results() == wanted and last.not_kept == ()


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
    assert "starts again each time: blake3; 1,048,576 bytes are read for that alone" in result.stderr
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


def test_without_openssl(recorded: Path, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its functions are not there, the whole begins anew, and the complete parts are kept."""
    monkeypatch.setattr("tartapefs.transfer.range_digests.is_resumable", lambda name: False)
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
