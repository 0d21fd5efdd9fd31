"""What a machine can do to the program at any moment: signals, and too little of everything."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run, under_strace

PROGRAM = "from tartapefs.__main__ import main; main()"


# ---- signals


def places_of(module: str) -> list[str]:
    """The files that Python opens to import a module."""
    found = importlib.util.find_spec(module)
    assert found and found.origin
    return [found.origin, importlib.util.cache_from_source(found.origin)]


@pytest.mark.needs("strace")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("module", ["tartapefs.cli", "click.core", "tartapefs.index", "tartapefs.cli.transfer"])
def test_a_signal_while_it_is_starting_ends_it_at_once(tree: Path, module: str, number: signal.Signals) -> None:
    """Whatever is being imported just then."""
    paths = [part for place in places_of(module) for part in ("-P", place)]
    options = ["-e", "trace=openat", "-e", f"inject=openat:signal={number.name}:when=1"]
    result = subprocess.run([*under_strace(*paths, *options), "info", tree], capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (128 + number, b"", b"")


def test_a_signal_while_it_is_ending_ends_it_at_once() -> None:
    """When its work is done, and Python is going down."""
    late = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT); "
    command = [sys.executable, "-c", late + PROGRAM, "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (130, "") and result.stdout


@pytest.mark.needs("strace")
def test_a_signal_that_is_ignored_stays_so(tree: Path) -> None:
    """As nohup and a shell's background jobs have it."""
    paths = [part for place in places_of("tartapefs.cli") for part in ("-P", place)]
    options = ["-e", "trace=openat", "-e", "inject=openat:signal=SIGHUP:when=1"]
    command = ["nohup", *under_strace(*paths, *options), "record", tree]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_public_names_are_there_when_they_are_asked_for() -> None:
    """Though none is imported before: the program can be interrupted from its start."""
    code = (
        "import sys, tartapefs\n"
        "assert not [name for name in sys.modules if name.startswith('tartapefs.')]\n"
        "from tartapefs import *\n"
        "assert TapeRecorder.__name__ == 'TapeRecorder' and tartapefs.Tape is Tape\n"
        "assert not hasattr(tartapefs, 'nothing')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_recording_whose_reader_goes_away_is_whole_or_not_there(tree: Path, stream: str) -> None:
    """The end of a pipe is no reason to leave half an index behind."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = run("record", tree, **{"capture_output": False, stream: writing})
    finally:
        os.close(writing)
    assert result.returncode == 128 + signal.SIGPIPE
    assert os.listdir(tree / ".tartape") == ["index.db"]
    assert run("verify", tree).returncode == 0
