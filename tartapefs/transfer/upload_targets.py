"""Where an upload stores its parts: an S3 object, by multipart upload, or a folder of fsspec's with a file a part.

Rule: the targets keep no state: each call asks the far end what is there. A complete archive there has a label, which
tells the recording that it is of; what the recording of now shares with that one need not be sent.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, Self

from tartapefs.api.archive_file import Parts, Window
from tartapefs.api.tape import Tape
from tartapefs.base.crc import crc_of, s3_checksum
from tartapefs.base.errors import TapeError
from tartapefs.play.engine import TapePlayer

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part at the far end.

    Attributes: `etag`, its name there, mostly its MD5; `md5`, of its bytes, empty if it is not known; `crc64nvme`, of
    its bytes, None if it is not known.
    """

    etag: str
    md5: str = ""
    crc64nvme: int | None = None


class HashedPart(Window):
    """A window that computes the MD5 of what is read from it, in order; a read at its start starts again.

    `on_read` is called before each read with the position in the window, and may raise. `with_crc`: it computes
    `crc64nvme` as well.
    """

    def __init__(
        self,
        player: TapePlayer,
        start: int,
        stop: int,
        name: str,
        on_read: Callable[[int], object] = lambda position: None,
        with_crc: bool = False,
    ) -> None:
        super().__init__(player, start, stop, name)
        self._on_read = on_read
        self._crc = crc_of("crc64nvme") if with_crc else None
        self.crc64nvme: int | None = None

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        position = self.tell()
        self._on_read(position)
        if position == 0:
            self._md5, self.crc64nvme = hashlib.md5(usedforsecurity=False), None
        count = super().readinto(buffer)
        data = memoryview(buffer)[:count]
        self._md5.update(data)
        if self._crc is not None:
            self.crc64nvme = self._crc.update(data, self.crc64nvme or 0)
        return count

    def hexdigest(self) -> str:
        return self._md5.hexdigest()

    def as_stored(self, etag: str) -> StoredPart:
        """What was read, stored with this ETag."""
        return StoredPart(etag, self.hexdigest(), self.crc64nvme)

    def equals(self, stored: StoredPart) -> bool:
        """Whether what was read is what is stored, by its CRC64NVME if both are known, else by its MD5."""
        if stored.crc64nvme is not None and self.crc64nvme is not None:
            return stored.crc64nvme == self.crc64nvme
        return stored.etag == self.hexdigest()


@dataclass(frozen=True, slots=True)
class Label:
    """What the far end keeps of the recording whose archive it has.

    Attributes: `fingerprint`; `rows`, the digests of its rows, sealed or not; `size` and `part_size`, in bytes.
    """

    fingerprint: str
    rows: str
    size: int
    part_size: int

    @classmethod
    def of(cls, tape: Tape, part_size: int) -> Self:
        rows = dict.fromkeys((tape.rows_digest, tape.facts.rows_digest))
        return cls(tape.fingerprint, " ".join(rows), tape.total_size, part_size)

    def as_strings(self) -> dict[str, str]:
        return {
            "tartape-fingerprint": self.fingerprint,
            "tartape-rows": self.rows,
            "tartape-size": str(self.size),
            "tartape-part-size": str(self.part_size),
        }

    @classmethod
    def from_strings(cls, found: dict[str, str]) -> Self | None:
        """Reads what `as_strings` gave, in any case of letters, among others; None if it is not there."""
        lower = {name.lower(): value for name, value in found.items()}
        try:
            label = cls(
                lower["tartape-fingerprint"],
                lower["tartape-rows"],
                int(lower["tartape-size"]),
                int(lower["tartape-part-size"]),
            )
        except (KeyError, ValueError):
            return None
        return label if label.size > 0 and label.part_size > 0 else None


@dataclass(frozen=True, slots=True)
class Held:
    """A complete archive at the far end.

    Attributes: `label`; `etag`; `crc64nvme`, as S3 writes it, empty if it is not told; `has_md5s`: the ETag is made of
    the parts' MD5s.
    """

    label: Label
    etag: str
    crc64nvme: str = ""
    has_md5s: bool = True


def crc64nvme_of(stored: Iterable[StoredPart], label: Label) -> str:
    """The CRC64NVME of the archive in these parts, as S3 writes it; empty if that of a part is not known."""
    crc, whole = crc_of("crc64nvme"), 0
    for at, part in enumerate(stored):
        if part.crc64nvme is None:
            return ""
        whole = crc.join(whole, part.crc64nvme, min(label.part_size, label.size - at * label.part_size))
    return s3_checksum(f"{whole:016x}")


class UploadTarget(Protocol):
    """Where parts go. `send` and `copy` are called on workers, the others before the first part or after the last."""

    @property
    def url(self) -> str: ...

    @property
    def checksummed(self) -> bool:
        """Whether it needs the CRC64NVME of each part."""
        ...

    def held(self) -> Held | None:
        """The complete archive that is there, if it has a label, and has the size that it says."""
        ...

    def begin(self, label: Label, anew: bool = False) -> Self:
        """Begins an upload, or continues an unfinished one, unless `anew`."""
        ...

    def there(self, parts: Parts) -> dict[int, StoredPart]:
        """Each part that an unfinished upload has sent, by its number from 0."""
        ...

    def kept(self, parts: Parts, held: Held, valid: int) -> dict[int, StoredPart]:
        """Each part that stays where it is: it ends at or before `valid`, up to where `held` is right."""
        ...

    def copies(self, held: Held) -> bool:
        """Whether the far end may be asked to `copy`."""
        ...

    def copy(self, at: int, part: Window, held: Held) -> StoredPart:
        """Has the far end make part `at` of the same bytes of `held`. Raises any error if it does not."""
        ...

    def send(self, at: int, part: HashedPart) -> StoredPart:
        """Stores part `at`. Raises UploadError if the stored bytes are not those that were read."""
        ...

    def finish(self, stored: list[StoredPart], parts: Parts, label: Label) -> Held:
        """Makes the archive visible. Raises UploadError if its CRC64NVME, or its ETag, is not that of its parts."""
        ...

    def is_labelled(self, label: Label) -> bool:
        """Whether the complete archive has this label, or none that an upload gave it."""
        ...

    def abort(self) -> None: ...


def import_needed(module: str) -> Any:
    """Imports a module of a package that only uploads need. Raises TapeError if it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        extra = "distributed" if module == "distributed" else "upload"
        raise TapeError(f"{error.name} is not installed; run pip install 'tartapefs[{extra}]'") from None
