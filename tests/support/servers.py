"""Servers on loopback: rsync, HTTP."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.programs import wait_until


@contextmanager
def rsync_daemon(folder: Path, work: Path) -> Iterator[str]:
    """An rsync daemon on loopback; gives the address of `folder`, which clients may also write."""
    port = free_port()
    config = work / "rsyncd.conf"
    as_root = "uid = 0\ngid = 0\n" if os.geteuid() == 0 else ""
    config.write_text(f"use chroot = no\n{as_root}[module]\npath = {folder}\nread only = no\n")
    command = ["rsync", "--daemon", "--no-detach", "--address=127.0.0.1", f"--port={port}", f"--config={config}"]
    with subprocess.Popen([*command, f"--log-file={work}/rsyncd.log"], stdin=subprocess.DEVNULL) as daemon:
        try:
            wait_until(lambda: answers(port))
            yield f"rsync://127.0.0.1:{port}/module"
        finally:
            daemon.terminate()
            daemon.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def http_server(command: list[str], **options: object) -> Iterator[str]:
    """A server on loopback, its port put in place of PORT; gives its address."""
    port = free_port()
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with subprocess.Popen([part.replace("PORT", str(port)) for part in command], **quiet | options) as server:
        try:
            wait_until(lambda: answers(port))
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)
