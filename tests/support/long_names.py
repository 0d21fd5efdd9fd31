"""Names at every limit of the fields for them, and folders full of long names."""

import hashlib
import os
import random
import stat
from pathlib import Path


def nested(*lengths: int) -> bytes:
    """A name of parts of these lengths; a length of 0 at the end makes it a directory's."""
    return b"/".join(b"%c" % (ord("a") + at % 26) * length for at, length in enumerate(lengths))


FITTING = [
    nested(99),
    nested(100),
    nested(50, 50),  # 101 bytes
    nested(1, 100),  # 102
    nested(4, 95),  # 100
    nested(4, 96),  # 101
    nested(4, 94, 0),  # 100, the slash of a directory included
    nested(4, 95, 0),  # 101
    nested(99, 0),
    nested(4, 99, 0),  # the part after the split is full, and ends in the slash
    nested(154, 100),  # 255
    nested(155, 99),  # both parts as full as they get within 255
    nested(155, 98, 0),
    nested(50, 50, 50, 50, 49),  # three places to split
    nested(100, 1, 1, 1, 100),
    nested(54, 100, 99),
    nested(154, 0, 99),  # split at the second of two slashes
    nested(*[1] * 128),  # 255 bytes of slashes and letters
    nested(154, 2, 2),  # a slash at 154, one at 157: only the first is in reach
    nested(155, 1, 0),  # 158 bytes; the only slash in reach is the first
]


NOT_FITTING = [
    nested(101),
    nested(100, 0),  # a directory's closing slash is no place to split
    nested(156, 1),  # prefix too long
    nested(156, 0),
    nested(4, 101),
    nested(4, 100, 0),  # 101 bytes after the split, with the slash
    nested(155, 100),  # 256: would fit the fields, but not the limit
    nested(200, 60),
    nested(256),
    nested(*[1] * 129),
    nested(100, 155),
    nested(0, 101),  # a prefix of nothing
]


def lengths_of(name: bytes) -> str:
    return "+".join(str(len(part)) for part in name.split(b"/"))


_LETTERS = ["x", "é", "文", "字", "😀", "z y"]
_NAMES = [1, 40, 95, 96, 97, 99, 100, 101, 120, 154, 155, 156, 200, 255]  # bytes
_TARGETS = [1, 99, 100, 101, 255, 256, 511, 512, 1023, 4094]
_LIMITS = [99, 100, 101, 155, 156, 157, 254, 255, 256, 257, 511, 512, 513, 1023]  # of whole names


def text(some: random.Random, size: int) -> bytes:
    """So many bytes of letters of one to four bytes."""
    letters = "".join(some.choices(_LETTERS, k=size)).encode()[:size]
    return letters.decode(errors="ignore").encode().ljust(size, b"x")


def fill(root: Path, count: int, seed: int, longest_target: int = 4095) -> None:
    """Fills the folder with files, folders and links, most of whose names or targets are too long for ustar."""
    some, folders = random.Random(seed), [b""]
    fd = os.open(root, os.O_PATH)
    try:
        for number in range(count):
            above, size = some.choice(folders), some.choice(_NAMES)
            if some.random() < 0.3:  # a whole name at a limit
                size = some.choice(_LIMITS) - len(os.fsencode(root.name)) - len(above) - 1
            tag = b"%d-" % number
            name = above + tag + text(some, max(0, min(size, 255) - len(tag)))
            kind = some.random()
            if kind < 0.2:
                os.mkdir(name, dir_fd=fd)
                if len(name) < 3000:
                    folders.append(name + b"/")
            elif kind < 0.5:
                os.symlink(text(some, min(some.choice([*_TARGETS, 4095]), longest_target)), name, dir_fd=fd)
            else:
                file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640, dir_fd=fd)
                os.write(file, some.randbytes(some.choice([0, 1, 511, 512, 513, 5000])))
                os.close(file)
    finally:
        os.close(fd)


def contents(root: Path) -> dict[bytes, tuple[object, ...]]:
    """What lies below the folder, by path: the type of each, with a digest, or the target of a link."""
    found: dict[bytes, tuple[object, ...]] = {}

    def add(fd: int, above: bytes) -> None:
        for entry in os.listdir(fd):
            name = os.fsencode(entry)
            path, is_what = above + name, os.lstat(name, dir_fd=fd)
            if stat.S_ISLNK(is_what.st_mode):
                found[path] = "link", os.readlink(name, dir_fd=fd)
                continue
            inner = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd)
            if stat.S_ISREG(is_what.st_mode):
                with open(inner, "rb") as file:
                    found[path] = "file", is_what.st_size, hashlib.sha256(file.read()).hexdigest()
            else:
                found[path] = ("folder",)
                if path != b".tartape":
                    add(inner, path + b"/")
                os.close(inner)

    fd = os.open(root, os.O_RDONLY)
    add(fd, b"")
    os.close(fd)
    found.pop(b".tartape", None)
    return found
