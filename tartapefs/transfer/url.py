"""A file system of fsspec: tartape:///srv/data/archive.tar is the archive of /srv/data.

Rule: between two calls only the options are kept. So file systems and open files can be pickled, and the next call sees
that a folder was recorded again. Each open file has its own player, which checks what it reads; bytes from fsspec's
cache were checked when they were read, not when they are served again.
"""

import errno
import os
from datetime import UTC, datetime
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from tartapefs.api.tape import Tape
from tartapefs.base.naming import ARCHIVE_NAME
from tartapefs.play.engine import Check, TapePlayer


class TapeFileSystem(AbstractFileSystem):
    """Shows every recorded folder as a folder with its archive in it. Read-only.

    `index`: the path of the index, if not in the folder. `check`: what each read compares, as for a TapePlayer.
    """

    protocol = "tartape"

    def __init__(self, index: str | None = None, check: Check = "full", **options: Any) -> None:
        super().__init__(index=index, check=check, **options)
        self.index = index
        self.check = check

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return os.path.abspath(super()._strip_protocol(path))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Of an archive also `fingerprint`, and when it was recorded: `recorded` (ns since 1970), `mtime` (s).

        Raises TapeNotFoundError.
        """
        path = self._strip_protocol(path)
        folder, name = os.path.split(path)
        if name != ARCHIVE_NAME:
            with Tape.discover(path, self.index):
                return {"name": path, "type": "directory", "size": 0}
        with Tape.discover(folder, self.index) as tape:
            size, fingerprint, recorded = tape.total_size, tape.fingerprint, tape.recorded_ns
        times = {"mtime": recorded / 10**9, "recorded": recorded}
        return {"name": path, "type": "file", "size": size, "fingerprint": fingerprint} | times

    def modified(self, path: str) -> datetime:
        """When an archive was recorded."""
        return datetime.fromtimestamp(self.info(path)["mtime"], UTC)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        found = self.info(path)
        if found["type"] == "directory":
            found = self.info(os.path.join(found["name"], ARCHIVE_NAME))
        return [found if detail else found["name"]]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Reads exactly this range, without a cache that reads ahead."""
        data: bytes = super().cat_file(path, start, end, **{"cache_type": "none"} | options)
        return data

    def _open(self, path: str, mode: str = "rb", **options: Any) -> "TapeFile":
        if mode != "rb":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return TapeFile(self, path, mode, **options)


class TapeFile(AbstractBufferedFile):
    """An archive, open for reading; fsspec's cache requests blocks of `block_size` bytes."""

    def __init__(self, fs: TapeFileSystem, path: str, mode: str, **options: Any) -> None:
        folder, name = os.path.split(path)
        if name != ARCHIVE_NAME:
            fs.info(path)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self._tape = Tape.discover(folder, fs.index)
        self._player = TapePlayer(self._tape, check=fs.check)
        super().__init__(fs, path, mode, **options | {"size": self._tape.total_size})

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._player.read(start, end - start)

    def close(self) -> None:
        super().close()
        self._player.close()
        self._tape.close()
