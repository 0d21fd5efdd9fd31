"""nginx that keeps the archive open and sends it by sendfile, across drift and a new recording."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import force_unmount
from support.programs import TARTAPEFS, run, wait_until
from support.reference import Reference

pytestmark = [pytest.mark.wild, pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("nginx")]

CONFIGURATION = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
    sendfile on; open_file_cache max=10 inactive=1h; open_file_cache_valid 1h; access_log off;
    client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t;
    uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
    server {{ listen unix:{folder}/socket; root {mountpoint}; }}
}}
"""


class Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(os.fspath(self._path))


def get(path: Path) -> bytes | None:
    """The archive by HTTP; None if it does not come whole."""
    with contextlib.closing(Connection(path)) as connection:
        try:
            connection.request("GET", "/archive.tar")
            response = connection.getresponse()
            return response.read() if response.status == 200 else None
        except (http.client.HTTPException, OSError):
            return None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """The socket of an nginx that serves what is mounted on `mnt`."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "nginx.conf").write_text(CONFIGURATION.format(folder=tmp_path, mountpoint=tmp_path / "mnt"))
    program = shutil.which("nginx") or ""
    process = subprocess.Popen([program, "-e", tmp_path / "early.log", "-c", tmp_path / "nginx.conf"])
    try:
        wait_until((tmp_path / "socket").exists)
        yield tmp_path / "socket"
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.parametrize(("binding", "options"), [("fusepy", ("--direct",)), ("mfusepy", ())], ids=["2-direct", "3"])
def test_a_descriptor_that_nginx_keeps(tmp_path: Path, server: Path, binding: str, options: tuple[str, ...]) -> None:
    """It sends the archive; nothing after drift; and no old byte once another recording is mounted in its place."""
    root, mountpoint = tmp_path / "data", tmp_path / "mnt"
    root.mkdir()
    (root / "a").write_bytes(os.urandom(300_000))
    assert run("record", root).returncode == 0
    expected = Reference(root).read(0, Reference(root).size)
    environment = os.environ | {"TARTAPEFS_BINDING": binding}
    command = [*TARTAPEFS, "mount", root, mountpoint, "--audit-interval", "0.2", *options]
    try:
        subprocess.run(command, env=environment, check=True)
        assert get(server) == get(server) == expected
        (root / "c").touch()
        # Found by an audit: to open the archive once more would drop its pages, too.
        wait_until(lambda: not os.path.exists(mountpoint / "archive.tar"))
        wait_until(lambda: get(server) is None)
        run("unmount", "--lazy", mountpoint)
        assert run("record", "--force", root).returncode == 0
        subprocess.run(command, env=environment, check=True)
        assert get(server) is None  # nginx has the old descriptor for an hour
        run("unmount", mountpoint)
    finally:
        force_unmount(mountpoint)
