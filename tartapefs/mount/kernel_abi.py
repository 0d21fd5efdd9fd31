"""The kernel's FUSE protocol, as far as this package reads and writes it itself: numbers and structs of linux/fuse.h.

Each message begins with a header: `fuse_in_header` (a request) or `fuse_out_header` (an answer or a notification).
"""

import struct

READ, RELEASE, INIT, INTERRUPT = 15, 18, 26, 36  # opcodes

# `fuse_in_header` and `fuse_read_in`: opcode, number of the request, number of the file, thread that asks; of a read:
# handle, offset, size, flags. An interrupt has the number of the request that it is about in the place of the handle.
REQUEST = struct.Struct("=4xIQQ8xI4xQqII")
READ_LOCKOWNER = 2  # the flag of a read that goes to a reader's memory, not to the page cache

ANSWER = struct.Struct("=IiQ")  # `fuse_out_header`: its length, minus an errno or 0, number of the request

# `fuse_out_header` and `fuse_notify_inval_inode_out`: a number of the file, and a range that is all of it.
INVALIDATE = struct.Struct("=IiQQqq")
NOTIFY_INVAL_INODE = 2

INIT_REQUEST = struct.Struct("=4xI44xI")  # with `fuse_init_in`: opcode, flags that the kernel offers
# With `fuse_init_out`: its length, what stays as it is, bytes of read-ahead at most, flags that are accepted; requests
# of the page cache in progress at most, and from how many on nothing is read ahead; what stays; pages of a request.
INIT_ANSWER = struct.Struct("=I20sIIHH8sH")
INIT_ANSWER_SIZE = 16 + 64  # bytes
MAX_PAGES = 1 << 22  # the flag for the number of pages; kernels know it since 4.20
ASYNC_DIO = 1 << 15  # without it a read across the end by io_uring gives too much: it is repeated at the same offset
