"""A scratch folder with the servers that the pages of the cookbook speak of."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.client import BaseClient

from support.daemon import daemons_of
from support.programs import our_mounts, run
from support.readme import EXIT, README, Scratch, blocks
from support.reference import Reference, gnu_tar
from support.s3 import S3, environment, s3_server
from support.sending import cut
from support.servers import http_server, rsync_daemon

PAGES = README.parent / "docs" / "cookbook"
PART = 6 << 20  # bytes: of a mount; in two parts of a multipart upload
REMOTE = {"TYPE": "s3", "PROVIDER": "Other", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "UPLOAD_CUTOFF": "5M"}


class FlakyLink:
    """Passes connections on to `port`, and cuts the next `cuts`, each once a megabyte has been sent through it."""

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self.cuts = 0
        self.cut = 0  # how many it has cut
        self.sent = 0  # bytes, by clients
        self.is_up = True
        self.on_sent: Callable[[int], object] = lambda sent: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._connect, args=(client,)))
                self._threads[-1].start()

    def _connect(self, client: socket.socket) -> None:
        budget = 1 << 20 if self.cut < self.cuts else 1 << 60
        with client, socket.create_connection(self._to) as server:
            back = threading.Thread(target=self._pass, args=(server, client, 1 << 60))
            back.start()
            self._pass(client, server, budget)
            back.join()

    def _pass(self, one: socket.socket, other: socket.socket, budget: int) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                budget -= len(data)
                if one.getsockname()[1] == self.port:
                    self.sent += len(data)
                    self.on_sent(self.sent)
                if budget < 0 or not self.is_up:
                    self.cut += 1
                    for end in (one, other):
                        end.shutdown(socket.SHUT_RDWR)
                    return
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()


class Kitchen(Scratch):
    """A scratch folder with all the servers that the pages speak of."""

    def __init__(self, folder: Path, s3: S3, link: FlakyLink, http: str) -> None:
        super().__init__(folder)
        self.link = link
        self.settings: list[str] = []  # what the page has set in the shell
        self.failed = False
        self.expected = b""  # the archive, if it is not the folder's alone
        (folder / "work" / "data" / "photos" / "9.bin").write_bytes(os.urandom(9_000_000))
        sleep = folder / "bin" / "sleep"
        sleep.write_text("#!/bin/sh\n")
        sleep.chmod(0o755)
        self.backup = folder / "backup"
        self.data = folder / "work" / "data"
        self.s3 = s3
        self.places = {"rsync://host/backup": f"rsync://127.0.0.1:{link.port}/module", "http://host": http}
        remote = REMOTE | {"ENDPOINT": s3.url}
        self.environment |= {f"RCLONE_CONFIG_REMOTE_{name}": value for name, value in remote.items()}
        self.environment |= {name: value for name, value in environment(s3).items() if name.startswith("AWS_")}
        self.environment.pop("AWS_CA_BUNDLE", None)  # which rclone 1.60 cannot have
        self.environment["PATH"] = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def here(self, text: str) -> str:
        for printed, meant in (self.places | SMALLER).items():
            text = text.replace(printed, meant)
        text = re.sub(r"(?<![\w/])/backup\b", str(self.backup), text)
        return text.replace("/mnt/tape", f"{self.folder}/mnt/tape")

    def run_page(self, page: str) -> None:
        self.settings.clear()
        for language, block in blocks((PAGES / page).read_text()):
            if language == "python":
                self.run_python(block)
            else:
                self.run_shell(block)

    def run_python(self, block: str) -> None:
        exec(compile(self.here(block), "cookbook", "exec"), self.names)

    def start(self, block: str, **options: Any) -> subprocess.Popen[str]:
        """Runs a block as one script, which ends at the first line that exits otherwise than its comment says.

        Whatever else the shell is to look at, the page has to set.
        """
        lines = []
        for line in block.splitlines():
            expected = EXIT.search(line)
            code = f"code=0; {line.partition(' #')[0]} || code=$?; test $code = {expected[1]}" if expected else line
            lines.append(code)
            if line.startswith("set -") and line not in self.settings:
                self.settings.append(line)
        script = self.here("\n".join([*self.settings, *lines]))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(["bash", "-e", "-c", script], env=self.environment, **(pipes | options))

    def run_shell(self, block: str) -> str:
        with self.start(block) as script:
            said, complained = script.communicate(timeout=120)
        assert script.returncode == 0, f"{block}\n{said}\n{complained}"
        return said

    def ends_well(self, page: str) -> bool:
        """Whether every block of the page says that all went well; it is left at the first one that does not."""
        try:
            self.run_page(page)
        except Exception:  # what a block raises when the archive fails to read depends on the packages that are there
            return False
        return True

    def drift(self) -> None:
        with open(self.data / "photos" / "9.bin", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")

    def kill_daemon(self) -> None:
        for pid in daemons_of(self.folder / "mnt" / "tape"):
            os.kill(pid, signal.SIGKILL)

    def cut_network(self) -> None:
        self.link.is_up = False
        self.s3.on_part = lambda number: False

    def fail_half_way(self, failure: str) -> None:
        """`failure` happens once the network has seen a part of something."""
        happen = {"drift": self.drift, "daemon killed": self.kill_daemon, "network cut": self.cut_network}[failure]

        def once() -> None:
            if not self.failed:
                self.failed = True
                happen()

        def on_part(number: int) -> bool | None:
            if number > 1:
                once()
            return None if self.s3.on_part is on_part else self.s3.on_part(number)

        self.s3.on_part = on_part
        self.link.on_sent = lambda sent: sent > 1 << 20 and once()

    def wrong_copies(self, archive: bytes) -> list[str]:
        """Copies of the archive that are there and are not as it is."""
        copies = [*self.backup.glob("*.tar"), self.folder / "work" / "backup.tar"]
        return [copy.name for copy in copies if copy.exists() and copy.read_bytes() != archive] + self.wrong_objects(
            archive
        )

    def wrong_objects(self, archive: bytes) -> list[str]:
        parts = {f"data/{name}": part for name, part in cut(archive, PART).items()}
        return [key for key in list(self.s3.keys()) if self.s3.object(key) != parts.get(key, archive)]

    def archive(self) -> bytes:
        return gnu_tar(self.data)[: Reference(self.data).size]


@pytest.fixture
def link(tmp_path: Path) -> Iterator[FlakyLink]:
    (tmp_path / "backup").mkdir()
    with rsync_daemon(tmp_path / "backup", tmp_path) as address:
        link = FlakyLink(int(re.findall(r":(\d+)/", address)[0]))
        yield link
        link.close()


@pytest.fixture
def kitchen(tmp_path: Path, link: FlakyLink, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kitchen]:
    served = ["busybox", "httpd", "-f", "-p", "127.0.0.1:PORT", "-h", str(tmp_path / "backup")]
    with s3_server() as s3, http_server(served) as http:
        kitchen = Kitchen(tmp_path, s3, link, http)
        monkeypatch.chdir(tmp_path / "work")
        for name, value in kitchen.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        yield kitchen
        client = kitchen.names.get("s3")
        if isinstance(client, BaseClient):
            client.close()
        kitchen.names.clear()
        gc.collect()  # the examples close nothing
        for mountpoint in our_mounts():
            if mountpoint.startswith(f"{tmp_path}/"):
                assert run("unmount", mountpoint).returncode == 0


SMALLER = {
    "seq 100": "seq 5",
    "1 << 30": "5 << 20",
    "1GiB": "5MiB",
    "1073741824": "5242880",
    "size 64M": "size 5M",
    "64MiB": "5MiB",
    "4GiB": f"{PART}",
    "retries 100 --retries-sleep 60s": "retries 1",
}
