"""The tree of hashes: what it is made of, and what belongs to it."""

import os
import subprocess
from pathlib import Path

from support.programs import TARTAPEFS

from tartapefs.archive import hash_tree as tree


def test_blake3_that_is_not_installed(mixed: Path) -> None:
    code = (
        "import sys; sys.modules['blake3'] = None\n"
        "from tartapefs import Tape, TapeError\n"
        "try: Tape.discover(sys.argv[1])\n"
        "except TapeError as error: print(error)"
    )
    result = subprocess.run([TARTAPEFS[0], "-c", code, mixed], capture_output=True, text=True)
    assert 'pip install "tartapefs[blake3]"' in result.stdout, result.stderr


def test_a_checker_takes_no_hash_across_two_others() -> None:
    one, other = os.urandom(32), os.urandom(32)
    assert tree._is_among(one, other + one)
    assert not tree._is_among((one + other)[5:37], one + other)
    assert not tree._is_among(one, b"")
