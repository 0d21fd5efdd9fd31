"""Users other than the one who runs the tests."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


def as_nobody(function: Callable[[], Any]) -> Any:
    """What `function` returns, run in a process of a user without privileges."""
    if os.geteuid():
        return function()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
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


def give_to_nobody(root: Path) -> None:
    if os.geteuid() == 0:
        for path in [root, *root.rglob("*")]:
            os.chown(path, 65534, 65534, follow_symlinks=False)
