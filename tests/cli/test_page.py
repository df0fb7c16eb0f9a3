"""What docs/commands.md shows is what the commands print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.process import environment
from tests.cli.test_generated import COMMANDS
from tests.docs.test_docs import DOCS, blocks, program, run

PAGE = DOCS / "commands.md"
MARK = re.compile(r"<!-- run(?P<part>, in part)?(: (?P<status>\d+))? -->")

ELSEWHERE = {"disk", "drgn", "holders", "leases", "mount", "ps", "top", "volatility"}
"""Shown on the page of other tools, or of a machine that is made up."""

pytestmark = [
    pytest.mark.skipif(not PAGE.is_file(), reason=f"no file {PAGE}"),
    pytest.mark.slow,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's guests, and a ``xenmapcache`` to call."""
    pytest.importorskip("elftools", reason="pyelftools is not installed")
    done = run(program(PAGE.read_text(encoding="utf-8")), "page.py", tmp_path)
    assert done.returncode == 0, done.stderr
    install_command(tmp_path, "-W error")
    return tmp_path


def install_command(folder: Path, options: str) -> None:
    """Put a ``xenmapcache`` into a folder `bin`, with options of Python's."""
    command = folder / "bin" / "xenmapcache"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {options} -m xenmapcache "$@"\n')
    command.chmod(0o755)


def printed_as_shown(page: Path, folder: Path, only: re.Pattern[str]) -> set[str]:
    """Run the blocks of a page, and compare what they print with what is shown.

    Args:
        page: of the documentation.
        folder: where to run them; see :func:`install_command`.
        only: what a block has to contain; others are not run.

    Returns:
        The commands of xenmapcache that were run.
    """
    variables = environment()
    variables["PATH"] = f"{folder / 'bin'}:{variables['PATH']}"
    shown = set()
    for block in blocks(page.read_text(encoding="utf-8")):
        mark = MARK.fullmatch(block.before)
        if mark is None or not only.search(block.code):
            continue
        printed = []
        status = 0
        for line in block.code.splitlines():
            if not line.startswith("$ "):
                continue
            done = subprocess.run(
                ["bash", "-c", f"exec 2>&1; {line[2:]}"],
                cwd=folder,
                capture_output=True,
                text=True,
                env=variables,
                timeout=60,
                check=False,
            )
            status = done.returncode
            if line.startswith("$ xenmapcache "):
                shown.add(line.split()[2])
            printed += [line, *done.stdout.splitlines()]
        assert status == int(mark["status"] or 0), block.code
        if mark["part"]:
            lines = {" ".join(line.split()) for line in printed}
            assert {" ".join(line.split()) for line in block.code.splitlines()} - {""} <= lines
        else:
            assert "\n".join(printed) == block.code
    return shown


def test_the_page_shows_what_is_printed(folder: Path) -> None:
    """Each block is run as it stands, and prints what is shown, or at least the lines shown."""
    shown = printed_as_shown(PAGE, folder, re.compile(""))
    assert shown == set(COMMANDS) - {"demo", "doctor", *ELSEWHERE}


def test_the_table_has_every_command() -> None:
    """None that there is, is missing."""
    found = re.findall(r"^\| `xenmapcache ([\w-]+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert tuple(found) == COMMANDS
