"""What programs make of an archive of several generations: the folder as it is now, or what docs/growing.md says.

Folders that grew are in it several times, each time with another mtime; some with another mode, one is read-only.
"""

import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.generations import Generations
from support.users import NOBODY, as_nobody

from tartapefs import Tape, TapePlayer, TapeRecorder

FOLDERS = ("deep", "deep/er", "plain", "readonly")
Facts = dict[str, tuple[str, int, int, object]]


COMMANDS = {
    "GNU tar": "tar -xpf -",
    "GNU tar, delayed": "tar -xpf - --delay-directory-restore",
    "tarfile": "",
    "7z": "7z x -ttar -si -y",
    "bsdtar": "bsdtar -xpf -",
    "busybox": "busybox tar -xpf -",
}
# Of a user who is not root, these cannot put anything into a read-only folder any more: ever, or where it grew.
STOPPED = {"busybox": 1, "GNU tar": 2}
NEW_TARFILE = hasattr(tarfile, "data_filter")  # Python 3.11.4, and others of that month


def differs(reader: str, generations: int) -> set[str]:
    """What is not as in the folder when this reader has extracted it."""
    match reader:
        case "7z":  # which has its user be able to write to each folder
            return {"modes of folders"}
        case "busybox":
            return {"mtimes of folders", "mtimes of links"}
        case "tarfile" if NEW_TARFILE or generations == 1:
            return {"mtimes of links"}
        case "tarfile":
            return {"mtimes of links", "mtimes of folders", "modes of folders"}
        case "bsdtar" if generations > 1:  # a mode that went back, as in the third, is not seen
            return {"mtimes of folders"} | ({"modes of folders"} if generations == 3 else set())
    return set()


class Grown(NamedTuple):
    generations: int
    facts: Facts
    archive: Path


def grow(root: Path, number: int) -> None:
    for name in FOLDERS:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        (folder / f"file {number}").write_bytes(os.urandom(700 * number))
        (folder / f"file {number}").chmod((0o640, 0o755, 0o444)[number % 3])
        (folder / f"link {number}").symlink_to("file 0")
        (folder / f"new {number}").mkdir(mode=0o750)
        (folder / f"new {number}" / "file").write_text("new")
    (root / "readonly").chmod(0o555)
    (root / "plain").chmod((0o755, 0o700)[number % 2])
    for name in FOLDERS:
        new = [root / name / f"{kind} {number}" for kind in ("file", "link", "new")]
        for path in (new[2] / "file", *new, root / name):
            os.utime(path, (0, 10**9 + 1000 * number + len(name)), follow_symlinks=False)
    for folder in (root / "deep", root):
        os.utime(folder, (0, 10**9 + 1000 * number))


def facts(root: Path) -> Facts:
    """Of each path below: type, mode, mtime in seconds, and the content or target. Modes of links say nothing."""
    found: Facts = {}
    for path in [root, *root.rglob("*")]:
        if ".tartape" in path.parts:
            continue
        about = path.lstat()
        kind = {stat.S_IFDIR: "folders", stat.S_IFREG: "files", stat.S_IFLNK: "links"}[stat.S_IFMT(about.st_mode)]
        content = os.readlink(path) if kind == "links" else path.read_bytes() if kind == "files" else None
        mode = 0 if kind == "links" else stat.S_IMODE(about.st_mode)
        found[str(path.relative_to(root))] = kind, mode, int(about.st_mtime), content
    return found


def differences(expected: Facts, extracted: Facts) -> set[str]:
    assert expected.keys() == extracted.keys()
    what = ("types", "modes", "mtimes", "contents")
    return {
        f"{what[at]} of {found[0]}"
        for path, found in expected.items()
        for at in range(len(what))
        if found[at] != extracted[path][at]
    }


@pytest.fixture(scope="module", params=[1, 2, 3, pytest.param(50, marks=pytest.mark.long)])
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    root = tmp_path_factory.mktemp("grown") / "data"
    root.mkdir()
    generations = Generations(root)
    for number in range(request.param):
        grow(root, number)
        TapeRecorder(root, append=number > 0).commit()
        archive = generations.append()
    with Tape.discover(root) as tape, closing(TapePlayer(tape)) as player:
        assert len(tape.generations) == request.param
        assert player.read(0, tape.total_size) == archive
    (root.parent / "archive.tar").write_bytes(archive)
    yield Grown(request.param, facts(root), root.parent / "archive.tar")
    shutil.rmtree(root)


def extract(grown: Grown, place: Path, reader: str, user: int) -> tuple[int, str]:
    """The exit code, and what was said, of the reader that extracts the archive to `place`."""
    if reader == "tarfile":
        options: Any = {"filter": "fully_trusted"} if NEW_TARFILE else {}
        with tarfile.open(grown.archive) as tar:
            as_nobody(lambda: tar.extractall(place, **options), user)
        return 0, ""
    with grown.archive.open("rb") as archive:
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *COMMANDS[reader].split()]
        result = subprocess.run(command, cwd=place, stdin=archive, capture_output=True, timeout=60)
    return result.returncode, result.stderr.decode()


@pytest.mark.root
@pytest.mark.needs("7z", "bsdtar", "busybox", "setpriv", "tar")
@pytest.mark.parametrize("user", [0, NOBODY], ids=["root", "a user"])
@pytest.mark.parametrize("reader", COMMANDS)
def test_extracted(grown: Grown, public: Path, reader: str, user: int) -> None:
    place = public / "out"
    place.mkdir()
    os.chown(place, user, user)
    code, said = extract(grown, place, reader, user)
    if user and grown.generations >= STOPPED.get(reader, 1000):
        assert code != 0
        assert "readonly/" in said and "Permission denied" in said
        return
    assert code == 0, said
    assert differences(grown.facts, facts(place / "data")) == differs(reader, grown.generations)
