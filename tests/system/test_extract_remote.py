"""Members out of a copy in a bucket, or on a web server: only their ranges, several at once, over links that break."""

import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.http_ranges import HttpFile, http_file
from support.programs import TARTAPEFS, quiet, refused, run, wait_until
from support.s3 import S3, environment
from support.s3 import s3 as s3
from support.seals import BLOCK, make, sealed, whole

from tartapefs import Tape
from tartapefs.archive.member import Member

SIZES = [5000] * 11 + [200_000] * 11 + [9 << 20, 5000, BLOCK] + [70_000] * 8  # three folders


@pytest.fixture(scope="module")
def _root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    root = make(tmp_path_factory.mktemp("remote") / "data", SIZES)
    sealed(root)
    return root, whole(root)


@pytest.fixture
def root(_root: tuple[Path, bytes], tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return _root[0]


@pytest.fixture
def http(_root: tuple[Path, bytes]) -> Iterator[HttpFile]:
    with http_file(_root[1]) as file:
        yield file


def members(root: Path, begin: str) -> list[Member]:
    with Tape.discover(root) as tape:
        return [member for member in tape.members() if f"{member.arc_path}/".startswith(begin)]


def missing(root: Path, out: Path, begin: str) -> list[str]:
    """The files below `begin` that are not below `out` as they should be; there may be no others."""
    names = [member.arc_path for member in members(root, begin) if member.is_file]
    there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert there <= set(names)
    for name in there:
        assert (out / name).read_bytes() == (root.parent / name).read_bytes(), name
        assert (out / name).stat().st_mtime_ns == (root.parent / name).stat().st_mtime_ns, name
    return sorted(set(names) - there)


@pytest.mark.long(but="4")
@pytest.mark.parametrize("threads", ["1", "4"])
def test_from_s3_only_what_is_needed(root: Path, s3: S3, tmp_path: Path, threads: str) -> None:
    with s3.client() as client:
        client.put_object(Bucket="tapes", Key="a.tar", Body=whole(root))
    asked: list[tuple[int, int]] = []

    def look(method: str, environ: dict[str, str]) -> None:
        if method == "GET":
            begin, end = re.fullmatch("bytes=([0-9]+)-([0-9]+)", environ["HTTP_RANGE"]).groups()
            asked.append((int(begin), int(end) + 1))

    s3.on_headers = look
    names = ["data/folder 000", "data/folder 002/*22"]
    result = run("extract", root, "s3://tapes/a.tar", *names, "-C", tmp_path / "out", "--threads", threads,
                 env=environment(s3))  # fmt: skip
    assert result.returncode == 0, result.stderr
    left = missing(root, tmp_path / "out", "data/folder 00")
    assert left == [f"data/folder {at // 11:03}/{at:05}" for at in range(11, len(SIZES)) if at != 22]
    wanted = [*members(root, "data/folder 000/"), *members(root, "data/folder 002/00022/")]
    expected = [(wanted[0].start, wanted[-2].body + wanted[-2].size)]
    large = wanted[-1]
    cut = large.body + (8 << 20) - BLOCK  # whole blocks
    expected += [(large.start, cut), (cut, large.body + large.size)]
    assert sorted(asked) == expected
    received = sum(stop - start for start, stop in asked)
    assert f"{received:,} bytes received in 3 requests" in result.stderr


def test_a_damaged_byte_is_never_shown(root: Path, http: HttpFile, tmp_path: Path) -> None:
    damaged = members(root, "data/folder 002/00022/")[0]
    data = bytearray(http.data)
    data[damaged.body + damaged.size - 1] ^= 1
    http.data = bytes(data)
    for threads in ("1", "3"):
        result = run("extract", root, http.url, "data/folder 002", "-C", tmp_path / "out", "--threads", threads)
        quiet(result)
        assert (result.returncode, "data/folder 002/00022: the contents of block" in result.stderr) == (1, True)
        assert missing(root, tmp_path / "out", "data/folder 002/") == ["data/folder 002/00022"]
        assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.long
def test_a_link_that_is_gone_and_comes_back(root: Path, http: HttpFile, tmp_path: Path) -> None:
    """What was complete by then stays, and is not asked for again."""
    (big,) = members(root, "data/folder 002/00022/")
    http.breaks = lambda start: max(big.start + 1000 - start, 0)
    command = ["extract", root, http.url, "data", "-C", tmp_path / "out", "--threads", "2"]
    result = run(*command)
    quiet(result)
    assert result.returncode == 1 and "failed 4 times" in result.stderr
    assert f'"tartapefs {shlex.join(map(str, command))}" goes on from there' in result.stderr
    left = missing(root, tmp_path / "out", "data/")
    assert 0 < len(left) < len(SIZES)
    http.breaks = lambda start: None
    http.forget()
    result = run(*command)
    assert result.returncode == 0 and f"{len(SIZES) - len(left)} were there already" in result.stderr
    assert missing(root, tmp_path / "out", "data/") == []


@pytest.mark.parametrize("threads", ["1", "3"])
def test_an_interruption_does_not_wait_for_the_server(root: Path, http: HttpFile, tmp_path: Path, threads: str) -> None:
    """Which answers no more. Nothing unfinished is left."""
    (big,) = members(root, "data/folder 002/00022/")
    waits, go_on = threading.Event(), threading.Event()

    def stall(start: int) -> int | None:
        if start > big.start:
            waits.set()
            go_on.wait(60)
        return None

    http.breaks = stall
    command = [*TARTAPEFS, "extract", root, http.url, "data", "-C", tmp_path / "out", "--threads", threads]
    with subprocess.Popen([*map(os.fspath, command)], stderr=subprocess.PIPE, text=True) as extracting:
        wait_until(waits.is_set)
        extracting.send_signal(signal.SIGINT)
        _, said = extracting.communicate(timeout=60)
    go_on.set()
    assert extracting.returncode == 130, said
    assert f'"tartapefs extract {root} ' in said and "goes on from there" in said
    assert "Traceback" not in said
    missing(root, tmp_path / "out", "data/")
    assert not list((tmp_path / "out").rglob("*.part"))


def test_what_is_no_copy(root: Path, http: HttpFile, s3: S3, tmp_path: Path) -> None:
    """One line each, and nothing is written."""
    http.ignores_ranges = True
    of_s3 = {"env": environment(s3)}
    for url, options, reason in (
        (http.url, {}, "the server gives no ranges"),
        ("s3://tapes/nothing", of_s3, "404: Not Found"),
        ("gs://bucket/key", {"env": os.environ | {"PYTHONWARNINGS": "ignore"}}, "gcsfs"),
        (f"file://{tmp_path}/nothing", {}, "No such file"),
    ):
        result = run("extract", root, url, "data", "-C", tmp_path / "out", **options)
        refused(result, 1)
        assert result.stderr.startswith(f"tartapefs: {url}: ") and reason in result.stderr
        assert result.stderr.count("\n") == 1
    http.ignores_ranges, http.data = False, bytes(5000)
    result = run("extract", root, http.url, "data/folder 000", "-C", tmp_path / "out")
    assert result.returncode == 1 and "has 5,000 bytes, the archive" in result.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
