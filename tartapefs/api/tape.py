"""The tape that users work with: the recording of a folder, and its archive as a file, or in parts.

What reads the archive is imported when it is opened: most programs and commands look at the recording alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tartapefs.index.recording import Recording

if TYPE_CHECKING:
    from tartapefs.api.archive_file import Window
    from tartapefs.play.engine import Check


class Tape(Recording):
    """A recorded folder. `Tape.discover(folder)` and `Tape.from_index(index)` make one.

    Works with and without `with`, from many threads, and on a read-only file system. Every lookup raises
    TapeFormatError if the index is damaged, and ValueError once the tape is closed.

    directory: where the source is expected; None if only the index is known.
    index_path: absolute.
    facts: what the index says of the tape as a whole.
    version: of the index's format: 3 and more, the sum of 3 and what the tape has (docs/decisions/0022).
    generations: the runs of members that `record`, and `record --append` since then, put on the tape.
    root_name: the folder's name in the archive.
    fingerprint: SHA-256 over all headers, 64 hex digits.
    rows_digest: SHA-256 over everything that is recorded of all members, 64 hex digits; sealing keeps it.
    root_ino: the inode of the source folder when recorded.
    total_size: bytes of the archive, footer included.
    member_count: the number of members.
    recorded_ns: when the folder was recorded, in nanoseconds since 1970.
    excluded: patterns; a callable is named by its repr.
    left_out: the number of sockets, pipes, devices and unreadable files that were left out.
    owners_kept: whether headers name the owners of files.
    long_names: whether headers may have more than one block, for names and targets that do not fit into one.
    hard_links: whether further names of a file are links to the first; else they are full copies.
    one_file_system: whether of what is mounted below the folder the archive has the mount points alone.
    seal: the second fingerprint, over contents too, 64 hex digits; empty without digests.
    algorithm: of the digests, "blake3" or "sha256"; empty without digests.
    block_size: bytes of a body that have a digest of their own; 0 without digests.
    due_algorithm, due_block_size: of the digests that the tape is still to get; empty and 0 if none.
    """

    def open(self, check: "Check" = "full") -> "Window":
        """Opens the whole archive as a read-only file with `seek`, from the source that the tape was discovered in.

        `check`: as of `TapePlayer`. Raises TapeError if no source is known, and OSError if it cannot be opened.
        """
        from tartapefs.api.archive_file import archive
        from tartapefs.play.engine import TapePlayer

        return archive(TapePlayer(self, check=check))

    def parts(self, size: int, check: "Check" = "full") -> "Sequence[Window]":
        """The archive as files of `size` bytes each, the last one shorter; threads can read them concurrently.

        Raises as `open` does, and ValueError for a `size` below 1, and for one that makes more than 99,999 parts.
        """
        from tartapefs.api.archive_file import Parts
        from tartapefs.play.engine import TapePlayer

        return Parts(TapePlayer(self, check=check), size)

    def shards(self, size: int, check: "Check" = "full") -> "Sequence[Window]":
        """The archive as archives of at most `size` bytes each, none of which has a part of a member, or of a sample.

        A sample is what webdataset takes for one: members in a row that differ behind the first dot of their last name.
        One that is too large for `size` is a shard of its own. Raises as `parts` does.
        """
        from tartapefs.api.archive_file import Parts
        from tartapefs.play.engine import TapePlayer

        return Parts(TapePlayer(self, check=check), shard_size=size)
