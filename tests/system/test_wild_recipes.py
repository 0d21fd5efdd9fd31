"""Every page of the cookbook, with one of its calls of a program failing half way: it prints half, and exits with 1.

A page may then end with another exit code than 0, or with what it makes without a failure; never with anything else.
A page that is a script ends well when it is run again.
TARTAPEFS_LONG=1 has each call fail in turn, else the first one of each program on each page does.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from support.cookbook import PAGES, Kitchen
from support.cookbook import kitchen as kitchen
from support.cookbook import link as link
from support.generations import Generations
from support.programs import run
from support.secrets import secrets
from support.shims import shim
from support.sshd import SSHD, sshd

pytestmark = [
    pytest.mark.wild,
    pytest.mark.fuse,
    pytest.mark.needs("rsync", "rclone", "curl", "jq", "busybox", "aws", "ssh", SSHD, "gocryptfs", "age", "gpg"),
]
CALLS = {  # those that each page makes, without a failure
    "after-drift.md": {"cat": 2, "cp": 3, "dd": 2, "jq": 1, "mkdir": 1, "rsync": 1, "tartapefs": 16, "truncate": 1},
    "containers.md": {"tartapefs": 4},
    "encrypted.md": {"age": 2, "age-keygen": 2, "gocryptfs": 3, "gpg": 2, "fusermount3": 2, "mkdir": 1, "mountpoint": 3,
                     "rclone": 4, "rsync": 1, "sort": 1, "tartapefs": 11},
    "growing-folder.md": {"flock": 1, "jq": 1, "mkdir": 1, "mountpoint": 1, "rsync": 1, "seq": 1, "ssh": 3,
                          "tartapefs": 5},
    "nightly-rsync.md": {"flock": 1, "mkdir": 1, "mountpoint": 1, "rsync": 1, "seq": 1, "tartapefs": 3},
    "rclone-parts.md": {"mkdir": 1, "mountpoint": 1, "rclone": 6, "sort": 1, "tar": 1, "tartapefs": 5},
    "rclone.md": {"mkdir": 1, "rclone": 5, "tartapefs": 6},
    "restore-one.md": {"aws": 1, "cp": 1, "curl": 2, "dd": 1, "grep": 1, "jq": 5, "mkdir": 1, "mv": 1, "rclone": 2,
                       "sha256sum": 1, "tar": 5, "tartapefs": 10},
    "s3-in-parts.md": {"aws": 8, "cmp": 1, "jq": 5, "seq": 1, "tartapefs": 6, "tr": 2},
    "send-to-s3.md": {"aws": 1, "cmp": 1, "flock": 1, "jq": 1, "tartapefs": 4},
    "verify-far-end.md": {"aws": 4, "cmp": 2, "curl": 1, "jq": 2, "mkdir": 1, "rclone": 1, "rsync": 4, "sha256sum": 2,
                          "tar": 1, "tartapefs": 11, "tr": 1},
}  # fmt: skip
AGAIN = {"encrypted.md", "growing-folder.md", "nightly-rsync.md", "rclone-parts.md", "send-to-s3.md"}  # to run again
PROGRAMS = {name for calls in CALLS.values() for name in calls}
LONG = bool(os.environ.get("TARTAPEFS_LONG"))
FAILING = [
    (page, f"{program} {number}")
    for page, calls in CALLS.items()
    for program, count in calls.items()
    for number in range(1, (count if LONG else 1) + 1)
]


DECRYPTED = """set -euo pipefail
gocryptfs -quiet -ro -config "$PWD/keep.conf" -passfile pass /backup decrypted
cmp decrypted/archive.tar EXPECTED
fusermount3 -u decrypted
for part in $(rclone lsf secret:data | sort); do rclone cat "secret:data/$part"; done | cmp - EXPECTED
gpg --batch --quiet --decrypt --passphrase-file pass archive.tar.gpg | cmp - EXPECTED
age --decrypt -i key archive.tar.age | cmp - EXPECTED
"""


def right(kitchen: Kitchen, page: str) -> bool:
    """Whether what the page is for is there, and right."""
    if page == "restore-one.md":
        one, other = (
            kitchen.folder / "work" / "gone" / "photos",
            kitchen.folder / "work" / "restored" / "data" / "photos",
        )
        names = [path.name for path in one.iterdir()]
        return len(names) == 5 and all((other / name).read_bytes() == (one / name).read_bytes() for name in names)
    if page == "encrypted.md":
        (kitchen.folder / "expected").write_bytes(kitchen.archive())
        kitchen.run_shell(DECRYPTED.replace("EXPECTED", str(kitchen.folder / "expected")))
        return True
    there = [*kitchen.s3.keys(), *kitchen.backup.iterdir()]
    return there != [] and kitchen.wrong_copies(kitchen.expected or kitchen.archive()) == []


@contextmanager
def prepared(kitchen: Kitchen, page: str) -> Iterator[None]:
    """What the page speaks of is there."""
    if page == "s3-in-parts.md":
        run("record", kitchen.data)
    if page == "rclone-parts.md":  # moto refuses the look that rclone takes at an object whose version is "null"
        kitchen.environment["RCLONE_S3_NO_HEAD"] = "true"
    if page == "after-drift.md":
        (kitchen.backup / "archive.tar").write_bytes(kitchen.archive()[:2_000_000] + bytes(9_802_000))
    with ExitStack() as stack:
        if page == "growing-folder.md":  # its second night
            expected = Generations(kitchen.data)
            expected.append()
            stack.enter_context(sshd(kitchen.folder)).program(kitchen.folder / "bin")
            assert kitchen.ends_well(page)
            (kitchen.data / "photos" / "added").write_bytes(os.urandom(1_000_000))
            kitchen.expected = expected.append()
        if page == "encrypted.md":
            stack.enter_context(secrets(kitchen))
        yield


@pytest.mark.parametrize("page", CALLS)
def test_without_a_failure(kitchen: Kitchen, page: str) -> None:
    with prepared(kitchen, page):
        shim(kitchen, PROGRAMS, "")
        assert kitchen.ends_well(page)
        assert Counter((kitchen.folder / "calls").read_text().split()) == CALLS[page]
        assert right(kitchen, page)


@pytest.mark.parametrize(("page", "failing"), FAILING)
def test_a_call_that_fails(kitchen: Kitchen, page: str, failing: str) -> None:
    archive = kitchen.archive()
    with prepared(kitchen, page):
        shim(kitchen, PROGRAMS, failing)
        well = kitchen.ends_well(page)
        assert kitchen.wrong_objects(archive) == []
        assert not well or right(kitchen, page)
        if page in AGAIN:
            shim(kitchen, PROGRAMS, "")
            assert kitchen.ends_well(page)
            assert right(kitchen, page)


def test_all_pages() -> None:
    """But those that need a file system or servers of their own: test_cookbook and test_wild_pages have them."""
    others = {"snapshot.md", "serve-it.md"}
    assert CALLS.keys() | others == {page.name for page in PAGES.iterdir()}
