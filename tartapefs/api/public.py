"""The public names of the package, which imports them on first use."""

from tartapefs.api.archive_file import Window
from tartapefs.api.tape import Tape
from tartapefs.archive.layout import Kind, Segment
from tartapefs.archive.member import Member
from tartapefs.base.errors import (
    CopyError,
    Difference,
    Fact,
    MountError,
    OffsetError,
    OutputBusyError,
    OutputError,
    Problem,
    SourceBusyError,
    SourceUnreadableError,
    TapeBusyError,
    TapeConstraintError,
    TapeError,
    TapeExistsError,
    TapeFormatError,
    TapeIntegrityError,
    TapeNotFoundError,
    TapeSealedError,
    UnexpectedTapeError,
    UploadError,
)
from tartapefs.index.schema import Generation
from tartapefs.play.engine import TapePlayer
from tartapefs.play.events import Event, FileData, FileEnd, FileStart, TapeCompleted
from tartapefs.record.recorder import TapeRecorder

__all__ = [
    "CopyError",
    "Difference",
    "Event",
    "Fact",
    "FileData",
    "FileEnd",
    "FileStart",
    "Generation",
    "Kind",
    "Member",
    "MountError",
    "OffsetError",
    "OutputBusyError",
    "OutputError",
    "Problem",
    "Segment",
    "SourceBusyError",
    "SourceUnreadableError",
    "Tape",
    "TapeBusyError",
    "TapeCompleted",
    "TapeConstraintError",
    "TapeError",
    "TapeExistsError",
    "TapeFormatError",
    "TapeIntegrityError",
    "TapeNotFoundError",
    "TapePlayer",
    "TapeRecorder",
    "TapeSealedError",
    "UnexpectedTapeError",
    "UploadError",
    "Window",
]
