"""The commands over files that are not complete: refused, salvaged, with holes or zeros."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import xl_files
from tests.images.writers import Load, elf_core, lime, lime_range, memory
from xenmapcache.address import PAGE_SIZE
from xenmapcache.cli import main

P = PAGE_SIZE
Write = Callable[[str, bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes a file, and returns its name."""

    def write(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        os.utime(path, (1, 1))
        return str(path)

    return write


CUT = {
    "guest.lime": lime([(0, 2), (5, 3)])[:-P],
    "vmcore": elf_core([Load(0, memory(0, 2)), Load(5 * P, memory(5, 3))])[:-P],
    "guest.save": xl_files.save(xl_files.pages(0, 1, 5, 6, 7))[: -P - 40],
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("command", ["info", "read", "find", "strings", "diff", "dump"])
def test_every_command_salvages(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    """Without the option a command names it; with it, it works with what is intact."""
    path = write(name, CUT[name])
    more = {
        "read": ["0x5000", "16"],
        "find": ["zzzz"],
        "diff": [path],
        "dump": ["-o", str(tmp_path / "out"), "--format", "coredump"],
    }.get(command, [])
    arguments = [command, path, *more, "--json"]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--salvage on the command line" in printed.err
    assert main([*arguments, "--salvage"]) == (command in ("find", "strings"))
    printed = capsys.readouterr()
    if command == "info":
        facts = json.loads(printed.out)
        assert facts["pages"] in (3, 4)
        assert facts["ranges"][0] == {"address": 0, "address_hex": "0x0", "length": 2 * P}


def test_parts_of_pages_are_listed(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """By `info`, with how much is missing of each; they are read and dumped as others are."""
    path = write("guest.lime", lime_range(P, memory(1, 2)[:-1]) + lime_range(8 * P + 8, b"x"))
    listed = [{"page": "0x2000", "missing_bytes": 1}, {"page": "0x8000", "missing_bytes": P - 1}]
    assert main(["info", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["notes"]["partial_pages"] == listed
    assert main(["info", path]) == 0
    assert "0x2000, missing bytes: 1\n" in capsys.readouterr().out
    assert main(["read", path, "0x8000", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hex"] == "00" * 8 + "78" + "00" * 7


def test_zeros(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory that an ELF core leaves out is a hole, or zeros if the user says so."""
    path = write("vmcore", elf_core([Load(0, memory(0, 1), 3 * P)]))
    other = write("guest.lime", lime([(0, 1)]))
    assert main(["read", path, "0x1000", "4", "--json"]) == 2
    capsys.readouterr()
    assert main(["read", path, "0x1000", "4", "--json", "--zeros"]) == 0
    assert json.loads(capsys.readouterr().out)["hex"] == "00000000"
    assert main(["info", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"]["left_out_bytes"] == 2 * P
    assert main(["diff", path, other, "--quiet"]) == 0
    assert main(["diff", path, other, "--quiet", "--zeros"]) == 1


def test_options_of_files_change_nothing_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    """A guest that is not a file has nothing to salvage."""
    assert main(["info", "mock:1M", "--json", "--salvage", "--zeros"]) == 0
    assert json.loads(capsys.readouterr().out)["pages"] == 256
