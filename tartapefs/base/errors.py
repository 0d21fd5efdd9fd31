"""Every error that tartapefs raises on purpose: one base, facts as attributes, a message of one line with a remedy.

If Python has a built-in error of the same meaning, ours derives from it, too (`TapeNotFoundError` from
`FileNotFoundError`), so that callers need not know this module. An `OSError` of the source folder (a disk that fails)
passes through unchanged, since it says nothing about the tape.
"""

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from tartapefs.base.commands import complete
from tartapefs.base.text import printable

RECORD_AGAIN = 'run "tartapefs record --force" to record again'
ADD_IT = 'run "tartapefs record --append" to add it, or use --allow-additions'
NOTHING = "nothing"  # as a value of Fact.TYPE: there is no such name


@dataclass(frozen=True, slots=True)
class Problem:
    """A path of the source that cannot be recorded.

    path: relative to the root, as `os.fsdecode` gives it.
    reason: text for people.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class Fact(StrEnum):
    """A fact that was recorded of a member or of the whole tape; its value names it in messages and JSON.

    TYPE, SIZE, MODE, MTIME, CTIME, INODE: of a member, as `stat` gives them.
    TARGET: of a link.
    ACCESS: whether the member can be read.
    PATH: whether folders lead to the member.
    CONTENTS: of the member's body.
    SOURCE, INDEX: the source folder and the index as a whole.
    COPY: of the archive.
    FINGERPRINT, RECORDING: which tape it is.
    """

    TYPE = "type"
    SIZE = "size"
    TARGET = "target"
    MODE = "mode"
    MTIME = "mtime"
    CTIME = "ctime"
    INODE = "inode"
    ACCESS = "access"
    PATH = "the path"
    CONTENTS = "the contents"
    SOURCE = "the source folder"
    INDEX = "the index"
    COPY = "the copy"
    FINGERPRINT = "fingerprint"
    RECORDING = "the recording"


@dataclass(frozen=True, slots=True)
class Difference:
    """A fact that is not as recorded.

    what: the fact, a string such as "size".
    recorded, found: both values, as text for people.
    part: for contents, the block that differs, such as "block 1 (bytes 512 to 1024 of its body)"; else empty.
    subject: the fact, with this part, as text for people.
    """

    what: Fact
    recorded: str
    found: str
    part: str = ""

    @property
    def subject(self) -> str:
        return f"{self.what} of {self.part}" if self.part else self.what.value

    def __str__(self) -> str:
        if self.what is Fact.TYPE and self.recorded == NOTHING:
            return f"added since recording (found {self.found})"
        if self.what is Fact.TYPE and self.found == NOTHING:
            return f"gone since recording (recorded {self.recorded})"
        return f"{self.subject} changed since recording (recorded {self.recorded}, found {self.found})"


class TapeError(Exception):
    """The base of all errors of tartapefs.

    remedy: what to do about it, as text for people; empty if the message says all. `str` adds it, with its commands
    as complete as they are known.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.args[0]}; {complete(self.remedy)}" if self.remedy else self.args[0]

    def __reduce__(self) -> tuple[object, ...]:
        # From the message and the attributes, not by calling the class: so another process gets the whole error.
        return _remake, (type(self), self.args), self.__dict__


def _remake(kind: type[TapeError], arguments: tuple[object, ...]) -> TapeError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    return error


class TapeNotFoundError(TapeError, FileNotFoundError):
    """There is no index here.

    path: of the index.
    errno: ENOENT.
    """

    def __init__(self, path: str, remedy: str = "name the index of a recorded folder") -> None:
        super().__init__(f"{printable(path)}: no tape here", remedy)
        self.errno = errno.ENOENT
        self.path = path


class TapeExistsError(TapeError, FileExistsError):
    """There is an index already, and the caller did not ask to replace it.

    path: of the index.
    errno: EEXIST.
    """

    def __init__(self, path: str) -> None:
        remedy = '"tartapefs record --append" adds what is new, "tartapefs record --force" records anew'
        super().__init__(f"{printable(path)}: already recorded", remedy)
        self.errno = errno.EEXIST
        self.path = path


class TapeSealedError(TapeError, FileExistsError):
    """The index holds digests already.

    path: of the index.
    errno: EEXIST.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"{printable(path)}: has digests already", f"{RECORD_AGAIN} if the folder changed")
        self.errno = errno.EEXIST
        self.path = path


class UnexpectedTapeError(TapeError):
    """The tape does not have the expected fingerprint or seal.

    path: of the index.
    expected: the fingerprint or seal, 64 hex digits.
    """

    def __init__(self, path: str, expected: str, fingerprint: str, seal: str, why: str = "") -> None:
        sealed = f"its seal {seal}" if seal else "it has no seal"
        super().__init__(
            f"{printable(path)}: not the tape that was expected: {printable(expected)};"
            f" its fingerprint is {fingerprint}, {sealed}",
            why or "find out who recorded it anew, or changed it",
        )
        self.path = path
        self.expected = expected


class TapeBusyError(TapeError, BlockingIOError):
    """Another recorder is writing the index.

    path: of the index.
    errno: EAGAIN.
    """

    def __init__(self, path: str) -> None:
        what = "another recording or sealing of this folder is running"
        super().__init__(f"{printable(path)}: {what}", "wait for it to end")
        self.errno = errno.EAGAIN
        self.path = path


class TapeFormatError(TapeError):
    """The file is not an index that can be believed.

    path: of the file.
    reason: text for people.
    """

    def __init__(self, path: str, reason: str, remedy: str = RECORD_AGAIN) -> None:
        reason = printable(reason)  # it may quote what is in the file
        super().__init__(f"{printable(path)}: not a usable tape index: {reason}", remedy)
        self.path = path
        self.reason = reason


class _ProblemsError(TapeError):
    _says: str

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        first, more = self.problems[0], len(self.problems) - 1
        super().__init__(f"{self._says}: {first}" + (f" (and {more} more)" if more else ""))


class TapeConstraintError(_ProblemsError):
    """The archive format has no room for some paths, or no tape can satisfy the request.

    problems: these paths, one at least.
    """

    _says = "cannot be recorded"


class SourceUnreadableError(_ProblemsError):
    """This user cannot read some paths of the source.

    problems: these paths, one at least.
    """

    _says = "cannot be read by this user"


class SourceBusyError(_ProblemsError):
    """Files of the source changed within the last minute, and a program can still write to them.

    problems: these files, one at least.
    """

    _says = "is being written"


class TapeIntegrityError(TapeError, RuntimeError):
    """The source is not as recorded: drift.

    member: the name in the archive.
    differences: what was found, each a Difference.
    """

    def __init__(self, member: str, differences: Iterable[Difference], remedy: str = RECORD_AGAIN) -> None:
        self.member = member
        self.differences = tuple(differences)
        super().__init__(f"{printable(member)}: {'; '.join(map(str, self.differences))}", remedy)

    def again(self) -> "TapeIntegrityError":
        """Returns the same error without a traceback, to raise it once more."""
        return TapeIntegrityError(self.member, self.differences, self.remedy)


class OffsetError(TapeError, ValueError):
    """An offset is outside the archive.

    offset: in bytes.
    total_size: of the archive, in bytes; offsets are 0 to this.
    """

    def __init__(self, offset: int, total_size: int) -> None:
        super().__init__(f"offset {offset} is outside the archive (0 to {total_size})")
        self.offset = offset
        self.total_size = total_size


class OutputError(TapeError):
    """No command writes to this file, which is part of a tape, or another user's.

    path: of the file.
    reason: text for people.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{printable(path)}: {reason}")
        self.path = path
        self.reason = reason


class OutputBusyError(OutputError, BlockingIOError):
    """Another program is writing the file.

    path: of the file.
    reason: text for people.
    errno: EAGAIN.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "is being written by another program; wait for it to end")
        self.errno = errno.EAGAIN


class _UrlError(TapeError):
    def __init__(self, url: str, reason: str, remedy: str = "") -> None:
        address = url.partition("?")[0] if url.startswith("http") else url  # what follows may be a signature
        super().__init__(f"{printable(address)}: {printable(reason)}", remedy)
        self.url = url
        self.reason = reason


class UploadError(_UrlError):
    """The far end of an upload cannot be reached, refuses, or does not have what was sent.

    url: of the object or the folder.
    reason: text for people.
    """


class CopyError(_UrlError):
    """A copy at a URL cannot be read: it is not there, its server gives no ranges, or the link broke.

    url: of the copy.
    reason: text for people.
    """


class OtherNameError(TapeError):
    """A hard link cannot be restored without the member that it is another name of.

    member, target: the names of both in the archive.
    """

    def __init__(self, member: str, target: str) -> None:
        what = f"{printable(member)}: is another name of {printable(target)}"
        super().__init__(f"{what}, which has the contents: extract that one, too, or a folder with both")
        self.member = member
        self.target = target


class MountError(TapeError):
    """A folder could not be mounted or unmounted.

    mountpoint: the path of the folder.
    reason: text for people.
    """

    def __init__(self, mountpoint: str, reason: str) -> None:
        super().__init__(f"{printable(mountpoint)}: {reason}")
        self.mountpoint = mountpoint
        self.reason = reason
