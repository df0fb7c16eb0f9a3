"""The command line itself: help, versions, usage errors, and output that goes away."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import xenmapcache
import xenmapcache_command
from tests.cli.process import MODULE, environment, on_terminal
from xenmapcache.cli import main


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        (["--help"], "xenmapcache doctor --domid 3"),
        (["demo", "--help"], "xenmapcache demo --json"),
        (["doctor", "--help"], "$(xl domid NAME)"),
        (["info", "--help"], "xenmapcache info guest.core"),
        (["read", "--help"], "xenmapcache read guest.core 1MiB -n 4k > page"),
        (["find", "--help"], "xenmapcache find guest.core 'Linux version'"),
        (["strings", "--help"], "xenmapcache strings guest.core | less"),
        (["dump", "--help"], "xenmapcache dump xen:web -o web.vmcore --format vmcore --pause"),
        (["diff", "--help"], "xenmapcache diff before.core after.core"),
        (["drgn", "--help"], "xenmapcache drgn xen:web tasks.py --all"),
        (["volatility", "--help"], "xenmapcache volatility guest.core banners.Banners"),
    ],
)
def test_help_has_examples(
    arguments: list[str], example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--help`` of the program and of each command ends with status 0 and shows examples."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert example in capsys.readouterr().out


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """``--version`` prints the program's name and the package's version."""
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"xenmapcache {xenmapcache.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["cure"], "cure"),
        (["doctor", "--domid", "three"], "three"),
        (["doctor", "--domid", "32752"], "domid 32752 is not in 0..32751"),
        (["demo", "--domid", "1"], "--domid"),
        (["read", "mock:4M", "0x10q"], "'0x10q' is not a size: write 4096, 0x1000, 4k"),
        (["read", "mock:4M", "0", "--fill", "123"], "'123' must be a byte in hex"),
        (["find", "mock:4M", "x", "-m", "0"], "'0' must be a number of at least 1"),
        (["find", "mock:4M", "x", "--hex", "--regex"], "not allowed with argument --hex"),
        (["dump", "mock:4M"], "required: -o/--output"),
        (["strings", "mock:4M", "--encoding", "ebcdic"], "ebcdic"),
    ],
)
def test_wrong_usage_is_status_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong usage ends with status 2, and one line on stderr names what is wrong."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("xenmapcache: error: ")
    assert complaint in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], "xenmapcache"),
        (["cure"], "xenmapcache"),
        (["--colour"], "xenmapcache"),
        (["find", "mock:4M"], "xenmapcache find"),
        (["find", "mock:4M", "x", "--colour", "red"], "xenmapcache find"),
        (["read", "mock:4M", "0", "1", "2"], "xenmapcache read"),
        (["diff", "mock:4M", "mock:4M", "mock:4M"], "xenmapcache diff"),
        (["dump", "mock:4M", "-o"], "xenmapcache dump"),
        (["info", "mock:4M", "--start", "x"], "xenmapcache info"),
    ],
)
def test_wrong_usage_names_the_help_of_the_command(
    arguments: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake in the options of a command is explained by the help of that command."""
    with pytest.raises(SystemExit):
        main(arguments)
    assert capsys.readouterr().err.endswith(f" (see {command} --help)\n")


@pytest.mark.parametrize("command", ["demo", "doctor"])
def test_without_rich_tables_name_the_extra(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where rich is not installed, a command without --json ends with 2 and says how to get it."""
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit) as exit_:
        main([command])
    assert exit_.value.code == 2
    assert "pip install xenmapcache[cli]" in capsys.readouterr().err


def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of the package ends a command with status 2 and one line on stderr."""
    from xenmapcache.cli import demo

    def fail(_: object) -> int:
        raise xenmapcache.FaultError(0xA0000, 8, 22)

    monkeypatch.setattr(demo, "run", fail)
    monkeypatch.setattr("xenmapcache.cli._discard", lambda _: None)
    assert main(["demo", "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("xenmapcache: error: no page at 0xa0000")
    assert printed.err.count("\n") == 1


def test_output_that_is_no_file() -> None:
    """In another program, stdout may be anything that can be written to."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["info", "mock:4M", "--json"]) == 0
    assert json.loads(output.getvalue())["pages"] == 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["demo", "--json"],
        ["doctor"],
        ["info", "mock:4M"],
        ["read", "mock:4M", "0", "4M"],
        ["read", "mock:4M", "0", "--hexdump"],
        ["find", "mock:4M", "--hex", "00", "--max-count", "100000"],
        ["diff", "mock:4M", "mock:8M"],
    ],
)
def test_closed_pipe_ends_quietly(arguments: list[str]) -> None:
    """If the reader closes the pipe, the command ends without a word, as by SIGPIPE."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        run = subprocess.run(
            [*MODULE, *arguments],
            stdout=write_end,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=60,
            check=False,
        )
    finally:
        os.close(write_end)
    assert (run.returncode, run.stderr) == (141, b"")


def test_an_error_obeys_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Line ends and control characters of a file's name are not passed on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xenmapcache.cli._discard", lambda _: None)
        assert main(["info", "no\nsuch\x1b[2J"]) == 2
    complaint = "xenmapcache: error: no such\\x1b[2J: No such file or directory\n"
    assert capsys.readouterr().err == complaint


def test_full_disk_is_an_error_of_one_line() -> None:
    """Output that cannot be written is an error, told once."""
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [*MODULE, "demo", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=60,
            check=False,
        )
    assert (run.returncode, run.stderr.count(b"\n")) == (2, 1)
    assert b"No space left" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["read", "mock:4M", "0"], 0),
        (["strings", "mock:4M"], 1),
        (["dump", "mock:4M", "-o", "{folder}/f"], 0),
        (["diff", "mock:4M", "mock:8M"], 1),
        (["info", "{folder}/absent"], 2),
    ],
)
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_streams(arguments: list[str], status: int, closed: str, tmp_path: Path) -> None:
    """With standard streams closed or full, as in a daemon, a command ends as it does otherwise."""
    run = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *MODULE]
        + [each.format(folder=tmp_path) for each in arguments],
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert run.returncode == status
    assert run.stdout == b"" or ">&-" not in closed.split()
    assert run.stderr.count(b"\n") == (status == 2 and "2>" not in closed)


def test_import_brings_neither_rich_nor_elftools() -> None:
    """Importing the command imports nothing that only its tables and the doctor need."""
    code = (
        "import sys\nbefore = set(sys.modules)\nimport xenmapcache.cli\n"
        "print([name for name in ('rich', 'elftools', 'json', 'xenmapcache.mock')"
        " if name in set(sys.modules) - before])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=True,
    )
    assert run.stdout == "[]\n"


def test_colours_only_on_a_terminal() -> None:
    """The same command writes escape codes to a terminal, and plain ASCII elsewhere."""
    plain = subprocess.run(
        [*MODULE, "demo"], capture_output=True, env=environment(), timeout=60, check=True
    ).stdout
    assert plain.isascii()
    assert b"\x1b" not in plain
    variables = environment(TERM="xterm-256color", NO_COLOR="")
    shown = on_terminal("demo", environment=variables).terminal
    assert b"\x1b[" in shown
    assert b"LOST" in shown


def test_importing_it_runs_nothing() -> None:
    """``xenmapcache.__main__`` is a program only where it is run."""
    assert importlib.import_module("xenmapcache.__main__").main is xenmapcache_command.main


def test_without_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no stdout at all, as in a daemon, the status still tells."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["info", "--json", "mock:1M"]) == 0


def test_a_narrow_terminal_loses_nothing() -> None:
    """Where an address does not fit, it goes on in the next line: no part of it is left out."""
    run = subprocess.run(
        [*MODULE, "info", "mock:4M"],
        capture_output=True,
        text=True,
        env=environment(FORCE_COLOR="1", COLUMNS="24", PYTHONIOENCODING="utf-8"),
        timeout=60,
        check=True,
    )
    assert "…" not in run.stdout
    first, second = (line.split()[:2] for line in run.stdout.splitlines()[-2:])
    assert [a + b for a, b in zip(first, second, strict=True)] == ["0x00000000", "0x00400000"]


def test_no_memory_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that has no memory left ends with status 2, and no traceback."""

    def fail(_: object) -> int:
        raise MemoryError

    monkeypatch.setattr("xenmapcache.cli.info.run", fail)
    monkeypatch.setattr("xenmapcache.cli._discard", lambda _: None)
    assert main(["info", "mock:16M", "--json"]) == 2
    assert capsys.readouterr().err == "xenmapcache: error: out of memory\n"
