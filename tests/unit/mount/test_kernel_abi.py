"""The kernel's messages, against the structures of linux/fuse.h, which are written out here for ctypes."""

import ctypes
import sys
from ctypes import c_int32, c_int64, c_uint16, c_uint32, c_uint64
from typing import Any

import pytest

from tartapefs.mount import kernel_abi


class InHeader(ctypes.Structure):
    """`fuse_in_header`"""

    _fields_ = (
        *(("len", c_uint32), ("opcode", c_uint32), ("unique", c_uint64), ("nodeid", c_uint64), ("uid", c_uint32)),
        *(("gid", c_uint32), ("pid", c_uint32), ("total_extlen", c_uint16), ("padding", c_uint16)),
    )


class OutHeader(ctypes.Structure):
    """`fuse_out_header`"""

    _fields_ = (("len", c_uint32), ("error", c_int32), ("unique", c_uint64))


class ReadIn(ctypes.Structure):
    """`fuse_read_in`"""

    _fields_ = (
        *(("fh", c_uint64), ("offset", c_uint64), ("size", c_uint32), ("read_flags", c_uint32)),
        *(("lock_owner", c_uint64), ("flags", c_uint32), ("padding", c_uint32)),
    )


class InvalidateOut(ctypes.Structure):
    """`fuse_notify_inval_inode_out`"""

    _fields_ = (("ino", c_uint64), ("off", c_int64), ("len", c_int64))


class InitIn(ctypes.Structure):
    """`fuse_init_in`"""

    _fields_ = (
        *(("major", c_uint32), ("minor", c_uint32), ("max_readahead", c_uint32), ("flags", c_uint32)),
        *(("flags2", c_uint32), ("unused", c_uint32 * 11)),
    )


class InitOut(ctypes.Structure):
    """`fuse_init_out`"""

    _fields_ = (
        *(("major", c_uint32), ("minor", c_uint32), ("max_readahead", c_uint32), ("flags", c_uint32)),
        *(("max_background", c_uint16), ("congestion_threshold", c_uint16), ("max_write", c_uint32)),
        *(("time_gran", c_uint32), ("max_pages", c_uint16), ("map_alignment", c_uint16), ("flags2", c_uint32)),
        *(("max_stack_depth", c_uint32), ("unused", c_uint16 * 12)),
    )


@pytest.mark.parametrize(
    ("struct", "size"),
    [(InHeader, 40), (OutHeader, 16), (ReadIn, 40), (InvalidateOut, 24), (InitIn, 64), (InitOut, 64)],
)
def test_structures_have_the_size_of_the_kernels(struct: type[ctypes.Structure], size: int) -> None:
    """The check on this test's own transcription."""
    assert ctypes.sizeof(struct) == size


def test_numbers_are_those_of_the_header() -> None:
    """`enum fuse_opcode`, `enum fuse_notify_code`, and the flags of INIT and READ."""
    assert (kernel_abi.READ, kernel_abi.RELEASE, kernel_abi.INIT, kernel_abi.INTERRUPT) == (15, 18, 26, 36)
    assert kernel_abi.NOTIFY_INVAL_INODE == 2
    assert (kernel_abi.READ_LOCKOWNER, kernel_abi.ASYNC_DIO, kernel_abi.MAX_PAGES) == (0x2, 0x8000, 0x400000)


def test_a_read_is_unpacked() -> None:
    header = InHeader(len=80, opcode=15, unique=2**63 + 2, nodeid=7, uid=1, gid=2, pid=4242)
    read = ReadIn(fh=2**40, offset=2**62, size=131072, read_flags=2, lock_owner=2**64 - 1, flags=2**31)
    found = kernel_abi.REQUEST.unpack(bytes(header) + bytes(read)[:24])
    assert found == (15, 2**63 + 2, 7, 4242, 2**40, 2**62, 131072, 2)
    assert kernel_abi.REQUEST.size == ctypes.sizeof(InHeader) + ReadIn.lock_owner.offset


def test_an_interrupt_names_its_request_in_the_place_of_the_handle() -> None:
    """`fuse_interrupt_in` is this number alone; what follows in the buffer is of an earlier request."""
    message = bytes(InHeader(len=48, opcode=36, unique=9)) + (8).to_bytes(8, sys.byteorder) + b"\xff" * 16
    opcode, number, _, _, interrupted, *_ = kernel_abi.REQUEST.unpack(message)
    assert (opcode, number, interrupted) == (36, 9, 8)


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        (kernel_abi.ANSWER.pack(16, -5, 2**63), [OutHeader(len=16, error=-5, unique=2**63)]),
        (
            kernel_abi.INVALIDATE.pack(kernel_abi.INVALIDATE.size, kernel_abi.NOTIFY_INVAL_INODE, 0, 77, 0, -1),
            [OutHeader(len=40, error=2, unique=0), InvalidateOut(ino=77, off=0, len=-1)],
        ),
    ],
)
def test_answers_are_packed(packed: bytes, expected: list[Any]) -> None:
    assert packed == b"".join(map(bytes, expected))


def test_what_an_answer_to_init_says_is_found_and_changed_alone() -> None:
    request = bytes(InHeader(opcode=26)) + bytes(InitIn(major=7, minor=38, max_readahead=2, flags=0xDEADBEEF, flags2=3))
    assert kernel_abi.INIT_REQUEST.unpack_from(request) == (26, 0xDEADBEEF)
    own = {"max_readahead": 5, "flags": 1, "max_background": 12, "congestion_threshold": 9, "max_pages": 32}
    answer = InitOut(major=7, minor=31, max_write=4096, time_gran=1, **own)
    header = OutHeader(len=80, error=0, unique=2)
    length, first, *found, second, pages = kernel_abi.INIT_ANSWER.unpack_from(bytes(header) + bytes(answer))
    assert (length, *found, pages) == (80, *own.values())
    changed = kernel_abi.INIT_ANSWER.pack(length, first, 6, 1 | kernel_abi.MAX_PAGES, 64, 65, second, 256)
    answer.max_readahead, answer.flags, answer.max_background, answer.congestion_threshold, answer.max_pages = (
        *(6, 1 | kernel_abi.MAX_PAGES, 64, 65, 256),
    )
    assert changed == (bytes(header) + bytes(answer))[: kernel_abi.INIT_ANSWER.size]
    assert ctypes.sizeof(OutHeader) + ctypes.sizeof(InitOut) == kernel_abi.INIT_ANSWER_SIZE
