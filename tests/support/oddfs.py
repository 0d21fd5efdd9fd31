"""A file system that shows another folder, with facts of its own: `oddfs.py SOURCE FACTS MNT`.

FACTS is a dictionary of what `stat` gives of all in there, times in nanoseconds. It stays in the foreground until it is
unmounted.
"""

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import fuse
from slowfs import SlowFS


class OddFS(SlowFS):
    facts: dict[str, int]

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        return super().getattr(path, fh) | self.facts


if __name__ == "__main__":
    source, facts, mountpoint = sys.argv[1:]
    OddFS.facts = ast.literal_eval(facts)
    fuse.FUSE(OddFS(source), mountpoint, foreground=True, nothreads=True, ro=True, use_ino=True)
