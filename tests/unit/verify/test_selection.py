"""Which members a NAME is: a name, a pattern as Git matches it, all in a folder; and what is looked at for that."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.seals import OLD_NS

from tartapefs import Tape, TapeRecorder
from tartapefs.verify.selection import select

FILES = ["a.jpg", "photos/1.jpg", "photos/2.jpg", "photos/2.png", "photos/old/1.jpg", "photos/[1]*.jpg", "photo.jpg",
         "photos.jpg", "!b", "#c", "deep/er/photos/1.jpg", "\udcff/x.jpg"]  # fmt: skip


def write(root: Path, names: list[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, ns=(OLD_NS, OLD_NS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("selection") / "data"
    write(root, FILES)
    TapeRecorder(root).commit()
    return root


@pytest.fixture
def tape(folder: Path) -> Iterator[Tape]:
    with Tape.discover(folder) as tape:
        yield tape


def chosen(tape: Tape, *names: str) -> list[str]:
    return [member.arc_path for member in select(tape, names)[0]]


def by_git(folder: Path, pattern: str, work: Path) -> list[str]:
    """What Git ignores by this pattern, of all files of the tape."""
    work.mkdir()
    subprocess.run(["git", "init", "-q", work], check=True)
    (work / ".gitignore").write_bytes(os.fsencode(pattern) + b"\n")
    command = ["git", "-C", work, "check-ignore", "--no-index", "--stdin", "-z"]
    asked = b"\0".join(os.fsencode(f"data/{name}") for name in FILES)
    found = subprocess.run(command, input=asked, capture_output=True).stdout
    return sorted(map(os.fsdecode, found.split(b"\0")[:-1]))


@pytest.mark.needs("git")
@pytest.mark.parametrize(
    "pattern",
    ["data/photos/*.jpg", "data/photo*", "data/**/1.jpg", "*.jpg", "data/*", "data/photos/old*/", "/data/p?oto.jpg",
     "data/photos/[12].jpg", "photos*/", "data/[a-p]*", "data/photos/**"],
)  # fmt: skip
def test_patterns_are_those_of_git(folder: Path, tape: Tape, pattern: str, tmp_path: Path) -> None:
    found = [m.arc_path for m in select(tape, [pattern])[0] if not m.is_directory]
    assert found and sorted(found) == by_git(folder, pattern, tmp_path / "git")


def test_a_name_wins(tape: Tape) -> None:
    assert chosen(tape, "data/photos/[1]*.jpg") == ["data/photos/[1]*.jpg"]
    assert chosen(tape, "data/!b", "data/#c") == ["data/!b", "data/#c"]
    assert chosen(tape, "!?", "#?") == ["data/!b", "data/#c"], "neither a negation nor a comment"
    for name in ("data/photos/[", "data/nobody*", "!x*", "data/photos/3.jpg", "", "data/a\0*"):
        with pytest.raises(KeyError) as missing:
            chosen(tape, "data/a.jpg", name)
        assert missing.value.args[0] == name


def test_each_member_comes_once_in_order(tape: Tape) -> None:
    """However often it is named; of folders all that lies in them."""
    everything = [member.arc_path for member in tape.members()]
    names = ["data/photos/1.jpg", "data/photos", "data/**/1.jpg", "data/photos/1.jpg"]
    expected = [path for path in everything if f"{path}/".startswith("data/photos/") or path.endswith("/1.jpg")]
    assert chosen(tape, *names) == expected
    members, size = select(tape, ["data"])
    assert [member.arc_path for member in members] == everything
    assert size == tape.total_size - 1024
    assert select(tape, ["*"])[1] is None


def test_generations(tmp_path: Path) -> None:
    """What a later recording added to a folder is found with it, and the folder as it was last."""
    root = tmp_path / "data"
    write(root, ["one/a", "one/b/c", "two/a"])
    TapeRecorder(root).commit()
    write(root, ["one/b/d", "one/0", "three"])
    os.utime(root / "one" / "b", ns=(OLD_NS, OLD_NS))  # of another second than before
    TapeRecorder(root, append=True).commit()
    with Tape.discover(root) as tape:
        assert len(tape.generations) == 2
        expected = ["data/one", "data/one/0", "data/one/a", "data/one/b", "data/one/b/c", "data/one/b/d"]
        assert chosen(tape, "data/one") == chosen(tape, "data/one/") == expected
        members = {member.arc_path: member for member in select(tape, ["data/one"])[0]}
        assert members["data/one/b"].start == tape.find("data/one/b").start >= tape.generations[1].start


def test_only_what_a_prefix_bounds_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 members in some 400 rows: those of two searches, and of the folder."""
    root = tmp_path / "data"
    for number in range(40):
        (root / f"{number:02}").mkdir(parents=True)
        for file in range(500):
            (root / f"{number:02}" / f"{file:03}").touch()
    TapeRecorder(root).commit()
    with Tape.discover(root) as tape:
        decoded = []
        unpack = tape._unpack
        monkeypatch.setattr(tape, "_unpack", lambda row: decoded.append(row[0]) or unpack(row))
        assert len(chosen(tape, "data/31/4?0")) == 10
        few = len(decoded)
        assert len(chosen(tape, "??0")) == 40 * 50
        assert few < (len(decoded) - few) / 5
