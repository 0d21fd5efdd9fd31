"""Readers that use io_uring, on archives mounted by libfuse 2 and 3, direct and through the page cache."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.filesystems import loop
from support.programs import run
from support.reference import Reference

pytestmark = [pytest.mark.wild, pytest.mark.fuse, pytest.mark.needs("gcc", "fio", "node")]

# Copies FILE to standard output by reads of SIZE bytes, until one gives none. Each says where it reads, or, if HOW is
# "position", reads where the descriptor stands. Ends with 3 when it has more than LIMIT bytes.
CLIENT = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) { /* FILE SIZE HOW FLAGS LIMIT */
    size_t size = atol(argv[2]);
    int at_position = !strcmp(argv[3], "position");
    int fd = open(argv[1], O_RDONLY | (strcmp(argv[4], "O_DIRECT") ? 0 : O_DIRECT));
    long long offset = 0, limit = atoll(argv[5]);
    struct io_uring ring;
    struct io_uring_cqe *done;
    void *buffer;
    if (fd < 0 || io_uring_queue_init(8, &ring, 0) || posix_memalign(&buffer, 4096, size)) return 2;
    for (;;) {
        io_uring_prep_read(io_uring_get_sqe(&ring), fd, buffer, size, at_position ? -1 : offset);
        if (io_uring_submit(&ring) != 1 || io_uring_wait_cqe(&ring, &done)) return 2;
        int result = done->res;
        io_uring_cqe_seen(&ring, done);
        if (result <= 0) return result < 0;
        if (write(1, buffer, result) != result) return 2;
        if ((offset += result) > limit) return 3;
    }
}
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    (folder / "uring.c").write_text(CLIENT)
    subprocess.run(["gcc", "-O", "-o", folder / "uring", folder / "uring.c", "-luring"], check=True)
    return folder / "uring"


@pytest.fixture(params=["fusepy", "mfusepy"])
def binding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARTAPEFS_BINDING", request.param)


def copied(client: Path, file: Path, size: int, how: str, flags: str) -> bytes | None:
    """What the client copies; None if that does not end."""
    command = [client, file, str(size), how, flags, str(2 * file.stat().st_size)]
    result = subprocess.run(command, capture_output=True, timeout=60)
    assert result.returncode in (0, 3)
    return result.stdout if result.returncode == 0 else None


@pytest.mark.usefixtures("binding")
@pytest.mark.parametrize("options", [("--direct",), ()], ids=["direct", "cached"])
def test_each_reader_gets_the_archive(
    tree: Path, mount: Callable[..., Path], client: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Reads across its end, too, where the kernel repeats those that gave less than they asked for."""
    assert run("record", tree).returncode == 0
    reference = Reference(tree)
    expected = reference.read(0, reference.size)
    archive = mount(tree, *options)
    for size in (4096, 65536, 200_000, 1 << 22):
        for flags in ("", "O_DIRECT"):
            assert copied(client, archive, size, "offset", flags) == expected, (size, flags)
    fio = ["fio", "--name=read", "--readonly", "--ioengine=io_uring", "--rw=read", "--bs=512", "--iodepth=16"]
    fio += ["--allow_file_create=0", "--output-format=json", f"--filename={archive}"]
    result = subprocess.run(fio, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["jobs"][0]["read"]["io_bytes"] == reference.size
    if not options:
        for size in (4096, 65536, 200_000, 1 << 22):
            assert copied(client, archive, size, "position", "") == expected, size
        script = "const fs = require('fs'); fs.createReadStream(process.argv[1]).pipe(process.stdout)"
        environment = {"UV_USE_IO_URING": "1", "PATH": "/usr/local/bin:/usr/bin:/bin"}
        node = subprocess.run(["node", "-e", script, archive], capture_output=True, env=environment, timeout=60)
        assert (node.returncode, node.stdout) == (0, expected)


@pytest.mark.root
@pytest.mark.usefixtures("binding")
def test_positions_advance_where_the_kernel_advances_them(
    tree: Path, mount: Callable[..., Path], client: Path, tmp_path: Path
) -> None:
    """They stand still for reads that end later than they were begun: of a direct mount, and of ext4 with O_DIRECT."""
    assert run("record", tree).returncode == 0
    archive = mount(tree, "--direct")
    expected = archive.read_bytes()
    with loop("ext4", tmp_path) as folder:
        (folder / "file").write_bytes(expected)
        of_ext4 = copied(client, folder / "file", 65536, "position", "O_DIRECT")
        assert of_ext4 in (None, expected)
    assert copied(client, archive, 65536, "position", "") == of_ext4
