"""Archives that are named after their recording, so that what is copied by name alone is never of two recordings."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.programs import run
from support.reference import Reference

from tartapefs import Tape
from tartapefs.base.naming import MOST_PARTS, file_name, part_count, part_name, part_number, shard_name, shard_number
from tartapefs.mount import mount_table as mounting

Mount = Callable[..., Path]
FINGERPRINT, SEAL = "0123456789abcdef" * 4, "fedcba9876543210" * 4


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("archive.tar", "archive.tar"),
        ("{fingerprint}.tar", f"{FINGERPRINT}.tar"),
        ("{root}-{seal}.tar", f"data-{SEAL}.tar"),
        ("{root}{root}", "datadata"),
        ("{{root}}", "{data}"),
        ("a}b{c", "a}b{c"),
        ("{" * 127 + "é" * 64, "{" * 127 + "é" * 64),
        ("\udcff\n", "\udcff\n"),
    ],
)
def test_names(template: str, expected: str) -> None:
    assert file_name(template, FINGERPRINT, SEAL, "data") == expected


def test_what_is_put_in_is_not_looked_at_again() -> None:
    assert file_name("{root}.tar", FINGERPRINT, SEAL, "{seal}") == "{seal}.tar"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{name}.tar", "{name}"),
        ("{}.tar", "{fingerprint}, {seal}, {root}"),
        ("{Root}", "{Root}"),
        ("{seal}.tar", "tartapefs seal"),
        ("a/{root}", "not a file name"),
        ("", "not a file name"),
        ("..", "not a file name"),
        ("a\0b", "not a file name"),
        ("{fingerprint}" * 4, "256 bytes"),
        ("{root}" + "é" * 126, "256 bytes"),
    ],
)
def test_refused_names(template: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as raised:
        file_name(template, FINGERPRINT, "", "data")
    assert said in str(raised.value)


@pytest.mark.parametrize("number", [1, 9, 10, 99_999])
def test_names_of_parts(number: int) -> None:
    name = part_name("my archive", number)
    assert name == f"my archive.{str(number).rjust(5, '0')}"
    assert part_number(name, "my archive") == number


@pytest.mark.parametrize(
    "part", ["a", "a.", "a.1", "a.00000", "a.000001", "a.0001", "a. 0001", "a.+0001", "a.0000\u0661", "a.00001\n",
             "b.00001", "00001", ".00001", "a.00001.md5", "a.a.00001", "A.00001"]
)  # fmt: skip
def test_other_names_are_of_no_part(part: str) -> None:
    assert part_number(part, "a") is None


@pytest.mark.parametrize("archive", ["a.tar", "a", "a.tar.tar", ".tar"])
@pytest.mark.parametrize("number", [1, 99_999])
def test_names_of_shards(archive: str, number: int) -> None:
    """Each ends in .tar, as programs that read archives want it."""
    name = shard_name(archive, number)
    assert name == f"{archive.removesuffix('.tar')}.{number:05}.tar"
    assert shard_number(name, archive) == number


@pytest.mark.parametrize(
    "shard", ["a.tar", "a.tar.00001", "a.00001", "a.00000.tar", "a.1.tar", "a.000001.tar", "b.00001.tar", "a.00001.TAR"]
)
def test_other_names_are_of_no_shard(shard: str) -> None:
    assert shard_number(shard, "a.tar") is None


@pytest.mark.parametrize("total", [1024, 99_999, 100_000, 2**40, 2**63 - 1])
def test_the_smallest_part_that_a_refusal_names_works(total: int) -> None:
    least = (total + MOST_PARTS - 1) // MOST_PARTS
    assert part_count(total, least) <= MOST_PARTS
    if least > 1:
        with pytest.raises(ValueError, match=f"more than 99,999; a part needs {least:,} bytes or more"):
            part_count(total, least - 1)
    assert part_count(total, total) == part_count(total, total + 1) == 1


@pytest.mark.parametrize("name", ["{name}", "{seal}", "{root}/x", "{fingerprint}" * 4])
def test_mount_refuses_them(tree: Path, tmp_path: Path, name: str) -> None:
    """With exit code 2, and before it records anything."""
    (tmp_path / "mnt").mkdir()
    recorded = name == "{seal}"  # which only the tape can tell
    if recorded:
        assert run("record", tree).returncode == 0
    result = run("mount", tree, tmp_path / "mnt", "--name", name, "--record")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("Error: Invalid value for")
    assert (tree / ".tartape").exists() == recorded
    assert os.listdir(tmp_path / "mnt") == []


def test_each_recording_has_a_name_of_its_own(tree: Path, mount: Mount) -> None:
    """And every command knows it."""
    assert run("record", "--digest", "sha256", tree).returncode == 0
    with Tape.discover(tree) as tape:
        fingerprint, seal = tape.fingerprint, tape.seal
    folder = mount(tree, "--name", "{root} {fingerprint} {seal}.tar").parent
    (name,) = os.listdir(folder)
    assert name == f"data {fingerprint} {seal}.tar"
    assert Reference(tree).size == (folder / name).stat().st_size
    status = run("status", folder, "--json")
    assert f'"name": "{name}"' in status.stdout
    assert os.getxattr(folder, "user.tartape.name") == name.encode()
    hint = run("resume-hint", tree, "--have", "5", "--archive", folder / "{root} {fingerprint} {seal}.tar").stdout
    assert f"rsync --append '{folder / name}' './{name}'" in hint
    digest = run("digest", tree, "--name", "copies/{fingerprint}.tar")
    assert f"(copies/{fingerprint}.tar)" in digest.stdout
    assert run("unmount", folder).returncode == 0
    (tree / "added").touch()
    assert run("record", "--force", tree).returncode == 0
    (after,) = os.listdir(mount(tree, "--name", "{fingerprint}.tar").parent)
    with Tape.discover(tree) as tape:
        assert after == f"{tape.fingerprint}.tar" != f"{fingerprint}.tar"


def test_a_name_of_digits_stays_a_name(tree: Path, mount: Mount) -> None:
    """Also where only the extended attributes are in reach, of which most are numbers."""
    assert run("record", tree).returncode == 0
    folder = mount(tree, "--name", "0123").parent
    assert mount_attributes(folder)["name"] == "0123"


def mount_attributes(folder: Path) -> dict[str, str | int]:
    return mounting._attributes(os.fspath(folder))


@pytest.mark.needs("curl")
def test_curl_goes_on_with_what_it_began_and_mixes_nothing(tree: Path, mount: Mount, tmp_path: Path) -> None:
    """It knows a copy by its name alone: of `archive.tar` it would make one of two recordings, and exit with 0."""
    large = tree / "photos" / "2024" / "large.bin"
    copies = tmp_path / "copies"
    copies.mkdir()

    def fetch(archive: Path) -> Path:
        subprocess.run(["curl", "-sSf", "-C", "-", "-O", archive.as_uri()], cwd=copies, check=True)
        return copies / archive.name

    begun: dict[str, Path] = {}
    for content in (b"1" * 300_001, b"2" * 300_001):
        large.write_bytes(content)
        os.utime(large, (0, 10**9 + content[0]))  # headers, and so the fingerprint, have whole seconds
        assert run("record", "--force", tree).returncode == 0
        reference = Reference(tree)
        expected = reference.read(0, reference.size)
        for name in ("archive.tar", "{fingerprint}.tar"):
            folder = mount(tree, "--name", name).parent
            (archive,) = folder.iterdir()
            if name not in begun:
                begun[name] = copies / archive.name
                begun[name].write_bytes(expected[:200_000])
            copy = fetch(archive)
            assert run("unmount", folder).returncode == 0
            is_mixed = name == "archive.tar" and content[:1] == b"2"
            assert (copy.read_bytes() == expected) != is_mixed
        if content[:1] == b"1":
            for copy in begun.values():
                os.truncate(copy, 200_000)
    assert begun["{fingerprint}.tar"].stat().st_size == 200_000
    shutil.rmtree(copies)
