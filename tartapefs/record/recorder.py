"""The recorder: one pass over the source that fixes where every byte of its archive lies.

Rule: all or nothing. Problems are collected on the way, and raised together at the end, with nothing written. The root
keeps its modification time.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

from tartapefs.archive import hash_tree, ustar
from tartapefs.archive.layout import BLOCK, FOOTER, MAX_OFFSET, head_size, span
from tartapefs.archive.member import path_of
from tartapefs.archive.names import LONGEST_UNSPLIT, why_too_long
from tartapefs.base import forked_work, tape_files
from tartapefs.base.errors import (
    OutputError,
    Problem,
    SourceBusyError,
    SourceUnreadableError,
    TapeBusyError,
    TapeConstraintError,
    TapeExistsError,
)
from tartapefs.base.tape_files import default_index
from tartapefs.index.extender import IndexExtender
from tartapefs.index.reader import Index
from tartapefs.index.schema import YES_OR_NO, TapeFacts
from tartapefs.index.writer import IndexWriter
from tartapefs.record import tape_folder
from tartapefs.record.comparison import Comparison
from tartapefs.record.digesting import extended_tree
from tartapefs.record.options import Asked, Options, replaced_facts, why_foreign
from tartapefs.record.owners import owner_of
from tartapefs.record.settling import Settling, Unsettled
from tartapefs.record.summary import Summary
from tartapefs.record.walk import Walk
from tartapefs.source.exclusion import Exclude
from tartapefs.source.folder import Source

_PROGRESS_EVERY = 1024  # members

Progress = Callable[[int, int], None]


class TapeRecorder:
    """Records the folder at `root`.

    `index_path`: where the index goes, `<root>/.tartape/index.db` by default; elsewhere for a source that must not be
    written. `exclude`: a pattern as in .gitignore, several, or a function that is given each path below the root and
    tells whether to leave it out; a directory that is left out takes its content along. `anonymize`: owners are
    written as root, which is the default. `digest`: the algorithm of the digests of contents that the tape is to have,
    "" for none, the default; the index says so, and `seal` makes them. `overwrite`: an existing index is replaced;
    those of `exclude`, `anonymize`, `digest`, `long_names`, `hard_links` and `one_file_system` that are None are then
    as in the recording that is replaced, so that `exclude=()` is needed to leave nothing out.

    `long_names`: a name or a link's target that does not fit into a header of ustar goes into blocks of GNU tar before
    it, up to a path of 4,095 bytes; without, the default, it is a problem, in TapeConstraintError. `hard_links`:
    further names of a file are links to the first; without, the default, full copies. `one_file_system`: of a folder in
    which another file system is mounted the archive has the folder alone; without, the default, all.

    `skip_unreadable`: what this user cannot read is left out, and listed in `skipped`. `skip_busy`: so are files that
    changed within the last minute and that a program has open, or mapped, for writing. `on_progress` is called now and
    then with members and archive bytes so far. `processes`: 1, or 2 to allow a second process, which writes the index.
    It is forked from this process if that has a single thread and a second core, and there are 2,048 members or more;
    it ends before `commit` returns.

    `append`: what is new is added to the recording that is there, as a generation of its own, with that recording's
    options; the archive before, without its footer, is a prefix of the new one. Something that was recorded, and
    changed or is gone, is a problem, in TapeConstraintError. If nothing is new, the index stays as it is.

    Raises ValueError for a malformed pattern, an unknown algorithm, options that `append` does not take, and another
    number of processes.

    Attributes: `root` and `index_path`, absolute paths; `latest`, the path below the root, as bytes, of the last member
    when `on_progress` was called; `too_long`, how many problems `long_names` solves; `valid_prefix`, where `append` is
    refused: up to which byte existing copies would stay valid if the folder was recorded anew. After `commit`:
    `member_count`; `total_size`, of the archive, in bytes; `summary`, a `summary.Summary` of what the archive holds
    otherwise than the folder, after `append` of the whole folder, too; `skipped`, the Problems of what was left out for
    `skip_unreadable` and `skip_busy`; `left_out`, how many these are, with sockets, pipes and devices; `excluded`,
    `owners_kept`, `long_names`, `hard_links`, `one_file_system`, `due_algorithm` and `due_block_size` (bytes), as the
    index says; `replaced`, what the index before said, or None; `not_taken_over`, why it said nothing although it
    existed.
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
        append: bool = False,
        long_names: bool | None = None,
        hard_links: bool | None = None,
        one_file_system: bool | None = None,
    ) -> None:
        forked_work.check_processes(processes)
        kept = exclude, anonymize, digest, long_names, hard_links, one_file_system
        if append and (overwrite or kept != (None,) * 6):
            raise ValueError("a recording that is appended to keeps its options, and is not replaced")
        self.root = os.path.realpath(root)
        self.index_path = os.path.abspath(index_path) if index_path else default_index(self.root)
        self._own_folder = index_path is None
        self._asked = Asked(exclude, anonymize, digest, long_names, hard_links, one_file_system)
        self._set_options(Options())
        self.replaced: TapeFacts | None = None
        self.not_taken_over = ""
        self._overwrite = overwrite
        self._append = append
        self._skip_unreadable = skip_unreadable
        self._skip_busy = skip_busy
        self._processes = processes
        self._on_progress = on_progress or (lambda members, size: None)
        self._begin()

    def _set_options(self, options: Options) -> None:
        self._is_left_out = options.is_left_out
        self.excluded: Sequence[str] = options.excluded
        self.owners_kept = options.owners_kept
        self.long_names = options.long_names
        self.hard_links = options.hard_links
        self.one_file_system = options.one_file_system
        self.due_algorithm, self.due_block_size = options.due_algorithm, options.due_block_size

    def _begin(self) -> None:
        """Forgets what an earlier recording found."""
        self._problems: list[Problem] = []
        self.skipped: tuple[Problem, ...] = ()
        self.left_out = 0
        self.summary = Summary(None, b"")
        self._closed: set[bytes] = set()
        self.member_count = 0
        self.total_size = 0
        self.valid_prefix = 0
        self.too_long = 0
        self.latest = b""

    def commit(self) -> str:
        """Records, and returns the fingerprint: SHA-256 over all headers, 64 hex digits. May be called again.

        Raises TapeExistsError, TapeBusyError, TapeConstraintError, SourceUnreadableError and SourceBusyError (each with
        `problems`), TapeIntegrityError if the folder changes meanwhile, and OSError if the disk fails or is full. Then
        an index that was there before is untouched.
        """
        if not os.path.basename(self.root):
            raise TapeConstraintError([Problem(self.root, "a root folder without a name cannot be archived")])
        self._begin()
        self._check_index_path()
        with Source(self.root) as source:
            if not self._own_folder:
                return self._record(source)
            try:  # or the slower of two recorders would touch the root after the other has recorded its times
                source.lock()
            except BlockingIOError:
                raise TapeBusyError(self.index_path) from None
            return self._record_inside(source)

    def _record_inside(self, source: Source) -> str:
        was_there = tape_folder.exists(source)
        try:
            if not was_there:
                tape_folder.make(source)
            return self._record(source)
        except BaseException:
            if not was_there:
                tape_folder.remove(source)
            raise

    def _check_index_path(self) -> None:
        exists = os.path.lexists(self.index_path)
        if exists and not self._own_folder and not tape_files.is_index(self.index_path):
            reason = "is in the way of the index and none itself; move it, or choose another place"
            raise TapeConstraintError([Problem(self.index_path, reason)])
        if exists and not (self._overwrite or self._append):
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
        if not self._skip_busy:  # or files that a program writes are to be expected
            try:
                return self._record_once(source, at_once=True)
            except Unsettled:
                self._begin()
        return self._record_once(source, at_once=False)

    def _record_once(self, source: Source, at_once: bool) -> str:
        """Records; `at_once`: files that changed lately are settled many at a time, which may raise Unsettled."""
        if self._append:
            with closing(Index(self.index_path)) as tape:
                return self._record_generation(source, tape, at_once)
        with IndexWriter(self.index_path, processes=self._processes) as writer:
            if os.path.lexists(self.index_path) and not self._overwrite:  # now that no other recorder runs
                raise TapeExistsError(self.index_path)
            self.replaced, self.not_taken_over = replaced_facts(self.index_path, source, self._own_folder)
            self._set_options(self._asked.completed(self.replaced, self.index_path))
            recorded_ns = time.time_ns()
            root_name = os.fsencode(os.path.basename(self.root))
            settling = Settling(source, recorded_ns, at_once)
            walk = self._walk(source, root_name, settling)
            fingerprint = writer.add(self._members(walk, settling), self._check(settling))
            settling.finish()
            self._raise_problems(walk, settling)
            self._on_progress(self.member_count, self.total_size)
            writer.commit(
                {
                    "root_name": root_name,
                    "fingerprint": fingerprint,
                    "total_size": self.total_size,
                    "member_count": self.member_count,
                    "recorded_ns": self._earlier_recording(fingerprint) or recorded_ns,
                    "excluded": json.dumps(list(self.excluded)),
                    "left_out": self.left_out,
                    "owners_kept": int(self.owners_kept),
                    "root_ino": source.ino,
                }
                | {option: 1 for option in YES_OR_NO if getattr(self, option)}
                | self._due_facts()
            )
        return fingerprint

    def _walk(self, source: Source, root_name: bytes, settling: Settling) -> Walk:
        owner = owner_of if self.owners_kept else None
        root, since = root_name + b"/", settling.since
        settled = None if settling.at_once else settling.settled
        walk = Walk(source, root, self._is_left_out, owner, settled, since, self.one_file_system, self.hard_links)
        self.summary, self._closed = walk.summary, walk.closed
        return walk

    def _check(self, settling: Settling) -> Callable[[list[ustar.Facts]], None]:
        """What both processes do with members, some at a time."""
        summary = self.summary

        def check(members: list[ustar.Facts]) -> None:
            settling.check(members)
            summary.add_attributes(members)

        return check

    def _record_generation(self, source: Source, tape: Index, at_once: bool) -> str:
        """Adds to the tape what is new. Without anything new the index stays as it is."""
        before = tape.facts
        if reason := why_foreign(before, source, self._own_folder):
            raise TapeConstraintError([Problem(self.index_path, reason)])
        self.replaced, self.not_taken_over = before, ""
        self._set_options(self._asked.completed(before, self.index_path))
        with IndexExtender(tape, self._processes) as writer:
            recorded_ns = time.time_ns()
            settling = Settling(source, recorded_ns, at_once)
            walk = self._walk(source, before.root_name, settling)
            comparison = Comparison(tape, source, walk, self._problems)
            members = self._members(comparison, settling, before.end, before.member_count)
            fingerprint = writer.add(members, self._check(settling))
            self.valid_prefix = comparison.valid
            settling.finish()
            self._raise_problems(walk, settling)
            self._on_progress(self.member_count, self.total_size)
            if self.member_count > before.member_count:
                writer.supersede(comparison.superseded)
                facts = before.to_keep() | {
                    "fingerprint": fingerprint,
                    "total_size": self.total_size,
                    "member_count": self.member_count,
                    "recorded_ns": recorded_ns,
                    "left_out": self.left_out,
                }
                digests = self._extended_seal(source, tape, writer) if before.seal else self._due_facts()
                writer.commit(facts | digests, tape.is_at_home(source.ino))
        return fingerprint

    def _extended_seal(self, source: Source, tape: Index, writer: IndexExtender) -> dict[str, Any]:
        """Writes the digests of what was added to a sealed tape; returns the facts of its seal."""
        before = tape.facts
        hash_, builder = hash_tree.hasher(before.algorithm), tape.tree_builder()
        writer.add_digests_of(lambda members: extended_tree(source, members, builder, hash_, before.block_size))
        return {
            "seal": builder.seal,
            "algorithm": before.algorithm,
            "block_size": before.block_size,
            "levels": builder.levels,
            "unsealed_rows": writer.rows_digest,
        }

    def _due_facts(self) -> dict[str, Any]:
        if not self.due_algorithm:
            return {}
        return {"due_algorithm": self.due_algorithm, "due_block_size": self.due_block_size}

    def _earlier_recording(self, fingerprint: str) -> int | None:
        """When the same archive was recorded first, in ns, if the index that is about to be replaced holds it."""
        before = self.replaced
        return before.recorded_ns if before and before.fingerprint == fingerprint else None

    def _raise_problems(self, walk: Walk, settling: Settling) -> None:
        self.skipped = (*walk.unreadable, *settling.busy)
        self.left_out = walk.left_out + len(self.skipped)
        if self.total_size > MAX_OFFSET:
            self._problems.append(Problem(".", f"an archive of {self.total_size} bytes is more than a file can have"))
        unreadable = [] if self._skip_unreadable else walk.unreadable
        busy = [] if self._skip_busy else settling.busy
        problems = self._problems + walk.unstable
        if problems:
            raise TapeConstraintError(problems + unreadable + busy)
        if unreadable:
            raise SourceUnreadableError(unreadable + busy)
        if busy:
            raise SourceBusyError(busy)

    def _members(
        self, walk: Iterable[ustar.Facts], settling: Settling, position: int = 0, count: int = 0
    ) -> Iterator[ustar.Facts]:
        """Yields the members in order, without those that do not fit into a header, which become problems.

        `position`, `count`: where the first one starts, and how many members the tape has before it.
        """
        since, problems, closed = settling.fresh_since, self._problems, self._closed
        for facts in walk:
            name, _, size, mtime_ns, _, ctime_ns, target, _ = facts
            head = BLOCK
            if target or len(name) > LONGEST_UNSPLIT:
                if not self._fits(name, target):
                    continue
                head = head_size(name, target)
            if (ctime_ns > since or mtime_ns > since) and name not in closed:
                settling.note_if_fresh(facts)
            position += span(size, head)
            count += 1
            if not problems and position <= MAX_OFFSET:
                yield facts
            elif settling.leaves_open(facts):  # whether a program writes it is to be told with the problems
                raise Unsettled
            if count % _PROGRESS_EVERY == 0:
                self.latest = path_of(name)
                self._on_progress(count, position)
        self.member_count, self.total_size = count, position + FOOTER

    def _fits(self, name: bytes, target: bytes) -> bool:
        """Whether name and target fit into a header; if not, notes the problem."""
        reason = why_too_long(name, target, self.long_names)
        if reason is not None:
            self._problems.append(Problem(os.fsdecode(path_of(name)), reason))
            self.too_long += why_too_long(name, target, long_names=True) is None
        return reason is None
