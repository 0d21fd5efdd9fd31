"""Indexes without end, flipped bits and fuzzing: refused, or right, within bounded time and memory.

Single bad indexes are in tests/unit/index. `TARTAPEFS_BIT_FLIPS` is the number of flipped bits, 300 by default.
"""

import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import packed
from support.damaged_index import (
    PAGE,
    Damage,
    chain,
    consistent,
    edited,
    execute,
    fix_checksums,
    giant,
    index_of,
    interior,
    replanted,
)
from support.programs import run

from tartapefs import TapeRecorder

TESTS = Path(__file__).parents[1]
MEMORY = 256 << 20
BIT_FLIPS = int(os.environ.get("TARTAPEFS_BIT_FLIPS", 300))

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
    consistent("UPDATE pack SET members = zeroblob(32768) WHERE start > 0")(path)


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
    consistent("UPDATE pack SET count = 9e999 WHERE start > 0",
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
    fix_checksums(path)

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


@pytest.mark.matrix(but=6)
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
    """200 inputs that break nothing: see tests/long/fuzz_index.py, and `make fuzz`."""
    options = ["-runs=200", "-seed=1", "-timeout=20", "-rss_limit_mb=512", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, TESTS / "long" / "fuzz_index.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "Done 200 runs" in done.stderr
