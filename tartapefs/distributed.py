"""Sends an archive by the workers of a Dask cluster. The code is in `transfer.distributed`."""

from tartapefs.transfer.distributed import Upload, upload

__all__ = ["Upload", "upload"]
