"""An OpenSSH server on loopback, with its configuration, keys and port of its own."""

import os
import pwd
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from support.programs import wait_until

SSHD = "/usr/sbin/sshd"  # it wants to be called by its whole path


@dataclass(frozen=True)
class Host:
    """`config` is for the option -F of ssh, scp, sftp and sshfs, which then know the server as `host`."""

    config: Path
    key: Path
    port: int
    daemon: subprocess.Popen[bytes]

    @property
    def ssh(self) -> str:
        """For `rsync -e`, `RSYNC_RSH`, `GIT_SSH_COMMAND` and the like."""
        return f"ssh -F {self.config}"

    def program(self, folder: Path) -> None:
        """Makes `folder/ssh`, for a PATH with which plain `ssh host` and `rsync host:` reach the server."""
        (folder / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {self.config} "$@"\n')
        (folder / "ssh").chmod(0o755)

    def connections(self) -> list[int]:
        """The processes that serve the connections that are open now."""
        children = Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def drop(self) -> None:
        """Ends all connections at once, as a network does that breaks."""
        for pid in self.connections():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def sshd(folder: Path) -> Iterator[Host]:
    """The server, which answers, and lets in the user who runs the tests. It keeps its files in `folder`/sshd."""
    home = folder / "sshd"
    home.mkdir(mode=0o700)
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (home / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\n"
        f"HostKey {home}/host_key\n"
        f"AuthorizedKeysFile {home}/key.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
        "MaxStartups 100\nMaxSessions 100\nSubsystem sftp internal-sftp\n"
    )
    host_key = " ".join((home / "host_key.pub").read_text().split()[:2])
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    config = home / "config"
    config.write_text(
        f"Host host\n  HostName 127.0.0.1\n  Port {port}\n  User {pwd.getpwuid(os.geteuid()).pw_name}\n"
        f"  IdentityFile {home}/key\n  IdentitiesOnly yes\n  BatchMode yes\n  LogLevel ERROR\n"
        f"  UserKnownHostsFile {home}/known_hosts\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # as the package's service does
    command = [SSHD, "-D", "-E", home / "log", "-f", home / "sshd_config"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as daemon:
        host = Host(config, home / "key", port, daemon)
        try:
            wait_until(lambda: daemon.poll() is not None or _answers(port))
            assert daemon.poll() is None, (home / "log").read_text()
            yield host
        finally:
            if daemon.poll() is None:
                host.drop()
                daemon.terminate()


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
        return connection.recv(4) == b"SSH-"
    return False
