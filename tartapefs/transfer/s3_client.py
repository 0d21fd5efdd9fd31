"""Clients of boto3 for S3, and what their errors mean."""

import threading
from functools import cache
from typing import Any

from tartapefs.transfer.upload_targets import import_needed

_session_lock = threading.Lock()


def status_of(error: Any) -> int:
    """The status of the answer that an error of boto3 is about; 0 if there was none."""
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def advice(error: Exception) -> str:
    """What went wrong, in one line, with what to do about it."""
    match type(error).__name__:
        case "NoCredentialsError":
            return "there are no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        case "NoRegionError":
            return 'no region is given; set AWS_REGION, or "--option region_name=…"'
    if response := getattr(error, "response", None):
        found = response["Error"]
        return f"{found.get('Code', '')}: {found.get('Message', '')}"
    return " ".join(str(error).split())


@cache
def session() -> Any:
    """The session that all clients are made from."""
    return import_needed("boto3.session").Session()


def client_of(options: dict[str, Any], signs_bodies: bool, connections: int = 10) -> Any:
    """Makes a client of boto3: in 5 ms from one session, else in 70, but only one thread at a time may do so.

    It computes no checksums, for which it would read every part once more: a part's MD5 is compared anyway. For the
    same reason the body of a part is not signed: the request that completes the upload is, and it names the MD5s.
    """
    config = import_needed("botocore.config").Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=connections,
    )
    with _session_lock:
        client = session().client("s3", **{"config": config} | options)
    if not signs_bodies:
        client.meta.config.s3 = {"payload_signing_enabled": False} | (client.meta.config.s3 or {})
    return client
