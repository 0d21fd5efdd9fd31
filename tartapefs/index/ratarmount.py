"""Writes the index that ratarmount would make of an archive by reading all of it.

Rule: every row is, to the value, the one that ratarmount's `SQLiteIndex` of version 0.7.0 has for the same member
(ratarmount 1.3, ratarmountcore 0.11); tables and their columns are its own. It takes them from `tarfile`: the start of
a member is that of the first block of its header, a target that of its header or of GNU tar's block `K`. Names that are
no UTF-8 have `\\xff` for each byte that is wrong. What ratarmount compares when it opens an index stands in `metadata`,
with two keys more, which it ignores: which tape this is.

Rows are written in the order of the archive, and nothing is kept of them, so memory does not grow with their number.
"""

import json
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from tartapefs.archive import ustar
from tartapefs.archive.member import Member
from tartapefs.base.errors import TapeError
from tartapefs.base.outputs import Unfinished
from tartapefs.base.text import printable
from tartapefs.index.connections import connect
from tartapefs.index.recording import Recording
from tartapefs.index.writer import disk_errors

_VERSION = ("index", "0.7.0", 0, 7, 0)
_TABLES = (
    """CREATE TABLE "files" (
        "path" VARCHAR(65535) NOT NULL, "name" VARCHAR(65535) NOT NULL, "offsetheader" INTEGER, "offset" INTEGER,
        "size" INTEGER, "mtime" REAL, "mode" INTEGER, "type" INTEGER, "linkname" VARCHAR(65535), "uid" INTEGER,
        "gid" INTEGER, "istar" BOOL, "issparse" BOOL, "isgenerated" BOOL, "recursiondepth" INTEGER,
        PRIMARY KEY ("path","name","offsetheader")
    )""",
    """CREATE TABLE "xattrkeys" ("id" INTEGER PRIMARY KEY, "name" VARCHAR(65535) UNIQUE)""",
    """CREATE TABLE "xattrsdata" (
        "offsetheader" INTEGER, "keyid" INTEGER, "value" VARCHAR(65535),
        PRIMARY KEY ("offsetheader","keyid"), FOREIGN KEY ("keyid") REFERENCES xattrkeys("id")
    )""",
    """CREATE VIEW "xattrs" ("offsetheader", "key", "value") AS
        SELECT offsetheader, xattrkeys.name, value FROM "xattrsdata"
        INNER JOIN xattrkeys ON xattrkeys.id = xattrsdata.keyid""",
    """CREATE TRIGGER "xattrs_insert" INSTEAD OF INSERT ON "xattrs" BEGIN
        INSERT OR IGNORE INTO xattrkeys(name) VALUES (NEW.key);
        INSERT OR REPLACE INTO xattrsdata(offsetheader, keyid, value)
            VALUES (NEW.offsetheader, (SELECT xattrkeys.id FROM xattrkeys WHERE name = NEW.key), NEW.value);
    END""",
    """CREATE TABLE "metadata" (
        "key" VARCHAR(65535) NOT NULL, "value" VARCHAR(65535) NOT NULL, PRIMARY KEY ("key")
    )""",
    """CREATE TABLE "versions" (
        "name" VARCHAR(65535) NOT NULL, "version" VARCHAR(65535) NOT NULL, "major" INTEGER, "minor" INTEGER,
        "patch" INTEGER, PRIMARY KEY ("name")
    )""",
)
# What ratarmount was told when it made the index, by default; it warns if it is told something else when it opens it.
_ARGUMENTS = {
    "mountRecursively": False,
    "encoding": "utf-8",
    "stripRecursiveTarExtension": False,
    "transformRecursiveMountPoint": None,
    "transformPattern": None,
    "ignoreZeros": False,
    "hashes": [],
    "gzipSeekPointSpacing": 16 << 20,
}
_TYPES = {stat.S_IFREG: b"0", stat.S_IFDIR: b"5", stat.S_IFLNK: b"2"}
Progress = Callable[[int, int], object]  # (members so far, offset of the last of them in the archive)
_PROGRESS_EVERY = 1024  # members
_CACHE = 16 << 10  # KiB of the file that SQLite keeps in memory


def row_of(member: Member) -> tuple[Any, ...]:
    """The row of a member in the table `files`. Raises TapeError for a kind of member that it does not know."""
    kind = b"1" if member.is_hard_link else _TYPES.get(stat.S_IFMT(member.mode))
    if kind is None:
        raise TapeError(f"{printable(member.name)}: members of its kind cannot be exported")
    above, _, name = member.name.rstrip(b"/").rpartition(b"/")
    owner = member.owner or ustar.SCRUBBED
    return (
        "/" + _text(above) if above else "",
        _text(name),
        member.start,
        member.body,
        member.size,
        member.mtime_ns // 10**9,
        stat.S_IMODE(member.mode)
        if member.is_hard_link
        else member.mode,  # as ratarmount has it: it looks up the target
        kind,
        _text(member.target),
        owner.uid,
        owner.gid,
        0,  # is no archive that was mounted, too
        0,  # nor sparse
        0,  # nor made up by ratarmount
        0,  # and lies in no archive of the archive
    )


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _metadata(tape: Recording) -> dict[str, str]:
    """What ratarmount compares, and two keys of ours. The time is that of the archive as it is mounted."""
    seconds, ns = divmod(tape.recorded_ns, 10**9)
    # st_mtime as Python computes it: ratarmount compares for equality, if it is asked to.
    stats = {"st_mtime": seconds + 1e-9 * ns, "st_mtime_ns": tape.recorded_ns, "st_size": tape.total_size}
    found = {
        "tarstats": json.dumps(stats),
        "arguments": json.dumps(_ARGUMENTS),
        "backendName": "SQLiteIndexedTar",
        "isGnuIncremental": "0",
        "tartapefs.fingerprint": tape.fingerprint,
    }
    return found | ({"tartapefs.seal": tape.seal} if tape.seal else {})


def _rows(tape: Recording, on_progress: Progress) -> Iterator[tuple[Any, ...]]:
    for count, member in enumerate(tape.members(), 1):
        yield row_of(member)
        if count % _PROGRESS_EVERY == 0:
            on_progress(count, member.start)


def write(tape: Recording, unfinished: Unfinished, on_progress: Progress) -> None:
    """Writes the index of `tape` to the unfinished file, which is empty; the caller puts it in place.

    Raises TapeError, and OSError as the disk does.
    """
    with disk_errors(unfinished.target), closing(connect(unfinished.temporary, "mode=rw&nolock=1")) as db:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{_CACHE}"):
            db.execute(f"PRAGMA {pragma}")
        db.execute("BEGIN")
        for statement in _TABLES:
            db.execute(statement)
        db.executemany(f"INSERT INTO files VALUES ({','.join('?' * 15)})", _rows(tape, on_progress))
        db.executemany("INSERT INTO metadata VALUES (?, ?)", _metadata(tape).items())
        db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?)", _VERSION)
        db.execute("COMMIT")
