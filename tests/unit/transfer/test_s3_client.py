"""Clients for S3: made from one session, and their errors in one line."""

from types import SimpleNamespace
from typing import Any

from tartapefs.transfer.s3_client import advice, client_of, session, status_of


def test_clients_are_of_one_session() -> None:
    options = {"region_name": "us-east-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    client = client_of(options, signs_bodies=False, connections=3)
    try:
        assert client.meta.config.max_pool_connections == 3
        assert client.meta.config.s3["payload_signing_enabled"] is False
        assert session() is session()
    finally:
        client.close()


def test_errors_in_one_line() -> None:
    failed: Any = Exception()
    failed.response = {"Error": {"Code": "NoSuchKey", "Message": "gone"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
    assert (advice(failed), status_of(failed)) == ("NoSuchKey: gone", 404)
    assert status_of(SimpleNamespace(response={})) == 0
    assert advice(type("NoRegionError", (Exception,), {})()).startswith("no region is given")
    assert advice(ValueError("a\n  b")) == "a b"
