"""Hashes by the name of their algorithm: Python's own, and BLAKE3, which is a package to install."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tartapefs.base.crc import SIZES, crc_of
from tartapefs.base.errors import TapeError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class IncrementalHash(Protocol):
    """A hash that takes its input piece by piece, as hashlib's do."""

    def update(self, data: "ReadableBuffer", /) -> object: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


def constructor(algorithm: str) -> Callable[..., IncrementalHash]:
    """Returns the function that makes a hash by "md5", "sha256" or "blake3", begun with the data that it is given.

    Raises TapeError if BLAKE3 is not installed.
    """
    if algorithm == "sha256":
        return hashlib.sha256
    if algorithm == "md5":
        return partial(hashlib.md5, usedforsecurity=False)
    try:
        from blake3 import blake3
    except ImportError:
        raise TapeError('BLAKE3 needs the package blake3: pip install "tartapefs[blake3]"') from None
    return blake3


def is_installed(algorithm: str) -> bool:
    """Whether a hash or a CRC of this name can be computed here."""
    try:
        crc_of(algorithm) if algorithm in SIZES else constructor(algorithm)
    except TapeError:
        return False
    return True
