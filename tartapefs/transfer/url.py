"""A file system of fsspec: tartape:///srv/data/archive.tar is the archive of /srv/data.

And tartape:///srv/data/shard_size=1GiB/archive.00001.tar is the first of its shards of at most 1 GiB.

Rule: between two calls only the options are kept. So file systems and open files can be pickled, and the next call sees
that a folder was recorded again. Each open file has its own player, which checks what it reads; bytes from fsspec's
cache were checked when they were read, not when they are served again.
"""

import contextlib
import errno
import os
from datetime import UTC, datetime
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from tartapefs.api.files import Files
from tartapefs.api.tape import Tape
from tartapefs.base.naming import ARCHIVE_NAME, shard_number
from tartapefs.base.text import byte_count
from tartapefs.play.engine import Check, TapePlayer

_SHARDS = "shard_size="  # begins the name of a folder of shards


class TapeFileSystem(AbstractFileSystem):
    """Shows every recorded folder as a folder with its archive in it, and with folders of shards. Read-only.

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
        """Of a file also `fingerprint`, and when its bytes were last changed: `recorded` (ns since 1970), `mtime` (s).

        Raises TapeNotFoundError for what was not recorded, FileNotFoundError for a shard that is not there, and
        ValueError for a size that makes too many shards.
        """
        path = self._strip_protocol(path)
        if not _is_file(path):
            with self._discover(path):
                return {"name": path, "type": "directory", "size": 0}
        folder = os.path.dirname(path)
        with self._discover(folder) as tape:
            files = _files(tape, folder)
            return _info(tape, files, folder, _find(files, path))

    def _discover(self, folder: str) -> Tape:
        return Tape.discover(_recorded(folder)[0], self.index)

    def modified(self, path: str) -> datetime:
        """When an archive was recorded, or a shard last changed by a recording."""
        return datetime.fromtimestamp(self.info(path)["mtime"], UTC)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if _is_file(path):
            found = [self.info(path)]
        else:
            with self._discover(path) as tape:
                files = _files(tape, path)
                found = [_info(tape, files, path, at) for at in range(files.count)]
        return found if detail else [each["name"] for each in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Reads exactly this range, without a cache that reads ahead."""
        data: bytes = super().cat_file(path, start, end, **{"cache_type": "none"} | options)
        return data

    def _open(self, path: str, mode: str = "rb", **options: Any) -> "TapeFile":
        if mode != "rb":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return TapeFile(self, path, mode, **options)


def _recorded(folder: str) -> tuple[str, int | None]:
    """The recorded folder whose files are in `folder`, and, of a folder of shards, their size."""
    above, name = os.path.split(folder)
    if name.startswith(_SHARDS):
        with contextlib.suppress(ValueError):
            return above, byte_count(name.removeprefix(_SHARDS))
    return folder, None


def _is_file(path: str) -> bool:
    """Whether this is the path of an archive or shard, if its folder is there."""
    folder, name = os.path.split(path)
    if _recorded(folder)[1] is None:
        return name == ARCHIVE_NAME
    return shard_number(name, ARCHIVE_NAME) is not None


def _files(tape: Tape, folder: str) -> Files:
    return Files(tape, shard_size=_recorded(folder)[1])


def _find(files: Files, path: str) -> int:
    if (at := files.find(os.fsencode(os.path.basename(path)))) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return at


def _info(tape: Tape, files: Files, folder: str, at: int) -> dict[str, Any]:
    recorded = files.recorded_ns(at)
    return {
        "name": os.path.join(folder, files.name_of(at)),
        "type": "file",
        "size": files.extent(at).size,
        "fingerprint": tape.fingerprint,
        "mtime": recorded / 10**9,
        "recorded": recorded,
    }


class TapeFile(AbstractBufferedFile):
    """An archive or shard, open for reading; fsspec's cache requests blocks of `block_size` bytes."""

    def __init__(self, fs: TapeFileSystem, path: str, mode: str, **options: Any) -> None:
        folder, _ = os.path.split(path)
        if not _is_file(path):
            fs.info(path)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self._tape = Tape.discover(_recorded(folder)[0], fs.index)
        files = _files(self._tape, folder)
        self._extent = files.extent(_find(files, path))
        self._player = TapePlayer(self._tape, check=fs.check)
        super().__init__(fs, path, mode, **options | {"size": self._extent.size})

    def _fetch_range(self, start: int, end: int) -> bytes:
        offset, count, zeros = self._extent.locate(start, end - start)
        return self._player.read(offset, count) + bytes(zeros)

    def close(self) -> None:
        super().close()
        self._player.close()
        self._tape.close()
