"""The lab itself: the tests run in a Dom0 of the requested Xen, which has a guest."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.xen.conftest import wait_for
from tests.xen.lab.platform import Platform

pytestmark = pytest.mark.xen
HYPERVISOR = Path("/sys/hypervisor")


def domains() -> dict[str, int]:
    """Names and ids of the running domains."""
    listing = subprocess.run(["xl", "list"], check=True, capture_output=True, text=True).stdout
    return {fields[0]: int(fields[1]) for fields in map(str.split, listing.splitlines()[1:])}


def test_this_is_a_dom0() -> None:
    """Xen says so: control_d is the control domain's capability."""
    assert (HYPERVISOR / "type").read_text().strip() == "xen"
    assert "control_d" in Path("/proc/xen/capabilities").read_text()


def test_xen_is_the_release_asked_for(pytestconfig: pytest.Config, machine: Platform) -> None:
    """Otherwise two runs on two machines could be one run twice."""
    if pytestconfig.getoption("xen") is None:
        pytest.skip("no machine named with --xen")
    parts = [(HYPERVISOR / "version" / part).read_text().strip() for part in ("major", "minor")]
    assert ".".join(parts) == machine.release.xen
    assert os.uname().machine == machine.architecture.machine


def test_guest_runs_and_talks(live_domid: int, guest_console: Callable[[str], str]) -> None:
    """The guest given by --domid is listed, and prints the marker that tests look for."""
    names = {domid: name for name, domid in domains().items()}
    assert "DOMU marker XENMAPCACHE-MARKER-" in guest_console(names[live_domid])


def test_victim_exists_while_it_is_needed(victim: int, live_domid: int) -> None:
    """The second guest is there, and is not the first."""
    assert victim in domains().values()
    assert victim != live_domid


def test_the_machine_is_kept_awake(pytestconfig: pytest.Config, machine: Platform) -> None:
    """The emulator is given a key each second, whose interrupt brings back one that it lost."""
    if pytestconfig.getoption("xen") is None or machine.architecture.name != "amd64":
        pytest.skip("only the lab's PCs have a keyboard")

    def keys() -> int:
        lines = Path("/proc/interrupts").read_text().splitlines()
        (counts,) = [line.split() for line in lines if line.endswith(" i8042") and " 1:" in line]
        return sum(int(word) for word in counts if word.isdecimal())

    before = keys()
    wait_for(lambda: keys() > before + 2, "keys were pressed")
