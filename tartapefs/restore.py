"""Single members out of a copy of the archive, each read by its range alone and checked against the tape's digests.

Rule: nothing stands under a member's name that does not have its digests. A file is written beside its place, and
renamed once its last block was found right. Paths are made below the destination without following any link.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress

from tartapefs import merkle
from tartapefs.buffers import aligned
from tartapefs.contents import EndedEarlyError, damage, read_all
from tartapefs.errors import Difference, TapeError, TapeIntegrityError
from tartapefs.layout import BLOCK
from tartapefs.member import Member
from tartapefs.tape import Tape

_REMEDY = "the copy is damaged here, or of another archive; take another one"
_PLACE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def below(tape: Tape, member: Member) -> Iterator[Member]:
    """The member and, of a directory, all that lies in it."""
    yield member
    if member.is_directory:
        for inner in tape.members(member.stop):
            if not inner.name.startswith(member.name):
                return
            yield inner


class Restorer:
    """Writes members of `tape` below the folder `destination`, from the file `copy`, which begins at `offset` of the
    archive. `overwrite`: files that are there are replaced. Raises TapeError for a tape without digests.
    """

    def __init__(self, tape: Tape, copy: str, destination: str, offset: int = 0, overwrite: bool = False) -> None:
        if not tape.seal:
            raise TapeError(f'{tape.index_path}: has no digests to check a copy with; run "tartapefs seal" first')
        self._tape, self._offset, self._overwrite = tape, offset, overwrite
        self._hash = merkle.hasher(tape.algorithm)
        self._copy = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._root = os.open(destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._copy)
            raise
        self._folders: list[Member] = []

    def __enter__(self) -> "Restorer":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._copy)
        os.close(self._root)

    def restore(self, member: Member) -> None:
        """Raises TapeIntegrityError where the copy is not the archive, FileExistsError, and OSError."""
        self._check_header(member)
        *folders, name = member.name.rstrip(b"/").split(b"/")
        if member.is_directory:
            os.close(self._folder([*folders, name]))
            self._folders.append(member)
            return
        place = self._folder(folders)
        try:
            if member.is_link:
                self._put(place, name, lambda unfinished: os.symlink(member.target, unfinished, dir_fd=place), member)
            else:
                self._put(place, name, lambda unfinished: self._write(place, unfinished, member), member)
        finally:
            os.close(place)

    def finish(self) -> None:
        """Gives folders their modes and times, which what was written into them has changed."""
        for member in reversed(self._folders):
            *folders, name = member.name.rstrip(b"/").split(b"/")
            place = self._folder([*folders, name])
            try:
                os.fchmod(place, stat.S_IMODE(member.mode))
                os.utime(place, ns=(member.mtime_ns, member.mtime_ns))
            finally:
                os.close(place)

    def _check_header(self, member: Member) -> None:
        header = bytearray(BLOCK)
        self._read(memoryview(header), member.start, member)
        if header != member.header():
            raise TapeIntegrityError(member.arc_path, [Difference("the copy", "its header", "another")], _REMEDY)

    def _read(self, view: memoryview, position: int, member: Member) -> None:
        if position < self._offset:
            raise TapeIntegrityError(member.arc_path, [Difference("the copy", "this member", "nothing")], _REMEDY)
        try:
            read_all(self._copy, view, position - self._offset)
        except EndedEarlyError:
            raise TapeIntegrityError(
                member.arc_path, [Difference("the copy", "all of this member", "an end")], _REMEDY
            ) from None

    def _folder(self, parts: list[bytes]) -> int:
        """A descriptor of the folder below the destination, made if it is not there."""
        place = os.dup(self._root)
        try:
            for part in parts:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=place)
                above, place = place, os.open(part, _PLACE, dir_fd=place)
                os.close(above)
        except BaseException:
            os.close(place)
            raise
        return place

    def _put(self, place: int, name: bytes, make: Callable[[bytes], None], member: Member) -> None:
        unfinished = b".tartapefs-%d" % os.getpid()
        try:
            make(unfinished)
            if self._overwrite:
                os.rename(unfinished, name, src_dir_fd=place, dst_dir_fd=place)
            else:
                os.link(unfinished, name, src_dir_fd=place, dst_dir_fd=place, follow_symlinks=False)
            times = (member.mtime_ns, member.mtime_ns)
            os.utime(name, ns=times, dir_fd=place, follow_symlinks=False)
        except FileExistsError as error:
            error.filename = member.arc_path
            raise
        finally:
            with suppress(FileNotFoundError):
                os.unlink(unfinished, dir_fd=place)

    def _write(self, place: int, unfinished: bytes, member: Member) -> None:
        block_size = self._tape.block_size
        fd = os.open(unfinished, _NEW, 0o600, dir_fd=place)
        with os.fdopen(fd, "wb", buffering=0) as file:
            for number in range(merkle.blocks(member.size, block_size)):
                low = number * block_size
                block = aligned(min(block_size, member.size - low))
                self._read(block, member.start + BLOCK + low, member)
                if self._hash(block) != self._tape.block_digests(member, number, number + 1):
                    found = damage(member, number, block_size, "another in the copy")
                    raise TapeIntegrityError(member.arc_path, found.differences, _REMEDY)
                left = memoryview(block)
                while left:
                    left = left[file.write(left) :]
            os.fchmod(fd, stat.S_IMODE(member.mode))
