"""Has webdataset open `tartape://` URLs. Import it at the top of the program: webdataset finds nothing by itself.

Its workers are copies of the program, or run its imports, so they know the URLs, too.
"""

from typing import Any

from webdataset.gopen import gopen_schemes

from tartapefs.transfer.url import TapeFileSystem

__all__ = ["open_url"]


def open_url(url: str, mode: str = "rb", bufsize: int = 8192, **options: Any) -> Any:
    """Opens an archive or a shard as webdataset wants it opened. Raises as fsspec does."""
    return TapeFileSystem().open(url, mode, **options)


gopen_schemes["tartape"] = open_url
