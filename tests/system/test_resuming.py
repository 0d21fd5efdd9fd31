"""A copy of a mounted archive that broke off, completed by rsync, rclone, curl, dd and tartapefs."""

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from support.copies import first_wrong
from support.programs import run, with_programs
from support.reference import gnu_tar

from tartapefs import TapeRecorder


@pytest.mark.fuse
@pytest.mark.needs("rsync")
def test_rsync_broken_half_way(tree: Path, tmp_path: Path, mount: Callable[..., Path]) -> None:
    """With --inplace a file of full size stays behind, its end zeros; the check finds where, and resume repairs it."""
    for number in range(4):
        (tree / f"large {number}").write_bytes(os.urandom(3_000_000))
    TapeRecorder(tree).commit()
    first = mount(tree)
    size = first.stat().st_size
    expected = gnu_tar(tree)[:size]
    path = tree / "large 2"
    found = path.stat()
    os.chmod(path, 0o600)  # drift, which can be taken back but for its ctime
    copy = tmp_path / "copy of it"
    result = subprocess.run(["rsync", "--inplace", first, copy], capture_output=True)
    assert result.returncode == 23 and copy.stat().st_size == size
    os.chmod(path, found.st_mode)
    left = copy.read_bytes()
    wrong = first_wrong(left, expected)
    assert wrong is not None and not any(left[wrong:]), "rsync filled what it could not read with zeros"
    for options in ([], ["--full"]):
        result = run("check", tree, copy, "--source-check", "mtime", "--json", *options)
        facts = json.loads(result.stdout)
        assert result.returncode == 1 and facts["good"] == facts["wrong"] == wrong
        ((start, stop),) = facts["zeros"]
        assert start <= wrong and stop == size
    assert run("resume", tree, copy, "--source-check", "mtime").returncode == 0
    assert copy.read_bytes() == expected


class Ranges(SimpleHTTPRequestHandler):
    """Serves files, and one range of each, as a web server does."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.fuse
@pytest.mark.needs("rsync", "rclone", "curl", "dd")
@pytest.mark.parametrize("have", [1, 1_234_567])
def test_hints_work(recorded: Path, archive: bytes, tmp_path: Path, mount: Callable[..., Path], have: int) -> None:
    """Each printed line, run by a shell as it is, completes a copy with rubbish behind its good bytes."""
    mounted = mount(recorded)
    place = tmp_path / "it's a\n place"
    place.mkdir()
    copy = "-a copy: 'x' $(false)"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(mounted.parent)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        hint = ["resume-hint", recorded, "--have", str(have), "--archive", mounted, "--copy", copy, "--json"]
        url = f"http://127.0.0.1:{server.server_address[1]}/archive.tar"
        printed = json.loads(run(*hint).stdout)["commands"]
        printed["curl over http"] = json.loads(run(*hint, "--url", url).stdout)["commands"]["curl"]
        assert set(printed) == {"dd", "rsync", "rclone", "curl", "curl over http", "tartapefs", "aws"}
        del printed["aws"]
        environment = with_programs(tmp_path) | {"RCLONE_CONFIG": "/dev/null"}
        for client, line in printed.items():
            (place / copy).write_bytes(archive[:have] + b"rubbish")
            result = subprocess.run(
                ["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, f"{client}: {line}: {result.stderr}"
            assert (place / copy).read_bytes() == archive, client
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.fuse
@pytest.mark.needs("rsync", "rclone", "curl", "dd")
def test_no_hint_hides_drift(tree: Path, tmp_path: Path, mount: Callable[..., Path]) -> None:
    """Each line exits otherwise than 0 once the archive cannot be read to its end."""
    TapeRecorder(tree).commit()
    mounted, copy = mount(tree), tmp_path / "copy"
    hint = ["resume-hint", tree, "--have", "1000", "--archive", mounted, "--copy", copy, "--json"]
    printed = json.loads(run(*hint).stdout)["commands"]
    (tree / "script.sh").write_bytes(b"other")
    environment = with_programs(tmp_path) | {"RCLONE_CONFIG": "/dev/null"}
    for client in ("tartapefs", "dd", "rsync", "rclone", "curl"):
        copy.write_bytes(bytes(1000))
        result = subprocess.run(["bash", "-c", printed[client]], env=environment, capture_output=True, timeout=120)
        assert result.returncode != 0, client
