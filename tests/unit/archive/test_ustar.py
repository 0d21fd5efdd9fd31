"""The header against `tarfile`'s, which is another implementation of the same format."""

import stat
import tarfile
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

from tartapefs.archive import ustar
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


def nested(*lengths: int) -> bytes:
    """A name of parts of these lengths; a length of 0 at the end makes it a directory's."""
    return b"/".join(b"%c" % (ord("a") + at % 26) * length for at, length in enumerate(lengths))


FITTING = [
    nested(99),
    nested(100),
    nested(50, 50),  # 101 bytes
    nested(1, 100),  # 102
    nested(4, 95),  # 100
    nested(4, 96),  # 101
    nested(4, 94, 0),  # 100, the slash of a directory included
    nested(4, 95, 0),  # 101
    nested(99, 0),
    nested(4, 99, 0),  # the part after the split is full, and ends in the slash
    nested(154, 100),  # 255
    nested(155, 99),  # both parts as full as they get within 255
    nested(155, 98, 0),
    nested(50, 50, 50, 50, 49),  # three places to split
    nested(100, 1, 1, 1, 100),
    nested(54, 100, 99),
    nested(154, 0, 99),  # split at the second of two slashes
    nested(*[1] * 128),  # 255 bytes of slashes and letters
    nested(154, 2, 2),  # a slash at 154, one at 157: only the first is in reach
    nested(155, 1, 0),  # 158 bytes; the only slash in reach is the first
]


@pytest.mark.parametrize("name", FITTING, ids=lambda name: "+".join(str(len(part)) for part in name.split(b"/")))
def test_names_at_the_limits(name: bytes) -> None:
    """A name of up to 100 bytes stands alone, a longer one is split at the rightmost slash that fits."""
    kind = FOLDER if name.endswith(b"/") else FILE
    assert header(name, kind | 0o755, 0, 1) == expected(name, kind | 0o755, 0, 1)
    assert ustar.split_name(name) == reference.split(name)


@pytest.mark.parametrize("name", FITTING, ids=lambda name: "+".join(str(len(part)) for part in name.split(b"/")))
def test_split_name_rejoins(name: bytes) -> None:
    """The two fields are within their lengths, not empty where there are two, and joined by a slash give the name."""
    prefix, rest = ustar.split_name(name)
    assert (prefix + b"/" + rest if prefix else rest) == name
    assert len(prefix) <= 155
    assert 1 <= len(rest) <= 100


@pytest.mark.parametrize(
    "name",
    [
        nested(101),
        nested(100, 0),  # a directory's closing slash is no place to split
        nested(156, 1),  # prefix too long
        nested(156, 0),
        nested(4, 101),
        nested(4, 100, 0),  # 101 bytes after the split, with the slash
        nested(155, 100),  # 256: would fit the fields, but not the limit
        nested(200, 60),
        nested(256),
        nested(*[1] * 129),
        nested(100, 155),
        nested(0, 101),  # a prefix of nothing
    ],
    ids=lambda name: "+".join(str(len(part)) for part in name.split(b"/")),
)
def test_names_that_do_not_fit(name: bytes) -> None:
    """Refused with the reason: how long the name is and what would fit."""
    for refused in (ustar.split_name, lambda name: header(name, FILE, 0, 0)):
        with pytest.raises(ValueError, match=f"{len(name)} bytes") as caught:
            refused(name)
        assert any(limit in str(caught.value) for limit in ("255", "100"))


@pytest.mark.parametrize("length", [1, 99, 100])
def test_targets(length: int) -> None:
    """A target of up to 100 bytes is written whole; a full field has no NUL."""
    target = b"t" * length
    ustar.check_target(target)
    made = header(b"data/link", LINK | 0o777, 0, 5, target)
    assert made == expected(b"data/link", LINK | 0o777, 0, 5, target)
    assert made[157:257] == target.ljust(100, b"\0")


@pytest.mark.parametrize("length", [101, 255, 4095])
def test_targets_that_do_not_fit(length: int) -> None:
    with pytest.raises(ValueError, match=f"target has {length} bytes, at most 100"):
        ustar.check_target(b"t" * length)


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


@settings(max_examples=400, deadline=None, database=None)
@given(
    _names,
    st.integers(0, 0o7777),
    st.integers(0, 2**63 - 1) | st.integers(0, 9 * GIB),
    st.integers(-(2**63), 2**63 - 1) | st.integers(-(10**10), 10**10),
    st.none() | _targets,
    _owners,
)
def test_any_header(name: bytes, bits: int, size: int, mtime: int, target: bytes | None, owner: Owner | None) -> None:
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
