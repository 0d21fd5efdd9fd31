"""Assembles the archive out of members: the one loop that fills buffers with its bytes.

Rule: every requested byte is the recorded one, or an exception is raised. The loop checks a member after it has read
its bytes, through the descriptor that it read them from, which it opened by name for this read: so it sees a change
before or during the read before the bytes leave, and the name cannot lead elsewhere unnoticed. The descriptor of a
large file may stay open from one of its parts to the next; then each read checks all names on its path
(`descriptor_cache`).
"""

# ruff: noqa: FURB136 -- min and max are calls, see Assembler.fill

import errno
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tartapefs.archive.layout import BLOCK, FOOTER
from tartapefs.archive.member import Headed, Member
from tartapefs.base.buffers import read_all
from tartapefs.base.errors import Difference, Fact, TapeIntegrityError
from tartapefs.index.recording import Recording
from tartapefs.play.descriptor_cache import LARGE, DescriptorCache
from tartapefs.play.inspection import Inspector
from tartapefs.play.verified_blocks import VerifiedBlocks, with_differences
from tartapefs.source.drift import agrees, check_root, differences, drift, only_stamps
from tartapefs.source.folder import Source

_ZEROS = [bytes(size) for size in range(BLOCK)]  # paddings
_NOT_BELOW = (
    errno.ELOOP,
    errno.EXDEV,
    errno.ENOTDIR,
    errno.ENOENT,
)  # from `Source.open`: path strays


class Blocks(NamedTuple):
    """The blocks of a member of a sealed tape that overlap the bytes `[start, stop)` of the archive.

    `all`: the numbers of these blocks in the member's body; `whole`: of those that lie within the range.
    """

    member: Member
    start: int
    stop: int
    all: range
    whole: range

    @property
    def ends(self) -> list[int]:
        """The numbers of the blocks that lie within the range only in part, two at most."""
        return [number for number in self.all if number not in self.whole]


class Assembler:
    """Fills buffers with bytes of `tape`'s archive, from `source`. Usable from many threads.

    On a sealed tape a file or link of which only timestamps or inode differ is as recorded if its contents are;
    `strict`: it is drift. `contents`: whether to check bodies against their digests here; else the caller does.
    `keep_open`: large files that are read in parts stay open for the next part, until `rest` is called.
    `allow_additions`: names that were not recorded are no drift.
    """

    def __init__(
        self,
        tape: Recording,
        source: Source,
        at_home: bool,
        contents: bool = True,
        strict: bool = False,
        keep_open: bool = False,
        allow_additions: bool = False,
    ) -> None:
        self.tape = tape
        self.source = source
        self.at_home = at_home
        self.strict = strict
        self.allow_additions = allow_additions
        self.inspector = Inspector(tape, source, at_home, allow_additions)
        self._verified_blocks = VerifiedBlocks(tape) if contents and tape.seal else None
        self._stamps_count = strict or not tape.seal
        self._descriptors = DescriptorCache(source) if keep_open and self._verified_blocks is None else None
        self._end = tape.total_size - FOOTER

    def fill(
        self,
        view: memoryview,
        start: int,
        stop: int,
        members: Iterable[Headed] | None = None,
        blocks: Iterable[int] | None = None,
    ) -> int:
        """Fills `view` with the bytes `[start, stop)` of the archive; returns the number of members they come from.

        `members`: fill in the bytes of these only, in any order, each with its header; by default of all that overlap
        the range. `blocks`: fill in these blocks only, by number, of a range in one member of a sealed tape.

        Raises TapeIntegrityError if the source is not as recorded, TapeFormatError for a damaged index, and OSError if
        the source cannot be read; the contents of the buffer are then undefined.

        One long function of plain numbers, without `min` and `max`, since it runs once for every member that is read:
        in smaller functions it took 15 instead of 13 microseconds a member, most of which are system calls.
        """
        source, at_home, verified = self.source, self.at_home, self._verified_blocks
        open_in, preadv, fstat, close, plain_device = source.open_in, os.preadv, os.fstat, os.close, source.plain_device
        count, is_root_checked = 0, False
        # Of the last file: its folder, and that folder's descriptor, opened for its second file, closed at the end.
        last_folder, folder_fd = None, -1
        try:
            for member, header in self.tape.headed(start, stop) if members is None else members:
                count += 1
                first, name, size = member.start, member.name, member.size
                body = first + len(header)
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
                descriptors = self._descriptors if size >= LARGE else None
                if (
                    descriptors is not None
                    and body < low < high  # a first part is never in the cache
                    and descriptors.read(member, view[low - start : high - start], low - body, at_home)
                ):
                    continue
                if not is_root_checked:
                    check_root(source, self.tape.root_name)
                    is_root_checked = True
                if low < high:
                    part, position = view[low - start : high - start], low - body
                    folder, _, last = name.rpartition(b"/")
                    try:
                        if folder != last_folder:
                            last_folder = folder
                            if folder_fd >= 0:
                                close(folder_fd)
                                folder_fd = -1
                            fd = source.open(name.partition(b"/")[2])
                        else:
                            if folder_fd < 0:
                                folder_fd = source.folder_descriptor(folder.partition(b"/")[2])
                            fd = open_in(folder_fd, last)
                    except OSError as error:
                        error.filename = member.arc_path
                        self._check(member, error)
                        raise
                    failure: Exception | None = None
                    try:
                        try:
                            if verified is not None:
                                verified.read(fd, member, part, position, blocks)
                            elif preadv(fd, (part,), position) < high - low:
                                read_all(fd, part, position)  # one call read only a part
                        except OSError as error:
                            error.filename = member.arc_path
                            failure = error
                        except TapeIntegrityError as error:
                            failure = error
                        found = fstat(fd)
                        if found.st_dev != plain_device:
                            found = source.fstat(fd)
                        seen = found.st_mode, found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns
                        if seen != member[2:7] and not agrees(member, found, at_home):
                            self._raise(member, differences(member, found, b"", at_home), failure)
                        if failure is not None:
                            raise failure
                        if descriptors is not None and high < padding:  # more of it will be read
                            member_fd, fd = fd, -1
                            descriptors.keep(member, member_fd, found)
                    finally:
                        if fd >= 0:
                            close(fd)
                else:
                    self._check(member)
        finally:
            if folder_fd >= 0:
                close(folder_fd)
        low = max(start, self._end)
        if low < stop:
            if not is_root_checked:
                check_root(source, self.tape.root_name)
            view[low - start : stop - start] = bytes(stop - low)
        return count

    def rest(self) -> None:
        """Closes the cached descriptors; reads open the files again."""
        if self._descriptors is not None:
            self._descriptors.close()

    def blocks(self, start: int, stop: int) -> Blocks | None:
        """The blocks of the member at `start` in `[start, stop)`; None if there are none, or no seal."""
        member = next(self.tape.members(start, start + 1), None) if self._verified_blocks is not None else None
        if member is None:
            return None
        body, size = member.body, self.tape.block_size
        low, high = max(start - body, 0), min(stop - body, member.size)
        if low >= high:
            return None
        every, whole = range(low // size, -(-high // size)), range(-(-low // size), high // size)
        return Blocks(member, body + low, body + high, every, whole)

    def fill_blocks(self, view: memoryview, blocks: Blocks, numbers: Iterable[int]) -> None:
        """Fills the blocks `numbers` into `view`, which has room for all of `blocks`; raises as `fill` does."""
        self.fill(view, blocks.start, blocks.stop, ((blocks.member, blocks.member.header()),), numbers)

    def hash_ahead(self, start: int, stop: int, is_stopped: Callable[[], bool]) -> None:
        """Reads and hashes the blocks of this range into the cache, the last one first, until `is_stopped()`.

        Raises as `fill` does.
        """
        blocks = self.blocks(start, stop)
        if self._verified_blocks is not None and blocks is not None and blocks.member.size > self.tape.block_size:
            fd = self.source.open(blocks.member.path)
            try:
                self._verified_blocks.prefetch(fd, blocks.member, blocks.all, is_stopped)
            finally:
                os.close(fd)

    def _check(self, member: Member, failure: OSError | None = None) -> None:
        """Raises drift if the member's path does not lead to what was recorded; `failure`: why opening it failed."""
        result = self.inspector.inspect(member)
        if failure is not None and failure.errno in _NOT_BELOW and only_stamps(result):
            result = (Difference(Fact.PATH, "folders all the way", failure.strerror or ""),)
        if result:
            self._raise(member, result)

    def _raise(self, member: Member, found: tuple[Difference, ...], failure: Exception | None = None) -> None:
        """Raises drift if `found` has a difference that counts, or if `failure` is damaged contents."""
        if isinstance(failure, TapeIntegrityError):
            raise with_differences(failure, found)
        if found and (self._stamps_count or member.is_directory or not only_stamps(found)):
            raise drift(member, found)
