"""What the page on encryption needs beside the other pages: a password, a crypt remote, keys of gpg."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from support.cookbook import Kitchen


@contextmanager
def secrets(kitchen: Kitchen) -> Iterator[None]:
    """The crypt remote is in the kitchen's folder `far`. Ends gpg's agent, unmounts what gocryptfs left."""
    (kitchen.folder / "work" / "pass").write_text("a password\n")
    obscured = subprocess.run(["rclone", "obscure", "other"], check=True, capture_output=True, text=True).stdout.strip()
    settings = {"TYPE": "crypt", "REMOTE": f"{kitchen.folder}/far", "PASSWORD": obscured}
    kitchen.environment |= {f"RCLONE_CONFIG_SECRET_{name}": value for name, value in settings.items()}
    kitchen.environment["GNUPGHOME"] = str(kitchen.folder / "gnupg")
    (kitchen.folder / "gnupg").mkdir(mode=0o700)
    yield
    subprocess.run(["gpgconf", "--kill", "all"], env=kitchen.environment, check=True)
    for place in (kitchen.folder / "mnt" / "tape-encrypted", kitchen.folder / "work" / "decrypted"):
        if os.path.ismount(place):
            subprocess.run(["fusermount3", "-u", place], check=True)
