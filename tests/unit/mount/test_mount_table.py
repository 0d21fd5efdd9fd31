"""Which archives are mounted, as the kernel's table says, and which path may become a mount point."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tartapefs.base import mountinfo
from tartapefs.base.errors import MountError
from tartapefs.base.mountinfo import Mount
from tartapefs.mount import mount_table
from tartapefs.mount import status as reports
from tartapefs.mount.mount_table import MountEntry

Table = Callable[..., None]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    """`table([mount, …], …)`: what the kernel's table has at each look in turn; at most these looks are taken."""

    def show(*tables: list[Mount]) -> None:
        left = list(tables)
        monkeypatch.setattr(mountinfo, "mounts", lambda: iter(left.pop(0)))

    return show


def mounted(place: object, device: str = "0:57", owner: int = 0, fstype: str = "fuse.tartapefs") -> Mount:
    return Mount(7, device, str(place), fstype, "/srv/data", f"ro,user_id={owner},group_id=0,allow_other")


def test_archives_are_told_from_other_mounts(table: Table) -> None:
    table([mounted("/a", owner=1000), mounted("/b", "0:58", fstype="fuse.sshfs"), mounted("/c", "0:59")])
    assert mount_table.mounts() == [
        MountEntry("0:57", "/a", "/srv/data", 1000),
        MountEntry("0:59", "/c", "/srv/data", 0),
    ]


def test_of_several_at_a_path_the_last_is_on_top(table: Table, tmp_path: Path) -> None:
    below, above = mounted(tmp_path, "0:57"), mounted(tmp_path, "0:58")
    table([below, above, mounted("/elsewhere")])
    assert [entry.device for entry in mount_table.entries_at(str(tmp_path))] == ["0:57", "0:58"]
    table([below, above, mounted("/elsewhere")])
    assert mount_table.entry_of(str(tmp_path)).device == "0:58"


def test_an_archive_is_found_by_any_name_of_its_mount_point(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by one look at the table."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to("mnt")
    for name in ("mnt", "./mnt/", "link", f"{tmp_path}/../{tmp_path.name}/mnt"):
        table([mounted(os.path.realpath("mnt"))])
        assert mount_table.entry_of(name).device == "0:57"
    table([mounted("/elsewhere")])
    with pytest.raises(MountError, match="no archive of tartapefs is mounted here"):
        mount_table.entry_of("mnt")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda place: None, "no such folder"),
        (lambda place: place.write_text("x"), "is not a folder"),
        (lambda place: (place / "full").mkdir(parents=True), "is not empty"),
    ],
)
def test_what_cannot_be_a_mount_point(
    table: Table, tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "mnt")
    table([])
    with pytest.raises(MountError, match=reason):
        mount_table.check_mountpoint(str(tmp_path / "mnt"), "/srv/data")


def test_a_mount_point_is_its_real_path_and_lies_outside_the_source(table: Table, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to("mnt")
    table([])
    assert mount_table.check_mountpoint(str(tmp_path / "link"), "/srv/data") == os.path.realpath(tmp_path / "mnt")
    for source in (tmp_path, tmp_path / "mnt"):
        table([])
        with pytest.raises(MountError, match="lies inside the recorded folder"):
            mount_table.check_mountpoint(str(tmp_path / "link"), os.path.realpath(source))
    table([mounted(os.path.realpath(tmp_path / "mnt"))])
    with pytest.raises(MountError, match="an archive is mounted here already"):
        mount_table.check_mountpoint(str(tmp_path / "mnt"), "/srv/data")


@pytest.fixture
def umount(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """umount(8) fails; gives what it was called with."""
    called: list[Any] = []

    def fail(where: str, lazy: bool) -> None:
        called.append((where, lazy))
        raise MountError(where, "target is busy.")

    monkeypatch.setattr(mount_table, "_run_umount", fail)
    return called


def test_an_unmount_that_failed_looks_once_whether_another_program_has_done_it(table: Table, umount: list[Any]) -> None:
    entry = MountEntry("0:57", "/mnt/tape", "/srv/data", 0)
    table([mounted("/mnt/tape", "0:58")])  # another archive is there by now
    mount_table.unmount(entry, lazy=True)
    table([mounted("/mnt/tape")])
    with pytest.raises(MountError, match="busy"):
        mount_table.unmount(entry, lazy=True)
    assert umount == [("/mnt/tape", True)] * 2


def test_its_own_mounts_alone_are_unmounted_at_the_end(table: Table, umount: list[Any]) -> None:
    entry = MountEntry("0:57", "/mnt/tape", "/srv/data", 0)
    table([mounted("/mnt/tape", "0:58")])
    assert mount_table.unmount_own([entry]) is None
    assert umount == []
    table([mounted("/mnt/tape")], [mounted("/mnt/tape")])
    assert isinstance(mount_table.unmount_own([entry]), MountError)


def test_the_state_of_an_archive_whose_daemon_does_not_answer(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """`status` fails; in a list it is unknown, unless the archive was unmounted meanwhile."""

    def ask(device: str) -> None:
        raise TimeoutError(110, "timed out")

    monkeypatch.setattr(reports, "ask", ask)
    mount = mounted("/mnt/tape", owner=os.geteuid())
    entry = MountEntry("0:57", "/mnt/tape", "/srv/data", os.geteuid())
    with pytest.raises(MountError, match="its daemon does not answer: timed out"):
        mount_table.status(entry)
    table([mount], [mount])
    (found,) = mount_table.statuses()
    assert found["state"] == "unknown: its daemon does not answer: timed out"
    assert (found["mountpoint"], found["source"]) == ("/mnt/tape", "/srv/data")
    table([mount], [])
    assert mount_table.statuses() == []


def test_the_state_is_what_the_daemon_says_of_it_and_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "ask", lambda device: {"state": "valid", "source": "/as/recorded", "device": device})
    entry = MountEntry("0:57", "/mnt/tape", "/srv/data", os.geteuid())
    assert mount_table.status(entry) == {
        "mountpoint": "/mnt/tape",
        "owner": os.geteuid(),
        "source": "/as/recorded",
        "state": "valid",
        "device": "0:57",
    }


def test_one_that_is_unmounted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the list and the question: a plain folder is there, which has nothing to tell."""
    entry = mount_table.MountEntry("0:999999", str(tmp_path), "/nowhere", os.geteuid())
    lists = [[entry], []]
    monkeypatch.setattr(mount_table, "mounts", lambda: lists.pop(0))
    assert mount_table.statuses() == []
    monkeypatch.setattr(mount_table, "mounts", lambda: [entry])
    assert mount_table.statuses()[0]["state"] == "unknown: it was unmounted meanwhile"
