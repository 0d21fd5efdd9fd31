"""What users run: each program on a mounted archive, beside the same program behind a pipe from GNU tar.

A program that takes no pipe is measured beside its reading of a finished archive.
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

_HASH = "import hashlib, sys; hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256')"
_SERVER = """
daemon off; master_process off; user root; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{}}
http {{
  access_log off; sendfile on;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Program:
    """`command` reads `{file}`, may write to the folder `{out}`, and may compare with `{equal}`.

    `piped`: the same behind a pipe; empty if it takes none.
    """

    name: str
    command: str
    piped: str = ""

    @property
    def peer(self) -> str:
        return "the pipe" if self.piped else "a finished archive"

    @property
    def target(self) -> float:
        return 1.0 if self.piped else 0.8


PROGRAMS = [
    Program("md5sum", "md5sum {file}", "md5sum"),
    Program("sha256sum", "sha256sum {file}", "sha256sum"),
    Program("tar -xO", "tar -xOf {file} > /dev/null", "tar -xOf - > /dev/null"),
    Program("tar -x", "tar -xf {file} -C {out}", "tar -xf - -C {out}"),
    Program("cmp", "cmp {file} {equal}", "cmp - {equal}"),
    Program("zstd -1", "zstd -1 -qc {file} > /dev/null", "zstd -1 -qc > /dev/null"),
    Program("hashlib.file_digest", f'python3 -c "{_HASH}" {{file}}', f'python3 -c "{_HASH}" /dev/stdin'),
    Program("rclone md5sum", "rclone md5sum {file}"),
    Program("rsync to a local file", "rsync {file} {out}/copy"),
    Program("curl file://", "curl -so /dev/null file://{file}"),
]


def shell(command: str) -> None:
    """Runs a line of bash; raises CalledProcessError if any program of its pipe fails."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True, **quiet)  # type: ignore[call-overload]


def works(
    program: Program, archive: Path, source: Path, out: Path, beside: bool = True
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
    """The program on the archive, its peer, and what makes an empty folder `out` before each.

    `source.tar` and `source.copy`, beside the source, are GNU tar's archive of it and a copy of ours; made if missing,
    unless the program needs neither, which `beside` tells.
    """
    theirs, equal = source.with_suffix(".tar"), source.with_suffix(".copy")
    made_by_tar = f"tar --format=ustar -C {source.parent} -cf - {source.name}"
    if beside and not theirs.exists():
        shell(f"{made_by_tar} > {theirs}")
    if beside and not equal.exists():
        shell(f"cat {archive} > {equal}")
    ours = program.command.format(file=archive, out=out, equal=equal)
    if program.piped:
        peer = f"{made_by_tar} | {program.piped.format(out=out, equal=theirs)}"
    else:
        peer = program.command.format(file=equal, out=out, equal=equal)
    return partial(shell, ours), partial(shell, peer), partial(_emptied, out)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


@contextlib.contextmanager
def nginx(root: Path, folder: Path) -> Iterator[str]:
    """nginx that serves the folder `root`; yields its address. `folder` is for its own files."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "nginx.conf"
    config.write_text(_SERVER.format(folder=folder, port=port, root=root))
    process = subprocess.Popen(["nginx", "-p", folder, "-c", config], stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """SeaweedFS's S3 server, which takes everybody, with an empty bucket `tapes`; yields its address."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ports = random.sample(range(20_000, 50_000), 4)  # it takes each port and the one 10,000 above it
    names = ("-s3.port", "-master.port", "-volume.port", "-filer.port")
    options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    command = ["weed", "server", "-s3", "-s3.iam=false", "-ip=127.0.0.1", f"-dir={folder}", *options]
    url = f"http://127.0.0.1:{ports[0]}"
    # It takes AWS_* for settings of its own, and with keys there it refuses everybody else.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(urllib.request.Request(f"{url}/tapes", method="PUT")).close()
                    break
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def processor_seconds(pids: list[int]) -> float:
    """What these processes have used so far, in user and system mode."""
    used = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])
    return used / os.sysconf("SC_CLK_TCK")


def with_processor_time(work: Callable[[], object], daemon: list[int]) -> float:
    """The processor time that the work took: of its own processes, and of those of the daemon."""
    before, children = processor_seconds(daemon), os.times()
    work()
    after = os.times()
    own = after.children_user - children.children_user + after.children_system - children.children_system
    return own + processor_seconds(daemon) - before
