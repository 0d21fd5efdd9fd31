"""Read-ahead: how many bytes of a mount the kernel reads before a program asks for them.

Rule: it is a number of this one mount, in sysfs, which only root can change. Without root it stays at the kernel's
128 KiB, or at what an administrator has set for all new file systems.
"""

import contextlib

ENOUGH = 4 << 20  # bytes: four of the largest requests; more is not faster


def _path(device: str) -> str:
    return f"/sys/class/bdi/{device}/read_ahead_kb"


def current(device: str) -> int | None:
    """The read-ahead of the mount with this device (`major:minor`), in bytes; None if it cannot be seen."""
    with contextlib.suppress(OSError, ValueError), open(_path(device), encoding="ascii") as file:
        return 1024 * int(file.read())
    return None


def enlarge(device: str, size: int = ENOUGH) -> int | None:
    """Has the kernel read ahead at least `size` bytes, if this process may; returns how many it does, as `current`."""
    before = current(device)
    if before is not None and before < size:
        with contextlib.suppress(OSError), open(_path(device), "w", encoding="ascii") as file:
            file.write(str(size // 1024))
    return current(device)
