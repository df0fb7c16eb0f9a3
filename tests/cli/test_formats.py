"""The commands over each kind of file, as it is recognised and as it is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.process import environment, on_terminal
from tests.images import kdump_files, writers, xl_files
from xenmapcache.cli import main

GFNS = (0, 1, 2, 5)


@pytest.fixture(params=["coredump", "save", "elfcore", "kdump", "raw"])
def named(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A kind of name, and a file of that kind with the pages 0, 1, 2 and 5."""
    kind: str = request.param
    path = tmp_path / f"guest.{kind}"
    if kind == "coredump":
        path.write_bytes(xl_files.dump_core(GFNS))
    elif kind == "save":
        path.write_bytes(xl_files.save(xl_files.pages(*GFNS), version=3))
    elif kind == "elfcore":
        path.write_bytes(writers.elf_core_of([(0, 3), (5, 1)]))
    elif kind == "kdump":
        path.write_bytes(kdump_files.kdump(kdump_files.pages_of([(0, 3), (5, 1)]), compression=0))
    else:
        path.write_bytes(writers.lime([(0, 3), (5, 1)]))
    return kind, str(path)


def test_every_format_is_recognised(
    named: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name and by its content alike: info, find, read, and a copy that is equal."""
    kind, path = named
    found = []
    for source in (path, f"{kind}:{path}"):
        assert main(["info", "--json", source]) == 0
        facts = json.loads(capsys.readouterr().out)
        found.append(facts["backend"])
        assert [(each["address"], each["length"]) for each in facts["ranges"]] == [
            (0, 0x3000),
            (0x5000, 0x1000),
        ]
    assert found == [kind] * 2
    assert main(["read", "--json", path, "0x5000", "16"]) == 0
    data = json.loads(capsys.readouterr().out)["hex"]
    assert main(["find", path, "--hex", data, "--start", "0x5000"]) == 0
    assert capsys.readouterr().out.startswith("0x00005000  ")
    assert main(["read", path, "0x2ff0", "--length", "32"]) == 2
    assert "no page at 0x3000: add --fill" in capsys.readouterr().err
    copy = str(tmp_path / "copy")
    assert main(["dump", path, "-o", copy, "--format", "coredump"]) == 0
    assert main(["diff", path, copy]) == 0
    assert main(["dump", path, "-o", copy]) == 0
    assert main(["diff", path, f"raw:{copy}", "--length", "0x3000"]) == 0


def test_a_damaged_file_is_one_line(
    named: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the file contradicts is named, with status 2."""
    kind, path = named
    os.truncate(path, os.path.getsize(path) - 5000)
    assert main(["info", "--json", f"{kind}:{path}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("xenmapcache: error: ")
    assert path in printed.err
    assert printed.err.count("\n") == 1


def test_progress_while_a_saved_guest_is_read(tmp_path: Path) -> None:
    """Reading an image's index takes long, so a terminal on stderr sees how far it is."""
    path = tmp_path / "guest.save"
    path.write_bytes(xl_files.save(xl_files.pages(*GFNS), version=3))
    variables = environment(TERM="xterm-256color", COLUMNS="200", NO_COLOR="")
    arguments = ("info", "--json", str(path))
    shown, stdout = on_terminal(*arguments, environment=variables, streams=("stderr",))
    assert json.loads(stdout)["pages"] == 4
    assert b"reading " in shown
