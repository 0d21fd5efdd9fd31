"""Labels, windows that hash, what S3 would refuse, and the packages that uploads need."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.digests import in_base64, slow_crc
from support.recordings import player_of, whole
from support.uploads import PART

from tartapefs import Tape, TapeError, TapeNotFoundError, TapeRecorder
from tartapefs.distributed import upload
from tartapefs.transfer import s3_client
from tartapefs.transfer.upload_targets import HashedPart, Label, StoredPart, crc64nvme_of


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A recorded folder whose archive has five parts."""
    root = tmp_path / "data"
    root.mkdir()
    with open(root / "holes", "wb") as file:
        file.truncate(4 * PART)
    TapeRecorder(root).commit()
    return root


@pytest.mark.parametrize(
    ("url", "part_size", "says"),
    [
        ("s3://tapes/a.tar", PART - 1, "5 parts of 5,242,879 bytes: S3 takes"),
        ("s3://tapes/a.tar", 1000, "S3 takes"),
        ("s3://tapes/a.tar", (5 << 30) + 1, "S3 takes"),
        ("file:///tmp/a.tar", None, "only S3 joins parts"),
        ("s3://tapes", None, "no s3://bucket/key"),
        ("s3:///key", None, "no s3://bucket/key"),
    ],
)
def test_what_s3_would_refuse_is_refused_at_once(data: Path, url: str, part_size: int | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        upload(data, url, part_size=part_size)
    with pytest.raises(TapeNotFoundError):
        upload(data.parent, url, part_size=part_size)


def test_without_a_package_that_the_url_needs(data: Path) -> None:
    with pytest.raises(TapeError, match=r"s3://tapes/a/: .*s3fs"):
        upload(data, "s3://tapes/a/")


@pytest.mark.long
def test_without_the_extra(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what is missing, and the module can be imported without any of it."""
    s3_client.session.cache_clear()
    for module, url in (("botocore", "s3://tapes/a.tar"), ("fsspec", "file:///tmp/a/")):
        for name in [name for name in sys.modules if name.partition(".")[0] == module] or [module]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(TapeError, match=rf"{module}.* is not installed; .*pip install 'tartapefs\[upload\]'"):
            upload(data, url)
    code = "import sys, json, tartapefs.distributed; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"boto3", "distributed", "fsspec"} & set(loaded)


def test_a_label_is_read_as_it_was_written(data: Path) -> None:
    with Tape.discover(data) as tape:
        label = Label.of(tape, PART)
    strings = label.as_strings()
    assert Label.from_strings(strings) == label
    assert Label.from_strings({name.title(): value for name, value in strings.items()} | {"other": "1"}) == label
    assert Label.from_strings({}) is None
    for wrong in ({"tartape-size": "x"}, {"tartape-size": "0"}, {"tartape-part-size": "-1"}):
        assert Label.from_strings(strings | wrong) is None


def test_a_window_hashes_what_was_read_last(tree: Path) -> None:
    TapeRecorder(tree).commit()
    archive = whole(tree)
    positions: list[int] = []
    with player_of(tree) as player:
        part = HashedPart(player, 1000, 5000, "part", positions.append)
        part.read(700)
        part.seek(0)
        assert part.read(3000) + part.read() == archive[1000:5000]
        assert part.hexdigest() == hashlib.md5(archive[1000:5000]).hexdigest()
    assert positions[:3] == [0, 0, 3000]


def test_a_part_with_its_crc(tree: Path) -> None:
    """Of what was read since its start; of both parts it makes that of the whole."""
    TapeRecorder(tree).commit()
    archive = whole(tree)
    label, stored = Label("f", "r", len(archive), 100_000), []
    with player_of(tree) as player:
        for start in range(0, len(archive), 100_000):
            stop = min(start + 100_000, len(archive))
            part = HashedPart(player, start, stop, "part", with_crc=True)
            part.read(1000)
            part.seek(0)
            assert part.read() == archive[start:stop]
            assert f"{part.crc64nvme:016x}" == slow_crc("crc64nvme", archive[start:stop])
            stored.append(part.as_stored("etag"))
            assert stored[-1].md5 == hashlib.md5(archive[start:stop]).hexdigest()
            assert part.equals(stored[-1]) and part.equals(StoredPart(part.hexdigest()))
            assert not part.equals(StoredPart("etag")) and not part.equals(StoredPart("etag", crc64nvme=0))
        assert HashedPart(player, 0, 10, "part").crc64nvme is None
    assert crc64nvme_of(stored, label) == in_base64(slow_crc("crc64nvme", archive))
    assert crc64nvme_of([*stored[:-1], StoredPart("etag")], label) == ""
