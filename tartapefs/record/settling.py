"""Settling: takes the `stat` of files that changed lately so that no later change can hide from it.

Rule: a change could hide in two ways, and both are closed here. A change within the granularity of the timestamp that
it moves leaves the same stamp: a member that fresh is compared again once the clock has moved on. A `write` moves the
stamp when it begins, a mapping at the first store to a page, and neither by what follows: a file that changed within
the last minute is recorded by a `stat` taken while the kernel grants that no program writes it (`source.leases`).

Nearly always nobody writes. So the walk goes on with the `stat` that it has, and `check` compares it, many files at a
time and in both processes, with one taken so. If it finds another, or a writer, all is recorded again by `settled`,
one file after the other.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter

from tartapefs.archive import ustar
from tartapefs.archive.member import Member
from tartapefs.base.errors import Problem, SourceBusyError
from tartapefs.record.walk import Seen, changed, seen_of
from tartapefs.source.drift import inspect
from tartapefs.source.folder import Folder, Source

_RECENT_NS = 60 * 10**9  # a file changed since then may be in the middle of a change
_PATIENCE = 2.0  # seconds that one recording waits in all for programs to close the files that they write
_PAUSE = 0.02  # seconds between two tries
_TICK_NS = 20 * 10**6  # the kernel stamps files from a clock that moves every 1 to 10 ms
_COARSE_TICK_NS = 2 * 10**9  # a stamp of whole seconds: of a file system that counts by seconds, or by two (FAT)
_FRESH_AT_ONCE = 4096  # how many fresh members are remembered before waiting for the clock
_witness_of = attrgetter("st_mode", "st_size", "st_mtime_ns", "st_ino", "st_ctime_ns")


class Unsettled(Exception):
    """A file changes, or a program writes it, while the folder is being recorded."""


class Settling:
    """The members of one recording that changed lately.

    `at_once`: by `check`, else by `settled`.

    Attributes: `since` (ns), a member that changed later changed lately; `fresh_since` (ns), one that did not change
    later is not as fresh as the clock; `busy`, the files left out because a program writes them.
    """

    def __init__(self, source: Source, now_ns: int, at_once: bool) -> None:
        self.at_once = at_once
        self.since = now_ns - _RECENT_NS
        self.fresh_since = now_ns - _COARSE_TICK_NS
        self.busy: list[Problem] = []
        self._source = source
        self._patience = _PATIENCE
        self._fresh: list[tuple[int, ustar.Facts]] = []

    def check(self, members: list[ustar.Facts]) -> None:
        """Raises Unsettled unless those that changed lately are as these facts say, and no program writes them."""
        if not self.at_once:
            return
        since, folder, opened = self.since, None, b""
        try:
            for name, mode, size, mtime_ns, ino, ctime_ns, _, _ in members:
                if size and (ctime_ns > since or mtime_ns > since):  # as `leaves_open`, a call of which would cost
                    above, _, last = name.rpartition(b"/")
                    if folder is None or above != opened:
                        if folder is not None:
                            folder.close()
                            folder = None
                        folder, opened = self._source.folder(above.partition(b"/")[2]), above
                    found = folder.stat_without_writers(last)
                    if found is None or _witness_of(found) != (mode, size, mtime_ns, ino, ctime_ns):
                        raise Unsettled
        except OSError:
            raise Unsettled from None
        finally:
            if folder is not None:
                folder.close()

    def leaves_open(self, facts: ustar.Facts) -> bool:
        """Whether a program may be writing this member for all that the walk has seen."""
        changed_lately = facts[5] > self.since or facts[3] > self.since
        return self.at_once and changed_lately and facts[2] > 0  # to be written, an empty file changes its size

    def settled(self, folder: Folder, name: bytes, path: bytes, seen: Seen) -> Seen | None:
        """The `stat` to record of a file that changed lately, taken while no program writes it; None if one does."""
        if not seen[3]:  # whatever is written to an empty file moves its size
            return seen
        settled = folder.stat_without_writers(name) or self._retry(lambda: folder.stat_without_writers(name))
        if settled is None:
            self.busy.append(_busy(path))
            return None
        return seen_of(settled)

    def note_if_fresh(self, facts: ustar.Facts) -> None:
        """Remembers a member if a change that is yet to come could get the same stamp."""
        now, stamps = time.time_ns(), (facts[3], facts[5])
        if max(stamps) + _COARSE_TICK_NS < now:  # nearly all, also of a folder that was filled in this minute
            return
        ticks = ((stamp, _TICK_NS if stamp % 10**9 else _COARSE_TICK_NS) for stamp in stamps)
        past = max((stamp + tick for stamp, tick in ticks if stamp <= now), default=0)
        if now < past:
            self._fresh.append((past, facts))
            if len(self._fresh) >= _FRESH_AT_ONCE:
                self.finish()

    def finish(self) -> None:
        """Waits until no change can get the stamp of a fresh member any more, then compares these members again.

        Raises TapeIntegrityError if one changed meanwhile, and SourceBusyError if a program writes one by now.
        """
        if not self._fresh:
            return
        time.sleep(max(0, max(past for past, _ in self._fresh) - time.time_ns()) / 10**9)
        for _, facts in self._fresh:
            member = Member(0, *facts)
            self._check_unchanged(member)
            if member.is_file and member.size:  # a write may have begun since then, with the same stamp
                try:
                    settled = self._retry(partial(self._source.stat_without_writers, member.path))
                finally:
                    self._check_unchanged(member)
                if settled is None:
                    raise SourceBusyError([_busy(member.path)])
        self._fresh.clear()

    def _retry(self, look: Callable[[], os.stat_result | None]) -> os.stat_result | None:
        """Calls `look` until it returns a `stat`, or the patience of this recording is used up."""
        while (found := look()) is None and self._patience > 0:
            time.sleep(_PAUSE)
            self._patience -= _PAUSE
        return found

    def _check_unchanged(self, member: Member) -> None:
        for difference in inspect(member, self._source, at_home=True):
            raise changed(member.path, difference)


def _busy(path: bytes) -> Problem:
    return Problem(os.fsdecode(path), "changed less than a minute ago, and a program has it open for writing")
