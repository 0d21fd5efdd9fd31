"""The player: turns (offset, size) into bytes, or into an exception. `play` is the same engine, in order.

Rule: every requested byte below the archive's end is the recorded one, or an exception is raised; never a short read,
never a byte of a source that is not as recorded. All bytes come from `Assembler.fill`, by way of `ReadStrategy`.

The footer says that the archive is complete. The player serves it only after an audit of every directory that began
after everything before it had been read: a reader that gets the footer has the whole tape, as recorded.

The first drift makes the tape invalid for good: each later read raises it again. An error of the disk does not.
"""

import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from tartapefs.archive.layout import FOOTER
from tartapefs.base import forked_work
from tartapefs.base.buffers import aligned
from tartapefs.base.errors import OffsetError, TapeError, TapeIntegrityError
from tartapefs.index.recording import Recording
from tartapefs.play import events, playback
from tartapefs.play.assemble import Assembler
from tartapefs.play.audit import Throttle, audit, check_headers
from tartapefs.play.playback import CHUNK
from tartapefs.play.read_strategy import ReadStrategy
from tartapefs.source.folder import Source

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Check = Literal["full", "mtime"]
_SCRUB_SIZE = 1 << 18  # bytes: one thread hashes so many alone
FOOTER_AUDIT_AGE = 1.0  # seconds


class Scrubbed(NamedTuple):
    """The progress of `TapePlayer.scrub`.

    position: in the archive, in bytes.
    passes: how often it came to the end of the archive.
    """

    position: int
    passes: int


class TapePlayer:
    """Plays `tape` from the folder at `source_root`, by default the one that the tape was discovered in.

    `check`: "full" also compares inode and change time if the tape is at home; "mtime" never does, for a source whose
    inodes or change times are not stable (hard-linked snapshots, network file systems). On a sealed tape a file of
    which only timestamps or inode differ is judged by its contents; `strict`: it is drift.

    `expect`: the fingerprint or the seal that the tape must have; raises UnexpectedTapeError. With a seal, every byte
    that is read is checked against it. With a fingerprint, the first audit, so before the footer, compares all headers.

    `allow_additions`: a name that was not recorded is no drift, so a folder may grow while it is read. What was
    recorded is checked as ever: a recorded name that is gone or is another is drift.

    Usable from many threads. Raises TapeError if no source is known, and OSError if it cannot be opened.

    tape: as given.
    source: the open folder.
    at_home: whether inode and change time are compared.
    strict: as given.
    inspector: compares members with the source.
    drift: None, or the TapeIntegrityError that made the tape invalid.
    drifted: a `threading.Event` that is set from then on.
    scrubbed: the progress of `scrub`, in bytes and passes.
    is_bound_by_python: whether the interpreter lock bound the last read, so that more threads would not help.
    """

    def __init__(
        self,
        tape: Recording,
        source_root: str | os.PathLike[str] | None = None,
        check: Check = "full",
        *,
        strict: bool = False,
        expect: str | None = None,
        allow_additions: bool = False,
    ) -> None:
        if check not in ("full", "mtime"):
            raise ValueError(f"check is 'full' or 'mtime', not {check!r}")
        root = source_root if source_root is not None else tape.directory
        if root is None:
            raise TapeError(f"{tape.index_path}: the source folder of this index is not known; name it")
        self.tape = tape
        self.source = Source(os.fspath(root))
        self.at_home = check == "full" and tape.is_at_home(self.source.ino)
        self.strict = strict
        self._headers_due = expect is not None and tape.expect(expect) == "fingerprint"
        self._assembler = Assembler(
            tape, self.source, self.at_home, strict=strict, keep_open=True, allow_additions=allow_additions
        )
        self.inspector = self._assembler.inspector
        self._strategy = ReadStrategy(self._assembler)
        self.drift: TapeIntegrityError | None = None
        self.drifted = threading.Event()
        self.scrubbed = Scrubbed(0, 0)
        self._end = tape.total_size - FOOTER
        self._footer_reached = -math.inf  # when a read last reached the footer (monotonic, seconds)
        self._audited = -math.inf  # when the last complete audit began
        self._audit_lock = threading.Lock()
        self._drift_lock = threading.Lock()

    def fork_helper(self, memory: mmap.mmap) -> None:
        """Forks a helper process, which shares requests for many small members whose buffer lies in `memory`.

        It ends with this process at the latest. Call this while the process has a single thread.
        """
        self._strategy.fork_helper(memory)

    def end_helper(self) -> None:
        """Ends the helper process, if there is one."""
        self._strategy.close()

    @property
    def is_bound_by_python(self) -> bool:
        return self._strategy.is_bound_by_python

    def rest(self) -> None:
        """Closes the cached descriptors of files that were read in part; call it when the reader pauses."""
        self._assembler.rest()

    def close(self) -> None:
        """Closes the source. The tape stays open: it is the caller's."""
        self.end_helper()
        self.rest()
        self.source.close()

    def read(self, offset: int, size: int) -> bytes:
        """The bytes `[offset, offset + size)` of the archive; fewer only at its end, none beyond it.

        Raises OffsetError for a negative offset or size, TapeIntegrityError once the source is not as recorded,
        TapeFormatError for a damaged index, and OSError if the source cannot be read.
        """
        if size < 0:
            raise OffsetError(size, self.tape.total_size)
        buffer = aligned(max(0, min(size, self.tape.total_size - offset)))
        self.readinto(buffer, offset)
        return bytes(buffer)

    def readinto(self, buffer: "WriteableBuffer", offset: int) -> int:
        """Fills `buffer` from `offset` of the archive on; returns the number of bytes, fewer only at its end.

        Raises as `read` does; the contents of the buffer are then undefined.
        """
        if self.drift is not None:
            raise self.drift.again()
        if offset < 0:
            raise OffsetError(offset, self.tape.total_size)
        view = memoryview(buffer)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        stop = offset + len(view)
        if stop > self.tape.total_size:
            stop = self.tape.total_size
            view = view[: max(0, stop - offset)]
        if offset >= stop:
            return 0
        try:
            self._strategy.fill(view, offset, stop)
            if stop >= self._end:
                self._audit_before_footer(offset, stop)
        except TapeIntegrityError as error:
            raise self._invalidated(error) from None
        return stop - offset

    def audit(self, share: float = 1.0, pause: Callable[[float], object] = time.sleep) -> None:
        """Checks every directory of the source, with at most `share` (above 0, at most 1) of one core.

        It pauses by `pause(seconds)`. Raises TapeIntegrityError, which makes the tape invalid, TapeFormatError for a
        damaged index, and OSError if the source cannot be read.
        """
        begun, throttle = time.monotonic(), Throttle(share, pause)
        try:
            if self._headers_due:
                check_headers(self.tape, throttle)
                self._headers_due = False
            audit(self.inspector, throttle)
        except TapeIntegrityError as error:
            raise self._invalidated(error) from None
        self._audited = max(self._audited, begun)

    def scrub(self, share: float, pause: Callable[[float], bool]) -> None:
        """Reads and checks the whole archive, with at most `share` (above 0, at most 1) of one core.

        It pauses by `pause(seconds)`, and ends if that returns true. `scrubbed` is its progress. Raises as `read` does.
        """
        buffer, throttle = aligned(_SCRUB_SIZE), Throttle(share, pause)
        position = 0
        while position < self._end and self.drift is None and not pause(0):
            stop = min(position + len(buffer), self._end)
            try:
                self._assembler.fill(buffer[: stop - position], position, stop)
            except TapeIntegrityError as error:
                raise self._invalidated(error) from None
            position = stop
            self.scrubbed = Scrubbed(position, self.scrubbed.passes + (position == self._end))
            throttle()

    def _invalidated(self, error: TapeIntegrityError) -> TapeIntegrityError:
        """Makes the tape invalid; returns the error to raise: the first drift, whichever thread found it."""
        with self._drift_lock:
            if self.drift is None:
                self.drift = error.again()  # without the traceback, whose frames would keep this player alive
                self.drifted.set()
                return error
        return self.drift.again()

    def _audit_before_footer(self, offset: int, stop: int) -> None:
        """Audits, if the request `[offset, stop)`, which reaches the footer or goes into it, needs it.

        For a reader that starts in the footer an audit of the last second will do, so that a program that reads the
        end again and again does not start one each time.
        """
        now = time.monotonic()
        if offset < self._end:
            self._footer_reached = now
        if stop > self._end:
            with self._audit_lock:
                if self._audited < max(self._footer_reached, now - FOOTER_AUDIT_AGE):
                    self.audit()

    def get_offset_of(self, arc_path: str) -> int:
        """The offset in the archive, in bytes, of the member of this name. Raises KeyError."""
        return self.tape.find(arc_path).start

    def play(self, start_offset: int = 0, chunk_size: int = CHUNK, *, processes: int = 1) -> Iterator[events.Event]:
        """Yields the archive from `start_offset` (0 to its size) on, as events; `data` of at most `chunk_size` bytes.

        `processes`: 1, or 2 to allow a helper process, which reads ahead until the iterator ends or is closed. It is
        forked from this process if that has a single thread and a second core, and there are 2,048 members or more.

        Raises OffsetError and ValueError at once, and what `read` raises while iterating.
        """
        if not 0 <= start_offset <= self.tape.total_size:
            raise OffsetError(start_offset, self.tape.total_size)
        if chunk_size < 1:
            raise ValueError(f"a chunk has at least 1 byte, not {chunk_size}")
        forked_work.check_processes(processes)
        return playback.play(self.tape, self._strategy, self.readinto, start_offset, chunk_size, processes)
