"""Upload targets: what is refused before the first part is sent, and which packages they need."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tartapefs import TapeError, TapeNotFoundError, TapeRecorder
from tartapefs.distributed import upload
from tartapefs.transfer import upload_targets

PART = 5 << 20  # the smallest that S3 takes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A recorded folder whose archive has five parts."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "holes").touch()
    os.truncate(root / "holes", 4 * PART)
    TapeRecorder(root).commit()
    return root


@pytest.mark.parametrize(
    ("url", "part_size", "says"),
    [
        ("s3://tapes/a.tar", PART - 1, "5 parts of 5,242,879 bytes: S3 takes"),
        ("s3://tapes/a.tar", 1, "S3 takes"),
        ("s3://tapes/a.tar", (5 << 30) + 1, "S3 takes"),
        ("file:///tmp/a.tar", None, "only S3 joins parts"),
    ],
)
def test_what_s3_would_refuse_is_refused_at_once(data: Path, url: str, part_size: int | None, says: str) -> None:
    nobody: Any = None
    with pytest.raises(ValueError, match=says):
        upload(data, url, nobody, part_size=part_size)
    with pytest.raises(TapeNotFoundError):
        upload(data.parent, url, nobody, part_size=part_size)


def test_without_a_package_that_the_url_needs(data: Path) -> None:
    nobody: Any = None
    with pytest.raises(TapeError, match=r"s3://tapes/a/: .*s3fs"):
        upload(data, "s3://tapes/a/", nobody)


@pytest.mark.long
def test_without_the_extra(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what is missing, and the module can be imported without any of it."""
    nobody: Any = None
    upload_targets._session.cache_clear()
    for module, url in (("boto3", "s3://tapes/a.tar"), ("fsspec", "file:///tmp/a/")):
        for name in [name for name in sys.modules if name.partition(".")[0] == module] or [module]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(TapeError, match=rf"{module}.* is not installed; .*pip install 'tartapefs\[distributed\]'"):
            upload(data, url, nobody)
    code = "import sys, json, tartapefs.distributed; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"boto3", "distributed", "fsspec"} & set(loaded)
