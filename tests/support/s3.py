"""A real S3 server on loopback: moto's, with a look at each request, so that a test can wait, break in, or refuse."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import parse_qs

import boto3
import pytest
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

_session = boto3.session.Session()  # one, since it reads large descriptions of S3, which it then keeps
_session_lock = threading.Lock()


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        pass


class S3:
    """`on_part(number)` is called before each part is stored; with False the part is refused with 500.

    `on_request(method, query)` is called before each request; what it returns, if not None, is the answer's status.
    `on_headers(method, environ)` is called before that, with what WSGI gives.

    `received`: the numbers of the parts that were sent and stored, in that order; `copied`: of those that were copied
    here; `received_bytes`: of all bodies; `app`: moto's WSGI application, or another one around it.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.copied: list[int] = []
        self.received_bytes = 0
        self.copies = True  # whether it knows how to copy parts
        self.on_headers: Callable[[str, dict[str, Any]], object] = lambda method, environ: None
        self.on_request: Callable[[str, str], str | None] = lambda method, query: None
        self.on_part: Callable[[int], bool | None] = lambda number: None
        self.app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.options = {
            "endpoint_url": self.url,
            "region_name": "us-east-1",
            "aws_access_key_id": "x",
            "aws_secret_access_key": "x",
        }
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        with self.client() as client:
            client.create_bucket(Bucket="tapes")

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        number = int(parse_qs(environ["QUERY_STRING"]).get("partNumber", ["0"])[0])
        self.received_bytes += int(environ.get("CONTENT_LENGTH") or 0)
        self.on_headers(environ["REQUEST_METHOD"], environ)
        status = self.on_request(environ["REQUEST_METHOD"], environ["QUERY_STRING"])
        if status is not None:
            start_response(status, [("Content-Length", "0")])
            return [b""]
        if number and environ["REQUEST_METHOD"] == "PUT":
            if not self.copies and "HTTP_X_AMZ_COPY_SOURCE" in environ:
                start_response("501 Not Implemented", [("Content-Length", "0")])
                return [b""]
            wanted = environ.get("HTTP_X_AMZ_COPY_SOURCE_IF_MATCH")
            if wanted is not None and wanted.strip('"') != self.etag(environ["PATH_INFO"].rpartition("/")[2]):
                start_response("412 Precondition Failed", [("Content-Length", "0")])  # which moto does not look at
                return [b""]
            if self.on_part(number) is False:
                start_response("500 Internal Server Error", [("Content-Length", "0")])
                return [b""]
            answer = self.app(environ, start_response)
            (self.copied if "HTTP_X_AMZ_COPY_SOURCE" in environ else self.received).append(number)
            return answer
        return self.app(environ, start_response)

    def client(self, **options: Any) -> "closing[Any]":
        with _session_lock:
            return closing(_session.client("s3", **self.options | options))

    def object(self, key: str) -> bytes:
        with self.client() as client, closing(client.get_object(Bucket="tapes", Key=key)["Body"]) as body:
            return body.read()

    def forget(self) -> None:
        """Starts counting again."""
        self.received.clear()
        self.copied.clear()
        self.received_bytes = 0

    def etag(self, key: str) -> str:
        with self.client() as client:
            return client.head_object(Bucket="tapes", Key=key)["ETag"].strip('"')

    def keys(self) -> list[str]:
        with self.client() as client:
            return [found["Key"] for found in client.list_objects_v2(Bucket="tapes").get("Contents", ())]

    def unfinished(self) -> list[str]:
        with self.client() as client:
            return [found["Key"] for found in client.list_multipart_uploads(Bucket="tapes").get("Uploads", ())]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        s3_backends.reset()


@contextmanager
def s3_server() -> Iterator[S3]:
    server = S3()
    try:
        yield server
    finally:
        with suppress(OSError):
            server.close()


@pytest.fixture
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def environment(server: S3) -> dict[str, str]:
    """What makes every program that knows S3 use this server."""
    return os.environ | {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
