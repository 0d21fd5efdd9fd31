"""The header against `tarfile`'s, which is another implementation of the same format."""

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.long_names import FITTING, NOT_FITTING, lengths_of

from tartapefs.archive import ustar
from tartapefs.archive.layout import head_size
from tartapefs.archive.ustar import Owner

FILE, FOLDER, LINK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK
GIB = 1 << 30


def expected(name: bytes, mode: int, size: int, mtime: int, target: bytes = b"", owner: Owner | None = None) -> bytes:
    """What `tarfile` makes of the same facts."""
    found = SimpleNamespace(st_mode=mode, st_size=size, st_mtime_ns=mtime * 10**9)
    text = None if owner is None else (owner.uid, owner.gid, text_of(owner.uname), text_of(owner.gname))
    return reference.header(name, found, text_of(target), text)


def header(name: bytes, mode: int, size: int, mtime: int, target: bytes = b"", owner: Owner | None = None) -> bytes:
    """What we make of them."""
    (made,) = ustar.headers([(name, mode, size, mtime * 10**9, 0, 0, target, owner)])
    return made


def text_of(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("name", FITTING + NOT_FITTING, ids=lengths_of)
@pytest.mark.parametrize("target", [0, 100, 101, 511, 512, 4095])
def test_names_and_targets_at_the_limits(name: bytes, target: int) -> None:
    """What fits into one block is there alone; what does not is before it whole, as in `head_size`."""
    kind = FOLDER if name.endswith(b"/") else LINK if target else FILE
    text = b"t" * (0 if name.endswith(b"/") else target)
    made = header(name, kind | 0o755, 0, 1, text)
    assert made == expected(name, kind | 0o755, 0, 1, text)
    assert len(made) == head_size(name, text)
    found = tarfile.TarFile(fileobj=io.BytesIO(made + bytes(1024))).next()
    assert found is not None
    assert (os.fsencode(found.name), os.fsencode(found.linkname)) == (name.rstrip(b"/"), text)


def test_long_headers_among_others() -> None:
    """Each member gets its own."""
    every = [*FITTING[:9], *NOT_FITTING, *FITTING[9:]]
    facts = [(name, FILE | 0o644, at, at * 10**9, 0, 0, b"", None) for at, name in enumerate(every)]
    assert ustar.headers(facts) == [expected(name, FILE | 0o644, at, at) for at, name in enumerate(every)]


def test_as_gnu_tar_writes_them(tmp_path: Path) -> None:
    """The blocks before a header are those of GNU tar, byte for byte; "K" precedes "L"."""
    root = tmp_path / "d"
    root.mkdir()
    for length in (99, 100, 101, 255):
        (root / ("f" * length)).touch()
        (root / ("d" * length)).mkdir()
        (root / ("l" * length)).symlink_to("t" * (4 * length))
    command = ["tar", "--format=gnu", "--owner=root:0", "--group=root:0", "-cf", "-", "d"]
    theirs = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    ours = b""
    for path in (root / ("l" * 255), root / ("l" * 99), root / ("d" * 100), root / ("f" * 101)):
        found, target = path.lstat(), os.readlink(path) if path.is_symlink() else ""
        name = os.fsencode(path.relative_to(tmp_path)) + b"/" * stat.S_ISDIR(found.st_mode)
        ours += header(name, found.st_mode, 0, found.st_mtime_ns // 10**9, os.fsencode(target))
    wanted = reference.blocks_of(theirs)
    assert reference.blocks_of(ours).items() <= wanted.items()
    assert len(reference.blocks_of(ours)) == 5
    both = wanted[b"K", b"t" * 1020] + wanted[b"L", b"d/" + b"l" * 255]
    assert both in ours
    assert both in theirs


@pytest.mark.parametrize("length", [1, 99, 100])
def test_targets(length: int) -> None:
    """A target of up to 100 bytes is written whole; a full field has no NUL."""
    target = b"t" * length
    made = header(b"data/link", LINK | 0o777, 0, 5, target)
    assert made == expected(b"data/link", LINK | 0o777, 0, 5, target)
    assert made[157:257] == target.ljust(100, b"\0")


@pytest.mark.parametrize("size", [0, 1, 512, 8 * GIB - 1, 8 * GIB, 8 * GIB + 1, 1 << 40, 2**63 - 1])
def test_sizes(size: int) -> None:
    """Octal up to 8 GiB - 1, base 256 from there on."""
    made = header(b"data/file", FILE | 0o600, size, 1)
    assert made == expected(b"data/file", FILE | 0o600, size, 1)
    assert (made[124] == 0x80) == (size >= 8 * GIB)
    assert tarfile.TarInfo.frombuf(made, "utf-8", "surrogateescape").size == size


@pytest.mark.parametrize(
    "mtime", [0, 1, -1, -2, -(2**31), -(2**40), 8**11 - 1, 8**11, 8**11 + 1, 2**40, 253402300800, 2**62, -(2**62)]
)
def test_mtimes(mtime: int) -> None:
    """Octal from 1970 to 2242; base 256, two's complement, before and after."""
    made = header(b"data/file", FILE | 0o600, 3, mtime)
    assert made == expected(b"data/file", FILE | 0o600, 3, mtime)
    assert made[136] == (0xFF if mtime < 0 else 0x80 if mtime >= 8**11 else made[136])
    assert tarfile.TarInfo.frombuf(made, "utf-8", "surrogateescape").mtime == mtime


@pytest.mark.parametrize("kind", [FILE, FOLDER, LINK], ids=["file", "folder", "link"])
def test_every_mode(kind: int) -> None:
    """All 4,096 permission bits, setuid, setgid and sticky included; the type is not among them."""
    name, target = (b"data/x/" if kind == FOLDER else b"data/x"), (b"t" if kind == LINK else b"")
    for bits in range(0o10000):
        assert header(name, kind | bits, 0, 1, target) == expected(name, kind | bits, 0, 1, target), oct(bits)


@pytest.mark.parametrize(
    "owner",
    [
        Owner(),
        Owner(1000, 1000, b"alice", b"users"),
        Owner(0o7777777, 0o7777777, b"last", b"octal"),
        Owner(0o7777777 + 1, 0o7777777 + 1, b"", b""),
        Owner(2**32 - 2, 2**32 - 2, b"n" * 31, b"g" * 31),
        Owner(65534, 65534, b"caf\xe9", "日本".encode()),
    ],
)
def test_owners(owner: Owner) -> None:
    """Kept owners; numbers beyond 2,097,151 in base 256."""
    assert header(b"d/f", FILE | 0o644, 9, 1, owner=owner) == expected(b"d/f", FILE | 0o644, 9, 1, owner=owner)


def test_scrubbed_owner_is_root() -> None:
    made = header(b"d/f", FILE | 0o644, 0, 0)
    assert made[108:124] == b"0000000\x000000000\x00"
    assert made[265:297].rstrip(b"\0") == made[297:329].rstrip(b"\0") == b"root"


def test_fields_that_never_change() -> None:
    """Magic, version, empty device numbers, and how the checksum is written."""
    made = header(b"d/f", FILE | 0o644, 0, 0)
    assert len(made) == 512
    assert made[257:265] == b"ustar\x0000"
    assert made[329:345] == bytes(16)
    assert made[154:156] == b"\0 "
    assert int(made[148:154], 8) == sum(made[:148]) + 8 * 32 + sum(made[156:])


@pytest.mark.parametrize("byte", [1, 0x7F, 0xFF])
def test_checksum_of_extreme_headers(byte: int) -> None:
    """The checksum is right where all text is of the largest bytes there are."""
    name = bytes([byte]) * 155 + b"/" + bytes([byte]) * 99
    target, owner = bytes([byte]) * 100, Owner(2**32 - 1, 2**32 - 1, bytes([byte]) * 31, bytes([byte]) * 31)
    facts = (name, LINK | 0o7777, 0, -1, target, owner)
    assert header(*facts) == expected(*facts)


_bytes_of_a_name = st.integers(1, 255).filter(lambda byte: byte != ord("/"))
_component = st.lists(_bytes_of_a_name, min_size=1, max_size=120).map(bytes)
_names = st.builds(
    lambda parts, slash: b"/".join(parts) + b"/" * slash, st.lists(_component, min_size=1, max_size=6), st.booleans()
)
_short_text = st.lists(_bytes_of_a_name, max_size=31).map(bytes)
_ids = st.integers(0, 2**32 - 1)
_owners = st.none() | st.builds(Owner, _ids, _ids, _short_text, _short_text)
_targets = st.lists(st.integers(1, 255), min_size=1, max_size=100).map(bytes)


def fits(name: bytes) -> bool:
    """By trying every slash but a directory's own."""
    if len(name) <= 100:
        return True
    places = (cut for cut in range(1, len(name) - 1) if name[cut] == ord("/"))
    return len(name) <= 255 and any(cut <= 155 and len(name) - cut - 1 <= 100 for cut in places)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("part", range(4))
@settings(max_examples=100, deadline=None, database=None)
@given(
    _names,
    st.integers(0, 0o7777),
    st.integers(0, 2**63 - 1) | st.integers(0, 9 * GIB),
    st.integers(-(2**63), 2**63 - 1) | st.integers(-(10**10), 10**10),
    st.none() | _targets,
    _owners,
)
def test_any_header(
    part: int, name: bytes, bits: int, size: int, mtime: int, target: bytes | None, owner: Owner | None
) -> None:
    """Whatever the facts: the header that `tarfile` makes, or a refusal exactly where no slash fits."""
    if name.endswith(b"/"):
        facts = (name, FOLDER | bits, 0, mtime, b"", owner)
    elif target is not None:
        facts = (name, LINK | bits, 0, mtime, target, owner)
    else:
        facts = (name, FILE | bits, size, mtime, b"", owner)
    if fits(name):
        assert header(*facts) == expected(*facts)
    else:
        with pytest.raises(ValueError, match=r"\d+ bytes"):
            header(*facts)
