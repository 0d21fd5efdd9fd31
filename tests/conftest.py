"""Fixtures for tests on real mounts, and the rule that no test leaves a mount, process or descriptor behind."""

import gc
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings
from support import programs
from support.copies import ROOT
from support.forking import Server
from support.machine import machine as machine
from support.programs import our_mounts, run, wait_until
from support.reference import Reference, gnu_tar
from support.users import installation as installation
from support.users import user as user

from tartapefs import TapeRecorder

collect_ignore = ["bench", "long/fuzz_index.py", "long/mutants.py", "long/soak.py"]  # programs, not tests
# Large, or not to be had beside what the other tests need: `make clients` runs them in an environment of their own.
collect_ignore += [
    f"system/test_{library}.py" for library in ("ratarmount", "ray", "s3fs") if find_spec(library) is None
]

LONG = Path(__file__).parent / "long"
FUSE = os.path.exists("/dev/fuse") and os.access("/dev/fuse", os.R_OK | os.W_OK)


MARK = f"TARTAPEFS_TESTS={os.getpid()}".encode()  # in the environment of all that these tests start


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TARTAPEFS_TESTS"] = str(os.getpid())
    settings.register_profile("any machine", deadline=None)
    settings.load_profile("any machine")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has what it starts ignore it
    config.addinivalue_line(
        "markers",
        "long(but): not run by `make test`, as all of tests/long; of a parametrised test `but` stays there: its first"
        " cases, if it is a number, or those whose names this expression finds",
    )
    config.addinivalue_line(
        "markers",
        "matrix(but): run by `make matrix` alone, since some of its cases stand for all: `but` stays where it was",
    )
    config.addinivalue_line("markers", "fuse: needs /dev/fuse")
    config.addinivalue_line("markers", "needs(*programs): needs these programs on PATH")
    config.addinivalue_line("markers", "root: needs to run as root")
    config.addinivalue_line("markers", "podman: needs Podman, and is run by `make podman` alone")
    config.addinivalue_line("markers", "wild: needs what nobody here wrote, and is run by `make wild`")


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: Counter[tuple[str, str]] = Counter()
    for item in items:
        for name in ("long", "matrix"):
            if (mark := item.get_closest_marker(name)) and "but" in mark.kwargs:
                test, but = item.nodeid.partition("[")[0], mark.kwargs["but"]
                cases[test, name] += 1
                if cases[test, name] <= but if isinstance(but, int) else re.search(but, item.name):
                    item.own_markers.remove(mark)
        if item.path.is_relative_to(LONG):
            item.add_marker("long")
        if not FUSE and (item.get_closest_marker("fuse") or "mount" in getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason="no usable /dev/fuse"))
        if os.geteuid() and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="not root"))
        for marker in item.iter_markers("needs"):
            for program in marker.args:
                if shutil.which(program) is None:
                    item.add_marker(pytest.mark.skip(reason=f"{program} is not installed"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # or each collection looks at all that thousands of tests have


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skip is a failure: something that should have been installed is not."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter and reporter.stats.get("skipped") and exitstatus == 0:
        for report in reporter.stats["skipped"]:
            reporter.write_line(f"skipped in CI, which is a failure: {report.nodeid}: {report.longrepr}")
        session.exitstatus = 1


def our_processes(but: Iterable[str]) -> list[str]:
    """Live processes of tartapefs that these tests started; one that ended and waits for init counts as gone."""
    found = []
    for name in set(os.listdir("/proc")).difference(but):  # those alone, since it is looked after each test
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    line = file.read().replace(b"\0", b" ")
                if b"-m tartapefs " not in line and b"support/forking.py " not in line:
                    continue
                with open(f"/proc/{name}/environ", "rb") as file:
                    environment = file.read()
            except OSError:
                continue
            if MARK in environment:
                found.append(f"{name}: {line.decode(errors='replace')}")
    return found


@pytest.fixture(scope="session", autouse=True)
def program_server() -> Iterator[None]:
    """What `run` forks `tartapefs` from."""
    programs.server = Server()
    yield
    programs.server.close()
    programs.server = None


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    processes = os.listdir("/proc")
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    below = str(tmp_path_factory.getbasetemp())
    left = [mountpoint for mountpoint in our_mounts() if mountpoint.startswith(below)]
    for mountpoint in left:
        subprocess.run(["umount", "-l", mountpoint], check=False)
    assert not left, "the test left mounts behind"
    wait_until(lambda: not our_processes(processes))
    if len(os.listdir("/proc/self/fd")) > descriptors:  # connections are closed by other threads, or as garbage
        gc.collect()
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mount(source, *options)` mounts its archive, in the background, and gives the path of the archive."""
    mountpoints: list[Path] = []

    def mount(source: Path, *options: object) -> Path:
        mountpoint = tmp_path / f"mnt{len(mountpoints)}"
        mountpoint.mkdir()
        result = run("mount", source, mountpoint, *options)
        assert result.returncode == 0, result.stderr
        mountpoints.append(mountpoint)
        return mountpoint / "archive.tar"

    yield mount
    for mountpoint in mountpoints:
        if os.path.realpath(mountpoint) in our_mounts():
            result = run("unmount", mountpoint)
            assert result.returncode == 0, result.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small folder with a file of each kind of size, folders, and links."""
    root = tmp_path / "data"
    (root / "photos" / "2024").mkdir(parents=True)
    (root / "empty-folder").mkdir()
    (root / "empty.txt").write_bytes(b"")
    for size in (1, 511, 512, 513, 1024, 5000):
        (root / "photos" / f"{size}.bin").write_bytes(os.urandom(size))
    (root / "photos" / "2024" / "large.bin").write_bytes(os.urandom(300_001))
    (root / "link").symlink_to("photos/512.bin")
    (root / "dangling").symlink_to("nowhere")
    (root / "script.sh").write_text("#!/bin/sh\n")
    (root / "script.sh").chmod(0o755)
    return root


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can enter, unlike the ones that pytest makes."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "mnt").mkdir()
        yield Path(folder)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder that no test changes: random bodies, and one that ends in zeros."""
    root = tmp_path_factory.mktemp("copies") / ROOT
    (root / "a b").mkdir(parents=True)
    (root / "a b" / "small \n.bin").write_bytes(os.urandom(700))
    (root / "large.bin").write_bytes(os.urandom(5_000_003))
    (root / "link").symlink_to("a b")
    (root / "middle.bin").write_bytes(os.urandom(1_000_000))
    (root / "zeros").write_bytes(os.urandom(300_000) + bytes(2_000_000))
    (root / "zz last").write_bytes(os.urandom(3000))
    TapeRecorder(root).commit()
    return root


@pytest.fixture(scope="session")
def archive(recorded: Path) -> bytes:
    """The archive of `recorded`, as GNU tar makes it."""
    size = Reference(recorded).size
    return gnu_tar(recorded)[:size]


@pytest.fixture(scope="session")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A recorded folder of 72 MB that no test changes, and its archive, as GNU tar makes it."""
    root = tmp_path_factory.mktemp("larger") / "larger"
    root.mkdir()
    for number in range(6):
        (root / f"{number}").write_bytes(os.urandom(12_000_000))
    TapeRecorder(root).commit()
    return root, gnu_tar(root)[: Reference(root).size]


@pytest.fixture
def old_tree(tree: Path) -> Path:
    """Not changed in this second: rsync leaves such a folder or link with the nanoseconds of the copying."""
    for path in (*tree.rglob("*"), tree):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789), follow_symlinks=False)
    return tree
