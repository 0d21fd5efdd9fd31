"""The command record: its output, options, refusals and interruptions."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.command_line import (
    BLOCK,
    a_tmpfs,
    at_work,
    fingerprint,
)
from support.programs import TARTAPEFS, done, quiet, refused, run, wait_until
from support.recordings import played
from support.reference import Reference, header
from support.users import give_to_nobody, tartapefs_as_nobody

from tartapefs.cli import record
from tartapefs.record import recorder


def test_an_empty_index_name_is_not_the_default(small: Path) -> None:
    """Nothing may be written into a source because a script's variable was empty."""
    for recorded in (False, True):
        result = run("record", small, "--force", "--index", "")
        quiet(result)
        assert result.returncode in (2, 4) and result.stdout == ""
        if not recorded:
            assert os.listdir(small) == ["file"]
            done(run("record", small))
            before = (small / ".tartape" / "index.db").stat()
    assert os.path.samestat((small / ".tartape" / "index.db").stat(), before)


def test_record_prints_the_fingerprint_and_nothing_else_on_stdout(small: Path) -> None:
    before = small.stat().st_mtime_ns
    result = run("record", small)
    assert done(result) == fingerprint(Reference(small)) + "\n"
    assert "2 members" in result.stderr and f"{Reference(small).size:,} bytes" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert small.stat().st_mtime_ns == before
    assert os.listdir(small / ".tartape") == ["index.db"]


def test_record_json(small: Path) -> None:
    os.mkfifo(small / "pipe")
    found = json.loads(done(run("record", small, "--json")))
    reference = Reference(small)
    assert found == {
        "fingerprint": fingerprint(reference),
        "total_size": reference.size,
        "member_count": 2,
        "index": str(small / ".tartape" / "index.db"),
        "valid_prefix": None,
        "left_out": 1,
        "skipped": [],
        "summary": {
            "further_names": 0,
            "further_bytes": 0,
            "sparse_files": 0,
            "sparse_bytes": 0,
            "other_owners": 0,
            "file_systems": 0,
            "with_attributes": 0,
        },
    }


def test_a_second_recording_needs_force(small: Path) -> None:
    """Exit 4 and the old recording stays; `--force` of the same archive keeps the time of recording."""
    first = done(run("record", small))
    before = (small / ".tartape" / "index.db").read_bytes()
    result = run("record", small)
    refused(result, 4)
    assert "already recorded" in result.stderr and "--force" in result.stderr
    assert (small / ".tartape" / "index.db").read_bytes() == before
    recorded = json.loads(done(run("info", small, "--json")))["recorded"]
    assert done(run("record", small, "--force")) == first
    assert json.loads(done(run("info", small, "--json")))["recorded"] == recorded
    (small / "file").write_bytes(b"other content")
    assert done(run("record", "--force", small)) == fingerprint(Reference(small)) + "\n" != first
    assert json.loads(done(run("info", small, "--json")))["recorded"] != recorded


def test_exclude_may_be_repeated(tmp_path: Path) -> None:
    """Patterns are those of .gitignore: by name anywhere, anchored by a slash, a folder with its content."""
    root = tmp_path / "root"
    (root / "build" / "deep").mkdir(parents=True)
    (root / "src" / "build").mkdir(parents=True)
    for name in ("a.log", "src/b.log", "build/deep/x", "src/build/kept", "kept.txt"):
        (root / name).write_text(name)
    done(run("record", root, "--exclude", "*.log", "--exclude", "/build/"))
    reference = Reference(root, left_out=(b"a.log", b"src/b.log", b"build"))
    assert b"root/src/build/kept" in reference.starts
    played = run("play", root, text=False, errors=None).stdout
    assert played == reference.read(0, reference.size)  # type: ignore[comparison-overlap]
    assert json.loads(done(run("info", root, "--json")))["excluded"] == ["*.log", "/build/"]


def names_of(root: Path) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(played(root))) as archive:
        return [member.name + "/" * member.isdir() for member in archive]


def test_exclude_from(tmp_path: Path) -> None:
    """As if each line was given by --exclude, before those that are; comments and empty lines are none."""
    root = tmp_path / "data"
    root.mkdir()
    for name in ("a.log", "keep.log", "#1", "b\udce4.tmp", "file"):
        (root / name).touch()
    patterns = tmp_path / "patterns"
    patterns.write_bytes(b"# of editors\n\n*.log\r\n\\#1\n   \nb\xe4.tmp")
    done(run("record", root, "--exclude", "!keep.log", "--exclude-from", patterns))
    names = ["data/", "data/file", "data/keep.log"]
    assert names_of(root) == names
    expected = ["*.log", "\\#1", "b\udce4.tmp", "!keep.log"]
    assert json.loads(done(run("info", root, "--json")))["excluded"] == expected
    (root / "other.log").touch()
    done(run("record", root, "--append"))
    done(run("record", root, "--force"))
    assert names_of(root) == names
    command = [*TARTAPEFS, "record", "--force", "--exclude-from", "-", root]
    subprocess.run(command, input=b"*\n!/file\n", check=True, capture_output=True)
    assert names_of(root) == ["data/", "data/file"]
    missing = run("record", root, "--force", "--exclude-from", tmp_path / "none")
    assert missing.returncode == 2 and "none: No such file or directory" in missing.stderr


def with_a_change(root: Path) -> None:
    (root / "file").write_bytes(b"changed")


def with_an_addition(root: Path) -> None:
    (root / "new").write_bytes(b"added")


@pytest.mark.parametrize(
    ("options", "is_recorded", "change"),
    [
        ([], False, with_an_addition),
        (["--digest", "sha256"], False, with_an_addition),
        ([], True, with_an_addition),
        (["--force"], True, with_a_change),
        (["--append"], True, with_an_addition),
        (["--append"], True, with_a_change),
        (["--append"], False, with_an_addition),
    ],
)
def test_dry_run(
    small: Path, tmp_path: Path, options: list[str], is_recorded: bool, change: Callable[[Path], None]
) -> None:
    """What it says and exits with is what the recording then says, but for the tense; and it writes nothing."""
    if is_recorded:
        done(run("record", small))
    change(small)
    (tmp_path / "temporary").mkdir()
    before = {path: (path.lstat(), path.is_file() and path.read_bytes()) for path in (small, *small.rglob("*"))}
    said = run("record", small, "-n", *options, env=os.environ | {"TMPDIR": os.fspath(tmp_path / "temporary")})
    after = {path: (path.lstat(), path.is_file() and path.read_bytes()) for path in (small, *small.rglob("*"))}
    assert {path: (found.st_mtime_ns, found.st_ino, data) for path, (found, data) in before.items()} == {
        path: (found.st_mtime_ns, found.st_ino, data) for path, (found, data) in after.items()
    }
    assert os.listdir(tmp_path / "temporary") == []
    real = run("record", small, *options)
    assert said.returncode == real.returncode
    assert real.stdout.splitlines()[:1] == said.stdout.splitlines()
    for would, did in (("would record", "recorded"), ("would have", "has"), ("would add", "added")):
        said.stderr = said.stderr.replace(would, did)
    assert [line for line in real.stderr.splitlines() if "sealed" not in line] == said.stderr.splitlines()


def test_dry_run_as_json(small: Path) -> None:
    found = json.loads(done(run("record", small, "--dry-run", "--json")))
    real = json.loads(done(run("record", small, "--json")))
    assert (found.pop("dry_run"), found.pop("index")) == (True, None)
    assert real.pop("index") == str(small / ".tartape" / "index.db")
    assert found == real


@pytest.mark.long(but=3)
@pytest.mark.parametrize(
    "pattern", ["!", "\\", "a\n\x1b[1m!", "[", "***", "", " ", "#", "/", "//", "!*", "a" * 5000, "[z-a]"]
)
def test_an_odd_pattern_is_a_pattern_or_wrong_usage(small: Path, pattern: str) -> None:
    result = run("record", small, "--exclude", pattern)
    quiet(result)
    assert result.returncode in (0, 2), result.stderr
    assert (small / ".tartape").exists() == (result.returncode == 0)


@pytest.mark.root
def test_keep_owners(small: Path) -> None:
    """Owners go into the headers; a number without a name has an empty name."""
    os.chown(small / "file", 0o1234567, 0o7654321 % 2**21)
    reference = Reference(small)
    kept = header(b"small/file", (small / "file").stat(), owner=(0o1234567, 0o7654321 % 2**21, "", ""))
    expected = hashlib.sha256(reference.read(0, BLOCK) + kept).hexdigest()
    assert done(run("record", small, "--keep-owners")).strip() == expected != fingerprint(reference)
    assert json.loads(done(run("info", small, "--json")))["owners"] == "kept"


def test_an_index_elsewhere_leaves_the_source_alone(small: Path, tmp_path: Path) -> None:
    before, index = small.stat(), tmp_path / "elsewhere.db"
    done(run("record", small, "--index", index))
    assert os.listdir(small) == ["file"]
    assert small.stat().st_ctime_ns == before.st_ctime_ns
    refused(run("info", small), 3)
    assert done(run("verify", small, "--index", index)) == ""
    found = json.loads(done(run("info", small, "--index", index, "--json")))
    assert found["index"] == str(index) and found["at_home"] is True
    assert done(run("ls", small, "--index", index)).count("\n") == 2
    played = run("play", small, "--index", index, text=False, errors=None).stdout
    assert played == Reference(small).read(0, 10**6)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("place", ["small/index.db", "small/below/index.db", "nowhere/index.db"])
def test_an_index_in_a_wrong_place_is_refused(small: Path, tmp_path: Path, place: str) -> None:
    """Inside the source it would change what it records; a folder for it is not made."""
    (small / "below").mkdir()
    result = run("record", small, "--index", place, cwd=tmp_path)
    refused(result, 4)
    assert "index" in result.stderr or "nowhere" in result.stderr
    assert sorted(os.listdir(small)) == ["below", "file"] and os.listdir(small / "below") == []
    assert os.listdir(tmp_path) == ["small"]


def test_what_does_not_fit_is_listed_in_one_go_and_nothing_written(small: Path) -> None:
    (small / ("n" * 120)).write_text("")
    (small / "long-link").symlink_to("t" * 101)
    (small / "line\nbreak").symlink_to("t" * 102)
    before = small.stat().st_mtime_ns
    result = run("record", small)
    refused(result, 4)
    *problems, summary, hint = result.stderr.splitlines()
    assert [problem.partition(": ")[0] for problem in problems] == ["line\\nbreak", "long-link", "n" * 120]
    assert "3" in summary and "nothing was written" in summary
    assert "--long-names" in hint
    assert not (small / ".tartape").exists() and small.stat().st_mtime_ns == before


@pytest.mark.long(but=1)
@pytest.mark.root
@pytest.mark.parametrize("room", ["size=64k", "size=8k", "nr_inodes=1"])
def test_a_full_disk_is_refused_and_leaves_nothing(many: Path, tmp_path: Path, room: str) -> None:
    with a_tmpfs(tmp_path / "disk", room) as disk:
        result = run("record", many, "--index", disk / "index.db")
        refused(result, 4)
        assert "No space left on device" in result.stderr and "nothing was written" in result.stderr
        assert os.listdir(disk) == []


@pytest.mark.root
def test_a_full_disk_keeps_the_old_recording(tmp_path: Path) -> None:
    with a_tmpfs(tmp_path / "disk", "size=128k") as disk:
        (disk / "file").write_bytes(b"content")
        first = done(run("record", disk))
        before = (disk / ".tartape" / "index.db").read_bytes()
        (disk / "fill").write_bytes(bytes(128 * 1024 - 3 * 4096 - len(before) // 4096 * 4096))
        with open(disk / "rest", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        refused(run("record", disk, "--force"), 4)
        assert os.listdir(disk / ".tartape") == ["index.db"]
        assert (disk / ".tartape" / "index.db").read_bytes() == before
        assert json.loads(done(run("info", disk, "--json")))["fingerprint"] == first.strip()


@pytest.mark.root
def test_what_cannot_be_read_is_refused_or_left_out_by_name(small: Path, public: Path) -> None:
    root = Path(shutil.copytree(small, public / "root"))
    (root / "folder").mkdir()
    (root / "folder" / "below").touch()
    (root / "secret\n1").write_text("x")
    give_to_nobody(root)
    (root / "secret\n1").chmod(0)
    (root / "folder").chmod(0)
    result = tartapefs_as_nobody("record", root)
    refused(result, 4)
    *problems, summary = result.stderr.splitlines()
    assert problems == ["folder: Permission denied", "secret\\n1: Permission denied"]
    assert "nothing was written" in summary and not (root / ".tartape").exists()

    result = tartapefs_as_nobody("record", root, "--skip-unreadable", "--json")
    found = json.loads(done(result))
    assert found["skipped"] == [
        {"path": "folder", "reason": "Permission denied"},
        {"path": "secret\n1", "reason": "Permission denied"},
    ]
    left_out = [line for line in result.stderr.splitlines() if "left out" in line]
    assert len(left_out) == 2 and "folder" in left_out[0] and "secret\\n1" in left_out[1]
    assert found["left_out"] == 2 and found["member_count"] == 2
    assert found["fingerprint"] == fingerprint(Reference(root, left_out=(b"folder", b"secret\n1")))


@pytest.mark.root
def test_a_folder_that_may_not_be_written_is_refused_unchanged(small: Path, public: Path) -> None:
    root = Path(shutil.copytree(small, public / "root"))
    before = root.stat()
    result = tartapefs_as_nobody("record", root)
    refused(result, 4)
    assert str(root) in result.stderr and f"tartapefs record {root} --index " in result.stderr
    assert os.listdir(root) == ["file"] and root.stat().st_mtime_ns == before.st_mtime_ns


def _in_the_middle(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Stops the recorder while it writes its index."""
    wait_until(lambda: folder.exists() and os.listdir(folder))
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: "(stopped)" in Path(f"/proc/{process.pid}/status").read_text())
    assert "index.db" not in os.listdir(folder), "the recording ended too early for this test"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_recording_leaves_nothing_behind(many: Path, number: int, code: int) -> None:
    before = many.stat().st_mtime_ns
    with at_work("record", many) as process:
        _in_the_middle(process, many / ".tartape")
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b"")
    assert b"Traceback" not in err and len(err.split()) <= 10
    assert not (many / ".tartape").exists() and many.stat().st_mtime_ns == before


def test_force_replaces_nothing_but_an_index(data: Path, tmp_path: Path) -> None:
    """A file of the user's that is no index stays as it is, and the line says why."""
    notes = tmp_path / "notes.txt"
    notes.write_text("dear diary")
    for options in ([], ["--force"]):
        result = run("record", data, "--index", notes, *options)
        refused(result, 4)
        assert "in the way" in result.stderr
    assert notes.read_text() == "dear diary"


def test_two_recordings_at_once(many: Path, tree: Path, tmp_path: Path) -> None:
    """The second is refused with exit 4; the first is not disturbed, and its interruption keeps the old index."""
    index = tmp_path / "tape" / "index"
    index.parent.mkdir()
    done(run("record", tree, "--index", index))
    old = index.read_bytes()
    with at_work("record", many, "--index", index, "--force") as process:
        wait_until(lambda: len(os.listdir(index.parent)) > 1)
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: "(stopped)" in Path(f"/proc/{process.pid}/status").read_text())
        result = run("record", many, "--index", index, "--force")
        refused(result, 4)
        assert "another recording" in result.stderr
        assert index.read_bytes() == old
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert index.read_bytes() == old and os.listdir(index.parent) == ["index"]


def test_the_progress_of_append_counts_what_is_added(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the tape has already; how much will be new is not known before."""
    done(run("record", small))
    (small / "another").write_bytes(b"content")
    told: list[tuple[int | None, int]] = []

    @contextmanager
    def progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        yield lambda done, note: told.append((total, done))

    monkeypatch.setattr(record, "progress", progress)
    monkeypatch.setattr(recorder, "_PROGRESS_EVERY", 1)
    record._append(str(small), None, {}, is_rehearsal=False, as_json=False)
    assert told[0] == (None, 1)
    assert told[-1] in ((None, 1), (None, 2))  # the file, and the root's new header if its time has moved
