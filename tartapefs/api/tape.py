"""The tape that users work with: the recording of a folder, and its archive as a file, or in parts."""

from collections.abc import Sequence

from tartapefs.api.archive_file import Parts, Window, archive
from tartapefs.index.recording import Recording
from tartapefs.play.engine import Check, TapePlayer


class Tape(Recording):
    """A recorded folder. `Tape.discover(folder)` and `Tape.from_index(index)` make one.

    Works with and without `with`, from many threads, and on a read-only file system. Every lookup raises
    TapeFormatError if the index is damaged, and ValueError once the tape is closed.
    """

    def open(self, check: Check = "full") -> Window:
        """Opens the whole archive as a read-only file with `seek`, from the source that the tape was discovered in.

        `check`: as of `TapePlayer`. Raises TapeError if no source is known, and OSError if it cannot be opened.
        """
        return archive(TapePlayer(self, check=check))

    def parts(self, size: int, check: Check = "full") -> Sequence[Window]:
        """The archive as files of `size` bytes each, the last one shorter; threads can read them concurrently.

        Raises as `open` does, and ValueError for a `size` below 1.
        """
        return Parts(TapePlayer(self, check=check), size)
