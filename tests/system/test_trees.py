"""Every program that reads tar lists and extracts the mounted archive: the tree it makes is the one recorded.

What a program cannot bring back by its own limits is stated with it, and shown to be its own: of GNU tar's archive of
the same tree it brings back no more.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import trees
from support.reference import Reference
from support.trees import Facts

from tartapefs import TapeRecorder

pytestmark = pytest.mark.needs("tar")

ENVIRONMENT = os.environ | {"LC_ALL": "C.UTF-8", "TZ": "UTC"}
Limit = Callable[[Facts, bytes], Facts]  # (of a member, where it was extracted): the facts that the program can restore


def run(*command: object, cwd: Path | None = None) -> bytes:
    """The program's output. It gets no umask, since it should restore modes, and must succeed."""
    result = subprocess.run(
        [os.fspath(part) for part in command],  # type: ignore[arg-type]
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        umask=0,
    )
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    return result.stdout


def everything(facts: Facts, destination: bytes) -> Facts:
    return facts


def of_7z(facts: Facts, destination: bytes) -> Facts:
    """No setuid, setgid and sticky bits; no folder its owner cannot use; absolute links made to lead below."""
    mode = facts.mode & 0o777 | (0o700 if facts.kind == "folder" else 0)
    content = facts.content.removeprefix(destination) if facts.kind == "link" else facts.content
    return facts._replace(mode=mode, content=content)


def of_busybox(facts: Facts, destination: bytes) -> Facts:
    """Times of files only."""
    return facts if facts.kind == "file" else facts._replace(mtime_ns=0)


def of_python(facts: Facts, destination: bytes) -> Facts:
    """No times of links."""
    return facts._replace(mtime_ns=0) if facts.kind == "link" else facts


PY_LIST = """
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    for m in archive:
        print(ascii(m.name), m.size, m.mode, m.mtime, m.type, ascii(m.linkname), m.uid, m.gid, m.uname, m.gname)
"""
PY_EXTRACT = """
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    # Python before 3.11.4 has no filters, and trusts.
    archive.extractall(sys.argv[2], **(dict(filter="fully_trusted") if hasattr(tarfile, "data_filter") else dict()))
"""
PY_PRINT = """
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    sys.stdout.buffer.write(archive.extractfile(sys.argv[2]).read())
"""


@dataclass(frozen=True, slots=True)
class Program:
    """`list` and `print` are given the archive, and a member to print; `extract` also where to."""

    name: str
    list: tuple[str, ...]
    extract: tuple[str, ...]
    print: tuple[str, ...]
    limit: Limit

    def listing(self, archive: Path) -> bytes:
        """Names, types, sizes, modes, times and targets as this program tells them."""
        said = run(*self.list, archive)
        if self.name == "7z":  # it also tells the archive's name, size and dialect
            said = re.sub(rb"(?m)^(Characteristics|Physical Size|Headers Size|Device M..or) = .*\n", b"", said)
            said = said.partition(b"\n----------\n")[2]
        return said

    def extracted(self, archive: Path, destination: Path) -> dict[bytes, Facts]:
        """The facts of what this program makes of the archive, in a new folder that is gone again."""
        destination.mkdir()
        run(*(part.format(archive=archive, destination=destination) for part in self.extract))
        assert os.listdir(destination) == [trees.ROOT]
        result = trees.snapshot(destination / trees.ROOT)
        shutil.rmtree(destination)
        return result

    def limited(self, facts: dict[bytes, Facts], destination: Path) -> dict[bytes, Facts]:
        return {name: self.limit(of, os.fsencode(destination)) for name, of in facts.items()}


PROGRAMS = [
    Program(
        "tar",
        ("tar", "--full-time", "--numeric-owner", "--quoting-style=literal", "-tvf"),
        ("tar", "-xpf", "{archive}", "-C", "{destination}", "--warning=no-timestamp"),
        ("tar", "-xOf", "{archive}", "{member}"),
        everything,
    ),
    Program(
        "bsdtar",
        ("bsdtar", "-tvf"),
        ("bsdtar", "-xpf", "{archive}", "-C", "{destination}"),
        ("bsdtar", "-xOf", "{archive}", "{member}"),
        everything,
    ),
    Program(
        "7z",
        ("7z", "l", "-slt"),
        ("7z", "x", "-y", "-snld20", "-o{destination}", "{archive}"),  # -snld20: links that lead out are restored too
        ("7z", "x", "-so", "{archive}", "{member}"),
        of_7z,
    ),
    Program(
        "busybox",
        ("busybox", "tar", "-tvf"),
        ("busybox", "tar", "-xpf", "{archive}", "-C", "{destination}"),
        ("busybox", "tar", "-xOf", "{archive}", "{member}"),
        of_busybox,
    ),
    Program(
        "python",
        (sys.executable, "-c", PY_LIST),
        (sys.executable, "-c", PY_EXTRACT, "{archive}", "{destination}"),
        (sys.executable, "-c", PY_PRINT, "{archive}", "{member}"),
        of_python,
    ),
]

each_program = pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            program, id=program.name, marks=[] if program.name == "python" else pytest.mark.needs(program.name)
        )
        for program in PROGRAMS
    ],
)


def unlike(recorded: dict[bytes, Facts], found: dict[bytes, Facts]) -> set[tuple[bytes, str]]:
    """Which facts of which members are not alike; "name" where a member is on one side only."""
    result = {(name, "name") for name in recorded.keys() ^ found.keys()}
    for name in recorded.keys() & found.keys():
        pairs = zip(Facts._fields, recorded[name], found[name], strict=True)
        result |= {(name, field) for field, was, came in pairs if was != came}
    return result


@pytest.fixture(scope="module", params=trees.TREES)
def small_tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recorded tree, and GNU tar's archive of it."""
    folder = tmp_path_factory.mktemp(request.param)
    root = folder / trees.ROOT
    root.mkdir()
    trees.TREES[request.param](root)
    TapeRecorder(root).commit()
    return root, trees.made_by_gnu_tar(root, folder / "by-gnu-tar.tar")


@pytest.mark.matrix(but=r"empty_root|odd_names|links-|-(tar|python)\]")
@pytest.mark.long(but=5)
@each_program
def test_hard_trees(small_tree, program, mount, tmp_path):
    """Listed as GNU tar's archive is; extracted as recorded, but for the limits that the program has with any."""
    root, by_gnu_tar = small_tree
    archive = mount(root)
    assert program.listing(archive) == program.listing(by_gnu_tar)
    recorded = trees.recorded(root)
    found = program.extracted(archive, tmp_path / "ours")
    assert unlike(program.limited(recorded, tmp_path), program.limited(found, tmp_path / "ours")) == set()
    if any(facts != recorded[name] for name, facts in found.items()):
        assert program.limit is not everything
        assert unlike(recorded, program.extracted(by_gnu_tar, tmp_path / "theirs")) == unlike(recorded, found)


@pytest.mark.long(but=3)
def test_bytes_of_hard_trees(small_tree, mount):
    """The archive is, byte by byte, what the format says."""
    root, _ = small_tree
    expected = Reference(root)
    assert mount(root).read_bytes() == expected.read(0, expected.size)


@pytest.mark.long(but=3)
def test_names_of_hard_trees(small_tree, mount):
    """GNU tar lists exactly the members' names, in the archive's order."""
    root, _ = small_tree
    names = run("tar", "--quoting-style=literal", "-tf", mount(root))
    assert names == b"".join(name + b"\n" for name in Reference(root).starts)


@pytest.fixture(scope="module")
def real_tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, dict[bytes, Facts]]]:
    """A recorded tree of folders of this machine, GNU tar's archive of it, and its facts."""
    folder = tmp_path_factory.mktemp("real")
    root = folder / trees.ROOT
    trees.real(root, 20_000)
    TapeRecorder(root).commit()
    recorded = trees.recorded(root)
    assert len(recorded) >= 20_000
    yield root, trees.made_by_gnu_tar(root, folder / "by-gnu-tar.tar"), recorded
    shutil.rmtree(folder)


@pytest.mark.matrix(but=r"\[tar")
@pytest.mark.long
@each_program
def test_a_real_tree(real_tree, program, mount, tmp_path):
    """At least 20,000 members of this machine: listed, extracted, and found equal."""
    root, by_gnu_tar, recorded = real_tree
    archive = mount(root)
    assert program.listing(archive) == program.listing(by_gnu_tar)
    found = program.extracted(archive, tmp_path / "ours")
    assert unlike(program.limited(recorded, tmp_path), program.limited(found, tmp_path / "ours")) == set()


@pytest.mark.long
@pytest.mark.root
def test_a_real_tree_compared_by_tar(real_tree, mount):
    """GNU tar itself finds no difference between the archive and the folder that it shows."""
    root, _, _ = real_tree
    assert run("tar", "-df", mount(root), cwd=root.parent) == b""


@pytest.fixture(scope="module")
def sparse_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sparse") / trees.ROOT
    root.mkdir()
    trees.sparse(root)
    TapeRecorder(root).commit()
    return root


@pytest.mark.long(but=1)
@each_program
def test_sparse_files(sparse_tree, program, mount):
    """Sizes beyond octal are listed right, and what lies behind a tebibyte is found."""
    archive = mount(sparse_tree)
    listing = program.listing(archive).decode()
    for size in trees.SPARSE_SIZES.values():
        assert re.search(rf"\b{size}\b", listing), listing
    command = [part.format(archive=archive, member=f"{trees.ROOT}/last") for part in program.print]
    assert run(*command) == b"after a tebibyte"


def test_sparse_files_at_places(sparse_tree, mount):
    """Reads around each boundary, around the middle of each file and at random offsets are right."""
    expected = Reference(sparse_tree)
    some = random.Random(1)
    places = [
        expected.starts[f"{trees.ROOT}/{name}".encode()] + 512 + size // 2 for name, size in trees.SPARSE_SIZES.items()
    ]
    places += expected.boundaries()
    places += [some.randrange(expected.size) for _ in range(200)]
    file = os.open(mount(sparse_tree), os.O_RDONLY)
    try:
        assert os.fstat(file).st_size == expected.size > 2**40 + 2**34
        for place in places:
            for offset in (place - 512, place - 1, place, place + 1):
                for size in (1, 2, 511, 512, 513, 4096, 70_000):
                    if offset >= 0:
                        assert os.pread(file, size, offset) == expected.read(offset, size), (offset, size)
    finally:
        os.close(file)
