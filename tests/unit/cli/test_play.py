"""The command play: bytes, parts, events, and where it may write them."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from support.command_line import (
    at_work,
    closed,
    on_terminal,
)
from support.programs import done, quiet, refused, run, wait_until
from support.reference import Reference
from support.users import tartapefs_as_nobody


@pytest.mark.long(but=3)
@pytest.mark.parametrize("text", ["-1", "x", "", "1.5", "0x10", "1KB", "K", "1iB", "٣", "9" * 5000, "1\n\x1b[1m"])
def test_what_is_no_number_of_bytes_is_wrong_usage(data: Path, text: str) -> None:
    refused(run("play", data, "--start", text), 2)


@pytest.mark.parametrize("text", ["-1", "1e3"])
def test_what_is_no_length_is_wrong_usage(data: Path, text: str) -> None:
    refused(run("play", data, "--length", text), 2)


@pytest.mark.parametrize("text", ["5G", "5GiB", "9223372036854775808", "9" * 19 + "P"])
def test_a_start_beyond_the_archive_is_wrong_usage(data: Path, text: str) -> None:
    refused(run("play", data, "--start", text), 2)


@pytest.mark.root
def test_an_output_need_not_be_readable(small: Path, public: Path) -> None:
    """A file that this user may only write, as a drop box has it, will do."""
    root = Path(shutil.copytree(small, public / "root"))
    done(run("record", root))
    (public / "out").touch()
    (public / "out").chmod(0o222)
    done(tartapefs_as_nobody("play", root, "-o", public / "out"))
    assert (public / "out").read_bytes() == Reference(root).read(0, 10**6)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("options", [[], ["--events"]], ids=["bytes", "events"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_play_that_nobody_reads_on_can_be_interrupted(
    large: Path, options: list[str], number: int, code: int
) -> None:
    """It ends at once although its pipe is full, with the exit code of an interruption and no more than a line."""
    with at_work("play", large, *options) as process:
        assert process.stdout and process.stderr and len(os.read(process.stdout.fileno(), 10)) == 10
        wait_until(lambda: "pipe" in Path(f"/proc/{process.pid}/wchan").read_text())
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        error = process.stderr.read()
    assert b"Traceback" not in error and b"Exception" not in error and len(error.split()) <= 2


@pytest.mark.parametrize("streams", ["stdout", "all"])
def test_playing_into_a_file_needs_no_stdout(data: Path, reference: Reference, tmp_path: Path, streams: str) -> None:
    result = closed(streams, "play", data, "-o", tmp_path / "out.tar")
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "out.tar").read_bytes() == reference.read(0, reference.size)


def test_an_archive_is_not_played_to_a_terminal(data: Path) -> None:
    code, seen, _ = on_terminal("play", data, stdout=True)
    assert code == 2
    assert "terminal" in seen and "ustar" not in seen


def test_events_may_go_to_a_terminal(data: Path) -> None:
    code, seen, _ = on_terminal("play", data, "--events", stdout=True)
    assert code == 0 and "tape_completed" in seen


def play(*command: object) -> bytes:
    result = run("play", *command, text=False, errors=None)
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("options", "start", "length"),
    [
        ([], 0, 10**9),
        (["--start", "0"], 0, 10**9),
        (["--start", "1"], 1, 10**9),
        (["--start", "1K"], 1024, 10**9),
        (["--start", "64KiB"], 65536, 10**9),
        (["--start=513", "--length=1"], 513, 1),
        (["--length", "0"], 0, 0),
        (["--length", "1K"], 0, 1024),
        (["--start", "1K", "--length", "1M"], 1024, 10**9),
        (["--length", "5G"], 0, 10**9),
        (["--length", "8191P"], 0, 10**9),
    ],
    ids=str,
)
def test_play_a_part(data: Path, reference: Reference, options: list[str], start: int, length: int) -> None:
    assert play(data, *options) == reference.read(start, length)


def test_play_near_the_end(data: Path, reference: Reference) -> None:
    """The footer can be played from any byte; from the archive's size on there is nothing; beyond it is an error."""
    assert play(data, "--start", str(reference.size - 1)) == b"\0"
    assert play(data, "--start", str(reference.size)) == b""
    refused(run("play", data, "--start", str(reference.size + 1)), 2)


def test_play_into_a_file(data: Path, reference: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out.tar"
    assert play(data, "-o", out) == b""
    assert out.read_bytes() == reference.read(0, reference.size)
    assert play(data, "--output", out, "--start", "600", "--length", "100", "--force") == b""
    assert out.read_bytes() == reference.read(600, 100)


@pytest.mark.parametrize("out", ["/dev/full", "nowhere/out.tar", "."])
def test_play_into_what_cannot_be_written(data: Path, tmp_path: Path, out: str) -> None:
    result = run("play", data, "-o", out, cwd=tmp_path)
    refused(result, 1)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.long(but=1)
@pytest.mark.parametrize("out", ["file", ".tartape/index.db", "new", "../through/file"])
def test_a_play_does_not_write_over_what_it_plays(small: Path, out: str) -> None:
    """Refused before anything is opened for writing, as cp and tar do."""
    done(run("record", small))
    (small.parent / "through").symlink_to(small)
    result = run("play", small, "-o", small / out)
    refused(result, 2)
    assert done(run("verify", small)) == ""
    assert (small / "file").read_bytes() == b"content" and not (small / "new").exists()


def _events(data: Path, *options: object) -> list[dict[str, object]]:
    result = run("play", data, "--events", *options)
    assert result.stderr == ""
    return [json.loads(line) for line in done(result).splitlines()]


def _follow(events: list[dict[str, object]], start: int) -> int:
    """Checks the order of the events and that data follows data; returns where it ends."""
    position, within = start, None
    for event in events:
        match event["type"]:
            case "file_start":
                assert within is None
                within = event["path"]
                assert event["resumed"] is (position > event["start_offset"])  # type: ignore[operator]
            case "file_data":
                assert event["offset"] == position and event["size"] > 0  # type: ignore[operator]
                position += event["size"]  # type: ignore[operator]
            case "file_end":
                assert within == event["path"] and event["end_offset"] == position
                within = None
            case "tape_completed":
                assert within is None and event is events[-1]
            case other:
                pytest.fail(f"an event of type {other}")
    return position


def test_events(data: Path, reference: Reference, tmp_path: Path) -> None:
    """In order, without a gap, with the MD5 of each file's content; the archive goes to the file."""
    events = _events(data, "-o", tmp_path / "out.tar")
    assert (tmp_path / "out.tar").read_bytes() == reference.read(0, reference.size)
    assert _follow(events, 0) == reference.size
    assert [os.fsencode(event["path"]) for event in events if event["type"] == "file_start"] == [  # type: ignore[arg-type]
        name.rstrip(b"/") for name in reference.starts
    ]
    assert [event["start_offset"] for event in events if event["type"] == "file_start"] == [*reference.starts.values()]
    for event in events:
        if event["type"] == "file_end":
            path = data.parent / event["path"]  # type: ignore[operator]
            plain = path.is_file() and not path.is_symlink()
            assert event["md5sum"] == (hashlib.md5(path.read_bytes()).hexdigest() if plain else None)
            assert event["is_complete"] is True
    assert events[-1]["type"] == "tape_completed"


def test_events_from_the_middle_of_a_file(data: Path, reference: Reference) -> None:
    """A body that was not sent from its first byte has no MD5; one whose header alone was passed over has."""
    first = reference.starts[b"data/photos/5000.bin"]
    for offset, has_md5 in ((first + 100, True), (first + 512, True), (first + 513, False)):
        events = _events(data, "--start", str(offset))
        assert _follow(events, offset) == reference.size
        end = next(event for event in events if event["type"] == "file_end")
        assert (end["path"], end["is_complete"], end["md5sum"] is not None) == ("data/photos/5000.bin", False, has_md5)
    assert [event["type"] for event in _events(data, "--start", str(reference.size))] == ["tape_completed"]


def test_events_of_a_length(data: Path, reference: Reference, tmp_path: Path) -> None:
    first = reference.starts[b"data/photos/5000.bin"]
    out = tmp_path / "part"
    events = _events(data, "--start", str(first), "--length", "1000", "-o", out)
    assert _follow(events, first) == first + 1000
    assert out.read_bytes() == reference.read(first, 1000)
    assert not [event for event in events if event["type"] in ("file_end", "tape_completed")]


@pytest.mark.long(but=3)
@pytest.mark.parametrize("options", [[], ["--events"]], ids=["bytes", "events"])
@pytest.mark.parametrize("change", ["content", "size", "gone", "replaced", "mode"])
def test_drift_on_the_way_ends_a_play(tmp_path: Path, options: list[str], change: str) -> None:
    """Exit 1, the reason in one line, and what was written is a true beginning of the archive."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(os.urandom(3 << 20))
    (root / "b").write_bytes(os.urandom(1 << 20))
    done(run("record", root))
    reference = Reference(root)
    expected = reference.read(0, reference.size)
    match change:
        case "content":
            with open(root / "b", "r+b") as file:
                file.write(b"changed")
        case "size":
            os.truncate(root / "b", 100)
        case "gone":
            (root / "b").unlink()
        case "replaced":
            (root / "b").unlink()
            (root / "b").symlink_to("a")
        case "mode":
            (root / "b").chmod(0o600)
    # A folder's header comes first, so its own drift must not hide that of the file.
    start = reference.starts[b"root/a"]
    out = tmp_path / "out.tar"
    result = run("play", root, "--start", str(start), "-o", out, *options)
    quiet(result)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "root/b" in result.stderr and "recorded" in result.stderr
    written = out.read_bytes()
    assert written == expected[start : start + len(written)]
    assert len(written) >= 2 << 20
    if options:
        events = [json.loads(line) for line in result.stdout.splitlines()]
        assert sum(event.get("size", 0) for event in events if event["type"] == "file_data") == len(written)
        assert events[-1]["type"] != "tape_completed"
