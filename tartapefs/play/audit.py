"""Audits: passes over the source that look for drift, with no bytes requested.

Rule: adding, removing or renaming a name always changes its directory's times, so an audit of every directory sees
whatever changed the set of members, at a fraction of the cost of checking all of them (`inspection`); a read sees a
file that was rewritten in place. `verify` checks every member, and lists all differences.
"""

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from tartapefs.archive.member import Member
from tartapefs.base.errors import ADD_IT, NOTHING, Difference, Fact, TapeIntegrityError
from tartapefs.base.tape_files import TapeFiles
from tartapefs.base.text import file_type
from tartapefs.index.recording import Recording
from tartapefs.play.inspection import Inspector
from tartapefs.source.drift import check_root, drift, only_stamps, unreadable
from tartapefs.source.exclusion import is_recordable, recorded_exclusion
from tartapefs.source.folder import Source

_PROGRESS_EVERY = 128  # members: on a network file system each may take milliseconds
_LONGEST_RUN = 0.01  # seconds of work between two pauses
_LONGEST_PAUSE = 3600.0  # seconds of a pause, however small the share


def audit(inspector: Inspector, throttle: Callable[[], None]) -> None:
    """Checks every directory. Raises TapeIntegrityError for the first that is not as recorded.

    It calls `throttle()` after each. Raises OSError if the source cannot be read, and TapeFormatError for a damaged
    index.
    """
    check_root(inspector.source, inspector.tape.root_name)
    for folder in inspector.tape.folders():
        found = inspector.inspect(folder)
        if found:
            raise drift(folder, found)
        throttle()


def check_headers(tape: Recording, throttle: Callable[[], None]) -> None:
    """Compares the headers of all members with the tape's fingerprint; raises TapeIntegrityError if they differ."""
    if not tape.has_fingerprint(throttle):
        recorded, found = f"the fingerprint {tape.fingerprint}", "headers that have another"
        raise TapeIntegrityError(tape.root_name, [Difference(Fact.INDEX, recorded, found)])


class Throttle:
    """Limits the thread that calls it often to `share` of one core (above 0, at most 1), by pauses.

    `pause(seconds)` makes them; `clock()` is the thread's processor time in seconds. Raises ValueError for another
    share.
    """

    def __init__(
        self,
        share: float,
        pause: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"a share of one core is above 0 and at most 1, not {share}")
        self._share, self._pause, self._clock = share, pause, clock
        self._begun = clock()

    def __call__(self) -> None:
        spent = self._clock() - self._begun
        if spent > _LONGEST_RUN and self._share < 1:
            self._pause(min(spent / self._share - spent, _LONGEST_PAUSE))
            self._begun = self._clock()


def verify(
    inspector: Inspector,
    on_progress: Callable[[int, int], None] = lambda members, position: None,
    check_contents: Callable[[Member], Iterable[TapeIntegrityError]] | None = None,
    on_addition: Callable[[str], None] = lambda arc_path: None,
) -> Iterator[TapeIntegrityError]:
    """Yields all drift of the source, in the archive's order. Raises TapeFormatError for a damaged index.

    For a file or link of which only timestamps or inode differ, it yields what `check_contents` finds; without that,
    these differences are drift. It lists only directories that differ, to name what was added. It calls `on_progress`
    every 128 members with their number so far, and the start of the last one; `on_addition` with each addition that
    the inspector allows.
    """
    for count, member in enumerate(inspector.tape.members(), 1):
        found = _differences(member, inspector)
        if found and check_contents is not None and not member.is_directory and only_stamps(found):
            yield from check_contents(member)
        elif found:
            yield drift(member, found)
            if member.is_directory and found[0].what not in (Fact.TYPE, Fact.ACCESS):
                yield from _added(inspector.tape, inspector.source, member)
        elif member.is_directory and inspector.has_additions(member):
            for addition in _added(inspector.tape, inspector.source, member):
                on_addition(addition.member)
        if count % _PROGRESS_EVERY == 0:
            on_progress(count, member.start)


def files_of(tape: Recording, source: Source, at_home: bool) -> TapeFiles:
    """The files that no command may write to while `tape` plays from `source`."""

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
        return (unreadable(error),)


def _added(tape: Recording, source: Source, directory: Member) -> Iterator[TapeIntegrityError]:
    """Yields, as drift, the names in `directory` that a new recording would add to the tape."""
    is_left_out = recorded_exclusion(tape.excluded) or (lambda path, is_directory: False)
    try:
        folder = source.folder(directory.path)
    except OSError as error:
        yield TapeIntegrityError(directory.arc_path, [unreadable(error)])
        return
    try:
        for name in folder.names(tape.one_file_system):
            try:
                mode = folder.lstat(name).st_mode
            except OSError:
                continue  # gone again, or in a folder that may be listed but not entered
            path = directory.path + b"/" + name if directory.path else name
            if not is_recordable(path, mode, is_left_out):
                continue
            try:
                tape.find(directory.name + name)
            except KeyError:
                arc_path = os.fsdecode(directory.name + name)
                yield TapeIntegrityError(arc_path, [Difference(Fact.TYPE, NOTHING, file_type(mode))], ADD_IT)
    finally:
        folder.close()
