"""What is hostile or broken: indexes without end, flipped bits, fuzzing, names, other users, whoever would write.

Single bad indexes are in test_index.py, sources that try to escape in test_escape.py.

`TARTAPEFS_BIT_FLIPS` is the number of bits that are flipped, 300 by default.
"""

import ctypes
import errno
import fcntl
import json
import os
import random
import select
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import packed
from support.daemon import daemons_of
from support.programs import run
from support.reference import Reference
from support.users import User, unprivileged
from unit.index.test_reader import (
    PAGE,
    Damage,
    chain,
    edited,
    execute,
    giant,
    index_of,
    interior,
    replanted,
    seal,
    sealed,
)

from tartapefs import TapeRecorder

Mount = Callable[..., Path]
TESTS = Path(__file__).parents[1]
MEMORY = 256 << 20
BIT_FLIPS = int(os.environ.get("TARTAPEFS_BIT_FLIPS", 300))
NOBODY = 65534

# Names that forge lines, drive terminals, turn the direction of text, or are no text.
NAMES = {
    "newline": b"two\nlines",
    "escape": b"\x1b[2J\x1b]0;title\x07",
    "bidirectional": "\u202egpj.exe\u2066".encode(),
    "separator": "a\u2028b\u0085c".encode(),
    "invalid": b"\xff\xfe\xc3(",
    "return": b"over\rwritten",
    "quotes": b'"}\n{"valid": true, \'x',
    "backslash": b"\\n\\x1b",
}


# Indexes that would take time or memory without end

# Goes in by every door, and says what came out of each, and the most memory that was ever in use.
PROBE = """
import json, sys, time
from pathlib import Path
from tartapefs import Tape, TapeFormatError, TapePlayer

root = sys.argv[1]

def read(tape):
    player = TapePlayer(tape, root)
    try:
        for start in range(0, min(tape.total_size, 1 << 22), 1 << 16):
            player.read(start, 1 << 16)
        player.audit()
    finally:
        player.close()

DOORS = {
    "open": lambda tape: None,
    "members": lambda tape: [None for _ in tape.members()],
    "folders": lambda tape: [None for _ in tape.folders()],
    "find": lambda tape: tape.find("data/0100"),
    "rows": lambda tape: tape.rows_are_sound(),
    "count": lambda tape: tape.count(1, tape.total_size - 1),
    "read": read,
}
outcomes = {}
for name, door in DOORS.items():
    try:
        with Tape.from_index(root + "/.tartape/index.db") as tape:
            door(tape)
        outcomes[name] = "believed"
    except TapeFormatError:
        outcomes[name] = "refused"
    except Exception as error:
        outcomes[name] = repr(error)
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(json.dumps({"outcomes": outcomes, "peak": int(peak) * 1024}))
"""


def quickly(path: Path, *statements: str) -> None:
    execute(path, "PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF", "BEGIN", *statements, "COMMIT")


def huge_rows(path: Path) -> None:
    quickly(path, "UPDATE pack SET crc = zeroblob(1000000)"
                  " WHERE start > 0 AND start < (SELECT max(start) FROM pack)")  # fmt: skip


def huge_packs(path: Path) -> None:
    quickly(path, "UPDATE pack SET members = zeroblob(1000000) WHERE start > 0")


def costly_packs(path: Path, strings: Callable[[], list[bytes]]) -> None:
    """Each pack but the first and the last with `strings` for folders, as long as a row may be.

    The last of them is malformed: what comes before that is found costs the most time and memory.
    """
    named = strings()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN")
        rows = database.execute("SELECT * FROM pack WHERE start > 0 ORDER BY start").fetchall()
        for start, count, folders, blob, _ in rows[:-1]:
            facts = blob[2 + blob[0] : 2 + blob[0] + count * packed.FACTS.size]
            shared = bytes([0] + [255] * (len(named) - 1))
            names = [row[2] for row in packed.rows_of(start, count, blob)]
            blob = bytes([len(named), 0]) + shared + facts + b"\0".join([*names, *[b""] * count, *named])
            assert len(blob) < 33_000
            checksum = packed.checksum(start, count, folders, blob)
            database.execute("UPDATE pack SET members = ?, crc = ? WHERE start = ?", (blob, checksum, start))
        database.execute("COMMIT")


def deep_folders(path: Path) -> None:
    """A folder 15,000 deep, and 253 that share what they can of it."""
    costly_packs(path, lambda: [b"data/" + b"a/" * 14_600, *[b"a/"] * 253, b"a"])


def growing_folders(path: Path) -> None:
    """254 folders, each as deep as can be made of the one before."""
    costly_packs(path, lambda: [b"data/" + b"a/" * 125, *[b"a/" * 58] * 253, b"a"])


def strings_without_end(path: Path) -> None:
    """Nothing but strings: 32,768 of them in each pack."""
    sealed("UPDATE pack SET members = zeroblob(32768) WHERE start > 0")(path)


def beyond_any_offset(path: Path) -> None:
    """Behind all members a pack with folders and sizes that add up beyond the largest offset."""
    more = ", ".join(packed.COLUMNS[5:])
    edited(
        f"INSERT INTO member SELECT 1000000, {2**62}, folder, x'61', {stat.S_IFDIR}, 0, {more} FROM member"
        " WHERE number = 2",
        f"INSERT INTO member SELECT 1000001, {2**62}, folder, x'62', {stat.S_IFREG}, {2**63 - 1}, {more} FROM member"
        " WHERE number = 2",
    )(path)


def counts_without_end(path: Path) -> None:
    """Numbers of members that are none: infinite, and whose sum is none."""
    sealed("UPDATE pack SET count = 9e999 WHERE start > 0",
           "UPDATE pack SET count = -9e999 WHERE start = (SELECT max(start) FROM pack)")(path)  # fmt: skip


def huge_facts(path: Path) -> None:
    quickly(path, *(f"INSERT INTO tape VALUES ('a{at:02}', CAST(zeroblob(1040000) AS TEXT))" for at in range(31)))


def huge_schema(path: Path) -> None:
    """90,000 tables: SQLite would read them all before it answers the first query."""
    columns = ",".join(f"c{at}" for at in range(100))
    database = sqlite3.connect(path, isolation_level=None)
    try:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "writable_schema=ON"):
            database.execute(f"PRAGMA {pragma}")
        database.execute("BEGIN")
        database.executemany(
            "INSERT INTO sqlite_master VALUES ('table', ?1, ?1, 2, ?2)",
            ((f"t{at}", f"CREATE TABLE t{at} ({columns})") for at in range(90_000)),
        )
        database.execute("COMMIT")
    finally:
        database.close()


def no_folder_in_sight(path: Path) -> None:
    """All packs, one beyond the archive's end, then without end those of a page that has files alone.

    Who looks for folders, or at all rows, would look for ever; who looks at one place sees nothing amiss.
    """
    columns = "count, folders, members, crc"
    execute(path, f"INSERT INTO pack SELECT {2**52}, {columns} FROM pack ORDER BY start DESC LIMIT 1")
    seal(path)

    def plant(root: int, new: int, old: bytes) -> list[bytes]:
        assert old[0] == 5 and int.from_bytes(old[3:5], "big") > 1, "the packs fill three pages or more"
        cell = int.from_bytes(old[14:16], "big")
        second_leaf = int.from_bytes(old[cell : cell + 4], "big")
        levels = [*range(new + 2, new + 9), second_leaf]
        pages = [interior([(page, 2**54 + at) for at in range(200)], page) for page in levels]
        return [interior([(new, 2**53)], new + 1), *pages]

    replanted(plant)(path)


def holes_alone(path: Path) -> None:
    """The first page of an index, and 1 TB of nothing."""
    path.write_bytes(path.read_bytes()[:PAGE])
    os.truncate(path, 1 << 40)


HUGE: dict[str, Damage] = {
    "values of 1 MB in each row": huge_rows,
    "packs of 1 MB each": huge_packs,
    "facts of 1 MB each": huge_facts,
    "90,000 tables": huge_schema,
    "value of 1 GB": giant(circular=False),
    "value of 1 GB in one page": giant(circular=True),
    "rows without end": chain(8, 200),
    "rows again": chain(1, 3),
    "files without end": no_folder_in_sight,
    "folders 15,000 deep": deep_folders,
    "folders that grow": growing_folders,
    "strings without end": strings_without_end,
    "beyond any offset": beyond_any_offset,
    "counts without end": counts_without_end,
    "holes": holes_alone,
}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A recorded folder whose index has several pages of packs."""
    root = tmp_path / "data"
    (root / "0000 folder").mkdir(parents=True)
    for at in range(1500):
        (root / f"{at:04}").write_bytes(b"%d" % at)
    TapeRecorder(root).commit()
    return root


@pytest.mark.long(but=2)
@pytest.mark.parametrize("damage", HUGE)
def test_no_index_takes_time_or_memory_without_end(wide: Path, damage: str) -> None:
    """Each door is shut, or gives an answer, within seconds and 256 MB; and what reads all is shut."""
    HUGE[damage](index_of(wide))
    command = [sys.executable, "-c", PROBE, wide]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert set(found["outcomes"].values()) <= {"refused", "believed"}, found
    assert "refused" in found["outcomes"].values()
    assert found["peak"] < MEMORY
    verified = run("verify", wide, timeout=30)
    assert (verified.returncode, verified.stdout) == (3, "")
    assert len(verified.stderr.splitlines()) == 1


def test_the_probe_believes_what_is_right(wide: Path) -> None:
    """The check on the test above."""
    done = subprocess.run([sys.executable, "-c", PROBE, wide], capture_output=True, text=True, timeout=30)
    assert set(json.loads(done.stdout)["outcomes"].values()) == {"believed"}


# Flipped bits

FLIPS = """
import json, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.reference import Reference
from tartapefs import Tape, TapeFormatError, TapePlayer

root, count = Path(sys.argv[2]), int(sys.argv[3])
path = root / ".tartape" / "index.db"
good = path.read_bytes()
reference = Reference(root)
expected = reference.read(0, reference.size)
chance = random.Random(20240301)
used = [at for at, byte in enumerate(good) if byte]  # every second bit is one of these: most of a page may be empty
outcomes = {"refused": 0, "right": 0}
wrong = []
for number in range(count):
    bit = chance.choice(used) * 8 + chance.randrange(8) if number % 2 else chance.randrange(len(good) * 8)
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    try:
        with Tape.discover(root) as tape:
            player = TapePlayer(tape)
            try:
                if player.read(0, tape.total_size) == expected:
                    outcomes["right"] += 1
                else:
                    wrong.append([bit, "other bytes"])
            finally:
                player.close()
    except TapeFormatError:
        outcomes["refused"] += 1
    except Exception as error:
        wrong.append([bit, repr(error)])
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(json.dumps({"outcomes": outcomes, "wrong": wrong, "peak": int(peak) * 1024}))
"""


@pytest.mark.long
def test_random_bit_flips_in_one_process(tmp_path: Path) -> None:
    """Each is refused, or changes no byte of the archive; the process that met them all stays below 256 MB."""
    root = tmp_path / "data"
    for at in range(8):
        (root / f"folder {at}" / "deeper").mkdir(parents=True)
        for number in range(40):
            (root / f"folder {at}" / "deeper" / f"{number}").write_bytes(b"%d" % number * (at + 1))
        (root / f"folder {at}" / "link").symlink_to("deeper")
    TapeRecorder(root).commit()
    command = [sys.executable, "-c", FLIPS, TESTS, root, str(BIT_FLIPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["wrong"] == []
    assert sum(found["outcomes"].values()) == BIT_FLIPS
    assert min(found["outcomes"].values()) > 0
    assert found["peak"] < MEMORY


# Fuzzing


@pytest.mark.long
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed")
def test_a_short_run_of_the_fuzzer(tmp_path: Path) -> None:
    """1,000 inputs that break nothing: see fuzz/fuzz_index.py."""
    options = ["-runs=1000", "-seed=1", "-timeout=20", "-rss_limit_mb=512", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, TESTS / "long" / "fuzz_index.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "Done 1000 runs" in done.stderr


# Names


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A recorded folder, of a hostile name itself, of files and folders with hostile names."""
    root = tmp_path / os.fsdecode(NAMES["newline"] + NAMES["escape"])
    for name in NAMES.values():
        (root / os.fsdecode(b"in " + name)).mkdir(parents=True)
        (root / os.fsdecode(b"in " + name) / os.fsdecode(name)).write_bytes(name)
    assert run("record", root).returncode == 0
    return root


def plain_lines(text: str) -> list[str]:
    """The lines of `text`, each of which shows everything that is in it."""
    lines = text.split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() for line in lines), ascii(text)
    return lines


def test_drift_of_hostile_names_is_one_line_each(hostile: Path) -> None:
    """In `verify`, as text and as JSON, and in the message of a play that ends at it."""
    for name in NAMES.values():
        (hostile / os.fsdecode(b"in " + name) / os.fsdecode(name)).write_bytes(b"something longer: " + name)
    verified = run("verify", hostile)
    assert verified.returncode == 1
    assert len(plain_lines(verified.stdout)) == len(NAMES)
    assert len(plain_lines(verified.stderr)) == 1
    as_json = run("verify", "--json", hostile)
    assert as_json.stdout.replace("\n", "").isascii()
    found = json.loads(as_json.stdout)
    assert found["valid"] is False
    assert len(found["drift"]) == len(NAMES)
    played = run("play", hostile, errors="replace")
    assert played.returncode == 1
    assert len(plain_lines(played.stderr)) == 1


def test_added_hostile_names_are_one_line_each(hostile: Path) -> None:
    for name in NAMES.values():
        (hostile / os.fsdecode(b"new " + name)).write_bytes(b"")
    verified = run("verify", hostile)
    assert len(plain_lines(verified.stdout)) == len(NAMES) + 1  # and the folder that they are in


def test_hostile_names_that_do_not_fit_are_one_line_each(tmp_path: Path) -> None:
    """All offenders of a recording, and what it left out."""
    root = tmp_path / "data"
    root.mkdir()
    for name in NAMES.values():
        (root / os.fsdecode(b"x" * 110 + name)).write_bytes(b"")
        os.mkfifo(root / os.fsdecode(b"pipe " + name))
    recorded = run("-v", "record", root)
    assert recorded.returncode == 4
    assert len(plain_lines(recorded.stderr)) == len(NAMES) + 1
    for name in NAMES.values():
        (root / os.fsdecode(b"x" * 110 + name)).unlink()
    recorded = run("-v", "record", root)
    assert recorded.returncode == 0
    plain_lines(recorded.stderr)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("kind", NAMES)
def test_a_mount_names_hostile_drift_in_one_line(hostile: Path, tmp_path: Path, mount: Mount, kind: str) -> None:
    """In its log, its extended attributes and its status, as text and as JSON."""
    log = tmp_path / "log"
    archive = mount(hostile, "--log", log)
    (hostile / os.fsdecode(b"in " + NAMES[kind]) / os.fsdecode(NAMES[kind])).write_bytes(b"something longer")
    with pytest.raises(OSError):
        archive.read_bytes()
    (line,) = [line for line in plain_lines(log.read_text()) if "size changed" in line]
    assert "recorded" in line
    state = os.getxattr(archive.parent, "user.tartape.state").decode()
    assert state.isprintable()
    assert state.startswith("invalid: ")
    assert os.getxattr(archive.parent, "user.tartape.source").decode().isprintable()
    status = run("status", archive.parent)
    assert status.returncode == 1
    assert len(plain_lines(status.stdout)) == 14  # a line for each fact
    as_json = run("status", "--json", archive.parent)
    assert json.loads(as_json.stdout)["state"] == state
    assert as_json.stdout.replace("\n", "").isascii()


# Other users


@pytest.mark.long(but=1)
@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.needs("setpriv")
@pytest.mark.parametrize(("group", "may_read"), [(0, True), (NOBODY, False)])
def test_the_group_reads_what_the_mode_says(tree: Path, public: Path, group: int, may_read: bool) -> None:
    """0440 with `--allow-other`: whoever is in the group of who mounted, and nobody else."""
    assert run("record", tree).returncode == 0
    assert run("mount", tree, public / "mnt", "--allow-other", "--mode=0440").returncode == 0
    try:
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={group}", "--clear-groups", "cat"]
        done = subprocess.run([*command, public / "mnt" / "archive.tar"], capture_output=True, timeout=20)
        reference = Reference(tree)
        assert done.stdout == (reference.read(0, reference.size) if may_read else b"")
        assert (done.returncode == 0) is may_read
    finally:
        assert run("unmount", public / "mnt").returncode == 0


@pytest.mark.fuse
class TestUnprivileged:
    pytestmark = unprivileged

    def test_a_mount_gives_nobody_what_they_may_not_read(self, user: User) -> None:
        """Root recorded the folder; a user mounts it who may not read one of the files: all but its bytes comes out."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        secret = b"the secret of the source. " * 400
        (data / "more" / "secret").write_bytes(secret)
        (data / "more" / "secret").chmod(0o600)
        assert run("record", data).returncode == 0
        reference = Reference(data)
        start = reference.starts[b"data/more/secret"] + 512
        result = user.tartapefs("mount", data, mountpoint)
        assert result.returncode == 0, result.stderr
        archive = mountpoint / "archive.tar"
        for at in (start, start + 5000, start - 512 * 3):
            done = user("dd", f"if={archive}", "bs=4096", "count=1", "iflag=skip_bytes", f"skip={at}", "status=none")
            assert done.returncode == 1
            assert done.stdout == ""
            assert "Input/output error" in done.stderr
        header = user("dd", f"if={archive}", "bs=512", "count=1", f"skip={start // 512 - 1}", "status=none")
        assert header.stdout == reference.read(start - 512, 512).decode()
        assert secret[:10].decode() not in user("cat", archive).stdout
        assert user("cat", data / "more" / "secret").returncode == 1
        assert user.tartapefs("unmount", mountpoint).returncode == 0

    def test_the_daemon_lends_nothing_to_others(self, user: User) -> None:
        """What it has open, and its memory, are closed to another user, who may not read the index either."""
        data, mountpoint = user.folder / "data", user.folder / "mnt"
        assert user.tartapefs("mount", data, mountpoint, "--record").returncode == 0
        (pid,) = [pid for pid in daemons_of(mountpoint) if os.path.exists(f"/proc/{pid}/fd")]
        daemon = f"/proc/{pid}"
        other = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups"]
        for what in ("fd", "map_files", "root/", "cwd/"):
            assert "Permission denied" in user.as_root(*other, "ls", f"{daemon}/{what}").stderr, what
        assert "Permission denied" in user.as_root(*other, "head", "-c1", f"{daemon}/mem").stderr
        assert user.tartapefs("unmount", mountpoint).returncode == 0


# Calls that would write, and calls that read in other ways


@pytest.fixture
def archive(tree: Path, mount: Mount) -> Path:
    assert run("record", tree).returncode == 0
    return mount(tree)


@pytest.fixture
def expected(tree: Path) -> bytes:
    reference = Reference(tree)
    return reference.read(0, reference.size)


@pytest.fixture
def fd(archive: Path) -> Iterator[int]:
    opened = os.open(archive, os.O_RDONLY)
    yield opened
    os.close(opened)


def call(name: str, *arguments: Any) -> int:
    """A function of libc by its name; raises OSError."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result = int(function(*(os.fsencode(a) if isinstance(a, os.PathLike) else a for a in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def errno_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "allowed"


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            made.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


def test_rarer_calls_that_would_write_are_refused(archive: Path, expected: bytes, fd: int, tree: Path) -> None:
    """With EROFS; those that the kernel judges by the descriptor alone, which is not open for writing, with EBADF."""
    folder, new = archive.parent, archive.parent / "new"
    at, null = -100, ctypes.c_void_p()
    acl = b"\2\0\0\0" + b"\1\0\7\0\xff\xff\xff\xff\4\0\0\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff"
    attempts: dict[str, Callable[[], object]] = {
        "open a temporary file": lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR),
        "create and truncate": lambda: os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC),
        "create to read": lambda: os.open(new, os.O_RDONLY | os.O_CREAT),
        "open all ways to write": lambda: os.open(archive, os.O_RDWR | os.O_TRUNC | os.O_APPEND | os.O_SYNC),
        "open directly to write": lambda: os.open(archive, os.O_WRONLY | os.O_DIRECT),
        "exchange": lambda: call("renameat2", at, archive, at, folder / "archive.tar", 2),
        "rename without replacing": lambda: call("renameat2", at, archive, at, new, 1),
        "rename to a whiteout": lambda: call("renameat2", at, archive, at, new, 4),
        "replace": lambda: os.replace(archive, new),
        "link of a descriptor": lambda: call("linkat", at, Path(f"/proc/self/fd/{fd}"), at, new, 0x400),
        "mknod of a device": lambda: os.mknod(new, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        "bind a socket": lambda: listen(new),
        "fchmod": lambda: os.fchmod(fd, 0o777),
        "fchown": lambda: os.fchown(fd, 0, 0),
        "lchown": lambda: os.lchown(archive, 0, 0),
        "chown of the folder": lambda: os.chown(folder, 0, 0),
        "futimens": lambda: os.utime(fd),
        "utimensat of a link": lambda: call("utimensat", at, archive, null, 0x100),
        "setxattr of the folder": lambda: os.setxattr(folder, "user.tartape.state", b"valid"),
        "setxattr to replace": lambda: os.setxattr(archive, "user.tartape.state", b"valid", os.XATTR_REPLACE),
        "setxattr of an attribute trusted": lambda: os.setxattr(archive, "trusted.x", b"1"),
        "setxattr of a capability": lambda: os.setxattr(archive, "security.capability", b"\1\0\0\2" + bytes(16)),
        "setxattr of rights": lambda: os.setxattr(archive, "system.posix_acl_access", acl),
        "fsetxattr": lambda: os.setxattr(fd, "user.x", b"1"),
        "removexattr of the folder": lambda: os.removexattr(folder, "user.tartape.state"),
        "fremovexattr": lambda: os.removexattr(fd, "user.tartape.state"),
        "mkdir below": lambda: os.mkdir(new, 0o777),
        "rmdir of nothing": lambda: os.rmdir(folder / "archive.tar"),
    }
    by_descriptor: dict[str, Callable[[], object]] = {
        "write": lambda: os.write(fd, b"x"),
        "pwrite": lambda: os.pwrite(fd, b"x", 0),
        "pwritev": lambda: os.pwritev(fd, [b"x"], 0),
        "fallocate": lambda: os.posix_fallocate(fd, 0, 4096),
        "punch a hole": lambda: call("fallocate", fd, 3, ctypes.c_int64(0), ctypes.c_int64(4096)),
        "copy_file_range": lambda: copied_into(fd, tree),
        "sendfile": lambda: sent_into(fd, tree),
    }
    results = {name: errno_of(attempt) for name, attempt in attempts.items()}
    assert results == dict.fromkeys(attempts, "EROFS")
    results = {name: errno_of(attempt) for name, attempt in by_descriptor.items()}
    assert results == dict.fromkeys(by_descriptor, "EBADF")
    assert errno_of(lambda: os.ftruncate(fd, 0)) in ("EINVAL", "EBADF")
    for request in (0x40086602, 0x401C5820):  # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR
        assert errno_of(lambda request=request: fcntl.ioctl(fd, request, bytes(28))) != "allowed"  # type: ignore[misc]
    for place in (archive, folder):
        for mode in (os.W_OK, os.R_OK | os.W_OK):
            assert not os.access(place, mode)
    assert os.listdir(folder) == ["archive.tar"]
    assert archive.read_bytes() == expected


def copied_into(fd: int, tree: Path) -> None:
    with (tree / "script.sh").open("rb") as file:
        os.copy_file_range(file.fileno(), fd, 5)


def sent_into(fd: int, tree: Path) -> None:
    with (tree / "script.sh").open("rb") as file:
        os.sendfile(fd, file.fileno(), 0, 5)


@pytest.mark.root
def test_a_remount_to_write_changes_nothing(archive: Path, expected: bytes) -> None:
    """Root may take the kernel's own refusal away; ours stays."""
    done = subprocess.run(["mount", "-i", "-o", "remount,rw", archive.parent], capture_output=True)
    if done.returncode:
        return  # refused: as good
    attempts: list[Callable[[], object]] = [
        lambda: os.open(archive, os.O_RDWR | os.O_TRUNC),
        lambda: os.truncate(archive, 0),
        lambda: os.unlink(archive),
        lambda: os.mkdir(archive.parent / "new"),
        lambda: os.open(archive.parent / "new", os.O_CREAT | os.O_RDWR),
        lambda: os.rename(archive, archive.parent / "new"),
        lambda: os.chmod(archive, 0o777),
        lambda: os.setxattr(archive, "user.x", b"1"),
    ]
    assert "allowed" not in [errno_of(attempt) for attempt in attempts]
    assert os.listdir(archive.parent) == ["archive.tar"]
    assert archive.read_bytes() == expected


def test_bytes_by_sendfile(fd: int, expected: bytes) -> None:
    choose = random.Random(5)
    with tempfile.TemporaryFile() as out:
        for _ in range(20):
            start, count = choose.randrange(len(expected)), choose.randrange(1, 200_000)
            out.seek(0)
            out.truncate()
            sent = 0
            while sent < min(count, len(expected) - start):
                got = os.sendfile(out.fileno(), fd, start + sent, count - sent)
                assert got > 0
                sent += got
            out.seek(0)
            assert out.read() == expected[start : start + count]
        assert os.sendfile(out.fileno(), fd, len(expected), 10) == 0


def test_bytes_by_copy_file_range(fd: int, expected: bytes) -> None:
    """Or EXDEV, where the kernel copies within one file system only; never other bytes."""
    with tempfile.TemporaryFile() as out:
        copied = 0
        try:
            while got := os.copy_file_range(fd, out.fileno(), 1 << 20, copied, copied):
                copied += got
        except OSError as error:
            assert error.errno == errno.EXDEV and copied == 0
            return
        out.seek(0)
        assert out.read() == expected


def test_bytes_by_splice(fd: int, expected: bytes) -> None:
    """Through a pipe, from any offset."""
    read, write = os.pipe()
    try:
        for start in (0, 1, 511, 513, 100_000, len(expected) - 700):
            got = os.splice(fd, write, 60_000, offset_src=start)
            assert got > 0
            assert os.read(read, 1 << 20) == expected[start : start + got]
        assert os.splice(fd, write, 10, offset_src=len(expected)) == 0
    finally:
        os.close(read)
        os.close(write)


def test_bytes_by_direct_reads(archive: Path, expected: bytes) -> None:
    """`O_DIRECT`, aligned or not: no more than any reader gets here."""
    fd = os.open(archive, os.O_RDONLY | os.O_DIRECT)
    try:
        for start, count in ((0, 4096), (512, 131072), (1, 1000)):
            assert os.pread(fd, count, start) == expected[start : start + count]
    finally:
        os.close(fd)


def test_other_ways_to_wait_and_to_lock(archive: Path, fd: int, expected: bytes) -> None:
    """Polls are ready at once, locks exclude each other, a lock to write needs a descriptor to write."""
    assert select.select([fd], [], [], 30)[0] == [fd]
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(5000) == [(fd, select.POLLIN)]
    assert errno_of(lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "EBADF"
    fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 5)
    other = os.open(archive, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert errno_of(lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "EAGAIN"
        assert os.pread(other, 4096, 300) == expected[300:4396]
    finally:
        os.close(other)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert call("syncfs", fd) == 0
    assert os.lseek(fd, len(expected) + 10**6, os.SEEK_SET) == len(expected) + 10**6
    assert os.read(fd, 10) == b""
    assert errno_of(lambda: os.lseek(fd, -1, os.SEEK_SET)) == "EINVAL"
    assert errno_of(lambda: os.lseek(fd, len(expected), os.SEEK_HOLE)) == "ENXIO"
    assert os.lseek(fd, 0, os.SEEK_SET) == 0
    assert os.read(fd, 1000) == expected[:1000]
