"""A folder of parts: the complete set stays until the next one is, and what both share stays."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.reference import Reference
from support.seals import playing

from tartapefs import OutputError, TapePlayer, TapeRecorder, UploadError
from tartapefs.api.archive_file import Parts
from tartapefs.transfer.parts_folder import PartsFolder
from tartapefs.transfer.range_digests import etag
from tartapefs.transfer.upload_targets import HashedPart, Held, Label, StoredPart, UploadTarget

LABEL = Label("f" * 64, "r" * 64, 1, 100_000)


def send_all(target: UploadTarget, player: TapePlayer, parts: Parts) -> list[StoredPart]:
    bodies = [HashedPart(player, part.start, part.stop, part.name) for part in parts]
    stored = [target.send(at, body) for at, body in enumerate(bodies)]
    assert stored == [StoredPart(body.hexdigest(), body.hexdigest()) for body in bodies]
    return stored


def test_a_folder_of_parts(tree: Path, tmp_path: Path) -> None:
    """The files of a complete set stay until the next one is complete; an abort removes only what is under way."""
    TapeRecorder(tree).commit()
    out, url = tmp_path / "out", f"file://{tmp_path}/out/"
    before = Reference(tree)
    with playing(tree) as player:
        parts = Parts(player, 100_000)
        target = PartsFolder(url, {}).begin(LABEL)
        stored = send_all(target, player, parts)
        assert target.there(parts) == dict(enumerate(stored)) and not (out / "MD5SUMS").exists()
        target.finish(stored, parts, LABEL)
        names = [part.name for part in parts]
    complete = {path.name: path.read_bytes() for path in out.iterdir()}
    assert b"".join(complete[name] for name in names) == before.read(0, before.size)
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=out, check=True)

    (tree / "photos" / "more.bin").write_bytes(os.urandom(150_000))
    TapeRecorder(tree, overwrite=True).commit()
    with playing(tree) as player:
        parts = Parts(player, 100_000)
        aborted = PartsFolder(url, {}).begin(LABEL)
        send_all(aborted, player, parts)
        assert complete.items() < {path.name: path.read_bytes() for path in out.iterdir()}.items()
        aborted.abort()
        assert {path.name: path.read_bytes() for path in out.iterdir()} == complete
        target = PartsFolder(url, {}).begin(LABEL)
        target.finish(send_all(target, player, parts), parts, LABEL)
        names = [part.name for part in parts]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["MD5SUMS", "TARTAPE", *names, *(f"{n}.md5" for n in names)]
    )
    assert b"".join((out / name).read_bytes() for name in names) == Reference(tree).read(0, Reference(tree).size)
    subprocess.run(["md5sum", "--check", "--strict", "--quiet", "MD5SUMS"], cwd=out, check=True)


def test_what_is_held_is_as_the_label_says(tree: Path, tmp_path: Path) -> None:
    """A label of another MD5SUMS, or one that does not fit the files, counts as none."""
    TapeRecorder(tree).commit()
    out, archive = tmp_path / "out", Reference(tree).size
    target = PartsFolder(f"file://{out}/", {})
    assert target.held() is None
    with playing(tree) as player:
        parts = Parts(player, 100_000)
        label = Label.of(player.tape, 100_000)  # type: ignore[arg-type]
        begun = target.begin(label)
        stored = send_all(begun, player, parts)
        held = begun.finish(stored, parts, label)
        assert held == target.held() == Held(label, etag(bytes.fromhex(part.md5) for part in stored))
        within = {at: part for at, part in enumerate(stored) if (at + 1) * 100_000 <= 250_000}
        assert target.kept(parts, held, 250_000) == within
        assert target.kept(parts, held, archive) == dict(enumerate(stored))
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    facts = json.loads(written["TARTAPE"])
    first, lines = "archive.tar.00001", written["MD5SUMS"].splitlines(keepends=True)
    for name, wrong in [
        ("TARTAPE", b"no JSON"),
        ("TARTAPE", b"[]"),
        ("TARTAPE", json.dumps(facts | {"etag": "0-1"}).encode()),
        ("TARTAPE", json.dumps(facts | {"tartape-size": str(archive + 1)}).encode()),
        ("MD5SUMS", b"0" * 32 + lines[0][32:] + b"".join(lines[1:])),
        ("MD5SUMS", b"".join(lines[1:])),
        (first, written[first][:-1]),
    ]:
        (out / name).write_bytes(wrong)
        assert target.held() is None, (name, wrong)
        (out / name).write_bytes(written[name])
    assert target.held() is not None
    (out / "MD5SUMS").write_bytes(b"d41d8cd98f00b204e9800998ecf8427e  my-own-file\n")
    with pytest.raises(OutputError, match="is not of an upload"):
        target.held()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nothing://a/", "Protocol not known"),
        ("github://a/", "missing 2 required"),
        ("file:///proc/nothing/", "/proc/nothing: No such file or directory"),
    ],
)
def test_what_goes_wrong_is_one_line(url: str, says: str) -> None:
    with pytest.raises(UploadError, match=says):
        target = PartsFolder(url, {})
        target.held()
        target.begin(LABEL)


def test_any_other_error_of_a_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *_: object, **__: object) -> None:
        raise LookupError("two\nlines")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(UploadError, match="LookupError: two") as raised:
        PartsFolder("memory://a/", {}).held()
    assert "\n" not in str(raised.value)
