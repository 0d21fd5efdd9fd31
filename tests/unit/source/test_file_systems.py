"""Types of file systems: on which the kernel's own answer is true, and which are not to be trusted."""

import os
from pathlib import Path

import pytest

from tartapefs.base import mountinfo
from tartapefs.base.mountinfo import Mount
from tartapefs.source import file_systems
from tartapefs.source.file_systems import NO_SUBVOLUME

EXT4, BTRFS, TMPFS, OVERLAY, NFS, PROC = 0xEF53, 0x9123683E, 0x01021994, 0x794C7630, 0x6969, 0x9FA0


@pytest.mark.parametrize(
    ("magic", "is_local", "has_late_times", "may_refuse_leases"),
    [
        (EXT4, True, False, False),
        (BTRFS, True, False, False),
        (TMPFS, True, True, False),
        (OVERLAY, False, True, False),
        (NFS, False, False, True),
        (0x65735546, False, False, False),  # FUSE
        (0, False, False, False),
    ],
)
def test_types(
    monkeypatch: pytest.MonkeyPatch, magic: int, is_local: bool, has_late_times: bool, may_refuse_leases: bool
) -> None:
    monkeypatch.setattr(file_systems, "magic_of", lambda fd: magic)
    device = os.fstat(0).st_dev
    assert file_systems.local_device(0) == (device if is_local else None)
    assert file_systems.has_late_times(0) == has_late_times
    assert file_systems.may_refuse_leases(0) == may_refuse_leases


def test_only_local_files_are_not_asked_of_their_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def lstat_uncached(fd: int, path: bytes = b"") -> str:
        asked.append(path)
        return "asked"

    monkeypatch.setattr(file_systems, "lstat_uncached", lstat_uncached)
    folder = os.open(tmp_path, os.O_PATH)
    device = os.fstat(folder).st_dev
    (tmp_path / "x").touch()
    try:
        assert file_systems.fstat(folder, device) == os.fstat(folder)
        assert file_systems.lstat(folder, b"x", device) == os.lstat(tmp_path / "x")
        assert asked == []
        for other in (None, device + 1):
            assert file_systems.fstat(folder, other) == "asked"  # type: ignore[comparison-overlap]
            assert file_systems.lstat(folder, b"x", other) == "asked"  # type: ignore[comparison-overlap]
        assert asked == [b"", b"x"] * 2
    finally:
        os.close(folder)


def test_folders_that_change_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.stat(tmp_path)
    facts = list(found)
    facts[1] = NO_SUBVOLUME
    no_subvolume = os.stat_result(facts)
    for magic, of, says in (
        (PROC, found, "lies on procfs"),
        (BTRFS, no_subvolume, "a subvolume that the snapshot does not hold"),
        (BTRFS, found, None),
        (EXT4, no_subvolume, None),
    ):
        monkeypatch.setattr(file_systems, "magic_of", lambda fd, magic=magic: magic)
        why = file_systems.why_unstable(-1, of)
        assert (why is None) if says is None else (why is not None and says in why)


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ([], []),
        ([(1, "/", "ext4")], []),
        ([(1, "/srv", "nfs4")], ["nfs4"]),  # the root lies on it
        ([(2, "/srv", "nfs4")], []),  # another mount, below the one that the root lies on
        ([(2, "/srv/data/a", "fuse.sshfs"), (3, "/srv/data/b", "cifs")], ["cifs", "fuse.sshfs"]),
        ([(2, "/srv/data/a", "fuse.sshfs"), (3, "/srv/data/b", "fuse.sshfs")], ["fuse.sshfs"]),
        ([(2, "/srv/database", "nfs"), (3, "/srv/data/a", "fuseblk"), (4, "/srv/data/b", "nfs44")], []),
    ],
)
def test_foreign_types(
    monkeypatch: pytest.MonkeyPatch, mounts: list[tuple[int, str, str]], expected: list[str]
) -> None:
    table = [Mount(number, "0:1", mountpoint, fstype, "source", "rw") for number, mountpoint, fstype in mounts]
    monkeypatch.setattr(mountinfo, "number_of", lambda fd: 1)
    monkeypatch.setattr(mountinfo, "mounts", lambda: iter(table))
    assert file_systems.foreign_types(-1, "/srv/data") == expected


def test_a_system_without_a_table_of_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(mountinfo, "mounts", refuse)
    assert file_systems.foreign_types(-1, "/srv/data") == []
