"""The recorder: one pass over the source that fixes where every byte of its archive lies.

Rule: all or nothing. What cannot be recorded is collected on the way and raised at the end in one go, with nothing
written. The root's own modification time is left as it was found.

Two ways in which a later change could hide from a `stat` are closed here. A change within the granularity of the
timestamp that it moves leaves the same stamp: whatever is that fresh is looked at again once the clock has moved on. A
`write` moves the stamp when it begins and a mapping at the first store to a page, and neither by what follows: of files
changed within the last minute the witness is taken while the kernel grants that nobody writes them (`source._settled`).
"""

import grp
import json
import os
import pwd
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Literal

from tartapefs.archive import hash_tree, ustar
from tartapefs.archive.layout import FOOTER, MAX_OFFSET, span
from tartapefs.archive.member import Member, path_of
from tartapefs.base import forked_work, signals, tape_files
from tartapefs.base.errors import (
    OutputError,
    Problem,
    SourceBusyError,
    SourceUnreadableError,
    TapeBusyError,
    TapeConstraintError,
    TapeExistsError,
    TapeFormatError,
    TapeNotFoundError,
)
from tartapefs.base.tape_files import TAPE_FOLDER, default_index
from tartapefs.base.text import printable
from tartapefs.index.reader import Index, IndexWriter, TapeFacts
from tartapefs.record.walk import Scan, Seen, changed, seen_of
from tartapefs.source.drift import inspect
from tartapefs.source.exclusion import Exclude, IsLeftOut, exclusion, is_function
from tartapefs.source.folder import Folder, Source

_RECENT_NS = 60 * 10**9  # a file changed since then may be in the middle of a change
_PATIENCE = 2.0  # seconds that one recording waits in all for programs to close the files that they write
_PAUSE = 0.02  # seconds between two looks
_TICK_NS = 20 * 10**6  # the kernel stamps files from a clock that moves every 1 to 10 ms
_COARSE_TICK_NS = 2 * 10**9  # a stamp of whole seconds: of a file system that counts by seconds, or by two (FAT)
_FRESH_AT_ONCE = 4096  # how many fresh members are remembered before waiting for the clock
_PROGRESS_EVERY = 1024  # members

Progress = Callable[[int, int], None]


class TapeRecorder:
    """Records the folder at `root`.

    `index_path`: where the index goes, `<root>/.tartape/index.db` by default; elsewhere for a source that must not be
    written. `exclude`: a pattern as in .gitignore, several, or a function that is given each path below the root and
    tells whether to leave it out; a directory that is left out takes its content along. `anonymize`: owners are
    written as root, which is the default. `digest`: of which algorithm the tape is to have digests of contents, "" for
    none, the default; the index says so, and `sealer.seal` makes them. `overwrite`: an existing index is replaced; of
    `exclude`, `anonymize` and `digest` what is None is then as in the recording that is replaced, so that `exclude=()`
    is needed to leave nothing out. `skip_unreadable`: what this user cannot read is left out, and then listed in
    `skipped`; `skip_busy`: so are files that changed within the last minute and that a program has open for writing, or
    mapped so. `processes`: 1, or 2 to allow a second process, which writes the index. It is forked from this process if
    that has a single thread and a second core, and there are 2,048 members or more; it ends before `commit` returns.
    `on_progress` is called now and then with members and archive bytes so far.

    After `commit`, `excluded`, `owners_kept`, `due_algorithm` and `due_block_size` are what the index says; `replaced`
    is what the one before said, if there was one, and `not_taken_over` why it says nothing.

    Raises ValueError for a malformed pattern, an unknown algorithm, and another number of processes.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        index_path: str | os.PathLike[str] | None = None,
        exclude: Exclude | None = None,
        anonymize: bool | None = None,
        overwrite: bool = False,
        *,
        skip_unreadable: bool = False,
        skip_busy: bool = False,
        digest: hash_tree.SealAlgorithm | Literal[""] | None = None,
        on_progress: Progress | None = None,
        processes: int = 1,
    ) -> None:
        forked_work.check_processes(processes)
        self.root = os.path.realpath(root)
        self.index_path = os.path.abspath(index_path) if index_path else default_index(self.root)
        self._own_folder = index_path is None
        if digest not in (None, "", *hash_tree.ALGORITHMS):
            raise ValueError(f"{digest!r} is no algorithm; there are {', '.join(hash_tree.ALGORITHMS)}")
        self._asked_exclusion = exclusion(exclude) if exclude is not None else None
        self._asked_anonymize, self._asked_digest = anonymize, digest
        self._exclude: IsLeftOut | None = None
        self.excluded: Sequence[str] = ()
        self.owners_kept = False
        self.due_algorithm, self.due_block_size = "", 0
        self.replaced: TapeFacts | None = None
        self.not_taken_over = ""
        self._overwrite = overwrite
        self._skip_unreadable = skip_unreadable
        self._skip_busy = skip_busy
        self._processes = processes
        self._on_progress = on_progress or (lambda members, size: None)
        self._begin()

    def _begin(self) -> None:
        """Forgets what an earlier recording found."""
        self._problems: list[Problem] = []
        self._busy: list[Problem] = []
        self._patience = _PATIENCE
        self._fresh: list[tuple[int, ustar.Facts]] = []
        self.skipped: tuple[Problem, ...] = ()
        self.left_out = 0
        self.member_count = 0
        self.total_size = 0
        self.latest = b""  # path below the root of the member that was last when `on_progress` was called

    def commit(self) -> str:
        """Records, and returns the fingerprint: SHA-256 over all headers, 64 hex digits. May be called again.

        Raises TapeExistsError, TapeBusyError, TapeConstraintError, SourceUnreadableError and SourceBusyError (each with
        `problems`), TapeIntegrityError where the folder changes meanwhile, and OSError where the disk fails or is full.
        Then what was there before is untouched.
        """
        if not os.path.basename(self.root):
            raise TapeConstraintError([Problem(self.root, "a root folder without a name has no place in an archive")])
        self._begin()
        self._check_index_path()
        with Source(self.root) as source:
            if not self._own_folder:
                return self._record(source)
            try:  # or the slower of two would still touch the root when the other has its witness
                source.lock()
            except BlockingIOError:
                raise TapeBusyError(self.index_path) from None
            return self._record_inside(source)

    def _record_inside(self, source: Source) -> str:
        was_there = _has_tape_folder(source)
        try:
            if not was_there:
                _make_tape_folder(source)
            return self._record(source)
        except BaseException:
            if not was_there:
                _remove_tape_folder(source)
            raise

    def _check_index_path(self) -> None:
        exists = os.path.lexists(self.index_path)
        if exists and not self._own_folder and not tape_files.is_index(self.index_path):
            reason = "is in the way of the index and none itself; move it, or choose another place"
            raise TapeConstraintError([Problem(self.index_path, reason)])
        if exists and not self._overwrite:
            raise TapeExistsError(self.index_path)
        if self._own_folder:
            return
        place = os.path.realpath(os.path.dirname(self.index_path))
        if not os.path.isdir(place):
            raise FileNotFoundError(2, "no such folder for the index", place)
        try:
            tape_files.refuse_below(
                self.index_path, tape_files.TapeFiles(self.root, self.index_path), in_tape_folder=True
            )
        except OutputError as error:
            raise TapeConstraintError([Problem(self.index_path, error.reason)]) from None

    def _record(self, source: Source) -> str:
        self._source = source
        with IndexWriter(self.index_path, processes=self._processes) as writer:
            if os.path.lexists(self.index_path) and not self._overwrite:  # now that no other recorder runs
                raise TapeExistsError(self.index_path)
            self._decide(source)
            recorded_ns = time.time_ns()
            self._recent = recorded_ns - _RECENT_NS
            root = os.fsencode(os.path.basename(self.root)) + b"/"
            owner_of = _owner if self.owners_kept else None
            scan = Scan(source, root, self._exclude, owner_of, self._settled, self._recent)
            fingerprint = writer.add(self._members(scan))
            self._settle()
            self._raise_problems(scan)
            self._on_progress(self.member_count, self.total_size)
            writer.commit(
                {
                    "root_name": os.fsencode(os.path.basename(self.root)),
                    "fingerprint": fingerprint,
                    "total_size": self.total_size,
                    "member_count": self.member_count,
                    "recorded_ns": self._earlier_recording(fingerprint) or recorded_ns,
                    "excluded": json.dumps(list(self.excluded)),
                    "left_out": self.left_out,
                    "owners_kept": int(self.owners_kept),
                    "root_ino": source.ino,
                }
                | self._due_facts()
            )
        return fingerprint

    def _due_facts(self) -> dict[str, Any]:
        if not self.due_algorithm:
            return {}
        return {"due_algorithm": self.due_algorithm, "due_block_size": self.due_block_size}

    def _look_at_replaced(self, source: Source) -> None:
        """What the index says that is there now. Nobody else replaces it meanwhile."""
        self.replaced, self.not_taken_over = None, ""
        try:
            index = Index(self.index_path)
        except TapeNotFoundError:
            return
        except TapeFormatError as error:
            self.not_taken_over = error.reason
        except OSError as error:
            self.not_taken_over = error.strerror or str(error)
        else:
            index.close()
            facts = index.facts
            is_its_name = facts.root_name == os.fsencode(os.path.basename(self.root))
            if self._own_folder or facts.root_ino == source.ino or is_its_name:
                self.replaced = facts
            else:
                self.not_taken_over = f"it is of another folder, {printable(facts.root_name)}"

    def _decide(self, source: Source) -> None:
        """What nobody asked for is as in the recording that is replaced, or by default."""
        self._look_at_replaced(source)
        before = self.replaced
        self.due_algorithm, self.due_block_size = "", 0
        if self._asked_exclusion is not None:
            self._exclude, self.excluded = self._asked_exclusion
        else:
            self._exclude, self.excluded = _taken_over(before.excluded, self.index_path) if before else (None, ())
        self.owners_kept = bool(before and before.owners_kept)
        if self._asked_anonymize is not None:
            self.owners_kept = not self._asked_anonymize
        if self._asked_digest is not None:
            self.due_algorithm, self.due_block_size = (
                self._asked_digest,
                bool(self._asked_digest) * hash_tree.BLOCK_SIZE,
            )
        elif before:
            self.due_algorithm = before.algorithm or before.due_algorithm
            self.due_block_size = before.block_size or before.due_block_size

    def _earlier_recording(self, fingerprint: str) -> int | None:
        """When the same archive was recorded first, if the index that is about to be replaced holds it."""
        before = self.replaced
        return before.recorded_ns if before and before.fingerprint == fingerprint else None

    def _raise_problems(self, scan: Scan) -> None:
        self.skipped = (*scan.unreadable, *self._busy)
        self.left_out = scan.left_out + len(self.skipped)
        if self.total_size > MAX_OFFSET:
            self._problems.append(Problem(".", f"an archive of {self.total_size} bytes is more than a file can have"))
        unreadable = [] if self._skip_unreadable else scan.unreadable
        busy = [] if self._skip_busy else self._busy
        problems = self._problems + scan.restless
        if problems:
            raise TapeConstraintError(problems + unreadable + busy)
        if unreadable:
            raise SourceUnreadableError(unreadable + busy)
        if busy:
            raise SourceBusyError(busy)

    def _members(self, scan: Iterable[ustar.Facts]) -> Iterator[ustar.Facts]:
        """Every member, in order; what does not fit goes to `_problems`."""
        position = count = 0
        recent, problems, longest_unsplit = self._recent, self._problems, ustar.LONGEST_UNSPLIT
        for facts in scan:
            name, _, size, mtime_ns, _, ctime_ns, target, _ = facts
            if (target or len(name) > longest_unsplit) and not self._fits(facts):
                continue
            if ctime_ns > recent or mtime_ns > recent:
                self._note_if_fresh(facts)
            position += span(size)
            count += 1
            if not problems and position <= MAX_OFFSET:
                yield facts
            if count % _PROGRESS_EVERY == 0:
                self.latest = path_of(name)
                self._on_progress(count, position)
        self.member_count, self.total_size = count, position + FOOTER

    def _fits(self, facts: ustar.Facts) -> bool:
        """Whether name and target have a place in a header; if not, why is noted."""
        try:
            ustar.check_target(facts[6])
            ustar.split_name(facts[0])
        except ValueError as error:
            self._problems.append(Problem(os.fsdecode(path_of(facts[0])), str(error)))
            return False
        return True

    def _settled(self, folder: Folder, name: bytes, path: bytes, seen: Seen) -> Seen | None:
        """What to record of a file that changed lately: a `stat` taken while nobody writes it, if there is one."""
        if not seen[3]:
            return seen
        settled = self._patiently(lambda: folder.settled(name))
        if settled is None:
            self._busy.append(_busy(path))
            return None
        return seen_of(settled)

    def _patiently(self, look: Callable[[], os.stat_result | None]) -> os.stat_result | None:
        """What `look` gives; while that is nothing, again, as long as this recording has patience."""
        while (found := look()) is None and self._patience > 0:
            time.sleep(_PAUSE)
            self._patience -= _PAUSE
        return found

    def _note_if_fresh(self, facts: ustar.Facts) -> None:
        """Remembers a member whose stamp could be given once more to a change that is yet to come."""
        now, stamps = time.time_ns(), (facts[3], facts[5])
        ticks = ((stamp, _TICK_NS if stamp % 10**9 else _COARSE_TICK_NS) for stamp in stamps)
        past = max((stamp + tick for stamp, tick in ticks if stamp <= now), default=0)
        if now < past:
            self._fresh.append((past, facts))
            if len(self._fresh) >= _FRESH_AT_ONCE:
                self._settle()

    def _settle(self) -> None:
        """Waits until no fresh member's stamp can be given again, then looks at them once more."""
        if not self._fresh:
            return
        time.sleep(max(0, max(past for past, _ in self._fresh) - time.time_ns()) / 10**9)
        for _, facts in self._fresh:
            member = Member(0, *facts)
            self._check_unchanged(member)
            if member.is_file and member.size:  # somebody may have begun to write it since then, with the same stamp
                try:
                    settled = self._patiently(partial(self._source.settled, member.path))
                finally:
                    self._check_unchanged(member)
                if settled is None:
                    raise SourceBusyError([_busy(member.path)])
        self._fresh.clear()

    def _check_unchanged(self, member: Member) -> None:
        for difference in inspect(member, self._source, at_home=True):
            raise changed(member.path, difference)


def _taken_over(excluded: tuple[str, ...], index_path: str) -> tuple[IsLeftOut | None, Sequence[str]]:
    """What a recording is to leave out that replaces one of which the index says this."""
    if not excluded:
        return None, ()
    if not is_function(excluded):
        with suppress(ValueError):
            return exclusion(excluded)
    reason = f"what it excluded cannot be taken over ({excluded[0]}): say anew what to exclude, or that nothing is"
    raise TapeConstraintError([Problem(index_path, reason)])


def _busy(path: bytes) -> Problem:
    return Problem(os.fsdecode(path), "changed less than a minute ago, and a program has it open for writing")


@lru_cache(maxsize=1024)
def _owner(uid: int, gid: int) -> ustar.Owner:
    try:
        uname = pwd.getpwuid(uid).pw_name
    except KeyError:
        uname = ""
    try:
        gname = grp.getgrgid(gid).gr_name
    except KeyError:
        gname = ""
    return ustar.Owner(uid, gid, os.fsencode(uname)[:31], os.fsencode(gname)[:31])


def _has_tape_folder(source: Source) -> bool:
    try:
        found = source.lstat(TAPE_FOLDER)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(20, "is in the way of the index and not a folder", default_index(source.root))
    return True


def _make_tape_folder(source: Source) -> None:
    """Makes the folder for the index, leaving the root's modification time as it was."""
    before = source.lstat(b"")
    # Before anything is changed: whoever may not set the time back may not record here.
    os.utime(source.root, ns=(before.st_atime_ns, before.st_mtime_ns))
    with signals.undisturbed():
        os.mkdir(os.path.join(source.root, os.fsdecode(TAPE_FOLDER)))
        os.utime(source.root, ns=(before.st_atime_ns, before.st_mtime_ns))


def _remove_tape_folder(source: Source) -> None:
    before = source.lstat(b"")
    with signals.undisturbed():
        try:
            os.rmdir(os.path.join(source.root, os.fsdecode(TAPE_FOLDER)))
        except OSError:
            return  # it was never made, or somebody has put something there
        os.utime(source.root, ns=(before.st_atime_ns, before.st_mtime_ns))
