"""Programs that read a mount whose source fails half way: none says that all went well when its copy is wrong.

Run as a script it prints what each program leaves behind, as a table in Markdown.
"""

import random
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.programs import run
from support.readers import (
    RCLONE,
    Failing,
    Program,
    Result,
    common_prefix,
    copied,
    digest_of,
    failing_mount,
    no_copy,
    shell,
)
from support.reference import Reference

pytestmark = pytest.mark.fuse
MIB = 1 << 20
GOOD_START = 700_001  # bytes of the archive that a resumed copy has already


def archived(start: int) -> Callable[[Failing], tuple[bytes | None, bool]]:
    """What an archiver wrote of the one file in its archive, whose header is `start` bytes long."""

    def made(failing: Failing) -> tuple[bytes | None, bool]:
        copy, _ = copied(failing)
        body = (copy or b"")[start : start + len(failing.expected)]
        return (body or None), body == failing.expected

    return made


def decompressed(failing: Failing) -> tuple[bytes | None, bool]:
    copy, _ = copied(failing)
    if copy is None:
        return None, False
    stream = zlib.decompressobj(31)
    data = stream.decompress(copy)
    return data, stream.eof and data == failing.expected


def in_parts(failing: Failing) -> tuple[bytes | None, bool]:
    parts = sorted(failing.folder.glob("part.*"))
    copy = b"".join(part.read_bytes() for part in parts) if parts else None
    return copy, copy == failing.expected


def partial(failing: Failing) -> tuple[bytes | None, bool]:
    """The copy, or what rclone left under a temporary name beside it."""
    copy, right = copied(failing)
    left = sorted(failing.folder.glob("*.partial"))
    return (left[0].read_bytes(), False) if copy is None and left else (copy, right)


def after_a_good_start(command: Callable[[Failing], int]) -> Callable[[Failing], int]:
    def start(failing: Failing) -> int:
        (failing.folder / "copy").write_bytes(failing.expected[:GOOD_START])
        return command(failing)

    return start


# The executable, how it runs, and how to tell what it made.
PROGRAMS: dict[str, Program] = {
    "cp": ("cp", shell('cp "$A" "$OUT"'), copied),
    "cp --sparse=always": ("cp", shell('cp --sparse=always "$A" "$OUT"'), copied),
    "install": ("install", shell('install "$A" "$OUT"'), copied),
    "mv": ("mv", shell('mv "$A" "$OUT"'), copied),
    "cat >": ("cat", shell('cat "$A" > "$OUT"'), copied),
    "dd bs=1M": ("dd", shell('dd if="$A" of="$OUT" bs=1M'), copied),
    "dd bs=1M conv=noerror,sync": (
        "dd", shell('ulimit -f 16384; dd if="$A" of="$OUT" bs=1M conv=noerror,sync'), copied,
    ),
    "dd, resumed": (
        "dd",
        after_a_good_start(
            shell(f'dd if="$A" of="$OUT" bs=64K iflag=skip_bytes oflag=append skip={GOOD_START} conv=notrunc')
        ),
        copied,
    ),
    "head -c": ("head", shell('head -c 100000000 "$A" > "$OUT"'), copied),
    "tail -c +1": ("tail", shell('tail -c +1 "$A" > "$OUT"'), copied),
    "split": ("split", shell('split -b 300000 "$A" "$TO/part."'), in_parts),
    "gzip -c": ("gzip", shell('gzip -1 -c "$A" > "$OUT"'), decompressed),
    "sha256sum": ("sha256sum", shell('sha256sum "$A" > "$OUT"'), digest_of("sha256")),
    "md5sum": ("md5sum", shell('md5sum "$A" > "$OUT"'), digest_of("md5")),
    "cksum": ("cksum", shell('cksum "$A"'), no_copy),
    "cmp": ("cmp", shell('cmp "$A" "$GOOD"'), no_copy),
    "rsync": ("rsync", shell('rsync "$A" "$OUT"'), copied),
    "rsync --partial": ("rsync", shell('rsync --partial "$A" "$OUT"'), copied),
    "rsync --inplace": ("rsync", shell('rsync --inplace "$A" "$OUT"'), copied),
    "rsync --append": ("rsync", after_a_good_start(shell('rsync --append "$A" "$OUT"')), copied),
    "rsync --append-verify": ("rsync", after_a_good_start(shell('rsync --append-verify "$A" "$OUT"')), copied),
    "rclone copyto": ("rclone", shell(f'{RCLONE} copyto "$A" "$OUT"'), partial),
    "rclone copyto --inplace": ("rclone", shell(f'{RCLONE} copyto --inplace "$A" "$OUT"'), partial),
    "rclone cat": ("rclone", shell(f'{RCLONE} cat "$A" > "$OUT"'), copied),
    "tar -cf of the mount": ("tar", shell('tar -b1 -cf "$OUT" -C "$DIR" archive.tar'), archived(512)),
    "tar -xf": ("tar", shell('tar -xf "$A" -C "$TO"'), no_copy),
    "tar -tf": ("tar", shell('tar -tf "$A"'), no_copy),
    "bsdtar -cf of the mount": ("bsdtar", shell('bsdtar --format ustar -cf "$OUT" -C "$DIR" archive.tar'),
                                archived(512)),
    "bsdtar -xf": ("bsdtar", shell('bsdtar -xf "$A" -C "$TO"'), no_copy),
    "cpio -o": ("cpio", shell('cd "$DIR" && echo archive.tar | cpio -o -H newc > "$OUT"'), archived(124)),
    "curl file://": ("curl", shell('curl -s -o "$OUT" "file://$A"'), copied),
    "busybox cp": ("busybox", shell('busybox cp "$A" "$OUT"'), copied),
    "busybox cat >": ("busybox", shell('busybox cat "$A" > "$OUT"'), copied),
    "7z a": ("7z", shell('7z a -tzip -mx0 -bd "$OUT" "$A"'), no_copy),
    "python shutil.copyfile": (
        "python3", shell('"$PYTHON" -c "import shutil, sys; shutil.copyfile(*sys.argv[1:])" "$A" "$OUT"'), copied,
    ),
}  # fmt: skip

# Programs that exit 0 though they were told of the error, in versions that are about: the documentation warns of them.
# Even so, what they made is not taken for right: a copy that is shorter, and a checksum of nothing.
SAYS_NOTHING = ("curl file://", "cksum")


def outcome(failing: Failing, name: str) -> Result:
    _, start, made = PROGRAMS[name]
    code = start(failing)
    return Result(code, *made(failing))


@pytest.mark.matrix(but=r"-cached|\[(cp|tar)-")
@pytest.mark.long(but=r"\[(cp|dd bs=1M|rsync|rclone copyto|curl|tar)-cached")
@pytest.mark.parametrize("options", [("--direct",), ()], ids=["direct", "cached"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_ends_well_with_a_wrong_copy(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    """Exit code 0 stands for an equal copy alone; what is not recorded is never in a copy, except for zeros."""
    if shutil.which(PROGRAMS[name][0]) is None:
        pytest.skip(f"{PROGRAMS[name][0]} is not installed")
    with failing_mount(tmp_path, *options) as failing:
        result = outcome(failing, name)
        assert not result.right
        assert result.code != 0 or name in SAYS_NOTHING, result.describe(failing.expected)
        if result.code == 0 and result.copy is not None:
            assert len(result.copy) < len(failing.expected)
        if result.copy is not None:
            good = common_prefix(result.copy, failing.expected)
            assert good <= failing.good
            assert not result.copy[good:].strip(bytes(1))
    shutil.rmtree(tmp_path)


@pytest.mark.needs("rsync")
def test_append_verify_believes_a_full_size(tmp_path: Path) -> None:
    """What rsync --inplace left has the right size, so --append-verify skips it and exits 0; --checksum mends it."""
    root = tmp_path / "data"
    with failing_mount(tmp_path) as failing:
        result = outcome(failing, "rsync --inplace")
        assert result.code == 23
        assert result.copy is not None
        assert len(result.copy) == len(failing.expected)
    (root / "m.bin").write_bytes(random.Random(12).randbytes(MIB))
    assert run("record", "--force", root).returncode == 0
    reference = Reference(root)
    assert run("mount", root, tmp_path / "mnt").returncode == 0
    try:
        copy = tmp_path / "copies" / "copy"
        archive = tmp_path / "mnt" / "archive.tar"
        subprocess.run(["rsync", "--append-verify", archive, copy], check=True, timeout=60)
        assert copy.read_bytes() == result.copy
        subprocess.run(["rsync", "--checksum", archive, copy], check=True, timeout=60)
        assert copy.read_bytes() == reference.read(0, reference.size)
    finally:
        assert run("unmount", tmp_path / "mnt").returncode == 0
    shutil.rmtree(tmp_path)


def main() -> None:
    print("| program | exit code | what is left | the same with `--direct` |")
    print("|---|---|---|---|")
    for name, (executable, *_) in PROGRAMS.items():
        if shutil.which(executable) is None:
            continue
        cells = []
        for options in ((), ("--direct",)):
            with tempfile.TemporaryDirectory() as folder, failing_mount(Path(folder), *options) as failing:
                result = outcome(failing, name)
                cells.append((result.code, result.describe(failing.expected)))
        (code, left), direct = cells
        same = "yes" if cells[0] == cells[1] else f"{direct[0]}; {direct[1]}"
        print(f"| `{name}` | {code} | {left} | {same} |", flush=True)


if __name__ == "__main__":
    main()
