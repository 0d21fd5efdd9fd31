"""Option strings of mount(8)."""

import pytest
from click import UsageError

from tartapefs.cli.mount8 import arguments, asks_to_write, exit_code


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", []),
        ("ro", []),
        ("rw,ro", []),
        ("rw,dev,suid", []),
        ("ro,,", []),
        ("name=x.tar,mode=0440,direct", ["--name=x.tar", "--mode=0440", "--direct"]),
        ("allow_other,audit_interval=5", ["--allow-other", "--audit-interval=5"]),
        ("index=/a=b,uid=5,gid=staff", ["--index=/a=b", "--uid=5", "--gid=staff"]),
        (r"name=a\,b\\c", [r"--name=a,b\c"]),
        (r'name="a,b",source_check=mtime', ["--name=a,b", "--source-check=mtime"]),
        ("name=a b\tc\nd#'e", ["--name=a b\tc\nd#'e"]),
        ("name=\udcff\N{SNOWMAN}", ["--name=\udcff\N{SNOWMAN}"]),
        ("nofail,_netdev,user,noauto,x-systemd.automount,x-foo=1,X-bar,comment=c,defaults,dev,suid,relatime", []),
        ("audit_share=7,log=/l", ["--audit-share=7", "--log=/l"]),
        ("name={root}.tar,on_drift=hold", ["--name={root}.tar", "--on-drift=hold"]),
        ('on_drift_run="echo a, b"', ["--on-drift-run=echo a, b"]),
    ],
)
def test_option_strings(options: str, told: list[str]) -> None:
    assert list(arguments(options)) == told


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("ro,colour=red", "colour"),
        ("nam=x", "nam"),
        ("name", "name"),
        ("direct=1", "direct"),
        ("record", "record"),
        ("foreground", "foreground"),
        ("exclude=*", "exclude"),
        ("remount", "remount"),
        ("allow-other", "allow-other"),
        ('name="x', "quotation"),
    ],
)
def test_refused_option_strings(options: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        list(arguments(options))


def test_sloppy_passes_over_what_is_unknown_alone() -> None:
    assert list(arguments("ro,colour=red,name=x", sloppy=True)) == ["--name=x"]


@pytest.mark.parametrize(
    ("options", "asks"),
    [("", False), ("ro", False), ("rw", True), ("rw,ro", False), ("ro,cached,rw", True), ("name=rw", False)],
)
def test_the_last_of_ro_and_rw_counts(options: str, asks: bool) -> None:
    assert asks_to_write(options) is asks


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (None, 0), (1, 32), (2, 1), (3, 32), (5, 32), (130, 8)])
def test_exit_codes_are_those_of_mount8(code: object, expected: int) -> None:
    assert exit_code(code) == expected
