"""Folders that are hard to archive, one rule of the format each, and what a program made of an archive of them."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

GIB = 1 << 30
ROOT = "tree"  # the name of each root: 4 bytes, which the lengths below count with


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
    deep = root / ("p" * 74) / ("q" * 75)  # 4 + 1 + 74 + 1 + 75 = 155 bytes
    for length in (1, 99, 100):  # 255 in all
        write(deep / ("n" * length), pattern(700, length))
    (deep / ("m" * 98)).mkdir()  # 254, with its slash 255
    (deep / ("s" * 100)).symlink_to("n")


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
    for at, name in enumerate(ODD_NAMES):
        Path(os.fsdecode(os.fsencode(root) + b"/f")).mkdir(exist_ok=True)
        path = Path(os.fsdecode(os.fsencode(root) + b"/f/" + name))
        write(path, pattern(100 + at, at))
        folder = Path(os.fsdecode(os.fsencode(root) + b"/d/" + name))
        write(folder / "file", b"in a folder with an odd name")
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
    while within != root.parent:
        os.utime(within, (10**9 + len(within.parts), 10**9 + len(within.parts)))
        within.chmod(0o555)
        within = within.parent


def links(root: Path) -> None:
    write(root / "folder" / "file", b"where links lead")
    for name, target in {
        "to a file": "folder/file",
        "to a folder": "folder",
        "to a folder/": "folder/",
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
        path = root / name.rstrip("/").replace("/", " with a slash")
        if not path.is_symlink():
            path.symlink_to(target)
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
    os.mkfifo(root / "folder of a pipe only")  # at first sight like a folder
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
