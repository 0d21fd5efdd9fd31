"""The completion script of each shell, and what the program answers to it."""

import os
import shutil
import subprocess
import sys

import pytest
from support.programs import TARTAPEFS, done, refused, run

from tartapefs.cli.completion import SHELLS


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_printed_and_a_shell_can_parse_it(shell: str) -> None:
    """The shell itself need not be installed for it to be printed."""
    script = done(run("completion", shell, env={"PATH": "/nowhere"}))
    assert f"_TARTAPEFS_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, capture_output=True)


@pytest.mark.parametrize("shell", ["", "csh", "BASH"])
def test_other_shells_are_refused(shell: str) -> None:
    refused(run("completion", shell), 2)


def completions(*words: str) -> list[str]:
    """What the program answers to bash for the last of these words."""
    environment = {"_TARTAPEFS_COMPLETE": "bash_complete", "COMP_CWORD": str(len(words))}
    environment["COMP_WORDS"] = "\n".join(("tartapefs", *words))
    # As an installed program is called: by its module click takes another name for it.
    program = [sys.executable, "-c", "import sys; sys.argv[0] = 'tartapefs'; from tartapefs.cli import main; main()"]
    result = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("mou",), ["plain,mount"]),
        (("verify",), ["plain,verify", "plain,verify-extracted"]),
        (("mount", "--on-d"), ["plain,--on-drift", "plain,--on-drift-run"]),
        (("record", "--digest", ""), ["plain,blake3", "plain,sha256"]),
        (("completion", "z"), ["plain,zsh"]),
        (("info", "da"), ["file,da"]),
        (("nonsense", "x"), []),
    ],
)
def test_commands_options_values_and_paths_are_completed(words: tuple[str, ...], expected: list[str]) -> None:
    assert completions(*words) == expected


def test_the_program_completes_by_its_module_too() -> None:
    environment = {"_TARTAPEFS_COMPLETE": "bash_complete", "COMP_WORDS": "tartapefs unm", "COMP_CWORD": "1"}
    result = subprocess.run(TARTAPEFS, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == ["plain,unmount"]
