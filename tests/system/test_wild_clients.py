"""Clients that come over a network, or that hide a failed read: how each ends, and what it leaves behind.

The table in docs/integrity.md is what these tests found. No program may end well with a copy whose size and digest are
those of the archive and that is another; whatever exits 0 with a wrong copy stands in that table.
"""

import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.programs import wait_until
from support.readers import (
    RCLONE,
    Failing,
    Program,
    common_prefix,
    copied,
    digest_of,
    failing_mount,
    no_copy,
    shell,
)
from support.servers import answers
from support.sshd import Host, sshd

pytestmark = [pytest.mark.wild, pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("sshfs")]

NOTHING, PREFIX, ZEROS, HOLES = (
    "nothing",
    "a good prefix",
    "full size: a good prefix, then zeros",
    "full size, with holes",
)
SFTP = ":sftp,host=127.0.0.1,port=$PORT,user=root,key_file=$KEY"


def through_sshfs(command: str, options: str = "") -> Callable[[Failing], int]:
    mounted = f'mkdir "$TO/far" && sshfs {options} -F "$CONFIG" "host:$DIR" "$TO/far" || exit 99; A=$TO/far/archive.tar'
    return shell(f'{mounted}; {command}; code=$?; umount "$TO/far" && rmdir "$TO/far" && exit $code')


def restored(failing: Failing) -> tuple[bytes | None, bool]:
    copy = (failing.folder / "restored" / "archive.tar").read_bytes()
    return copy, copy == failing.expected


# The executable, how it runs, how to tell what it made; its exit code, and what is left.
PROGRAMS: dict[str, tuple[Program, int, str]] = {
    "cp over sshfs": (("sshfs", through_sshfs('cp "$A" "$OUT"'), copied), 0, PREFIX),
    "cp over sshfs -o direct_io": (("sshfs", through_sshfs('cp "$A" "$OUT"', "-o direct_io"), copied), 0, PREFIX),
    "cat over sshfs": (("sshfs", through_sshfs('cat "$A" > "$OUT"'), copied), 0, PREFIX),
    "dd over sshfs": (("sshfs", through_sshfs('dd if="$A" of="$OUT" bs=1M'), copied), 0, PREFIX),
    "sha256sum over sshfs": (("sshfs", through_sshfs('sha256sum "$A" > "$OUT"'), digest_of("sha256")), 0, NOTHING),
    "scp": (("scp", shell('scp -F "$CONFIG" "host:$A" "$OUT"'), copied), 1, PREFIX),
    "scp -O": (("scp", shell('scp -O -F "$CONFIG" "host:$A" "$OUT"'), copied), 1, ZEROS),
    "sftp": (("sftp", shell('sftp -F "$CONFIG" "host:$A" "$OUT"'), copied), 1, PREFIX),
    "rclone from sftp": (("rclone", shell(f'{RCLONE} copyto "{SFTP}:$A" "$OUT"'), copied), 1, NOTHING),
    "rclone to sftp": (("rclone", shell(f'{RCLONE} copyto "$A" "{SFTP}:$OUT"'), copied), 1, NOTHING),
    "rclone, several streams": (
        ("rclone", shell(f'{RCLONE} copyto --multi-thread-cutoff 1M --multi-thread-streams 4 "$A" "$OUT"'), copied),
        1, HOLES,
    ),
    "rsync over ssh": (("rsync", shell('rsync --inplace -e "ssh -F $CONFIG" "$A" "host:$OUT"'), copied), 23, ZEROS),
    "duplicity": (
        ("duplicity", shell('duplicity full --no-encryption "$DIR" "file://$TO/store" || exit;'
                            'duplicity restore --no-encryption "file://$TO/store" "$TO/restored"'), restored),
        0, PREFIX,
    ),
    "rdiff-backup": (("rdiff-backup", shell('rdiff-backup backup "$DIR" "$TO/store"'), no_copy), 0, NOTHING),
    "nc -N": (("nc", shell('nc -N 127.0.0.1 "$TCP" < "$A"'), copied), 0, PREFIX),
    "ssh host 'cat >'": (("ssh", shell('ssh -F "$CONFIG" host "cat > \'$OUT\'" < "$A"'), copied), 0, PREFIX),
    "a pipe": (("cat", shell('cat "$A" | cat > "$OUT"'), copied), 0, PREFIX),
    "a pipe with pipefail": (("bash", shell('bash -o pipefail -c \'cat "$A" | cat > "$OUT"\''), copied), 1, PREFIX),
    "shasum": (("shasum", shell('shasum -a 256 "$A" > "$OUT"'), digest_of("sha256")), 0, NOTHING),
    "pv": (("pv", shell('pv -q "$A" > "$OUT"'), copied), 16, PREFIX),
    "pv -E": (("pv", shell('ulimit -f 16384; pv -q -E "$A" > "$OUT"'), copied), 153, "a good prefix, then zeros"),
    "curl -T": (("curl", shell('curl -sSf -m 5 -T "$A" "$HTTP"'), copied), 28, PREFIX),
}  # fmt: skip


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with sshd(tmp_path) as host:
        yield host


@contextmanager
def writes_to(place: Path) -> Iterator[int]:
    """A TCP server that writes what it is sent to a file; gives its port."""

    def receive() -> None:
        with suppress(OSError), listener.accept()[0] as connection, open(place, "wb") as file:
            while data := connection.recv(1 << 16):
                file.write(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=receive)
        thread.start()
        try:
            yield listener.getsockname()[1]
            listener.settimeout(0)
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def takes_uploads(place: Path) -> Iterator[str]:
    """An HTTP server that writes what is PUT to a file; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            left = int(self.headers["Content-Length"])
            if self.headers.get("Expect"):
                self.send_response_only(100)
                self.end_headers()
            with open(place, "wb", buffering=0) as file:
                while left and (data := self.rfile.read1(min(left, 1 << 16))):
                    left -= file.write(data)
            self.send_response(400 if left else 201)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/copy"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def what_is_left(copy: bytes | None, failing: Failing) -> str:
    if not copy:
        return NOTHING
    good = common_prefix(copy, failing.expected)
    assert good <= failing.good
    full = "full size: " if len(copy) == len(failing.expected) else ""
    if good == len(copy):
        return f"{full}{PREFIX}"
    if not copy[good:].strip(b"\0"):
        return f"{full}{PREFIX}, then zeros"
    for at in range(0, len(copy), 512):  # each piece is right, or was not written
        assert copy[at : at + 512] in (failing.expected[at : at + 512], bytes(512))
    return HOLES


@pytest.mark.parametrize("name", PROGRAMS)
def test_how_it_ends(name: str, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly as documented; and a comparison of size and digest always tells a wrong copy."""
    (executable, start, made), code, left = PROGRAMS[name]
    if shutil.which(executable) is None:
        pytest.skip(f"{executable} is not installed")
    for variable, value in {"CONFIG": host.config, "KEY": host.key, "PORT": host.port}.items():
        monkeypatch.setenv(variable, str(value))
    (tmp_path / "m").mkdir()
    with failing_mount(tmp_path / "m") as failing:
        with writes_to(failing.folder / "copy") as port, takes_uploads(failing.folder / "copy") as http:
            monkeypatch.setenv("TCP", str(port))
            monkeypatch.setenv("HTTP", http)
            ended = start(failing)
        copy, right = made(failing)
        assert not right
        assert (ended, what_is_left(copy, failing)) == (code, left)
    shutil.rmtree(tmp_path / "m")


@pytest.mark.needs("apache2", "curl")
def test_apache(public: Path) -> None:
    """It breaks off what is being read, and then answers 403 in place of 5xx: a client that is told to fail does."""
    work = public / "apache"
    work.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    modules = "".join(
        f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n" for name in ("mpm_prefork", "authz_core")
    )
    with failing_mount(public / "mnt", "--allow-other", "--mode", "0444") as failing:
        (work / "conf").write_text(
            f"{modules}ServerName localhost\nListen 127.0.0.1:{port}\nPidFile {work}/pid\nErrorLog {work}/log\n"
            f"User www-data\nGroup www-data\nDocumentRoot {failing.archive.parent}\n"
        )
        with subprocess.Popen(["apache2", "-X", "-f", work / "conf"], stdin=subprocess.DEVNULL) as apache:
            try:
                wait_until(lambda: apache.poll() is not None or answers(port))
                url = f"http://127.0.0.1:{port}/archive.tar"
                get = ["curl", "-sS", "-f", "-o", failing.folder / "copy", url]
                assert subprocess.run(get, capture_output=True).returncode == 18
                copy = (failing.folder / "copy").read_bytes()
                assert failing.expected.startswith(copy) and len(copy) <= failing.good
                again = subprocess.run(get, capture_output=True)
                assert (again.returncode, b"403" in again.stderr) == (22, True)
                status = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url]
                assert subprocess.run(status, capture_output=True).stdout == b"403"
            finally:
                apache.terminate()
