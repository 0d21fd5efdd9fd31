"""MD5 and SHA-256 whose state can be saved: what `hashlib` cannot do, and no library that is still kept does.

Rule: OpenSSL's own functions on its own plain structs, MD5_CTX and SHA256_CTX (openssl/md5.h, openssl/sha.h: the same
in every version from 0.9.8 to 3), reached through the library that `hashlib` itself loaded. A saved state is the
chaining value, the number of bytes, and the bytes of the unfinished block: nothing in it depends on the machine. Where
the functions are not there, or give another digest than `hashlib` in a trial, `savable` is false.
"""

import ctypes
import hashlib
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_BLOCK = 64  # bytes, of both


class _MD5(ctypes.Structure):
    _fields_ = (
        ("chain", ctypes.c_uint32 * 4),
        ("low", ctypes.c_uint32),  # the number of bits
        ("high", ctypes.c_uint32),
        ("block", ctypes.c_uint8 * _BLOCK),
        ("used", ctypes.c_uint32),
    )


class _SHA256(ctypes.Structure):
    _fields_ = (
        ("chain", ctypes.c_uint32 * 8),
        ("low", ctypes.c_uint32),
        ("high", ctypes.c_uint32),
        ("block", ctypes.c_uint8 * _BLOCK),
        ("used", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
    )


_CONTEXTS: dict[str, tuple[str, type[_MD5 | _SHA256], int]] = {
    "md5": ("MD5", _MD5, 16),
    "sha256": ("SHA256", _SHA256, 32),
}


@cache
def _library() -> ctypes.CDLL:
    import _hashlib

    return ctypes.CDLL(_hashlib.__file__)  # its symbols, and those of the libraries that it needs


class SavableHash:
    """Like an object of `hashlib`, for "md5" or "sha256". Raises OSError or AttributeError without OpenSSL."""

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
        place = bytes(view) if view.readonly else (ctypes.c_char * size).from_buffer(view)
        self._update(ctypes.byref(self._context), place, size)

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
    def restore(cls, algorithm: str, state: str) -> "SavableHash":
        """The hash whose `save` gave `state`. Raises ValueError for a state that none can have."""
        made = cls(algorithm)
        context = made._context
        chain, _, rest = state.partition(":")
        number, _, block = rest.partition(":")
        count, unfinished = int(number), bytes.fromhex(block)
        if len(chain) != 8 * len(context.chain) or not 0 <= count < 1 << 61 or len(unfinished) != count % _BLOCK:
            raise ValueError("no state of this hash")
        for place in range(len(context.chain)):
            context.chain[place] = int(chain[8 * place : 8 * place + 8], 16)
        context.high, context.low = divmod(8 * (count - len(unfinished)), 1 << 32)
        made.update(unfinished)
        return made


@cache
def savable(algorithm: str) -> bool:
    """Whether `SavableHash` has this algorithm here, and agrees with `hashlib` across a save in an odd place."""
    if algorithm not in _CONTEXTS:
        return False
    data = bytes(range(256)) * 5
    try:
        first = SavableHash(algorithm)
        first.update(data[:731])
        second = SavableHash.restore(algorithm, first.save())
        second.update(data[731:])
        return second.digest() == hashlib.new(algorithm, data, usedforsecurity=False).digest()
    except (ImportError, OSError, AttributeError, ValueError):
        return False
