"""MD5 and SHA-256 that can be saved half way and restored, which `hashlib` cannot do.

Theory: OpenSSL's functions work on plain structs of its public headers, MD5_CTX and SHA256_CTX, the same from 0.9.8 to
3.x; `ctypes` calls them. They are taken from the library that `hashlib` loaded or, if Python has OpenSSL linked in and
its symbols hidden (as the builds that uv installs), from the system's libcrypto. A saved state is the chaining value,
the number of bytes, and the unfinished block: it does not depend on the machine. `is_resumable` tests this once a
process, against `hashlib` across a save; if the test fails, use `hashlib`, and hash again from the first byte.

docs/decisions/0020-resumable-hashes.md says why this exists.
"""

import ctypes
import hashlib
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_BLOCK = 64  # bytes, of both algorithms
_GUARD = 64  # bytes behind each struct, which a library with a larger struct would write to


class _MD5(ctypes.Structure):
    _fields_ = (
        ("chain", ctypes.c_uint32 * 4),
        ("low", ctypes.c_uint32),  # the number of bits
        ("high", ctypes.c_uint32),
        ("block", ctypes.c_uint8 * _BLOCK),
        ("used", ctypes.c_uint32),
        ("guard", ctypes.c_uint8 * _GUARD),
    )


class _SHA256(ctypes.Structure):
    _fields_ = (
        ("chain", ctypes.c_uint32 * 8),
        ("low", ctypes.c_uint32),
        ("high", ctypes.c_uint32),
        ("block", ctypes.c_uint8 * _BLOCK),
        ("used", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("guard", ctypes.c_uint8 * _GUARD),
    )


_CONTEXTS: dict[str, tuple[str, type[_MD5 | _SHA256], int]] = {
    "md5": ("MD5", _MD5, 16),
    "sha256": ("SHA256", _SHA256, 32),
}


@cache
def _library() -> ctypes.CDLL:
    """OpenSSL's library. Raises OSError without one, and in FIPS mode, in which some builds end the process here."""
    import _hashlib

    if _hashlib.get_fips_mode():
        raise OSError("OpenSSL is in FIPS mode")
    for name in (getattr(_hashlib, "__file__", None), "libcrypto.so.3"):
        with suppress(OSError):
            library = ctypes.CDLL(name)  # its symbols, and those of the libraries that it needs; None: of the program
            if hasattr(library, "SHA256_Init"):
                return library
    raise OSError("OpenSSL's functions are not found")


class ResumableHash:
    """A hash with the methods of `hashlib`'s, for "md5" or "sha256".

    Attributes: `name`, the algorithm; `digest_size`, in bytes. Raises OSError, AttributeError or ImportError if OpenSSL
    does not have it.
    """

    def __init__(self, algorithm: str) -> None:
        prefix, context, self.digest_size = _CONTEXTS[algorithm]
        self.name = algorithm
        self._context = context()
        library = _library()
        self._update = library[f"{prefix}_Update"]
        self._update.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self._final = library[f"{prefix}_Final"]
        self._final.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        if library[f"{prefix}_Init"](ctypes.byref(self._context)) != 1:
            raise OSError(f"OpenSSL refuses {prefix}")

    def update(self, data: "ReadableBuffer") -> None:
        view = memoryview(data)
        size = view.nbytes
        if not size:
            return
        # ctypes borrows writable memory alone; what is read-only is mostly `bytes` already.
        borrowed = bytes(view) if view.readonly else (ctypes.c_char * size).from_buffer(view)
        self._update(ctypes.byref(self._context), borrowed, size)

    def digest(self) -> bytes:
        copy = type(self._context).from_buffer_copy(self._context)
        result = ctypes.create_string_buffer(self.digest_size)
        self._final(result, ctypes.byref(copy))
        return result.raw

    def hexdigest(self) -> str:
        return self.digest().hex()

    def save(self) -> str:
        """The state, in ASCII: chaining value, number of bytes, unfinished block."""
        context = self._context
        count = (context.high << 32 | context.low) // 8
        chain = "".join(f"{word:08x}" for word in context.chain)
        return f"{chain}:{count}:{bytes(context.block[: context.used]).hex()}"

    @classmethod
    def restore(cls, algorithm: str, state: str) -> "ResumableHash":
        """Makes the hash whose `save` gave `state`. Raises ValueError for a state that no hash can have."""
        made = cls(algorithm)
        context = made._context
        chain, _, rest = state.partition(":")
        number, _, block = rest.partition(":")
        count, unfinished = int(number), bytes.fromhex(block)
        if len(chain) != 8 * len(context.chain) or not 0 <= count < 1 << 61 or len(unfinished) != count % _BLOCK:
            raise ValueError("not a state of this hash")
        for at in range(len(context.chain)):
            context.chain[at] = int(chain[8 * at : 8 * at + 8], 16)
        context.high, context.low = divmod(8 * (count - len(unfinished)), 1 << 32)
        made.update(unfinished)
        return made


@cache
def is_resumable(algorithm: str) -> bool:
    """Whether `ResumableHash` has this algorithm here, and passes a test against `hashlib`."""
    if algorithm not in _CONTEXTS:
        return False
    data = bytes(range(256)) * 5
    try:
        first = ResumableHash(algorithm)
        first.update(data[:731])
        second = ResumableHash.restore(algorithm, first.save())
        second.update(data[731:])
        is_right = second.digest() == hashlib.new(algorithm, data, usedforsecurity=False).digest()
        return is_right and not any(first._context.guard) and not any(second._context.guard)
    except (ImportError, OSError, AttributeError, ValueError):
        return False
