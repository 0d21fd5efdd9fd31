"""The commands that messages name: a shell that is given one calls what was meant; and no message has half of one."""

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tartapefs
from tartapefs.base import commands
from tartapefs.base.errors import RECORD_AGAIN, TapeError

PACKAGE = Path(tartapefs.__file__).parent


def test_to_a_python_program_nothing_is_added() -> None:
    assert str(TapeError("is another", RECORD_AGAIN)) == f"is another; {RECORD_AGAIN}"
    assert commands.command("seal") == "tartapefs seal"


def test_folder_and_index_are_added_once_they_are_given() -> None:
    """Also to an error that was made before, whose remedy itself stays as it is."""
    error = TapeError("is another", 'run "tartapefs record --force --no-digest" and "tartapefs seal", or ask "doctor"')
    commands.given("my data", "/an/index.db")
    assert str(error) == (
        "is another; run \"tartapefs record --force --no-digest 'my data' --index /an/index.db\""
        ' and "tartapefs seal \'my data\' --index /an/index.db", or ask "doctor"'
    )
    assert commands.command("resume", "copy.tar") == "tartapefs resume 'my data' --index /an/index.db copy.tar"
    commands.given("-rf", None)
    assert commands.command("seal") == "tartapefs seal ./-rf"


def test_what_is_complete_stays() -> None:
    """So it is no matter how often a text is completed; nor is anything else in quotes a command to complete."""
    commands.given("data", None)
    for text in (
        commands.complete(RECORD_AGAIN),
        'run "tartapefs record other --index i" first',
        '"tartapefs doctor" finds what this machine lacks',
        'or read with "--source-check mtime"',
    ):
        assert commands.complete(text) == text


@given(st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name))
def test_any_name_comes_back_out_of_a_shell(name: bytes) -> None:
    word = commands.quoted(os.fsdecode(name))
    assert word.isprintable()
    if not word.startswith("$"):
        assert shlex.split(word) == [os.fsdecode(name)]


@pytest.mark.needs("bash")
def test_names_that_are_not_printable(tmp_path: Path) -> None:
    names = [b"two\nlines", b"caf\xe9 it's", b"\x1b[31m\\n", "gpj.\u202eexe".encode(), b"plain", b"a'b\"c$d`e\\"]
    line = "printf '%s\\0' " + " ".join(commands.quoted(os.fsdecode(name)) for name in names)
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    printed = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, check=True).stdout
    assert printed.split(b"\0")[:-1] == names


def texts(tree: ast.Module) -> list[str]:
    """The strings in a module that are no docstrings, and no help of click's."""
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr):
            left_out.add(id(node.body[0].value))
        elif isinstance(node, ast.keyword) and node.arg in ("help", "epilog", "metavar", "param_hint"):
            left_out.update(map(id, ast.walk(node.value)))
        elif isinstance(node, ast.Dict):  # the summaries of the commands
            left_out.update(map(id, ast.walk(node)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in found if id(node) not in left_out]


COMPLETED = re.compile(r'"tartapefs (?:doctor|help [a-z-]+|(?:record|seal)(?: --[a-z-]+)*)"')


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_message_has_half_a_command(module: Path) -> None:
    """None but those that are completed when they are shown, of which a command of the command line needs none."""
    if module.name in ("examples.py", "commands.py"):
        return
    for text in texts(ast.parse(module.read_bytes())):
        assert not re.search(r"\bDIR\b", text), text
        for begin in re.finditer('"tartapefs ', text):
            assert COMPLETED.match(text, begin.start()), text
        assert not re.search(r'"(?:record|seal|resume|play|check|verify|ls) ?(?:--[a-z]+)?"', text), text
        if "cli" in module.parts:
            assert '"tartapefs record' not in text and '"tartapefs seal' not in text
