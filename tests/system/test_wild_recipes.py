"""Every page of the cookbook, with one of its calls of a program failing half way: it prints half, and exits with 1.

A page may then end with another exit code than 0, or with what it makes without a failure; never with anything else.
TARTAPEFS_LONG=1 has each call fail in turn, else the first one of each program on each page does.
"""

import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.cookbook import PAGES, Kitchen
from support.cookbook import kitchen as kitchen
from support.cookbook import link as link
from support.generations import Generations
from support.programs import run
from support.sshd import SSHD, sshd

pytestmark = [
    pytest.mark.wild,
    pytest.mark.fuse,
    pytest.mark.needs("rsync", "rclone", "curl", "jq", "busybox", "aws", "ssh", SSHD),
]
# Writes its name to a list. Where that is the call that has to fail, it gives half of its output and exits with 1.
CALLS = {  # those that each page makes, without a failure
    "after-drift.md": {"cat": 2, "cp": 3, "dd": 2, "jq": 1, "mkdir": 1, "rsync": 1, "tartapefs": 16, "truncate": 1},
    "growing-folder.md": {"flock": 1, "jq": 1, "mkdir": 1, "mountpoint": 1, "rsync": 1, "seq": 1, "ssh": 3,
                          "tartapefs": 5},
    "nightly-rsync.md": {"flock": 1, "mkdir": 1, "mountpoint": 1, "rsync": 1, "seq": 1, "tartapefs": 3},
    "rclone-parts.md": {"mkdir": 1, "mountpoint": 1, "rclone": 6, "tar": 1, "tartapefs": 5},
    "rclone.md": {"mkdir": 1, "rclone": 5, "tartapefs": 6},
    "restore-one.md": {"aws": 1, "cp": 1, "curl": 2, "dd": 1, "grep": 1, "jq": 5, "mkdir": 1, "mv": 1, "rclone": 2,
                       "sha256sum": 1, "tar": 5, "tartapefs": 8},
    "s3-in-parts.md": {"aws": 8, "cmp": 1, "jq": 5, "seq": 1, "tartapefs": 6, "tr": 2},
    "send-to-s3.md": {"aws": 1, "cmp": 1, "flock": 1, "jq": 1, "tartapefs": 4},
    "verify-far-end.md": {"aws": 4, "cmp": 2, "curl": 1, "jq": 2, "mkdir": 1, "rclone": 1, "rsync": 4, "sha256sum": 2,
                          "tar": 1, "tartapefs": 11, "tr": 1},
}  # fmt: skip
LONG = bool(os.environ.get("TARTAPEFS_LONG"))
FAILING = [
    (page, f"{program} {number}")
    for page, calls in CALLS.items()
    for program, count in calls.items()
    for number in range(1, (count if LONG else 1) + 1)
]
SHIM = """#!/bin/bash
PATH=${{PATH#*:}}
echo {name} >> {calls}
number=$(grep -cx {name} {calls})
[ "{name} $number" = "$(cat {failing})" ] || exec {name} "$@"
said=$({name} "$@" | base64 -w0)
size=$(base64 -d <<< "$said" | wc -c)
base64 -d <<< "$said" | head -c $((size / 2))
exit 1
"""


def shim(kitchen: Kitchen) -> Path:
    """Puts the shims in the way of the page's programs; gives the file that names the call which is to fail."""
    folder = kitchen.folder / "shims"
    folder.mkdir()
    failing = kitchen.folder / "failing"
    failing.write_text("")
    for name in {name for calls in CALLS.values() for name in calls}:
        (folder / name).write_text(SHIM.format(name=name, calls=kitchen.folder / "calls", failing=failing))
        (folder / name).chmod(0o755)
    kitchen.environment["PATH"] = f"{folder}:{kitchen.environment['PATH']}"
    return failing


def right(kitchen: Kitchen, page: str) -> bool:
    """Whether what the page is for is there, and right."""
    if page == "restore-one.md":
        one, other = (
            kitchen.folder / "work" / "gone" / "photos",
            kitchen.folder / "work" / "restored" / "data" / "photos",
        )
        names = [path.name for path in one.iterdir()]
        return len(names) == 5 and all((other / name).read_bytes() == (one / name).read_bytes() for name in names)
    return kitchen.wrong_copies(kitchen.expected or kitchen.archive()) == []


def run_page(kitchen: Kitchen, page: str, failing: str) -> bool:
    """Whether the page ends well when this call fails."""
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
        shim(kitchen).write_text(failing)
        return kitchen.ends_well(page)


@pytest.mark.parametrize("page", CALLS)
def test_without_a_failure(kitchen: Kitchen, page: str) -> None:
    assert run_page(kitchen, page, "")
    assert right(kitchen, page)
    assert Counter((kitchen.folder / "calls").read_text().split()) == CALLS[page]


@pytest.mark.parametrize(("page", "failing"), FAILING)
def test_a_call_that_fails(kitchen: Kitchen, page: str, failing: str) -> None:
    archive = kitchen.archive()
    well = run_page(kitchen, page, failing)
    assert kitchen.wrong_objects(archive) == []
    assert not well or right(kitchen, page)


def test_all_pages() -> None:
    """But those that need a file system or servers of their own: test_cookbook and test_wild_pages run them."""
    others = {"snapshot.md", "containers.md", "encrypted.md", "serve-it.md"}
    assert CALLS.keys() | others == {page.name for page in PAGES.iterdir()}
