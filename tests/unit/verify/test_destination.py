"""The folder that members are restored into: what is there stays, and a late thread writes nothing."""

import os
from pathlib import Path

import pytest
from support.seals import index_of

from tartapefs import Tape
from tartapefs.verify.destination import Destination

NAME = "data/folder 000/00005"  # of 5000 bytes


def test_a_file_is_written_in_any_order(mixed: Path, tmp_path: Path) -> None:
    """It has its name once its last byte is there, whichever that is."""
    expected = (mixed / "folder 000" / "00005").read_bytes()
    with Tape.from_index(index_of(mixed)) as tape:
        member = tape.find(NAME)
        (tmp_path / "out").mkdir()
        destination = Destination(tape, os.fspath(tmp_path / "out"), False)
        assert not destination.look(member, None)
        assert not destination.write(member, 3000, memoryview(expected[3000:]))
        assert not (tmp_path / "out" / NAME).exists()
        assert destination.write(member, 0, memoryview(expected[:3000]))
        assert (tmp_path / "out" / NAME).read_bytes() == expected
        assert (tmp_path / "out" / NAME).stat().st_mtime_ns == member.mtime_ns
        assert destination.look(member, None)
        destination.close()


@pytest.mark.parametrize("end", ["close", "drop"])
def test_what_is_late_is_not_written(mixed: Path, tmp_path: Path, end: str) -> None:
    """Nor is what was written before left behind."""
    with Tape.from_index(index_of(mixed)) as tape:
        member = tape.find(NAME)
        (tmp_path / "out").mkdir()
        destination = Destination(tape, os.fspath(tmp_path / "out"), False)
        assert not destination.write(member, 0, memoryview(bytes(3000)))
        assert end != "drop" or (destination.drop(member), destination.drop(member)) == (True, False)
        if end == "close":
            destination.close()
        assert not destination.write(member, 3000, memoryview(bytes(2000)))
        assert not destination.write(member, 0, memoryview(bytes(5000)))
        assert os.listdir(tmp_path / "out" / "data" / "folder 000") == []
        if end == "drop":
            destination.close()


def test_another_file_is_not_taken_for_the_member(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "data" / "folder 000"
    out.mkdir(parents=True)
    with Tape.from_index(index_of(mixed)) as tape:
        member = tape.find(NAME)
        for overwrite in (False, True):
            destination = Destination(tape, os.fspath(tmp_path / "out"), overwrite)
            (out / "00005").write_bytes(bytes(5000))
            os.utime(out / "00005", ns=(member.mtime_ns, member.mtime_ns))
            os.chmod(out / "00005", 0o600)
            if overwrite:  # it is right, but has another mode
                assert not destination.look(member, lambda member, fd: True)
                assert destination.write(member, 0, memoryview(b"y" * 5000))
                assert (out / "00005").read_bytes() == b"y" * 5000
            else:
                with pytest.raises(FileExistsError):
                    destination.look(member, lambda member, fd: False)
                assert destination.look(member, lambda member, fd: True)
                with pytest.raises(FileExistsError):  # it came while the member was read
                    destination.write(member, 0, memoryview(b"y" * 5000))
                assert (out / "00005").read_bytes() == bytes(5000)
                assert os.listdir(out) == ["00005"]
            destination.close()
