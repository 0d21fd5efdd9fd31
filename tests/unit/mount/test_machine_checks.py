"""Checks of the machine that read what the kernel tells; the others break a machine of their own (test_doctor)."""

from pathlib import Path

import pytest

from tartapefs.mount import machine_checks


def found(checks: object) -> dict[str, str]:
    """The finding of each check; each has a remedy."""
    findings = list(checks)  # type: ignore[call-overload]
    assert all(finding.status == "warning" and finding.remedy for finding in findings)
    return {finding.check: f"{finding.found}; {finding.remedy}" for finding in findings}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what the kernel tells: the limits on FUSE, `current` and `profiles` of AppArmor."""
    monkeypatch.setattr(machine_checks, "_SYSCTLS", str(tmp_path))
    monkeypatch.setattr(machine_checks, "_OWN_PROFILE", str(tmp_path / "current"))
    monkeypatch.setattr(machine_checks, "_PROFILES", str(tmp_path / "profiles"))
    return tmp_path


def test_an_older_kernel_without_limits_and_apparmor(kernel: Path) -> None:
    assert found(machine_checks._limits()) == found(machine_checks._confinement()) == {}


@pytest.mark.parametrize(
    ("name", "usual", "bad"),
    [("max_pages_limit", 256, 32), ("default_request_timeout", 0, 60), ("max_request_timeout", 0, 600)],
)
def test_a_limit(kernel: Path, name: str, usual: int, bad: int) -> None:
    (kernel / name).write_text(f"{usual}\n")
    assert found(machine_checks._limits()) == {}
    (kernel / name).write_text(f"{bad}\n")
    (text,) = found(machine_checks._limits()).values()
    assert f" {bad} " in text and f"sysctl fs.fuse.{name}={usual}" in text


@pytest.mark.parametrize("profile", ["unconfined\n", "docker-default (complain)\n", ""])
def test_a_profile_that_forbids_nothing(kernel: Path, profile: str) -> None:
    (kernel / "current").write_text(profile)
    (kernel / "profiles").write_text("/usr/sbin/named (enforce)\nfusermount3 (complain)\n")
    assert found(machine_checks._confinement()) == {}


def test_a_profile_of_this_process(kernel: Path) -> None:
    (kernel / "current").write_text("docker-default (enforce)\n")
    assert "docker-default may forbid" in found(machine_checks._confinement())["AppArmor"]


@pytest.mark.parametrize("name", ["fusermount3", "/usr/bin/fusermount3"])
def test_a_profile_of_fusermount3(kernel: Path, name: str) -> None:
    (kernel / "profiles").write_text(f"/usr/sbin/named (enforce)\n{name} (enforce)\n")
    assert "/etc/apparmor.d/local/fusermount3" in found(machine_checks._confinement())["AppArmor"]
