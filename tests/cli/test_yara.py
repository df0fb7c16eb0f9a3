"""``find --yara``: rules from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from xenmapcache import MockHypervisor, open_backend, write_lime
from xenmapcache.cli import main

RULES = """
rule secrets : important {
    strings:
        $key = "BEGIN PRIVATE KEY"
        $token = { 74 6f 6b ?? 6e }
    condition:
        any of them
}
rule slow { strings: $a = "a" condition: $a }
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a guest's memory and rules, which is the working folder."""
    pytest.importorskip("yara", reason="yara-python is not installed")
    guest = MockHypervisor().create_domain(memory="1M")
    guest.write(0x1000, b"-----BEGIN PRIVATE KEY-----")
    guest.write(0x20000, b"tok\x1bn")
    with open_backend("mock", domain=guest) as backend:
        write_lime(backend, tmp_path / "guest.lime")
    (tmp_path / "rules.yar").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_match_is_a_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the rule and the string that found it; what was found is escaped."""
    assert main(["find", "guest.lime", "--yara", "rules.yar"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0x00001005  secrets $key  BEGIN PRIVATE KEY",
        "0x00020000  secrets $token  tok\\x1bn",
    ]


def test_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An object has the rule, the string and the rule's tags."""
    assert main(["find", "guest.lime", "--yara", "rules.yar", "--json", "-m", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "address": 0x1005,
        "address_hex": "0x1005",
        "length": 17,
        "text": "BEGIN PRIVATE KEY",
        "hex": b"BEGIN PRIVATE KEY".hex(),
        "rule": "secrets",
        "string": "$key",
        "tags": ["important"],
    }


def test_other_options(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A range, the number of matches and a hexdump are as of other patterns."""
    assert main(["find", "guest.lime", "--yara", "rules.yar", "--count"]) == 0
    assert main(["find", "guest.lime", "--yara", "rules.yar", "--start", "0x30000"]) == 1
    assert main(["find", "guest.lime", "--yara", "rules.yar", "--context", "0", "-m", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2",
        "00001000  2d 2d 2d 2d 2d 42 45 47  49 4e 20 50 52 49 56 41  |-----BEGIN PRIVA|",
        "00001010  54 45 20 4b 45 59 2d 2d  2d 2d 2d 00 00 00 00 00  |TE KEY-----.....|",
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["absent.yar"], "absent.yar: No such file or directory"),
        (["bad.yar"], "bad.yar: YARA cannot compile the rules: bad.yar(1): "),
        (["."], ".: Is a directory"),
        (["rules.yar", "-i"], "--ignore-case: write nocase after the strings of the rules"),
    ],
)
def test_errors(
    files: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the file."""
    (files / "bad.yar").write_text("rule x { nothing }\n")
    assert main(["find", "guest.lime", "--yara", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"xenmapcache: error: {complaint}")


def test_yara_fails(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """During the scan: that is an error of one line, too."""
    import yara

    class Rules:
        def match(self, **_: object) -> list[object]:
            raise yara.TimeoutError("scanning timed out")

    monkeypatch.setattr(yara, "Rules", Rules)
    monkeypatch.setattr(yara, "compile", lambda filepath: Rules())
    assert main(["find", "guest.lime", "--yara", "rules.yar"]) == 2
    expected = "xenmapcache: error: rules.yar: YARA failed: scanning timed out\n"
    assert capsys.readouterr().err == expected


def test_without_yara(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "yara", None)
    assert main(["find", "mock:1M", "--yara", "rules.yar"]) == 2
    assert "pip install yara-python, or 'xenmapcache[yara]'" in capsys.readouterr().err
