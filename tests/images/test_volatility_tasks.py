"""A plug-in of Volatility 3 for Linux lists the processes of a real guest."""

from __future__ import annotations

import csv
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from tests.images import tools
from tests.images.lab import Images, machine
from tests.images.test_bridges import chunks
from tests.images.test_write_tools import debug_kernel_of, processes
from xenmapcache import find_vmcoreinfo, open_cache

pytestmark = [pytest.mark.images, pytest.mark.slow]


@pytest.fixture
def guest(lab_images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    """The lab's guest with page tables of four levels: Volatility 2.28 does not know five."""
    with open_cache(lab_images.path("plain.elf")) as cache:
        debug_kernel_of(data for _, data in chunks(cache))  # skips, unless it is kept
    options = ["max,la57=off" if each == "max" else each for each in machine._MACHINE]
    monkeypatch.setattr(machine, "_MACHINE", tuple(options))
    work = tmp_path / "work"
    work.mkdir()
    machine.write_images(tmp_path, work)
    return Images(tmp_path)


def write_symbols(image: Path, target: Path) -> None:
    """Write Volatility's symbol table of the kernel in an image."""
    isf = tools.module("tests.images.isf", "drgn")
    bridge = tools.module("xenmapcache.adapters.drgn", "drgn")
    linux = tools.module("volatility3.framework.symbols.linux", "volatility3")
    known = re.findall(r'set_type_class\(\s*"(\w+)"', inspect.getsource(linux))
    with open_cache(image) as cache:
        program = bridge.program(cache)
        program.load_debug_info([debug_kernel_of(data for _, data in chunks(cache))])
        info = find_vmcoreinfo(cache)
        assert info is not None
        table = isf.SymbolTable(program, int(info.value("KERNELOFFSET") or "", 16))
        text = json.dumps(table.to_json([*known, "task_struct", "timekeeper"]))
    target.parent.mkdir(parents=True)
    target.write_text(text)


def test_it_lists_processes(guest: Images, tmp_path: Path) -> None:
    """Each process that the guest itself has listed, by its number and its name."""
    image = guest.path("plain.elf")
    write_symbols(image, tmp_path / "symbols" / "linux" / "lab.json")
    command = [sys.executable, "-m", "xenmapcache", "volatility"]
    options = ["-q", "--offline", "-s", str(tmp_path / "symbols"), "-r", "csv"]
    said = tools.run(*command, image, *options, "linux.pslist.PsList")
    rows = list(csv.DictReader(said[said.index("TreeDepth") :].splitlines()))
    tasks = {int(row["PID"]): row["COMM"] for row in rows}
    listed = processes(guest)
    assert len(listed) > 20
    for pid, name in listed.items():
        assert tasks[pid].startswith(name.partition("/")[0][:15]), (pid, name, tasks[pid])
