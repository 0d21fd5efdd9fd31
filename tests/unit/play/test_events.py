"""The events of a play: their order, and what they say of each member."""

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest
from support.recordings import around_blocks, bodies
from support.reference import Reference

from tartapefs import (
    FileData,
    FileEnd,
    FileStart,
    TapePlayer,
)


@pytest.mark.parametrize("chunk_size", [100, 512, 700, 1 << 20])
def test_order_of_events(player: TapePlayer, small: Path, chunk_size: int) -> None:
    """Each member is started, sent and ended before the next; the footer follows, and the end is said once."""
    expected, content = Reference(small), bodies(small)
    offset_of = {os.fsdecode(name).rstrip("/"): start for name, start in expected.starts.items()}
    stops = [*list(expected.starts.values())[1:], expected.size - 1024]
    position, open_member, ended = 0, None, []
    events = list(player.play(chunk_size=chunk_size))
    for event in events:
        match event.type:
            case "file_start":
                assert open_member is None
                open_member = event.entry
                assert event.metadata.start_offset == position == offset_of[event.entry.arc_path]
                assert event.metadata.resumed is False
                assert event.data == b""
            case "file_data":
                position += len(event.data)
                assert open_member is not None or position > expected.size - 1024
            case "file_end":
                assert event.entry == open_member
                assert event.metadata.end_offset == position == stops[len(ended)]
                assert event.metadata.is_complete is True
                body = content[event.entry.arc_path]
                assert event.metadata.md5sum == (None if body is None else hashlib.md5(body).hexdigest())
                assert event.data == b""
                ended.append(event.entry.arc_path)
                open_member = None
    assert ended == list(offset_of)
    assert [event.type for event in events].count("tape_completed") == 1
    assert events[-1].type == "tape_completed"
    assert events[-1].data == b""
    assert position == expected.size


@pytest.mark.parametrize("chunk_size", [1, 300, 1 << 20])
def test_resumed_events(player: TapePlayer, small: Path, chunk_size: int) -> None:
    """From any byte on: the member that it lies in is resumed unless it starts there, and its body hashed if whole."""
    expected, content = Reference(small), bodies(small)
    starts = {os.fsdecode(name).rstrip("/"): start for name, start in expected.starts.items()}
    for offset in around_blocks(expected.size - 1024)[:: 1 if chunk_size > 1 else 7]:
        events = player.play(start_offset=offset, chunk_size=chunk_size)
        first = next(events)
        while not isinstance(last := next(events), FileEnd):
            assert last.type in ("file_data", "tape_completed")
            if last.type == "tape_completed":
                break
        if offset == expected.size - 1024:
            assert isinstance(first, FileData)
            continue
        assert isinstance(first, FileStart)
        assert isinstance(last, FileEnd)
        name = first.entry.arc_path
        inside = offset - starts[name]
        assert first.metadata.start_offset == starts[name] <= offset < last.metadata.end_offset
        assert first.metadata.resumed == (inside > 0)
        assert last.metadata.is_complete == (inside == 0)
        body = content[name]
        hashed = body is not None and inside <= 512
        assert last.metadata.md5sum == (hashlib.md5(body or b"").hexdigest() if hashed else None), (name, inside)
        following = next((event for event in events if event.type == "file_start"), None)
        assert following is None or following.metadata.resumed is False


def test_events_are_values(player: TapePlayer) -> None:
    """Frozen, and equal where they say the same."""
    events = list(player.play())
    assert events == list(player.play())
    for event in events:
        for value in (event, getattr(event, "metadata", None)):
            for field in dataclasses.fields(value) if value else ():
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(value, field.name, None)
        if event.type in ("file_start", "file_end"):
            with pytest.raises(AttributeError):
                event.entry.size = 0
    assert {event.type for event in events} == {"file_start", "file_data", "file_end", "tape_completed"}
