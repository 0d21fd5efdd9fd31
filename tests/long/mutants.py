"""Takes each integrity check out of the package in turn, and sees that a test then fails: `make mutants`.

    python tests/long/mutants.py [MODULE ...]

A check that no test misses is a check that the next change may lose. Every mutant is one textual change to a copy of
the package; the tests run against that copy. Exits 1 if a mutant survives, or if its text is no longer there.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """`old` becomes `new` in `module`; one of `tests` (arguments of pytest) has to fail then."""

    says: str
    module: str
    old: str
    new: str
    tests: str


ASSEMBLE = "unit/play/test_assemble.py"
DESCRIPTORS = "unit/play/test_descriptor_cache.py unit/play/test_assemble.py"
PLAYER = "unit/play/test_assemble.py unit/play/test_engine.py"
INTEGRITY = "unit/source/test_drift.py"
INDEX = "unit/index/test_reader.py"
CONNECTIONS = "unit/index/test_connections.py"
SCHEMA = "unit/index/test_schema.py"
UNPACK = "unit/index/test_row_codec.py -k 'limits or rows_that or counts or number_of or parts_that'"
WALK = "unit/record/test_walk.py"
OPTIONS = "unit/record/test_options.py"
INSPECTION = "unit/play/test_inspection.py"
APPEND = "unit/record/test_append.py"
COMPARISON = "unit/record/test_comparison.py " + APPEND
AUDIT = "unit/play/test_audit.py"
SYSTEM_CALLS = "unit/source/test_system_calls.py"
SETTLING = "unit/record/test_settling.py"
FS = "unit/mount/test_operations.py"
SESSION = "unit/mount/test_session.py"
FILES = "unit/api/test_files.py"
SHARDS = "unit/index/test_shards.py"
STRATEGY = "unit/play/test_read_strategy.py"
HELPER = "unit/play/test_helper_process.py"
STREAM = "unit/play/test_playback.py unit/play/test_playback_with_helper.py"
SEALS = "unit/verify/test_seal.py"
VERIFIED_BLOCKS = "unit/play/test_verified_blocks.py"
SEALED_READER = "unit/index/test_sealed_reader.py"
HASH_TREE = "unit/archive/test_hash_tree.py"
SEALED_MOUNT = "system/test_sealed_mount.py"
EXTRACTED = "unit/verify/test_extracted.py"
GENERATIONS = "system/test_generations.py"
RESTORE = "unit/verify/test_restore.py"
COPIES = "unit/transfer/test_copies.py"
CRC_DIGEST = "unit/transfer/test_crc_digest.py"
S3_OBJECT = "unit/transfer/test_s3_object.py"
PARTS_FOLDER = "unit/transfer/test_parts_folder.py"
UPLOADS = "unit/transfer/test_distributed.py"
RESUMABLE_HASH = "unit/base/test_resumable_hash.py"
OUTPUTS = "system/test_outputs.py"
SAVED_STATE = "unit/base/test_saved_state.py"
LONG_NAMES = "system/test_long_names.py"
ONE_FILE_SYSTEM = "system/test_one_file_system.py"
HARD_LINKS = "system/test_hard_links.py"
BEHIND = "system/test_behind.py"
HOLES = "system/test_holes.py"

MUTANTS = [
    Mutant("type and mode are compared", "source/drift.py", "found.st_mode == member.mode", "True", INTEGRITY),
    Mutant("the mtime is compared", "source/drift.py", "and found.st_mtime_ns == member.mtime_ns", "", INTEGRITY),
    Mutant("the inode is compared", "source/drift.py", "found.st_ino == member.ino and ", "", INTEGRITY),
    Mutant("the ctime is compared", "source/drift.py", " and found.st_ctime_ns == member.ctime_ns)", ")", INTEGRITY),
    Mutant(
        "a link's target is compared", "source/drift.py", "if member.target else None", "if False else None", INTEGRITY
    ),
    Mutant(
        "a body is checked after it was read",
        "play/assemble.py",
        "if seen != member[2:7] and not agrees(member, found, at_home):",
        "if False:",
        ASSEMBLE,
    ),
    Mutant(
        "so is one of a file that was kept open",
        "play/descriptor_cache.py",
        " and agrees(member, found, at_home)",
        "",
        DESCRIPTORS,
    ),
    Mutant(
        "whose path leads to it",
        "source/folder.py",
        "if found.st_ino != ino or found.st_dev != dev:",
        "if False:",
        DESCRIPTORS,
    ),
    Mutant(
        "and by no link",
        "source/folder.py",
        "if not all(stat.S_ISDIR(one.st_mode) for one in found[:-1]):",
        "if False:",
        DESCRIPTORS,
    ),
    Mutant(
        "no stat is answered by the kernel's cache",
        "source/system_calls.py",
        "_AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC",
        "_AT_EMPTY_PATH",
        BEHIND,
    ),
    Mutant(
        "not in a folder that is mounted in the source either",
        "source/file_systems.py",
        "return found if found.st_dev == local else lstat_uncached(fd)",
        "return found",
        BEHIND,
    ),
    Mutant(
        "names that a server may have kept are looked at again",
        "play/inspection.py",
        " and self.source.is_local(found)",
        "",
        BEHIND,
    ),
    Mutant(
        "a hole is waited for",
        "source/folder.py",
        "fstat(fd, self._local) if self.wait_for_holes(fd, found.st_dev) else found",
        "found",
        HOLES,
    ),
    Mutant(
        "in a file that was kept open, too",
        "play/descriptor_cache.py",
        "self._source.wait_for_holes(fd, resolved[-1][1])",
        "pass",
        HOLES,
    ),
    Mutant(
        "nor is one kept that others change",
        "source/folder.py",
        "if any(one.st_dev != self._local for one in found):",
        "if False:",
        DESCRIPTORS,
    ),
    Mutant(
        "what is short is read anew",
        "play/descriptor_cache.py",
        "if os.preadv(fd, (part,), position) == len(part):",
        "if os.preadv(fd, (part,), position):",
        DESCRIPTORS,
    ),
    Mutant(
        "large files close when nobody reads",
        "mount/operations.py",
        "            self._player.rest()\n",
        "            pass\n",
        "system/test_mounted.py -k stays_open",
    ),
    Mutant("members without a body are checked", "play/assemble.py", "self._check(member)\n", "pass\n", ASSEMBLE),
    Mutant("the root's path is checked", "source/drift.py", "if not source.is_at_its_path():", "if False:", PLAYER),
    Mutant("a path that strays is drift", "play/assemble.py", "failure.errno in _NOT_BELOW", "False", ASSEMBLE),
    Mutant(
        "the first drift is kept",
        "play/engine.py",
        "                self.drift = error.again()",
        "                pass",
        PLAYER,
    ),
    Mutant("drift stops every later read", "play/engine.py", "if self.drift is not None:", "if False:", PLAYER),
    Mutant("a file that ends early is an error", "play/assemble.py", "read_all(fd, part, position)", "pass", ASSEMBLE),
    Mutant(
        "the footer waits for an audit",
        "play/engine.py",
        "if self._audited < max(",
        "if False and self._audited < max(",
        PLAYER,
    ),
    *[
        Mutant(says, module, old, new, f"{GENERATIONS} -k '{tests}'")
        for says, module, old, new, tests in (
            (
                "an extension goes on where the old archive ends",
                "transfer/index_diff.py",
                "if prefix != self.old.facts.end or not added or added[0].start != prefix:",
                "if not added:",
                "no_extension",
            ),
            (
                "a hint cuts the footer of the archive before",
                "cli/resume_hint.py",
                "if generation.stop < have <= generation.stop + FOOTER:",
                "if False:",
                "hints",
            ),
            (
                "and nothing behind it",
                "cli/resume_hint.py",
                "if generation.stop < have <= generation.stop + FOOTER:",
                "if generation.stop < have:",
                "hints",
            ),
            (
                "a copy of the archive before is of its size",
                "transfer/copies.py",
                "if (found.wrong, found.size) == (generation.stop, generation.stop + FOOTER):",
                "if found.wrong == generation.stop:",
                "the_archive_before",
            ),
            (
                "and ends in its footer",
                "transfer/copies.py",
                "is_footer = not any(copy.read(generation.stop, FOOTER))",
                "is_footer = True",
                "the_archive_before",
            ),
            (
                "which a stream has shown",
                "transfer/copies.py",
                "is_footer = any(start <= generation.stop and stop == found.size for start, stop in found.zeros)",
                "is_footer = True",
                "the_archive_before",
            ),
            (
                "an earlier generation is told by its fingerprint",
                "index/recording.py",
                "            if generation.fingerprint == value:\n                what",
                "            if True:\n                what",
                "earlier_generation",
            ),
        )
    ],
    *[
        Mutant(says, "record/comparison.py", old, new, COMPARISON)
        for says, old, new in (
            ("what changed is not appended to", 'self._note(old, "; ".join(', '("; ".join('),
            ("nor what is gone at the end", "        self._note_gone()\n", ""),
            ("what is gone is noted on the way", "lowest = self._note_gone(key)", "lowest = key"),
            ("a folder's latest header counts", '(name[-1:] == b"/" and not is_one)', "False"),
            ("and not the first that comes", "other[0].start < member.start", "False"),
            ("what lies in a folder that is gone is not named", "if not name.startswith(self._replaced):", "if True:"),
            ("what is equal at a glance has its inode and ctime", "old[1:8] == facts[:7]", "old[1:5] == facts[:4]"),
            ("a file's facts are compared", "(mode, size, mtime_ns, target) == (", "() != ("),
            ("its inode and ctime too", "(ino, ctime_ns) == (old.ino, old.ctime_ns)", "True"),
            ("a folder's mtime is compared", " and mtime_ns // _NS == old.mtime_ns // _NS", ""),
            ("a header that is outdated is noted", "self.superseded.append(old.start)", "pass"),
            ("what follows a difference is not valid", "            if self._is_valid:\n", "            if True:\n"),
        )
    ],
    Mutant(
        "contents that change while they are hashed are refused",
        "record/digesting.py",
        "if not agrees(member, found, at_home=True):",
        "if False:",
        APPEND + " -k sealed",
    ),
    Mutant(
        "and the file system is asked whether they did",
        "record/digesting.py",
        "found = source.fstat(fd)",
        "found = os.fstat(fd)",
        BEHIND + " -k appended",
    ),
    Mutant(
        "what is extended has its digests",
        "index/extender.py",
        "if (digest.hexdigest(), fingerprint.hexdigest()) != (",
        "if () != () == (",
        APPEND + " -k 'damaged or exchanged'",
    ),
    Mutant(
        "a row of a generation has its checksum",
        "index/schema.py",
        "if row_crc(start, members, recorded_ns, blob=fingerprint) != crc or",
        "if",
        APPEND + " -k 'damaged or exchanged'",
    ),
    Mutant(
        "generations add up",
        "index/schema.py",
        "if found[0].start or sum(generation.members for generation in found) != tape.member_count:",
        "if False:",
        APPEND + " -k 'damaged or exchanged'",
    ),
    Mutant(
        "an outdated header is known by its checksum",
        "index/reader.py",
        "if schema.row_crc(start) != crc:",
        "if False:",
        APPEND + " -k 'damaged or exchanged'",
    ),
    Mutant("the audit looks at directories", "play/audit.py", "found = inspector.inspect(folder)", "found = ()", AUDIT),
    *[
        Mutant(says, "play/inspection.py", old, new, INSPECTION)
        for says, old, new in (
            ("names decide on times alone", "if not only_times(differences(", "if False and (("),
            ("every recorded name is there", "return child is None", "return True"),
            ("each is of its type", "if stat.S_IFMT(found.st_mode) != stat.S_IFMT(child.mode):", "if False:"),
            ("each has its inode", "if self.at_home and found.st_ino", "if False and found.st_ino"),
            ("no other is there that counts", "elif self._is_member(", "elif False and self._is_member("),
            (
                "a function cannot be asked again",
                "self._is_excluded or _excludes_nothing",
                "self._is_excluded or (lambda *_: True)",
            ),
            ("an addition that nobody allowed is drift", "if not self._allow_additions:", "if False:"),
            ("what is fresh is looked at again", " and begun - max(stamps[:2]) > _TICK_NS", ""),
            ("what moved is looked at again", "if self._unchanged.get(member.start) == stamps:", "if self._unchanged:"),
            ("a look is at a folder at rest", "if _stamps(folder.stat()) != stamps:", "if False:"),
        )
    ],
    Mutant(
        "a row's checksum is checked",
        "index/reader.py",
        "if crc32(schema.pack_bytes(start, count, folders, members)) != crc:",
        "if schema.pack_bytes(start, count, folders, members) is crc:",
        INDEX,
    ),
    Mutant(
        "the tape's facts have a digest",
        "index/schema.py",
        'is_intact = facts.pop("facts_digest", None) == facts_digest(facts)',
        'is_intact = facts.pop("facts_digest", None) is not None',
        "unit/index/test_recording.py",
    ),
    Mutant(
        "long names are of a format of their own",
        "index/schema.py",
        "if tape.long_names != has_long_names(version):",
        "if False:",
        LONG_NAMES + " -k format",
    ),
    Mutant(
        "a hard link is of the same file as the name that it is a link to",
        "source/drift.py",
        "is_same = os.path.samestat(found, source.lstat(path_of(member.target)))",
        "is_same = True",
        HARD_LINKS,
    ),
    Mutant(
        "hard links are of a format of their own",
        "index/schema.py",
        "if tape.hard_links != has_hard_links(version):",
        "if False:",
        HARD_LINKS + " -k format",
    ),
    Mutant(
        "a hard link has no body, and leads to another name below the root",
        "index/row_codec.py",
        "if size or not is_below or target == name:",
        "if False:",
        UNPACK,
    ),
    Mutant(
        "one that is extracted is of the file that was extracted for it",
        "verify/destination.py",
        "if _identity(os.lstat(path)) != self._complete.get(member.target):",
        "if False:",
        "unit/verify/test_restore.py",
    ),
    Mutant(
        "what lies on another file system is no addition, if the recording left it out",
        "play/inspection.py",
        "folder.names(self.tape.one_file_system)",
        "folder.names(False)",
        ONE_FILE_SYSTEM,
    ),
    Mutant(
        "names in a folder are compared, whatever is left out elsewhere",
        "source/folder.py",
        "if one_file_system and self.is_beyond(self.stat()):",
        "if one_file_system:",
        ONE_FILE_SYSTEM,
    ),
    Mutant(
        "a long name in a row that has no mark is refused",
        "index/row_codec.py",
        "    if split_name(name := above + strings[0]) is None:",
        "    if not (name := above + strings[0]):",
        UNPACK,
    ),
    Mutant(
        "the body begins behind all of the header", "play/assemble.py", "first + len(header)", "first + 512", LONG_NAMES
    ),
    Mutant(
        "digests that are due are of a kind",
        "index/schema.py",
        'if (tape.due_algorithm, tape.due_block_size) != ("", 0):',
        "if False:",
        SCHEMA + " -k due",
    ),
    Mutant(
        "rows join without a gap",
        "index/reader.py",
        "if following not in (None, end):",
        "if False:",
        INDEX,
    ),
    Mutant("and batches of them", "index/reader.py", "if joins and not page.has_start(start):", "if False:", INDEX),
    Mutant(
        "and those gone back",
        "index/reader.py",
        "if joins and page.stop != stop and not page.has_start(stop):",
        "if False:",
        INDEX,
    ),
    Mutant(
        "connections are to the file that was checked",
        "index/connections.py",
        "if self._is_in_place(found):",
        "if True:",
        CONNECTIONS,
    ),
    Mutant("the schema is ours", "index/connections.py", "if tables != [", "if False and tables != [", CONNECTIONS),
    Mutant("the ends of the tape are checked", "index/reader.py", "            self._check_ends()\n", "", INDEX),
    Mutant(
        "verify counts and sums the rows",
        "index/reader.py",
        "if self._rows_digest() != (self.facts.rows_digest, self.facts.member_count):",
        "if False:",
        INDEX,
    ),
    Mutant(
        "a page covers what it is fetched for",
        "index/reader.py",
        "if not starts[0] <= position < end <= self._end:",
        "if False:",
        INDEX,
    ),
    Mutant(
        "a row that is searched has its checksum",
        "index/name_search.py",
        "packed)) != crc:",
        "packed)) is None:",
        "unit/index/test_name_search.py",
    ),
    Mutant(
        "a filter of names has its checksum",
        "index/name_search.py",
        "or schema.row_crc(place, blob=bits) != crc:",
        "or False:",
        APPEND + " -k damaged_index",
    ),
    Mutant(
        "and its size",
        "index/name_search.py",
        "if not rows or len(bits := self.checked_block(rows[0])) != size:",
        "if not rows or not (bits := self.checked_block(rows[0]) or bytes(1)):",
        "unit/index/test_name_search.py",
    ),
    Mutant(
        "and the digest of generations has it",
        "index/schema.py",
        '    "name_filter": ("place", b"%d %b %d\\n"),\n',
        "",
        APPEND + " -k damaged_index",
    ),
    Mutant(
        "a pack that is searched covers the offset",
        "index/name_search.py",
        "if not start <= position < stop:",
        "if not start <= position:",
        "unit/index/test_name_search.py",
    ),
    *[
        Mutant(says, "index/row_codec.py", old, new, UNPACK)
        for says, old, new in (
            ("a pack has no more than it may", "if not 0 < count <= MOST", "if not 0 < count"),
            ("a pack has all strings", "or len(strings) != 2 * count + folder_total + owner_total", ""),
            ("packs start where blocks do", "if start % BLOCK or stop", "if stop"),
            ("nothing ends beyond the largest offset", "or stop > MAX_OFFSET", ""),
            ("nanoseconds are less than a second", "or max(mtime_nsecs) >= _NS", ""),
            ("those of ctime too", "or max(ctime_nsecs) >= _NS", ""),
            ("names have no way up", "if not _NO_NAMES.isdisjoint(names) or b", "if b"),
            ("names have no slash", ' or b"/" in b"".join(names)', ""),
            ("the root comes first", "if has_root != (names[0] == root[:-1]) or", "if"),
            (
                "all but the root lie in a folder",
                ' or b"" in above[has_root:]',
                "",
            ),
            ("the root is a folder", "if has_root and modes[0] & 0o170000 != _FOLDER:", "if False:"),
            ("kinds are checked where folders are said to be", "if folder_count or any(targets)", "if any(targets)"),
            ("kinds are checked where targets are", "if folder_count or any(targets) or", "if folder_count or"),
            (
                "kinds are checked where some are no files",
                " or any(mode & 0o170000 != _FILE for mode in set(modes)):",
                ":",
            ),
            ("packs tell whether names fit", "has_long != (max(heads) > BLOCK) or ", ""),
            ("names fit into a path", " or longest_name > LONGEST_PATH", ""),
            (
                "with long names, too, nothing ends beyond the largest offset",
                "        if stop > MAX_OFFSET:",
                "        if False:",
            ),
            ("folders lie in the root", "folder.startswith(root) and ", ""),
            ("folders end with a slash", 'folder.endswith(b"/") and ', ""),
            ("folders have no way up", ' and _NO_NAMES.isdisjoint(folder[:-1].split(b"/"))', ""),
            ("folders are checked", "if folder and not (", "if False and not ("),
            ("members are of a kind", "not RECORDABLE.issuperset(kinds)", "False"),
            (
                "files alone have a size",
                "or any(size for kind, size in zip(kinds, sizes, strict=True) if kind != _FILE)",
                "",
            ),
            (
                "links, and no others, have targets",
                "or any(bool(target) != (kind == _LINK) for kind, target in zip(kinds, targets, strict=True)"
                " if kind != _FILE)",
                "",
            ),
            (
                "links have targets",
                "any(bool(target) != (kind == _LINK) for",
                "any(target and kind != _LINK for",
            ),
            (
                "others have none",
                "any(bool(target) != (kind == _LINK) for",
                "any(not target and kind == _LINK for",
            ),
            ("targets fit into headers", "if max(map(len, targets)) > longest_target:", "if False:"),
            ("folders are as many as it says", "if kinds.count(_FOLDER) != folder_count:", "if False:"),
            ("their numbers are limited", "{1,10}", "+"),
            ("their names are limited", "{0,31}", "*"),
            ("no owner is taken from nowhere", "if owner_total or any(owned_by) else", "if owner_total else"),
        )
    ],
    Mutant(
        "no link on the way is followed",
        "source/system_calls.py",
        "_RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS",
        "0",
        SYSTEM_CALLS,
    ),
    Mutant(
        "nor without openat2",
        "source/system_calls.py",
        "FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW",
        "FOLDER = os.O_PATH | os.O_DIRECTORY",
        SYSTEM_CALLS,
    ),
    Mutant(
        "files that are being written are refused",
        "source/leases.py",
        "if error.errno == errno.EAGAIN and",
        "if False and",
        SETTLING,
    ),
    Mutant(
        "the witness is taken while nobody writes",
        "record/settling.py",
        "return seen_of(settled)\n",
        "return seen\n",
        SETTLING,
    ),
    Mutant(
        "what the walk saw of a fresh file is compared",
        "record/settling.py",
        "if found is None or _witness_of(found) != (mode, size, mtime_ns, ino, ctime_ns):",
        "if found is None:",
        SETTLING,
    ),
    Mutant(
        "the first process looks at fresh files",
        "base/forked_work.py",
        "in _checked(_batches(items), check, 1, 2):",
        "in _batches(items):",
        SETTLING,
    ),
    Mutant(
        "the second process looks at fresh files",
        "base/forked_work.py",
        "_checked(_received(channel), check, 0, 2)",
        "_received(channel)",
        SETTLING,
    ),
    Mutant(
        "files that are being written are named with other problems",
        "record/recorder.py",
        "elif settling.leaves_open(facts):",
        "elif False:",
        SETTLING,
    ),
    Mutant(
        "who waits for a lease sends no SIGIO",
        "source/leases.py",
        "fcntl.F_SETSIG, signal.SIGURG",
        "fcntl.F_SETSIG, 0",
        SETTLING,
    ),
    Mutant(
        "without leases dirty pages are written first", "source/leases.py", "        _write_back(fd)\n", "", SETTLING
    ),
    Mutant(
        "what is fresh is not busy in the end",
        "record/settling.py",
        "if settled is None:\n                    raise",
        "if False:\n                    raise",
        SETTLING,
    ),
    Mutant(
        "fresh members are looked at again",
        "record/recorder.py",
        "            settling.finish()\n            self._raise_problems",
        "            self._raise_problems",
        SETTLING,
    ),
    Mutant(
        "a folder that changes meanwhile is drift",
        "record/walk.py",
        "if mtime_ns != level.mtime_ns and level.name not in self.closed:",
        "if False:",
        WALK,
    ),
    Mutant(
        "pages are dropped at drift",
        "mount/session.py",
        "for file in set(self._files.values()):",
        "for file in ():",
        SESSION,
    ),
    Mutant(
        "reads under way are awaited", "mount/session.py", "while earlier & self._under_way:", "while False:", SESSION
    ),
    Mutant(
        "a footer in the page cache is dropped",
        "mount/session.py",
        "if not (self._footers_under_way or ended.is_set()):",
        "if False:",
        SESSION,
    ),
    Mutant(
        "a footer under way is awaited",
        "mount/session.py",
        "if not (self._footers_under_way or ended.is_set()):",
        "if not ended.is_set():",
        SESSION,
    ),
    Mutant("a part begins where it does", "archive/layout.py", "min(self.start + position, self.stop)", "position", FS),
    Mutant("a part ends where it does", "archive/layout.py", "min(size, self.stop - offset)", "size", FS),
    Mutant(
        "a shard's footer is as long as it is",
        "archive/layout.py",
        "self.size - position - count))",
        "self.zeros))",
        "unit/archive/test_layout.py",
    ),
    Mutant(
        "a shard's footer is written over what an earlier read left",
        "mount/session.py",
        "memory[_BODY + count : stop] = bytes(zeros)",
        "pass",
        FS,
    ),
    Mutant(
        "a sample is not split",
        "index/shards.py",
        "or sample_of(before.name) != sample_of(member.name)",
        "or True",
        SHARDS,
    ),
    Mutant("a sample ends with its generation", "index/shards.py", "member.start in begins or ", "", SHARDS),
    Mutant("a shard's footer counts", "index/shards.py", "full = start + size - FOOTER", "full = start + size", SHARDS),
    Mutant(
        "a footer begins in a part where it does",
        "mount/session.py",
        "= max(0, self._footer - extent.start)",
        "= self._footer",
        SESSION,
    ),
    Mutant("a handle is of its part", "mount/operations.py", "self._find(path) or 0)", "0)", FS),
    Mutant("a listing goes on where it was", "mount/operations.py", "range(offset - 2,", "range(-2,", FS),
    Mutant(
        "a part that changed has another time",
        "api/files.py",
        "bisect_left(self._begins, self.extent(at).stop)",
        "bisect_left(self._begins, self.extent(at).start + 1)",
        FILES,
    ),
    Mutant(
        "a part that did not change has the time of before",
        "api/files.py",
        "bisect_left(self._begins, self.extent(at).stop) - 1",
        "-1",
        FILES,
    ),
    Mutant("there is no part behind the last", "api/files.py", " and number <= self.count", "", FILES),
    Mutant("a part has five digits", "base/naming.py", "[0-9]{5}", "[0-9]+", "unit/base/test_naming.py"),
    Mutant(
        "there are names for all parts",
        "base/naming.py",
        "> MOST_PARTS:",
        "> MOST_PARTS + 1:",
        "unit/base/test_naming.py",
    ),
    Mutant("a session that ends fills no page", "mount/session.py", "elif self._has_ended:", "elif False:", SESSION),
    Mutant(
        "what is as fresh as the clock is looked at again",
        "record/settling.py",
        "if max(stamps) + _COARSE_TICK_NS < now:",
        "if True:",
        SETTLING,
    ),
    Mutant("errors become EIO, not success", "mount/session.py", "-failure, number", "0, number", FS),
    Mutant(
        "a helper that failed is believed nothing",
        "play/read_strategy.py",
        "        if theirs < 0:\n            self._assembler.fill(view, start, stop)\n        else:",
        "        if theirs < 0:\n            pass\n        else:",
        STRATEGY,
    ),
    Mutant(
        "of blocks either",
        "play/read_strategy.py",
        "        if theirs < 0:\n            self._assembler.fill(view, start, stop)\n        self._policy",
        "        if False:\n            pass\n        self._policy",
        STRATEGY,
    ),
    Mutant(
        "a helper that fails says so",
        "play/helper_process.py",
        "        return -1\n\n\ndef _with_md5_sums",
        "        return 1\n\n\ndef _with_md5_sums",
        HELPER,
    ),
    Mutant(
        "sums are of the members that have them", "play/playback.py", "first >= first_summed and", "first and", STREAM
    ),
    Mutant(
        "a stream owns what its helper fills",
        "play/playback.py",
        "if has_own_helper and len(members)",
        "if len(members)",
        STREAM,
    ),
    Mutant("an error in any thread is raised", "play/thread_pool.py", "failures[number] = error", "pass", STRATEGY),
    Mutant(
        "an invalid archive cannot be opened",
        "mount/operations.py",
        "    def _check_valid(self) -> None:\n        if",
        "    def _check_valid(self) -> None:\n        if False and",
        FS,
    ),
    Mutant(
        "a small body has its digest",
        "play/verified_blocks.py",
        "if self._hash(part) != self._tape.block_digests(member, 0, 1):",
        "if False:",
        VERIFIED_BLOCKS + " -k every_byte",
    ),
    Mutant(
        "a whole block has its digest",
        "play/verified_blocks.py",
        "if self._hash(view) != digest:",
        "if False:",
        VERIFIED_BLOCKS + " -k random_flips",
    ),
    Mutant(
        "a block that is kept has its digest",
        "play/verified_blocks.py",
        "if hash_(data) != digest:",
        "if False:",
        VERIFIED_BLOCKS + " -k random_flips",
    ),
    Mutant(
        "what is kept is of the file as it is",
        "play/verified_blocks.py",
        "block.stamps != stamps:\n                if position",
        "False:\n                if position",
        VERIFIED_BLOCKS + " -k block_is_kept",
    ),
    Mutant(
        "folders are judged by their times",
        "play/assemble.py",
        " or member.is_directory or",
        " or",
        VERIFIED_BLOCKS + " -k has_more",
    ),
    Mutant(
        "contents mend nothing but stamps",
        "play/assemble.py",
        " or not only_stamps(found)):",
        "):",
        VERIFIED_BLOCKS + " -k cannot_mend",
    ),
    Mutant(
        "strict is strict",
        "play/assemble.py",
        "self._stamps_count = strict or",
        "self._stamps_count =",
        VERIFIED_BLOCKS + " -k touched",
    ),
    Mutant(
        "a leaf belongs to the seal",
        "index/sealed_reader.py",
        "or not checker.belongs(",
        "or None is (",
        SEALED_READER + " -k another_digest",
    ),
    Mutant(
        "a leaf has no digests too many",
        "index/sealed_reader.py",
        "or at != len(digests)",
        "",
        SEALED_READER + " -k too_many",
    ),
    Mutant(
        "a piece belongs to the seal",
        "index/sealed_reader.py",
        "if not self._checker.belongs(",
        "if None is (",
        SEALED_READER + " -k another_digest",
    ),
    Mutant(
        "a child is among its parent's",
        "archive/hash_tree.py",
        "if not _is_among(child, children):",
        "if False:",
        SEALED_READER + " -k another_digest",
    ),
    Mutant(
        "the way up ends at the seal",
        "archive/hash_tree.py",
        "            if not self.is_top(child):",
        "            if False:",
        SEALED_READER + " -k facts_of_a_seal",
    ),
    Mutant(
        "a hash is no part of two others",
        "archive/hash_tree.py",
        "while at % SIZE and at >= 0:",
        "while False:",
        HASH_TREE + " -k across",
    ),
    Mutant(
        "verify counts digests",
        "index/sealed_reader.py",
        'return self._row_count("piece") == pieces and self._row_count("node") == nodes',
        "return True",
        SEALED_READER + " -k no_sense",
    ),
    Mutant(
        "the seal is the expected one",
        "index/recording.py",
        "if value == self.seal:",
        "if value:",
        SEALED_READER + " -k forger",
    ),
    Mutant(
        "headers have the fingerprint",
        "play/engine.py",
        "                check_headers(self.tape, throttle)\n",
        "",
        SEALED_READER + " -k first_fingerprint",
    ),
    Mutant(
        "the helper is held to contents",
        "play/helper_process.py",
        "strict=assembler.strict,",
        "contents=False,",
        SEALED_MOUNT + " -k helper",
    ),
    *[
        Mutant(says, module, old, new, OPTIONS)
        for says, module, old, new in (
            ("digests are of the same facts", "verify/seal.py", "and old.same_object(body.member) else", "else"),
            ("all of them", "archive/member.py", "self[1:8] == other[1:8]", "self[1:2] == other[1:2]"),
            ("of one home", "verify/seal.py", "at_home and known.is_at_home(source.ino) and", "at_home and"),
            ("of one kind", "verify/seal.py", "tape.algorithm == algorithm and tape.block_size == block_size", "True"),
            (
                "a function is not taken for a pattern",
                "record/options.py",
                "if not is_function(excluded):",
                "if True:",
            ),
            (
                "due digests stay due",
                "record/options.py",
                "before.algorithm or before.due_algorithm",
                "before.algorithm",
            ),
        )
    ],
    Mutant(
        "another recording is not sealed over",
        "verify/seal.py",
        "if not now.is_same(tape):",
        "if False:",
        SEALS + " -k recorded_again",
    ),
    Mutant(
        "a copy stays away from home",
        "index/writer.py",
        "schema.signed(self.ino) if at_home else 0",
        "schema.signed(self.ino)",
        SEALS + " -k not_at_home",
    ),
    Mutant(
        "a member out of a copy has its digests",
        "verify/restore.py",
        "if digest != digests[",
        "if b'' == digests[",
        RESTORE,
    ),
    Mutant("and its header", "verify/restore.py", "if header != member.header():", "if False:", RESTORE),
    Mutant(
        "nothing is written of a member once it was found wrong",
        "verify/destination.py",
        "if self.is_closed or self.is_dropped(member):",
        "if False:",
        "unit/verify/test_destination.py",
    ),
    Mutant(
        "a server that gives no ranges is left",
        "transfer/range_sources.py",
        "if response.status != 206:",
        "if False:",
        "unit/transfer/test_range_sources.py -k without_ranges",
    ),
    Mutant(
        "a file that is replaced while it is read is told",
        "transfer/range_sources.py",
        "if self._first not in (None, found):",
        "if False:",
        "unit/transfer/test_range_sources.py -k replaced",
    ),
    Mutant(
        "a range is the one that was asked for",
        "transfer/range_sources.py",
        "if told is None or int(told[1]) != start:",
        "if told is None:",
        "unit/transfer/test_range_sources.py -k with_another_range",
    ),
    Mutant(
        "a request goes on at the byte where the link broke",
        "transfer/remote_copy.py",
        "self._source.get(position + got,",
        "self._source.get(position,",
        "unit/transfer/test_remote_copy.py -k again_and_again",
    ),
    Mutant(
        "a file that is there is taken for a member only by its digests",
        "verify/restore.py",
        "self._has_contents if self._hash else None",
        "None",
        "unit/cli/test_extract.py",
    ),
    Mutant(
        "its folder is nobody else's meanwhile",
        "verify/destination.py",
        "os.mkdir(name, stat.S_IRWXU,",
        "os.mkdir(name, 0o755,",
        RESTORE,
    ),
    Mutant("and so is the file", "verify/destination.py", "mode=stat.S_IRUSR | stat.S_IWUSR", "mode=0o644", RESTORE),
    Mutant(
        "extracted contents are compared",
        "verify/extracted.py",
        "if self._hash(block) != recorded",
        "if b'' == recorded",
        EXTRACTED,
    ),
    Mutant(
        "headers that a later generation has again are not compared with what was extracted",
        "verify/extracted.py",
        "if member.is_directory and self._tape.is_superseded(member):",
        "if False:",
        GENERATIONS + " -k sealed_tape",
    ),
    Mutant(
        "names of each folder are looked at over all generations",
        "verify/extracted.py",
        "in_order = len(tape.generations) == 1",
        "in_order = True",
        GENERATIONS + " -k sealed_tape",
    ),
    Mutant(
        "a copy of the archive before ends in a footer",
        "transfer/copies.py",
        "is_footer = not any(copy.read(generation.stop, FOOTER))",
        "is_footer = True",
        GENERATIONS + " -k no_copy",
    ),
    Mutant(
        "a digest goes on from before the footer",
        "transfer/range_digests.py",
        'return saved if saved["position"] <= mark else saved.get("at_mark")',
        "return saved",
        GENERATIONS + " -k digests_go_on",
    ),
    Mutant(
        "and so do parts",
        "transfer/range_digests.py",
        "if (int(n) + 1) * size <= mark}",
        "if True}",
        GENERATIONS + " -k digests_go_on",
    ),
    Mutant(
        "no byte is in a CRC twice",
        "transfer/crc_digest.py",
        "if before[1] > start or after[0] < stop:",
        "if False:",
        CRC_DIGEST,
    ),
    Mutant(
        "a segment is joined in its place",
        "transfer/crc_digest.py",
        "self._crc.join(before[2], crc, stop - start)",
        "self._crc.join(crc, before[2], stop - start)",
        CRC_DIGEST,
    ),
    Mutant(
        "what two threads gave at once is looked at again",
        "transfer/crc_digest.py",
        "if not self.join(low, high, self._crc.update(piece, 0)):",
        "if not self.join(low, high, self._crc.update(piece, 0)) and False:",
        CRC_DIGEST,
    ),
    Mutant(
        "segments end where a footer begins",
        "transfer/crc_digest.py",
        "if before[1] == start != self._mark and low:",
        "if before[1] == start and low:",
        GENERATIONS + " -k digests_go_on",
    ),
    Mutant(
        "and those behind are of another archive",
        "transfer/crc_digest.py",
        'for segment in saved["segments"] if segment[1] <= mark]',
        'for segment in saved["segments"]]',
        GENERATIONS + " -k digests_go_on",
    ),
    Mutant(
        "a CRC that misses bytes is none",
        "transfer/crc_digest.py",
        "        if missing:\n",
        "        if False:\n",
        CRC_DIGEST,
    ),
    Mutant(
        "an output is no file of the source by another name",
        "base/tape_files.py",
        " and tape.holds(found):",
        " and False:",
        f"{OUTPUTS} -k 'hard_link or of_a_file'",
    ),
    Mutant(
        "nor below the source, however it is reached",
        "base/tape_files.py",
        "if folder.identity in source[:1]:",
        "if False:",
        f"{OUTPUTS} -k 'no_place_in_another or units_that_is'",
    ),
    Mutant(
        "nor in a folder of it that is mounted elsewhere",
        "base/tape_files.py",
        "folder.is_mount_point\n",
        "False\n",
        f"{OUTPUTS} -k mount_of_a_folder",
    ),
    Mutant(
        "nor in another recorded folder",
        "base/tape_files.py",
        "elif folder.is_recorded:",
        "elif False:",
        f"{OUTPUTS} -k 'another_tape or no_place'",
    ),
    Mutant(
        "a state has its first line",
        "base/saved_state.py",
        "if os.pread(self._fd, len(self._head), 0) != self._head:",
        "if False:",
        SAVED_STATE,
    ),
    Mutant(
        "and the owner who runs the command",
        "base/saved_state.py",
        "if found.st_uid != os.geteuid() and",
        "if False and",
        f"{OUTPUTS} -k adopted",
    ),
    Mutant(
        "and right checksums",
        "base/saved_state.py",
        "if len(content) != size or sha256(content).digest() != checksum:",
        "if len(content) != size:",
        f"{SAVED_STATE} -k 'damaged or exchanged'",
    ),
    Mutant(
        "a copy's holes are looked at",
        "transfer/copies.py",
        "self._in_holes(tail), key",
        "iter(()), key",
        COPIES + " -k hole",
    ),
    Mutant(
        "zeros in copy and archive tell nothing",
        "transfer/copies.py",
        "elif is_zero and not any(",
        "elif False and not any(",
        COPIES + " -k 'wrong_byte or any_break'",
    ),
    Mutant(
        "OpenSSL writes within its struct",
        "base/resumable_hash.py",
        "return is_right and not any(first._context.guard) and not any(second._context.guard)",
        "return is_right",
        RESUMABLE_HASH,
    ),
    Mutant(
        "and is not called in FIPS mode",
        "base/resumable_hash.py",
        "if _hashlib.get_fips_mode():",
        "if False:",
        RESUMABLE_HASH,
    ),
    Mutant(
        "a resumed hash is hashlib's",
        "base/resumable_hash.py",
        "is_right = second.digest() ==",
        "is_right = True or second.digest() ==",
        RESUMABLE_HASH,
    ),
    Mutant(
        "an object is of the size that its label says",
        "transfer/s3_object.py",
        'if label is None or found["ContentLength"] != label.size:',
        "if label is None:",
        S3_OBJECT + " -k label",
    ),
    Mutant(
        "and has as many parts",
        "transfer/s3_object.py",
        'if held.etag.partition("-")[2] in ("", str(parts)) else None',
        "",
        S3_OBJECT + " -k label",
    ),
    Mutant(
        "a part is copied from the object that was seen",
        "transfer/s3_object.py",
        """                CopySourceIfMatch=f'"{held.etag}"',\n""",
        "",
        S3_OBJECT + " -k copy",
    ),
    Mutant(
        "a copied part has an MD5",
        "transfer/s3_object.py",
        "if copied.crc64nvme is None or not copied.etag:",
        "if False:",
        S3_OBJECT + " -k no_md5",
    ),
    Mutant(
        "a part is stored as it was read",
        "transfer/s3_object.py",
        "if not part.equals(stored) and not compared_at_the_end:",
        "if False:",
        S3_OBJECT + " -k otherwise",
    ),
    Mutant(
        "a finished object has the predicted ETag",
        "transfer/s3_object.py",
        'if held.etag != predicted and ("-" in held.etag or held.etag != _md5(parts)):',
        "if False:",
        S3_OBJECT + " -k label",
    ),
    Mutant(
        "or the MD5 of the whole",
        "transfer/s3_object.py",
        "or held.etag != _md5(parts)):",
        "):",
        S3_OBJECT + " -k whole",
    ),
    Mutant(
        "or, where ETags are no MD5s, the CRC of the whole",
        "transfer/s3_object.py",
        'if crc and held.crc64nvme not in ("", crc):',
        "if False:",
        UPLOADS + " -k another_checksum",
    ),
    Mutant(
        "an object with another one does not stay",
        "transfer/s3_object.py",
        "s3.delete_object(**self._object)",
        "pass",
        UPLOADS + " -k another_checksum",
    ),
    Mutant(
        "the CRC of each part that is told is compared",
        "transfer/upload_targets.py",
        "return stored.crc64nvme == self.crc64nvme",
        "return True",
        UPLOADS + " -k bad_link",
    ),
    Mutant(
        "copied parts make the earlier CRC where they have no MD5s",
        "transfer/distributed.py",
        'return held.crc64nvme in ("", crc64nvme_of(stored, held.label))',
        "return True",
        UPLOADS + " -k copied_has_another",
    ),
    Mutant(
        "a label is of this MD5SUMS",
        "transfer/parts_folder.py",
        'if label is None or kept.get("etag") != found:',
        "if label is None:",
        PARTS_FOLDER,
    ),
    Mutant(
        "and of files of these sizes",
        "transfer/parts_folder.py",
        "if wanted == [sizes.get(name) for name in names] else None",
        "",
        PARTS_FOLDER,
    ),
    Mutant(
        "a part stays if it lies in what both share",
        "transfer/parts_folder.py",
        "if part.stop <= valid and part.name in sums",
        "if part.name in sums",
        PARTS_FOLDER,
    ),
    Mutant(
        "a part is copied if it lies in what both share",
        "transfer/distributed.py",
        "copied = self._copies and min((at + 1) * self._job.part_size, self._total) <= self._job.valid",
        "copied = self._copies and at * self._job.part_size < self._job.valid",
        UPLOADS + " -k was_added",
    ),
    Mutant(
        "copied parts make the earlier ETag",
        "transfer/distributed.py",
        "if not self._is_as_copied(player, held):",
        "if False:",
        UPLOADS + " -k was_copied",
    ),
    Mutant(
        "of an object that is still there",
        "transfer/distributed.py",
        "if self._job.target.held() != held:",
        "if False:",
        UPLOADS + " -k was_copied",
    ),
    Mutant(
        "an object gets the label of what it is",
        "transfer/distributed.py",
        "if not job.target.is_labelled(label):",
        "if False:",
        UPLOADS + " -k it_grew",
    ),
    Mutant(
        "an old index is of the archive that is there",
        "transfer/distributed.py",
        "if old.shared_with(held.label.fingerprint, rows) == old.total_size:",
        "if True:",
        UPLOADS + " -k recorded_again",
    ),
    Mutant(
        "drift ends an upload",
        "transfer/workers.py",
        "drift = drift or outcome.drift",
        "pass",
        "unit/transfer/test_workers.py",
    ),
    Mutant(
        "ratarmount gets no row for a kind of member that is not known",
        "index/ratarmount.py",
        "if kind is None:",
        "if False:",
        "unit/index/test_ratarmount.py -k does_not_know",
    ),
    Mutant(
        "a recording is another if its rows are",
        "index/recording.py",
        "if fingerprint == self.fingerprint and self.rows_digest in rows:",
        "if fingerprint == self.fingerprint:",
        "unit/index/test_recording.py -k shared",
    ),
    Mutant(
        "and so is a generation",
        "index/recording.py",
        "return generation.stop if is_same else None",
        "return generation.stop",
        "unit/index/test_recording.py -k shared",
    ),
]


def fails(mutant: Mutant, work: Path) -> bool:
    """Whether the tests of the mutant fail on it."""
    shutil.copytree(TESTS.parent / "tartapefs", work / "tartapefs", ignore=shutil.ignore_patterns("__pycache__"))
    module = work / "tartapefs" / mutant.module
    text = module.read_text()
    if mutant.old not in text:
        raise SystemExit(f"{mutant.says}: this text is no longer in {mutant.module}: {mutant.old!r}")
    module.write_text(text.replace(mutant.old, mutant.new))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutant.tests)],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": str(work), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if result.returncode not in (0, 1):
        raise SystemExit(f"{mutant.says}: pytest exited {result.returncode}")
    return result.returncode == 1


def main() -> None:
    mutants = [mutant for mutant in MUTANTS if mutant.module in (sys.argv[1:] or [mutant.module])]
    survivors = 0
    for mutant in mutants:
        with tempfile.TemporaryDirectory(prefix="tartapefs-mutant-") as work:
            killed = fails(mutant, Path(work))
        survivors += not killed
        print(f"{'killed' if killed else 'SURVIVED':9} {mutant.module:13} without: {mutant.says}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
