"""What `TapePlayer.play` yields: the archive in order, as values.

Rule: the concatenation of every event's `data` is the archive from the start offset to its end. Every event has
`data`, empty where there is none, so a loop that sends `event.data` and looks at nothing else is right.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tartapefs.member import Member


@dataclass(frozen=True, slots=True)
class StartMetadata:
    start_offset: int  # bytes: where in the archive the member's header starts
    resumed: bool  # the stream started after that


@dataclass(frozen=True, slots=True)
class EndMetadata:
    end_offset: int  # bytes: where in the archive the member ends, padding included
    md5sum: str | None  # of the body, 32 hex digits; None if it was not sent from its first byte, or there is none
    is_complete: bool  # every byte of the member was sent, from its header on


@dataclass(frozen=True, slots=True)
class FileStart:
    """A member begins: a file, directory or link."""

    entry: Member
    metadata: StartMetadata
    type: ClassVar[Literal["file_start"]] = "file_start"
    data: ClassVar[bytes] = b""


@dataclass(frozen=True, slots=True)
class FileData:
    """The next bytes of the archive: of a member, or of the footer."""

    data: bytes
    type: ClassVar[Literal["file_data"]] = "file_data"


@dataclass(frozen=True, slots=True)
class FileEnd:
    """A member has been sent to its last byte, and agreed with the recording until then."""

    entry: Member
    metadata: EndMetadata
    type: ClassVar[Literal["file_end"]] = "file_end"
    data: ClassVar[bytes] = b""


@dataclass(frozen=True, slots=True)
class TapeCompleted:
    """The archive's last byte has been sent."""

    type: ClassVar[Literal["tape_completed"]] = "tape_completed"
    data: ClassVar[bytes] = b""


Event = FileStart | FileData | FileEnd | TapeCompleted
