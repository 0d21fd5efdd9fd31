"""What commands share: parsing of options, sizes for people, progress on a terminal."""

import logging
import sys

import click
import pytest

from tartapefs.cli import common
from tartapefs.mount import sd_notify


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("512", 512),
        ("007", 7),
        ("1K", 1 << 10),
        ("1k", 1 << 10),
        ("5gib", 5 << 30),
        ("64KiB", 1 << 16),
        ("3M", 3 << 20),
        ("2G", 2 << 30),
        ("1TiB", 1 << 40),
        ("8191P", 8191 << 50),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_a_number_of_bytes(text: str, count: int) -> None:
    assert common.byte_count(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "-1", "+1", "1.5", "1e3", "0x10", "K", "1iB", "1KB", "1ki", " 1", "1\n", "٣", "8192P", "9" * 5000],
)
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(click.BadParameter):
        common.byte_count(text)


@pytest.mark.parametrize(("text", "mode"), [("0", 0), ("0440", 0o440), ("777", 0o777), ("000644", 0o644)])
def test_a_mode(text: str, mode: int) -> None:
    assert common.octal_mode(text) == mode


@pytest.mark.parametrize("text", ["", "8", "0o440", "1000", "-1", "u+r", "٤"])
def test_what_is_no_mode(text: str) -> None:
    with pytest.raises(click.BadParameter):
        common.octal_mode(text)


@pytest.mark.parametrize("text", ["nan", "-1", "101", "x", ""])
def test_a_number_out_of_its_range(text: str) -> None:
    with pytest.raises(click.BadParameter):
        common.Number(0, 100).convert(text, None, None)
    assert common.Number(0, 100).convert("1e1", None, None) == 10


def test_a_template_of_a_name() -> None:
    assert common.name_template("{root}-{fingerprint}.tar") == "{root}-{fingerprint}.tar"
    for text in ("", "a/b", "{none}", "..", "x" * 256):
        with pytest.raises(click.BadParameter):
            common.name_template(text)


@pytest.mark.parametrize(
    ("end", "said"), [(KeyboardInterrupt(), True), (SystemExit(143), True), (SystemExit(1), False), (OSError(), False)]
)
def test_an_interruption_says_what_to_do_next(
    capsys: pytest.CaptureFixture[str], end: BaseException, said: bool
) -> None:
    with pytest.raises(type(end)), common.interruptible("run it again"):
        raise end
    assert capsys.readouterr().err == ("tartapefs: run it again\n" if said else "")


@pytest.mark.parametrize("in_journal", [False, True])
def test_a_message_has_its_level_in_the_journal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_journal: bool
) -> None:
    monkeypatch.setattr(sd_notify, "to_journal", lambda: in_journal)
    common.say("it went wrong", logging.ERROR)
    assert capsys.readouterr() == ("", "<3>it went wrong\n" if in_journal else "tartapefs: it went wrong\n")


def test_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, shown in (
        ("https://host/a.tar", "\"tartapefs extract 'my data' https://host/a.tar name\""),
        ("https://host/a.tar?X-Amz-Signature=secret", "the same command"),
    ):
        monkeypatch.setattr(sys, "argv", ["tartapefs", "extract", "my data", url, "name"])
        assert common.again() == shown
