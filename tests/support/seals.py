"""Folders with sealed tapes, bits that flip in them, and what a seal is by its definition in docs/verified.md."""

import contextlib
import hashlib
import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from blake3 import blake3

from support.reference import Reference
from tartapefs import Tape, TapePlayer, TapeRecorder
from tartapefs.verify.seal import seal

BLOCK = 1 << 16  # bytes
FANOUT = 62  # digests in a piece or a node
OLD_NS = 1_600_000_000_123_456_789
MIXED = [0, 1, 511, 512, 513, 5000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7, 0, 300_000, 7]  # sizes
HASHES: dict[str, Callable[[bytes], bytes]] = {
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake3": lambda data: blake3(data).digest(),
}


def number(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "big") for value in values)


def seal_of(archive: bytes, algorithm: str, block_size: int) -> str:
    """The seal of an archive that `tarfile` takes apart, by the definition in docs/verified.md."""
    h = HASHES[algorithm]
    children: list[tuple[int, bytes]] = []
    run_start, run, count = 0, b"", 0
    pieces: list[tuple[int, bytes]] = []
    with tarfile.open(fileobj=io.BytesIO(archive), ignore_zeros=False) as tar:
        members = tar.getmembers()
    position = 0
    for member in members:
        data = member.offset_data
        header, body = archive[position:data], archive[data:][: member.size]
        blocks = [h(body[at : at + block_size]) for at in range(0, len(body), block_size)]
        for at in range(0, len(blocks), FANOUT) if len(blocks) > 1 else ():
            start = data + at * block_size
            stop = min(start + FANOUT * block_size, data + member.size)
            pieces.append((start, h(b"piece" + number(start, stop) + b"".join(blocks[at : at + FANOUT]))))
        run += header + (b"".join(blocks) if len(blocks) < 2 else h(b"".join(blocks)))
        count += 1
        position = data + -(-member.size // 512) * 512
        if count == 8 or len(blocks) > 1 or member is members[-1]:
            children += [(run_start, h(b"leaf" + number(run_start, position) + run)), *pieces]
            run_start, run, count, pieces = position, b"", 0, []
    level = 0
    while level == 0 or len(children) > 1:
        level += 1
        groups = [children[at : at + FANOUT] for at in range(0, len(children), FANOUT)]
        children = [
            (group[0][0], h(b"node" + number(level, group[0][0]) + b"".join(digest for _, digest in group)))
            for group in groups
        ]
    return h(b"seal" + number(len(archive), len(members), block_size, level) + children[0][1]).hex()


def whole(root: Path) -> bytes:
    """The archive of the folder, as `tarfile` makes it."""
    reference = Reference(root)
    return reference.read(0, reference.size)


def sealed(root: Path, algorithm: str = "blake3", block_size: int = BLOCK) -> str:
    """Records and seals the folder; returns the seal."""
    TapeRecorder(root, overwrite=True).commit()
    return seal_again(root, algorithm, block_size)


def seal_again(root: Path, algorithm: str = "blake3", block_size: int = BLOCK, **options: Any) -> str:
    with Tape.discover(root) as tape, closing(TapePlayer(tape, root)) as player:
        return seal(tape, player.source, player.at_home, algorithm, block_size, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def playing(root: Path, **options: Any) -> Iterator[TapePlayer]:
    with Tape.discover(root) as tape, closing(TapePlayer(tape, root, **options)) as player:
        yield player


def index_of(root: Path) -> Path:
    return root / ".tartape" / "index.db"


def make(root: Path, sizes: list[int]) -> Path:
    """Files of these sizes, eleven in a folder; old, so that nothing waits for the clock."""
    content = random.Random(len(sizes))
    for at, size in enumerate(sizes):
        path = root / f"folder {at // 11:03}" / f"{at:05}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.randbytes(size))
    root.mkdir(exist_ok=True)
    (root / "link").symlink_to("folder 000")
    for path in (*root.rglob("*"), root):
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    return root


def flip(path: Path, at: int, bit: int = 1) -> None:
    """Another byte there; the times are put back, as far as they can be."""
    before = path.stat()
    with path.open("r+b", buffering=0) as file:
        (old,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([old ^ bit]), at)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def pieces_of(root: Path) -> Iterator[bytes]:
    with playing(root) as player:
        for at in range(0, player.tape.total_size, 1 << 20):
            yield player.read(at, 1 << 20)
