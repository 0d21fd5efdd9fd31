"""A session whose kernel is the test: requests, answers, and pages that are dropped."""

import errno
import socket
import struct
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from support.programs import wait_until

from tartapefs.archive.layout import Extent
from tartapefs.mount import session as binding
from tartapefs.mount.read_statistics import PART_SHIFT
from tartapefs.mount.session import Session

FOOTER_AT = 1_000_000


class Served:
    """A session that is mounted nowhere: the test is its kernel, which gets answers and notices."""

    def __init__(self) -> None:
        self.kernel, self._device = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self.kernel.settimeout(30)
        self.may_end, self.is_read = threading.Event(), threading.Event()
        self.session = Session.__new__(Session)
        archive = SimpleNamespace(
            readinto=self._readinto,
            is_served_by_one=False,
            statistics=SimpleNamespace(delivered=lambda *_: None),
            errno_of=lambda error: errno.EIO,
        )
        self.session.__dict__ |= {
            "_archive": archive,
            "_device": self._device.fileno(),
            "_pass_on": lambda address, length: None,
            "_serving": 0,
            "_serving_lock": threading.Lock(),
            "_files": {},
            "_under_way": set(),
            "_drop_lock": threading.Lock(),
            "_extent": lambda at: Extent(at * 2 * FOOTER_AT, (at + 1) * 2 * FOOTER_AT),
            "_footer": FOOTER_AT,
            "_footers_under_way": set(),
            "_files_with_footer": {},
            "footer_cached": threading.Event(),
            "_has_ended": False,
            "hold": None,
        }
        self._thread = threading.Thread(target=self.session.loop, args=(memoryview(bytearray(binding.MEMORY)),))
        self._thread.start()

    def _readinto(self, buffer: memoryview, offset: int) -> int:
        self.is_read.set()
        self.may_end.wait(30)
        raise OSError

    def request(self, opcode: int, number: int, file: int, handle: int, offset: int = 0, flags: int = 0) -> None:
        body = handle, offset, 4096, flags, 0, 0, 0
        request = struct.pack("=IIQQIIIIQQIIQII", 80, opcode, number, file, 0, 0, 0, 0, *body)
        self.kernel.send(request)

    def close(self) -> None:
        self.may_end.set()
        self.kernel.shutdown(socket.SHUT_WR)
        self._thread.join(30)
        self.kernel.close()
        self._device.close()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


def dropping(served: Served, ended: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=served.session.drop_pages, args=(ended,))
    thread.start()
    return thread


NOTICE = struct.pack("=IiQQqq", 40, 2, 0, 77, 0, -1)  # linux/fuse.h: fuse_out_header, fuse_notify_inval_inode_out


def test_pages_are_dropped_after_the_reads_under_way(served: Served) -> None:
    """Before, the kernel would wait for their pages, and the daemon for the kernel."""
    served.request(15, 1, 77, 5)
    assert served.is_read.wait(30)
    thread = dropping(served, threading.Event())
    thread.join(0.2)
    assert thread.is_alive()
    served.may_end.set()
    assert served.kernel.recv(100) == struct.pack("=IiQ", 16, -errno.EIO, 1)
    assert served.kernel.recv(100) == NOTICE
    thread.join(30)
    assert not thread.is_alive()


def test_a_session_that_ends_drops_nothing_while_a_read_is_under_way(served: Served) -> None:
    served.request(15, 1, 77, 5)
    assert served.is_read.wait(30)
    ended = threading.Event()
    thread = dropping(served, ended)
    ended.set()
    thread.join(30)
    assert not thread.is_alive()
    served.session.drop_no_more(30)
    served.may_end.set()
    assert served.kernel.recv(100) == struct.pack("=IiQ", 16, -errno.EIO, 1)
    served.kernel.setblocking(False)
    with pytest.raises(BlockingIOError):
        served.kernel.recv(100)


def test_files_that_nobody_has_open_are_not_dropped(served: Served) -> None:
    served.may_end.set()
    for number, (opcode, file, handle) in enumerate([(15, 76, 4), (15, 77, 5), (15, 77, 6), (18, 76, 4), (18, 77, 5)]):
        served.request(opcode, number, file, handle)
        if opcode == 15:
            served.kernel.recv(100)
    wait_until(lambda: set(served.session._files) == {6})
    dropping(served, threading.Event()).join(30)
    assert served.kernel.recv(100) == NOTICE


def test_a_footer_in_the_page_cache_is_dropped(served: Served) -> None:
    """Once for each file that it was read for, and from the page that it begins in; nothing else of them."""
    served.may_end.set()
    session, to_reader = served.session, 2
    for number, (file, offset, flags) in enumerate(
        [(75, FOOTER_AT - 4096, 0), (76, FOOTER_AT - 4095, to_reader), (77, FOOTER_AT - 4095, 0), (77, FOOTER_AT, 0)]
    ):
        served.request(15, number, file, 5, offset, flags)
        served.kernel.recv(100)
    assert session.footer_cached.wait(30)
    wait_until(lambda: not session._under_way)
    session.drop_footer(threading.Event())
    assert served.kernel.recv(100) == struct.pack("=IiQQqq", 40, 2, 0, 77, FOOTER_AT, -1)
    session.drop_footer(threading.Event())
    served.kernel.setblocking(False)
    with pytest.raises(BlockingIOError):
        served.kernel.recv(100)


def test_a_footer_in_two_parts_is_dropped_from_both(served: Served) -> None:
    """And nothing of the part before them, or of the first one up to where the footer begins."""
    served.may_end.set()
    session = served.session
    session._extent = lambda at: Extent(at * 100_000, (at + 1) * 100_000)
    session._footer = 599_500  # of an archive that has 600,524 bytes
    for number, (part, offset) in enumerate([(4, 99_000), (5, 90_000), (5, 99_000), (6, 0)]):
        served.request(15, number, 70 + part, part << PART_SHIFT | 5, offset)
        served.kernel.recv(100)
    wait_until(lambda: not session._under_way)
    assert session._files_with_footer == {75: 99_500, 76: 0}
    session.drop_footer(threading.Event())
    notices = {served.kernel.recv(100) for _ in range(2)}
    assert notices == {struct.pack("=IiQQqq", 40, 2, 0, *dropped, -1) for dropped in [(75, 99_500), (76, 0)]}


def test_a_footer_that_is_being_read_is_not_dropped(served: Served) -> None:
    """The kernel would wait for the answer; it is dropped after that."""
    served.request(15, 1, 77, 5, FOOTER_AT)
    assert served.is_read.wait(30)
    served.session._files_with_footer[77] = FOOTER_AT
    served.session.drop_footer(threading.Event())
    assert served.session._files_with_footer == {}
    served.may_end.set()
    assert served.kernel.recv(100) == struct.pack("=IiQ", 16, -errno.EIO, 1)
    assert served.session.footer_cached.wait(30)
    wait_until(lambda: not served.session._under_way)
    served.session.drop_footer(threading.Event())
    assert len(served.kernel.recv(100)) == 40


def test_a_session_that_ends_drops_no_footer(served: Served) -> None:
    served.session._files_with_footer[77] = FOOTER_AT
    ended = threading.Event()
    ended.set()
    served.session.drop_footer(ended)
    served.kernel.setblocking(False)
    with pytest.raises(BlockingIOError):
        served.kernel.recv(100)


def test_a_session_that_ends_fails_reads_for_the_page_cache_and_drops_it(served: Served) -> None:
    """A read into a reader's own memory is served as long as anything is."""
    served.may_end.set()
    served.request(15, 1, 77, 5)
    assert served.kernel.recv(100) == struct.pack("=IiQ", 16, -errno.EIO, 1)
    wait_until(lambda: not served.session._under_way)
    served.is_read.clear()
    served.session.end(30)
    assert served.kernel.recv(100) == NOTICE
    served.request(15, 2, 77, 5)
    assert served.kernel.recv(100) == struct.pack("=IiQ", 16, -errno.EIO, 2)
    assert not served.is_read.is_set()
    served.request(15, 3, 77, 5, flags=2)
    assert served.kernel.recv(100) == struct.pack("=IiQ", 16, -errno.EIO, 3)
    assert served.is_read.is_set()


def test_a_session_that_ends_drops_nothing_that_it_would_wait_for(served: Served) -> None:
    served.request(15, 1, 77, 5)
    assert served.is_read.wait(30)
    served.session.end(0.1)
    served.may_end.set()
    assert served.kernel.recv(100) == struct.pack("=IiQ", 16, -errno.EIO, 1)
    served.kernel.setblocking(False)
    with pytest.raises(BlockingIOError):
        served.kernel.recv(100)
