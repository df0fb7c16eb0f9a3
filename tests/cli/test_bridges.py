"""The commands ``drgn`` and ``volatility``: other programs on a guest's memory."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import MODULE, environment
from tests.images import linux_guest
from xenmapcache import open_backend, write_lime
from xenmapcache.cli import main

SCRIPT = """
import sys
print(sys.argv[1:], prog["UTS_RELEASE"].string_().decode())
sys.exit(3)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a guest's memory; a command's changes to `sys` are undone."""
    guest = linux_guest.create()
    guest.write(linux_guest.BANNER_AT, linux_guest.BANNER + b"\0")
    with open_backend("mock", domain=guest) as backend:
        write_lime(backend, tmp_path / "guest.lime")
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def drgn(folder: Path) -> None:
    pytest.importorskip("drgn", reason="drgn is not installed")


@pytest.fixture
def volatility(folder: Path) -> None:
    pytest.importorskip("volatility3", reason="volatility3 is not installed")


Stdin = Callable[[str], None]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Stdin:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_drgn_runs_a_script(drgn: None, capsys: pytest.CaptureFixture[str]) -> None:
    """With its arguments and the program; its exit status is the command's."""
    with pytest.raises(SystemExit) as exit_:
        main(["drgn", "guest.lime", "script.py", "--all", "-s", "x"])
    assert exit_.value.code == 3
    assert capsys.readouterr().out == f"['--all', '-s', 'x'] {linux_guest.RELEASE}\n"


def test_drgn_reads_a_script_from_stdin(
    drgn: None, stdin: Stdin, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has drgn's usual names."""
    stdin("print(prog.read(0x481000, 13, physical=True), sizeof, __file__)")
    assert main(["drgn", "guest.lime"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("b'Linux version' <built-in function sizeof> <stdin>")


def test_drgn_on_a_terminal(drgn: None, stdin: Stdin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompt is for people."""
    shown: list[Any] = []
    monkeypatch.setattr("drgn.cli.run_interactive", shown.append)
    stdin("")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["drgn", "guest.lime"]) == 0
    assert shown[0]["UTS_RELEASE"].string_().decode() == linux_guest.RELEASE


def test_a_script_that_raises(
    drgn: None, folder: Path, stdin: Stdin, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its author sees the traceback, of OSError, too; the status is 1."""
    (folder / "raises.py").write_text("import helper")
    (folder / "helper.py").write_text("open('absent')")
    assert main(["drgn", "--physical", "guest.lime", "raises.py"]) == 1
    err = capsys.readouterr().err
    assert 'helper.py", line 1' in err
    assert "FileNotFoundError" in err
    stdin("raise BrokenPipeError")
    assert main(["drgn", "--physical", "guest.lime"]) == 141


def test_drgn_without_a_kernel(
    drgn: None, stdin: Stdin, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Physical addresses are read; nothing is looked for, or a warning is logged."""
    code = "print(prog.read(0, 4, physical=True))"
    for options, warnings in ((["--physical"], 0), (["--length", "1M"], 1)):
        stdin(code)
        assert main(["drgn", *options, "mock:4M"]) == 0
        assert capsys.readouterr().out == "b'\\x00\\x00\\x00\\x00'\n"
        assert len(caplog.records) == warnings


def test_missing_symbols_are_a_warning(
    drgn: None, stdin: Stdin, caplog: pytest.LogCaptureFixture
) -> None:
    """As in drgn's own command. A file of symbols that cannot be read is one as well."""
    stdin("")
    assert main(["drgn", "--symbols", "absent.debug", "guest.lime"]) == 0
    assert [record.levelname for record in caplog.records if record.name == "xenmapcache"] == [
        "WARNING"
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["guest.lime", "absent.py"], "absent.py is not a file; give a Python script for drgn"),
        (["absent.lime"], "absent.lime: No such file or directory"),
    ],
)
def test_errors_of_drgn(
    drgn: None, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are one line."""
    assert main(["drgn", *arguments]) == 2
    assert capsys.readouterr().err == f"xenmapcache: error: {complaint}\n"


def banners(*arguments: str) -> Iterator[str]:
    """Run Volatility in a process of its own, as it changes settings; yield its lines."""
    command = [*MODULE, "volatility", *arguments, "-q", "banners.Banners"]
    command[command.index("-W") : command.index("-W") + 2] = []  # not ours
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    yield from (line for line in done.stdout.splitlines() if line.startswith("0x"))


@pytest.mark.slow
def test_volatility_runs_a_plug_in(volatility: None) -> None:
    """All arguments after the source are Volatility's."""
    assert list(banners("guest.lime", "--offline")) == [
        f"0x481000\t{linux_guest.BANNER.decode().strip()}"
    ]


def test_volatility_in_this_process(
    volatility: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gets a location, and then the arguments."""
    import volatility3.cli

    seen: list[list[str]] = []
    monkeypatch.setattr(volatility3.cli, "main", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(volatility3.cli.CommandLine, "CLI_NAME", "vol")
    assert main(["volatility", "--zeros", "guest.lime", "-q", "--x", "y"]) == 0
    location = "xenmapcache:///?source=guest.lime&salvage=0&zeros=1"
    assert seen == [["volatility", "--single-location", location, "-q", "--x", "y"]]


@pytest.mark.parametrize(("command", "package"), [("drgn", "drgn"), ("volatility", "volatility3")])
def test_packages_that_are_missing(
    command: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.cli", raising=False)
    assert main([command, "mock:4M"]) == 2
    assert f"pip install {package}, or 'xenmapcache[{command}]'" in capsys.readouterr().err
