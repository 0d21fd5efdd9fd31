"""What one audit of 100,000 directories costs, and what a minute of a mount that is open pays for it.

Usage: python tests/bench/audit.py [DIRECTORIES]
"""

import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from tartapefs import Tape, TapePlayer, TapeRecorder
from tartapefs.mount.operations import MountOptions


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    options = MountOptions()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "data"
        for number in range(count):
            (root / str(number // 1000) / str(number % 1000)).mkdir(parents=True)
        TapeRecorder(root).commit()
        with Tape.discover(root) as tape, closing(TapePlayer(tape)) as player:
            for share in (1.0, options.audit_share):
                begun, cpu = time.monotonic(), time.process_time()
                player.audit(share)
                wall, cpu = time.monotonic() - begun, time.process_time() - cpu
                a_minute = cpu * 60 / (wall + options.audit_interval)
                print(
                    f"{count:,} directories, share {share:.0%}: {cpu:.2f} s of processor time in {wall:.1f} s;"
                    f" {a_minute:.2f} s a minute ({a_minute / 60:.1%} of a core)"
                )


if __name__ == "__main__":
    main()
