"""Programs that read, copy, resume or serve a file do so with the mounted archive, and every byte they get is right."""

import errno
import hashlib
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.programs import wait_until
from support.reference import Reference
from support.servers import http_server, rsync_daemon
from support.trees import TREES, recorded, snapshot, write

from tartapefs import TapeRecorder

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded folder, its archive as it should be, in memory and in a file, and where its segments start."""

    root: Path
    data: bytes
    file: Path
    boundaries: list[int]


def record(root: Path) -> Recorded:
    TapeRecorder(root).commit()
    reference = Reference(root)
    file = root.parent / "expected.tar"
    file.write_bytes(reference.read(0, reference.size))
    return Recorded(root, file.read_bytes(), file, reference.boundaries())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """Some 32 MiB: a thousand files of many sizes, folders and links, a few files of megabytes, one of zeros."""
    root = tmp_path_factory.mktemp("library") / "library"
    some = random.Random(7)
    for at in range(40):
        for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, *(some.randrange(30_000) for _ in range(16))):
            write(root / f"shelf {at}" / f"{size}.bin", some.randbytes(size))
        (root / f"shelf {at}" / "link").symlink_to("512.bin")
    for size in (3 * MIB - 1, 5 * MIB, 7 * MIB + 1):
        write(root / f"{size}.bin", some.randbytes(size))
    write(root / "nothing but zeros", bytes(4 * MIB))
    write(root / "zz at the end", some.randbytes(100_000))
    made = record(root)
    yield made
    shutil.rmtree(root.parent)


@pytest.fixture(scope="module")
def booklet(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A small folder of odd sizes and long names."""
    root = tmp_path_factory.mktemp("booklet") / "tree"
    root.mkdir()
    TREES["sizes"](root)
    TREES["name_lengths"](root)
    return record(root)


@pytest.fixture(autouse=True)
def no_copies_left(tmp_path: Path) -> Iterator[None]:
    """Dozens of copies of the archive would else stay until pytest forgets this run."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


def output(*command: object, exit_code: int = 0, **options: object) -> bytes:
    """What the program writes, messages included; it must end with that exit code."""
    result = subprocess.run(
        [os.fspath(part) if isinstance(part, os.PathLike) else str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )
    assert result.returncode == exit_code, result.stdout
    return result.stdout


def equal(path: Path, expected: Recorded) -> bool:
    """Whether the file has exactly the archive's bytes. (A plain `==` would print megabytes when it fails.)"""
    return path.read_bytes() == expected.data


def readers_below(folder: Path) -> list[str]:
    """The processes that have something below `folder` open."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [os.readlink(f"/proc/{process}/fd/{fd}") for fd in os.listdir(f"/proc/{process}/fd")]
        except OSError:
            continue
        found += [process for link in links if link.startswith(f"{folder}/")]
    return found


# Whole copies.


@pytest.mark.long(but="cached")
@pytest.mark.parametrize("option", ["--direct", None], ids=["direct", "cached"])
@pytest.mark.parametrize(
    "command",
    [
        "cp {archive} {copy}",
        "cp --sparse=always {archive} {copy}",
        "cp --reflink=never --sparse=never {archive} {copy}",
        "cat {archive} > {copy}",
        "cat < {archive} | cat > {copy}",
        "install -m 600 {archive} {copy}",
        "dd if={archive} of={copy} bs=1M status=none",
        "dd if={archive} of={copy} bs=1000 status=none",
        "head -c -5000 {archive} > {copy}; tail -c 5000 {archive} >> {copy}",
        "head -c 1000001 {archive} > {copy}; tail -c +1000002 {archive} >> {copy}",
        "split -b 999999 {archive} {copy}.part. && cat {copy}.part.* > {copy}",
        "split -n 3 {archive} {copy}.part. && cat {copy}.part.* > {copy}",
    ],
)
def test_whole_copies(library, mount, tmp_path, command, option):
    """The copy is the archive, byte by byte."""
    copy = tmp_path / "copy"
    archive = mount(library.root, *filter(None, [option]))
    output("sh", "-c", command.format(archive=archive, copy=copy))
    assert equal(copy, library)


def test_checksums(library, mount):
    """Programs that only read agree with one another, and with the archive as it should be."""
    archive = mount(library.root)
    assert output("sha256sum", archive).split()[0].decode() == hashlib.sha256(library.data).hexdigest()
    assert output("md5sum", archive).split()[0].decode() == hashlib.md5(library.data).hexdigest()
    assert output("cksum", archive).split()[:2] == output("cksum", library.file).split()[:2]
    assert output("wc", "-c", archive).split()[0] == b"%d" % len(library.data)
    assert output("cmp", archive, library.file) == b""
    assert output("cmp", "-i", "12345", "-n", "1000003", archive, library.file) == b""


@pytest.mark.long
def test_dd_resumes_anywhere(library, mount, tmp_path):
    """At 50 cut points, odd ones too, the earlier part and what `dd skip=` adds to it are the archive."""
    archive = mount(library.root)
    size, some = len(library.data), random.Random(50)
    cuts = [some.randrange(1, size) for _ in range(20)]
    cuts += [some.choice(library.boundaries[1:-1]) + away for away in (-1, 0, 1) for _ in range(8)]
    cuts += [1, 2, 511, size - 1025, size - 1024, size - 1]
    assert len(cuts) == 50
    copy = tmp_path / "copy"
    for cut in cuts:
        output("dd", f"if={archive}", f"of={copy}", "bs=1M", f"count={cut}", "iflag=count_bytes")
        assert copy.stat().st_size == cut
        resume = (f"skip={cut}", f"seek={cut}", "iflag=skip_bytes", "oflag=seek_bytes", "conv=notrunc")
        output("dd", f"if={archive}", f"of={copy}", "bs=1M", *resume)
        assert equal(copy, library), cut


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("block", "blocks"), [(512, 40_001), (513, 33_333), (1, 12345), (MIB, 20), (999_983, 7)])
def test_dd_skips_whole_blocks(library, mount, tmp_path, block, blocks):
    """`dd bs= skip=`, in blocks, gives the rest of the archive."""
    rest = tmp_path / "rest"
    archive = mount(library.root)
    if block == 1:  # a byte at a time, but not to the end
        output("dd", f"if={archive}", f"of={rest}", "bs=1", f"skip={blocks}", "count=3000")
        assert rest.read_bytes() == library.data[blocks : blocks + 3000]
    else:
        output("dd", f"if={archive}", f"of={rest}", f"bs={block}", f"skip={blocks}")
        assert rest.read_bytes() == library.data[block * blocks :]


# rsync.


def largest_file(folder: Path) -> int:
    """The size of the largest file, those with a temporary name included."""
    return max((entry.stat().st_size for entry in os.scandir(folder)), default=0)


@pytest.mark.long(but=1)
@pytest.mark.needs("rsync")
@pytest.mark.parametrize(
    ("to_daemon", "end", "code"),
    [
        # A sender that is asked to end sends its last piece twice, of any file, so that the start no longer fits.
        pytest.param(True, signal.SIGKILL, -signal.SIGKILL, id="push"),
        pytest.param(False, signal.SIGTERM, 20, id="pull"),
    ],
)
def test_rsync_interrupted_and_resumed(library, mount, tmp_path, to_daemon, end, code):
    """What an interrupted rsync left behind, `--append-verify` completes without sending it again."""
    archive = mount(library.root)
    target = tmp_path / "target"
    target.mkdir()
    with rsync_daemon(target if to_daemon else archive.parent, tmp_path) as address:
        places = (archive, f"{address}/") if to_daemon else (f"{address}/archive.tar", f"{target}/")
        with subprocess.Popen(["rsync", "--partial", "--bwlimit=8m", *places], stderr=subprocess.DEVNULL) as client:
            wait_until(lambda: largest_file(target) > 4 * MIB)
            client.send_signal(end)
            assert client.wait(60) == code
        wait_until(lambda: os.listdir(target) == ["archive.tar"] and not readers_below(target))
        partial = (target / "archive.tar").stat().st_size
        assert 4 * MIB < partial < len(library.data)
        assert (target / "archive.tar").read_bytes() == library.data[:partial]

        said = output("rsync", "--partial", "--append-verify", "--stats", *places).decode()
        literal = int(re.search(r"Literal data: ([\d,]+) bytes", said)[1].replace(",", ""))
        assert literal == len(library.data) - partial
        assert equal(target / "archive.tar", library)
        wait_until(lambda: not readers_below(archive.parent))


@pytest.mark.needs("rsync")
def test_rsync_notices_a_wrong_start(library, mount, tmp_path):
    """`--append-verify` does not build on a start that is not the archive's."""
    copy = write(tmp_path / "copy.tar", library.data[:2_000_000] + b"wrong" + library.data[2_000_005:3_000_000])
    output("rsync", "--no-whole-file", "--append-verify", mount(library.root), copy)
    assert equal(copy, library)


@pytest.mark.needs("rsync")
def test_rsync_updates_an_older_archive(library, mount, tmp_path):
    """rsync's own comparison by blocks, with the archive as its source, gives the archive."""
    copy = write(tmp_path / "copy.tar", library.data[:MIB] + b"inserted" + library.data[2 * MIB : 9 * MIB])
    output("rsync", "--no-whole-file", "--checksum", mount(library.root), copy)
    assert equal(copy, library)


# rclone and curl.


@pytest.fixture
def rclone_environment(tmp_path: Path) -> dict[str, str]:
    """Nobody's own configuration and cache."""
    write(tmp_path / "rclone.conf")
    return os.environ | {"RCLONE_CONFIG": f"{tmp_path}/rclone.conf", "RCLONE_CACHE_DIR": f"{tmp_path}/rclone"}


@pytest.mark.needs("rclone")
def test_rclone_copies_in_streams(library, mount, tmp_path, rclone_environment):
    """`rclone copy` with several streams at once, and `rclone check`, which also notices wrong bytes."""
    folder, target = mount(library.root).parent, tmp_path / "target"
    streams = ("--multi-thread-streams", "4", "--multi-thread-cutoff", "1M")
    said = output("rclone", "copy", "-vv", *streams, folder, target, env=rclone_environment)
    assert b"multi-thread copy with 4" in said
    assert equal(target / "archive.tar", library)
    for how in ((), ("--download",)):
        said = output("rclone", "check", "-v", *how, folder, target, env=rclone_environment)
        assert b"0 differences found" in said
    with open(target / "archive.tar", "r+b") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(b"wrong")
    output("rclone", "check", "--download", folder, target, env=rclone_environment, exit_code=1)


SERVERS = {
    "busybox": ["busybox", "httpd", "-f", "-p", "127.0.0.1:PORT", "-h", "FOLDER"],
    "rclone": ["rclone", "serve", "http", "--addr", "127.0.0.1:PORT", "FOLDER"],
}


@pytest.mark.long(but=1)
@pytest.mark.parametrize("server", [pytest.param(name, marks=pytest.mark.needs("curl", name)) for name in SERVERS])
def test_curl_fetches_ranges(library, mount, tmp_path, server, rclone_environment):
    """Ranges, several at once, and a resumed download through a plain web server over the mount are right."""
    archive = mount(library.root)
    size, some = len(library.data), random.Random(3)
    ranges = [(0, 2), (511, 513), (512, 1024), (size - 1, size), (size - 1024, size), (1_000_003, size), (0, size)]
    for boundary in some.sample(library.boundaries[1:-1], 5):
        ranges.append((boundary - 1, boundary + 1))
    ranges += [(start := some.randrange(size - 99_999), start + 99_999) for _ in range(5)]
    command = [part.replace("FOLDER", str(archive.parent)) for part in SERVERS[server]]
    with http_server(command, env=rclone_environment) as address:

        def fetch(start: int, stop: int) -> bytes:
            part = tmp_path / f"part-{start}-{stop}"
            options = ("-r", f"{start}-{stop - 1}", "-w", "%{http_code}", "-o", part)
            assert output("curl", "-sS", *options, f"{address}/archive.tar") == b"206"
            return part.read_bytes()

        for start, stop in ranges:
            assert fetch(start, stop) == library.data[start:stop]

        cuts = [0, size // 4 + 1, size // 2 - 1, size // 3 * 2, size]
        with ThreadPoolExecutor(4) as pool:
            assert b"".join(pool.map(fetch, cuts[:-1], cuts[1:])) == library.data

        copy = write(tmp_path / "copy", library.data[:1_234_567])
        assert output("curl", "-sS", "-C", "-", "-w", "%{http_code}", "-o", copy, f"{address}/archive.tar") == b"206"
        assert equal(copy, library)
    wait_until(lambda: not readers_below(archive.parent))


# Archives of the archive, and archives as streams.


@pytest.mark.needs("tar")
@pytest.mark.parametrize("detection", ["seek", "raw"])
def test_tar_sparse(library, mount, tmp_path, detection):
    """`tar -S`, which leaves out what it takes for holes, keeps the whole archive."""
    archive = mount(library.root)
    outer = tmp_path / "outer.tar"
    output("tar", "-S", f"--hole-detection={detection}", "-cf", outer, archive.name, cwd=archive.parent)
    output("tar", "-xf", outer, "-C", tmp_path)
    assert equal(tmp_path / archive.name, library)


STREAMS = {
    "tar": "tar -xpf - -C {to}",
    "bsdtar": "bsdtar -xpf - -C {to}",
    "busybox": "busybox tar -xpf - -C {to}",
    "cpio": "cpio --quiet -idm -H ustar -D {to}",
    "python": f"{sys.executable} -c 'import sys, tarfile; "
    'tarfile.open(fileobj=sys.stdin.buffer, mode="r|").extractall('
    'sys.argv[1], **(dict(filter="fully_trusted") if hasattr(tarfile, "data_filter") else dict()))\' {to}',
}


@pytest.mark.parametrize(
    "program",
    [pytest.param(name, marks=[] if name == "python" else pytest.mark.needs(name)) for name in STREAMS],
)
def test_stream_readers(booklet, mount, tmp_path, program):
    """Extracted from a pipe, where nobody can seek, the tree is the recorded one."""
    archive, to = mount(booklet.root), tmp_path / "to"
    to.mkdir()
    assert output("sh", "-c", f"cat {archive} | {STREAMS[program].format(to=to)}") == b""

    def without_times(root: dict) -> dict:
        return {name: (facts.kind, facts.mode, facts.content) for name, facts in root.items()}

    assert without_times(snapshot(to / "tree")) == without_times(recorded(booklet.root))


# Python's ways to read a file.


def by_seek(path: Path, expected: bytes, copy: Path) -> None:
    with open(path, "rb") as file:
        assert file.seek(0, os.SEEK_END) == len(expected)
        file.seek(-len(expected) // 2, os.SEEK_END)
        second = file.read()
        file.seek(0)
        copy.write_bytes(file.read(len(expected) - len(second)) + second)


def by_lines(path: Path, expected: bytes, copy: Path) -> None:
    with open(path, "rb") as file, open(copy, "wb") as to:
        to.writelines(file)


def unbuffered(path: Path, expected: bytes, copy: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        copy.write_bytes(b"".join(iter(lambda: file.read(100_003), b"")))


def by_copyfile(path: Path, expected: bytes, copy: Path) -> None:
    shutil.copyfile(path, copy)


def by_sendfile(path: Path, expected: bytes, copy: Path) -> None:
    with open(path, "rb") as file, open(copy, "wb") as to:
        done = 0
        while count := os.sendfile(to.fileno(), file.fileno(), done, 1_000_001):
            done += count


def by_copy_file_range(path: Path, expected: bytes, copy: Path) -> None:
    """As far as the kernel does it: between file systems of two kinds it mostly refuses, and programs then read."""
    with open(path, "rb") as file, open(copy, "wb", buffering=0) as to:
        try:
            while os.copy_file_range(file.fileno(), to.fileno(), 10 * MIB):
                pass
        except OSError as error:
            assert error.errno == errno.EXDEV
            to.write(file.read())


def by_splice(path: Path, expected: bytes, copy: Path) -> None:
    out, into = os.pipe()
    with open(path, "rb") as file, open(copy, "wb") as to:
        while count := os.splice(file.fileno(), into, 65_536):
            while count:
                count -= os.splice(out, to.fileno(), count)
    os.close(out)
    os.close(into)


def by_preadv(path: Path, expected: bytes, copy: Path) -> None:
    with open(path, "rb") as file, open(copy, "wb") as to:
        buffers = [bytearray(size) for size in (1, 511, 4096, 300_000)]
        done = 0
        while count := os.preadv(file.fileno(), buffers, done):
            to.write(b"".join(buffers)[:count])
            done += count


@pytest.mark.long(but=4)
@pytest.mark.parametrize("option", ["--direct", None], ids=["direct", "cached"])
@pytest.mark.parametrize(
    "way", [by_seek, by_lines, unbuffered, by_copyfile, by_sendfile, by_copy_file_range, by_splice, by_preadv]
)
def test_python_reads(library, mount, tmp_path, way, option):
    """Whichever system call carries them, the bytes are the archive's."""
    archive, copy = mount(library.root, *filter(None, [option])), tmp_path / "copy"
    way(archive, library.data, copy)
    assert equal(copy, library)


def test_memory_mapped(library, mount):
    """The archive can be mapped, shared and privately, and read at any place."""
    some = random.Random(4)
    with open(mount(library.root), "rb") as file:
        for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            with mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ) as mapped:
                for _ in range(300):
                    start = some.randrange(len(library.data))
                    assert mapped[start : start + 5000] == library.data[start : start + 5000]
                assert hashlib.sha256(mapped).digest() == hashlib.sha256(library.data).digest()


def test_memory_mapped_without_cache(library, mount):
    """With `--direct` a mapping is refused, or right."""
    with open(mount(library.root), "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError:
            return
        with mapped:
            assert hashlib.sha256(mapped).digest() == hashlib.sha256(library.data).digest()


# Many reads.

READS, THREADS, LARGEST = 100_000, 8, 64 << 10


def random_reads(expected: Recorded, seed: int, count: int) -> list[tuple[int, int]]:
    """(offset, size): a third anywhere, a third that start or end at a boundary or next to it, a third around one."""
    some = random.Random(seed)
    reads = []
    for at in range(count):
        size = some.choice((some.randint(1, LARGEST), some.randint(1, 1100)))
        match at % 3:
            case 0:
                offset = some.randrange(len(expected.data))
            case 1:
                offset = some.choice(expected.boundaries) + some.randint(-1, 1) - some.choice((0, size))
            case _:
                offset = some.choice(expected.boundaries) - some.randrange(size)
        reads.append((max(0, offset), size))
    return reads


@pytest.mark.long
@pytest.mark.parametrize("shared", [True, False], ids=["one descriptor", "a descriptor each"])
def test_random_reads(library, mount, shared):
    """Of 100,000 random reads from 8 threads, half with one descriptor and half with one each, none is wrong."""
    path = mount(library.root)
    descriptors = [os.open(path, os.O_RDONLY) for _ in range(1 if shared else THREADS)]

    def read(thread: int) -> list[tuple[int, int]]:
        descriptor, data = descriptors[thread % len(descriptors)], library.data
        return [
            (offset, size)
            for offset, size in random_reads(library, thread, READS // 2 // THREADS)
            if os.pread(descriptor, size, offset) != data[offset : offset + size]
        ]

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            assert [wrong for found in pool.map(read, range(THREADS)) for wrong in found] == []
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.parametrize("option", ["--direct", None], ids=["direct", "cached"])
def test_several_sequential_readers(library, mount, option):
    """Readers that start at different offsets and go on to the end, all at once, each get what they should."""
    path = mount(library.root, *filter(None, [option]))
    some = random.Random(11)
    starts = [0, 1, 512, some.choice(library.boundaries) + 1, *(some.randrange(len(library.data)) for _ in range(4))]

    def read(start: int) -> bool:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while data := file.read(some.choice((4096, 65_536, 131_072, 1_000_000))):
                digest.update(data)
        return digest.digest() == hashlib.sha256(memoryview(library.data)[start:]).digest()

    with ThreadPoolExecutor(len(starts)) as pool:
        assert list(pool.map(read, starts)) == [True] * len(starts)


def test_several_programs_at_once(library, mount, tmp_path):
    """The same from processes of their own."""
    path = mount(library.root)
    starts = [1, 513, len(library.data) // 3, len(library.data) // 2, len(library.data) - 5000]
    tails = [
        subprocess.Popen(["sh", "-c", 'tail -c "+$1" "$2" > "$3"', "sh", str(start + 1), path, tmp_path / str(start)])
        for start in starts
    ]
    assert [tail.wait(60) for tail in tails] == [0] * len(tails)
    for start in starts:
        assert (tmp_path / str(start)).read_bytes() == library.data[start:]
