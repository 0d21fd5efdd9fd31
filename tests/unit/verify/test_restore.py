"""Members out of a copy: only what has its digests, and nothing that others could not read before."""

import contextlib
import json
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
from support.filesystems import mounted
from support.programs import run, under_strace
from support.reference import Reference
from support.seals import BLOCK, flip, index_of, seal_again, sealed, whole
from support.users import asking_nobody

from tartapefs import Tape, TapeError, TapeIntegrityError, TapeRecorder
from tartapefs.verify.ranged_requests import LocalCopy
from tartapefs.verify.restore import Restorer
from tartapefs.verify.selection import select


def extract(kept: Path, *arguments: object, copy: str = "copy.tar") -> subprocess.CompletedProcess[str]:
    (kept / "out").mkdir(exist_ok=True)
    return run("extract", "x", kept / copy, *arguments, "--index", kept / "index.db", "-C", kept / "out")


def same(one: Path, other: Path) -> bool:
    command = ["diff", "-r", "--no-dereference", one, other]
    stats = [(p.lstat().st_mode, p.lstat().st_mtime_ns) for p in (one, other)]
    return subprocess.run(command, capture_output=True).returncode == 0 and stats[0] == stats[1]


def test_members_and_folders_are_restored(kept: Path) -> None:
    original, out = kept / "moved", kept / "out" / "data"
    result = extract(kept, "data/folder 000/00010", "data/link", "--json")
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == ["data/folder 000/00010", "data/link"]
    assert same(out / "folder 000" / "00010", original / "folder 000" / "00010")
    assert os.readlink(out / "link") == "folder 000"
    assert extract(kept, "data/folder 001").returncode == 0
    assert same(out / "folder 001", original / "folder 001")
    result = extract(kept, "data/link")
    assert (result.returncode, "1 were there already" in result.stderr) == (0, True)
    (out / "link").unlink()
    (out / "link").symlink_to("elsewhere")
    result = extract(kept, "data/link")
    assert (result.returncode, "exists" in result.stderr) == (1, True)
    assert extract(kept, "data", "--force").returncode == 0
    assert same(out / "folder 000", original / "folder 000")
    assert sorted(os.listdir(out)) == ["folder 000", "folder 001", "link"]


def test_a_hard_link_is_made_to_no_other_file(tmp_path: Path) -> None:
    """The first name is another program's file by now: a link to that would give its contents this name."""
    root, out, copy = tmp_path / "data", tmp_path / "out", tmp_path / "copy.tar"
    for folder in (root, out):
        folder.mkdir()
    (root / "first").write_bytes(b"content")
    os.link(root / "first", root / "second")
    TapeRecorder(root, hard_links=True).commit()
    seal_again(root)
    copy.write_bytes(Reference(root, hard_links=True).read(0, 10_000))
    with (
        Tape.discover(root) as tape,
        contextlib.closing(LocalCopy(os.fspath(copy))) as reader,
        Restorer(tape, reader, os.fspath(out)) as restorer,
    ):
        (first,) = chain.from_iterable(restorer.restore([tape.find("data/first")]))
        assert first.error is None
        (out / "other").write_bytes(b"another")
        (out / "other").rename(out / "data" / "first")
        (second,) = chain.from_iterable(restorer.restore([tape.find("data/second")]))
        assert isinstance(second.error, TapeError) and "is another name of data/first" in str(second.error)
        assert os.listdir(out / "data") == ["first"]


@pytest.mark.long(but=1)
@pytest.mark.parametrize("at", ["header", "body", "end"])
def test_a_damaged_copy_leaves_nothing(kept: Path, at: str) -> None:
    facts = json.loads(run("locate", "x", "data/folder 000/00010", "--index", kept / "index.db", "--json").stdout)
    if at == "end":
        os.truncate(kept / "copy.tar", facts["stop"] - 600)
    else:
        flip(kept / "copy.tar", facts["start"] + (5 if at == "header" else 512 + 3 * BLOCK))
    result = extract(kept, "data/folder 000/00010")
    assert result.returncode == 1
    assert "data/folder 000/00010: the c" in result.stderr
    assert not list((kept / "out").rglob("*0001*"))
    assert not list((kept / "out").rglob(".tartapefs*"))
    assert extract(kept, "data/folder 000/00002").returncode == 0, "what is not damaged is restored"


def test_a_part_of_a_copy_will_do(kept: Path) -> None:
    """As of a copy in another place, of which only this range was fetched."""
    facts = json.loads(run("locate", "x", "data/folder 000/00010", "--index", kept / "index.db", "--json").stdout)
    archive = (kept / "copy.tar").read_bytes()
    (kept / "part").write_bytes(archive[facts["start"] : facts["stop"]])
    result = extract(kept, "data/folder 000/00010", "--offset", str(facts["start"]), copy="part")
    assert result.returncode == 0, result.stderr
    body = archive[facts["start"] + 512 :][: facts["size"]]
    assert (kept / "out/data/folder 000/00010").read_bytes() == body
    result = extract(kept, "data/folder 000/00009", "--offset", str(facts["start"]), copy="part")
    assert (result.returncode, "nothing" in result.stderr) == (1, True)
    assert extract(kept, "data/nobody").returncode == 1


def test_no_link_in_the_destination_is_followed(kept: Path) -> None:
    (kept / "out").mkdir()
    (kept / "elsewhere").mkdir()
    (kept / "out" / "data").symlink_to(kept / "elsewhere")
    assert extract(kept, "data/link").returncode == 1
    assert os.listdir(kept / "elsewhere") == []


class Secrets:
    """A sealed tape of files that others could not read where they were, its copy, and the folder `out`."""

    def __init__(self, place: Path) -> None:
        root = place / "data"
        (root / "private" / "below").mkdir(parents=True)
        (root / "private" / "below" / "secret").write_bytes(b"secret" * 50_000)
        (root / "own").write_bytes(b"secret" * 50_000)
        (root / "own").chmod(0o600)
        (root / "private").chmod(0o700)
        sealed(root)
        (place / "copy.tar").write_bytes(whole(root))
        self.out = place / "out"
        self.out.mkdir()
        self.tape, self.copy = Tape.from_index(index_of(root)), place / "copy.tar"
        self.seen: Callable[[], list[str]] = self.look  # the same, by another user

    def look(self) -> list[str]:
        """What this user can read of it at this moment."""
        found = []
        for folder, _, names in os.walk(self.out):
            for name in names:
                with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb") as file:
                    if b"secret" in file.read():
                        found.append(name)
        return found

    def extract(self, *names: str, overwrite: bool = False) -> None:
        with (
            contextlib.closing(LocalCopy(os.fspath(self.copy))) as copy,
            Restorer(self.tape, copy, os.fspath(self.out), overwrite=overwrite) as restorer,
        ):
            for some in restorer.restore(select(self.tape, names)[0]):
                for restored in some:
                    if restored.error:
                        raise restored.error

    def modes(self) -> dict[str, int]:
        return {path.name: stat.S_IMODE(path.stat().st_mode) for path in self.out.rglob("*")}


@pytest.fixture
def secrets(public: Path) -> Iterator[Secrets]:
    secrets = Secrets(public)
    with secrets.tape, asking_nobody(secrets.look) as secrets.seen:
        yield secrets


CALLS = ("open", "mkdir", "write", "pwrite", "fchmod", "rename", "utime", "unlink")


@pytest.mark.long(but=2)
@pytest.mark.root
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("names", [["data"], ["data/private"], ["data/private/below/secret"], ["data/own"]])
def test_nobody_else_sees_a_secret(
    secrets: Secrets, names: list[str], there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user looks after each call of the system, and in the end; also where all was open to others before."""
    if there:
        (secrets.out / "data").mkdir()
        (secrets.out / "data" / "own").write_bytes(b"another")
    if there and names[0] in ("data", "data/private"):
        (secrets.out / "data" / "private").mkdir()
    seen: list[str] = []
    looks = 0

    def look_after(call: Callable[..., object]) -> Callable[..., object]:
        def made(*arguments: object, **options: object) -> object:
            nonlocal looks
            result = call(*arguments, **options)
            if not looking.locked():
                with looking:
                    looks += 1
                    seen.extend(secrets.seen())
            return result

        return made

    looking = threading.Lock()
    for name in CALLS:
        monkeypatch.setattr(os, name, look_after(getattr(os, name)))
    secrets.extract(*names, overwrite=there)
    monkeypatch.undo()
    assert looks > 5
    assert seen == secrets.seen() == []
    expected = {"private": 0o700, "below": 0o755, "secret": 0o644, "own": 0o600, "data": 0o755}
    if there and names[0].startswith("data/private"):
        expected["own"] = 0o644  # it is another file, and stays
    assert secrets.modes().items() <= expected.items()


@pytest.mark.root
def test_modes_after_a_failure(secrets: Secrets) -> None:
    """The last file is damaged: what is there has its modes, and nobody sees the secret."""
    member = secrets.tape.find("data/private/below/secret")
    flip(secrets.copy, member.start + 512)
    with pytest.raises(TapeIntegrityError):
        secrets.extract("data")
    assert secrets.modes() == {"data": 0o755, "own": 0o600, "private": 0o700, "below": 0o755}
    assert secrets.seen() == []


@pytest.mark.long(but=3)
@pytest.mark.needs("strace")
@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("call", ["mkdirat", "fchmod", "renameat2"])
def test_a_signal_leaves_nothing_unfinished(kept: Path, name: str, code: int, call: str) -> None:
    """Whatever it interrupts; folders have their modes then."""
    (kept / "out").mkdir()
    inject = f"inject={call}:signal={name}:when={2 if call == 'mkdirat' else 3}"
    command = under_strace("-e", f"trace={call}", "-e", inject)
    extract = ["extract", "x", kept / "copy.tar", "data", "--index", kept / "index.db", "-C", kept / "out"]
    result = subprocess.run([*command, *extract], capture_output=True, timeout=120)
    assert result.returncode == code, result.stderr
    assert not list((kept / "out").rglob("*.part"))
    for path in (kept / "out").rglob("*"):
        original = kept / "moved" / path.relative_to(kept / "out" / "data")
        assert path.lstat().st_mode == original.lstat().st_mode
        if path.is_file():
            assert path.read_bytes() == original.read_bytes()


@pytest.mark.root
def test_a_full_disk_is_told_of_the_member(kept: Path) -> None:
    out = kept / "out"
    out.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=256k,mode=0755", "tmpfs", out):
        result = extract(kept, "data")
        assert result.returncode != 0
        assert "data/folder 000/0" in result.stderr and "No space left" in result.stderr
        assert ".part" not in result.stderr and "/proc" not in result.stderr
        assert not list(out.rglob("*.part"))
        assert (out / "data").stat().st_mtime_ns == (kept / "moved").stat().st_mtime_ns
