"""The summary: how much of a folder its archive holds otherwise."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.behind import shown
from support.filesystems import mounted
from support.programs import run

from tartapefs import TapeRecorder
from tartapefs.record import summary

NOTHING = {
    "further_names": 0,
    "further_bytes": 0,
    "sparse_files": 0,
    "sparse_bytes": 0,
    "other_owners": 0,
    "file_systems": 0,
    "with_attributes": 0,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    (root / "plain").write_bytes(b"x" * 5000)
    os.chown(root, 0, 0)
    return root


def counted(root: Path, **options: bool | int) -> dict[str, int | None]:
    recorder = TapeRecorder(root, overwrite=True, **options)  # type: ignore[arg-type]
    recorder.commit()
    return recorder.summary.facts()


def lines(root: Path, *options: str) -> list[str]:
    """What the command says after how many members there are."""
    result = run("record", "--force", root, *options)
    assert result.returncode == 0, result.stderr
    said = [line.removeprefix("tartapefs: ") for line in result.stderr.splitlines()]
    return said[1 + next(at for at, line in enumerate(said) if line.startswith("recorded ")) : -1]


@pytest.mark.root
def test_nothing(root: Path) -> None:
    (root / "empty").touch()
    (root / "link").symlink_to("plain")
    assert counted(root) == NOTHING
    assert lines(root) == []


@pytest.mark.root
def test_hard_links(root: Path) -> None:
    """Of two files with three and two names, one name of which lies outside; and of a symbolic link."""
    (root / "a").mkdir()
    for name in ("a/second", "third"):
        os.link(root / "plain", root / name)
    (root / "other").write_bytes(b"y" * 700)
    os.link(root / "other", root.parent / "outside")
    (root / "link").symlink_to("plain")
    os.link(root / "link", root / "link again", follow_symlinks=False)
    assert counted(root) == NOTHING | {"further_names": 3, "further_bytes": 10_000}
    assert lines(root) == ["hard links: 3 further names of files are full copies, 10,000 bytes more (9.8 KiB)"]


@pytest.mark.root
def test_more_names_than_are_remembered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_MOST", 1)
    (root / "first").write_bytes(b"1")
    for name in ("first", "plain"):
        os.link(root / name, root / f"{name} again")
    os.link(root / "plain", root / "plain once more")
    recorder = TapeRecorder(root)
    recorder.commit()
    # "first" is forgotten with its last name, so "plain", which comes after it, is remembered.
    assert (recorder.summary.further_names, recorder.summary.counts_all_names) == (3, True)
    os.link(root / "first", root / "z")
    recorder = TapeRecorder(root, overwrite=True)
    recorder.commit()
    assert (recorder.summary.further_names, recorder.summary.counts_all_names) == (2, False)


@pytest.mark.root
def test_sparse_files(root: Path) -> None:
    with mounted("-t", "tmpfs", "-o", "mode=755", "tmpfs", root):
        with open(root / "sparse", "wb") as file:
            file.truncate(1 << 30)
            file.seek(1 << 20)
            file.write(b"x" * 4096)
        (root / "plain").write_bytes(b"x" * 5000)
        os.link(root / "sparse", root / "sparse again")
        found = counted(root)
        hole = (1 << 30) - 4096
        assert (found["sparse_files"], found["sparse_bytes"]) == (1, hole)
        assert (found["further_names"], found["further_bytes"]) == (1, 1 << 30)
        assert f"sparse or compressed files: 1 are written out, with {hole:,} bytes" in "\n".join(lines(root))


@pytest.mark.root
def test_owners(root: Path) -> None:
    (root / "folder").mkdir()
    (root / "link").symlink_to("plain")
    os.chown(root / "plain", 1, 0)
    os.chown(root / "folder", 0, 1)
    os.chown(root / "link", 1, 1, follow_symlinks=False)
    assert counted(root) == NOTHING | {"other_owners": 3}
    assert lines(root)[0].startswith("owners: 3 members have others than root")
    assert counted(root, anonymize=False) == NOTHING
    assert lines(root) == []  # owners are kept now


@pytest.mark.root
def test_file_systems(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "c").mkdir()
    with mounted("-t", "tmpfs", "tmpfs", root / "a"):
        (root / "a" / "b").mkdir()
        with mounted("-t", "tmpfs", "tmpfs", root / "a" / "b"), mounted("-t", "tmpfs", "tmpfs", root / "c"):
            assert counted(root) == NOTHING | {"file_systems": 3}
            assert lines(root)[0].startswith("file systems: 3 mounted below the folder are in the archive")
            assert counted(root, one_file_system=True) == NOTHING | {"file_systems": 2}
            assert lines(root) == ["file systems: 2 mounted below the folder are empty folders in the archive"]
            facts = json.loads(run("record", root, "--force", "--json").stdout)["summary"]
            assert facts == NOTHING | {"file_systems": 2}


@pytest.mark.root
def test_attributes(root: Path) -> None:
    """ACLs, also the default one of a folder, attributes of a user and of a link; not the label that each file has."""
    (root / "folder").mkdir()
    (root / "link").symlink_to("plain")
    for name in ("acl", "user", "labelled"):
        (root / name).touch()
    subprocess.run(["setfacl", "-m", "u:nobody:r", root / "acl"], check=True)
    subprocess.run(["setfacl", "-d", "-m", "u:nobody:r", root / "folder"], check=True)
    os.setxattr(root / "user", "user.note", b"kept")
    os.setxattr(root / "link", "trusted.note", b"", follow_symlinks=False)
    os.setxattr(root / "labelled", "security.selinux", b"unconfined_u:object_r:user_home_t:s0")
    assert counted(root) == NOTHING | {"with_attributes": 4}
    assert lines(root)[0].startswith("attributes: 4 members with extended attributes or ACLs, which are left out")
    os.setxattr(root, "user.note", b"")
    assert counted(root)["with_attributes"] == 5


def test_attributes_that_two_processes_count(root: Path) -> None:
    for number in range(3000):
        (root / f"{number:04}").touch()
        if number % 3 == 0:
            os.setxattr(root / f"{number:04}", "user.note", b"")
    recorder = TapeRecorder(root, processes=2)
    recorder.commit()
    assert recorder.summary.with_attributes == 1000


@pytest.mark.root
def test_attributes_are_not_asked_of_a_server(root: Path, tmp_path: Path) -> None:
    os.setxattr(root / "plain", "user.note", b"")
    with shown(tmp_path / "mirror", "bindfs", "-f", root, tmp_path / "mirror"):
        recorder = TapeRecorder(tmp_path / "mirror", tmp_path / "index.db")
        recorder.commit()
        assert recorder.summary.with_attributes is None
