"""Options: what a recording leaves out, and what it takes over from the recording that it replaces."""

import json
import mmap
import os
import random
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.filesystems import mounted
from support.programs import run
from support.recordings import assert_recorded

from tartapefs import Tape, TapeConstraintError, TapePlayer, TapeRecorder
from tartapefs.source.folder import Source
from tartapefs.verify.seal import seal

OLD_NS = 1_600_000_000_000_000_000
BLOCK_SIZE = 1 << 16


def info(root: Path) -> tuple[list[str], str, str | None]:
    """What is excluded, what becomes of owners, and the digests."""
    facts = json.loads(run("info", root, "--json").stdout)
    return facts["excluded"], facts["owners"], facts["digests"] and facts["digests"].split(",")[0]


@pytest.fixture
def options(tree: Path) -> Path:
    """A folder that was recorded with options."""
    (tree / "x.tmp").write_bytes(b"left out")
    recorded = run("record", tree, "--exclude", "*.tmp", "--exclude", "/a b", "--keep-owners", "--digest", "sha256")
    assert recorded.returncode == 0, recorded.stderr
    return tree


TAKEN: dict[str, tuple[list[str], tuple[list[str], str, str | None], list[str]]] = {
    "all": ([], (["*.tmp", "/a b"], "kept", "sha256"), [
        """as recorded before: --exclude '*.tmp' --exclude '/a b', --keep-owners, --digest sha256"""
        """ ("--no-exclude", "--no-keep-owners", "--no-digest" to drop)""",
    ]),
    "another pattern": (["--exclude", "y"], (["y"], "kept", "sha256"), [
        """as recorded before: --keep-owners, --digest sha256 ("--no-keep-owners", "--no-digest" to drop)""",
    ]),
    "another algorithm": (["--digest", "blake3"], (["*.tmp", "/a b"], "kept", "blake3"), [
        """as recorded before: --exclude '*.tmp' --exclude '/a b', --keep-owners"""
        """ ("--no-exclude", "--no-keep-owners" to drop)""",
    ]),
    "no patterns": (["--no-exclude"], ([], "kept", "sha256"), [
        """as recorded before: --keep-owners, --digest sha256 ("--no-keep-owners", "--no-digest" to drop)""",
        """no longer: --exclude '*.tmp' --exclude '/a b'""",
    ]),
    "no owners, no digests": (["--no-keep-owners", "--no-digest"], (["*.tmp", "/a b"], "scrubbed", None), [
        """as recorded before: --exclude '*.tmp' --exclude '/a b' ("--no-exclude" to drop)""",
        """no longer: --keep-owners, --digest sha256""",
    ]),
    "nothing": (["--no-exclude", "--no-keep-owners", "--no-digest"], ([], "scrubbed", None), [
        """no longer: --exclude '*.tmp' --exclude '/a b', --keep-owners, --digest sha256""",
    ]),
}  # fmt: skip


@pytest.mark.long(but=2)
@pytest.mark.parametrize("name", TAKEN)
def test_options(options: Path, name: str) -> None:
    """Those that are not given are as before, and said; one that is given replaces that one; --no-... drops it."""
    (options / "script.sh").write_text("changed")
    given, expected, lines = TAKEN[name]
    result = run("record", options, "--force", *given)
    assert result.returncode == 0, result.stderr
    assert info(options) == expected
    said = [line.removeprefix("tartapefs: ") for line in result.stderr.splitlines()]
    assert [line for line in said if line.startswith(("as recorded", "no longer"))] == lines
    # What scripts take from stdout does not depend on what there was before.
    assert len(result.stdout.split()) == (2 if "--digest" in given else 1)
    assert run("verify", options, *(["--deep"] if expected[2] else [])).returncode == 0


def test_json_has_the_seal(options: Path) -> None:
    again = json.loads(run("record", options, "--force", "--json").stdout)
    assert again["seal"] == json.loads(run("info", options, "--json").stdout)["seal"]


def test_options_that_contradict(options: Path) -> None:
    for pair in (["--exclude", "x", "--no-exclude"], ["--digest", "sha256", "--no-digest"]):
        assert run("record", options, "--force", *pair).returncode == 2


def test_a_first_recording_has_nothing_to_take_over(tree: Path) -> None:
    result = run("record", tree, "--force", "--no-exclude", "--no-digest", "--no-keep-owners")
    assert result.returncode == 0 and "no longer" not in result.stderr
    assert info(tree) == ([], "scrubbed", None)


@pytest.mark.parametrize("damage", ["no index", "a fact", "a row"])
def test_a_damaged_recording_before(options: Path, damage: str) -> None:
    """What could not be taken over is said; it is recorded all the same."""
    for number in range(200):  # so that there are rows in the middle
        (options / "photos" / f"few-{number}").touch()
    assert run("record", options, "--force").returncode == 0
    index = options / ".tartape" / "index.db"
    if damage == "no index":
        index.write_bytes(b"something else")
    else:
        data = index.read_bytes()
        index.write_bytes(data.replace(*{"a fact": (b"*.tmp", b"*.tmq"), "a row": (b"few-111", b"few-000")}[damage]))
    (options / "script.sh").write_text("changed")
    result = run("record", options, "--force")
    assert result.returncode == 0, result.stderr
    if damage == "a row":
        assert "cannot be told" in result.stderr
        assert info(options) == (["*.tmp", "/a b"], "kept", "sha256")
    else:
        assert "no options are taken over" in result.stderr
        assert info(options) == ([], "scrubbed", None)
    assert run("verify", options, *(["--deep"] if damage == "a row" else [])).returncode == 0


# The library


def test_a_function_is_asked_for_again(tree: Path) -> None:
    """Its name is all that an index knows of it."""

    def leaves_out(path: str) -> bool:
        return path == "link"

    TapeRecorder(tree, exclude=leaves_out).commit()
    before = (tree / ".tartape" / "index.db").read_bytes()
    with pytest.raises(TapeConstraintError, match=r"cannot be taken over \(function .*leaves_out\)"):
        TapeRecorder(tree, overwrite=True).commit()
    refused = run("record", tree, "--force")
    assert refused.returncode == 4 and "say anew what to exclude" in refused.stderr
    assert (tree / ".tartape" / "index.db").read_bytes() == before
    TapeRecorder(tree, overwrite=True, exclude=leaves_out).commit()
    assert run("record", tree, "--force", "--no-exclude").returncode == 0
    assert info(tree)[0] == []


def test_what_the_recorder_tells(tree: Path) -> None:
    """Which options hold, and what there was before."""
    recorder = TapeRecorder(tree, exclude="*.tmp", anonymize=False, digest="sha256")
    recorder.commit()
    assert recorder.replaced is None and recorder.not_taken_over == ""
    for _ in range(2):
        recorder = TapeRecorder(tree, overwrite=True)
        recorder.commit()
        assert recorder.replaced is not None
        assert (list(recorder.excluded), recorder.owners_kept, recorder.due_algorithm) == (["*.tmp"], True, "sha256")
    recorder = TapeRecorder(tree, exclude=(), anonymize=True, digest="", overwrite=True)
    recorder.commit()
    assert (list(recorder.excluded), recorder.owners_kept, recorder.due_algorithm) == ([], False, "")
    (tree / ".tartape" / "index.db").write_bytes(b"no index")
    recorder.commit()
    assert recorder.replaced is None and "not an index" in recorder.not_taken_over
    with pytest.raises(ValueError, match="digest is one of"):
        TapeRecorder(tree, digest="md5")  # type: ignore[arg-type]


def test_another_folder(tree: Path) -> None:
    """Its options are its own; those of a folder that was renamed, or copied with its index, go along."""
    index, other = tree.parent / "index.db", tree.parent / "other"
    other.mkdir()
    TapeRecorder(tree, index, exclude="*.tmp", anonymize=False).commit()
    result = run("record", other, "--index", index, "--force")
    assert result.returncode == 0 and "it is of another folder, data" in result.stderr
    assert json.loads(run("info", other, "--index", index, "--json").stdout)["excluded"] == []
    TapeRecorder(tree, exclude="*.tmp").commit()
    copied = shutil.copytree(tree, tree.parent / "copied", symlinks=True)
    for folder in (tree.rename(tree.parent / "renamed"), copied):
        assert run("record", folder, "--force").returncode == 0
        assert info(folder)[0] == ["*.tmp"]


def test_digests_that_are_due(tree: Path) -> None:
    """A recording whose sealing did not end is known to want digests, by `info`, by `seal`, and by the next one."""
    TapeRecorder(tree, digest="sha256").commit()
    assert "which are to be of sha256" in run("info", tree).stdout
    shutil.copytree(tree, tree.parent / "copy", symlinks=True)
    assert run("seal", tree).returncode == 0
    assert info(tree)[2] == "sha256"
    assert run("record", tree.parent / "copy", "--force").returncode == 0
    assert info(tree.parent / "copy")[2] == "sha256"


# Digests


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Files of one block, of many, of several rows of digests, empty ones, and folders."""
    root, chance = tmp_path / "data", random.Random(3)
    for folder in ("a", "b/c", "d"):
        (root / folder).mkdir(parents=True)
        for number in range(20):
            (root / folder / f"{number:02}").write_bytes(chance.randbytes(chance.choice([0, 1, 900, 70_000])))
    (root / "b" / "large").write_bytes(chance.randbytes(3 << 20))
    (root / "larger").write_bytes(chance.randbytes(70 * BLOCK_SIZE + 5))
    (root / "link").symlink_to("larger")
    for path in root.rglob("*"):
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    return root


def sealed(root: Path, index: Path, known: Path | None = None) -> tuple[str, set[bytes]]:
    """Records and seals; returns the seal, and what of the source was opened to be read meanwhile."""
    TapeRecorder(root, index, overwrite=True).commit()
    opened: set[bytes] = set()
    open_, folders = Source.open, {}

    class Watched(Source):
        def open(self, path: bytes) -> int:
            opened.add(path)
            return open_(self, path)

        def folder_descriptor(self, path: bytes) -> int:
            fd = super().folder_descriptor(path)
            folders[fd] = path + b"/" if path else b""
            return fd

        def open_in(self, folder: int, name: bytes) -> int:  # type: ignore[override]
            opened.add(folders[folder] + name)
            return Source.open_in(folder, name)

    before = Tape.from_index(known) if known else None
    with Tape.discover(root, index) as tape, Watched(os.fspath(root)) as source:
        value = seal(tape, source, tape.is_at_home(source.ino), "sha256", BLOCK_SIZE, known=before)
    if before:
        before.close()
    return value, opened


def change_some(root: Path, chance: random.Random) -> set[bytes]:
    """Changes files at random; returns the paths of those that have contents of their own now."""
    changed = set()
    for number in range(4):
        path = chance.choice([path for path in root.rglob("*") if path.is_file() and not path.is_symlink()])
        kind = chance.choice(["write", "remove", "add", "rename", "touch"])
        if kind == "write":
            path.write_bytes(chance.randbytes(chance.choice([1, 5000, 200_000])))
        elif kind == "remove":
            path.unlink()
        elif kind == "add":
            path = path.with_name(f"{path.name}-{number}")
            path.write_bytes(chance.randbytes(3000))
        elif kind == "rename":
            path = path.rename(path.with_name(f"0{path.name}"))
        else:
            os.utime(path, ns=(OLD_NS, OLD_NS + 10**9))
        changed.add(os.fsencode(path.relative_to(root)))
    return {path for path in changed if (root / os.fsdecode(path)).exists()}


@pytest.mark.parametrize("seed", range(4))
def test_what_changed_alone_is_read(large: Path, tmp_path: Path, seed: int) -> None:
    """And the seal is that of who reads all."""
    index, kept, anew = tmp_path / "index.db", tmp_path / "kept.db", tmp_path / "anew.db"
    first, opened = sealed(large, index)
    assert {b"larger", b"b/large", b"a/01"} & opened
    changed = change_some(large, random.Random(seed))
    os.rename(index, kept)
    again, opened = sealed(large, index, known=kept)
    assert opened <= changed
    everything, opened = sealed(large, anew)
    assert again == everything != first
    assert len(opened) > 20
    with Tape.discover(large, index) as tape, closing(TapePlayer(tape)) as player:
        player.read(0, tape.total_size)
    assert run("verify", large, "--index", index, "--deep").returncode == 0


def test_nothing_is_taken_from_another_kind(large: Path, tmp_path: Path) -> None:
    """Of another size of blocks; from one that is not at home."""
    index, other = tmp_path / "index.db", tmp_path / "other.db"
    _, opened = sealed(large, index)
    everything = len(opened)
    TapeRecorder(large, other).commit()
    with Tape.discover(large, other) as tape, Source(os.fspath(large)) as source:
        seal(tape, source, True, "sha256", 2 * BLOCK_SIZE)
    shutil.copy(index, tmp_path / "copied.db")
    for known in (other, tmp_path / "copied.db"):
        _, opened = sealed(large, tmp_path / "again.db", known)
        assert len(opened) == everything


@pytest.mark.root
@pytest.mark.parametrize("asked", ["", "--digest"])
def test_what_rotted_still_shows(tmp_path: Path, asked: str) -> None:
    """Bytes that changed and moved no timestamp: their digest stays, unless digests are asked for anew."""
    root = tmp_path / "tmpfs" / "data"
    root.parent.mkdir()
    with mounted("-t", "tmpfs", "tmpfs", root.parent):
        root.mkdir()
        for name in ("changes", "rots", "stays"):
            (root / name).write_bytes(b"x" * 10_000)
        assert run("record", root, "--digest", "sha256").returncode == 0
        before = (root / "rots").stat()
        with (root / "rots").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
            assert mapping[5000:5001] == b"x"  # a page that was read is written without the kernel's knowledge
            mapping[5000:5001] = b"y"
        assert (root / "rots").stat().st_ctime_ns == before.st_ctime_ns
        (root / "changes").write_bytes(b"changed")
        recorded = run("record", root, "--force", *([asked, "sha256"] if asked else []))
        assert recorded.returncode == 0, recorded.stderr
        found = run("verify", root, "--deep", "--json")
        damaged = [entry["member"] for entry in json.loads(found.stdout)["drift"]]
        assert damaged == ([] if asked else ["data/rots"])
        if not asked:
            remedy = run("verify", root, "--deep").stdout
            assert "--no-digest" in remedy
            assert run("record", root, "--force", "--no-digest").returncode == 0
            assert run("seal", root).returncode == 0
            assert run("verify", root, "--deep").returncode == 0


# Excluding


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("a.log", "keep.txt", "b/a.log", "b/c.txt", "build/x", "build/y/z", "b/build/x", "b/build.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        ("*.log", [b"a.log", b"b/a.log"]),
        ("/a.log", [b"a.log"]),
        ("build/", [b"build", b"b/build"]),
        (["*.log", "/build"], [b"a.log", b"b/a.log", b"build"]),
        (("*.log", "!b/a.log"), [b"a.log"]),
        (["build", "!build/x"], [b"build", b"b/build"]),  # what lies in a folder that is left out is left out
        ("b", [b"b"]),
        ([], []),
        ("# no pattern", []),
        ("nothing of this name", []),
    ],
    ids=str,
)
def test_exclude_by_pattern(varied: Path, exclude: Any, left_out: list[bytes]) -> None:
    """As .gitignore would; the index tells which patterns they were."""
    TapeRecorder(varied, exclude=exclude).commit()
    assert_recorded(varied, tuple(left_out))
    with Tape.discover(varied) as tape:
        assert tape.excluded == ((exclude,) if isinstance(exclude, str) else tuple(exclude))


def test_exclude_by_function(varied: Path) -> None:
    """It is given each path below the root once, and not what lies in a folder that it left out."""
    seen: list[str] = []

    def is_build(path: str) -> bool:
        seen.append(path)
        return path.endswith("build")

    TapeRecorder(varied, exclude=is_build).commit()
    assert_recorded(varied, (b"build", b"b/build"))
    assert sorted(seen) == ["a.log", "b", "b/a.log", "b/build", "b/build.txt", "b/c.txt", "build", "keep.txt"]
    with Tape.discover(varied) as tape:
        (excluded,) = tape.excluded
        assert "is_build" in excluded


def test_malformed_pattern_is_refused_at_once(varied: Path) -> None:
    with pytest.raises(ValueError):
        TapeRecorder(varied, exclude="!")
