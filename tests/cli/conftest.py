"""A machine for the doctor to look at, made of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_xen.fixtures import make_fake
from xenmapcache.binding import library
from xenmapcache.doctor import devices, holders, hypervisor, xl

__all__ = ["machine", "make_fake", "no_colour_by_environment"]


class Machine:
    """A machine without Xen, to which a test adds what it wants there to be."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str = "") -> Path:
        """Put a file where the doctor looks for ``/path``."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def become_dom0(self) -> None:
        """Put there what Xen's kernel side shows in Dom0."""
        for path, text in {
            "sys/hypervisor/type": "xen\n",
            "sys/hypervisor/guest_type": "PV\n",
            "sys/hypervisor/version/major": "4\n",
            "sys/hypervisor/version/minor": "17\n",
            "sys/hypervisor/version/extra": ".3\n",
            "proc/xen/capabilities": "control_d\n",
            "dev/xen/privcmd": "",
            "dev/xen/evtchn": "",
            "dev/xen/gntdev": "",
        }.items():
            self.write(path, text)

    def install_xl(self, script: str) -> None:
        """Install a shell script as ``xl``."""
        self.write("bin/xl", f"#!/bin/sh\n{script}\n").chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The doctor's machine, empty: no Xen, no device nodes, no xl, wherever this runs."""

    def version() -> str | None:
        folder = tmp_path / "sys/hypervisor/version"
        if not folder.exists():
            return None
        return f"{(folder / 'major').read_text().strip()}.{(folder / 'minor').read_text().strip()}"

    monkeypatch.setattr(hypervisor, "HYPERVISOR", tmp_path / "sys/hypervisor")
    for module in (hypervisor, devices):
        monkeypatch.setattr(module, "PROC_XEN", tmp_path / "proc/xen")
    monkeypatch.setattr(devices, "DEV_XEN", tmp_path / "dev/xen")
    monkeypatch.setattr(holders, "PROC", tmp_path / "proc")
    monkeypatch.setattr(xl, "XL_PATH", str(tmp_path / "bin"))
    for module in (hypervisor, library):
        monkeypatch.setattr(module, "xen_version", version)
    return Machine(tmp_path)


@pytest.fixture(autouse=True)
def no_colour_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where these are set, rich colours output that does not go to a terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
