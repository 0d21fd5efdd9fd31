"""Upload targets: what is refused before the first part is sent, which packages they need, and a folder of parts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.reference import Reference
from support.seals import playing

from tartapefs import TapeError, TapeNotFoundError, TapePlayer, TapeRecorder
from tartapefs.api.archive_file import Parts
from tartapefs.distributed import upload
from tartapefs.transfer import upload_targets
from tartapefs.transfer.upload_targets import HashedPart, UploadTarget, target_for

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
        ("s3://tapes/a.tar", 1000, "20,974 parts of 1,000 bytes: S3 takes"),
        ("file:///tmp/parts/", 1, "more than 99,999; a part needs 210 bytes or more"),
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


def send_all(target: UploadTarget, player: TapePlayer, parts: Parts) -> list[str]:
    """Sends all parts, and gives their MD5s."""
    md5s = []
    for at, part in enumerate(parts):
        body = HashedPart(player, part.start, part.stop, part.name)
        target.send(at, body)
        md5s.append(body.hexdigest())
    return md5s


def test_a_folder_of_parts(tree: Path, tmp_path: Path) -> None:
    """The files of a complete set stay until the next one is complete; an abort removes only what is under way."""
    TapeRecorder(tree).commit()
    out, url = tmp_path / "out", f"file://{tmp_path}/out/"
    before = Reference(tree)
    with playing(tree) as player:
        parts = Parts(player, 100_000)
        target = target_for(url, {}, parts, 100_000)
        md5s = send_all(target, player, parts)
        assert target.there(parts) == dict(enumerate(md5s)) and not (out / "MD5SUMS").exists()
        target.finish(md5s, "", parts)
        names = [part.name for part in parts]
    complete = {path.name: path.read_bytes() for path in out.iterdir()}
    assert b"".join(complete[name] for name in names) == before.read(0, before.size)
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=out, check=True)

    (tree / "photos" / "more.bin").write_bytes(os.urandom(150_000))
    TapeRecorder(tree, overwrite=True).commit()
    with playing(tree) as player:
        parts = Parts(player, 100_000)
        aborted = target_for(url, {}, parts, 100_000)
        send_all(aborted, player, parts)
        assert complete.items() < {path.name: path.read_bytes() for path in out.iterdir()}.items()
        aborted.abort()
        assert {path.name: path.read_bytes() for path in out.iterdir()} == complete
        target = target_for(url, {}, parts, 100_000)
        target.finish(send_all(target, player, parts), "", parts)
        names = [part.name for part in parts]
    assert sorted(path.name for path in out.iterdir()) == sorted(["MD5SUMS", *names, *(f"{n}.md5" for n in names)])
    assert b"".join((out / name).read_bytes() for name in names) == Reference(tree).read(0, Reference(tree).size)
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=out, check=True)
