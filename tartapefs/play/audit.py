"""The audits: passes over the source that look for drift without being asked for bytes.

Rule: adding, removing or renaming a name always changes its directory's times, so an audit of every directory sees
whatever changed the set of members, at a fraction of the cost of looking at all of them (`inspection`); a file that is
rewritten in place is seen when it is read. `verify` looks at everything, and lists what it finds.
"""

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from tartapefs.archive.member import Member
from tartapefs.base.errors import Difference, TapeIntegrityError
from tartapefs.base.tape_files import TapeFiles
from tartapefs.base.text import file_type
from tartapefs.index.recording import Recording
from tartapefs.play.inspection import Inspector
from tartapefs.source.drift import check_place, drift, only_stamps
from tartapefs.source.exclusion import has_a_place, recorded_exclusion
from tartapefs.source.folder import Source

_PROGRESS_EVERY = 128  # members: on a network file system each may take milliseconds
_STRETCH = 0.01  # seconds of work between two rests
_LONGEST = 3600.0  # seconds of a rest, however small the share


def audit(inspector: Inspector, rest: Callable[[], None]) -> None:
    """Looks at every directory. Raises TapeIntegrityError for the first that is not as recorded.

    It rests with `rest()` now and then. Raises OSError where the source cannot be read, and TapeFormatError for a
    damaged index.
    """
    check_place(inspector.source, inspector.tape.root_name)
    for folder in inspector.tape.folders():
        found = inspector.inspect(folder)
        if found:
            raise drift(folder, found)
        rest()


def check_headers(tape: Recording, rest: Callable[[], None]) -> None:
    """Raises TapeIntegrityError unless the headers of all members have the tape's fingerprint together."""
    if not tape.has_fingerprint(rest):
        recorded, found = f"the fingerprint {tape.fingerprint}", "headers that have another"
        raise TapeIntegrityError(tape.root_name, [Difference("the index", recorded, found)])


class Rest:
    """Called now and then by a thread that may take `share` of one core, above 0, at most 1: it rests accordingly.

    Raises ValueError for another share.
    """

    def __init__(self, share: float, pause: Callable[[float], object] = time.sleep) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"{share} is no share of one core; it is above 0, and at most 1")
        self._share, self._pause = share, pause
        self._begun = time.thread_time()

    def __call__(self) -> None:
        spent = time.thread_time() - self._begun
        if spent > _STRETCH and self._share < 1:
            self._pause(min(spent / self._share - spent, _LONGEST))
            self._begun = time.thread_time()


def verify(
    inspector: Inspector,
    on_progress: Callable[[int, int], None] = lambda members, position: None,
    look_into: Callable[[Member], Iterable[TapeIntegrityError]] | None = None,
) -> Iterator[TapeIntegrityError]:
    """All drift of the source, in the archive's order. Raises TapeFormatError for a damaged index.

    `look_into` is asked about a file or link of which only timestamps or inode are not as recorded, in place of that;
    by default it is drift. Only a directory that differs is listed, to name what was added. `on_progress` is called now
    and then with the number of members seen, and the start of the last of them.
    """
    for count, member in enumerate(inspector.tape.members(), 1):
        found = _differences(member, inspector)
        if found and look_into is not None and not member.is_directory and only_stamps(found):
            yield from look_into(member)
        elif found:
            yield drift(member, found)
            if member.is_directory and found[0].what not in ("type", "access"):
                yield from _added(inspector.tape, inspector.source, member)
        if count % _PROGRESS_EVERY == 0:
            on_progress(count, member.start)


def files_of(tape: Recording, source: Source, at_home: bool) -> TapeFiles:
    """What no command may write to while `tape` plays from `source`."""

    def holds(found: os.stat_result) -> bool:
        for member in tape.folders() if stat.S_ISDIR(found.st_mode) else tape.members():
            if member.ino == found.st_ino or not at_home:
                with suppress(OSError):
                    if os.path.samestat(source.lstat(member.path), found):
                        return True
        return False

    return TapeFiles(source.root, tape.index_path, holds)


def _differences(member: Member, inspector: Inspector) -> tuple[Difference, ...]:
    try:
        return inspector.inspect(member)
    except OSError as error:
        return (Difference("access", "readable", error.strerror or "an error"),)


def _added(tape: Recording, source: Source, directory: Member) -> Iterator[TapeIntegrityError]:
    """The members that a new recording would find in `directory`, which differs, and that are not on the tape."""
    is_left_out = recorded_exclusion(tape.excluded) or (lambda path, is_directory: False)
    try:
        folder = source.folder(directory.path)
    except OSError as error:
        yield TapeIntegrityError(directory.arc_path, [Difference("access", "readable", error.strerror or "an error")])
        return
    try:
        for name in folder.names():
            try:
                mode = folder.lstat(name).st_mode
            except OSError:
                continue  # gone again, or in a folder that may be listed but not entered
            path = directory.path + b"/" + name if directory.path else name
            if not has_a_place(path, mode, is_left_out):
                continue
            try:
                tape.find(directory.name + name)
            except KeyError:
                arc_path = os.fsdecode(directory.name + name)
                yield TapeIntegrityError(arc_path, [Difference("type", "nothing", file_type(mode))])
    finally:
        folder.close()
