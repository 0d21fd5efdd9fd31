"""The tape, as users have it: what is recorded of a folder, and its archive as a file, or in parts."""

from collections.abc import Sequence

from tartapefs.api.archive_file import Parts, Window, archive
from tartapefs.index.recording import Recording
from tartapefs.play.engine import Check, TapePlayer


class Tape(Recording):
    """A recorded folder. `Tape.discover(folder)` and `Tape.from_index(index)` make one.

    Works with and without `with`, from many threads, and on a read-only file system. Every lookup raises
    TapeFormatError where the index turns out to be damaged, and ValueError once the tape is closed.
    """

    def open(self, check: Check = "full") -> Window:
        """The whole archive as a file, to read and to seek in, of the source that the tape was discovered in.

        `check` is the player's. Raises TapeError where no source is known, and OSError where it cannot be opened.
        """
        return archive(TapePlayer(self, check=check))

    def parts(self, size: int, check: Check = "full") -> Sequence[Window]:
        """The archive in files of `size` bytes each, the last one shorter; to be read by any number of threads at once.

        Raises as `open` does, and ValueError for a `size` below 1.
        """
        return Parts(TapePlayer(self, check=check), size)
