"""Folders that are hard to archive, each built in an empty root, and what there is to say about a folder's members."""

import hashlib
import os
import random
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

ROOT = "tree"  # the name of each root: 4 bytes, which `name_lengths` counts with


def write(path: Path, data: bytes = b"", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def pattern(size: int, seed: int = 0) -> bytes:
    """`size` bytes in which no two blocks are alike."""
    return b"".join(b"%015d\n" % (seed * 1_000_000 + at) for at in range(-(-size // 16)))[:size]


def empty_root(root: Path) -> None:
    root.chmod(0o750)


def sizes(root: Path) -> None:
    for size in (0, 1, 2, 510, 511, 512, 513, 514, 1023, 1024, 1025, 4096, 10_239, 10_240, 10_241, 131_071, 131_073):
        write(root / f"{size}.bin", pattern(size, size))
    for name in "abc":
        write(root / "empty files" / name)
    (root / "empty folder").mkdir()


def name_lengths(root: Path) -> None:
    """Names in the archive of 99 to 101 bytes in one part, of up to 255 in several; files, folders and links."""
    within = root / ("d" * 94)  # "tree/" and 94 bytes: 99, with its slash 100
    write(within / "a", b"a")
    (root / ("e" * 95)).mkdir()  # 100, with its slash 101
    for total in (99, 100, 101, 105):
        write(root / ("f" * (total - 5)), pattern(total))
    (root / ("l" * 95)).symlink_to("nowhere")
    for split in (154, 155):  # bytes before the slash that parts the name's two fields; 155 fill the first
        deep = root / ("p" * 74) / ("q" * (split - 80))
        for length in (1, 254 - split):  # the longer ones have 255 bytes in all
            write(deep / ("n" * length), pattern(700, length))
            (deep / ("s" * length)).symlink_to("n")
        (deep / ("m" * (253 - split))).mkdir()  # 255, with its slash


ODD_NAMES = (
    b"new\nline",
    b"\n",
    b"tab\tbell\x07escape\x1b[31mreturn\rdelete\x7f",
    bytes(range(1, 47)) + bytes(range(48, 64)),
    b"invalid \xff\xfe utf-8",
    b"cut off \xc3",
    b"latin-1 caf\xe9",
    "utf-8 café ñ 日本 😀".encode(),
    "composed é, decomposed e\u0301".encode(),
    b"-rf",
    b"--checkpoint-action=exec=false",
    b"-",
    b"...",
    b".hidden",
    b"..two dots",
    b" space around ",
    b"dot at the end.",
    b"back\\slash",
    b"C:colon",
    b"@at",
    b"*?[a-z]{x,y}~$HOME`id`;&|<>\"'",
    b"con",
    b"%s%n%00",
)


def odd_names(root: Path) -> None:
    for at, name in enumerate(map(os.fsdecode, ODD_NAMES)):
        write(root / "files" / name, pattern(100 + at, at))
        write(root / "folders" / name / "file", b"in a folder with an odd name")
    for at, name in enumerate((b"new\nline", b"invalid \xff", b"-rf", "café".encode())):
        os.symlink(name, os.fsencode(root) + b"/link%d" % at)


def modes(root: Path) -> None:
    for mode in (0o000, 0o001, 0o400, 0o600, 0o644, 0o755, 0o777, 0o1644, 0o2755, 0o4755, 0o6711, 0o7777):
        if os.geteuid() and not mode & 0o400:
            continue  # such a file can only be read by root
        write(root / f"file {mode:04o}", b"x" * mode, mode)
        if not os.geteuid() or mode & 0o500 == 0o500:
            write(root / f"folder {mode:04o}" / "file", b"x")
            (root / f"folder {mode:04o}").chmod(mode)


SECONDS = {
    "epoch": 0,
    "before 1970": -1,
    "in 1901": 1 - 2**31,
    "in 2038": 2**31,
    "last in octal": 8**11 - 1,
    "after 2242": 8**11,
    "in 2400": 13_569_465_600,
}


def mtimes(root: Path) -> None:
    for name, second in SECONDS.items():
        for fraction in (0, 1, 999_999_999):
            within = root / name / f"{fraction}"
            write(within / "file", b"x")
            (within / "link").symlink_to("file")
            for path in (within / "file", within / "link", within):
                moment = second * 10**9 + fraction
                os.utime(path, ns=(moment, moment), follow_symlinks=False)
                assert path.lstat().st_mtime_ns == moment, "this file system cannot hold the time"
        os.utime(root / name, (second, second))


def folder_times(root: Path) -> None:
    """Folders whose time and mode can only be restored after their content: nested, read-only, with old times."""
    within = root
    for depth in range(12):
        within = within / f"{depth}"
        write(within / "a file", pattern(depth * 100))
        write(within / f"{depth} z file", b"")
    while within != root:
        within.chmod(0o555)
        os.utime(within, (10**9 + len(within.parts), 10**9 + len(within.parts)))
        within = within.parent
    os.utime(root, (10**9, 10**9))


def links(root: Path) -> None:
    write(root / "folder" / "file", b"where links lead")
    for name, target in {
        "to a file": "folder/file",
        "to a folder": "folder",
        "to a folder with a slash": "folder/",
        "to nothing": "nowhere",
        "to itself": "to itself",
        "to each other 1": "to each other 2",
        "to each other 2": "to each other 1",
        "absolute": "/etc/passwd",
        "outwards": "../../../../../../etc/passwd",
        "to the root": ".",
        "of 99 bytes": "t" * 99,
        "of 100 bytes": "t" * 100,
        "with a slash at the end of 100": "t" * 99 + "/",
    }.items():
        (root / name).symlink_to(target)
    for path in root.iterdir():
        os.utime(path, (10**9, 10**9), follow_symlinks=False)


def hard_links(root: Path) -> None:
    first = write(root / "a" / "first", pattern(3000))
    (root / "b").mkdir()
    os.link(first, root / "a" / "second")
    os.link(first, root / "b" / "third")
    (root / "link").symlink_to("a/first")
    os.link(root / "link", root / "the same link", follow_symlinks=False)


def special_files(root: Path) -> None:
    write(root / "file", b"stays")
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    os.mkfifo(root / "folder" / "pipe")
    within = socket.socket(socket.AF_UNIX)
    here = os.open(root, os.O_RDONLY)
    try:
        within.bind(f"/proc/self/fd/{here}/socket")  # a socket's path has at most 107 bytes
    finally:
        within.close()
        os.close(here)
    (root / "to a pipe").symlink_to("pipe")


TREES: dict[str, Callable[[Path], None]] = {
    build.__name__: build
    for build in (
        empty_root,
        sizes,
        name_lengths,
        odd_names,
        modes,
        mtimes,
        folder_times,
        links,
        hard_links,
        special_files,
    )
}


SPARSE_SIZES = {"a": 2**33 - 1, "b": 2**33, "c": 2**40}  # bytes: the last size in octal, the first in base 256


def sparse(root: Path) -> None:
    """Files of nearly no blocks, with something to read at their start, middle and end."""
    for name, size in SPARSE_SIZES.items():
        with open(root / name, "wb") as file:
            file.truncate(size)
            for place in (0, size // 2 - 3, size - 5):
                file.seek(place)
                file.write(name.encode() * 5)
    write(root / "last", b"after a tebibyte")


_USR = Path("/usr")
_REAL = (
    _USR / "share/zoneinfo",
    _USR / "share/man/man1",
    _USR / "lib/python3",
    _USR / "share/man",
    _USR / "share/doc",
    _USR / "include",
    Path(sys.base_prefix, "lib"),
)


def real(root: Path, members: int) -> None:
    """Copies of folders of this machine, whole, until there are as many members; of all again if they are too few."""
    root.mkdir()
    found = 1
    for at in count():
        for folder in _REAL:
            if found >= members:
                return
            if folder.is_dir():
                copy = root / f"{folder.name}-{at}"
                subprocess.run(["cp", "-a", folder, copy], check=True)
                found += sum(1 for _ in _walk(os.fsencode(copy), b""))


class Facts(NamedTuple):
    """All that an archive keeps of a member. `content`: a file's SHA-256, a link's target."""

    kind: str
    mode: int
    mtime_ns: int
    content: bytes


_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


def _walk(path: bytes, name: bytes) -> Iterator[tuple[bytes, bytes, os.stat_result]]:
    found = os.lstat(path)
    yield path, name, found
    if stat.S_ISDIR(found.st_mode):
        for entry in os.listdir(path):
            yield from _walk(path + b"/" + entry, name + b"/" + entry)


def snapshot(root: Path) -> dict[bytes, Facts]:
    """The facts of everything below `root`, and of itself, by path."""
    result = {}
    for path, name, found in _walk(os.fsencode(root), b""):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "special")
        content = b""
        if kind == "file":
            with open(path, "rb") as file:
                content = hashlib.sha256(file.read()).digest()
        elif kind == "link":
            content = os.readlink(path)
        result[name] = Facts(kind, 0 if kind == "link" else stat.S_IMODE(found.st_mode), found.st_mtime_ns, content)
    return result


def recorded(root: Path) -> dict[bytes, Facts]:
    """What an archive of `root` must bring back: whole seconds, no special files, and nothing of the index."""
    return {
        name: facts._replace(mtime_ns=facts.mtime_ns // 10**9 * 10**9)
        for name, facts in snapshot(root).items()
        if facts.kind != "special" and name.split(b"/")[1:2] != [b".tartape"]
    }


def made_by_gnu_tar(root: Path, path: Path) -> Path:
    """GNU tar's own archive of the same members in the same order, at `path`."""
    special = [name for name, facts in snapshot(root).items() if facts.kind == "special"]
    exclude = [b"--exclude=" + os.fsencode(root.name) + name for name in (*special, b"/.tartape")]
    subprocess.run(
        # Its ustar refuses times before 1970; its own format writes them in base 256.
        ["tar", "--format=gnu", "--sort=name", "--owner=root:0", "--group=root:0", "--hard-dereference", "-b1",
         "--anchored", "--no-wildcards", *exclude, "-cf", path, root.name],
        cwd=root.parent, check=True, capture_output=True,
    )  # fmt: skip
    return path


def make_many(root: Path) -> Path:
    """Makes 3,000 small files of all sizes up to 3,000 bytes, in folders of 100."""
    some = random.Random(1)
    for number in range(3000):
        folder = root / f"{number // 100:02}"
        if number % 100 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number}.bin").write_bytes(some.randbytes(some.randrange(3000)))
    return root
