"""The packages of others that read a guest's memory, as candidates.

None is imported before it is asked for: whatever is not there, or cannot read a file, raises
:class:`.Unable` and says why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.benchmarks import xen_stub
from tests.benchmarks.candidates import Candidate, Reader, Unable, need_stub


def module(name: str, package: str) -> Any:  # noqa: ANN401 - no peer has types
    """Import a peer's module."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        raise Unable(f"is not installed: {_why_not(package) or error}") from error


def _why_not(package: str) -> str:
    """Return what pip said when it could not install a package, if make kept it."""
    log = Path(sys.prefix) / f"{package}.log"
    if not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if "fatal error:" in line] or [
        line for line in lines if line.startswith("ERROR:") and "Failed building" not in line
    ]
    return errors[0].split("fatal error:")[-1].removeprefix("ERROR:").strip() if errors else ""


class Volatility(Reader):
    """A layer of Volatility 3, over its layer of a file."""

    def __init__(self, layer: str, path: Path) -> None:
        contexts = module("volatility3.framework.contexts", "volatility3")
        physical = module("volatility3.framework.layers.physical", "volatility3")
        self._scanners = module("volatility3.framework.layers.scanners", "volatility3")
        self._context = contexts.Context()
        self._context.config["file.location"] = path.as_uri()
        self._layer = physical.FileLayer(self._context, "file", "file")
        self._context.add_layer(self._layer)
        if layer != "physical.FileLayer":
            name, _, kind = layer.partition(".")
            layers = module(f"volatility3.framework.layers.{name}", "volatility3")
            self._context.config["guest.base_layer"] = "file"
            self._layer = getattr(layers, kind)(self._context, "guest", "guest")
            self._context.add_layer(self._layer)
        self.read = self._layer.read

    def find(self, needle: bytes, size: int) -> list[int]:
        scanner = self._scanners.BytesScanner(needle)
        sections = [(0, size)]
        found = self._layer.scan(self._context, scanner, sections=sections)
        return sorted(int(place) for place in found)

    def close(self) -> None:
        for layer in list(self._context.layers):
            if layer != "file":
                self._context.layers.del_layer(layer)
        self._context.layers["file"].destroy()


class Drgn(Reader):
    """A program of drgn, over a core."""

    def __init__(self, path: Path) -> None:
        drgn = module("drgn", "drgn")
        self._program = drgn.Program()
        self._program.set_core_dump(path)
        self.read = self._program.read

    def find(self, needle: bytes, size: int) -> list[int]:
        search = self._program.search_memory(needle).set_address_range(0, size - 1)
        return [int(place) for place in search]

    def close(self) -> None:
        del self._program, self.read


class Libvmi(Reader):
    """LibVMI's driver for files, without an operating system."""

    def __init__(self, path: Path) -> None:
        libvmi = module("libvmi", "libvmi")
        flags, mode = libvmi.INIT_DOMAINNAME, libvmi.VMIMode.FILE
        self._vmi = libvmi.Libvmi(str(path), flags, mode=mode, partial=True)
        self.read = self._vmi.read_pa

    def value(self, address: int, length: int) -> bytes:
        return bytes(self.read(address, length)[0])

    def close(self) -> None:
        self._vmi.destroy()


class Kdumpfile(Reader):
    """A context of libkdumpfile; addresses are the kernel's physical ones."""

    def __init__(self, path: Path) -> None:
        kdumpfile = module("kdumpfile", "pykdumpfile")
        self._context = kdumpfile.Context()
        self._context.open(str(path))
        space, read = kdumpfile.KPHYSADDR, self._context.read
        self.read = lambda address, length: read(space, address, length)
        self._space = space

    def loop(self, addresses: Iterable[int], length: int) -> None:
        space, read = self._space, self._context.read
        for address in addresses:
            read(space, address, length)

    def close(self) -> None:
        del self._context, self.read


class LibvmiXen(Libvmi):
    """LibVMI's driver for Xen."""

    def __init__(self, path: Path) -> None:
        need_preloaded_stub(path)
        libvmi = module("libvmi", "libvmi")
        flags, mode = libvmi.INIT_DOMAINNAME, libvmi.VMIMode.XEN
        self._vmi = libvmi.Libvmi(xen_stub.GUEST, flags, mode=mode, partial=True)
        self.read = self._vmi.read_pa


class MicrovmiXen(Reader):
    """microvmi's driver for Xen."""

    def __init__(self, path: Path) -> None:
        need_preloaded_stub(path)
        microvmi = module("microvmi", "microvmi")
        common, parameters = microvmi.CommonInitParamsPy(), microvmi.DriverInitParamsPy()
        common.vm_name = xen_stub.GUEST
        parameters.common = common
        self._guest = microvmi.Microvmi(microvmi.DriverType.Xen, parameters)
        self.read = self._guest.read_physical

    def value(self, address: int, length: int) -> bytes:
        return bytes(self.read(address, length)[0])

    def close(self) -> None:
        del self._guest, self.read


def need_preloaded_stub(path: Path) -> None:
    """Give the stand-in that drivers for Xen find its guest's memory."""
    need_stub(path)
    if not xen_stub.loaded():
        raise Unable("needs the stand-in for Xen's libraries to be loaded first")


def microvmi(_: Path) -> Reader:
    """Raise: microvmi reads no files."""
    package = module("microvmi", "microvmi")
    drivers = [name for name in dir(package.DriverType) if not name.startswith("_")]
    raise Unable(f"has no driver for files: its drivers are {', '.join(drivers)}")


def _volatility(layer: str, format_: str, skips: int = 0) -> Candidate:
    name, _, kind = layer.partition(".")
    modules = f"volatility3.framework.contexts volatility3.framework.layers.{name}"
    return Candidate(
        "volatility3", kind, format_, lambda path: Volatility(layer, path), modules, skips
    )


PEERS: Sequence[Candidate] = (
    Candidate("libvmi", "XEN", "live", LibvmiXen, "libvmi"),
    Candidate("microvmi", "Xen", "live", MicrovmiXen, "microvmi"),
    _volatility("physical.FileLayer", "raw"),
    Candidate("libvmi", "FILE", "raw", Libvmi, "libvmi"),
    _volatility("xen.XenCoreDumpLayer", "coredump", skips=4096),  # it takes pfn 0 for none
    Candidate("pykdumpfile", "", "coredump", Kdumpfile, "kdumpfile"),
    Candidate("drgn", "", "coredump", Drgn, "drgn"),
    _volatility("elf.Elf64Layer", "elfcore"),
    Candidate("drgn", "", "elfcore", Drgn, "drgn"),
    Candidate("pykdumpfile", "", "elfcore", Kdumpfile, "kdumpfile"),
    Candidate("microvmi", "", "raw", microvmi, "microvmi"),
)
