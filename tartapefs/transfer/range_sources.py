"""Where ranges of a remote file come from: S3 by boto3, HTTP by Python itself, any other URL by fsspec.

Rule: no more is received than was asked for. fsspec's HTTP does not keep it: a server that ignores ranges sends all of
the archive, and `cat_file` takes it (docs/decisions/0033). A source raises CopyError if trying again is of no use, and
else OSError.
"""

import http.client
import io
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, Protocol

from tartapefs import __version__
from tartapefs.base.errors import CopyError
from tartapefs.transfer.s3_client import advice, client_of, status_of
from tartapefs.transfer.upload_targets import import_needed

_PATIENCE = 60  # seconds without a byte
_AGAIN = (408, 425, 429)  # statuses below 500 after which the same request may succeed


class Body(Protocol):
    """The bytes of a range, as they arrive; 0 at the end, or where the link broke."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class RangeSource(Protocol):
    """A remote file. Usable from many threads."""

    def size(self) -> int:
        """Its size in bytes. Raises CopyError, and OSError."""
        ...

    def get(self, start: int, stop: int) -> AbstractContextManager[Body]:
        """Requests its bytes `[start, stop)`. The call, and what reads them, raise CopyError and OSError."""
        ...

    def close(self) -> None: ...


class HttpRanges:
    """The file at an http or https URL; `headers` go with each request, but not to where the server redirects it.

    `pinned`: the file must stay the same, by its size and ETag, from the first request to the last.
    """

    def __init__(self, url: str, headers: dict[str, Any], pinned: bool) -> None:
        self._url, self._headers, self._pinned = url, headers, pinned
        self._first: tuple[str, str | None] | None = None  # the size and the ETag

    def size(self) -> int:
        with self._requested(0, 1) as response:
            found = self._total(response, 0), response.headers["ETag"]
        if self._pinned:
            self._first = found
        return int(found[0])

    @contextmanager
    def get(self, start: int, stop: int) -> Iterator[Body]:
        with self._requested(start, stop) as response:
            found = self._total(response, start), response.headers["ETag"]
            if self._first not in (None, found):
                raise CopyError(self._url, "it was replaced while it was read")
            yield response

    @contextmanager
    def _requested(self, start: int, stop: int) -> Iterator[Any]:
        try:
            request = urllib.request.Request(self._url, headers={"Range": f"bytes={start}-{stop - 1}"})
            for name, value in ({"User-Agent": f"tartapefs/{__version__}"} | self._headers).items():
                request.add_unredirected_header(name, str(value))
            with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
                yield response
        except urllib.error.HTTPError as error:
            error.close()
            message = f"the server answers {error.code} {error.reason}"
            if error.code in _AGAIN or error.code >= 500:
                raise OSError(message) from None
            raise CopyError(self._url, message) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise CopyError(self._url, error.reason.verify_message) from None
            raise OSError(str(error.reason)) from None
        except http.client.InvalidURL as error:
            raise CopyError(self._url, str(error)) from None
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from None
        except ValueError as error:  # of a header
            raise CopyError(self._url, str(error)) from None

    def _total(self, response: Any, start: int) -> str:
        """The size of the file, after a look whether the answer is the range that was asked for."""
        if response.status != 206:
            raise CopyError(
                self._url,
                f"the server gives no ranges: it answers {response.status} to a request for one, and would send all;"
                f" fetch the archive by other means, and name that file",
            )
        told = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+)", response.headers["Content-Range"] or "")
        if told is None or int(told[1]) != start:
            raise CopyError(self._url, "the server does not say which range it sends, and of how many bytes")
        return told[2]

    def close(self) -> None:
        pass


class S3Ranges:
    """An object of S3; `options`: of `boto3.client`. `pinned`: as for HttpRanges."""

    def __init__(self, url: str, options: dict[str, Any], pinned: bool, threads: int) -> None:
        self._url, self._pinned = url, pinned
        bucket, _, key = url.removeprefix("s3://").partition("/")
        if not bucket or not key:
            raise CopyError(url, "is no object; name one as s3://BUCKET/KEY")
        self._object = {"Bucket": bucket, "Key": key}
        self._errors = import_needed("botocore.exceptions")
        try:
            self._client = client_of(options, signs_bodies=True, connections=threads + 1)
        except (self._errors.BotoCoreError, TypeError, ValueError) as error:
            raise CopyError(url, advice(error)) from None

    def size(self) -> int:
        with self._told():
            found = self._client.head_object(**self._object)
        if self._pinned:
            self._object["IfMatch"] = found["ETag"]
        return int(found["ContentLength"])

    @contextmanager
    def get(self, start: int, stop: int) -> Iterator[Body]:
        with self._told():
            answer = self._client.get_object(**self._object, Range=f"bytes={start}-{stop - 1}")
            with closing(answer["Body"]) as body:
                if not str(answer.get("ContentRange")).startswith(f"bytes {start}-"):
                    raise CopyError(self._url, "the server gives no ranges, and would send all of the object")
                yield body

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._errors.ClientError as error:
            status = status_of(error)
            if status in _AGAIN or status >= 500:
                raise OSError(advice(error)) from None
            message = "it was replaced while it was read" if status == 412 else advice(error)
            raise CopyError(self._url, message) from None
        except (self._errors.NoCredentialsError, self._errors.NoRegionError) as error:
            raise CopyError(self._url, advice(error)) from None
        except (self._errors.BotoCoreError, self._errors.HTTPClientError) as error:
            raise OSError(advice(error)) from None

    def close(self) -> None:
        self._client.close()


class FsspecRanges:
    """A file of any file system of fsspec's; `options`: of that."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._url, self._options = url, options
        self._by_thread = threading.local()  # few file systems say that threads may share them

    def _opened(self) -> tuple[Any, str]:
        try:
            opened: tuple[Any, str] = self._by_thread.opened
        except AttributeError:
            core = import_needed("fsspec").core
            try:
                opened = core.url_to_fs(self._url, skip_instance_cache=True, **self._options)
            except ImportError as error:  # it says which package fsspec needs for this URL
                raise CopyError(self._url, str(error)) from None
            except (TypeError, ValueError) as error:
                raise CopyError(self._url, " ".join(str(error).split())) from None
            self._by_thread.opened = opened
        return opened

    def size(self) -> int:
        fs, path = self._opened()
        with self._told():
            size = fs.info(path)["size"]
        if not isinstance(size, int):
            raise CopyError(self._url, "the server does not say how many bytes it has")
        return size

    @contextmanager
    def get(self, start: int, stop: int) -> Iterator[Body]:
        fs, path = self._opened()
        uncached = {} if fs.async_impl else {"cache_type": "none"}  # whose own ranges need no cache that reads ahead
        with self._told():
            data = fs.cat_file(path, start, stop, **uncached)
        if len(data) > stop - start:
            raise CopyError(self._url, "the server gives no ranges")
        yield io.BytesIO(data)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise CopyError(self._url, error.strerror or str(error) or type(error).__name__) from None
        except CopyError:
            raise
        except OSError as error:
            raise OSError(error.strerror or str(error) or type(error).__name__) from None
        except Exception as error:  # of a package that fsspec uses
            raise OSError(f"{type(error).__name__}: {error}") from None

    def close(self) -> None:
        self._by_thread = threading.local()
