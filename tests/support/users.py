"""Users other than the one who runs the tests."""

import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534


def as_nobody(function: Callable[[], Any], user: int = NOBODY) -> Any:
    """What `function` returns, run in a process of a user without privileges, by default nobody."""
    if os.geteuid():
        return function()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            os.write(write, pickle.dumps(function()))
            code = 0
        except BaseException as error:
            os.write(write, pickle.dumps(repr(error)))
        finally:
            os._exit(code)
    os.close(write)
    with open(read, "rb") as answer:
        result = pickle.loads(answer.read())
    _, status = os.waitpid(pid, 0)
    assert status == 0, result
    return result


@contextmanager
def asking_nobody(function: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """A function that returns what `function` returns, run in a process of a user without privileges.

    It is one process for the whole block, since to fork one that has thousands of tests takes long.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            ours.close()
            if not os.geteuid():
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            while theirs.recv(1):
                answer = pickle.dumps(function())
                theirs.sendall(len(answer).to_bytes(8, "big") + answer)
        os._exit(0)
    theirs.close()

    def ask() -> Any:
        ours.sendall(b"?")
        size = int.from_bytes(answer.read(8), "big")
        return pickle.loads(answer.read(size))

    try:
        with ours, ours.makefile("rb") as answer:
            yield ask
    finally:
        os.waitpid(pid, 0)


def give_to_nobody(root: Path) -> None:
    if os.geteuid() == 0:
        for path in [root, *root.rglob("*")]:
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def tartapefs_as_nobody(*command: object) -> subprocess.CompletedProcess[str]:
    """`tartapefs` by a user without privileges, who need not be able to reach the interpreter."""
    code = (
        "import difflib, importlib, os, shutil, sys, pathspec, tartapefs.cli;"
        " [importlib.import_module(f'tartapefs.cli.{module}') for module, _ in tartapefs.cli.COMMANDS.values()];"
        f" os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3);"
        " tartapefs.cli.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(os.fspath, command)],  # type: ignore[call-overload]
        text=True,
        errors="surrogateescape",
        capture_output=True,
        timeout=120,
    )


_AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


@dataclass(frozen=True)
class Installation:
    """The program and what it needs at run time, and what runs it, where every user can read them."""

    packages: Path
    interpreter: str


@pytest.fixture(scope="session")
def installation() -> Iterator[Installation]:
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    for interpreter in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        if subprocess.run([*_AS_NOBODY, "env", interpreter, "-c", check], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("no Python 3.11 that another user may run")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tartapefs", "click", "fuse", "mfusepy", "pathspec", "typing_extensions"):
            found = find_spec(name)
            if found is None or found.origin is None:
                continue
            origin = Path(found.origin)
            if origin.name == "__init__.py":
                shutil.copytree(origin.parent, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(origin, folder)
        # Or each start would compile them, since these users may not write there.
        subprocess.run([interpreter, "-m", "compileall", "-q", folder], check=True)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        yield Installation(Path(folder), interpreter)


class User:
    """Someone without rights, in a mount namespace with a /dev/fuse that all may open.

    `folder` is the user's own; what is mounted below it, nobody outside sees.
    """

    def __init__(self, folder: Path, installation: Installation) -> None:
        self.folder = folder
        self.packages, self.interpreter = installation.packages, installation.interpreter
        (folder / "fuse").touch()
        os.chown(folder, NOBODY, NOBODY)
        self.holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", "echo; read end"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.holder.stdout is not None
        self.holder.stdout.readline()
        script = 'rm "$1" && mknod -m 666 "$1" c 10 229 && mount --bind "$1" /dev/fuse && : > "$2"'
        result = self.as_root("sh", "-c", script, "sh", folder / "fuse", folder / "fuse.conf")
        assert result.returncode == 0, result.stderr

    def as_root(self, *command: object) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt"]
        options = {"text": True, "errors": "replace", "capture_output": True, "timeout": 30}
        return subprocess.run([*enter, *map(os.fspath, command)], **options)

    def __call__(self, *command: object) -> subprocess.CompletedProcess[str]:
        return self.as_root(*_AS_NOBODY, *command)

    def tartapefs(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = ["env", f"PYTHONPATH={self.packages}", "PYTHONDONTWRITEBYTECODE=1"]
        return self(*environment, self.interpreter, "-m", "tartapefs", *arguments)

    def close(self) -> None:
        assert self.holder.stdin is not None
        assert self.holder.stdout is not None
        for mountpoint in self.folder.glob("mnt*"):
            self.as_root("umount", "-l", mountpoint)
        self.holder.stdin.close()
        self.holder.wait(60)
        self.holder.stdout.close()


@pytest.fixture
def user(installation: Installation) -> Iterator[User]:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        try:
            probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("unshare is not installed")
        if probe.returncode:
            pytest.skip(f"no mount namespaces: {probe.stderr.strip()}")
        user = User(Path(folder), installation)
        try:
            user("cp", "-r", "/usr/share/doc/fuse3", user.folder / "data")
            user("mkdir", "-p", user.folder / "data" / "more", user.folder / "mnt", user.folder / "mnt2")
            user("cp", "/bin/true", user.folder / "data" / "more" / "program")
            yield user
        finally:
            user.close()


unprivileged = [pytest.mark.root, pytest.mark.needs("unshare", "nsenter", "setpriv", "fusermount3")]
