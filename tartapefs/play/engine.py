"""The player: turns (offset, size) into bytes, or into an exception. `play` is the same engine, in order.

Rule: every byte asked for below the archive's end is the recorded one, or an exception is raised; never a short read,
never a byte of a source that is not as recorded. Bytes come from `Filler.fill`, by way of `Crew`, and from
nowhere else.

The footer says that the archive is complete, so it is served only after an audit of every directory that began once
everything before it had been read: a reader that gets the footer has the whole tape, as recorded.

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
from tartapefs.base.buffers import aligned
from tartapefs.base.errors import OffsetError, TapeError, TapeIntegrityError
from tartapefs.index.recording import Recording
from tartapefs.play import events, playback
from tartapefs.play.assemble import Filler
from tartapefs.play.audit import Rest, audit, check_headers
from tartapefs.play.playback import CHUNK
from tartapefs.play.read_strategy import Crew
from tartapefs.source.folder import Source

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Check = Literal["full", "mtime"]
_SCRUBBED_AT_ONCE = 1 << 18  # bytes: what one thread hashes alone
_FOOTER_AUDIT_AGE = 1.0  # seconds


class Scrubbed(NamedTuple):
    """How far the reading of all contents is: at `position` of the archive, after `passes` through all of it."""

    position: int
    passes: int


class TapePlayer:
    """Plays `tape` from the folder at `source_root`, by default the one that the tape was discovered in.

    `check`: "full" compares inode and change time too where the tape is at home; "mtime" never does, for a source whose
    inodes or change times are not stable (hard-linked snapshots, network file systems). On a sealed tape a file of
    which only timestamps or inode are not as recorded is judged by its contents; `strict`: it is drift.

    `expect`: the fingerprint or the seal that the tape must have; raises UnexpectedTapeError. Held to its seal, every
    byte that is read belongs to it. Held to its fingerprint, all headers are compared by the first audit, so before the
    footer.

    Usable from many threads. `drift` is None, or the TapeIntegrityError that made the tape invalid; `drifted` is an
    event that is set from then on. Raises TapeError where no source is known, and OSError where it cannot be opened.
    """

    def __init__(
        self,
        tape: Recording,
        source_root: str | os.PathLike[str] | None = None,
        check: Check = "full",
        *,
        strict: bool = False,
        expect: str | None = None,
    ) -> None:
        if check not in ("full", "mtime"):
            raise ValueError(f"{check!r} is no kind of check; there are 'full' and 'mtime'")
        root = source_root if source_root is not None else tape.directory
        if root is None:
            raise TapeError(f"{tape.index_path}: the source folder of this index is not known; name it")
        self.tape = tape
        self.source = Source(os.fspath(root))
        self.at_home = check == "full" and tape.is_at_home(self.source.ino)
        self.strict = strict
        self._headers_due = expect is not None and tape.expect(expect) == "fingerprint"
        self._filler = Filler(tape, self.source, self.at_home, strict=strict, keeps=True)
        self.inspector = self._filler.inspector
        self._crew = Crew(self._filler)
        self.drift: TapeIntegrityError | None = None
        self.drifted = threading.Event()  # set once `drift` is
        self.scrubbed = Scrubbed(0, 0)
        self._end = tape.total_size - FOOTER
        self._end_reached = -math.inf  # when a read last came to the footer (monotonic, seconds)
        self._audited = -math.inf  # when the last complete audit began
        self._auditing = threading.Lock()
        self._first = threading.Lock()

    def fork_helper(self, memory: mmap.mmap) -> None:
        """Lets a second process take a share of requests for many small members, where the buffer lies in `memory`.

        It ends with this process at the latest. To be called while this one has one thread alone.
        """
        self._crew.fork_helper(memory)

    def end_helper(self) -> None:
        """Ends that process, if there is one."""
        self._crew.close()

    @property
    def is_bound_by_python(self) -> bool:
        """Whether the last read took Python's own work for the most part, which threads do one at a time."""
        return self._crew.is_bound_by_python

    def rest(self) -> None:
        """Closes the files of the source that were read in part; to be called when no more reads are near."""
        self._filler.rest()

    def close(self) -> None:
        """Closes the source. The tape stays open: it is the caller's."""
        self.end_helper()
        self.rest()
        self.source.close()

    def read(self, offset: int, size: int) -> bytes:
        """The bytes `[offset, offset + size)` of the archive; fewer only where it ends, none at or beyond its end.

        Raises OffsetError for a negative offset or size, TapeIntegrityError once the source is not as recorded,
        TapeFormatError for a damaged index, and OSError where the source cannot be read.
        """
        if size < 0:
            raise OffsetError(size, self.tape.total_size)
        buffer = aligned(max(0, min(size, self.tape.total_size - offset)))
        self.readinto(buffer, offset)
        return bytes(buffer)

    def readinto(self, buffer: "WriteableBuffer", offset: int) -> int:
        """Fills `buffer` from `offset` of the archive on; returns the number of bytes, fewer only where it ends.

        Raises as `read` does; what the buffer then holds is undefined.
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
            self._crew.fill(view, offset, stop)
            if stop >= self._end:
                self._guard_footer(offset, stop)
        except TapeIntegrityError as error:
            raise self._invalidated(error) from None
        return stop - offset

    def audit(self, share: float = 1.0, pause: Callable[[float], object] = time.sleep) -> None:
        """Looks at every directory of the source, with at most `share` (above 0, at most 1) of one core.

        It rests with `pause(seconds)`.
        Raises TapeIntegrityError, which makes the tape invalid, TapeFormatError for a damaged index, and OSError where
        the source cannot be read.
        """
        begun, rest = time.monotonic(), Rest(share, pause)
        try:
            if self._headers_due:
                check_headers(self.tape, rest)
                self._headers_due = False
            audit(self.inspector, rest)
        except TapeIntegrityError as error:
            raise self._invalidated(error) from None
        self._audited = max(self._audited, begun)

    def scrub(self, share: float, pause: Callable[[float], bool]) -> None:
        """Reads the whole archive for its own sake, with at most `share` (above 0, at most 1) of one core.

        It rests with `pause(seconds)`, and ends if that is true. `scrubbed` tells how far it is. Raises as `read` does.
        """
        buffer, rest = aligned(_SCRUBBED_AT_ONCE), Rest(share, pause)
        position = 0
        while position < self._end and self.drift is None and not pause(0):
            stop = min(position + len(buffer), self._end)
            try:
                self._filler.fill(buffer[: stop - position], position, stop)
            except TapeIntegrityError as error:
                raise self._invalidated(error) from None
            position = stop
            self.scrubbed = Scrubbed(position, self.scrubbed.passes + (position == self._end))
            rest()

    def _invalidated(self, error: TapeIntegrityError) -> TapeIntegrityError:
        """Makes the tape invalid; what to raise is the first drift, whichever thread found it."""
        with self._first:
            if self.drift is None:
                self.drift = error.again()  # without the traceback, whose frames would keep this player alive
                self.drifted.set()
                return error
        return self.drift.again()

    def _guard_footer(self, offset: int, stop: int) -> None:
        """For the request `[offset, stop)`, which comes to the footer or into it: no footer without an audit.

        Who reads the footer alone starts at the end; for them an audit of the last second will do, so that a program
        that looks at the end again and again does not start one each time.
        """
        now = time.monotonic()
        if offset < self._end:
            self._end_reached = now
        if stop > self._end:
            with self._auditing:
                if self._audited < max(self._end_reached, now - _FOOTER_AUDIT_AGE):
                    self.audit()

    def get_offset_of(self, arc_path: str) -> int:
        """Where in the archive the member of this name starts, in bytes. Raises KeyError."""
        return self.tape.find(arc_path).start

    def play(self, start_offset: int = 0, chunk_size: int = CHUNK) -> Iterator[events.Event]:
        """The archive from `start_offset` (0 to its size) to its end, as events; `data` of at most `chunk_size` bytes.

        Raises OffsetError and ValueError at once, and while iterating what `read` raises. If this process has one
        thread, and there are many members, a second process reads ahead until the iterator ends or is closed.
        """
        if not 0 <= start_offset <= self.tape.total_size:
            raise OffsetError(start_offset, self.tape.total_size)
        if chunk_size < 1:
            raise ValueError(f"a chunk size of {chunk_size} bytes leads nowhere; it is at least 1")
        return playback.play(self.tape, self._crew, self.readinto, start_offset, chunk_size)
