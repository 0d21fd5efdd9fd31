"""An upload to a folder of fsspec's: a file for each part and one with its MD5, written once the part is whole.

Rule: a complete set of parts, as MD5SUMS says, stays until the next one is complete. Meanwhile the names of the new
parts begin with `under_way`, which is empty if there is no complete set. The label is a file of its own, which also
says which MD5SUMS it is of.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar

from tartapefs.api.archive_file import Parts, Window
from tartapefs.base.errors import OutputError, TapeError, UploadError
from tartapefs.base.naming import ARCHIVE_NAME, part_name, part_number
from tartapefs.play.playback import CHUNK
from tartapefs.transfer.range_digests import etag
from tartapefs.transfer.upload_targets import HashedPart, Held, Label, StoredPart, import_needed

_T = TypeVar("_T")
_SUMS = "MD5SUMS"
_LABEL = "TARTAPE"
_UNDER_WAY = "unfinished."


def _told(method: Callable[..., _T]) -> Callable[..., _T]:
    """Has `method` raise UploadError for whatever fsspec, or a package that it uses, raises."""

    @wraps(method)
    def told(folder: "PartsFolder", *arguments: Any) -> _T:
        try:
            return method(folder, *arguments)
        except TapeError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise UploadError(folder.url, f"{where}{error.strerror or error}") from error
        except Exception as error:
            raise UploadError(folder.url, f"{type(error).__name__}: {error}") from error

    return told


def _is_of_a_part(name: str) -> bool:
    """Whether a file in a folder of parts is a part or the MD5 of one, complete or under way."""
    return part_number(name.removeprefix(_UNDER_WAY).removesuffix(".md5"), ARCHIVE_NAME) is not None


@dataclass(frozen=True, slots=True)
class PartsFolder:
    """The folder at `url`; `options`: of fsspec's file system."""

    url: str
    options: dict[str, Any]
    under_way: str = ""
    checksummed: bool = False

    def _open(self) -> tuple[Any, str]:
        try:
            fs, path = import_needed("fsspec").core.url_to_fs(self.url, **self.options)
        except ImportError as error:  # it says which package fsspec needs for this URL
            raise UploadError(self.url, str(error)) from None
        except (TypeError, ValueError) as error:
            raise UploadError(self.url, " ".join(str(error).split())) from None
        return fs, path.rstrip("/")

    def _sums(self) -> dict[str, str]:
        """The MD5s by the names of the files, as MD5SUMS has them; none if there is no complete set."""
        fs, path = self._open()
        try:
            lines = fs.cat_file(f"{path}/{_SUMS}").decode(errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        sums = {name: md5 for md5, _, name in (line.partition("  ") for line in lines)}
        if not all(part_number(name, ARCHIVE_NAME) for name in sums):
            raise OutputError(f"{self.url}{_SUMS}", "is not of an upload; move it, or choose another folder")
        return sums

    @_told
    def held(self) -> Held | None:
        sums = self._sums()
        if not sums:
            return None
        fs, path, sizes = self._listed()
        if _LABEL not in sizes:
            return None
        try:
            kept = json.loads(fs.cat_file(f"{path}/{_LABEL}"))
            label = Label.from_strings(kept)
            names = [part_name(ARCHIVE_NAME, number) for number in range(1, len(sums) + 1)]
            found = etag(bytes.fromhex(sums[name]) for name in names)
        except (ValueError, KeyError, AttributeError):
            return None
        if label is None or kept.get("etag") != found:
            return None
        wanted = [label.part_size] * (len(names) - 1)
        wanted.append(label.size - sum(wanted))
        return Held(label, found) if wanted == [sizes.get(name) for name in names] else None

    @_told
    def begin(self, label: Label, anew: bool = False) -> "PartsFolder":
        fs, path = self._open()
        fs.makedirs(path, exist_ok=True)
        return replace(self, under_way=_UNDER_WAY if self._sums() else "")

    def _listed(self) -> tuple[Any, str, dict[str, int]]:
        """The sizes of the files in the folder, by their names."""
        fs, path = self._open()
        fs.invalidate_cache()
        try:
            listed = fs.ls(path, detail=True)
        except FileNotFoundError:  # an object store has no empty folders
            listed = []
        return fs, path, {found["name"].rpartition("/")[2]: found["size"] for found in listed}

    @_told
    def there(self, parts: Parts) -> dict[int, StoredPart]:
        listed = self._listed()
        found = self._whole(listed, "", parts)
        found |= self._whole(listed, self.under_way, parts) if self.under_way else {}
        return {at: StoredPart(md5, md5) for at, md5 in found.items()}

    def _whole(self, listed: tuple[Any, str, dict[str, int]], begin: str, parts: Parts) -> dict[int, str]:
        """The MD5 of each whole part whose file's name begins with `begin`."""
        fs, path, sizes = listed
        whole = {
            f"{begin}{part.name}.md5": at
            for at, part in enumerate(parts)
            if sizes.get(begin + part.name) == part.size and f"{begin}{part.name}.md5" in sizes
        }
        # In one call, which many file systems do at once.
        lines = fs.cat([f"{path}/{name}" for name in whole]) if whole else {}
        return {whole[name.rpartition("/")[2]]: line.decode().partition(" ")[0] for name, line in lines.items()}

    @_told
    def kept(self, parts: Parts, held: Held, valid: int) -> dict[int, StoredPart]:
        sums = self._sums()
        kept = {at: sums[part.name] for at, part in enumerate(parts) if part.stop <= valid and part.name in sums}
        return {at: StoredPart(md5, md5) for at, md5 in kept.items()}

    def copies(self, held: Held) -> bool:
        return False

    def copy(self, at: int, part: Window, held: Held) -> StoredPart:
        raise UploadError(self.url, "a folder copies nothing")

    def send(self, at: int, part: HashedPart) -> StoredPart:
        fs, path = self._open()
        file = f"{path}/{self.under_way}{part.name}"
        if fs.exists(f"{file}.md5"):
            fs.rm_file(f"{file}.md5")
        with fs.open(file, "wb") as out:
            shutil.copyfileobj(part, out, CHUNK)
        stored = fs.info(file)["size"]
        if stored != part.size:
            raise UploadError(self.url, f"{part.name} is stored with {stored} bytes, it has {part.size}")
        fs.pipe_file(f"{file}.md5", f"{part.hexdigest()}  {part.name}\n".encode())
        return part.as_stored(part.hexdigest())

    @_told
    def finish(self, stored: list[StoredPart], parts: Parts, label: Label) -> Held:
        md5s = [part.md5 for part in stored]
        fs, path, sizes = listed = self._listed()
        names = [part.name for part in parts]
        kept = {*names, *(f"{name}.md5" for name in names)}
        ready = self._whole(listed, self.under_way, parts) if self.under_way else {}
        moving = [name for at, name in enumerate(names) if ready.get(at) == md5s[at]]
        others = {name for name in sizes if _is_of_a_part(name)} - kept
        if self.under_way and others:
            fs.rm_file(f"{path}/{_SUMS}")  # from here on there are parts of two sets
        for name in (name for part in moving for name in (part, f"{part}.md5")):
            fs.mv(f"{path}/{self.under_way}{name}", f"{path}/{name}")
            others.discard(self.under_way + name)
        for name in others:  # of another size, or left by an upload that was killed
            fs.rm_file(f"{path}/{name}")
        lines = [f"{md5}  {name}\n" for md5, name in zip(md5s, names, strict=True)]
        fs.pipe_file(f"{path}/{_SUMS}", "".join(lines).encode())
        held = Held(label, etag(map(bytes.fromhex, md5s)))
        fs.pipe_file(f"{path}/{_LABEL}", json.dumps(label.as_strings() | {"etag": held.etag}, indent=2).encode())
        return held

    def is_labelled(self, label: Label) -> bool:
        return True

    @_told
    def abort(self) -> None:
        fs, path, sizes = self._listed()
        for name in sizes:
            is_left_over = name == _LABEL and not self.under_way
            if is_left_over or (name.startswith(self.under_way) and _is_of_a_part(name)):
                fs.rm_file(f"{path}/{name}")
