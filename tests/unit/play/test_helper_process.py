"""The helper process: how two processes fill one request, and how one reports that it failed."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.programs import needs_two_cores
from support.reference import Reference
from support.trees import make_many

from tartapefs import TapeRecorder

pytestmark = needs_two_cores
PREPARED = """
    import mmap, os, signal, sys, threading, time
    from pathlib import Path
    from tartapefs import Tape, TapePlayer
    from tartapefs.play.helper_process import HelperProcess
    tape = Tape.discover(sys.argv[1])
    player, stop = TapePlayer(tape), 400_000
    members = list(tape.headed(0, stop))
    memory = mmap.mmap(-1, 1 << 20)
    helper = HelperProcess(player._assembler, memory)

    def begin_and_wait(last):
        helper.begin(0, 0, stop)
        while helper._claims.first_from_back() > last:
            time.sleep(0.01)
"""


@pytest.fixture
def many(tmp_path: Path) -> Path:
    root = make_many(tmp_path / "many")
    TapeRecorder(root).commit()
    return root


def passes(text: str, *arguments: Path) -> None:
    """Runs `text` after `PREPARED`, in a process that may fork."""
    program = textwrap.dedent(PREPARED) + textwrap.dedent(text)
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_they_meet(many: Path) -> None:
    """However late the helper is: what it cannot do is done here, and nothing is left out."""
    passes(
        """
        begin_and_wait(0)
        assert list(helper.our_members(members)) == []
        assert helper.end() == len(members)
        os.kill(helper._pid, signal.SIGSTOP)
        helper.begin(0, 0, stop)
        assert list(helper.our_members(members)) == members
        threading.Timer(0.2, os.kill, (helper._pid, signal.SIGCONT)).start()
        assert helper.end() == 0
        for _ in range(100):
            helper.begin(0, 0, stop)
            ours = []
            for member in helper.our_members(members):
                ours.append(member)
                time.sleep(1e-5)
            theirs = helper.end()
            assert ours == members[: len(ours)]
            assert len(members) <= len(ours) + theirs <= len(members) + 1
        """,
        many,
    )


def test_it_fills_the_memory(many: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    expected.write_bytes(Reference(many).read(0, 400_000))
    passes(
        """
        begin_and_wait(0)
        assert helper.end() == len(members)
        assert memory[:stop] == Path(sys.argv[2]).read_bytes()
        assert helper.memory_offset(memoryview(memory)[5:]) == 5
        assert helper.memory_offset(memoryview(bytearray(5))) == -1
        """,
        many,
        expected,
    )


def test_it_reports_that_it_failed(many: Path) -> None:
    """Its part is undefined then, and none of its members count as filled."""
    passes(
        """
        changed = next(member for member, header in members if member.size)
        path = Path(sys.argv[1]) / os.fsdecode(changed.path)
        path.write_bytes(bytes(changed.size))
        begin_and_wait(changed.start)
        assert helper.end() == -1
        assert helper.first_filled > stop
        os.kill(helper._pid, signal.SIGKILL)
        os.waitpid(helper._pid, 0)
        helper.begin(0, 0, stop)
        assert helper.end() == -1
        """,
        many,
    )
