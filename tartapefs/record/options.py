"""The options of a recording: those that the caller gives, else those of the recording it replaces, else defaults."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from tartapefs.archive import hash_tree
from tartapefs.base.errors import Problem, TapeConstraintError, TapeFormatError, TapeNotFoundError
from tartapefs.base.text import printable
from tartapefs.index.reader import Index
from tartapefs.index.schema import TapeFacts
from tartapefs.source.exclusion import Exclude, IsExcluded, exclusion, is_function
from tartapefs.source.folder import Source


@dataclass(frozen=True, slots=True)
class Options:
    """The options that hold for a recording; all but `is_left_out` are written to its index.

    Attributes: `is_left_out`, the test whether to leave out a path; `excluded`, its patterns; `owners_kept`, whether
    headers name the real owners; `long_names`, whether they may have more than one block; `hard_links`, whether further
    names of a file are links; `one_file_system`, whether what lies on other file systems than the root is left out;
    `due_algorithm` and `due_block_size` (bytes), of the digests that the tape is to have.
    """

    is_left_out: IsExcluded | None = None
    excluded: Sequence[str] = ()
    owners_kept: bool = False
    long_names: bool = False
    hard_links: bool = False
    one_file_system: bool = False
    due_algorithm: str = ""
    due_block_size: int = 0


class Asked:
    """The options that the caller of the recorder gives; None stands for those of the recording that is replaced.

    Raises ValueError for a malformed pattern, and for an unknown algorithm.
    """

    def __init__(
        self,
        exclude: Exclude | None,
        anonymize: bool | None,
        digest: hash_tree.SealAlgorithm | Literal[""] | None,
        long_names: bool | None,
        hard_links: bool | None,
        one_file_system: bool | None,
    ) -> None:
        if digest not in (None, "", *hash_tree.ALGORITHMS):
            raise ValueError(f"digest is one of {', '.join(hash_tree.ALGORITHMS)}, not {digest!r}")
        self._exclusion = exclusion(exclude) if exclude is not None else None
        self._anonymize = anonymize
        self._digest = digest
        self._yes_or_no = {
            "long_names": long_names,
            "hard_links": hard_links,
            "one_file_system": one_file_system,
        }

    def completed(self, before: TapeFacts | None, index_path: str) -> Options:
        """These options, completed by those of the recording that is replaced.

        Raises TapeConstraintError if what that recording excluded is needed, and cannot be told from its index.
        """
        is_left_out, excluded = self._exclusion or _exclusion_of(before.excluded if before else (), index_path)
        owners_kept = bool(before and before.owners_kept) if self._anonymize is None else not self._anonymize
        hold = {
            option: bool(getattr(before, option, False)) if asked is None else asked
            for option, asked in self._yes_or_no.items()
        }
        algorithm, block_size = "", 0
        if self._digest is not None:
            algorithm, block_size = self._digest, bool(self._digest) * hash_tree.BLOCK_SIZE
        elif before:
            algorithm = before.algorithm or before.due_algorithm
            block_size = before.block_size or before.due_block_size
        return Options(is_left_out, excluded, owners_kept, due_algorithm=algorithm, due_block_size=block_size, **hold)


def _exclusion_of(excluded: tuple[str, ...], index_path: str) -> tuple[IsExcluded | None, Sequence[str]]:
    if not excluded:
        return None, ()
    if not is_function(excluded):
        with suppress(ValueError):
            return exclusion(excluded)
    reason = f"what it excluded cannot be taken over ({excluded[0]}): say anew what to exclude, or that nothing is"
    raise TapeConstraintError([Problem(index_path, reason)])


def replaced_facts(index_path: str, source: Source, in_source: bool) -> tuple[TapeFacts | None, str]:
    """What the index says that a recording of `source` replaces, if there is one; else why it says nothing, if known.

    Call it while no other recorder can replace that index. `in_source`: it lies in the recorded folder.
    """
    try:
        index = Index(index_path)
    except TapeNotFoundError:
        return None, ""
    except TapeFormatError as error:
        return None, error.reason
    except OSError as error:
        return None, error.strerror or str(error)
    index.close()
    reason = why_foreign(index.facts, source, in_source)
    return (None, reason) if reason else (index.facts, "")


def why_foreign(facts: TapeFacts, source: Source, in_source: bool) -> str:
    """Why the index with these facts is not one of `source`; empty if it is. `in_source`: it lies in that folder."""
    is_its_name = facts.root_name == os.fsencode(os.path.basename(source.root))
    if in_source or facts.root_ino == source.ino or is_its_name:
        return ""
    return f"it is of another folder, {printable(facts.root_name)}"
