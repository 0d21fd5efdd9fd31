"""The commands that messages name, copied and pasted: each is run by a shell, and does what the message says of it.

The folder has a name that a shell would take apart, and an index elsewhere.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.programs import our_mounts, quiet, under_strace, wait_until, with_programs
from support.readme import STILL_MOUNTED
from support.users import give_to_nobody, tartapefs_as_nobody

MIB = 1 << 20
NAMED = re.compile(r'(?<!\S)\(?"((?:tartapefs|chmod) .+?)"(?=[ ;:,.)\n]|$)')
READS = "preadv,preadv2,pread64"


@dataclass
class Desk:
    """Where a user types: the folder, and the index that lies beside it, are called as from there."""

    place: Path
    environment: dict[str, str]
    folder: str = "it's my data"
    index: str = "its index.db"

    @property
    def root(self) -> Path:
        return self.place / self.folder

    @property
    def of_it(self) -> list[str]:
        return [self.folder, "--index", self.index]

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            ["sh", "-c", line], cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=120
        )
        quiet(result)
        return result

    def run(self, *words: str) -> str:
        """What `tartapefs` says."""
        result = self.shell(shlex.join(["tartapefs", *words]))
        return result.stdout + result.stderr

    def interrupted(self, *words: str) -> str:
        """What it says if Ctrl-C is pressed while it reads the first file."""
        inject = ["-e", f"trace={READS}", "-e", f"inject={READS}:signal=SIGINT:when=1"]
        result = self.shell(shlex.join([*under_strace("-P", self.root / "photos" / "a", *inject), *words]))
        assert result.returncode == 130, (result.returncode, result.stderr)
        return result.stderr

    def paste(self, said: str, *begins: str) -> None:
        """Runs the commands in `said`, which begin with these words, in this order."""
        found = dict.fromkeys(NAMED.findall(said))
        for begin in begins:
            (line,) = (line for line in found if re.match(f"{re.escape(begin)} (?!--)", line))
            if begin.startswith("tartapefs") and "unmount" not in begin:
                assert self.folder in shlex.split(line), line
                assert self.index in shlex.split(line), line
            result = self.shell(line)
            assert result.returncode == 0, (line, result.stderr)
        assert len(found) == len(begins), found


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """With a folder that has been recorded."""
    environment = with_programs(tmp_path)
    desk = Desk(tmp_path, environment | {"HOME": str(tmp_path)})
    (desk.root / "photos").mkdir(parents=True)
    (desk.root / "photos" / "a").write_bytes(os.urandom(3 * MIB))
    (desk.root / "photos" / "b").write_bytes(b"b" * 2000)
    desk.run("record", *desk.of_it)
    return desk


def changed(desk: Desk) -> None:
    (desk.root / "photos" / "b").write_bytes(b"other")


def sealed(desk: Desk) -> None:
    assert desk.shell(shlex.join(["tartapefs", "seal", *desk.of_it])).returncode == 0


def rotten(desk: Desk) -> None:
    """Contents that no timestamp tells of."""
    sealed(desk)
    file = desk.root / "photos" / "b"
    before = file.stat()
    file.write_bytes(b"c" * 2000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def copied(desk: Desk) -> None:
    """A copy whose end is wrong."""
    desk.run("play", *desk.of_it, "-o", "a copy.tar")
    with (desk.place / "a copy.tar").open("r+b") as copy:
        copy.seek(2 * MIB)
        copy.write(b"x" * MIB)


def with_long_name(desk: Desk) -> None:
    (desk.root / ("n" * 200)).touch()


def grown(desk: Desk) -> None:
    (desk.root / "added").touch()


def not_recorded(desk: Desk) -> None:
    (desk.place / desk.index).unlink()


def spoilt(desk: Desk) -> None:
    with (desk.place / desk.index).open("r+b") as index:
        index.seek(4096)
        index.write(b"x" * 40_000)


def as_it_is(desk: Desk) -> None:
    pass


Case = tuple[Callable[[Desk], None], list[str], list[str]]
CASES: dict[str, Case] = {
    "nothing is recorded": (not_recorded, ["info"], ["tartapefs record"]),
    "recorded already": (as_it_is, ["record"], ["tartapefs record --append", "tartapefs record --force"]),
    "a damaged index": (spoilt, ["ls"], ["tartapefs record --force"]),
    "a file is another": (changed, ["verify"], ["tartapefs record --force"]),
    "a file was added": (grown, ["verify"], ["tartapefs record --append", "tartapefs record --force"]),
    "rotten": (rotten, ["verify", "--deep"], ["tartapefs record --force --no-digest", "tartapefs seal"]),
    "sealed already": (sealed, ["seal"], ["tartapefs record --force"]),
    "appended to what is another": (changed, ["record", "--append"], ["tartapefs record --force"]),
    "a name is too long": (with_long_name, ["record", "--force"], ["tartapefs record"]),
    "one to append is too long": (
        with_long_name,
        ["record", "--append"],
        ["tartapefs record --force --long-names", "tartapefs record --force"],
    ),
    "info": (as_it_is, ["info"], ["tartapefs seal"]),
    "contents without digests": (as_it_is, ["verify", "--deep"], ["tartapefs seal"]),
    "an extracted folder without digests": (as_it_is, ["verify-extracted", "photos"], ["tartapefs seal"]),
    "members without digests": (copied, ["extract", "a copy.tar", "photos"], ["tartapefs seal"]),
    "a scrub without digests": (as_it_is, ["mount", "mnt", "--scrub-share", "5"], ["tartapefs seal"]),
    "a name with the seal": (as_it_is, ["digest", "--name", "{seal}"], ["tartapefs seal"]),
    "nothing of this name": (as_it_is, ["locate", "nothing"], ["tartapefs ls"]),
    "nothing of this name in a copy": (sealed, ["extract", "a copy.tar", "nothing"], ["tartapefs ls"]),
    "a copy whose end is wrong": (copied, ["check", "a copy.tar"], ["tartapefs resume"]),
    "no beginning": (copied, ["play", "--append", "-o", "a copy.tar"], ["tartapefs resume"]),
}


@pytest.mark.long(but=6)
@pytest.mark.parametrize("case", CASES)
def test_a_refusal(desk: Desk, case: str) -> None:
    prepare, (name, *words), begins = CASES[case]
    prepare(desk)
    desk.paste(desk.run(name, *desk.of_it, *words), *begins)


def test_what_is_no_index(desk: Desk) -> None:
    index = desk.place / desk.index
    index.write_bytes(b"something else")
    said = desk.run("info", *desk.of_it)
    assert "it is not an index of tartapefs; move it away, and run " in said
    index.rename(desk.place / "aside")
    desk.paste(said, "tartapefs record --force")


def test_shards_of_an_archive_with_hard_links(desk: Desk) -> None:
    os.link(desk.root / "photos" / "a", desk.root / "c")
    desk.run("record", *desk.of_it, "--force", "--hard-links")
    (desk.place / "mnt").mkdir()
    said = desk.run("mount", *desk.of_it, "mnt", "--shard-size", "4M")
    desk.paste(said, "tartapefs record --force --no-hard-links")


def test_a_play_that_fails(desk: Desk) -> None:
    changed(desk)
    said = desk.run("play", *desk.of_it, "-o", "a copy.tar", "--force")
    desk.paste(said, "tartapefs record --force", "tartapefs play")
    assert desk.run("check", *desk.of_it, "a copy.tar", "--full").startswith("complete      yes")


@pytest.mark.long(but=3)
@pytest.mark.needs("strace")
@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["seal", "--digest", "sha256"], "tartapefs seal"),
        (["digest"], "tartapefs digest"),
        (["digest", "-a", "md5", "--state", "a state"], "tartapefs digest"),
        (["verify", "--deep"], "tartapefs verify"),
        (["verify", "--deep", "--state", "a state"], "tartapefs verify"),
        (["resume", "a copy.tar"], "tartapefs resume"),
        (["upload", "file://{}/far end/"], "tartapefs upload"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_interruption(desk: Desk, words: list[str], again: str) -> None:
    if words[0] == "verify":
        sealed(desk)
    name, *rest = (word.format(desk.place) for word in words)
    said = desk.interrupted(name, *desk.of_it, *rest)
    desk.paste(said, again)
    if "a state" not in words and again in ("tartapefs digest", "tartapefs verify"):
        assert "nothing is saved: " in said and " --state " in said


@pytest.mark.needs("strace")
def test_options_that_may_be_secret_are_not_repeated(desk: Desk) -> None:
    """A log of this would keep them."""
    said = desk.interrupted("upload", *desk.of_it, f"file://{desk.place}/there/", "--option", "auto_mkdir=true")
    assert "the same command goes on from there" in said and "auto_mkdir" not in said


@pytest.mark.root
def test_a_folder_that_cannot_hold_its_index(desk: Desk, public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.place = Path(os.path.realpath(public))
    desk.root.mkdir()
    monkeypatch.chdir(desk.place)
    monkeypatch.setenv("HOME", str(desk.place))
    desk.index = f"{desk.root}.db"  # the one that is proposed
    result = tartapefs_as_nobody("record", desk.folder)
    assert result.returncode == 4
    desk.paste(result.stderr, "tartapefs record")
    assert Path(desk.index).exists()


@pytest.mark.fuse
def test_a_mount_names_folder_and_index_from_anywhere(desk: Desk) -> None:
    """In its log, its status, and what the mounted folder tells; none of which is read where it was mounted from."""
    mnt = desk.place / "my mount"
    mnt.mkdir()
    assert desk.run("mount", *desk.of_it, "my mount", "--log", "the log") == ""
    changed(desk)
    with pytest.raises(OSError):
        (mnt / "archive.tar").read_bytes()
    told = [
        desk.run("status", "my mount"),
        os.getxattr(mnt, "user.tartape.state").decode(),
        (desk.place / "the log").read_text(),
    ]
    said = desk.run("unmount", "my mount")
    assert said == "" or STILL_MOUNTED in said
    there, desk.place = desk.place, Path("/")
    desk.folder, desk.index = str(there / desk.folder), str(there / desk.index)
    for said in told:
        desk.paste(said, "tartapefs record --force")


@pytest.mark.fuse
def test_an_archive_that_is_read(desk: Desk) -> None:
    mnt = desk.place / "it's mounted"
    mnt.mkdir()
    assert desk.run("mount", *desk.of_it, mnt.name) == ""
    with (mnt / "archive.tar").open("rb"):
        desk.paste(desk.run("unmount", mnt.name), "tartapefs unmount --lazy")
    wait_until(lambda: str(mnt) not in our_mounts())


@pytest.mark.long(but=1)
@pytest.mark.root
@pytest.mark.parametrize(
    "words",
    [
        ["resume", "it's a copy.tar"],
        ["play", "--append", "-o", "it's a copy.tar"],
        ["check", "--truncate", "--yes", "it's a copy.tar"],
        ["verify", "--deep", "--state", "it's a copy.tar"],
    ],
    ids=lambda words: words[0],
)
def test_a_copy_by_cp_is_read_only(desk: Desk, public: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """As the archive was in the mount. Whatever is to write to it says so to its owner, and what helps."""
    sealed(desk)
    desk.run("play", *desk.of_it, "-o", "it's a copy.tar")
    for name in (desk.index, "it's a copy.tar"):
        shutil.copy(desk.place / name, public)
    shutil.copytree(desk.root, public / desk.folder, copy_function=shutil.copy2)
    desk.place = public
    copy = public / "it's a copy.tar"
    give_to_nobody(public)
    copy.chmod(0o400)
    monkeypatch.chdir(public)
    name, *rest = words
    result = tartapefs_as_nobody(name, *desk.of_it, "--source-check", "mtime", *rest)
    assert result.returncode == 1
    assert result.stderr.startswith("tartapefs: it's a copy.tar: Permission denied; run ")
    desk.paste(result.stderr, "chmod u+w")
    result = tartapefs_as_nobody(name, *desk.of_it, "--source-check", "mtime", *rest)
    assert "Permission denied" not in result.stderr
    os.chown(copy, 0, 0)
    copy.chmod(0o400)
    result = tartapefs_as_nobody(name, *desk.of_it, "--source-check", "mtime", *rest)  # chmod would be denied, too
    assert "chmod" not in result.stderr
