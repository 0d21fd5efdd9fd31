"""The commands that show what a tape holds: info, ls, locate."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from support.command_line import BLOCK, a_tmpfs, fingerprint
from support.programs import done, refused, run
from support.reference import Reference


@pytest.mark.root
def test_any_time_that_a_file_can_have_is_listed_whole(tmp_path: Path) -> None:
    with a_tmpfs(tmp_path / "disk", "size=1m") as disk:
        for second in (2**62, -(2**62)):
            (disk / f"{second}").touch()
            os.utime(disk / f"{second}", ns=(second * 10**9, second * 10**9))
        done(run("record", disk))
        for line in done(run("ls", disk)).splitlines()[1:]:
            assert f" @{line.rpartition('/')[2]}" in line
        for line in done(run("ls", disk, "--json")).splitlines()[1:]:
            assert json.loads(line)["mtime"] == f"@{json.loads(line)['path'].rpartition('/')[2]}.000000000"


def test_info_in_words(data: Path, reference: Reference) -> None:
    """One fact a line."""
    result = run("info", data)
    lines = done(result).splitlines()
    assert result.stderr == ""
    facts = {line[:14].strip(): line[14:] for line in lines}
    assert list(facts) == [
        "source", "index", "fingerprint", "seal", "digests", "total size", "member count", "recorded",
        "excluded", "left out", "owners", "at home", "checks",
    ]  # fmt: skip
    assert facts["source"] == str(data)
    assert facts["fingerprint"] == fingerprint(reference)
    assert facts["total size"].startswith(f"{reference.size} (") and "KiB" in facts["total size"]
    assert facts["member count"] == str(len(reference.starts))
    assert (facts["excluded"], facts["left out"], facts["owners"], facts["at home"]) == (
        "nothing",
        "0",
        "scrubbed",
        "yes",
    )


def test_info_as_json(data: Path, reference: Reference) -> None:
    facts = json.loads(done(run("info", data, "--json")))
    assert facts.pop("checks")
    recorded = facts.pop("recorded")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{9}Z", recorded)
    generation = {"start": 0, "stop": reference.size - 1024, "members": len(reference.starts), "recorded": recorded}
    assert facts.pop("generations") == [generation | {"fingerprint": fingerprint(reference)}]
    assert facts == {
        "source": str(data),
        "index": str(data / ".tartape" / "index.db"),
        "fingerprint": fingerprint(reference),
        "seal": None,
        "digests": None,
        "total_size": reference.size,
        "member_count": len(reference.starts),
        "excluded": [],
        "left_out": 0,
        "owners": "scrubbed",
        "long_names": False,
        "hard_links": False,
        "one_file_system": False,
        "at_home": True,
        "late_on": [],
    }


def test_a_copied_tape_is_not_at_home_but_works(data: Path, reference: Reference, tmp_path: Path) -> None:
    subprocess.run(["cp", "-a", data, tmp_path / "data"], check=True)
    facts = json.loads(done(run("info", tmp_path / "data", "--json")))
    assert facts["at_home"] is False and "not inode" in facts["checks"]
    assert facts["fingerprint"] == fingerprint(reference)
    assert done(run("verify", tmp_path / "data")) == ""
    played = run("play", tmp_path / "data", text=False, errors=None).stdout
    assert played == reference.read(0, reference.size)  # type: ignore[comparison-overlap]


def test_ls_has_one_line_for_each_member(data: Path, reference: Reference) -> None:
    lines = done(run("ls", data)).splitlines()
    assert len(lines) == len(reference.starts)
    assert [int(line.split()[4]) for line in lines] == list(reference.starts.values())
    for line, name in zip(lines, reference.starts, strict=True):
        path = os.fsencode(data.parent) + b"/" + name
        found = os.lstat(path.rstrip(b"/"))
        mode, size, day, clock, _ = line.split()[:5]
        assert mode[0] == {0o04: "d", 0o10: "-", 0o12: "l"}[found.st_mode >> 12]
        assert int(size) == (found.st_size if mode[0] == "-" else 0)
        assert f"{day} {clock}" == time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(found.st_mtime_ns // 10**9))
    assert "-rwxr-xr-x" in next(line for line in lines if line.endswith("data/script.sh"))
    assert any(line.endswith("data/link -> photos/512.bin") for line in lines)
    assert any(line.endswith(r"data/odd/two\nlines") for line in lines)
    assert any(line.endswith(r"data/odd/back\\nslash") for line in lines)
    assert any(line.endswith(r"data/odd/odd-link -> to\n\x1b[1m\xff") for line in lines)


def test_ls_as_json_is_one_object_a_line(data: Path, reference: Reference) -> None:
    found = [json.loads(line) for line in done(run("ls", data, "--json")).splitlines()]
    assert {os.fsencode(member["path"]): member["start"] for member in found} == {
        name.rstrip(b"/"): start for name, start in reference.starts.items()
    }
    starts = [*reference.starts.values(), reference.size - 2 * BLOCK]
    assert [member["stop"] for member in found] == starts[1:]
    kinds = {member["path"]: member["type"] for member in found}
    assert (kinds["data"], kinds["data/link"], kinds["data/script.sh"]) == ("directory", "link", "file")
    link = next(member for member in found if member["path"] == "data/link")
    assert link["target"] == "photos/512.bin"
    script = next(member for member in found if member["path"] == "data/script.sh")
    assert (script["mode"], script["size"]) == ("0755", 10)


def locate(data: Path, where: str) -> dict[str, object]:
    return json.loads(done(run("locate", data, where, "--json")))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("after", "segment", "start", "stop"),
    [(0, "header", 0, 512), (511, "header", 0, 512), (512, "body", 512, 1025), (1024, "body", 512, 1025),
     (1025, "padding", 1025, 1536), (1535, "padding", 1025, 1536)],
)  # fmt: skip
def test_locate_an_offset(data: Path, reference: Reference, after: int, segment: str, start: int, stop: int) -> None:
    """A file of 513 bytes has a header, a body and padding."""
    first = reference.starts[b"data/photos/513.bin"]
    found = locate(data, str(first + after))
    member = found.pop("member")
    assert found == {
        "offset": first + after,
        "segment": segment,
        "start": first + start,
        "stop": first + stop,
        "position": after - start,
    }
    assert isinstance(member, dict) and member["path"] == "data/photos/513.bin"


def test_locate_the_footer_and_what_lies_beyond(data: Path, reference: Reference) -> None:
    end = reference.size
    for offset in (end - 1024, end - 1):
        found = locate(data, str(offset))
        assert (found["segment"], found["start"], found["stop"], found["member"]) == ("footer", end - 1024, end, None)
    assert "footer" in done(run("locate", data, str(end - 1)))
    refused(run("locate", data, str(end)), 2)
    refused(run("locate", data, str(end + 1)), 2)


@pytest.mark.parametrize(
    "name", ["data/photos/513.bin", "data/photos", "data/photos/", "data", "data/", "data/odd/caf\udce9"]
)
def test_locate_a_member(data: Path, reference: Reference, name: str) -> None:
    """By its name with or without a folder's slash."""
    found = locate(data, name)
    stored = os.fsencode(name).rstrip(b"/")
    start = reference.starts.get(stored, reference.starts.get(stored + b"/"))
    assert (found["path"], found["start"]) == (os.fsdecode(stored), start)
    assert found["segments"]["header"] == [start, start + BLOCK]  # type: ignore[index,operator]
    assert len(done(run("locate", data, name)).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["data/none", "photos", "data/photos/513.bi", "dat", "data//photos", "/data", "zzz", "./data"]
)
def test_locate_a_member_that_is_not_there(data: Path, name: str) -> None:
    refused(run("locate", data, name), 1)


def test_locate_in_a_folder_whose_name_is_a_number(tmp_path: Path) -> None:
    root = tmp_path / "512"
    root.mkdir()
    (root / "file").write_text("x")
    done(run("record", root))
    assert locate(root, "512")["offset"] == 512
    assert locate(root, "512/")["path"] == "512"
    assert locate(root, "512/file")["start"] == 512
