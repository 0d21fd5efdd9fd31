"""The cookbook: every block of every page, run as it is printed, by the real programs against servers on loopback.

And every page with a failure in its middle: then no script exits 0 with a wrong copy, and nothing wrong is completed.

`rsync://host/backup/` is an rsync daemon whose link is cut while something is sent, `s3://tapes` and `remote:tapes` a
bucket of a real S3 server, `http://host/` a web server; `/backup` is the folder behind the daemon and the web server.
Sizes of parts are smaller, and `sleep` does not.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from support.cookbook import PAGES, PART, FlakyLink, Kitchen
from support.cookbook import kitchen as kitchen
from support.cookbook import link as link
from support.filesystems import loop
from support.generations import Generations
from support.programs import our_mounts, run, wait_until
from support.readme import README, blocks
from support.sending import cut
from support.sshd import SSHD, sshd

pytestmark = [pytest.mark.fuse, pytest.mark.needs("rsync", "rclone", "curl", "jq", "busybox", "dd", "tar")]

ELSEWHERE = {"containers.md", "encrypted.md", "serve-it.md"}  # by test_wild_pages.py


def test_every_page_is_here_and_linked() -> None:
    pages = {page.name for page in PAGES.iterdir()}
    tested = {name.removeprefix("test_").replace("_", "-") + ".md" for name in globals() if name.startswith("test_")}
    assert pages and pages <= tested | ELSEWHERE
    assert set(re.findall(r"docs/cookbook/([\w-]+\.md)", README.read_text())) == pages
    for page in pages:
        text = (PAGES / page).read_text()
        assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) <= {"sh", "python", "yaml", ""}, page
        outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"^    ", outside, re.MULTILINE), "a command that is not run"
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert (PAGES / target).exists(), target


def test_nightly_rsync(kitchen: Kitchen, link: FlakyLink) -> None:
    """Cut three times in the first night; nothing is sent in the second, and a new file makes a new copy."""
    link.cuts = 3
    kitchen.run_page("nightly-rsync.md")
    assert link.cut == 3
    assert link.sent < 1.1 * len(kitchen.archive()), "it begins anew"
    (copy,) = kitchen.backup.iterdir()
    assert copy.read_bytes() == kitchen.archive() and copy.stat().st_mode & 0o200
    before, sent = copy.stat(), link.sent
    kitchen.run_page("nightly-rsync.md")
    assert copy.stat() == before and link.sent < sent + 1000
    (kitchen.data / "new").write_bytes(b"new")
    kitchen.run_page("nightly-rsync.md")
    (new,) = set(kitchen.backup.iterdir()) - {copy}
    assert new.read_bytes() == kitchen.archive()


def await_unlocked(kitchen: Kitchen, name: str) -> None:
    """The last of the programs that were killed may have the lock for a moment more."""
    (lock,) = kitchen.folder.rglob(name)
    wait_until(lambda: subprocess.run(["flock", "--nonblock", lock, "true"]).returncode == 0)


def test_a_night_that_was_killed(kitchen: Kitchen, link: FlakyLink) -> None:
    """All of it is killed but the daemon, which has a session of its own; the next night goes on."""
    ((_, night),) = blocks((PAGES / "nightly-rsync.md").read_text())
    with kitchen.start(night, start_new_session=True) as script:
        link.on_sent = lambda sent: sent > 1 << 20 and script.poll() is None and os.killpg(script.pid, signal.SIGKILL)
        script.communicate(timeout=120)
    assert script.returncode == -signal.SIGKILL
    assert our_mounts()
    await_unlocked(kitchen, "nightly.lock")
    link.on_sent = lambda sent: None
    kitchen.run_page("nightly-rsync.md")
    assert kitchen.wrong_copies(kitchen.archive()) == []
    assert not [mountpoint for mountpoint in our_mounts() if mountpoint.startswith(f"{kitchen.folder}/")]


def test_a_night_beside_another(kitchen: Kitchen, link: FlakyLink) -> None:
    """The second one ends at once, and the first one is not disturbed."""
    ((_, night),) = blocks((PAGES / "nightly-rsync.md").read_text())
    second = []

    def start_another(sent: int) -> None:
        if not second:
            second.append(None)
            with kitchen.start(night) as script:
                script.communicate(timeout=120)
            second[0] = script.returncode

    link.on_sent = start_another
    kitchen.run_page("nightly-rsync.md")
    assert second == [1]
    assert kitchen.wrong_copies(kitchen.archive()) == []


@pytest.mark.parametrize("held", [True, False])
def test_nights_after_drift(kitchen: Kitchen, held: bool) -> None:
    """What was changed is put back, with its time: the next night makes the same copy complete.

    rsync is ended while the copy is right, as far as it goes, or else it fills up with zeros.
    """
    archive, saved = kitchen.archive(), kitchen.folder / "saved"
    ((_, night),) = blocks((PAGES / "nightly-rsync.md").read_text())
    held_night, count = re.subn(r" --on-drift hold --on-drift-run '[^']*'", "" if not held else r"\g<0>", night)
    assert count == 1
    shutil.copy2(kitchen.data / "photos" / "9.bin", saved)
    kitchen.fail_half_way("drift")
    with kitchen.start(held_night) as script:
        script.communicate(timeout=120)
    assert script.returncode == (20 if held else 23)
    (copy,) = kitchen.backup.iterdir()
    wrong = copy.read_bytes()
    assert wrong != archive and (archive.startswith(wrong) if held else len(wrong) == len(archive))
    shutil.copy2(saved, kitchen.data / "photos" / "9.bin")
    kitchen.run_page("nightly-rsync.md")
    assert list(kitchen.backup.iterdir()) == [copy]
    assert copy.read_bytes() == archive


@pytest.mark.needs(SSHD, "ssh")
def test_growing_folder(kitchen: Kitchen) -> None:
    """Files are added during each run; link, script and daemon break off; all is sent at last."""
    ((_, night),) = blocks((PAGES / "growing-folder.md").read_text())
    night = night.replace("rsync --append", "rsync --append --bwlimit=4m")
    copy, expected = kitchen.backup / "archive.tar", Generations(kitchen.data)
    with sshd(kitchen.folder) as host:
        host.program(kitchen.folder / "bin")

        def one_night(number: int, happen: Callable[[subprocess.Popen[str]], object]) -> int:
            """Something happens once a megabyte was sent, and what was added before and after it."""
            (kitchen.data / f"evening {number}").write_bytes(os.urandom(4_000_000))
            before, archive = len(expected.archive), expected.append()
            with kitchen.start(night, start_new_session=True) as script:
                wait_until(lambda: script.poll() or (copy.exists() and copy.stat().st_size > before + 1_000_000), 60)
                (kitchen.data / "photos" / f"during {number}").write_bytes(os.urandom(1000))
                happen(script)
                (kitchen.data / f"later {number}").mkdir()
                _, complained = script.communicate(timeout=120)
            await_unlocked(kitchen, "growing.lock")
            assert script.returncode or copy.read_bytes() == archive, complained
            return script.returncode

        assert one_night(1, lambda script: host.drop()) == 0
        assert one_night(2, lambda script: host.drop()) == 0
        assert one_night(3, lambda script: os.killpg(script.pid, signal.SIGKILL)) == -signal.SIGKILL
        assert one_night(4, lambda script: kitchen.kill_daemon()) == 23
        assert one_night(5, lambda script: host.drop()) == 0
    (kitchen.folder / "extracted").mkdir()
    subprocess.run(["tar", "-xpf", copy, "-C", kitchen.folder / "extracted"], check=True)
    run("record", kitchen.data, "--append")
    assert run("resume", kitchen.data, copy).returncode == 0
    assert copy.read_bytes() == expected.append()


def test_rclone_parts(kitchen: Kitchen) -> None:
    """The first run breaks off in the second part; what is added later costs the last part and the new ones."""
    (_, night), (_, look) = blocks((PAGES / "rclone-parts.md").read_text())
    expected = Generations(kitchen.data)

    def parts() -> dict[str, bytes]:
        return {f"data/{name}": part for name, part in cut(expected.append(), PART).items()}

    def there() -> dict[str, bytes]:
        return {key: kitchen.s3.object(key) for key in list(kitchen.s3.keys())}

    received = kitchen.s3.received
    # The last, since moto refuses the look that rclone takes at an object whose version is "null".
    kitchen.environment |= {"RCLONE_TRANSFERS": "1", "RCLONE_LOW_LEVEL_RETRIES": "1", "RCLONE_S3_NO_HEAD": "true"}
    kitchen.s3.on_part = lambda number: len(received) < 3
    with pytest.raises(AssertionError):
        kitchen.run_shell(night)
    assert list(there()) == ["data/archive.tar.00001"] and there().items() < parts().items()
    kitchen.s3.on_part = lambda number: None
    received.clear()
    kitchen.run_shell(night)
    assert sorted(received) == [1, 2] and there() == parts()
    (kitchen.data / "photos" / "added").write_bytes(os.urandom(1_000_000))
    received.clear()
    kitchen.run_shell(night)
    assert sorted(received) == [1, 2] and there() == parts() and len(there()) == 3
    kitchen.run_shell(night)
    assert len(received) == 2
    kitchen.run_shell(look)
    with kitchen.s3.client() as client:
        wrong = parts()["data/archive.tar.00002"]
        client.put_object(Bucket="tapes", Key="data/archive.tar.00002", Body=wrong[:-1] + bytes([wrong[-1] ^ 1]))
    with pytest.raises(AssertionError):
        kitchen.run_shell(look)


FAILURES = [
    *itertools.product(
        ["nightly-rsync.md", "verify-far-end.md", "rclone.md", "rclone-parts.md"],
        ["drift", "daemon killed", "network cut"],
    ),
    *itertools.product(
        ["s3-in-parts.md", "send-to-s3.md", "restore-one.md"], ["drift", "network cut"]
    ),  # nothing is mounted there
]


@pytest.mark.matrix(but=r"(nightly|verify|send).*cut|(rclone|s3.*|restore.*)\.md-drift|parts.md-daemon")
@pytest.mark.parametrize(("page", "failure"), FAILURES)
def test_no_page_ends_well_with_a_wrong_copy(kitchen: Kitchen, page: str, failure: str) -> None:
    """Something fails while something is sent. An object that is there is the archive, whatever the page says."""
    archive = kitchen.archive()
    kitchen.environment |= {"AWS_MAX_ATTEMPTS": "1", "RCLONE_RETRIES": "1", "RCLONE_LOW_LEVEL_RETRIES": "1"}
    if page == "s3-in-parts.md":  # which begins with a folder that is recorded
        run("record", kitchen.data)
    with pytest.MonkeyPatch.context() as once:
        once.setenv("AWS_MAX_ATTEMPTS", "1")
        kitchen.fail_half_way(failure)
        well = kitchen.ends_well(page)
    assert kitchen.failed
    assert kitchen.wrong_objects(archive) == []
    assert not well or kitchen.wrong_copies(archive) == []
    assert not well or failure != "network cut"


@pytest.mark.matrix(but=1)
@pytest.mark.parametrize("failure", ["drift", "network cut"])
def test_parts_by_aws_alone(kitchen: Kitchen, failure: str) -> None:
    """The last block of the page, without the program before it."""
    archive = kitchen.archive()
    run("record", kitchen.data)
    kitchen.environment["AWS_MAX_ATTEMPTS"] = "1"
    kitchen.fail_half_way(failure)
    *_, (_, block) = blocks((PAGES / "s3-in-parts.md").read_text())
    with pytest.raises(AssertionError):
        kitchen.run_shell(block)
    assert kitchen.failed
    assert kitchen.wrong_objects(archive) == []
    assert kitchen.s3.unfinished() == ["archive.tar"]


def test_s3_in_parts(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program breaks off at its second part, and run again sends what is missing."""
    run("record", kitchen.data)
    (_, program), *_ = blocks((PAGES / "s3-in-parts.md").read_text())
    with monkeypatch.context() as once:
        once.setenv("AWS_MAX_ATTEMPTS", "1")
        kitchen.s3.on_part = lambda number: number != 2
        with pytest.raises(ClientError):
            kitchen.run_python(program)
        kitchen.names["s3"].close()
    assert sorted(kitchen.s3.received) == [1, 3]
    kitchen.s3.received.clear()
    kitchen.s3.on_part = lambda number: None
    kitchen.run_page("s3-in-parts.md")
    assert kitchen.s3.received == [2, 1, 2, 3]  # the program, and then `aws`
    first, second = kitchen.s3.keys()
    assert kitchen.s3.object(first) == kitchen.s3.object(second) == kitchen.archive()
    assert kitchen.s3.etag(first) == kitchen.s3.etag(second)
    assert kitchen.s3.unfinished() == []


def test_send_to_s3(kitchen: Kitchen) -> None:
    """Two nights; the first run of the second one is refused a part."""
    kitchen.run_page("send-to-s3.md")
    assert kitchen.s3.object("data.tar") == kitchen.archive()
    (kitchen.data / "new").write_bytes(os.urandom(9_000_000))
    kitchen.s3.forget()
    kitchen.s3.on_part = lambda number: number != 3
    kitchen.environment["AWS_MAX_ATTEMPTS"] = "1"
    assert not kitchen.ends_well("send-to-s3.md")
    kitchen.s3.on_part = lambda number: None
    kitchen.run_page("send-to-s3.md")
    assert set(kitchen.s3.copied) == {1, 2} and {1, 2}.isdisjoint(kitchen.s3.received)
    run("play", kitchen.data, "-o", kitchen.backup / "played.tar")
    assert kitchen.s3.object("data.tar") == (kitchen.backup / "played.tar").read_bytes()


def test_verify_far_end(kitchen: Kitchen) -> None:
    """All of it on good copies; then each way but the one that says so finds a byte that is wrong."""
    kitchen.run_page("verify-far-end.md")
    archive = kitchen.archive()
    copy = kitchen.backup / "archive.tar"
    assert copy.read_bytes() == archive
    wrong = bytearray(archive)
    wrong[1_000_000] ^= 1
    copy.write_bytes(wrong)
    with kitchen.s3.client() as client:
        client.put_object(Bucket="tapes", Key="archive.tar", Body=bytes(wrong))
    checks = [
        line
        for _, block in blocks((PAGES / "verify-far-end.md").read_text())[1:]
        for line in block.splitlines()
        if re.search(r"^aws s3api|^tartapefs check|\| tartapefs check|sha256sum -c", line)
    ]
    assert len(checks) == 7
    for line in checks:
        if "--no-source" in line:
            kitchen.run_shell(line)
            continue
        with pytest.raises(AssertionError):
            kitchen.run_shell(line)


def test_rclone(kitchen: Kitchen) -> None:
    """Bytes read of the archive tell whether there was a reading before the sending."""
    archive = kitchen.archive()
    delivered = [0]
    for _, block in blocks((PAGES / "rclone.md").read_text()):
        said = kitchen.run_shell(block)
        if "copyto" in block:
            status = kitchen.run_shell("tartapefs status /mnt/tape --json | jq .delivered")
            delivered.append(int(status))
        if "rclone md5sum" in block:
            assert len(said.split()[0]) == 32
            md5 = said.split()[0]
        if "digest" in block:
            assert f"MD5 (archive.tar) = {md5}" in said
            assert kitchen.s3.etag("without-md5.tar") in said
    with_md5, without = delivered[1], delivered[2] - delivered[1]
    assert with_md5 > 1.6 * len(archive)  # the kernel may still have what was read last
    assert len(archive) <= without < 1.5 * len(archive)
    for key in ("with-md5.tar", "without-md5.tar"):
        assert kitchen.s3.object(key) == archive


def test_restore_one(kitchen: Kitchen) -> None:
    kitchen.run_page("restore-one.md")
    gone, restored = kitchen.folder / "work" / "gone", kitchen.folder / "work" / "restored" / "data"
    for name in ("0.bin", "1.bin", "2.bin", "3.bin", "9.bin"):
        one, other = gone / "photos" / name, restored / "photos" / name
        assert one.read_bytes() == other.read_bytes()
        assert int(one.stat().st_mtime) == int(other.stat().st_mtime)
    assert kitchen.names["content"] == (gone / "photos" / "0.bin").read_bytes()


def test_after_drift(kitchen: Kitchen) -> None:
    (kitchen.backup / "archive.tar").write_bytes(kitchen.archive()[:2_000_000] + bytes(9_802_000))
    kitchen.run_page("after-drift.md")
    archive = kitchen.archive()
    assert (kitchen.folder / "work" / "backup.tar").read_bytes() == archive
    assert (kitchen.backup / "archive.tar").read_bytes() == archive


@pytest.mark.root
@pytest.mark.needs("btrfs", "mkfs.btrfs")
def test_snapshot(kitchen: Kitchen, tmp_path: Path) -> None:
    """On btrfs: a first night, one after an addition, and one after a change."""
    ((_, night),) = blocks((PAGES / "snapshot.md").read_text())
    with loop("btrfs", tmp_path) as srv:
        folder = srv / "data"
        subprocess.run(["btrfs", "subvolume", "create", folder], check=True, capture_output=True)
        for name, content, message in (
            ("one", "1", "recorded 2 members"),
            ("two", "2", "added 2 members"),
            ("one", "other", "stay valid up to byte"),
        ):
            (folder / name).write_text(content)
            assert message in kitchen.run_shell("exec 2>&1\n" + night.replace("/srv", str(srv)))
            with tarfile.open(kitchen.backup / "archive.tar") as copy:
                files = {file.name: copy.extractfile(file) for file in copy if file.isreg()}
                contents = {name: file.read() for name, file in files.items() if file}
            assert contents == {f"data/{file.name}": file.read_bytes() for file in folder.iterdir()}
