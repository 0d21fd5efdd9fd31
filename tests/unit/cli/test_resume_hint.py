"""The commands that resume-hint prints: for S3 one that is run as it is, and what is refused."""

import json
import subprocess
from pathlib import Path

import pytest
from support.programs import run, with_programs
from support.s3 import environment as s3_environment
from support.s3 import s3_server


@pytest.mark.long
@pytest.mark.parametrize("have", [1, 6_000_000])
def test_the_hint_for_s3_works(recorded: Path, archive: bytes, tmp_path: Path, have: int) -> None:
    """`aws` itself, on a real server: the parts that are missing, and then the whole with the ETag predicted."""
    size, key = 5 << 20, "a 'b'/$(false)"
    with s3_server() as s3, s3.client() as client:
        upload = {"Bucket": "tapes", "Key": key}
        upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]
        first = have // size
        for number in range(first):
            body = archive[number * size : (number + 1) * size]
            client.upload_part(**upload, PartNumber=number + 1, Body=body)
        s3.received.clear()
        options = ["--part-size", "5M", "--bucket", "tapes", "--key", key, "--upload-id", upload["UploadId"]]
        line = json.loads(run("resume-hint", recorded, "--have", str(have), *options, "--json").stdout)["commands"][
            "aws"
        ]
        environment = s3_environment(s3) | {"PATH": with_programs(tmp_path)["PATH"]}
        result = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        count = -(-len(archive) // size)
        assert s3.received == list(range(first + 1, count + 1))
        parts = client.list_parts(**upload)["Parts"]
        listed = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in parts]
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": listed})
        assert s3.object(key) == archive
        predicted = json.loads(run("digest", recorded, "--s3-part-size", "5M", "--json").stdout)["s3"][0]["etag"]
        assert s3.etag(key) == predicted and predicted.endswith(f"-{count}")


def test_hints_for_what_is_complete_or_cannot_be(recorded: Path, archive: bytes) -> None:
    assert run("resume-hint", recorded, "--have", str(len(archive))).stdout == ""
    assert run("resume-hint", recorded, "--have", str(len(archive) + 1)).returncode == 2
    assert run("resume-hint", recorded).returncode == 2
    assert run("resume-hint", recorded, "--have", "1", "--part-size", "0").returncode == 2
    assert "S3 takes 10,000" in run("resume-hint", recorded, "--have", "1", "--part-size", "512").stderr
