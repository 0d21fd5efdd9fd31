"""The kernel's table of mounts: what a line says, with the escapes of proc(5), and the table of this process."""

import os
from pathlib import Path

import pytest

from tartapefs.base import mountinfo
from tartapefs.base.mountinfo import Mount

# The example of proc(5), and lines as kernels write them.
LINES = {
    b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue": Mount(
        36, "98:0", "/mnt2", "ext3", "/dev/root", "rw,errors=continue"
    ),
    b"40 35 0:57 / /mnt/tape ro,nosuid,nodev - fuse.tartapefs /srv/data ro,user_id=0,group_id=0": Mount(
        40, "0:57", "/mnt/tape", "fuse.tartapefs", "/srv/data", "ro,user_id=0,group_id=0"
    ),
    rb"41 35 0:58 / /a\040b\011c\012d\134e rw shared:1 master:2 propagate_from:3 unbindable - tmpfs a\040- rw": Mount(
        41, "0:58", "/a b\tc\nd\\e", "tmpfs", "a -", "rw"
    ),
    b"42 35 0:59 / /caf\xe9\r\xc2\x85 rw - tmpfs none rw": Mount(
        42, "0:59", os.fsdecode(b"/caf\xe9\r\xc2\x85"), "tmpfs", "none", "rw"
    ),
    b"43 35 0:60 / /x rw - fuse.sshfs  rw": Mount(43, "0:60", "/x", "fuse.sshfs", "", "rw"),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_parsed(line: bytes) -> None:
    assert mountinfo.parsed(line) == LINES[line]


@pytest.mark.parametrize("text", ["\\040", "\\", "a\\134b"])
def test_what_looks_like_an_escape_is_unescaped_once(text: str) -> None:
    line = f"1 2 0:3 / /{text.replace(chr(92), chr(92) + '134')} rw - tmpfs none rw"
    assert mountinfo.parsed(line.encode()).mountpoint == f"/{text}"


def test_the_table_of_this_process_agrees_with_the_system() -> None:
    table = list(mountinfo.mounts())
    assert [mount.mountpoint for mount in table if mount.mountpoint == "/"]
    (proc,) = [mount for mount in table if mount.mountpoint == "/proc"][-1:]
    number = os.stat("/proc").st_dev
    assert (proc.fstype, proc.device) == ("proc", f"{os.major(number)}:{os.minor(number)}")
    assert table == list(mountinfo.mounts(str(os.getpid())))


def test_a_process_that_is_gone() -> None:
    with pytest.raises(FileNotFoundError):
        list(mountinfo.mounts("0"))
    assert not Path("/proc/0").exists()


def test_the_number_of_a_descriptor_is_that_of_its_mount(tmp_path: Path) -> None:
    fd = os.open("/proc/self", os.O_PATH)
    try:
        number = mountinfo.number_of(fd)
        assert [mount.fstype for mount in mountinfo.mounts() if mount.number == number] == ["proc"]
    finally:
        os.close(fd)
    assert mountinfo.number_of(-1) is None
