"""What docs/with-your-tools.md shows is what the commands print."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.cli.test_page import install_command, printed_as_shown
from tests.docs.test_docs import DOCS, README
from tests.images import linux_guest
from xenmapcache import open_backend, write_lime

PAGE = DOCS / "with-your-tools.md"
FILES = {
    "release.py": (
        'print(prog["UTS_RELEASE"].string_().decode())\n'
        "print(prog.read(0xffffffff80081000, 13), prog.read(0x481000, 13, physical=True))\n"
    ),
    "kernel.yar": (
        "rule kernel : linux {\n    strings:\n        $banner = /Linux version [0-9.]+/\n"
        "    condition:\n        $banner\n}\n"
    ),
}
FILES["pages.py"] = """\
import numpy

from xenmapcache import open_cache

with open_cache("web.lime") as cache, cache.window() as window:
    pages = numpy.frombuffer(window.view, "<u8").reshape(-1, 512)
    zeros = (pages == 0).all(axis=1)
    print(len(pages), "pages, of which", zeros.sum(), "are zeros or holes")
    del pages
"""
PACKAGES = {"drgn": "drgn", "volatility": "volatility3", "find": "yara"}
"""Which package a command of the page needs."""

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason=f"no file {PAGE}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's files, and a ``xenmapcache`` to call."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    guest = linux_guest.create()
    guest.write(linux_guest.BANNER_AT, linux_guest.BANNER + b"\0")
    with open_backend("mock", domain=guest) as backend:
        write_lime(backend, tmp_path / "web.lime")
    install_command(tmp_path, "")  # Volatility's own code may warn
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", PACKAGES)
def test_the_page_shows_what_is_printed(folder: Path, command: str) -> None:
    """Each block of a command is run as it stands."""
    package = PACKAGES[command]
    pytest.importorskip(package, reason=f"{package} is not installed")
    pattern = re.compile(rf"^\$ xenmapcache {command} ", re.MULTILINE)
    assert printed_as_shown(PAGE, folder, pattern) == {command}


@pytest.mark.slow
def test_the_page_shows_what_numpy_computes(folder: Path) -> None:
    """The script's text and its output are those on the page."""
    pytest.importorskip("numpy", reason="numpy is not installed")
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    pattern = re.compile(r"^\$ python pages\.py$", re.MULTILINE)
    assert pattern.search(PAGE.read_text(encoding="utf-8"))
    printed_as_shown(PAGE, folder, pattern)


def test_the_front_page_leads_there() -> None:
    """People who have a tool already find the page."""
    assert "](docs/with-your-tools.md)" in README.read_text(encoding="utf-8")
