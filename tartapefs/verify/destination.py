"""The folder that members are restored into.

Rule: no user can read a file here who could not read it where it was recorded. A file is written under a temporary
name, gets its mode and time, and is renamed once it is complete. A new folder is accessible to its owner alone until
all is in it, or has failed; then it gets its mode and times. Paths are opened without following any link. A hard link
is made to a file that was written here, or found to be right, and to no other.

One thread at a time writes here, and none once it is closed.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress

from tartapefs.api.tape import Tape
from tartapefs.archive.member import Member
from tartapefs.base.errors import OtherNameError
from tartapefs.base.outputs import Unfinished

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

HasContents = Callable[[Member, int], bool]  # (member, descriptor of a file of its size)


class _File:
    """A file that is being written; `left`: bytes of its body that are not."""

    def __init__(self, folder: int, name: bytes, left: int) -> None:
        self._folder, self.left = folder, left
        path = f"/proc/self/fd/{folder}/{os.fsdecode(name)}"
        self.unfinished = Unfinished(path, mode=stat.S_IRUSR | stat.S_IWUSR)

    def close(self) -> None:
        """Removes it, unless it was renamed."""
        self.unfinished.discard()
        os.close(self._folder)


class Destination:
    """The folder at `path`, into which members of `tape` go. `overwrite`: replaces existing files. Raises OSError."""

    def __init__(self, tape: Tape, path: str, overwrite: bool) -> None:
        self._tape, self._overwrite = tape, overwrite
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._folders: set[bytes] = set()  # those that were created or requested
        self._lock = threading.Lock()  # held to write files
        self._files: dict[int, _File] = {}  # that are not complete, by their members' starts
        self._dropped: set[int] = set()  # likewise
        # Of a tape with hard links, the files that are complete, by their names: device and inode.
        self._complete: dict[bytes, tuple[int, int]] = {}
        self.is_closed = False

    def close(self) -> None:
        """Removes what is not complete, and gives folders their modes and times. Raises OSError."""
        with self._lock:
            self.is_closed = True
            for file in self._files.values():
                file.close()
        try:
            self._finish()
        finally:
            os.close(self._root)

    def add_folder(self, member: Member) -> None:
        """Makes a folder, if it is not there."""
        fd = self._open_folder(member.name.rstrip(b"/").split(b"/"))
        try:  # an existing one gives no new access before it is complete
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & member.mode | stat.S_IRWXU)
        finally:
            os.close(fd)
        self._folders.add(member.name.rstrip(b"/"))

    def look(self, member: Member, has_contents: HasContents | None) -> bool:
        """Whether a file or link is there already; makes the folder that it lies in.

        It is if its contents are the recorded ones; to be spared from overwriting it needs the mode and time as well.
        Without `has_contents` size and time decide. A hard link is if it is one to what it is another name of. Raises
        FileExistsError if there is another that must stay, and OtherNameError for a hard link to a file that is not
        complete.
        """
        if member.is_hard_link and member.target not in self._complete:
            raise _needs_another(member)
        *folders, name = member.name.split(b"/")
        folder = self._open_folder(folders)
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_IFMT(found.st_mode) == stat.S_IFMT(member.mode):
                is_equal = (found.st_mode, found.st_mtime_ns) == (member.mode, member.mtime_ns)
                if member.is_hard_link:
                    if self._complete[member.target] == _identity(found):
                        return True
                elif (is_equal or not self._overwrite) and _is_there(member, found, folder, name, has_contents):
                    self._note_complete(member, found)
                    return True
            if not self._overwrite:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        except FileNotFoundError:
            pass
        finally:
            os.close(folder)
        return False

    def write(self, member: Member, offset: int, view: memoryview) -> bool:
        """Writes bytes of a file's body, or a link; returns whether it has its name now.

        Raises FileExistsError if another file has taken that meanwhile, OtherNameError for a hard link to what is
        another file by now, and OSError.
        """
        with self._lock:
            if self.is_closed or self.is_dropped(member):
                return False
            file = self._files.pop(member.start, None) or self._create(member)
            try:
                if not self._put(file, member, offset, view):
                    self._files[member.start] = file
                    return False
                return True
            finally:
                if member.start not in self._files:
                    file.close()

    def _put(self, file: _File, member: Member, offset: int, view: memoryview) -> bool:
        unfinished = file.unfinished
        if member.is_link:
            os.unlink(unfinished.temporary)
            os.symlink(member.target, unfinished.temporary)
        if member.is_hard_link:
            os.unlink(unfinished.temporary)
            self._link(member, unfinished.temporary)
        while view:
            count = os.pwrite(unfinished.fd, view, offset)
            view, offset, file.left = view[count:], offset + count, file.left - count
        if file.left:
            return False
        if member.is_file:
            os.fchmod(unfinished.fd, stat.S_IMODE(member.mode))
        if not member.is_hard_link:
            os.utime(unfinished.temporary, ns=(member.mtime_ns, member.mtime_ns), follow_symlinks=False)
        found = os.fstat(unfinished.fd)
        unfinished.commit(self._overwrite, sync=False)
        self._note_complete(member, found)
        return True

    def _note_complete(self, member: Member, found: os.stat_result) -> None:
        if self._tape.hard_links and member.is_file:
            self._complete[member.name] = _identity(found)

    def _link(self, member: Member, path: str) -> None:
        """Makes a link at `path` to the complete file that the member is another name of."""
        *folders, name = member.target.split(b"/")
        folder = self._open_folder(folders)
        try:
            os.link(name, path, src_dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            raise _needs_another(member) from None
        finally:
            os.close(folder)
        if _identity(os.lstat(path)) != self._complete.get(member.target):
            raise _needs_another(member)

    def drop(self, member: Member) -> bool:
        """Removes what was written of a member, and takes nothing more of it; False if that was so before."""
        with self._lock:
            is_new = not self.is_dropped(member)
            self._dropped.add(member.start)
            if file := self._files.pop(member.start, None):
                file.close()
        return is_new

    def is_dropped(self, member: Member) -> bool:
        return member.start in self._dropped

    def _create(self, member: Member) -> _File:
        *folders, name = member.name.split(b"/")
        folder = self._open_folder(folders)
        try:
            return _File(folder, name, member.size)
        except BaseException:
            os.close(folder)
            raise

    def _open_folder(self, names: list[bytes]) -> int:
        """Opens the folder below the root, and creates what is missing of it."""
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


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _needs_another(member: Member) -> OtherNameError:
    return OtherNameError(member.arc_path, os.fsdecode(member.target))


def _is_there(
    member: Member, found: os.stat_result, folder: int, name: bytes, has_contents: HasContents | None
) -> bool:
    """Whether this file of the member's type is the member."""
    if member.is_link:
        return os.readlink(name, dir_fd=folder) == member.target
    if has_contents is None:
        return (found.st_size, found.st_mtime_ns) == (member.size, member.mtime_ns)
    if found.st_size != member.size:
        return False
    try:
        fd = os.open(name, _FILE_FLAGS, dir_fd=folder)
    except OSError:
        return False
    try:
        return has_contents(member, fd)
    finally:
        os.close(fd)
