"""What a server without SSE-KMS answers, as one with it does: ETags that are no MD5s, and the checksum of each part."""

import base64
import io
import re
from collections.abc import Callable, Iterable
from typing import Any

from awscrt.checksums import crc64nvme

_ETAG = re.compile(rb"(<ETag>[^<]*?)([0-9a-f]{32})")


def _other(text: bytes) -> bytes:
    """Turns each ETag round, which is no MD5 then; once more, and it is."""
    return _ETAG.sub(lambda found: found[1] + found[2][::-1], text)


class Encrypting:
    """A WSGI application around that of an S3 server.

    `tells`: whether it tells the checksum of each part, as S3 does; `damaged`: the numbers of parts of which a bit
    flips on the way, once each; `checksums`: those of the whole that it was given.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], tells: bool = True, damaged: Iterable[int] = ()) -> None:
        self._app, self._tells, self.damaged = app, tells, set(damaged)
        self.checksums: list[str] = []
        self._parts: dict[tuple[str, str], str] = {}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        query = dict(pair.partition("=")[::2] for pair in environ["QUERY_STRING"].split("&"))
        part, is_head = (query.get("uploadId", ""), query.get("partNumber", "")), environ["REQUEST_METHOD"] == "HEAD"
        if part[1]:
            if body and int(part[1]) in self.damaged:
                self.damaged.discard(int(part[1]))
                body = bytes([body[0] ^ 1]) + body[1:]
            crc = crc64nvme(body or self._copied(environ))
            self._parts[part] = base64.b64encode(crc.to_bytes(8, "big")).decode()
        elif "HTTP_X_AMZ_CHECKSUM_CRC64NVME" in environ:
            self.checksums.append(environ["HTTP_X_AMZ_CHECKSUM_CRC64NVME"])
        status, headers, answer = self._answer(environ, body if part[1] else _other(body))
        for (upload, number), told in self._parts.items() if self._tells else ():
            if environ["REQUEST_METHOD"] == "GET" and upload == part[0]:
                place = f"<PartNumber>{number}</PartNumber>"
                answer = answer.replace(
                    place.encode(), f"{place}<ChecksumCRC64NVME>{told}</ChecksumCRC64NVME>".encode()
                )
        if self._tells and part[1]:
            headers["x-amz-checksum-crc64nvme"] = self._parts[part]
            answer = answer.replace(
                b"<ETag>", f"<ChecksumCRC64NVME>{self._parts[part]}</ChecksumCRC64NVME><ETag>".encode()
            )
        if "etag" in headers:
            etag = headers["etag"].strip('"')
            headers["etag"] = f'"{etag[:32][::-1]}{etag[32:]}"'
        if not is_head:
            headers["content-length"] = str(len(_other(answer)))
        start_response(status, [*headers.items(), ("x-amz-server-side-encryption", "aws:kms")])
        return [_other(answer)]

    def _answer(self, environ: dict[str, Any], body: bytes) -> tuple[str, dict[str, str], bytes]:
        started: list[Any] = []
        given = environ | {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        answer = b"".join(self._app(given, lambda *line: started.extend(line)))
        return started[0], {name.lower(): value for name, value in started[1]}, answer

    def _copied(self, environ: dict[str, Any]) -> bytes:
        """The bytes of which the server makes a part."""
        source = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/" + environ["HTTP_X_AMZ_COPY_SOURCE"].lstrip("/"),
            "QUERY_STRING": "",
            "HTTP_RANGE": environ["HTTP_X_AMZ_COPY_SOURCE_RANGE"],
        }
        others = {name: value for name, value in environ.items() if not name.startswith("HTTP_X_AMZ_COPY")}
        return self._answer(others | source, b"")[2]
