"""Saved state: records that survive a kill, one owner at a time, and no damaged record."""

import errno
import os
import re
import threading
from pathlib import Path

import pytest

from tartapefs import OutputBusyError, OutputError
from tartapefs.base import outputs, saved_state
from tartapefs.base.saved_state import SavedState


@pytest.fixture
def path(tmp_path: Path) -> str:
    return os.fspath(tmp_path / "state")


def test_state(path: str) -> None:
    """The next process finds what was added, in order, and the same token. Only one process at a time has it open."""
    with SavedState(path, "digest") as state:
        token = state.token
        assert list(state.records()) == []
        state.add(b"one")
        with pytest.raises(OutputBusyError, match="written by another program"):
            SavedState(path, "digest")
    with open(path, "rb") as file:
        assert file.readline() == b"tartapefs state 1: digest\n"
    with SavedState(path, "digest") as state:
        assert list(state.records()) == [b"one"] and state.token == token
        state.add(b"")
        state.replace(b"all")
        assert list(state.records()) == [b"all"]
        with pytest.raises(OutputBusyError):
            SavedState(path, "digest")
        state.add(b"more")
        assert list(state.records()) == [b"all", b"more"]
    with pytest.raises(OutputError, match="not a file that a seal saves"):
        SavedState(path, "seal")
    with SavedState(path, "digest") as state:
        assert list(state.records()) == [b"all", b"more"] and state.token == token
        state.clear()
        assert list(state.records()) == []
        state.remove()
    assert not os.path.exists(path) and re.fullmatch("[0-9a-f]{16}", token)


def test_a_state_that_waits(path: str) -> None:
    """It waits until the state is closed, and reads what replaced it meanwhile."""
    first = SavedState(path, "digest")
    found: list[list[bytes]] = []

    def second() -> None:
        with SavedState(path, "digest", wait=True) as state:
            found.append(list(state.records()))

    threads = [threading.Thread(target=second) for _ in range(3)]
    for thread in threads:
        thread.start()
    first.replace(b"1")
    first.replace(b"2")
    assert found == []
    first.close()
    for thread in threads:
        thread.join(60)
    assert found == [[b"2"]] * 3


def test_damaged_states(path: str) -> None:
    """Records before the damage are returned, and no others; a file without its head is refused."""
    with SavedState(path, "digest") as state:
        for text in (b"first", b"second" * 10, b"third"):
            state.add(text)
    with open(path, "rb") as file:
        whole_file = file.read()
    head = len(whole_file) - 3 * 40 - 5 - 60 - 5
    ends = [head, head + 45, head + 145, head + 190]
    assert ends[-1] == len(whole_file)
    for at in range(len(whole_file)):
        flipped = bytearray(whole_file)
        flipped[at] ^= 1 << at % 8
        for damaged in (whole_file[:at], bytes(flipped)):
            with open(path, "wb") as file:
                file.write(damaged)
            if at < head:
                with pytest.raises(OutputError):
                    SavedState(path, "digest")
                continue
            with SavedState(path, "digest") as state:
                good = [b"first", b"second" * 10, b"third"][: sum(end <= at for end in ends[1:])]
                assert list(state.records()) == good
                state.add(b"new")
            with SavedState(path, "digest") as state:
                assert list(state.records()) == [*good, b"new"]


def test_where_a_file_cannot_be_without_a_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(saved_state, "_create_whole", refuse)
    monkeypatch.setattr(outputs._libc, "renameat2", None)
    with SavedState(path, "digest") as state:
        state.add(b"x")
    with SavedState(path, "digest") as state:
        assert list(state.records()) == [b"x"]
    assert os.listdir(tmp_path) == ["state"]


def test_a_file_that_is_no_state_is_left_as_it_is(path: str, tmp_path: Path) -> None:
    for content in (b"", b"a text\n" * 100, b"tartapefs state 1: dig", b"tartapefs state 1: digest\n"):
        Path(path).write_bytes(content)
        with pytest.raises(OutputError, match=r"move or remove it|is damaged; remove it to begin anew"):
            SavedState(path, "digest")
        assert Path(path).read_bytes() == content
    os.unlink(path)
    os.symlink("nothing", path)
    with pytest.raises(OutputError, match="is a symbolic link"):
        SavedState(path, "digest")
    os.unlink(path)
    os.mkdir(path)
    with pytest.raises(OutputError, match="is not a regular file"):
        SavedState(path, "digest")
    os.rmdir(path)
    os.mkfifo(path)
    with pytest.raises(OutputError, match="is not a regular file"):
        SavedState(path, "digest")


def test_bytes_behind_the_records_are_noticed(path: str) -> None:
    with SavedState(path, "verification") as state:
        state.replace(b"all")
        assert list(state.records()) == [b"all"]
        state.check_whole()
    with open(path, "ab") as file:
        file.write(b"\0")
    with SavedState(path, "verification") as state:
        assert list(state.records()) == [b"all"]
        with pytest.raises(OutputError, match="is damaged"):
            state.check_whole()
