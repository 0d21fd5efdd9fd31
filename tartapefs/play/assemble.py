"""The loop that makes an archive out of members: it fills buffers, and nothing else does.

Rule: every byte asked for is the recorded one, or an exception is raised. A member is checked after its bytes are in
the buffer, by the descriptor they came from, which was opened by name for this one read: so a change before or during
the read is seen before the bytes leave, and nothing can hide that the name leads elsewhere by now. The descriptor of a
large file may be kept from one of its parts to the next; then all names on its way are looked at each time (`kept`).
"""

# ruff: noqa: FURB136 -- min and max are calls, see Filler.fill

import errno
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tartapefs.archive.layout import BLOCK, FOOTER
from tartapefs.archive.member import Headed, Member
from tartapefs.base.errors import Difference, TapeIntegrityError
from tartapefs.index.recording import Recording
from tartapefs.play.descriptor_cache import LARGE, Kept
from tartapefs.play.inspection import Inspector
from tartapefs.play.verified_blocks import Contents, as_shown, read_all
from tartapefs.source.drift import agrees, check_place, differences, drift, only_stamps
from tartapefs.source.folder import Source

_ZEROS = [bytes(size) for size in range(BLOCK)]  # paddings
_NOT_BELOW = (errno.ELOOP, errno.EXDEV, errno.ENOTDIR, errno.ENOENT)  # what `Source.open` says of a path that strays


class Blocks(NamedTuple):
    """The bytes `[start, stop)` of the archive, in the body of a member of a sealed tape: the numbers of its blocks."""

    member: Member
    start: int
    stop: int
    all: range
    whole: range

    @property
    def ends(self) -> list[int]:
        """Of those that are not in there as a whole, of which there are two at most."""
        return [number for number in self.all if number not in self.whole]


class Filler:
    """Fills buffers with bytes of `tape`'s archive, from `source`. Usable from many threads.

    Of a sealed tape, files and links are as recorded if contents and all other facts are, though timestamps or inode
    are not; `strict`: not then either. `contents`: whether bodies are held to their digests here. Else it is for the
    caller to do. `keeps`: large files that are read in parts stay open for the next part, until `rest` is called.
    """

    def __init__(
        self,
        tape: Recording,
        source: Source,
        at_home: bool,
        contents: bool = True,
        strict: bool = False,
        keeps: bool = False,
    ) -> None:
        self.tape = tape
        self.source = source
        self.at_home = at_home
        self.strict = strict
        self.inspector = Inspector(tape, source, at_home)
        self._contents = Contents(tape) if contents and tape.seal else None
        self._stamps_count = strict or not tape.seal
        self._kept = Kept(source) if keeps and self._contents is None else None
        self._end = tape.total_size - FOOTER

    def fill(
        self,
        view: memoryview,
        start: int,
        stop: int,
        members: Iterable[Headed] | None = None,
        blocks: Iterable[int] | None = None,
    ) -> int:
        """Fills `view` with the bytes `[start, stop)` of the archive; returns from how many members.

        `members`: those, in any order and each with its header, whose bytes are to be filled in; all that overlap the
        range by default. `blocks`: of a range in one member of a sealed tape, the numbers of those that are.

        Raises TapeIntegrityError where the source is not as recorded, TapeFormatError for a damaged index, and OSError
        where the source cannot be read; what the buffer then holds is undefined.

        One long function of plain numbers, without `min` and `max`, since it runs once for every member that anybody
        reads: in smaller pieces it took 15 instead of 13 microseconds a member, most of which are system calls.
        """
        source, at_home, contents = self.source, self.at_home, self._contents
        open_in, preadv, fstat, close, plain = source.open_in, os.preadv, os.fstat, os.close, source.plain
        count, is_in_place = 0, False
        # Of the last file: its folder, and that folder as a place, opened for its second file, closed at the end.
        last_folder, place = None, -1
        try:
            for member, header in self.tape.headed(start, stop) if members is None else members:
                count += 1
                first, name, size = member.start, member.name, member.size
                body = first + BLOCK
                padding = body + size
                if start < body:
                    low, high = start if start > first else first, stop if stop < body else body
                    view[low - start : high - start] = header[low - first : high - first]
                unpadded = size % BLOCK
                if unpadded and padding < stop:
                    end = padding + BLOCK - unpadded
                    low, high = start if start > padding else padding, stop if stop < end else end
                    view[low - start : high - start] = _ZEROS[high - low]
                low, high = start if start > body else body, stop if stop < padding else padding
                kept = self._kept if size >= LARGE else None
                if (
                    kept is not None
                    and body < low < high  # or nobody can have read what comes before
                    and kept.read(member, view[low - start : high - start], low - body, at_home)
                ):
                    continue
                if not is_in_place:
                    check_place(source, self.tape.root_name)
                    is_in_place = True
                if low < high:
                    part, position = view[low - start : high - start], low - body
                    folder, _, last = name.rpartition(b"/")
                    try:
                        if folder != last_folder:
                            last_folder = folder
                            if place >= 0:
                                close(place)
                                place = -1
                            fd = source.open(name.partition(b"/")[2])
                        else:
                            if place < 0:
                                place = source.place(folder.partition(b"/")[2])
                            fd = open_in(place, last)
                    except OSError as error:
                        error.filename = member.arc_path
                        self._check(member, error)
                        raise
                    failure: Exception | None = None
                    try:
                        try:
                            if contents is not None:
                                contents.read(fd, member, part, position, blocks)
                            elif preadv(fd, (part,), position) < high - low:
                                read_all(fd, part, position)  # what one call read only in part
                        except OSError as error:
                            error.filename = member.arc_path
                            failure = error
                        except TapeIntegrityError as error:
                            failure = error
                        found = fstat(fd)
                        if found.st_dev != plain:
                            found = source.fstat(fd)
                        seen = found.st_mode, found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns
                        if seen != member[2:7] and not agrees(member, found, at_home):
                            self._raise(member, differences(member, found, b"", at_home), failure)
                        if failure is not None:
                            raise failure
                        if kept is not None and high < padding:  # more of it will be read
                            its_fd, fd = fd, -1
                            kept.keep(member, its_fd, found)
                    finally:
                        if fd >= 0:
                            close(fd)
                else:
                    self._check(member)
        finally:
            if place >= 0:
                close(place)
        low = max(start, self._end)
        if low < stop:
            if not is_in_place:
                check_place(source, self.tape.root_name)
            view[low - start : stop - start] = bytes(stop - low)
        return count

    def rest(self) -> None:
        """Closes what is open of the source; reads open it again."""
        if self._kept is not None:
            self._kept.close()

    def blocks(self, start: int, stop: int) -> Blocks | None:
        """What `[start, stop)` has of the body of the member at `start`, if the tape is sealed and it has anything."""
        member = next(self.tape.members(start, start + 1), None) if self._contents is not None else None
        if member is None:
            return None
        body, size = member.start + BLOCK, self.tape.block_size
        low, high = max(start - body, 0), min(stop - body, member.size)
        if low >= high:
            return None
        every, whole = range(low // size, -(-high // size)), range(-(-low // size), high // size)
        return Blocks(member, body + low, body + high, every, whole)

    def fill_blocks(self, view: memoryview, blocks: Blocks, numbers: Iterable[int]) -> None:
        """Fills into `view`, which is for all of `blocks`, those of these numbers; raises as `fill` does."""
        self.fill(view, blocks.start, blocks.stop, ((blocks.member, b""),), numbers)

    def hash_ahead(self, start: int, stop: int, ends: Callable[[], bool]) -> None:
        """Has the `blocks` of this range at hand when they are asked for, the last ones first, until `ends()`.

        Raises as `fill` does.
        """
        blocks = self.blocks(start, stop)
        if self._contents is not None and blocks is not None and blocks.member.size > self.tape.block_size:
            fd = self.source.open(blocks.member.path)
            try:
                self._contents.keep(fd, blocks.member, blocks.all, ends)
            finally:
                os.close(fd)

    def _check(self, member: Member, failure: OSError | None = None) -> None:
        """Raises drift if what is at the member's place is not as recorded; `failure` is why it was not opened."""
        result = self.inspector.inspect(member)
        if failure is not None and failure.errno in _NOT_BELOW and only_stamps(result):
            result = (Difference("the path", "folders all the way", failure.strerror or ""),)
        if result:
            self._raise(member, result)

    def _raise(self, member: Member, found: tuple[Difference, ...], failure: Exception | None = None) -> None:
        """Raises drift if anything was found that counts, or contents are the `failure`."""
        if isinstance(failure, TapeIntegrityError):
            raise as_shown(failure, found)
        if found and (self._stamps_count or member.is_directory or not only_stamps(found)):
            raise drift(member, found)
