"""The commands on a tape of several generations, against archives that were made without the code under test."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.digests import expected
from support.generations import Generations
from support.programs import done, run, under_strace, wait_until

from tartapefs import Tape, TapePlayer
from tartapefs.transfer.digests import CRCS, Digests

FOOTER = 1024


class Growing:
    """A folder that was recorded three times.

    root: the folder. indexes: as they were after each recording. archives: the expected ones.
    """

    def __init__(self, root: Path, indexes: Path, *options: str) -> None:
        self.root, self._place = root, indexes
        self._expected = Generations(root)
        self.archives: list[bytes] = []
        self.indexes: list[Path] = []
        done(run("record", root, *options))
        self._note()
        for number in range(2):
            self.grow(number)

    def grow(self, number: int) -> None:
        """Zeros are the last of what a generation has: behind them lies the footer."""
        (self.root / f"a new file {number}").write_bytes(os.urandom(70_000))
        (self.root / "photos" / f"new{number}").mkdir()
        (self.root / "photos" / f"new{number}" / "deep.bin").write_bytes(os.urandom(1000))
        (self.root / f"zz{number}").write_bytes(bytes(5000))
        for folder in (self.root, self.root / "photos"):
            os.utime(folder, (0, 10**9 + number))
        done(run("record", self.root, "--append"))
        self._note()

    def _note(self) -> None:
        self.archives.append(self._expected.append())
        index = self._place / f"index{len(self.archives)}.db"
        shutil.copyfile(self.root / ".tartape" / "index.db", index)
        self.indexes.append(index)

    @property
    def starts(self) -> list[int]:
        return [0, *self._expected.ends]

    def members(self) -> list[tarfile.TarInfo]:
        with tarfile.open(fileobj=io.BytesIO(self.archives[-1])) as tar:
            return tar.getmembers()


@pytest.fixture
def growing(tree: Path, tmp_path: Path) -> Growing:
    return Growing(tree, tmp_path)


def as_json(*command: object) -> Any:
    return json.loads(done(run(*command, "--json")))


def generation_of(growing: Growing, member: tarfile.TarInfo) -> int:
    return sum(start <= member.offset for start in growing.starts[:-1])


def test_ls_and_locate(growing: Growing) -> None:
    members = growing.members()
    latest = {member.name: member.offset for member in members}
    listed = [json.loads(line) for line in done(run("ls", growing.root, "--json")).splitlines()]
    assert [(m["path"], m["start"], m["generation"], m["superseded"]) for m in listed] == [
        (m.name, m.offset, generation_of(growing, m), latest[m.name] != m.offset) for m in members
    ]
    assert [member["superseded"] for member in listed].count(True) == 4
    assert len(done(run("ls", growing.root)).splitlines()) == len(members)
    found = as_json("locate", growing.root, "data/photos")
    assert (found["start"], found["generation"], found["superseded"]) == (latest["data/photos"], 3, False)
    found = as_json("locate", growing.root, "0")
    assert (found["member"]["path"], found["member"]["generation"], found["member"]["superseded"]) == ("data", 1, True)


def test_diff_of_an_extension(growing: Growing) -> None:
    size, members = len(growing.archives[-1]), growing.members()
    for at, (index, archive) in enumerate(zip(growing.indexes[:-1], growing.archives, strict=False), 1):
        result = run("diff", index, growing.root)
        added = sum(generation_of(growing, member) > at for member in members)
        assert result.returncode == 1
        assert result.stdout.splitlines()[-1] == (
            f"{growing.root} extends {index} by {added} members, {size - len(archive):,} bytes;"
            f" copies stay valid up to byte {len(archive) - FOOTER}"
        )
        assert json.loads(run("diff", index, growing.root, "--json").stdout.splitlines()[-1])["extends"] is True
    backwards = json.loads(run("diff", growing.root, growing.indexes[0], "--json").stdout.splitlines()[-1])
    assert (backwards.get("extends"), backwards["valid_prefix"]) == (None, len(growing.archives[0]) - FOOTER)


def test_diff_of_what_is_no_extension(growing: Growing) -> None:
    """Recorded anew with another content in front, and then appended to: nothing extends what was there."""
    (growing.root / "empty.txt").write_bytes(bytes(1))
    done(run("record", growing.root, "--force"))
    growing.grow(2)
    result = run("diff", growing.indexes[0], growing.root, "--json")
    assert not json.loads(result.stdout.splitlines()[-1]).get("extends")


def test_a_copy_of_the_archive_before(growing: Growing, tmp_path: Path) -> None:
    """`check` says so; `resume` writes what was added, and no more."""
    copy, archive = tmp_path / "copy.tar", growing.archives[-1]
    for at, before in enumerate(growing.archives[:-1], 1):
        end = len(before) - FOOTER
        copy.write_bytes(before)
        for options in ([], ["--full"], ["--no-source"]):
            result = run("check", growing.root, copy, "--json", *options)
            facts = json.loads(result.stdout)
            assert (result.returncode, facts["good"], facts["wrong"], facts["generation"]) == (1, end, end, at)
        with copy.open("rb") as stream:
            streamed = run("check", growing.root, "-", "--json", stdin=stream)
        assert json.loads(streamed.stdout)["generation"] == at
        assert f"generation    {at}: " in run("check", growing.root, copy).stdout
        result = run("resume", growing.root, copy, "--json")
        facts = json.loads(done(result))
        assert (facts["resumed_from"], facts["complete"]) == (end, True)
        assert f"complete up to generation {at} of 3; its footer is cut" in result.stderr
        assert copy.read_bytes() == archive
    assert as_json("check", growing.root, copy)["generation"] is None


@pytest.mark.parametrize("break_it", ["last byte", "longer", "shorter", "in the middle"])
def test_what_is_no_copy_of_the_archive_before(growing: Growing, tmp_path: Path, break_it: str) -> None:
    copy, before = tmp_path / "copy.tar", growing.archives[0]
    changed = bytearray(before)
    if break_it == "in the middle":
        changed[100_000] ^= 1
    content = {"last byte": before[:-1] + b"x", "longer": before + bytes(512), "shorter": before[:-512]}
    copy.write_bytes(content.get(break_it, bytes(changed)))
    result = run("check", growing.root, copy, "--json")
    assert (result.returncode, json.loads(result.stdout)["generation"]) == (1, None)
    with copy.open("rb") as stream:
        streamed = run("check", growing.root, "-", "--json", stdin=stream)
    assert json.loads(streamed.stdout)["generation"] is None
    done(run("resume", growing.root, copy))
    assert copy.read_bytes() == growing.archives[-1]


@pytest.mark.needs("dd")
def test_hints_cut_the_footer(growing: Growing, tmp_path: Path) -> None:
    copy, whole = tmp_path / "copy.tar", tmp_path / "archive.tar"
    whole.write_bytes(growing.archives[-1])
    for before in growing.archives[:-1]:
        copy.write_bytes(before)
        command = ["resume-hint", growing.root, "--have", str(len(before)), "--archive", whole, "--copy", copy]
        result = run(*command, "--json")
        facts = json.loads(done(result))
        assert facts["have"] == len(before) - FOOTER
        assert "footer of generation" in result.stderr
        assert all(f"truncate -s {len(before) - FOOTER} " in facts["commands"][name] for name in ("dd", "rsync"))
        subprocess.run(["sh", "-c", facts["commands"]["dd"]], check=True, capture_output=True)
        assert copy.read_bytes() == growing.archives[-1]
    behind = growing.starts[1] + FOOTER + 1
    facts = as_json("resume-hint", growing.root, "--have", str(behind), "--archive", whole, "--copy", copy)
    assert facts["have"] == behind


@pytest.mark.parametrize("part_size", [1 << 16, 0])
def test_digests_go_on_across_an_append(growing: Growing, tmp_path: Path, part_size: int) -> None:
    """Only what was added is read, and the last part; a digest that is not asked for now is kept."""
    state, sizes = tmp_path / "state", (part_size,) if part_size else ()
    before = end = 0
    for number in (2, 3, 4):
        archive = growing.archives[-1]
        with Tape.discover(growing.root) as tape, closing(TapePlayer(tape)) as player:
            algorithms = ("sha256", "crc64nvme") if number == 3 else ("sha256", "crc64nvme", "crc32", "md5")
            digests = Digests(tape, algorithms, sizes, state=state)
            begun = end if number < 4 else before
            low = min(begun, end // part_size * part_size) if part_size else begun
            assert digests.missing() == [(low, len(archive))]
            digests.complete(player)
        assert digests.results()["sha256"] == hashlib.sha256(archive).hexdigest()
        assert digests.results().items() <= expected(archive, sizes, CRCS).items()
        before, end = end, len(archive) - FOOTER
        growing.grow(number)


def test_a_state_of_another_recording_is_none_of_a_generation(growing: Growing, tmp_path: Path) -> None:
    """Its headers are the same, and a content is another."""
    state = tmp_path / "state"
    path = growing.root / "photos" / "5000.bin"
    found = path.stat()
    path.write_bytes(os.urandom(5000))
    os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns))
    done(run("record", growing.root, "--force"))
    done(run("digest", growing.root, "--state", state))
    path.write_bytes(os.urandom(5000))
    os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns))
    done(run("record", growing.root, "--force"))
    growing.grow(2)
    result = run("digest", growing.root, "--state", state)
    assert (result.returncode, "another recording" in result.stderr) == (2, True)


def test_sums_go_on_across_an_append(growing: Growing, tmp_path: Path) -> None:
    """Each file has one line, in the order of the archive."""
    state, file = tmp_path / "state", tmp_path / "SHA256SUMS"
    for number in (2, 3):
        done(run("digest", growing.root, "--sums", file, "--state", state, "--force"))
        names = [member.name for member in growing.members() if member.isfile()]
        assert [line.split("  ", 1)[1] for line in file.read_text().splitlines()] == names
        subprocess.run(["sha256sum", "-c", "--quiet", file], cwd=growing.root.parent, check=True)
        end = len(growing.archives[-1]) - FOOTER
        growing.grow(number)
        with Tape.discover(growing.root) as tape, file.open("rb+") as out:
            first = next(member for member in tape.members(end) if member.is_file)
            assert Digests(tape, sums=out, state=state).missing() == [(first.start + 512, tape.total_size)]


def test_a_sealed_tape(tree: Path, tmp_path: Path) -> None:
    """Members and folders out of a copy; what GNU tar extracted; all contents; what to expect; digests' state."""
    growing = Growing(tree, tmp_path, "--digest", "sha256")
    state = tmp_path / "state"
    done(run("digest", tree, "--state", state))
    growing.grow(2)
    archive = growing.archives[-1]
    assert as_json("digest", tree, "--state", state)["sha256"] == hashlib.sha256(archive).hexdigest()
    assert as_json("verify", tree, "--deep")["valid"] is True
    facts = as_json("info", tree)
    for digest in (facts["seal"], facts["fingerprint"]):
        assert as_json("verify", tree, "--expect", digest)["valid"] is True
    old = as_json("info", tree, "--index", growing.indexes[0])
    result = run("verify", tree, "--expect", old["seal"])
    assert (result.returncode, "another seal since each was appended" in result.stderr) == (1, True)
    copy, place = tmp_path / "copy.tar", tmp_path / "extracted"
    copy.write_bytes(archive)
    place.mkdir()
    done(run("extract", tree, copy, "data/photos", "data/a new file 1", "-C", place))
    compare(tree / "photos", place / "data" / "photos")
    assert (place / "data" / "a new file 1").read_bytes() == (tree / "a new file 1").read_bytes()
    shutil.rmtree(place)
    place.mkdir()
    subprocess.run(["tar", "-xpf", copy, "-C", place, "--delay-directory-restore"], check=True)
    assert as_json("verify-extracted", tree, place)["drift"] == []
    (place / "data" / "photos" / "new0" / "more").touch()
    (place / "data" / "photos" / "new2" / "deep.bin").write_bytes(bytes(1000))
    (place / "data" / "more").mkdir()
    (place / "data" / "zz1").unlink()
    drift = json.loads(run("verify-extracted", tree, place, "--json", "--ignore", "mtime").stdout)["drift"]
    assert {found["member"] for found in drift} == {
        "data/photos/new0/more", "data/photos/new2/deep.bin", "data/more", "data/zz1",
    }  # fmt: skip


@pytest.mark.fuse
def test_the_fingerprint_of_an_earlier_generation(growing: Growing, tmp_path: Path) -> None:
    """What was expected is named, wherever it is; and the exit code is that of another tape."""
    (tmp_path / "copy.tar").write_bytes(growing.archives[-1])
    (tmp_path / "place").mkdir()
    facts = as_json("info", growing.root)
    for number, generation in enumerate(facts["generations"][:-1], 1):
        says = f"that is generation {number} of 3, the archive up to byte {growing.starts[number]:,}: "
        for command, *more in (["mount", tmp_path / "place"], ["check", tmp_path / "copy.tar"], ["verify"], ["play"]):
            result = run(command, growing.root, *more, "--expect", generation["fingerprint"])
            assert (result.returncode, says in result.stderr) == (1, True), result.stderr
    result = run("verify", growing.root, "--expect", "0" * 64)
    assert (result.returncode, "generation" in result.stderr) == (1, False)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("options", [(), ("--digest", "sha256")])
def test_an_append_reads_no_file_that_was_there(tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Of a sealed tape what is new alone."""
    growing = Growing(tree, tmp_path, *options)
    log = tmp_path / "calls.log"
    (tree / "photos" / "one more").write_bytes(os.urandom(3000))
    command = [*under_strace("-y", "-e", "trace=read,pread64,readv,preadv,preadv2,mmap", log=log), "record", "--append"]
    subprocess.run([*command, tree], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    read = {name.rpartition("/")[2] for name in re.findall(rf"<{tree}/([^>]*)>", log.read_text())}
    assert any(name.startswith("index.db") for name in read)
    assert not read & {member.name.rpartition("/")[2] for member in growing.members() if member.isfile()}
    assert ("one more" in read) == bool(options)


@pytest.mark.parametrize("appended", [0, 1])
def test_a_digest_that_was_begun_before_the_tape_was_sealed(tree: Path, tmp_path: Path, appended: int) -> None:
    """It goes on: after the seal, and what was added then."""
    state = tmp_path / "state"
    growing = Growing(tree, tmp_path)
    if not appended:
        done(run("record", tree, "--force"))
        growing.archives[:] = [Generations(tree).append()]
    done(run("digest", tree, "--state", state, "--algorithm", "sha256"))
    end = len(growing.archives[-1]) - FOOTER
    done(run("seal", tree, "--digest", "sha256"))
    (tree / "zzz added").write_bytes(os.urandom(3000))
    done(run("record", tree, "--append"))
    with Tape.discover(tree) as tape, closing(TapePlayer(tape)) as player:
        digests = Digests(tape, ("sha256",), state=state)
        assert digests.missing() == [(end, tape.total_size)]
        digests.complete(player)
        assert digests.results()["sha256"] == hashlib.sha256(player.read(0, tape.total_size)).hexdigest()


def compare(one: Path, other: Path) -> None:
    """Equal contents, modes and times."""
    result = subprocess.run(["rsync", "-rlptni", "--delete", "--checksum", f"{one}/", other], capture_output=True)
    assert (result.returncode, result.stdout) == (0, b""), result.stdout


def test_sealed_later(growing: Growing) -> None:
    done(run("seal", growing.root, "--digest", "sha256"))
    assert as_json("verify", growing.root, "--deep")["valid"] is True
    growing.grow(2)
    assert as_json("verify", growing.root, "--deep")["valid"] is True
    played = run("play", growing.root, text=False, errors=None).stdout
    assert played == growing.archives[-1]  # type: ignore[comparison-overlap]


@pytest.mark.fuse
def test_appended_while_mounted(growing: Growing, mount: Callable[..., Path]) -> None:
    """The mount goes on with the archive that it has; the next one has what was added, behind the same bytes."""
    archive = mount(growing.root, "--allow-additions")
    before = growing.archives[-1]
    with archive.open("rb") as file:
        assert file.read(100_000) == before[:100_000]
        growing.grow(2)
        assert file.read() == before[100_000:]
    assert archive.read_bytes() == before
    assert as_json("status", archive.parent)["state"] == "valid"
    after = mount(growing.root)
    assert after.read_bytes() == growing.archives[-1]
    assert growing.archives[-1].startswith(before[:-FOOTER])


@pytest.mark.fuse
def test_mounted(growing: Growing, mount: Callable[..., Path]) -> None:
    archive = mount(growing.root)
    assert archive.read_bytes() == growing.archives[-1]
    wait_until(lambda: as_json("status", archive.parent)["delivered"] == len(growing.archives[-1]))
    assert as_json("status", archive.parent)["state"] == "valid"
