"""Files that commands write: nothing of a tape and nothing of the user's is destroyed, whatever they are pointed at."""

import hashlib
import os
import re
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.programs import TARTAPEFS, run, under_strace, wait_until
from support.reference import Reference

from tartapefs import Tape, TapeConstraintError, TapeRecorder
from tartapefs.base.saved_state import SavedState

NOBODY = 65534
MIB = 1 << 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A recorded and sealed folder: some megabytes, folders, and a file in each."""
    root = tmp_path / "here" / "data"
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "a").write_bytes(os.urandom(3 * MIB))
    (root / "sub" / "file").write_bytes(b"content of a file\n" * 100)
    (root / "sub" / "deeper" / "z").write_bytes(os.urandom(2 * MIB))
    (tmp_path / "mnt").mkdir()
    assert run("record", root, "--digest", "sha256").returncode == 0
    return root


def whole(root: Path) -> bytes:
    reference = Reference(root)
    return reference.read(0, reference.size)


def contents(place: Path) -> dict[str, object]:
    """Everything below `place`: what files hold, where links lead, which inode it is."""
    found: dict[str, object] = {}
    for path in sorted(place.rglob("*")):
        status = path.lstat()
        is_file = stat.S_ISREG(status.st_mode)
        held = path.read_bytes() if is_file else os.readlink(path) if path.is_symlink() else None
        found[os.fspath(path)] = (held, status.st_ino, status.st_mtime_ns)
    return found


def drift(root: Path) -> None:
    (root / "sub" / "deeper" / "z").write_bytes(b"another")


# Where a file would be part of a tape

Place = Callable[[Path, Path], Path]  # of the source and of a free folder: a path that is no place for an output


def below(data: Path, free: Path) -> Path:
    return data / "sub" / "new"


def source_file(data: Path, free: Path) -> Path:
    return data / "sub" / "file"


def through_a_link(data: Path, free: Path) -> Path:
    (free / "link").symlink_to(data / "sub")
    return free / "link" / "new"


def index(data: Path, free: Path) -> Path:
    return data / ".tartape" / "index.db"


def copy_of_the_index(data: Path, free: Path) -> Path:
    """No part of this tape; but that of another would be lost."""
    (free / "other.db").write_bytes((data / ".tartape" / "index.db").read_bytes())
    return free / "other.db"


def hard_link(data: Path, free: Path) -> Path:
    """Of a file that had this link when it was recorded."""
    return free.parent / "hard link"


def another_tape(data: Path, free: Path) -> Path:
    return free.parent / "another" / "new"


def mounted(what: Path, where: Path) -> None:
    where.touch() if what.is_file() else where.mkdir()
    subprocess.run(["mount", "--bind", what, where], check=True)


def bind_mount(data: Path, free: Path) -> Path:
    mounted(data, free / "bound")
    return free / "bound" / "new"


def bind_mount_of_the_parent(data: Path, free: Path) -> Path:
    mounted(data.parent, free / "bound")
    return free / "bound" / "data" / "sub" / "new"


def bind_mount_of_a_folder(data: Path, free: Path) -> Path:
    mounted(data / "sub", free / "bound")
    return free / "bound" / "deeper" / "new"


def bind_mount_of_a_file(data: Path, free: Path) -> Path:
    mounted(data / "sub" / "file", free / "bound")
    return free / "bound"


PLACES: list[Place] = [below, source_file, through_a_link, index, copy_of_the_index, hard_link, another_tape,
                       bind_mount, bind_mount_of_the_parent, bind_mount_of_a_folder, bind_mount_of_a_file]  # fmt: skip
COMMANDS = {
    "play": ["play", "DATA", "-o", "FILE", "--force"],
    "play on": ["play", "DATA", "-o", "FILE", "--append"],
    "resume": ["resume", "DATA", "FILE"],
    "check": ["check", "DATA", "FILE", "--truncate", "--yes"],
    "sums": ["digest", "DATA", "--sums", "FILE", "--force"],
    "state": ["digest", "DATA", "--state", "FILE"],
    "verify": ["verify", "DATA", "--deep", "--state", "FILE"],
    "export": ["export-index", "DATA", "--ratarmount", "FILE", "--force"],
    "log": ["mount", "DATA", "MNT", "--log", "FILE"],
}


@pytest.fixture
def places(data: Path) -> Iterator[Path]:
    """A free folder, in which mounts may be made, beside a recorded one and a link of a source file."""
    os.link(data / "sub" / "file", data.parent / "hard link")
    another = data.parent / "another"
    another.mkdir()
    assert run("record", another).returncode == 0
    assert run("record", "--force", data, "--digest", "sha256").returncode == 0
    free = data.parent / "free"
    free.mkdir()
    yield free
    subprocess.run(["umount", "-q", free / "bound"], check=False)


@pytest.mark.long(but=2)
@pytest.mark.root
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_no_output_is_part_of_a_tape(data: Path, places: Path, place: Place) -> None:
    """By whatever name it is reached: refused before anything is changed, by each command."""
    output = place(data, places)
    before = contents(data.parent)
    names = {"DATA": data, "FILE": output, "MNT": data.parents[1] / "mnt"}
    for name, command in COMMANDS.items():
        result = run(*(names.get(word, word) for word in command))
        assert result.returncode == 2, (name, result.stderr)
        assert re.search("tape|recorded", result.stderr), (name, result.stderr)
        assert len(result.stderr.splitlines()) == 1
        assert contents(data.parent) == before, name
    assert run("verify", data, "--deep").returncode == 0


@pytest.mark.root
def test_a_folder_for_units_that_is_the_source(data: Path, places: Path) -> None:
    mounted(data, places / "bound")
    before = contents(data)
    for folder in (data, data / "sub", places / "bound"):
        assert run("systemd-unit", data, "/mnt/tape", "--output", folder).returncode == 2
    assert contents(data) == before


def test_a_copy_of_the_tape_knows_its_files_too(data: Path, tmp_path: Path) -> None:
    """Not at home no recorded inode tells, and the files themselves are looked at."""
    subprocess.run(["cp", "-a", data, tmp_path / "data"], check=True)
    os.link(tmp_path / "data" / "sub" / "file", tmp_path / "link")
    before = contents(tmp_path / "data")
    for options in (("--force",), ("--append",)):
        assert run("play", tmp_path / "data", "-o", tmp_path / "link", *options).returncode == 2
    assert contents(tmp_path / "data") == before
    os.link(tmp_path / "link", tmp_path / "here" / "link")  # of the other tape it is no part
    assert run("play", data, "-o", tmp_path / "here" / "link", "--force").returncode == 0


def test_an_index_has_no_place_in_another_tape(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"x")
    before = contents(data)
    for place in (data / "new.db", data / "sub" / "new.db"):
        result = run("record", other, "--index", place)
        assert result.returncode == 4 and "which is recorded, and would change it" in result.stderr
    assert contents(data) == before
    with pytest.raises(TapeConstraintError, match="the folder of the tape"):
        TapeRecorder(other, other / "new.db").commit()


def test_the_folder_for_the_index_may_have_others(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / ".tartape").mkdir(parents=True)
    (root / "file").write_bytes(b"x")
    assert run("record", root, "--index", root / ".tartape" / "second.db").returncode == 0
    assert os.listdir(root / ".tartape") == ["second.db"]


# What is no file, and what is a link


def test_where_there_is_no_file(data: Path, tmp_path: Path) -> None:
    """Devices, pipes, standard output by all of its names, a descriptor of the shell's: written to as they are."""
    expected = hashlib.sha256(whole(data)).hexdigest()
    assert run("play", data, "-o", "/dev/null").returncode == 0
    assert Path("/dev/null").is_char_device()
    for name in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        result = run("play", data, "-o", name, text=False, errors=None, cwd=tmp_path)
        assert hashlib.sha256(result.stdout).hexdigest() == expected, name
    shell = 'exec 3>"$1"; echo before >&3; shift; "$@" -o /dev/fd/3; echo after >&3'
    subprocess.run(["sh", "-c", shell, "sh", tmp_path / "out", *TARTAPEFS, "play", data, "--length", "0"], check=True)
    assert (tmp_path / "out").read_text() == "before\nafter\n"
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sha256sum", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        assert run("play", data, "-o", tmp_path / "pipe").returncode == 0
        assert reader.communicate()[0].startswith(expected)
    assert sorted(os.listdir(tmp_path)) == ["here", "mnt", "out", "pipe"]
    result = run("play", data, "-o", "/dev/full")
    assert result.returncode == 1 and "No space left" in result.stderr


@pytest.mark.parametrize("target", ["precious", "nothing"])
def test_a_link_is_not_written_through(data: Path, tmp_path: Path, target: str) -> None:
    """Not to a file that would be replaced or made: in a folder of many users it may be another's."""
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(target)
    before = contents(tmp_path)
    for command in (["play", data, "-o", tmp_path / "link"], ["play", data, "-o", tmp_path / "link", "--force"],
                    ["digest", data, "--sums", tmp_path / "link", "--force"],
                    ["export-index", data, "--ratarmount", tmp_path / "link", "--force"],
                    ["digest", data, "--state", tmp_path / "link"],
                    ["verify", data, "--deep", "--state", tmp_path / "link"]):  # fmt: skip
        result = run(*command)
        assert result.returncode == 2 and "is a symbolic link; name what it leads to" in result.stderr
    assert contents(tmp_path) == before


# Files of the user's


def test_a_state_that_is_none(data: Path, tmp_path: Path) -> None:
    """A file of any other kind is left as it is, and so is a state of another command."""
    assert run("digest", data, "--state", tmp_path / "digest").returncode == 0
    (tmp_path / "text").write_bytes(b"a text\n" * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "half").write_bytes(b"tartapefs state 1: verif")
    for kind in ("verification", "digest"):
        (tmp_path / kind[:5]).write_bytes(b"tartapefs state 1: %b\n" % kind.encode())
    before = contents(tmp_path)
    for name in ("digest", "text", "empty", "half", "verif", "diges"):
        result = run("verify", data, "--deep", "--state", tmp_path / name)
        assert result.returncode == 2 and "Traceback" not in result.stderr, name
        if name != "digest":
            result = run("digest", data, "--state", tmp_path / name)
            assert result.returncode == 2 and "Traceback" not in result.stderr, name
    assert contents(tmp_path) == before


def test_a_state_of_another_tape(data: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    (data / "more").write_bytes(b"x")
    slowly = under_strace("-e", "trace=rename", "-e", "inject=rename:signal=SIGKILL:when=2")
    subprocess.run([*slowly, "verify", data, "--deep", "--state", state], capture_output=True, check=False)
    assert run("verify", data, "--deep", "--state", state).returncode == 1 and not state.exists()
    with Tape.discover(data) as tape:
        from tartapefs.verify.content_scan import VerificationState

        with VerificationState(tape, os.fspath(state)) as begun:
            begun.save()
    assert run("record", "--force", data, "--digest", "sha256").returncode == 0
    before = state.read_bytes()
    result = run("verify", data, "--deep", "--state", state)
    assert result.returncode == 2 and "the state of another tape; remove it to begin anew" in result.stderr
    assert state.read_bytes() == before


def test_files_with_names_that_were_taken_once(data: Path, tmp_path: Path) -> None:
    """`X.new`, `X.seal` and the like are the user's, or refused and left alone."""
    sums, state, out, db = (tmp_path / name for name in ("sums", "state", "out", "t.db"))
    for path in (sums, state, out, db):
        for suffix in ("new", "part", "0123456789abcdef.part", "tmp"):
            path.with_name(f"{path.name}.{suffix}").write_bytes(b"mine")
    before = contents(tmp_path)
    assert run("digest", data, "--sums", sums, "--state", state).returncode == 0
    assert run("digest", data, "--sums", sums, "--state", state, "--force").returncode == 0
    assert run("play", data, "-o", out).returncode == 0
    assert run("play", data, "-o", out, "--force").returncode == 0
    assert run("record", data, "--index", db).returncode == 0
    assert run("record", data, "--index", db, "--force").returncode == 0
    db.with_name("t.db.seal").write_bytes(b"mine")
    result = run("seal", data, "--index", db)
    assert result.returncode == 2 and "t.db.seal: is not a file that a seal saves" in result.stderr
    assert db.with_name("t.db.seal").read_bytes() == b"mine"
    db.with_name("t.db.seal").unlink()
    assert run("seal", data, "--index", db).returncode == 0
    assert contents(tmp_path) == before | {
        name: found for name, found in contents(tmp_path).items() if Path(name) in (sums, state, out, db)
    }
    checked = subprocess.run(["sha256sum", "-c", "--quiet", sums], cwd=data.parent, capture_output=True)
    assert checked.returncode == 0


def test_sums_beside_an_index_of_a_like_name(data: Path, tmp_path: Path) -> None:
    assert run("record", data, "--index", tmp_path / "t.new").returncode == 0
    before = (tmp_path / "t.new").read_bytes()
    assert run("digest", data, "--index", tmp_path / "t.new", "--sums", tmp_path / "t").returncode == 0
    assert (tmp_path / "t.new").read_bytes() == before


def test_sums_that_are_there(data: Path, tmp_path: Path) -> None:
    (tmp_path / "sums").write_bytes(b"mine")
    result = run("digest", data, "--sums", tmp_path / "sums")
    assert result.returncode == 2 and 'is there already; "--force" replaces it' in result.stderr
    assert (tmp_path / "sums").read_bytes() == b"mine"
    drift(data)
    assert run("digest", data, "--sums", tmp_path / "sums", "--force").returncode == 1
    assert (tmp_path / "sums").read_bytes() == b"mine" and sorted(os.listdir(tmp_path)) == ["here", "mnt", "sums"]


def test_units_that_are_there(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "units"
    folder.mkdir()
    pair = ["systemd-unit", data, "/mnt/tape", "--automount", "--output", folder]
    (folder / "mnt-tape.automount").write_bytes(b"mine")
    result = run(*pair)
    assert result.returncode == 2 and "is there already" in result.stderr
    assert os.listdir(folder) == ["mnt-tape.automount"] and (folder / "mnt-tape.automount").read_bytes() == b"mine"
    assert run(*pair, "--force").returncode == 0
    assert sorted(os.listdir(folder)) == ["mnt-tape.automount", "mnt-tape.mount"]
    assert b"Where=/mnt/tape" in (folder / "mnt-tape.automount").read_bytes()


# Play into a file


def test_a_good_copy_outlives_a_play(data: Path, tmp_path: Path) -> None:
    """It is refused without --force; with it, it is replaced when the new one is complete, and not before."""
    out = tmp_path / "copy.tar"
    assert run("play", data, "-o", out).returncode == 0
    out.chmod(0o600)
    good = whole(data)
    assert out.read_bytes() == good
    for options in ([], ["--start", "512"], ["--length", "5"]):
        result = run("play", data, "-o", out, *options)
        assert result.returncode == 2
        assert 'is there already; "--force" replaces it, "--append" continues it' in result.stderr
        assert out.read_bytes() == good
    before = out.stat().st_ino
    assert run("play", data, "-o", out, "--force").returncode == 0
    assert out.read_bytes() == good and out.stat().st_ino != before
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    drift(data)
    result = run("play", data, "-o", out, "--force")
    assert result.returncode == 1 and "z" in result.stderr
    assert out.read_bytes() == good
    assert sorted(os.listdir(tmp_path)) == ["copy.tar", "here", "mnt"]


def test_a_new_copy_that_fails_is_continued(data: Path, tmp_path: Path) -> None:
    """It keeps what was written, and the command says how to go on."""
    out, good = tmp_path / "copy.tar", whole(data)
    last = data / "sub" / "deeper" / "z"
    before = last.stat()
    last.rename(tmp_path / "aside")
    result = run("play", data, "-o", out)
    assert result.returncode == 1
    size = out.stat().st_size
    assert size >= 3 * MIB and out.read_bytes() == good[:size]
    again = f"tartapefs play {data} -o {out} --append"
    assert f'{out}: has the first {size:,} bytes; "{again}" goes on from there' in result.stderr
    (tmp_path / "aside").rename(last)
    os.utime(last.parent, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert run("record", "--force", data).returncode == 0
    good = whole(data)
    os.truncate(out, 2 * MIB)
    assert run("play", data, "-o", out, "--append", "--length", "1M").returncode == 0
    assert out.read_bytes() == good[: 3 * MIB]
    assert run("play", data, "-o", out, "--append", "--events").returncode == 0
    assert out.read_bytes() == good
    assert run("play", data, "-o", out, "--append").returncode == 0
    assert out.read_bytes() == good
    assert run("play", data, "-o", tmp_path / "fresh", "--append").returncode == 0
    assert (tmp_path / "fresh").read_bytes() == good


def test_append_to_what_is_no_copy(data: Path, tmp_path: Path) -> None:
    good = whole(data)
    texts = {"text": b"a text\n", "zeros": good[:MIB] + bytes(2 * MIB), "longer": good + b"\0"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
        result = run("play", data, "-o", tmp_path / name, "--append")
        assert result.returncode == 1 and "is no beginning of this archive" in result.stderr
        assert (tmp_path / name).read_bytes() == text
    x = tmp_path / "x"
    for options in (["--append"], ["-o", "-", "--append"], ["-o", x, "--append", "--start", "0"],
                    ["-o", x, "--append", "--force"], ["-o", "/dev/null", "--append", "--start", "5"]):  # fmt: skip
        assert run("play", data, *options).returncode == 2
    assert not x.exists()


def test_a_play_that_gives_nothing_leaves_nothing(data: Path, tmp_path: Path) -> None:
    (data / "new").touch()
    result = run("play", data, "-o", tmp_path / "out")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    (tmp_path / "empty").touch()
    assert run("play", data, "-o", tmp_path / "empty", "--append").returncode == 1
    assert sorted(os.listdir(tmp_path)) == ["empty", "here", "mnt"]


@pytest.mark.needs("strace")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_replacing_play_that_is_interrupted(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    out.write_bytes(b"old")
    slowly = under_strace("-e", "trace=preadv,preadv2", "-e", "inject=preadv,preadv2:delay_enter=300000", log=calls)
    with subprocess.Popen([*slowly, "play", data, "-o", out, "--force"], stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: [name for name in os.listdir(tmp_path) if name.endswith(".part")])
        wait_until(lambda: calls.exists() and calls.read_text().count(" = ") >= 1)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), number)
        assert process.wait(60) != 0
    assert out.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["calls", "here", "mnt", "out"]


# Folders of many users


@pytest.fixture
def sticky(tmp_path: Path) -> Path:
    place = tmp_path / "sticky"
    place.mkdir()
    place.chmod(0o1777)
    return place


@pytest.mark.root
def test_what_another_user_made_is_not_adopted(data: Path, sticky: Path) -> None:
    """Neither a lock nor a state of theirs, though it is one in every other respect."""
    for name, kind, command in (
        ("i.db.lock", "recording", ["record", data, "--index", sticky / "i.db"]),
        ("i.db.seal", "seal", ["seal", data, "--index", sticky / "i.db"]),
        ("d", "digest", ["digest", data, "--state", sticky / "d"]),
        ("v", "verification", ["verify", data, "--deep", "--state", sticky / "v"]),
    ):
        SavedState(os.fspath(sticky / name), kind).close()
        os.chown(sticky / name, NOBODY, NOBODY)
        theirs = (sticky / name).read_bytes()
        result = run(*command)
        assert result.returncode == 2 and f"{name}: belongs to the user {NOBODY}; " in result.stderr
        assert (sticky / name).read_bytes() == theirs
        (sticky / name).unlink()
        assert run(*command).returncode == 0


# Killed, and run again


def test_two_recorders_of_an_index_elsewhere(data: Path, tmp_path: Path) -> None:
    """Other indexes in the same folder are no hindrance."""
    place = tmp_path / "indexes"
    place.mkdir()
    entered, leave = threading.Event(), threading.Event()

    def wait(path: str) -> bool:
        entered.set()
        assert leave.wait(60)
        return False

    thread = threading.Thread(target=TapeRecorder(data, place / "1.db", exclude=wait).commit)
    thread.start()
    try:
        assert entered.wait(60)
        result = run("record", data, "--index", place / "1.db")
        assert result.returncode == 4 and "another recording" in result.stderr
        assert run("record", data, "--index", place / "2.db").returncode == 0
    finally:
        leave.set()
        thread.join(60)
    assert sorted(os.listdir(place)) == ["1.db", "2.db"]


@pytest.mark.long(but=1)
@pytest.mark.needs("strace")
@pytest.mark.parametrize("call", ["linkat", "flock", "pwrite64", "fsync", "rename", "unlink"])
def test_what_a_killed_digest_leaves_is_its_own(data: Path, tmp_path: Path, call: str) -> None:
    """At each of these calls: the next run goes on, and in the end there is nothing but what was asked for."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "sums.part").write_bytes(b"mine")
    command = ["digest", data, "--sums", place / "sums", "--state", place / "state"]
    for number in range(1, 9):
        killing = under_strace("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}")
        killed = subprocess.run([*killing, *map(os.fspath, command)], capture_output=True, check=False)
        assert killed.returncode in (0, -signal.SIGKILL), killed.stderr
        (place / "sums").unlink(missing_ok=True)
        result = run(*command)
        assert result.returncode == 0, result.stderr
        assert sorted(os.listdir(place)) == ["state", "sums", "sums.part"]
        checked = subprocess.run(["sha256sum", "-c", "--quiet", place / "sums"], cwd=data.parent, capture_output=True)
        assert checked.returncode == 0
        for name in ("state", "sums"):
            (place / name).unlink()
        if killed.returncode == 0:
            break


def test_names_as_long_as_can_be(data: Path, tmp_path: Path) -> None:
    for name in ("x" * 240, "\N{LATIN SMALL LETTER A WITH DIAERESIS}" * 120):
        assert run("record", data, "--index", tmp_path / name).returncode == 0
        assert run("play", data, "-o", tmp_path / f"{name}.tar").returncode == 0
        assert run("play", data, "-o", tmp_path / f"{name}.tar", "--force").returncode == 0
    assert len(os.listdir(tmp_path)) == 6
