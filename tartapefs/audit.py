"""The audit: a pass over the source that looks for drift without being asked for bytes.

Rule: every member is compared with its witness; and since adding or removing a name always changes its directory, only
a directory that differs is listed, to name what was added.
"""

import os
import stat
from collections.abc import Callable, Iterator

from tartapefs.display import file_type
from tartapefs.errors import Difference, TapeIntegrityError
from tartapefs.integrity import drift, inspect
from tartapefs.member import RECORDABLE, Member
from tartapefs.scan import exclusion
from tartapefs.source import TAPE_FOLDER, Source
from tartapefs.tape import Tape

_PROGRESS_EVERY = 1024  # members


def audit(
    tape: Tape, source: Source, on_progress: Callable[[int], None] = lambda members: None
) -> Iterator[TapeIntegrityError]:
    """All drift of `source`, in the archive's order. Raises TapeFormatError for a damaged index.

    `on_progress` is called now and then with the number of members seen.
    """
    at_home = tape.is_at_home(source)
    for count, member in enumerate(tape.members(), 1):
        found = _differences(member, source, at_home)
        if found:
            yield drift(member, found)
            if member.is_directory and found[0].what != "type":
                yield from _added(tape, source, member)
        if count % _PROGRESS_EVERY == 0:
            on_progress(count)


def _differences(member: Member, source: Source, at_home: bool) -> tuple[Difference, ...]:
    try:
        return inspect(member, source, at_home)
    except OSError as error:
        return (Difference("access", "readable", error.strerror or "an error"),)


def _added(tape: Tape, source: Source, directory: Member) -> Iterator[TapeIntegrityError]:
    """The members that a new recording would find in `directory`, which differs, and that are not on the tape."""
    is_left_out, _ = exclusion(tape.excluded)
    folder = source.folder(directory.path)
    try:
        for name in folder.names():
            mode = folder.lstat(name).st_mode
            path = directory.path + b"/" + name if directory.path else name
            if path == TAPE_FOLDER or stat.S_IFMT(mode) not in RECORDABLE or is_left_out(path, stat.S_ISDIR(mode)):
                continue
            try:
                tape.find(directory.name + name)
            except KeyError:
                arc_path = os.fsdecode(directory.name + name)
                yield TapeIntegrityError(arc_path, [Difference("type", "nothing", file_type(mode))])
    finally:
        folder.close()
