"""Examples of each command, for its help. A test runs them all, in this order."""

from textwrap import indent

_EXAMPLES = {
    "record": (
        "tartapefs record ./data",
        "tartapefs record ./data --force \\\n  --exclude '*.tmp' --exclude .cache/",
        "tartapefs record ./data --append --dry-run",
        "tartapefs record ./data --append",
    ),
    "info": ("tartapefs info ./data", "tartapefs info ./data --json | jq -r .fingerprint"),
    "ls": ("tartapefs ls ./data",),
    "locate": ("tartapefs locate ./data 4096", "tartapefs locate ./data data/photos/1.bin"),
    "seal": ("tartapefs seal ./data",),
    "mount": (
        "tartapefs mount ./data /mnt/tape",
        "tartapefs mount ./data /mnt/tape \\\n  --allow-additions --on-drift hold",
        "tartapefs mount ./data /mnt/tape \\\n  --mode 0440 --allow-other \\\n  --name '{root}-{fingerprint}.tar'",
    ),
    "status": ("tartapefs status", "tartapefs status /mnt/tape", "tartapefs status /mnt/tape --watch"),
    "unmount": ("tartapefs unmount /mnt/tape",),
    "play": (
        "tartapefs play ./data \\\n  | ssh host 'cat > /backup/archive.tar'",
        "tartapefs play ./data --start 1M --length 64K > part",
        "tartapefs play ./data -o backup.tar",
    ),
    "upload": (
        "tartapefs upload ./data s3://tapes/data.tar",
        "tartapefs upload ./data s3://tapes/data.tar \\\n  --option StorageClass=STANDARD_IA",
        "tartapefs upload ./data sftp://host/backup/ \\\n  --part-size 1GiB --threads 8",
    ),
    "resume": ("tartapefs resume ./data backup.tar",),
    "resume-hint": ("tartapefs resume-hint ./data --have 1M",),
    "extract": (
        "tartapefs extract ./data backup.tar data/photos \\\n  -C restored",
        "tartapefs extract ./data backup.tar 'data/photos/*' \\\n  -C restored --threads 4",
    ),
    "export-index": ("tartapefs export-index ./data \\\n  --ratarmount backup.tar.index.sqlite",),
    "verify": ("tartapefs verify ./data", "tartapefs verify ./data --deep --state verify.state"),
    "check": ("tartapefs check ./data backup.tar --full", "tartapefs play ./data | tartapefs check ./data -"),
    "digest": (
        "tartapefs digest ./data -a sha256 \\\n  | ssh host 'cd /backup && sha256sum -c'",
        "tartapefs digest ./data \\\n  --s3-part-size 64MiB --state digest.state",
    ),
    "verify-extracted": ("tartapefs verify-extracted ./data restored",),
    "diff": ("tartapefs diff before.db ./data",),
    "doctor": ("tartapefs doctor", "tartapefs doctor ./data"),
    "systemd-unit": ("tartapefs systemd-unit ./data /mnt/tape \\\n  -o /etc/systemd/system",),
    "completion": ("tartapefs completion bash \\\n  > ~/.local/share/bash-completion/completions/tartapefs",),
}


def examples(command: str) -> str:
    """What stands below the help of this command; click does not wrap it. It fits into 60 columns."""
    return "\b\nExamples:\n" + indent("\n".join(_EXAMPLES[command]), "  ")
