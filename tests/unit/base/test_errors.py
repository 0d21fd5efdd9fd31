"""Errors: built-in types that callers may catch, one line of text, and the same error in another process."""

import errno
import json
import pickle

import pytest

from tartapefs.base import errors
from tartapefs.base.errors import Difference, Fact, Problem, TapeError, TapeIntegrityError

NAME = "a\nname\x1b[31m"  # it must not reach a terminal as it is
DRIFT = TapeIntegrityError("data/a", [Difference(Fact.SIZE, "1", "2"), Difference(Fact.MODE, "0644", "0600")])
ERRORS: list[tuple[TapeError, type[Exception], int | None]] = [
    (errors.TapeNotFoundError(NAME, "record it"), FileNotFoundError, errno.ENOENT),
    (errors.TapeExistsError(NAME), FileExistsError, errno.EEXIST),
    (errors.TapeSealedError(NAME), FileExistsError, errno.EEXIST),
    (errors.TapeBusyError(NAME), BlockingIOError, errno.EAGAIN),
    (errors.OutputBusyError(NAME), BlockingIOError, errno.EAGAIN),
    (errors.UnexpectedTapeError(NAME, "1", "2", ""), TapeError, None),
    (errors.TapeFormatError(NAME, NAME), TapeError, None),
    (errors.OutputError(NAME, "is mine"), TapeError, None),
    (errors.UploadError(NAME, NAME), TapeError, None),
    (errors.MountError(NAME, "is mounted"), TapeError, None),
    (errors.OffsetError(7, 5), ValueError, None),
    (errors.TapeConstraintError([Problem(NAME, "is long"), Problem("b", "is long")]), TapeError, None),
    (errors.SourceUnreadableError([Problem(NAME, "is hidden")]), TapeError, None),
    (errors.SourceBusyError([Problem(NAME, "is open")]), TapeError, None),
    (DRIFT, RuntimeError, None),
]


@pytest.mark.parametrize(("error", "builtin", "number"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_is_one_line_and_crosses_to_another_process(
    error: TapeError, builtin: type[Exception], number: int | None
) -> None:
    assert isinstance(error, TapeError) and isinstance(error, builtin)
    assert str(error).isprintable()
    assert getattr(error, "errno", None) == number
    other = pickle.loads(pickle.dumps(error))
    assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))


def test_several_problems_are_counted() -> None:
    problems = [Problem(name, "is long") for name in "abc"]
    assert str(errors.TapeConstraintError(problems)) == "cannot be recorded: a: is long (and 2 more)"
    assert errors.TapeConstraintError(problems).problems == tuple(problems)


def test_drift_names_all_differences_and_the_remedy() -> None:
    assert str(DRIFT) == (
        "data/a: size changed since recording (recorded 1, found 2);"
        ' mode changed since recording (recorded 0644, found 0600); run "tartapefs record --force" to record again'
    )
    try:
        raise DRIFT
    except TapeIntegrityError as error:
        again = error.again()
    assert (str(again), again.differences, again.__traceback__) == (str(DRIFT), DRIFT.differences, None)


def test_a_fact_is_a_string() -> None:
    """As which callers compare it, and JSON has it."""
    assert Fact.SIZE == "size" and Fact("the contents") is Fact.CONTENTS
    assert {"size", "mtime"} & {Fact.SIZE} == {"size"}
    assert json.dumps([Fact.MTIME]) == '["mtime"]'
    assert str(Difference(Fact.SIZE, "1", "2")) == "size changed since recording (recorded 1, found 2)"


def test_a_name_that_was_added_or_is_gone() -> None:
    added, gone = Difference(Fact.TYPE, "nothing", "a folder"), Difference(Fact.TYPE, "a folder", "nothing")
    assert str(added) == "added since recording (found a folder)"
    assert str(gone) == "gone since recording (recorded a folder)"
    assert str(Difference(Fact.COPY, "this member", "nothing")).startswith("the copy changed since recording")


def test_contents_name_the_part_that_differs() -> None:
    difference = Difference(Fact.CONTENTS, "its digest", "another", "block 3")
    assert difference.subject == "the contents of block 3"
    assert str(difference) == "the contents of block 3 changed since recording (recorded its digest, found another)"


def test_a_signature_in_an_address_is_not_told() -> None:
    address = "https://host/archive.tar"
    error = errors.CopyError(f"{address}?X-Amz-Signature=secret", "replaced")
    assert str(error) == f"{address}: replaced"
    assert str(errors.CopyError("s3://tapes/why?", "no such object")) == "s3://tapes/why?: no such object"
