"""Folders whose indexes have several packs, with borders of packs at all kinds of places."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from support.damaged_index import index_of
from tartapefs import Tape, TapeFormatError, TapePlayer, TapeRecorder
from tartapefs.verify.seal import seal

BLOCK = 1 << 16  # bytes; of a sealed tape


def flat(root: Path, count: int = 140) -> None:
    """Small files in one folder: but for the first pack, none has a folder in it."""
    for number in range(count):
        (root / f"{number:03}").write_bytes(b"x" * (number * 7 % 1100))


def deep(root: Path) -> None:
    """Folders, files and links in turns, so that packs begin and end in the middle of a folder, and between two."""
    for number in range(30):
        folder = root / f"a{number % 4}" / ("b" * (number % 3 + 1)) / f"c{number:02}"
        folder.mkdir(parents=True)
        for name in range(number % 6):
            (folder / f"file {name}").write_bytes(b"y" * (number * name))
        (folder / "link").symlink_to("../" * (number % 3) + "nowhere")


def large(root: Path) -> None:
    """Files of several blocks, which end the leaf that they are in, at uneven distances."""
    for number in range(140):
        (path := root / f"{number % 3}" / f"{number:03}").parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, 3 * BLOCK + 1 if number * number % 11 == 4 else number)


def few(root: Path) -> None:
    """Folders with a few files, a large one among them; three packs."""
    for number in range(66):
        (path := root / f"{number // 5}" / f"{number:02}").parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, BLOCK + 1 if number % 23 == 6 else number * 20)


TREES: dict[str, Callable[[Path], None]] = {"flat": flat, "deep": deep, "large": large, "few": few}


def recorded_tree(root: Path, build: Callable[[Path], None], is_sealed: bool) -> Path:
    root.mkdir(parents=True)
    build(root)
    TapeRecorder(root).commit()
    if is_sealed:
        with Tape.discover(root) as tape, closing(TapePlayer(tape, root)) as player:
            seal(tape, player.source, player.at_home, "sha256", BLOCK)
    return root


def query(root: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(index_of(root))) as database:
        return database.execute(sql).fetchall()


def counts(root: Path) -> list[int]:
    return [count for (count,) in query(root, "SELECT count FROM pack ORDER BY start")]


def starts_of_packs(root: Path) -> list[int]:
    return [start for (start,) in query(root, "SELECT start FROM pack ORDER BY start")]


def is_sound(tape: Tape) -> bool:
    try:
        return tape.rows_are_sound()
    except TapeFormatError:
        return False
