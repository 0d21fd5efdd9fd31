"""Parts as they should be, and programs that send those of a mount, with what they say that they sent."""

import json
import os
import re
import subprocess
from pathlib import Path


def cut(archive: bytes, size: int) -> dict[str, bytes]:
    """The parts of an archive, by their names."""
    numbered = enumerate(range(0, len(archive), size), 1)
    return {f"archive.tar.{number:05}": archive[start : start + size] for number, start in numbered}


def copy_by_rclone(folder: Path, *arguments: object) -> tuple[list[str], int]:
    """Names and bytes that `rclone copy` sent, by its own log."""
    command = ["rclone", "copy", "--config=/dev/null", "-v", "--use-json-log", folder, *arguments]
    result = subprocess.run([*map(os.fspath, command)], check=True, capture_output=True, text=True)  # type: ignore[call-overload]
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    names = sorted(line["object"] for line in lines if line["msg"].startswith("Copied"))
    return names, max((line["stats"]["bytes"] for line in lines if "stats" in line), default=0)


def copy_by_rsync(folder: Path, *arguments: object) -> tuple[list[str], int]:
    """As `copy_by_rclone`, for `rsync -a`; bytes of the files that it sent."""
    command = ["rsync", "-a", "--stats", "--out-format=%n", f"{folder}/", *arguments]
    said = subprocess.run([*map(os.fspath, command)], check=True, capture_output=True, text=True).stdout  # type: ignore[call-overload]
    (sent,) = re.findall(r"^Total transferred file size: ([\d,]+)", said, re.MULTILINE)
    return sorted(re.findall(r"^archive\.tar\.\d+$", said, re.MULTILINE)), int(sent.replace(",", ""))
