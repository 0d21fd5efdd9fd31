"""The one comparison that drift is judged by: each fact counts on its own."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from tartapefs.archive.member import Member
from tartapefs.source.drift import agrees, differences

FACTS = ("st_mode", "st_size", "st_mtime_ns", "st_ino", "st_ctime_ns")
NAMES = {"st_mode": "mode", "st_size": "size", "st_mtime_ns": "mtime", "st_ino": "inode", "st_ctime_ns": "ctime"}
ONLY_AT_HOME = {"st_ino", "st_ctime_ns"}


def recorded(path: Path, target: bytes = b"") -> tuple[Member, SimpleNamespace]:
    """The member that a recording of `path` gives, and its `lstat` with facts that can be set one by one."""
    found = os.lstat(path)
    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    facts = (found.st_mode, size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)
    return Member(0, b"data/x", *facts, target, None), SimpleNamespace(**{name: getattr(found, name) for name in FACTS})


@pytest.mark.parametrize("at_home", [True, False])
@pytest.mark.parametrize("fact", FACTS)
def test_each_fact_of_a_file_counts(tmp_path: Path, fact: str, at_home: bool) -> None:
    """Inode and ctime only where the tape was recorded; a different ctime is named where nothing else differs."""
    (tmp_path / "x").write_bytes(b"contents")
    member, found = recorded(tmp_path / "x")
    assert agrees(member, found, at_home) and differences(member, found, b"", at_home) == ()
    setattr(found, fact, getattr(found, fact) ^ 1)
    counts = at_home or fact not in ONLY_AT_HOME
    assert agrees(member, found, at_home) is not counts
    assert [difference.what for difference in differences(member, found, b"", at_home)] == [NAMES[fact]] * counts


def test_a_type_counts_before_everything(tmp_path: Path) -> None:
    """Of what is no file any more nothing else is worth a word."""
    (tmp_path / "x").write_bytes(b"contents")
    member, found = recorded(tmp_path / "x")
    found.st_mode = stat.S_IFIFO | 0o644
    found.st_size = 0
    assert not agrees(member, found, False)
    assert [(d.what, d.recorded, d.found) for d in differences(member, found, b"", True)] == [
        ("type", "regular file", "pipe")
    ]


def test_the_size_of_a_folder_does_not_count(tmp_path: Path) -> None:
    """File systems change it as they like."""
    member, found = recorded(tmp_path)
    found.st_size += 4096
    assert agrees(member, found, True) and differences(member, found, b"", True) == ()


def test_the_target_of_a_link_counts(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("there")
    member, found = recorded(tmp_path / "x", b"there")
    assert differences(member, found, b"there", True) == ()
    assert [difference.what for difference in differences(member, found, b"other", True)] == ["target"]
