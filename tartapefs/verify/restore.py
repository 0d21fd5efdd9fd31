"""Single members out of a copy of the archive, each read by its range alone and checked against the tape's digests.

Rule: nothing stands under a member's name that does not have its digests, and nobody reads a file here who could not
read it where it was recorded. A file is written beside its place, and renamed once its last block was found right. A
folder that is made is its owner's alone until all is in it, or has failed; then it gets its mode and times. Paths are
made below the destination without following any link.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.archive.layout import BLOCK
from tartapefs.archive.member import Member
from tartapefs.base.buffers import aligned
from tartapefs.base.errors import Difference, Fact, TapeError, TapeIntegrityError
from tartapefs.base.outputs import Unfinished
from tartapefs.play.verified_blocks import EndedEarlyError, damage, read_all

_REMEDY = "the copy is damaged here, or of another archive; take another one"
_PLACE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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

    A context manager: at its end, and not before, folders have their modes and times.
    """

    def __init__(self, tape: Tape, copy: str, destination: str, offset: int = 0, overwrite: bool = False) -> None:
        if not tape.seal:
            raise TapeError(f'{tape.index_path}: has no digests to check a copy with; run "tartapefs seal" first')
        self._tape, self._offset, self._overwrite = tape, offset, overwrite
        self._hash = hash_tree.hasher(tape.algorithm)
        self._copy = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._root = os.open(destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._copy)
            raise
        self._folders: set[bytes] = set()  # that are made, or asked for

    def __enter__(self) -> "Restorer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with suppress(*([OSError] if kind else [])):
                self._finish()
        finally:
            os.close(self._copy)
            os.close(self._root)

    def restore(self, member: Member) -> None:
        """Raises TapeIntegrityError where the copy is not the archive, FileExistsError, and OSError."""
        self._check_header(member)
        try:
            if member.is_directory:
                self._restore_folder(member)
            else:
                self._restore_file(member)
        except OSError as error:
            error.filename, error.filename2 = member.arc_path, None
            raise

    def _restore_folder(self, member: Member) -> None:
        place = self._folder(member.name.rstrip(b"/").split(b"/"))
        try:  # one that was there opens to nobody before it is complete
            os.fchmod(place, stat.S_IMODE(os.fstat(place).st_mode) & member.mode | stat.S_IRWXU)
        finally:
            os.close(place)
        self._folders.add(member.name.rstrip(b"/"))

    def _restore_file(self, member: Member) -> None:
        *folders, name = member.name.split(b"/")
        folder = self._folder(folders)
        place = f"/proc/self/fd/{folder}/{os.fsdecode(name)}"
        try:
            if member.is_link and not self._overwrite:
                os.symlink(member.target, place)
            else:
                with Unfinished(place, mode=stat.S_IRUSR | stat.S_IWUSR) as file:
                    if member.is_link:
                        os.unlink(file.temporary)
                        os.symlink(member.target, file.temporary)
                    else:
                        self._write(file.fd, member)
                    file.commit(self._overwrite, sync=False)
            os.utime(name, ns=(member.mtime_ns, member.mtime_ns), dir_fd=folder, follow_symlinks=False)
        finally:
            os.close(folder)

    def _finish(self) -> None:
        """Gives folders their modes and times, those in others first; raises the first error after it did all."""
        errors = []
        for name in sorted(self._folders, reverse=True):
            member = self._tape.find(name)
            try:
                place = self._folder(name.split(b"/"))
                try:
                    os.fchmod(place, stat.S_IMODE(member.mode))
                    os.utime(place, ns=(member.mtime_ns, member.mtime_ns))
                finally:
                    os.close(place)
            except OSError as error:
                error.filename = member.arc_path
                errors.append(error)
        if errors:
            raise errors[0]

    def _check_header(self, member: Member) -> None:
        header = bytearray(BLOCK)
        self._read(memoryview(header), member.start, member)
        if header != member.header():
            raise TapeIntegrityError(member.arc_path, [Difference(Fact.COPY, "its header", "another")], _REMEDY)

    def _read(self, view: memoryview, position: int, member: Member) -> None:
        if position < self._offset:
            raise TapeIntegrityError(member.arc_path, [Difference(Fact.COPY, "this member", "nothing")], _REMEDY)
        try:
            read_all(self._copy, view, position - self._offset)
        except EndedEarlyError:
            raise TapeIntegrityError(
                member.arc_path, [Difference(Fact.COPY, "all of this member", "an end")], _REMEDY
            ) from None

    def _folder(self, parts: list[bytes]) -> int:
        """A descriptor of the folder below the destination, made if it is not there."""
        place = os.dup(self._root)
        try:
            for depth, part in enumerate(parts, 1):
                with suppress(FileExistsError):
                    os.mkdir(part, stat.S_IRWXU, dir_fd=place)
                    self._folders.add(b"/".join(parts[:depth]))
                above, place = place, os.open(part, _PLACE, dir_fd=place)
                os.close(above)
        except BaseException:
            os.close(place)
            raise
        return place

    def _write(self, fd: int, member: Member) -> None:
        block_size = self._tape.block_size
        for number in range(hash_tree.blocks(member.size, block_size)):
            low = number * block_size
            block = aligned(min(block_size, member.size - low))
            self._read(block, member.start + BLOCK + low, member)
            if self._hash(block) != self._tape.block_digests(member, number, number + 1):
                found = damage(member, number, block_size, "another in the copy")
                raise TapeIntegrityError(member.arc_path, found.differences, _REMEDY)
            left = memoryview(block)
            while left:
                left = left[os.write(fd, left) :]
        os.fchmod(fd, stat.S_IMODE(member.mode))
