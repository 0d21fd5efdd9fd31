"""What an archive holds otherwise than the folder does: counted on the way of the walk, from the `stat` that it makes.

Extended attributes and ACLs are not counted: to list those of a member takes a system call of its own.
"""

import os

_MOST = 1 << 20  # files with several names that are remembered at a time, of some 100 bytes each
_SECTOR = 512  # bytes, which `st_blocks` counts


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
    """

    def __init__(self) -> None:
        self.further_names = 0
        self.further_bytes = 0
        self.counts_all_names = True
        self.sparse_files = 0
        self.sparse_bytes = 0
        self.other_owners = 0
        self.file_systems = 0
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

    def facts(self) -> dict[str, int]:
        """The counts, by their names."""
        return {
            "further_names": self.further_names,
            "further_bytes": self.further_bytes,
            "sparse_files": self.sparse_files,
            "sparse_bytes": self.sparse_bytes,
            "other_owners": self.other_owners,
            "file_systems": self.file_systems,
        }
