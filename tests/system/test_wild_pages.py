"""Pages of the cookbook that need servers and programs beyond those of the others."""

import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.cookbook import PAGES, PART, FlakyLink, Kitchen
from support.cookbook import kitchen as kitchen
from support.cookbook import link as link
from support.programs import wait_until
from support.readme import blocks
from support.secrets import secrets
from support.sending import cut
from support.servers import answers, free_port
from support.shims import shim

pytestmark = [pytest.mark.wild, pytest.mark.fuse, pytest.mark.root, pytest.mark.needs("curl", "jq", "rsync", "rclone")]


def shell(page: str) -> list[str]:
    return [block for language, block in blocks((PAGES / page).read_text()) if language == "sh"]


@pytest.fixture
def hidden(kitchen: Kitchen) -> Iterator[Kitchen]:
    with secrets(kitchen):
        yield kitchen


@pytest.mark.needs("gocryptfs", "age", "gpg")
def test_encrypted(hidden: Kitchen, link: FlakyLink) -> None:
    """The link breaks in the middle of the copy, and rclone after the first part; both go on."""
    kitchen = hidden
    archive = kitchen.archive()
    once, each_time, back, crypt, streams = shell("encrypted.md")
    kitchen.run_shell(once)
    link.cuts = 1
    with pytest.raises(AssertionError):
        kitchen.run_shell(each_time)
    assert link.cut == 1
    kitchen.run_shell(each_time)
    assert link.sent < 1.2 * len(archive), "it begins anew"
    copy = kitchen.backup / "archive.tar"
    assert len(archive) < copy.stat().st_size and archive[512:1024] not in copy.read_bytes()
    kitchen.run_shell(back.rpartition("fusermount3")[0])
    assert (kitchen.folder / "work" / "decrypted" / "archive.tar").read_bytes() == archive
    kitchen.run_shell("fusermount3 -u decrypted\ntartapefs unmount /mnt/tape")

    far = kitchen.folder / "far"  # names are encrypted, too
    with pytest.raises(AssertionError):
        kitchen.run_shell(crypt.replace("rclone copy", f"rclone copy --transfers 1 --max-transfer {PART + 99999}B"))
    sent = {part.name: part.stat().st_ino for part in far.rglob("*") if part.is_file()}
    assert 0 < len(sent) < len(cut(archive, PART))
    kitchen.run_shell(crypt)
    there = {part.name: part.stat().st_ino for part in far.rglob("*") if part.is_file()}
    assert len(there) == len(cut(archive, PART)) and sent.items() <= there.items()
    kitchen.run_shell(streams)


@pytest.mark.needs("gocryptfs")
def test_drift_is_an_error_of_what_is_encrypted(hidden: Kitchen) -> None:
    kitchen = hidden
    once, each_time, *_ = shell("encrypted.md")
    kitchen.run_shell(once)
    kitchen.run_shell(each_time.rpartition("fusermount3")[0])
    kitchen.drift()
    with pytest.raises(OSError) as failed:
        (kitchen.folder / "mnt" / "tape-encrypted" / "archive.tar").read_bytes()
    assert failed.value.errno == errno.EIO


def settings(kitchen: Kitchen, begin: str) -> str:
    """The settings of a server as the page has them, with the test's mount point."""
    (found,) = re.findall(
        rf"^```\n({re.escape(begin)}.*?)^```$", (PAGES / "serve-it.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return str(kitchen.here(found))


@contextmanager
def server(command: list[object], port: int) -> Iterator[None]:
    """In a process group of its own, since smbd ends all of its group."""
    with subprocess.Popen([*map(os.fspath, command)], stdin=subprocess.DEVNULL, start_new_session=True) as process:  # type: ignore[call-overload]
        try:
            wait_until(lambda: process.poll() is not None or answers(port))
            assert process.poll() is None
            yield
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def served(kitchen: Kitchen) -> Iterator[Kitchen]:
    """A kitchen in which the archive is mounted as the page says, in a folder that the servers' users can enter."""
    begin, *_ = shell("serve-it.md")
    for folder in (kitchen.folder, *kitchen.folder.parents):
        if not folder.stat().st_mode & 1:
            folder.chmod(0o755)
    (kitchen.data / "photos" / "8.bin").write_bytes(os.urandom(30_000_000))  # more than a connection buffers
    kitchen.run_shell(begin)
    return kitchen


def got(kitchen: Kitchen) -> Path:
    return kitchen.folder / "work" / os.listdir(kitchen.folder / "mnt" / "tape")[0]


def each_call_fails(kitchen: Kitchen, client: str, *calls: str, copy: Path | None = None) -> None:
    """Each call of the client fails in turn; it ends well then, or when it is run again, and only with a right copy."""
    archive = kitchen.archive()
    for call in calls:
        shim(kitchen, {call.split()[0] for call in calls}, call)
        with kitchen.start(client) as script:
            script.communicate(timeout=120)
        assert script.returncode or (copy and copy.read_bytes() == archive)
        shim(kitchen, {call.split()[0] for call in calls}, "")
        kitchen.run_shell(client)
        assert not copy or copy.read_bytes() == archive


@contextmanager
def nginx(kitchen: Kitchen) -> Iterator[None]:
    port, folder = free_port(), kitchen.folder
    listen = settings(kitchen, "server {").replace("listen 80", f"listen 127.0.0.1:{port}")
    temporary = " ".join(
        f"{kind}_temp_path {folder}/t;" for kind in ("proxy", "fastcgi", "uwsgi", "scgi", "client_body")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;\n"
        f"events {{ }}\nhttp {{ access_log off; {temporary}\n{listen} }}\n"
    )
    kitchen.places["http://host"] = f"http://127.0.0.1:{port}"
    with server([shutil.which("nginx") or "", "-e", folder / "early.log", "-c", folder / "nginx.conf"], port):
        yield


@pytest.mark.needs("nginx")
def test_nginx(served: Kitchen) -> None:
    """Drift cuts the connection after a good prefix; once the folder is put back, the client goes on."""
    kitchen = served
    archive, client = kitchen.archive(), shell("serve-it.md")[1]
    copy, saved, changed = got(kitchen), kitchen.folder / "saved", kitchen.data / "photos" / "9.bin"
    with nginx(kitchen):
        each_call_fails(kitchen, client, "tartapefs 1", "jq 1", "curl 1", "tartapefs 2", "tartapefs 3", copy=copy)
        copy.unlink()
        shutil.copy2(changed, saved)
        slow = client.replace("curl", "curl --limit-rate 8M", 1)
        with kitchen.start(slow) as script:
            wait_until(lambda: copy.exists() and copy.stat().st_size > 1 << 20)
            kitchen.drift()
            script.communicate(timeout=120)
        assert script.returncode == 18
        assert archive.startswith(copy.read_bytes()) and copy.stat().st_size < len(archive)
        with kitchen.start(client) as script:
            script.communicate(timeout=60)
        assert script.returncode == 22
        shutil.copy2(saved, changed)
        mount = (
            "tartapefs mount ./data /mnt/tape --allow-other --mode 444 --name '{fingerprint}.tar' --source-check mtime"
        )
        kitchen.run_shell(f"tartapefs unmount /mnt/tape\n{mount}")
        kitchen.run_shell(
            client.replace("check ./data", "check --full --source-check mtime ./data").replace("--full ", "")
        )
        assert copy.read_bytes() == archive
        range_of = 'curl -sSf -r 10-19,1000000-1000009 "http://host/$(ls /mnt/tape)" | grep -ac "^Content-Range"'
        assert kitchen.run_shell(range_of) == "2\n"


@pytest.mark.needs("nginx")
def test_the_etag_of_two_hosts(served: Kitchen) -> None:
    """It is the same for a copy of folder and index, and another one for a recording of its own."""
    kitchen = served
    mount = (
        "tartapefs mount there/data /mnt/tape --allow-other --mode 444 --name '{fingerprint}.tar' --source-check mtime"
    )
    head = 'curl -sSfI "http://host/$(ls /mnt/tape)" | grep -i ^etag'
    with nginx(kitchen):
        one = kitchen.run_shell(head)
        recorded = int(re.findall(r'"(\w+)-', one)[0], 16)
        kitchen.run_shell(f"tartapefs unmount /mnt/tape\nmkdir there\ncp -a data there/\n{mount}")
        assert kitchen.run_shell(head) == one
        name = os.listdir(kitchen.folder / "mnt" / "tape")
        wait_until(lambda: time.time() >= recorded + 1)
        kitchen.run_shell(
            f"tartapefs unmount /mnt/tape\nrm there/data/.tartape/index.db\ntartapefs record there/data\n{mount}"
        )
        assert kitchen.run_shell(head) != one and os.listdir(kitchen.folder / "mnt" / "tape") == name


@pytest.mark.needs("smbd", "smbclient")
def test_samba(served: Kitchen) -> None:
    kitchen = served
    archive, client = kitchen.archive(), shell("serve-it.md")[2]
    folder, port = kitchen.folder / "samba", free_port()
    folder.mkdir()
    places = ("private dir", "lock directory", "state directory", "cache directory", "pid directory", "ncalrpc dir")
    (folder / "smb.conf").write_text(
        f"[global]\nserver role = standalone server\nmap to guest = bad user\nsmb ports = {port}\n"
        "interfaces = 127.0.0.1\nbind interfaces only = yes\ndisable netbios = yes\nload printers = no\n"
        f"log file = {folder}/log\n"
        + "".join(f"{place} = {folder}\n" for place in places)
        + settings(kitchen, "[tape]")
    )
    kitchen.places["-N //host"] = f"-N -s {folder}/smb.conf -p {port} //127.0.0.1"
    command = ["smbd", "--foreground", "--no-process-group", "-s", folder / "smb.conf", "--debug-stdout"]
    with server(command, port):
        copy = got(kitchen)
        copy.write_bytes(archive[:1_000_000])
        each_call_fails(kitchen, client, "tartapefs 1", "jq 1", "smbclient 1", "tartapefs 2", "tartapefs 3", copy=copy)
        kitchen.drift()
        copy.write_bytes(archive[:1_000_000])
        with kitchen.start(client) as script:
            said, _ = script.communicate(timeout=60)
        assert script.returncode == 1 and archive.startswith(copy.read_bytes()), said


@pytest.mark.needs("ganesha.nfsd", "nfs-cat", "unshare")
def test_nfs(served: Kitchen) -> None:
    kitchen = served
    client = shell("serve-it.md")[3]
    folder, port = kitchen.folder / "ganesha", free_port()
    folder.mkdir()
    exported = settings(kitchen, "NFS_CORE_PARAM {").replace(
        "Protocols = 4; Enable", f"NFS_Port = {port}; Bind_addr = 127.0.0.1; Protocols = 4; Enable", 1
    )
    (folder / "conf").write_text(f"{exported}NFSv4 {{ Graceless = true; RecoveryRoot = {folder}; }}\n")
    kitchen.places |= {"nfs://host": "nfs://127.0.0.1", "version=4": f"version=4&nfsport={port}"}
    inside = f"mount -t tmpfs tmpfs /run; mkdir /run/ganesha; exec ganesha.nfsd -F -f {folder}/conf -L {folder}/log"
    with server(["unshare", "-m", "sh", "-c", f"{inside} -p {folder}/pid"], port):
        each_call_fails(kitchen, client, "tartapefs 1", "jq 1", "nfs-cat 1", "tartapefs 2")
        Path("/proc/sys/vm/drop_caches").write_text("2")
        kitchen.run_shell(client)
        kitchen.drift()
        with kitchen.start(client) as script:
            script.communicate(timeout=60)
        assert script.returncode
    kitchen.run_shell(shell("serve-it.md")[-1])


def test_containers(kitchen: Kitchen) -> None:
    """What needs no mount."""
    kitchen.run_page("containers.md")
    assert kitchen.s3.object("data.tar") == kitchen.archive()


def test_manifests() -> None:
    """Those of the page have the fields that Kubernetes knows, and no others."""
    kubernetes_validate, yaml = pytest.importorskip("kubernetes_validate"), pytest.importorskip("yaml")
    text = (PAGES / "containers.md").read_text()
    job, pod, part = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    own = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "own"}}
    own["spec"] = {"containers": [{"name": "tartapefs", "image": "tartapefs", **part}]}
    for manifest in (job, pod, own):
        kubernetes_validate.validate(manifest, "1.29", strict=True)
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    del job["spec"]["template"]["spec"]["containers"][0]["name"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.29", strict=True)
