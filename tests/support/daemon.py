"""The process behind a mount, for tests: how to find it, run it in the foreground, and look into it."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.programs import TARTAPEFS, our_mounts


def daemons_of(mountpoint: Path) -> list[int]:
    """The processes that serve `mountpoint`: those started with its name as an argument, without their helpers."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if any(b"tartapefs" in part for part in arguments) and os.fsencode(mountpoint) in arguments:
                found[int(entry.name)] = parent
    return [pid for pid, parent in found.items() if parent not in found]


def daemon_of(mountpoint: Path) -> int:
    (pid,) = daemons_of(mountpoint)
    return pid


def helper_of(daemon: int) -> int:
    """The process that takes a share of its requests."""
    (child,) = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    return int(child)


def descriptors(pid: int) -> list[str]:
    """What the descriptors of a process lead to."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


def open_in(root: Path, *pids: int) -> list[str]:
    """What these processes, this one by default, have open below `root`, its index aside."""
    targets = [target for pid in pids or (os.getpid(),) for target in descriptors(pid)]
    return [t for t in targets if t.startswith(f"{root}/") and not t.startswith(f"{root}/.tartape/")]


def resident(pid: int, line: str = "VmRSS") -> int:
    """The memory of a process, in bytes; `VmHWM` for the most that it ever had."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(text.partition(line + ":")[2].split()[0])


def is_gone(pid: int) -> bool:
    """Whether it has ended, though init or its tracer may not have heard yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def bytes_read(pid: int) -> int:
    """What the process has read from files so far, in bytes."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def waits_for_fuse(pid: int) -> bool:
    """Whether the process waits in the kernel for an answer of a FUSE file system."""
    try:
        function = Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return False
    return "fuse" in function or function == "request_wait_answer"


def is_mounted(mountpoint: Path) -> bool:
    return os.fspath(mountpoint) in our_mounts()


def force_unmount(mountpoint: Path) -> None:
    """Unmounts whatever is there, for the end of a test that may have failed."""
    if is_mounted(mountpoint):
        program = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
        subprocess.run([*program, mountpoint], check=False, capture_output=True)


@contextmanager
def foreground(source: Path, mountpoint: Path, *options: object) -> Iterator[subprocess.Popen[bytes]]:
    """`tartapefs mount -f`, once it says that it has mounted; ended and unmounted after the block."""
    process = subprocess.Popen(
        [*TARTAPEFS, "mount", "-v", "-f", source, mountpoint, *map(os.fspath, options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        said = [b""]
        while not said[-1].endswith(b": mounted\n"):
            said.append(process.stderr.readline())
            assert said[-1], b"".join(said)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(60)
        process.stderr.close()
        force_unmount(mountpoint)


def sockets() -> list[Path]:
    """Of mounts of this user."""
    folders = ["/run"] if os.geteuid() == 0 else [os.environ.get("XDG_RUNTIME_DIR", "/nowhere")]
    places = [Path(folder) / "tartapefs" for folder in folders] + [Path(f"/tmp/tartapefs-{os.geteuid()}")]
    return [path for place in places if place.exists() for path in place.iterdir()]
