"""Signals: none interrupts an undisturbed block, none that the parent ignores is handled, and they end a program."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from types import FrameType

import pytest

from tartapefs.base import signals


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restores the handlers of this process."""
    before = {number: signal.getsignal(number) for number in (*signals.ENDING, signal.SIGPIPE)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def run(text: str) -> int:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(text)], timeout=60).returncode


@pytest.mark.parametrize("number", signals.ENDING)
def test_no_handler_runs_in_an_undisturbed_block(number: signal.Signals) -> None:
    """It runs at the end, also after an inner block, and no signal stays blocked."""
    signals.handle(interrupt)
    reached = []
    with pytest.raises(Interrupted), signals.undisturbed():
        with signals.undisturbed():
            signal.raise_signal(number)  # to this thread: others of a test runner have not blocked it
        reached.append(1)
        for _ in range(1000):
            pass
        reached.append(2)
    assert reached == [1, 2]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_error_in_an_undisturbed_block_unblocks_the_signals() -> None:
    with pytest.raises(ValueError, match="mine"), signals.undisturbed():
        raise ValueError("mine")
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    """As with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.handle(interrupt)
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_program_ends_at_once(number: signal.Signals) -> None:
    """With the exit code of a shell, and without running `finally`."""
    text = f"""
        import os, signal
        from tartapefs.base import signals
        signal.signal({int(number)}, signal.SIG_DFL)
        signals.end_at_once()
        try:
            os.kill(os.getpid(), {int(number)})
            signal.pause()
        finally:
            os._exit(1)
    """
    assert run(text) == 128 + number


def test_a_forked_process_ignores_them() -> None:
    text = """
        import os, signal
        from tartapefs.base import signals
        signals.ignore()
        for number in (*signals.ENDING, signal.SIGPIPE):
            os.kill(os.getpid(), number)
        os._exit(3)
    """
    assert run(text) == 3
