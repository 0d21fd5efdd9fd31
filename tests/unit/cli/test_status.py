"""Reports of mounts as text."""

import json

import pytest
from click.testing import CliRunner

from tartapefs.cli import status as module
from tartapefs.cli.status import bar
from tartapefs.mount import mount_table


@pytest.mark.parametrize(
    ("ranges", "cells"),
    [
        ([], "..........."),
        ([[0, 1000]], "###########"),
        ([[0, 1]], "+.........."),
        ([[999, 1000]], "..........+"),
        ([[0, 90], [91, 1000]], "#+#########"),
        ([[10, 20], [30, 40], [500, 510]], "+....+....."),
        ([[50, 600]], "+#####+...."),
    ],
)
def test_the_bar(ranges: list[list[int]], cells: str) -> None:
    assert bar(ranges, 1000, cells=11) == cells


DOCUMENT = {
    "mountpoint": "/mnt/tape",
    "owner": 0,
    "source": "/srv/data",
    "state": "valid",
    "size": 1000,
    "delivered": 1500,
    "coverage": {"size": 250, "unsure": 0, "ranges": [[0, 200], [300, 350]]},
    "position": 350,
    "member": "data/a",
    "rate": 2048,
    "readers": [
        {"pid": 7, "command": "cp", "position": 350, "member": "data/a", "rate": 2048, "seconds_left": 61.4},
        {"pid": 0, "command": None, "position": 0, "member": None, "rate": 0, "seconds_left": None},
    ],
    "held": [{"pid": 7, "command": "cp", "position": 350, "size": 50, "member": "data/a", "seconds": 3601.0}],
    "scrub": {"position": 100, "passes": 2},
}


def test_a_report_has_a_line_for_each_fact() -> None:
    lines = {line[:15].strip(): line[15:] for line in module._text(DOCUMENT, None)}
    assert lines == {
        "mountpoint": "/mnt/tape",
        "owner": "0",
        "source": "/srv/data",
        "state": "valid",
        "size": "1000 (1000 B)",
        "delivered": "1500 (1.5 KiB)",
        "coverage": "##########.....##+................................ 25.0 %",
        "ranges": "0-200, 300-350",
        "rate": "2.0 KiB/s",
        "reader 7": "cp at 350 (35.0 %, data/a), 2.0 KiB/s, 0:01:01 left",
        "reader ?": "? at 0 (0.0 %, no member), 0 B/s",
        "held 7": "cp at 350 (35.0 %, data/a), for 1:00:01",
        "scrub": "at 100 (10.0 %), 2 times to the end",
    }


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_report_is_laid_out_for_the_terminal(columns: int) -> None:
    """With all that it has elsewhere; only the bar is as long as there is room."""
    facts = DOCUMENT | {"fingerprint": "0123456789abcdef" * 4, "source": "/srv/a folder with a long name/" * 3}
    lines = module._text(facts, columns)
    assert max(map(len, lines)) <= columns
    texts: list[str] = []
    for line in lines:
        texts += [line] if line[0] != " " else [texts.pop() + line.strip()]
    expected = [line.replace(" ", "") for line in module._text(facts, None) if not line.startswith("coverage")]
    assert [text.replace(" ", "") for text in texts if not text.startswith("coverage")] == expected
    (bar,) = [line for line in lines if line.startswith("coverage")]
    assert bar.endswith(". 25.0 %") and columns - 2 <= len(bar) <= columns
    assert all(len(line) <= columns for line in module._text([facts] * 3, columns))


def test_many_ranges_are_counted_and_uncertain_ones_told() -> None:
    ranges = [[10 * at, 10 * at + 5] for at in range(11)]
    text = module._ranges_text({"size": 55, "unsure": 2048, "ranges": ranges})
    assert text.startswith("0-5, 10-15, ") and text.endswith("70-75 and 3 more; up to 2.0 KiB of it were not delivered")
    assert module._ranges_text({"size": 0, "unsure": 0, "ranges": []}) == "none"


def test_a_summary_is_a_line() -> None:
    assert module._summary(DOCUMENT) == (
        "/mnt/tape: /srv/data, valid, 25.0 % of 1000 B delivered, 2 readers, 2.0 KiB/s"
    )
    of_attributes = {"mountpoint": "/mnt/tape", "source": "/srv/data", "state": "valid", "size": 1000, "covered": 500}
    assert module._summary(of_attributes) == "/mnt/tape: /srv/data, valid, 50.0 % of 1000 B delivered"
    unknown = {"mountpoint": "/mnt/a\nb", "source": "/srv/data", "state": "unknown: it hangs"}
    assert module._summary(unknown) == r"/mnt/a\nb: /srv/data, unknown: it hangs"


@pytest.mark.parametrize("key", ["state", "source", "name", "anything"])
def test_a_foreign_daemon_forges_no_line(key: str) -> None:
    (line,) = module._text({key: "a\nstate          valid\x1b[2J"}, None)
    assert line.isprintable()


@pytest.mark.parametrize(("state", "code"), [("valid", 0), ("invalid: data/a: size", 1)])
@pytest.mark.parametrize("arguments", [[], ["/mnt/tape"], ["--json"], ["/mnt/tape", "--json"]], ids=" ".join)
def test_drift_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, arguments: list[str], state: str, code: int) -> None:
    facts = DOCUMENT | {"state": state}
    monkeypatch.setattr(mount_table, "entry_of", lambda mountpoint: mountpoint)
    monkeypatch.setattr(mount_table, "status", lambda entry: facts)
    monkeypatch.setattr(mount_table, "statuses", lambda: [facts])
    result = CliRunner().invoke(module.status, arguments)
    assert result.exit_code == code
    if "--json" in arguments:
        assert json.loads(result.output) == (facts if len(arguments) == 2 else [facts])
    else:
        assert state in result.output


def test_no_archive_is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is unknown is no drift."""
    monkeypatch.setattr(mount_table, "statuses", list)
    assert CliRunner().invoke(module.status).output == "no archive is mounted\n"
    unknown = [{"mountpoint": "/mnt", "source": "/srv", "state": "unknown: it hangs"}]
    monkeypatch.setattr(mount_table, "statuses", lambda: unknown)
    assert CliRunner().invoke(module.status).exit_code == 0
