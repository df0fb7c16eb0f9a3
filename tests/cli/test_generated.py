"""The man page and the shells' completions are made from the parser, and know every command."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.process import environment
from xenmapcache.cli.parser import make_parser

ROOT = Path(__file__).parents[2]
MAKEFILE = ROOT / "Makefile"
COMMANDS = (
    "info",
    "read",
    "translate",
    "find",
    "strings",
    "dump",
    "diff",
    "mount",
    "disk",
    "drgn",
    "volatility",
    "qemu-log",
    "events",
    "timeline",
    "holders",
    "ps",
    "leases",
    "top",
    "demo",
    "doctor",
)


def generate(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=True,
    ).stdout


def test_the_man_page_has_every_command(tmp_path: Path) -> None:
    """argparse-manpage makes it, with options, examples and exit statuses."""
    pytest.importorskip("argparse_manpage", reason="argparse-manpage is not installed")
    page = tmp_path / "xenmapcache.1"
    generate(
        *("-c", "from argparse_manpage.cli import main; main()"),
        *("--module", "xenmapcache.cli.parser", "--function", "make_parser"),
        *("--project-name", "xenmapcache", "--output", str(page)),
    )
    text = page.read_text()
    for command in COMMANDS:
        plain = text.replace("\\-", "-").replace("\\fI\\,", "").replace("\\/\\fR", "")
        assert f"xenmapcache {command}" in plain
    assert "exit status" in text
    assert "\\-\\-fill" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_has_every_command(shell: str, tmp_path: Path) -> None:
    """It is shtab that makes it; bash and zsh, where they are, read it without complaint."""
    pytest.importorskip("shtab", reason="shtab is not installed")
    script = generate("-m", "shtab", "xenmapcache.cli.parser.make_parser", "--shell", shell)
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", script)
    assert "fill" in script
    if shell == "bash":
        file = tmp_path / "completion"
        file.write_text(script)
        ask = (
            f"source {file}; COMP_WORDS=(xenmapcache str); COMP_CWORD=1; "
            "_shtab_xenmapcache; echo ${COMPREPLY[@]}"
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("strings\n", "")


def test_every_command_is_tested_here() -> None:
    """The list above is the parser's."""
    (action,) = (each for each in make_parser()._actions if each.choices)
    assert action.choices is not None
    assert tuple(action.choices) == COMMANDS


@pytest.mark.skipif(not MAKEFILE.is_file(), reason=f"no file {MAKEFILE}")
def test_the_makefile_generates_them() -> None:
    """Make knows both, with the same words as here."""
    text = MAKEFILE.read_text()
    assert "argparse-manpage --module xenmapcache.cli.parser --function make_parser" in text
    assert "shtab xenmapcache.cli.parser.make_parser --shell" in text


def test_a_command_imports_no_other() -> None:
    """A start takes what the command itself needs; all commands together take twice as long."""
    code = (
        "import sys\n"
        "from xenmapcache_command import main\n"
        "status = main()\n"
        "print(sorted(name for name in sys.modules if name.startswith('xenmapcache.cli.')))\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info", "mock:1M", "--json"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=True,
    )
    imported = {name.rpartition(".")[2] for name in ast.literal_eval(done.stdout.splitlines()[-1])}
    assert imported & {name.replace("-", "_") for name in COMMANDS} == {"info"}
