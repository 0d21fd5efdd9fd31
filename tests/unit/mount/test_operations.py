"""The adapter to FUSE without a mount: a fake player behind it, and its callbacks called through C as libfuse would."""

import ctypes
import errno
import logging
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tartapefs.api import files
from tartapefs.base.errors import Difference, Fact, TapeError, TapeFormatError, TapeIntegrityError
from tartapefs.mount import libfuse
from tartapefs.mount import operations as fs
from tartapefs.mount import session as binding

try:
    fuse = libfuse.load()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

SIZE = 10_241  # not a multiple of 512, so that rounding shows
RECORDED = 1_700_000_000_123_456_789
FINGERPRINT = "0123456789abcdef" * 4
DRIFT = TapeIntegrityError("data/photos/a.jpg", [Difference(Fact.SIZE, "512", "640")])
THREE = [None] if hasattr(fuse, "fuse_config") and fuse.fuse_version_major == 3 else []  # what libfuse 3 adds
CALLBACKS = dict(field[:2] for field in fuse.fuse_operations._fields_)


class FakePlayer:
    """Answers each read with what `reads` does; by default with the offset's lowest byte, all over."""

    def __init__(self, reads: Callable[[memoryview, int], int] | None = None) -> None:
        self.tape = SimpleNamespace(
            total_size=SIZE,
            recorded_ns=RECORDED,
            fingerprint=FINGERPRINT,
            seal="",
            member_count=7,
            generations=[SimpleNamespace(start=0, recorded_ns=RECORDED)],
        )
        self.source = SimpleNamespace(root="/some where/dätä\n")
        self.is_bound_by_python = False
        self.drift: TapeIntegrityError | None = None
        self._reads = reads or self._fill

    @staticmethod
    def _fill(buffer: memoryview, offset: int) -> int:
        buffer[:] = bytes([offset & 0xFF]) * len(buffer)
        return len(buffer)

    def readinto(self, buffer: memoryview, offset: int) -> int:
        return self._reads(buffer, offset)


class FakeLibrary:
    """libfuse, 2 and 3, as far as mounting goes: remembers what it was told."""

    def __init__(self) -> None:
        self.options: list[bytes] = []
        self.mountpoint = b""

        def fuse_setup(count: int, arguments: "ctypes.Array[ctypes.c_char_p]", *rest: object) -> int:
            self.options, self.mountpoint = arguments[count - 2].split(b","), arguments[count - 1]
            return 1

        def fuse_new(arguments: Any, *rest: object) -> int:
            self.options = arguments._obj.argv[arguments._obj.argc - 1].split(b",")
            return 1

        def fuse_mount(handle: object, mountpoint: bytes) -> int:
            self.mountpoint = mountpoint
            return 0

        context = libfuse.load().fuse_context()
        self.fuse_setup, self.fuse_new, self.fuse_mount = fuse_setup, fuse_new, fuse_mount
        self.fuse_get_context = lambda: ctypes.pointer(context)


class Adapter:
    """The operations as libfuse reaches them: a C call each, whose answer is a count or -errno."""

    def __init__(self, player: FakePlayer, options: fs.MountOptions, library: FakeLibrary) -> None:
        self.player = player
        self.library = library
        self.archive = b"/" + os.fsencode(options.name)
        self.archive_fs = fs.ArchiveFS(player, options)
        self._session = binding.Session(self.archive_fs, "/mnt/x", player.source.root, options)
        self._callbacks = self._session._connection.callbacks

    def read(self, size: int = 64, offset: int = 0, handle: int = 1) -> tuple[int, bytes]:
        """As the kernel asks for it: `fuse_in_header` and `fuse_read_in` of linux/fuse.h, answered by the loop."""
        request = struct.pack("=IIQQIIIIQQIIQII", 80, 15, 7, 2, 0, 0, 0, 0, handle, offset, size, 0, 0, 0, 0)
        kernel, device = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with kernel, device:
            kernel.send(request)
            kernel.shutdown(socket.SHUT_WR)
            self._session._device = device.fileno()
            self._session.loop(memoryview(bytearray(b"\xaa") * binding.MEMORY))
            answer = kernel.recv(1 << 21)
        length, error, number = struct.unpack_from("=IiQ", answer)
        assert (length, number) == (len(answer), 7)
        assert error <= 0
        assert not (error and answer[16:])
        return error or length - 16, answer[16:]

    def getattr(self, path: bytes) -> tuple[int, Any]:
        found = fuse.c_stat()
        return self._callbacks.getattr(path, ctypes.byref(found), *THREE), found

    def open(self, path: bytes) -> int:
        return self._callbacks.open(path, ctypes.byref(fuse.fuse_file_info()))

    def readdir(self, path: bytes, offset: int = 0, room: int = 1000) -> list[bytes]:
        """The names from `offset` on, until there is room for no more."""
        names: list[bytes] = []

        def fill(buffer: object, name: bytes, *rest: object) -> int:
            if len(names) == room:
                return 1
            names.append(name)
            return 0

        filler = CALLBACKS["readdir"]._argtypes_[2](fill)
        info = ctypes.byref(fuse.fuse_file_info())
        assert self._callbacks.readdir(path, None, filler, offset, info, *[0 for _ in THREE]) == 0
        return names

    def statfs(self) -> Any:
        found = fuse.c_statvfs()
        assert self._callbacks.statfs(b"/", ctypes.byref(found)) == 0
        return found

    def getxattr(self, path: bytes, name: bytes, size: int = 65536) -> tuple[int, bytes]:
        buffer = (ctypes.c_byte * size)() if size else None
        answer = self._callbacks.getxattr(path, name, buffer, size)
        return answer, bytes(buffer or b"")[: max(answer, 0)]

    def listxattr(self, path: bytes, size: int = 65536) -> tuple[int, list[bytes]]:
        buffer = (ctypes.c_byte * size)() if size else None
        answer = self._callbacks.listxattr(path, buffer, size)
        return answer, bytes(buffer or b"")[: max(answer, 0)].split(b"\0")[:-1]


MakeAdapter = Callable[..., Adapter]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> MakeAdapter:
    """`adapter(player, **options)`: an adapter over `player`, mounted nowhere."""
    library = FakeLibrary()
    monkeypatch.setattr(fuse, "_libfuse", library)
    monkeypatch.setattr(libfuse, "_negotiate", lambda library, handle: None)
    for name in ("_device_2", "_device_3"):
        monkeypatch.setattr(libfuse, name, lambda library, handle: (-1, None))

    def make(player: FakePlayer | None = None, **options: object) -> Adapter:
        return Adapter(player or FakePlayer(), fs.MountOptions(**options), library)

    return make


def raising(error: BaseException) -> Callable[[memoryview, int], int]:
    def reads(buffer: memoryview, offset: int) -> int:
        buffer[: len(buffer) // 2] = b"x" * (len(buffer) // 2)
        raise error

    return reads


# What it shows


def test_the_archive_has_the_attributes_that_the_design_fixes(adapter: MakeAdapter) -> None:
    """Size, blocks, inode, times and mode come from the tape and the options alone."""
    answer, found = adapter().getattr(b"/archive.tar")
    assert answer == 0
    assert found.st_mode == stat.S_IFREG | 0o400
    assert (found.st_size, found.st_blocks, found.st_nlink) == (SIZE, 21, 1)
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
    assert found.st_ino > 1
    assert found.st_blksize > 0
    for moment in (found.st_mtimespec, found.st_ctimespec):
        assert moment.tv_sec * 10**9 + moment.tv_nsec == RECORDED


def test_the_folder_is_a_folder_of_the_same_owner(adapter: MakeAdapter) -> None:
    answer, found = adapter().getattr(b"/")
    assert answer == 0
    assert found.st_mode == stat.S_IFDIR | 0o500
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
    assert found.st_mtimespec.tv_sec == RECORDED // 10**9


@pytest.mark.parametrize(
    ("mode", "of_archive", "of_folder"),
    [
        (0o400, 0o400, 0o500),
        (0o440, 0o440, 0o550),
        (0o444, 0o444, 0o555),
        (0o777, 0o444, 0o555),
        (0o644, 0o444, 0o555),
        (0o200, 0, 0),
    ],
)
def test_mode_opens_reading_only(adapter: MakeAdapter, mode: int, of_archive: int, of_folder: int) -> None:
    """Who may read the archive may enter the folder; nobody may write or execute."""
    made = adapter(mode=mode)
    assert stat.S_IMODE(made.getattr(b"/archive.tar")[1].st_mode) == of_archive
    assert stat.S_IMODE(made.getattr(b"/")[1].st_mode) == of_folder


@pytest.mark.parametrize(
    "name",
    ["archive.tar", "with space.tar", "архив.tar", "アーカイブ", os.fsdecode(b"\xff\xfe.tar"), "a\nb", "é" * 127],
)
def test_any_file_name_is_shown_and_found_as_its_bytes(adapter: MakeAdapter, name: str) -> None:
    """Names are bytes: non-Latin ones and invalid UTF-8 pass unchanged, there and back."""
    made = adapter(name=name)
    assert made.readdir(b"/") == [b".", b"..", os.fsencode(name)]
    assert made.getattr(b"/" + os.fsencode(name))[0] == 0


@pytest.mark.parametrize(
    "path", [b"/other", b"/\xff", b"/archive.tar/", b"/archive.tar/x", b"/ARCHIVE.TAR", b"/.tartape", b"/\xc3\xa4"]
)
def test_there_is_nothing_else(adapter: MakeAdapter, path: bytes) -> None:
    made = adapter()
    assert made.getattr(path)[0] == -errno.ENOENT
    assert made.getxattr(path, b"user.tartape.state")[0] == -errno.ENOENT
    assert made.listxattr(path)[0] == -errno.ENOENT


def test_statfs_has_a_block_size(adapter: MakeAdapter) -> None:
    """At a block size of 0 bsdtar loops for ever."""
    found = adapter().statfs()
    assert found.f_bsize >= 512
    assert found.f_frsize >= 512
    assert found.f_blocks * found.f_frsize >= SIZE
    assert found.f_bfree == found.f_bavail == 0
    assert found.f_namemax == 255


def test_open_is_granted_while_the_tape_is_valid(adapter: MakeAdapter) -> None:
    assert adapter().open(b"/archive.tar") == 0


# Extended attributes

XATTRS = {
    b"user.tartape.name": b"archive.tar",
    b"user.tartape.fingerprint": FINGERPRINT.encode(),
    b"user.tartape.state": b"valid",
    b"user.tartape.members": b"7",
    b"user.tartape.recorded": b"2023-11-14 22:13:20.123456789Z",
    b"user.tartape.source": "/some where/dätä\\n".encode(),
}


IN_SHORT = {
    b"user.tartape.pid": b"%d" % os.getpid(),
    b"user.tartape.size": b"%d" % SIZE,
    b"user.tartape.delivered": b"100",
    b"user.tartape.covered": b"90",
    b"user.tartape.readers": b"0",
    b"user.tartape.position": b"0",
}


@pytest.mark.parametrize(("path", "expected"), [(b"/", XATTRS | IN_SHORT), (b"/archive.tar", XATTRS)])
def test_extended_attributes_describe_the_tape(adapter: MakeAdapter, path: bytes, expected: dict[bytes, bytes]) -> None:
    """On the archive and on the folder; as text of one line each. Those that change are on the folder alone."""
    made = adapter()
    made.read(50)
    made.read(50, 40)
    answer, names = made.listxattr(path)
    assert answer > 0
    assert set(names) == set(expected)
    assert {name: made.getxattr(path, name)[1] for name in names} == expected


def test_extended_attributes_tell_their_size_first(adapter: MakeAdapter) -> None:
    """As getxattr(2) and listxattr(2) want: the length for a size of 0, ERANGE where it is too small."""
    made = adapter()
    assert made.getxattr(b"/", b"user.tartape.members", 0)[0] == 1
    assert made.getxattr(b"/", b"user.tartape.fingerprint", 63)[0] == -errno.ERANGE
    assert made.getxattr(b"/", b"user.tartape.fingerprint", 64)[0] == 64
    length = sum(len(name) + 1 for name in XATTRS | IN_SHORT)
    assert made.listxattr(b"/", 0)[0] == length
    assert made.listxattr(b"/", length - 1)[0] == -errno.ERANGE


@pytest.mark.parametrize(
    "name",
    [b"user.tartape.nothing", b"user.tartape.", b"fingerprint", b"user.fingerprint", b"security.capability",
     b"system.posix_acl_access", b"user.\xff"],
)  # fmt: skip
def test_an_absent_attribute_is_answered_so_and_not_logged(
    adapter: MakeAdapter, name: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert adapter().getxattr(b"/archive.tar", name)[0] == -errno.ENODATA
    assert not caplog.records


def test_the_state_of_an_invalid_tape_names_the_culprit(adapter: MakeAdapter) -> None:
    """One line: path, what was recorded, what was found, what to do."""
    made = adapter()
    made.player.drift = DRIFT
    state = made.getxattr(b"/", b"user.tartape.state")[1].decode()
    assert state.startswith("invalid: data/photos/a.jpg: size ")
    assert "recorded 512" in state
    assert "found 640" in state
    assert "tartapefs record --force" in state
    assert "\n" not in state


def test_an_invalid_tape_has_a_folder_but_no_archive(adapter: MakeAdapter) -> None:
    made = adapter()
    made.player.drift = DRIFT
    assert made.getattr(b"/archive.tar")[0] == -errno.EIO
    assert made.open(b"/archive.tar") == -errno.EIO
    assert made.getattr(b"/")[0] == 0
    assert made.readdir(b"/") == [b".", b"..", b"archive.tar"]


# Reading


@pytest.mark.parametrize(("size", "offset"), [(1, 0), (512, 511), (4096, 5000), (SIZE - 3, 3)])
def test_the_player_fills_the_buffer_of_the_request(adapter: MakeAdapter, size: int, offset: int) -> None:
    """All of it, in place, and the answer is how much that was."""
    answer, data = adapter().read(size, offset)
    assert answer == size
    assert data == bytes([offset & 0xFF]) * size


def test_an_offset_beyond_four_gibibytes_arrives_whole(adapter: MakeAdapter) -> None:
    seen: list[int] = []
    player = FakePlayer(lambda buffer, offset: seen.append(offset) or 0)
    player.tape.total_size = 6 * 2**40
    adapter(player).read(1, 5 * 2**40 + 1)
    assert seen == [5 * 2**40 + 1]


def test_a_read_of_a_part_is_one_of_the_archive_and_ends_with_the_part(adapter: MakeAdapter) -> None:
    """The kernel asks by pages, and so for more than a part has."""
    seen: list[tuple[int, int]] = []
    made = adapter(FakePlayer(lambda buffer, offset: seen.append((offset, len(buffer))) or len(buffer)), part_size=1000)
    assert made.open(b"/archive.tar.00004") == 0
    (handle,) = made.archive_fs.statistics.readers
    assert [made.read(size, at, handle)[0] for size, at in [(10, 0), (64, 990), (4096, 0), (5, 1000), (5, 2**40)]] == [
        10, 10, 1000, 0, 0
    ]  # fmt: skip
    assert [(at, size) for at, size in seen if size] == [(3000, 10), (3990, 10), (3000, 1000)]
    assert made.archive_fs.statistics.snapshot()[1].ranges == [(3000, 4000)]


def test_a_shard_ends_in_zeros(adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are no bytes of the archive, but are read only as long as the archive can be."""
    monkeypatch.setattr(files, "shard_starts", lambda tape, size: [0, 2048, 5121])
    made = adapter(shard_size=3500)
    assert made.open(b"/archive.00002.tar") == 0
    (handle,) = made.archive_fs.statistics.readers
    body, footer = b"\x01" * 3073, bytes(1024)
    monkeypatch.setattr(made.player, "_reads", lambda buffer, offset: made.player._fill(buffer, 1))
    for size, at in [(10, 0), (4096, 0), (9999, 0), (1024, 2560), (4096, 3072), (1, 3073), (9999, 4000), (5, 4097)]:
        assert made.read(size, at, handle)[1] == (body + footer)[at : at + size]
    assert made.archive_fs.statistics.snapshot()[1].ranges == [(2048, 5121)]
    monkeypatch.setattr(made.player, "_reads", raising(DRIFT))
    assert made.read(512, 3500, handle) == (-errno.EIO, b"")


def test_a_folder_is_listed_from_any_offset(adapter: MakeAdapter) -> None:
    """As many entries as the kernel has room for, and then on from there."""
    made = adapter(part_size=1000)
    names = [b".", b"..", *(b"archive.tar.%05d" % number for number in range(1, 12))]
    assert made.readdir(b"/") == names
    assert [made.readdir(b"/", offset) for offset in range(14)] == [names[offset:] for offset in range(14)]
    assert made.readdir(b"/", 3, room=2) == names[3:5]


def test_the_end_of_the_archive_is_an_answer_of_fewer_bytes(adapter: MakeAdapter) -> None:
    made = adapter(FakePlayer(lambda buffer, offset: 3))
    assert made.read(64)[0] == 3


# Errors

ERRORS: list[tuple[BaseException, int]] = [
    (DRIFT, errno.EIO),
    (TapeFormatError("/x/index.db", "a row is damaged"), errno.EIO),
    (TapeError("something of ours"), errno.EIO),
    *[
        (OSError(number, os.strerror(number), "/x/photos/a.jpg"), errno.EIO)
        for number in (errno.EIO, errno.ENOENT, errno.EACCES, errno.EMFILE, errno.EAGAIN, errno.EINTR, errno.ESTALE)
    ],
    (OSError("no number"), errno.EIO),
    (fs.Refusal(errno.ENODATA), errno.ENODATA),
    (fs.Refusal(errno.EROFS), errno.EROFS),
    (fs.Refusal(0), errno.EIO),
    (RuntimeError("a defect"), errno.EIO),
    (ValueError("closed"), errno.EIO),
    (MemoryError(), errno.EIO),
    (RecursionError(), errno.EIO),
    (StopIteration(), errno.EIO),
    (GeneratorExit(), errno.EIO),
    (SystemExit(0), errno.EIO),
    (SystemExit(7), errno.EIO),
    (KeyboardInterrupt(), errno.EIO),
]


@pytest.mark.parametrize(("error", "number"), ERRORS, ids=lambda value: repr(value)[:60])
def test_a_read_that_raises_fails_whole(adapter: MakeAdapter, error: BaseException, number: int) -> None:
    """EIO, or what the adapter raised on purpose; no exception of any kind gets past it."""
    assert adapter(FakePlayer(raising(error))).read()[0] == -number


@pytest.mark.parametrize("operation", ["getattr", "readdir", "open", "statfs", "getxattr", "listxattr"])
@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), RuntimeError("x"), SystemExit(0), KeyboardInterrupt()])
def test_no_operation_lets_an_exception_through(
    adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, operation: str, error: BaseException
) -> None:
    def fails(*arguments: object) -> int:
        raise error

    monkeypatch.setattr(fs.ArchiveFS, operation, fails)
    callbacks, info = adapter()._callbacks, ctypes.byref(fuse.fuse_file_info())
    arguments = {
        "getattr": (b"/", ctypes.byref(fuse.c_stat()), *THREE),
        "readdir": (b"/", None, CALLBACKS["readdir"]._argtypes_[2](lambda *_: 0), 0, info, *[0 for _ in THREE]),
        "open": (b"/archive.tar", info),
        "statfs": (b"/", ctypes.byref(fuse.c_statvfs())),
        "getxattr": (b"/", b"user.x", None, 0),
        "listxattr": (b"/", None, 0),
    }[operation]
    assert getattr(callbacks, operation)(*arguments) == -errno.EIO


def test_drift_is_logged_as_a_line_to_act_on(adapter: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    adapter(FakePlayer(raising(DRIFT))).read()
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno >= logging.ERROR
    for part in ("data/photos/a.jpg", "recorded 512", "found 640", 'run "tartapefs record --force"'):
        assert part in message
    assert record.exc_info is None


def test_an_error_of_the_disk_is_logged_with_its_path(adapter: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    adapter(FakePlayer(raising(OSError(errno.EIO, os.strerror(errno.EIO), b"photos/a.jpg")))).read()
    (record,) = caplog.records
    assert "photos/a.jpg" in record.getMessage()
    assert os.strerror(errno.EIO) in record.getMessage()
    assert record.exc_info is None


def test_a_defect_is_logged_with_its_traceback(adapter: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    adapter(FakePlayer(raising(RuntimeError("two and two are five")))).read()
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "two and two are five" in caplog.text


@pytest.mark.parametrize(
    "error",
    [DRIFT, OSError(errno.EIO, "broken", "/x/a"), TapeFormatError("/x", "bad"), RuntimeError("a defect")],
    ids=lambda error: type(error).__name__,
)
def test_a_reader_that_tries_again_does_not_fill_the_log(
    adapter: MakeAdapter, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    made = adapter(FakePlayer(raising(error)))
    for offset in range(200):
        assert made.read(64, offset)[0] == -errno.EIO
    assert len(caplog.records) == 1


def test_two_bad_files_in_turn_do_not_fill_the_log(adapter: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    """Two readers that each meet another bad sector again and again."""

    def reads(buffer: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), f"/x/{offset % 2}")

    made = adapter(FakePlayer(reads))
    for offset in range(200):
        made.read(64, offset)
    assert {"/x/0", "/x/1"} == {path for path in ("/x/0", "/x/1") if path in caplog.text}
    assert len(caplog.records) <= 10


def test_another_error_is_logged_again(adapter: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    errors = iter([OSError(errno.EIO, "first", "/x/a"), OSError(errno.EIO, "second", "/x/b")])

    def reads(buffer: memoryview, offset: int) -> int:
        raise next(errors)

    made = adapter(FakePlayer(reads))
    made.read()
    made.read()
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("member", "shown"),
    [
        ("d/two\nlines", r"d/two\nlines:"),
        ("d/\x1b[31mred", r"d/\x1b[31mred:"),
        (os.fsdecode(b"d/\xff"), r"d/\xff:"),
        ("d/back\\slash", r"d/back\\slash:"),
        ("d/right\u202eleft", r"d/right\u202eleft:"),
        ("d/ünï", "d/ünï:"),
    ],
)
def test_names_are_escaped_once_in_the_log(
    adapter: MakeAdapter, caplog: pytest.LogCaptureFixture, member: str, shown: str
) -> None:
    """One line, whatever a name holds, and the same spelling as everywhere else."""
    adapter(FakePlayer(raising(TapeIntegrityError(member, [Difference(Fact.SIZE, "1", "2")])))).read()
    (record,) = caplog.records
    assert record.getMessage().startswith(shown)
    assert "\n" not in record.getMessage()


def test_names_in_an_error_of_the_disk_are_escaped(adapter: MakeAdapter, caplog: pytest.LogCaptureFixture) -> None:
    adapter(FakePlayer(raising(OSError(errno.EIO, "broken", "/x/two\nlines\x1b\udcff")))).read()
    message = caplog.records[0].getMessage()
    assert message.isprintable()
    assert "two" in message


class _BrokenHandler(logging.Handler):
    """Fails as a log file does whose folder is gone."""

    def emit(self, record: logging.LogRecord) -> None:
        raise FileNotFoundError(errno.ENOENT, "no such folder", "/gone/log")


@pytest.fixture
def broken_log() -> Iterator[None]:
    log, handler = logging.getLogger("tartapefs"), _BrokenHandler()
    log.addHandler(handler)
    yield
    log.removeHandler(handler)


@pytest.mark.parametrize("error", [DRIFT, OSError(errno.EIO, "broken"), RuntimeError("a defect")])
def test_a_log_that_cannot_be_written_does_not_turn_an_error_into_an_empty_answer(
    adapter: MakeAdapter, broken_log: None, error: BaseException
) -> None:
    """An answer of 0 bytes is the end of the file to whoever reads, and a copy that ends there looks complete."""
    assert adapter(FakePlayer(raising(error))).read()[0] == -errno.EIO


# What libfuse is told


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("allow_other", [False, True])
def test_options_of_the_mount(adapter: MakeAdapter, direct: bool, allow_other: bool) -> None:
    """Read-only and `default_permissions` always; direct I/O and other users only on demand."""
    made = adapter(direct=direct, allow_other=allow_other)
    options = made.library.options
    if THREE:  # some are no options there
        config = fuse.fuse_config()
        made._callbacks.init(ctypes.byref(fuse.fuse_conn_info()), ctypes.byref(config))
        options += [name.encode() for name in ("direct_io", "use_ino") if getattr(config, name)]
    assert {b"ro", b"default_permissions", b"use_ino", b"attr_timeout=0", b"entry_timeout=0"} <= set(options)
    assert (b"direct_io" in options) is direct
    assert (b"allow_other" in options) is allow_other
    assert made.library.mountpoint == b"/mnt/x"


def test_one_thread_always_serves(adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many find at once that they hinder each other, all but one rest."""
    session, resting, served = adapter()._session, [], []
    at_once, others_rest = threading.Barrier(4), threading.Event()

    def sleep(seconds: float) -> None:
        resting.append(threading.get_ident())
        others_rest.wait(30)  # all rest until the one that serves has found that it does

    def serve() -> None:
        for _ in range(5):
            at_once.wait()
            session._yield_gil()
            if threading.get_ident() not in resting:
                served.append(session._serving)
                others_rest.set()
            if at_once.wait() == 0:
                resting.clear()
                others_rest.clear()

    monkeypatch.setattr(binding, "time", SimpleNamespace(sleep=sleep))
    session._serving = 4
    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served == [1] * 5
    assert session._serving == 4
