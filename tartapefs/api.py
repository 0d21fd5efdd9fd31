"""The public names of the package, in one place. The package itself imports them once one of them is asked for."""

from tartapefs.errors import (
    Difference,
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
)
from tartapefs.events import Event, FileData, FileEnd, FileStart, TapeCompleted
from tartapefs.layout import Kind, Segment
from tartapefs.member import Member
from tartapefs.player import TapePlayer
from tartapefs.recorder import TapeRecorder
from tartapefs.tape import Tape
from tartapefs.window import Window

__all__ = [
    "Difference",
    "Event",
    "FileData",
    "FileEnd",
    "FileStart",
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
    "Window",
]
