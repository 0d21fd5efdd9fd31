"""Which module binds the archive to libfuse, and what is said where none can: libraries hidden, modules replaced."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.programs import TARTAPEFS, run
from support.reference import Reference
from support.users import NOBODY, User

from tartapefs.mount import libfuse as binding

LIBRARIES = ("libfuse.so.2", "libfuse3.so.3", "libfuse3.so.4")


def loaded(library: str) -> str:
    """The file that the linker takes for this name; empty if there is none."""
    program = f"import ctypes; ctypes.CDLL({library!r}); print(open('/proc/self/maps').read())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return next((line.split()[-1] for line in result.stdout.splitlines() if "libfuse" in line), "")


def without(libraries: tuple[str, ...], *command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command where these libraries are hidden, by an empty file over each, in a mount namespace."""
    files = [path for path in map(loaded, libraries) if path]
    script = 'n=$1; shift; while [ $n -gt 0 ]; do mount --bind /dev/null "$1"; shift; n=$((n-1)); done; exec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "sh", str(len(files)), *files, *map(os.fspath, command)],
        env={key: value for key, value in os.environ.items() if key != "TARTAPEFS_BINDING"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The line with which mounting was refused."""
    assert (result.returncode, result.stdout) == (5, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def places(tree: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A recorded folder and an empty one."""
    assert run("record", tree).returncode == 0
    (tmp_path / "mnt").mkdir()
    return tree, tmp_path / "mnt"


@pytest.mark.root
@pytest.mark.fuse
def test_without_any_library_all_but_mount_works(places: tuple[Path, Path]) -> None:
    """And `mount` says what to install."""
    root, mountpoint = places
    line = one_line(without(LIBRARIES, *TARTAPEFS, "mount", root, mountpoint))
    assert "apt install fuse3" in line
    assert os.listdir(mountpoint) == []
    for command in (["info", root], ["verify", root], ["ls", root], ["record", "--force", root], ["mount", "--help"]):
        result = without(LIBRARIES, *TARTAPEFS, *command)
        assert result.returncode == 0, result.stderr
    assert without(LIBRARIES, *TARTAPEFS, "unmount", mountpoint).returncode == 5


@pytest.mark.root
@pytest.mark.fuse
def test_with_libfuse_3_alone(places: tuple[Path, Path]) -> None:
    root, mountpoint = places
    reference = Reference(root)
    expected = hashlib.sha256(reference.read(0, reference.size)).hexdigest()
    script = '"$1" -m tartapefs mount "$2" "$3"; sha256sum "$3/archive.tar"; "$1" -m tartapefs unmount "$3"'
    result = without(LIBRARIES[:1], "sh", "-ec", script, "sh", sys.executable, root, mountpoint)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == expected


REFUSING = """
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay -o "lowerdir=/usr/bin,upperdir=$1/upper,workdir=$1/work" overlay /usr/bin
rm /usr/bin/fusermount
printf '#!/bin/sh\necho "mounting over filesystem type 0xca451a4e is forbidden" >&2\nexit 1\n' > "$1/refuses"
install "$1/refuses" /usr/bin/fusermount
"""


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.needs("fusermount3", "setpriv")
def test_libfuse_3_mounts_where_libfuse_2_is_refused(user: User) -> None:
    """Its program knows fewer file systems on which a user may mount; the first refusal is told if both refuse."""
    data, mountpoint, scratch = user.folder / "source", user.folder / "mnt-2", user.folder / "scratch"
    for folder in (data, mountpoint, scratch):
        folder.mkdir()
        os.chown(folder, NOBODY, NOBODY)
    (data / "a").write_bytes(b"content")
    user.as_root("sh", "-ec", REFUSING, "sh", scratch).check_returncode()
    result = user.tartapefs("mount", "--record", data, mountpoint)
    assert result.returncode == 0, result.stderr
    reference = Reference(data)
    whole = user("sha256sum", mountpoint / "archive.tar").stdout.split()[0]
    assert whole == hashlib.sha256(reference.read(0, reference.size)).hexdigest()
    assert user.tartapefs("unmount", mountpoint).returncode == 0
    user.as_root("cp", "/usr/bin/fusermount", "/usr/bin/fusermount3").check_returncode()
    assert "0xca451a4e is forbidden" in one_line(user.tartapefs("mount", data, mountpoint))


FOREIGN = {"another package": "class Fuse: pass\n", "one that fails": "raise RuntimeError('fuseparts')\n"}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=list(FOREIGN))
def test_a_foreign_module_of_the_name_fuse(places: tuple[Path, Path], tmp_path: Path, content: str) -> None:
    """Such as that of Debian's python3-fuse: said in one line, which tells what to install."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "fuse.py").write_text(content)
    paths = os.pathsep.join([str(tmp_path / "foreign"), os.environ.get("PYTHONPATH", "")])
    line = one_line(run("mount", *places, env=os.environ | {"TARTAPEFS_BINDING": "fusepy", "PYTHONPATH": paths}))
    assert "pip install fusepy" in line


def test_an_unknown_choice(places: tuple[Path, Path]) -> None:
    assert "mfusepy" in one_line(run("mount", *places, env=os.environ | {"TARTAPEFS_BINDING": "other"}))


@pytest.mark.parametrize("name", ["fuse_new", "fuse_new_31"])
def test_fuse_new_by_the_name_that_a_version_has(name: str) -> None:
    """libfuse 3.10 has the first alone, 3.14 both, 3.17 the second alone."""
    assert binding._fuse_new(SimpleNamespace(_name="libfuse3.so.3", **{name: 7})) == 7


def test_a_library_that_cannot_mount_is_not_used() -> None:
    with pytest.raises(ImportError, match=r"libfuse3\.so\.5 has no function fuse_new"):
        binding._fuse_new(SimpleNamespace(_name="libfuse3.so.5"))
