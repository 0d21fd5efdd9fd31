"""The Linux distribution, for messages that say what to install."""

import platform

# By ID or ID_LIKE of os-release(5). Each has the program fusermount3 and libfuse 3 by this name.
_INSTALL = {
    "debian": "apt install fuse3",
    "fedora": "dnf install fuse3",
    "arch": "pacman -S fuse3",
    "alpine": "apk add fuse3",
    "suse": "zypper install fuse3",
}


def install_fuse() -> str:
    """The command that installs libfuse 3 and fusermount3 on this distribution, or on each if it is unknown."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    for name in (release.get("ID", ""), *release.get("ID_LIKE", "").split()):
        if name in _INSTALL:
            return _INSTALL[name]
    return " or ".join(_INSTALL.values())
