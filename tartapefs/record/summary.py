"""What an archive holds otherwise than the folder does: counted on the way of the walk, from the `stat` that it makes.

Extended attributes take a system call of their own a member, of 2 µs: both processes of a recording make these.
"""

import mmap
import os

from tartapefs.archive import ustar

_MOST = 1 << 20  # files with several names that are remembered at a time, of some 100 bytes each
_SECTOR = 512  # bytes, which `st_blocks` counts
_ON_EVERY_FILE = {"security.selinux"}  # a system gives it again where it makes the file


class Summary:
    """Counts, of one walk.

    further_names: second and later names of a file. further_bytes: what those files have, again for each such name.
    Each is a full copy in the archive.
    counts_all_names: whether all were counted. A million files are remembered that have names still to come.
    sparse_files: files that take less room on the disk than they have bytes; by holes, or because the file system
    compresses. sparse_bytes: what they do not take, and the archive does.
    other_owners: members whose owner is not root, user and group, if the archive says root.
    file_systems: folders in which another file system is mounted. Its files are in the archive, or with
    `one_file_system` the folder alone.
    with_attributes: members that have extended attributes or ACLs, which are left out; after an append, of the new
    ones. None if they are not counted, since each would be a question to a server: then `root`, the folder, is None.

    `prefix`: what all names in the archive begin with, a slash included.
    """

    def __init__(self, root: bytes | None, prefix: bytes) -> None:
        self.further_names = 0
        self.further_bytes = 0
        self.counts_all_names = True
        self.sparse_files = 0
        self.sparse_bytes = 0
        self.other_owners = 0
        self.file_systems = 0
        self._root = root and root + b"/"
        self._prefix_size = len(prefix)
        self._with_attributes = memoryview(mmap.mmap(-1, 16)).cast("Q")  # shared with a forked process: ours, its
        self._pid = os.getpid()
        self._to_come: dict[tuple[int, int], int] = {}  # of files with several names: how many names

    def add_odd_file(self, found: os.stat_result, size: int) -> None:
        """Counts a file of `size` bytes, or a link of 0, that has several names or may be sparse."""
        if found.st_nlink > 1 and self._is_further(found):
            self.further_names += 1
            self.further_bytes += size
        elif (taken := found.st_blocks * _SECTOR) < size:
            self.sparse_files += 1
            self.sparse_bytes += size - taken

    def _is_further(self, found: os.stat_result) -> bool:
        key = found.st_dev, found.st_ino
        left = self._to_come.get(key)
        if left is None:
            if len(self._to_come) < _MOST:
                self._to_come[key] = found.st_nlink - 1
            else:
                self.counts_all_names = False
            return False
        if left > 1:
            self._to_come[key] = left - 1
        else:
            del self._to_come[key]
        return True

    def add_attributes(self, members: list[ustar.Facts]) -> None:
        """Counts those of the members that have attributes. May be called in a process forked from this one, too."""
        if self._root is None:
            return
        root, below, listxattr, count = self._root, self._prefix_size, os.listxattr, 0
        for facts in members:
            try:
                names = listxattr(root + facts[0][below:], follow_symlinks=False)
            except OSError:  # a file system without any
                continue
            if names and not _ON_EVERY_FILE.issuperset(names):
                count += 1
        self._with_attributes[os.getpid() != self._pid] += count

    @property
    def with_attributes(self) -> int | None:
        return None if self._root is None else sum(self._with_attributes)

    def facts(self) -> dict[str, int | None]:
        """The counts, by their names."""
        return {
            "further_names": self.further_names,
            "further_bytes": self.further_bytes,
            "sparse_files": self.sparse_files,
            "sparse_bytes": self.sparse_bytes,
            "other_owners": self.other_owners,
            "file_systems": self.file_systems,
            "with_attributes": self.with_attributes,
        }
