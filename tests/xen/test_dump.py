"""`xenmapcache dump --pause` on a live guest: it stands still during the copy, and only then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.xen.control import held_still
from tests.xen.lab.platform import Platform
from xenmapcache import MapCache, find_vmcoreinfo, open_backend, open_source, write_vmcore
from xenmapcache.address import MiB
from xenmapcache.binding.control import Control

pytestmark = pytest.mark.xen

LENGTH = 16 * MiB
"""Of memory that is looked at."""


def is_paused(domid: int) -> bool:
    """Ask Xen."""
    with Control() as control:
        return control.domain_state(domid).paused


@pytest.mark.parametrize("name", ["xen", "xenctrl"])
def test_xen_counts_pauses(live_domid: int, name: str) -> None:
    """The guest is paused until it is unpaused; one that was paused before stays paused."""
    assert not is_paused(live_domid)
    with open_backend(name, domid=live_domid) as backend:
        backend.pause()
        try:
            assert is_paused(live_domid)
        finally:
            backend.unpause()
        assert not is_paused(live_domid)
        with held_still(live_domid):
            backend.pause()
            backend.unpause()
            assert is_paused(live_domid)
    assert not is_paused(live_domid)


def test_a_paused_dump_is_of_one_moment(live_domid: int, machine: Platform, tmp_path: Path) -> None:
    """While the guest is held still, a file of each form has the memory that mapping shows."""
    length = machine.memory[0] + LENGTH
    command = [sys.executable, "-m", "xenmapcache", "dump", f"xen:{live_domid}", "--pause"]
    command += ["--length", str(length)]
    with held_still(live_domid):
        for form in ("vmcore", "lime"):
            path = tmp_path / form
            options = ["-o", str(path), "--format", form, "--json"]
            done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
            assert json.loads(done.stdout)["paused"] is True
            with (
                open_backend("xen", domid=live_domid) as live,
                open_source(path) as dump,
                MapCache(live) as expected,
                MapCache(dump) as found,
            ):
                ranges = list(expected.present(0, length))
                assert list(found.present(0, length)) == ranges
                for start, run in ranges:
                    for address in range(start, start + run, MiB):
                        size = min(MiB, start + run - address)
                        assert found.read(address, size) == expected.read(address, size)
            path.unlink()  # Dom0's files lie in its memory
    assert not is_paused(live_domid)


def test_a_dump_that_is_ended_unpauses(live_domid: int, tmp_path: Path) -> None:
    """SIGTERM amid the copy leaves no file, and a guest that runs."""
    code = (
        "import os, signal, sys\n"
        "from xenmapcache.cli import main\n"
        "from xenmapcache.binding.control import Control\n"
        "def end(*_):\n"
        "    with Control() as control:\n"
        "        print(control.domain_state(int(sys.argv[1])).paused, flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "os.pwrite = end\n"
        "sys.exit(main(['dump', f'xen:{sys.argv[1]}', '-o', sys.argv[2], '--pause']))\n"
    )
    target = tmp_path / "guest.raw"
    done = subprocess.run(
        [sys.executable, "-c", code, str(live_domid), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "True\n", "")
    assert os.listdir(tmp_path) == []
    assert not is_paused(live_domid)


def test_a_vmcore_of_the_running_guest(live_domid: int, machine: Platform, tmp_path: Path) -> None:
    """Also without a pause every page that was there is in the file."""
    length = machine.memory[0] + LENGTH
    path = tmp_path / "vmcore"
    with open_backend("xen", domid=live_domid) as live:
        pages = write_vmcore(live, path, length=length)
    with open_source(path) as dump, MapCache(dump) as cache:
        present = sum(size for _, size in cache.present(0, length))
    assert present >> 12 == pages > 0


def test_a_live_linux_guest_describes_itself(live_domid: int, machine: Platform) -> None:
    """VMCOREINFO is found in the guest's memory, and its kernel is where the text says."""
    with open_backend("xen", domid=live_domid) as live, MapCache(live) as cache:
        found = find_vmcoreinfo(cache, *machine.memory)
        if found is None:
            pytest.skip("this guest's kernel has no VMCOREINFO")
        assert found.describes(cache.read)
        assert found.value("PAGESIZE") == "4096"
