"""The programs `tartapefs` and `mount.tartapefs`, as they are installed.

Rule: an interrupt ends a program that is still being loaded, as it ends most programs; Python would print where it was.
Loading the package takes a good part of a quick command's time, hence a module beside it.
"""

import signal
from typing import NoReturn

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started it wants none
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> NoReturn:
    from tartapefs.cli import main

    main()


def mount_tartapefs() -> NoReturn:
    from tartapefs.cli import mount_tartapefs

    mount_tartapefs()
