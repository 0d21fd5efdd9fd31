"""The archive, or a part or shard of it, as a read-only file, for libraries that upload files.

Rule: a window has only a position of its own; its bytes come from the player, with all checks, and it raises what the
player raises. It has `seek` and `tell` but no `len`: boto3 and requests would use a `len`, which ignores the position,
and send a wrong Content-Length after a seek.
"""

import io
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from tartapefs.api.files import Files
from tartapefs.archive.layout import Extent
from tartapefs.base.buffers import aligned
from tartapefs.play.engine import TapePlayer

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class Window(io.RawIOBase):
    """The bytes `[start, stop)` of the archive that `player` plays, and `zeros` after them, as a file.

    `readinto` and `read` return all bytes requested, fewer only at the window's end, or raise what
    `TapePlayer.readinto` raises. Windows of one player can be read concurrently; reads of one window are serialized.
    Closing it leaves the player and the tape as they are; the source is closed with the last window on it.

    name: "archive.tar", or that of a part or shard.
    start, stop: its offsets in the archive, in bytes; half-open.
    size: in bytes. Of a shard but the last with the footer, which the archive does not have there.
    """

    def __init__(self, player: TapePlayer, start: int, stop: int, name: str, zeros: int = 0) -> None:
        self.name = name
        self.start = start
        self.stop = stop
        self._extent = Extent(start, stop, zeros)
        self.size = self._extent.size
        self._player = player
        self._position = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<{self.name} [{self.start}, {self.stop})>"

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_player", None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Sets the position, which may lie beyond the end. Raises ValueError for a negative one."""
        self._check_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}.get(whence)
        if base is None or base + offset < 0:
            raise ValueError(f"not a position in a file: offset {offset}, whence {whence}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        self._check_open()
        view = memoryview(buffer).cast("B")
        with self._lock:
            offset, count, zeros = self._extent.locate(self._position, len(view))
            if count or zeros:  # after drift a read of zeros alone fails, too
                self._player.readinto(view[:count], offset)
                view[count : count + zeros] = bytes(zeros)
            self._position += count + zeros
        return count + zeros

    def read(self, size: int | None = -1, /) -> bytes:
        self._check_open()
        left = max(0, self.size - self._position)
        buffer = aligned(left if size is None or size < 0 else min(size, left))
        return bytes(buffer[: self.readinto(buffer)])

    def readall(self) -> bytes:
        return self.read()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the window is closed")


class Parts(Sequence[Window]):
    """The archive as a sequence of windows of `size` bytes, the last one shorter; each access makes a new one.

    Their names are archive.tar.00001 and so on. With `shard_size` they are shards, archive.00001.tar and so on. Raises
    as `Files` does.
    """

    def __init__(self, player: TapePlayer, size: int | None = None, shard_size: int | None = None) -> None:
        self._player = player
        self._files = Files(player.tape, part_size=size, shard_size=shard_size)

    def __len__(self) -> int:
        return self._files.count

    @overload
    def __getitem__(self, number: int) -> Window: ...
    @overload
    def __getitem__(self, number: slice) -> list[Window]: ...
    def __getitem__(self, number: int | slice) -> Window | list[Window]:
        numbers = range(len(self))[number]
        return self._open_part(numbers) if isinstance(numbers, int) else [self._open_part(at) for at in numbers]

    def _open_part(self, at: int) -> Window:
        start, stop, zeros = self._files.extent(at)
        return Window(self._player, start, stop, self._files.name_of(at), zeros)


def archive(player: TapePlayer) -> Window:
    """The whole archive, as one window."""
    return Parts(player)[0]
