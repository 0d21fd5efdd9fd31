"""Restores single members from a copy of the archive: reads their ranges alone, and checks them by the tape's digests.

Rule: a member's name only ever shows contents with its digests, and no user can read a file here who could not read it
where it was recorded. A file is written under a temporary name, and renamed once all its blocks were right. A new
folder is accessible to its owner alone until all is in it, or has failed; then it gets its mode and times. Paths below
the destination are opened without following any link.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from tartapefs.api.tape import Tape
from tartapefs.archive import hash_tree
from tartapefs.archive.member import Member
from tartapefs.base.buffers import EndedEarlyError, aligned, read_all
from tartapefs.base.errors import Difference, Fact, TapeError, TapeIntegrityError
from tartapefs.base.outputs import Unfinished
from tartapefs.play.verified_blocks import damage

_REMEDY = "the copy is damaged here, or of another archive; take another one"
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def below(tape: Tape, member: Member) -> Iterator[Member]:
    """Yields the member and, if it is a directory, all that lies in it."""
    yield member
    if member.is_directory:
        for inner in tape.children(member):
            yield from below(tape, inner)


class Restorer:
    """Writes members of `tape` below the folder `destination`, from the file `copy`.

    `offset`: where in the archive `copy` begins, in bytes. `overwrite`: replaces existing files. Raises TapeError for a
    tape without digests.

    A context manager: folders get their modes and times at its end.
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
        self._folders: set[bytes] = set()  # those that were created or requested

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
        """Restores one member. Raises TapeIntegrityError if the copy differs there, FileExistsError, and OSError."""
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
        fd = self._open_folder(member.name.rstrip(b"/").split(b"/"))
        try:  # an existing one gives no new access before it is complete
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & member.mode | stat.S_IRWXU)
        finally:
            os.close(fd)
        self._folders.add(member.name.rstrip(b"/"))

    def _restore_file(self, member: Member) -> None:
        *folders, name = member.name.split(b"/")
        folder = self._open_folder(folders)
        path = f"/proc/self/fd/{folder}/{os.fsdecode(name)}"
        try:
            if member.is_link and not self._overwrite:
                os.symlink(member.target, path)
            else:
                with Unfinished(path, mode=stat.S_IRUSR | stat.S_IWUSR) as file:
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
        """Gives folders their modes and times, inner ones first; goes on after an error, and raises the first."""
        errors = []
        for name in sorted(self._folders, reverse=True):
            member = self._tape.find(name)
            try:
                fd = self._open_folder(name.split(b"/"))
                try:
                    os.fchmod(fd, stat.S_IMODE(member.mode))
                    os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
                finally:
                    os.close(fd)
            except OSError as error:
                error.filename = member.arc_path
                errors.append(error)
        if errors:
            raise errors[0]

    def _check_header(self, member: Member) -> None:
        recorded = member.header()
        header = bytearray(len(recorded))
        self._read(memoryview(header), member.start, member)
        if header != recorded:
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

    def _open_folder(self, names: list[bytes]) -> int:
        """Opens the folder below the destination, and creates what is missing of it."""
        fd = os.dup(self._root)
        try:
            for depth, name in enumerate(names, 1):
                with suppress(FileExistsError):
                    os.mkdir(name, stat.S_IRWXU, dir_fd=fd)
                    self._folders.add(b"/".join(names[:depth]))
                parent, fd = fd, os.open(name, _FOLDER_FLAGS, dir_fd=fd)
                os.close(parent)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _write(self, fd: int, member: Member) -> None:
        block_size = self._tape.block_size
        for number in range(hash_tree.block_count(member.size, block_size)):
            offset = number * block_size
            block = aligned(min(block_size, member.size - offset))
            self._read(block, member.body + offset, member)
            if self._hash(block) != self._tape.block_digests(member, number, number + 1):
                found = damage(member, number, block_size, "another in the copy")
                raise TapeIntegrityError(member.arc_path, found.differences, _REMEDY)
            unwritten = memoryview(block)
            while unwritten:
                unwritten = unwritten[os.write(fd, unwritten) :]
        os.fchmod(fd, stat.S_IMODE(member.mode))
