"""What to install, on the distribution that os-release(5) tells of."""

import platform

import pytest

from tartapefs.base.distribution import install_fuse


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ({"ID": "debian"}, "apt install fuse3"),
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, "apt install fuse3"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "dnf install fuse3"),
        ({"ID": "manjaro", "ID_LIKE": "arch"}, "pacman -S fuse3"),
        ({"ID": "alpine"}, "apk add fuse3"),
        ({"ID": "opensuse-leap", "ID_LIKE": "suse opensuse"}, "zypper install fuse3"),
    ],
)
def test_known_ones(monkeypatch: pytest.MonkeyPatch, release: dict[str, str], command: str) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    assert install_fuse() == command


def test_an_unknown_one_gets_all_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> dict[str, str]:
        raise FileNotFoundError

    monkeypatch.setattr(platform, "freedesktop_os_release", unknown)
    for command in ("apt install fuse3", "dnf install fuse3", "pacman -S fuse3", "apk add fuse3"):
        assert command in install_fuse()
