"""What a machine can do to the program at any moment: signals, and too little of everything."""

import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click
import pytest
from support.daemon import daemons_of, force_unmount, helper_of, is_gone, is_mounted
from support.machine import Machine
from support.mounting import mountpoint as mountpoint
from support.programs import TARTAPEFS, needs_two_cores, run, under_strace, wait_until
from support.reference import Reference

from tartapefs import MountError, Tape, TapeConstraintError, TapeRecorder
from tartapefs.cli.mounts import mount as mount_command
from tartapefs.mount import mount_table as mounting
from tartapefs.play.audit import Throttle

PROGRAM = "from tartapefs.__main__ import main; main()"


# ---- signals


def places_of(module: str) -> list[str]:
    """The files that Python opens to import a module."""
    found = importlib.util.find_spec(module)
    assert found and found.origin
    return [found.origin, importlib.util.cache_from_source(found.origin)]


@pytest.mark.long(but=4)
@pytest.mark.needs("strace")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("module", ["tartapefs.cli", "click.core", "tartapefs.index.reader", "tartapefs.cli.tapes"])
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
        "assert not hasattr(tartapefs, 'nothing') and not hasattr(tartapefs, 'Nothing')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module", ["play.engine", "record.recorder", "api.tape", "api.archive_file", "mount.daemon", "mount.session", "api"]
)
def test_any_module_may_be_the_first_that_is_imported(module: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"import tartapefs.{module}"], capture_output=True, text=True)
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


def below(*roots: Path) -> dict[Path, tuple[int, bytes]]:
    """What lies there: the mode, and a file's bytes."""
    paths = [path for root in roots for path in [root, *root.rglob("*")]]
    return {path: (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in paths}


@pytest.mark.long(but=4)
@pytest.mark.needs("strace")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("command", ["record", "record --force", "record --index", "seal", "digest --sums", "extract"])
def test_a_signal_in_the_middle_leaves_nothing_behind(
    tree: Path, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    """Whatever a command writes is whole or not there, as if it had not been run; a seal keeps what it is for."""
    large, copy, there = tree / "photos" / "2024" / "large.bin", tmp_path / "copy.tar", tmp_path / "there"
    there.mkdir()
    arguments: list[str | Path] = [tree]
    match command:
        case "record --index":
            arguments += [there / "index.db"]
        case "seal":
            arguments += ["--digest", "sha256"]
        case "digest --sums":
            arguments += [there / "sums"]
        case "extract":
            arguments += [copy, "data/photos", "-C", there]
    if command not in ("record", "record --index"):
        assert run("record", tree).returncode == 0
    if command == "extract":
        assert run("seal", tree, "--digest", "sha256").returncode == 0
        assert run("play", tree, "-o", copy).returncode == 0
    before = below(tree, there)
    call = "fcntl" if command.startswith("record") else "preadv2"
    place, when = ["-P", large], 1
    if command == "extract":
        call, place, when = "pwrite64", [], 2  # while the second file is written
    strace = under_strace(*place, "-e", f"trace={call}", "-e", f"inject={call}:signal={number.name}:when={when}")
    words = command.split()
    given = [words[0], arguments[0], *words[1:], *arguments[1:]]
    result = subprocess.run([*strace, *map(os.fspath, given)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 128 + number, result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.count("\n") <= 2  # interrupted, and how to go on
    if command == "seal":  # what has been read already is kept, for the next time
        (tree / ".tartape" / "index.db.seal").unlink()
    if command == "extract":  # the members before it are there, as they were
        for path in [path for path in there.rglob("*") if path.is_file()]:
            assert path.read_bytes() == (tree.parent / path.relative_to(there)).read_bytes()
            path.unlink()
        shutil.rmtree(there / "data")
    assert below(tree, there) == before


@needs_two_cores
def test_a_helper_that_is_killed_does_not_end_the_command(tmp_path: Path) -> None:
    """The command goes on without it; a signal that its socket may bring about is not for the command."""
    root = tmp_path / "many"
    root.mkdir()
    for number in range(5000):
        (root / str(number)).write_bytes(b"%d" % number)
    assert run("record", root).returncode == 0
    process = subprocess.Popen(
        [*TARTAPEFS, "play", "--events", root, "-o", tmp_path / "copy"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline()
    os.kill(helper_of(process.pid), signal.SIGKILL)  # while the pipe is full
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"")
    assert (tmp_path / "copy").read_bytes() == Reference(root).read(0, 1 << 24)


# ---- too little of everything


@pytest.fixture
def recorded(tree: Path) -> Path:
    assert run("record", tree).returncode == 0
    return tree


def is_served_or_says_why(result: subprocess.CompletedProcess[str], recorded: Path, mountpoint: Path) -> bool:
    """Whether the archive can be read. If not, there is one line, the right exit code, and nothing is left.

    A warning that `status` will have no socket may come before that line.
    """
    if result.returncode == 0:
        assert (mountpoint / "archive.tar").read_bytes() == Reference(recorded).read(0, 1 << 20)
        assert run("unmount", mountpoint).returncode == 0
        return True
    lines = [line for line in result.stderr.splitlines() if "no socket for `tartapefs status`" not in line]
    assert result.returncode == 5 and len(lines) == 1, result.stderr
    assert not os.listdir(mountpoint) and not daemons_of(mountpoint)
    return False


@pytest.mark.fuse
@pytest.mark.parametrize("megabytes", [40, 80, 1000])
def test_little_memory(recorded: Path, mountpoint: Path, megabytes: int) -> None:
    """A mount that is told of is one that goes on; the most is enough."""
    size = megabytes * 1_000_000
    result = run("mount", recorded, mountpoint, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)))
    assert is_served_or_says_why(result, recorded, mountpoint) or megabytes < 1000


@pytest.mark.long(but=1)
@pytest.mark.fuse
@pytest.mark.parametrize("descriptors", [9, 12, 15, 40])
def test_few_descriptors(recorded: Path, mountpoint: Path, descriptors: int) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))  # noqa: E731
    result = run("mount", recorded, mountpoint, preexec_fn=limit)
    assert is_served_or_says_why(result, recorded, mountpoint) or descriptors < 40
    for command in (["verify", recorded], ["digest", recorded], ["play", recorded], ["record", "--force", recorded]):
        result = run(*command, preexec_fn=limit)
        assert (result.returncode == 0) != (result.returncode in (1, 4) and "Too many open files" in result.stderr)
        assert "Traceback" not in result.stderr


@pytest.mark.long(but=1)
@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.needs("setpriv")
@pytest.mark.parametrize("processes", [1, 4, 8, 400])
def test_few_processes(machine: Machine, processes: int) -> None:
    """A limit on a user's processes counts threads, too. What would be faster with several works with one.

    It counts those of this user's other processes as well, such as other tests': 400 are enough for all.
    """
    machine.root("truncate", "-s", "1M", machine.data / "large").check_returncode()
    limited = ["prlimit", f"--nproc={processes}:{processes}"]
    for command in ("record --force", "digest", "play --events", "seal --digest sha256"):
        result = machine.user(*limited, "tartapefs", *command.split(), machine.data)
        # Sealing and digests are threads' work. Whatever cannot be is one line.
        assert result.returncode == 0 or "no thread can be started" in result.stderr.splitlines()[-1], result.stderr
        assert "Traceback" not in result.stderr
        assert result.returncode == 0 or command not in ("record --force", "play --events")
    result = machine.user(*limited, "tartapefs", "mount", machine.data, machine.mountpoint)
    if result.returncode:
        assert result.returncode == 5 and result.stderr.count("\n") == 1 and processes < 400, result.stderr
        assert machine.daemons() == machine.mounted() == []
    else:
        assert machine.user("md5sum", machine.mountpoint / "archive.tar").returncode == 0
        assert machine.user("tartapefs", "unmount", machine.mountpoint).returncode == 0


@pytest.mark.fuse
@pytest.mark.root
def test_no_temporary_folder(machine: Machine) -> None:
    """There is nothing that needs one."""
    script = """
        for place in /tmp /var/tmp /usr/tmp; do
            if [ -d $place ]; then mount --rbind $place $place; mount -o remount,bind,ro $place; fi
        done
    """
    machine.root("sh", "-euc", script).check_returncode()
    tartapefs = ["env", "-C", "/proc", "tartapefs"]
    assert machine.root(*tartapefs, "mount", machine.data, machine.mountpoint).returncode == 0
    assert machine.is_served(machine.root)
    assert machine.root(*tartapefs, "unmount", machine.mountpoint).returncode == 0
    result = machine.root(*tartapefs, "doctor", machine.data)
    assert (result.returncode, result.stderr) == (1, "")
    assert re.search("problem +temporary .*\n.*TMPDIR", result.stdout), result.stdout


# ---- mounts that others have, or take away


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.needs("unshare")
def test_a_mount_that_another_namespace_has_too(recorded: Path, mountpoint: Path) -> None:
    """As a container that is started copies all mounts: whoever unmounts here is told who has the source in use."""
    assert run("mount", recorded, mountpoint).returncode == 0
    holder = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin and holder.stdout
    with holder.stdin, holder.stdout:
        assert holder.stdout.readline() == b"\n"
        (daemon,) = daemons_of(mountpoint)
        result = run("unmount", mountpoint)
        assert result.returncode == 0 and not is_mounted(mountpoint)
        assert f"process {daemon}," in result.stderr and f"namespace of process {holder.pid} (cat)" in result.stderr
        assert result.stderr.count("\n") == 1
        for command in (["record", "--force", recorded], ["mount", recorded, mountpoint], ["unmount", mountpoint]):
            assert run(*command).returncode == 0
    holder.wait(60)
    wait_until(lambda: is_gone(daemon))


@pytest.mark.fuse
@pytest.mark.root
def test_a_mount_that_is_bound_elsewhere_too(recorded: Path, mountpoint: Path) -> None:
    other = mountpoint.with_name("other")
    other.mkdir()
    assert run("mount", recorded, mountpoint).returncode == 0
    subprocess.run(["mount", "--bind", mountpoint, other], check=True)
    try:
        result = run("unmount", mountpoint)
        assert result.returncode == 0 and f"still mounted at {other}" in result.stderr
    finally:
        assert run("unmount", other).returncode == 0


@pytest.mark.fuse
@pytest.mark.needs("strace")
def test_an_unmount_between_two_looks(
    recorded: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch, mount: Callable[..., Path]
) -> None:
    """Somebody else unmounts it just after it was found: then it is unmounted, or there is one line."""
    place = mount(recorded).parent
    found, looks = mounting.mounts, 0

    def looked() -> list[mounting.MountEntry]:
        nonlocal looks
        seen, looks = found(), looks + 1
        if looks == look:
            force_unmount(place)
        return seen

    monkeypatch.setattr(mounting, "mounts", looked)
    look = 1
    mounting.unmount(mounting.entry_of(os.fspath(place)))
    for ask in (lambda: mounting.status(mounting.entry_of(os.fspath(place))), mounting.statuses):
        assert run("mount", recorded, place).returncode == 0
        looks = 0
        with suppress(MountError):
            ask()


# ---- a folder that has drifted when it is mounted


@pytest.mark.fuse
def test_drift_at_mount_is_a_warning(recorded: Path, mount: Callable[..., Path], tmp_path: Path) -> None:
    """What drifted, and what follows, where whoever mounts sees it; in the log as well."""
    (recorded / "photos" / "new").touch()
    place = tmp_path / "here"
    place.mkdir()
    result = run("mount", recorded, place, "--log", tmp_path / "log")
    try:
        assert result.returncode == 0
        what, follows = result.stderr.splitlines()
        assert what.startswith("tartapefs: data/photos: mtime changed since recording")
        assert follows == f"tartapefs: {place}: mounted, but no longer as recorded: every read fails"
        logged = (tmp_path / "log").read_text()
        assert what.removeprefix("tartapefs: ") in logged and follows.removeprefix("tartapefs: ") in logged
        with pytest.raises(OSError, match="Input/output error"):
            (place / "archive.tar").open()
    finally:
        assert run("unmount", place).returncode == 0


@pytest.mark.fuse
def test_a_machine_without_a_log_prints_the_same_two_lines(recorded: Path, mountpoint: Path) -> None:
    """As a container has none; not the tracebacks of a logging that failed."""
    (recorded / "photos" / "new").touch()
    script = """[ ! -e /dev/log ] || mount --bind /dev/null /dev/log
    "$@" mount "$root" "$mnt" && "$@" unmount "$mnt"
    """
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *TARTAPEFS],
        env={**os.environ, "root": str(recorded), "mnt": str(mountpoint)},
        stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["tartapefs", "tartapefs"], result.stderr


@pytest.mark.fuse
def test_an_audit_that_takes_long_is_not_waited_for(recorded: Path, mountpoint: Path) -> None:
    """The mount is there within the patience for the audit, which goes on; nothing is said that is not known."""
    endless = (
        "import threading; from tartapefs.play.engine import TapePlayer; "
        "TapePlayer.audit = lambda *arguments: threading.Event().wait(); "
    )
    command = [sys.executable, "-c", endless + PROGRAM, "mount", recorded, mountpoint]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert (mountpoint / "archive.tar").stat().st_size == Reference(recorded).size
    assert run("unmount", mountpoint).returncode == 0


# ---- input and options that have no end


@pytest.mark.parametrize("before", ["", "cat {copy}; "], ids=["zeros", "a good copy and zeros"])
@pytest.mark.parametrize("copy", ["-", "/dev/fd/0"])
def test_a_stream_without_an_end(recorded: Path, tmp_path: Path, before: str, copy: str) -> None:
    """It is compared, and read a little beyond: exit code 1."""
    good = tmp_path / "copy"
    good.write_bytes(Reference(recorded).read(0, 1 << 20))
    endless = subprocess.Popen(["sh", "-c", before.format(copy=good) + "cat /dev/zero"], stdout=subprocess.PIPE)
    with endless:
        result = run("check", recorded, copy, "--json", stdin=endless.stdout)
        endless.terminate()
    facts = json.loads(result.stdout)
    assert (result.returncode, facts["complete"]) == (1, False), result.stderr
    assert facts["good"] == (good.stat().st_size if before else 0) and facts["beyond"] >= 64 << 20


def test_a_device_without_an_end(recorded: Path) -> None:
    assert run("check", recorded, "/dev/zero").returncode == 1


@pytest.mark.fuse
def test_a_pipe_is_no_log(recorded: Path, mountpoint: Path) -> None:
    pipe = mountpoint.with_name("pipe")
    os.mkfifo(pipe)
    result = run("mount", recorded, mountpoint, "--log", pipe)
    assert (result.returncode, result.stderr) == (5, f"tartapefs: {pipe}: cannot be the log: is a pipe\n")


@pytest.mark.long(but=4)
@pytest.mark.parametrize("option", ["--audit-interval", "--audit-share", "--scrub-share"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e10", "1e300", "-1", "x", ""])
def test_numbers_that_are_none(recorded: Path, tmp_path: Path, option: str, value: str) -> None:
    """None of them makes a thread end, or never rest."""
    with pytest.raises(click.UsageError):
        mount_command.make_context("mount", [f"{option}={value}", str(recorded), str(tmp_path)])


@pytest.mark.parametrize(
    "command", [["play", "--start"], ["play", "--length"], ["resume-hint", "--have"], ["digest", "--s3-part-size"]]
)
def test_more_bytes_than_a_file_can_have(recorded: Path, command: list[str]) -> None:
    result = run(command[0], recorded, command[1], "9999999999999999999P")
    assert result.returncode == 2 and "more than a file can have" in result.stderr


def test_the_smallest_share_is_a_long_rest() -> None:
    pauses: list[float] = []
    rest = Throttle(1e-300, pauses.append)
    while not pauses:
        rest()
    assert pauses == [3600.0]
    for share in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="a share of one core is"):
            Throttle(share)


# ---- the same thing again


def test_a_recording_that_was_refused_may_be_tried_again(tree: Path) -> None:
    """What was wrong then is not held against it once it is mended."""
    (tree / ("n" * 200)).touch()
    os.chmod(tree / "photos", 0o700)
    recorder = TapeRecorder(tree)
    with pytest.raises(TapeConstraintError):
        recorder.commit()
    (tree / ("n" * 200)).unlink()
    assert recorder.commit() == Tape.discover(tree).fingerprint
    assert recorder.member_count == Tape.discover(tree).member_count and recorder.skipped == ()
