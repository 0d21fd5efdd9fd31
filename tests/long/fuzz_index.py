"""Coverage-guided fuzzing of the index as input from outside.

    python tests/long/fuzz_index.py -runs=100000 -timeout=20 -rss_limit_mb=512

Each input of the fuzzer is a list of changes to a real index, with digests or without, of one generation or of three:
bytes and pages of the file, facts of the tape, rows, and members in their packs, with the checksums made right again,
as a forger would.

Invariant: whatever the file holds, it is refused with a TapeError, or read to its end. No other exception comes out. If
the file was changed without new checksums, or still lists the members that were recorded, or has digests, then whatever
is read of it equals the recorded archive.
"""

import os
import sqlite3
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import atheris

sys.path.insert(0, os.fspath(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["tartapefs"]):
    from tartapefs import Tape, TapeError, TapePlayer, TapeRecorder
    from tartapefs.verify.seal import seal
from support import packed
from support.generations import Generations
from support.long_names import fill

Fuzz = atheris.FuzzedDataProvider
COLUMNS = ["start", "count", "folders", "members", "crc"]
FACTS = ["root_name", "fingerprint", "total_size", "member_count", "recorded_ns", "excluded", "left_out", "owners_kept",
         "root_ino", "index_ino", "rows_digest", "generations_digest", "facts_digest",
         "long_names", "hard_links"]  # fmt: skip
SEAL_FACTS = ["seal", "algorithm", "block_size", "levels", "unsealed_rows"]
TABLES = {"leaf": ["start", "stop", "digests", "crc"], "piece": ["start", "digests", "crc"],
          "node": ["place", "digests", "crc"]}  # fmt: skip
GENERATIONS = {"generation": ["start", "members", "recorded_ns", "fingerprint", "crc"], "superseded": ["start", "crc"],
               "name_filter": ["place", "bits", "crc"]}  # fmt: skip
NUMBERS = (0, -1, 1, 511, 512, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 0o040755, 0o100644, 0o120777, 10**9)
NAMES = (b"", b".", b"..", b"/", b"a/b", b"/etc/passwd", b"\0", b"x" * 256, b"\xff\n", b".tartape", b"a", b"0:0:a:b",
         b"data", b"data/", b"data/../", b"data//", b"data/large/", b"other/")  # fmt: skip
REPORT_EVERY = 1000  # inputs
MOST_MEMBERS, MOST_BYTES = 2000, 1 << 16  # how far a tape that was believed is read, so that each input is quick


def grow(root: Path) -> None:
    """A folder whose index has more pages than one."""
    for at in range(6):
        (root / f"folder {at}" / "deeper" / "still").mkdir(parents=True)
        for number in range(20):
            (root / f"folder {at}" / "deeper" / f"{number:03}").write_bytes(b"%d" % number * (at + 1))
        (root / f"folder {at}" / "deeper" / "still" / "last").write_bytes(b"z" * 600)
    (root / "large").write_bytes(b"large" * 40_000)
    (root / "link").symlink_to("folder 1/deeper")


def grow_again(root: Path, number: int) -> None:
    """New names in old folders and new ones, before and behind those that are there."""
    for folder in (root, root / "folder 1" / "deeper"):
        for at in range(20):
            (folder / f"{number} {at:03}").write_bytes(b"%d" % at)
        (folder / f"new {number}").mkdir()
        os.utime(folder, (0, 10**9 + number))


class Seed(NamedTuple):
    """An index, and what is read of it: its members and its archive."""

    index: bytes
    members: list[Any]
    archive: bytes
    root: Path


class Target:
    """The recorded folder below `place`, and how its index is changed and read."""

    def __init__(self, place: Path) -> None:
        self.root = place / "data"
        self.root.mkdir()
        grow(self.root)
        TapeRecorder(self.root).commit()
        growing, at_once = Generations(self.root), Generations(self.root)
        growing.append()
        for number in range(2):
            grow_again(self.root, number)
            TapeRecorder(self.root, append=True).commit()
            growing.append()
        several = self.seeds(growing.archive)
        TapeRecorder(self.root, overwrite=True, digest="").commit()
        self.all = [*self.seeds(at_once.append()), *several]
        self.root = place / "long"
        self.root.mkdir()
        fill(self.root, 120, 1)
        TapeRecorder(self.root, long_names=True).commit()
        self.all += self.seeds(Generations(self.root).append())
        self.root = place / "linked"
        self.root.mkdir()
        grow(self.root)
        for at in range(6):
            os.link(self.root / f"folder {at}" / "deeper" / "000", self.root / f"name {at}")
        TapeRecorder(self.root, hard_links=True).commit()
        self.all += self.seeds(Generations(self.root, hard_links=True).append())
        self.use(0)
        self.outcomes = {"refused at opening": 0, "refused later": 0, "read": 0, "read, as recorded": 0}

    def seeds(self, archive: bytes) -> list[Seed]:
        """The index that is there, and the same with digests."""
        with Tape.from_index(self.path) as tape, closing(TapePlayer(tape, self.root)) as player:
            members, bare = list(tape.members()), self.path.read_bytes()
            seal(tape, player.source, player.at_home, "sha256", 1 << 16)
        return [Seed(index, members, archive, self.root) for index in (bare, self.path.read_bytes())]

    @property
    def path(self) -> Path:
        return self.root / ".tartape" / "index.db"

    def use(self, number: int) -> None:
        self.good, self.members, self.expected, self.root = self.all[number]
        self.tables = TABLES if number % 2 else {}
        self.generations = GENERATIONS if number in (2, 3) else {}

    @property
    def has_digests(self) -> bool:
        return bool(self.tables)

    def one(self, data: bytes) -> None:
        """One input of the fuzzer."""
        fuzz = Fuzz(data)
        self.use(fuzz.ConsumeIntInRange(0, len(self.all) - 1))
        forged = fuzz.ConsumeBool()
        whole = self.changed_rows(fuzz) if forged else self.good
        self.path.write_bytes(self.changed_bytes(fuzz, whole) if not forged or fuzz.ConsumeBool() else whole)
        outcome = "refused at opening"
        try:
            with Tape.from_index(self.path) as tape:
                outcome = "refused later"
                outcome = self.read(tape, forged)
        except TapeError:
            pass
        self.outcomes[outcome] += 1

    def changed_bytes(self, fuzz: Fuzz, whole: bytes) -> bytes:
        """`whole` with some bytes, pointers and pages of it changed, or cut."""
        page = 16384
        changed = bytearray(whole)
        for _ in range(fuzz.ConsumeIntInRange(1, 4)):
            at = fuzz.ConsumeIntInRange(0, max(0, len(changed) - 1))
            start = at // page * page
            match fuzz.ConsumeIntInRange(0, 5):
                case 0:
                    changed[at : at + 1] = fuzz.ConsumeBytes(1)
                case 1:
                    changed[at] ^= 1 << fuzz.ConsumeIntInRange(0, 7)
                case 2:  # a number in a page's own header, right child included
                    place = start + (100 if start == 0 else 0) + fuzz.ConsumeIntInRange(0, 11)
                    changed[place : place + 1] = fuzz.ConsumeBytes(1)
                case 3:  # a page in another's place
                    other = fuzz.ConsumeIntInRange(0, max(0, len(changed) // page - 1)) * page
                    changed[start : start + page] = changed[other : other + page]
                case 4:
                    changed[at : at + 8] = fuzz.ConsumeBytes(8)
                case _:
                    del changed[at:]
            if not changed:
                break
        return bytes(changed)

    def changed_rows(self, fuzz: Fuzz) -> bytes:
        """The index with some values of rows and facts changed, and all checksums made right again."""
        database = sqlite3.connect(":memory:", isolation_level=None)
        try:
            database.deserialize(self.good)
            for _ in range(fuzz.ConsumeIntInRange(1, 3)):
                try:
                    self.change(fuzz, database)
                except (sqlite3.Error, OverflowError, struct.error, ValueError):
                    continue  # such as a start that another row has, or a number that has no place in a pack
            self.seal(database)
            return database.serialize()
        finally:
            database.close()

    def change(self, fuzz: Fuzz, database: sqlite3.Connection) -> None:
        if self.generations and fuzz.ConsumeBool():
            self.change_generations(fuzz, database)
            return
        if self.has_digests and fuzz.ConsumeBool():
            self.change_digests(fuzz, database)
            return
        starts = [start for (start,) in database.execute("SELECT start FROM pack")]
        if not starts:
            return
        start, other = self.one_of(fuzz, starts), self.one_of(fuzz, starts)
        match fuzz.ConsumeIntInRange(0, 7):
            case 0:
                database.execute("DELETE FROM pack WHERE start = ?", (start,))
            case 1:
                value, fact = self.value(fuzz), self.one_of(fuzz, FACTS)
                database.execute("UPDATE tape SET value = ? WHERE fact = ?", (value, fact))
            case 2:  # a value of another row
                column = self.one_of(fuzz, COLUMNS[1:])
                database.execute(
                    f"UPDATE pack SET {column} = (SELECT {column} FROM pack WHERE start = ?) WHERE start = ?",
                    (other, start),
                )
            case 3:
                value, column = self.value(fuzz), self.one_of(fuzz, COLUMNS)
                database.execute(f"UPDATE pack SET {column} = ? WHERE start = ?", (value, start))
            case 4:
                self.change_bytes(fuzz, database, start)
            case _:
                self.change_members(fuzz, database, start)

    def change_bytes(self, fuzz: Fuzz, database: sqlite3.Connection, start: int) -> None:
        """Some bytes of a pack, put in, cut out or in place of others."""
        ((blob,),) = database.execute("SELECT members FROM pack WHERE start = ?", (start,))
        if not isinstance(blob, bytes):
            return
        at, new = fuzz.ConsumeIntInRange(0, len(blob)), fuzz.ConsumeBytes(fuzz.ConsumeIntInRange(0, 8))
        blob = blob[:at] + new + blob[at + fuzz.ConsumeIntInRange(0, 8) :]
        database.execute("UPDATE pack SET members = ? WHERE start = ?", (blob, start))

    def change_members(self, fuzz: Fuzz, database: sqlite3.Connection, start: int) -> None:
        """A fact of a member; members gone, twice, in another order, or in two packs, each where it then starts."""
        ((count, folders, blob),) = database.execute(
            "SELECT count, folders, members FROM pack WHERE start = ?", (start,)
        )
        try:
            rows = packed.rows_of(start, count, blob)
        except Exception:
            return  # of a pack that is none any more
        if not rows:
            return
        at, other = fuzz.ConsumeIntInRange(0, len(rows) - 1), fuzz.ConsumeIntInRange(0, len(rows) - 1)
        second: list[tuple[Any, ...]] = []
        match fuzz.ConsumeIntInRange(0, 7):
            case 0:
                del rows[at]
            case 1:
                rows.insert(at, rows[other])
            case 2:
                rows[at], rows[other] = rows[other], rows[at]
            case 3:
                rows, second = rows[:at], rows[at:]
            case choice:
                column = fuzz.ConsumeIntInRange(1, len(packed.COLUMNS) - 1)
                kind = bytes if isinstance(rows[at][column], bytes) else int
                value = rows[other][column] if choice == 4 else self.value(fuzz)
                if not isinstance(value, kind):
                    value = self.one_of(fuzz, NAMES if kind is bytes else NUMBERS)
                rows[at] = (*rows[at][:column], value, *rows[at][column + 1 :])
        database.execute("BEGIN")
        try:
            database.execute("DELETE FROM pack WHERE start = ?", (start,))
            for part in (rows, second):
                if part:
                    found = sum(row[3] & 0o170000 == 0o040000 for row in part)
                    packed.insert(database, start, found if fuzz.ConsumeProbability() < 0.9 else folders, part)
                start += sum(map(packed.span, part))
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise

    def one_of(self, fuzz: Fuzz, some: Sequence[Any]) -> Any:
        return some[fuzz.ConsumeIntInRange(0, len(some) - 1)]

    def change_digests(self, fuzz: Fuzz, database: sqlite3.Connection) -> None:
        table = list(TABLES)[fuzz.ConsumeIntInRange(0, 2)]
        key, columns = TABLES[table][0], TABLES[table]
        keys = [where for (where,) in database.execute(f"SELECT {key} FROM {table}")]
        where = self.one_of(fuzz, keys) if keys else 0
        match fuzz.ConsumeIntInRange(0, 3):
            case 0:
                database.execute(f"DELETE FROM {table} WHERE {key} = ?", (where,))
            case 1:
                fact = self.one_of(fuzz, SEAL_FACTS)
                database.execute("UPDATE tape SET value = ? WHERE fact = ?", (self.value(fuzz), fact))
            case 2:
                row = database.execute(f"SELECT digests FROM {table} WHERE {key} = ?", (where,)).fetchone()
                if row is None or not isinstance(row[0], bytes) or not row[0]:
                    return
                digests = bytearray(row[0])
                digests[fuzz.ConsumeIntInRange(0, len(digests) - 1)] ^= 1 << fuzz.ConsumeIntInRange(0, 7)
                database.execute(f"UPDATE {table} SET digests = ? WHERE {key} = ?", (bytes(digests), where))
            case _:
                column = self.one_of(fuzz, columns)
                database.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (self.value(fuzz), where))

    def change_generations(self, fuzz: Fuzz, database: sqlite3.Connection) -> None:
        table = list(GENERATIONS)[fuzz.ConsumeIntInRange(0, 2)]
        key, *columns = GENERATIONS[table]
        starts = [start for (start,) in database.execute(f"SELECT {key} FROM {table}")]
        start = self.one_of(fuzz, starts) if starts else 0
        match fuzz.ConsumeIntInRange(0, 3):
            case 0:
                database.execute(f"DELETE FROM {table} WHERE {key} = ?", (start,))
            case 1:  # one more, at a member or elsewhere
                sql = f"INSERT INTO {table} SELECT ?, {', '.join(columns)} FROM {table} WHERE {key} = ?"
                database.execute(sql, (self.value(fuzz), start))
            case 2:  # members of one generation are another's
                count = fuzz.ConsumeIntInRange(-40, 40)
                database.execute("UPDATE generation SET members = members - ? WHERE start = ?", (count, start))
                database.execute("UPDATE generation SET members = members + ? WHERE start = 0", (count,))
            case _:
                column = self.one_of(fuzz, GENERATIONS[table])
                database.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (self.value(fuzz), start))

    def value(self, fuzz: Fuzz) -> Any:
        makers: tuple[Callable[[], Any], ...] = (
            lambda: self.one_of(fuzz, NUMBERS),
            lambda: self.one_of(fuzz, NAMES),
            lambda: self.one_of(fuzz, self.members).start,
            lambda: fuzz.ConsumeInt(8),
            lambda: fuzz.ConsumeBytes(fuzz.ConsumeIntInRange(0, 40)),
            lambda: fuzz.ConsumeBytes(fuzz.ConsumeIntInRange(0, 40)).decode("latin-1"),
            lambda: fuzz.ConsumeFloat(),
            lambda: None,
        )
        return self.one_of(fuzz, makers)()

    def seal(self, database: sqlite3.Connection) -> None:
        for *facts, crc in database.execute("SELECT * FROM pack").fetchall():
            try:
                checksum = packed.checksum(*facts)
            except Exception:
                continue  # of types that have no checksum
            if checksum != crc:
                database.execute("UPDATE pack SET crc = ? WHERE start = ?", (checksum, facts[0]))
        for table, columns in (self.tables | self.generations).items():
            for *numbers, crc in database.execute(f"SELECT * FROM {table}").fetchall():
                try:
                    blob = b"" if table == "superseded" else numbers.pop()
                    checksum = packed.digests_crc(*numbers, digests=blob)
                except Exception:
                    continue
                if checksum != crc:
                    database.execute(f"UPDATE {table} SET crc = ? WHERE {columns[0]} = ?", (checksum, numbers[0]))
        with suppress(TypeError, OverflowError, ValueError):  # of numbers that are none
            packed.sign_generations(database) if self.generations else None
        packed.sign_facts(database)

    def read(self, tape: Tape, forged: bool) -> str:
        """Reads what was believed; unless `forged`, with new checksums, it has to be what was recorded."""
        trusted = not forged or self.has_digests
        tape.rows_are_sound()
        list(islice(tape.superseded(), MOST_MEMBERS))
        list(islice(tape.name_filters(), MOST_MEMBERS))
        list(islice(tape.latest_members(), MOST_MEMBERS))
        for member in tape.folders():
            assert member.is_directory
        members = list(islice(tape.members(), MOST_MEMBERS))
        for member in members:
            assert len(member.header()) == member.body - member.start
            assert b".." not in member.path.split(b"/") and not member.path.startswith(b"/")
        for member in (members[0], members[len(members) // 2], members[-1]):
            try:
                assert tape.find(member.name).name.rstrip(b"/") == member.name.rstrip(b"/")
            except KeyError:
                assert forged  # names in no order, or generations, of which digests say nothing
            if member.is_directory:
                list(islice(tape.children(member), MOST_MEMBERS))
        as_recorded = members == self.members and tape.total_size == len(self.expected)
        if self.has_digests:  # which cover what the archive shows of a member
            as_recorded = [m.header() for m in members] == [m.header() for m in self.members]
        assert as_recorded or not trusted, "believed without the checksums of a forger"
        player = TapePlayer(tape, self.root)
        try:
            # In three parts: what lies at the ends is read where the middle is no more as recorded.
            size = tape.total_size
            for start in {0, max(0, size // 2 - MOST_BYTES // 2), max(0, size - MOST_BYTES)}:
                data = player.read(start, MOST_BYTES)
                assert len(data) == min(MOST_BYTES, size - start)
                assert not as_recorded or data == self.expected[start : start + MOST_BYTES]
            if as_recorded:
                assert player.read(0, size) == self.expected
        finally:
            player.close()
        return "read, as recorded" if as_recorded else "read"


def fuzz(place: Path) -> None:
    """Fuzzes until the runs asked for are done or an input breaks the invariant; ends the process then."""
    target = Target(place)

    def one(data: bytes) -> None:
        target.one(data)
        if sum(target.outcomes.values()) % REPORT_EVERY == 0:
            print(target.outcomes, flush=True)

    # Long inputs from the start: the fuzzer's own way of growing them slowly is for formats read byte by byte.
    atheris.Setup([sys.argv[0], "-len_control=0", "-max_len=256", *sys.argv[1:]], one)
    atheris.Fuzz()


def main() -> int:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as place:
        child = os.fork()  # the fuzzer ends its process without any cleaning up
        if child == 0:
            fuzz(Path(place))
            os._exit(0)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except KeyboardInterrupt:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
