"""Other packages that read a guest's memory from files, each behind the same few methods.

None is imported before it is asked for: whatever is not there, or cannot read a file, raises
:class:`Unable` and says why.
"""

from __future__ import annotations

import abc
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

from xenmapcache import GuestMemory, MapCache, open_backend
from xenmapcache.address import MiB

Read = Callable[[int, int], Any]


class Unable(Exception):  # noqa: N818 - no error, but a row of the table
    """This candidate is not measured, and why."""


class Reader(abc.ABC):
    """An open file. What is timed calls ``read`` and nothing around it.

    Attributes:
        read: the candidate's own call for ``(address, length)``.
    """

    read: Read

    def value(self, address: int, length: int) -> bytes:
        """Return the bytes that ``read`` gives."""
        return bytes(self.read(address, length))

    def loop(self, addresses: Iterable[int], length: int) -> None:
        """Read at each address, as a user's loop would."""
        read = self.read
        for address in addresses:
            read(address, length)

    def find(self, needle: bytes, size: int) -> list[int]:
        """Return where some bytes are; by reading in pieces, where there is nothing better."""
        found = []
        tail = b""
        for start in range(0, size, MiB):
            piece = tail + self.value(start, min(MiB, size - start))
            place = piece.find(needle)
            while place >= 0:
                found.append(start - len(tail) + place)
                place = piece.find(needle, place + 1)
            tail = piece[len(piece) - len(needle) + 1 :]
        return found

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the file."""


class Candidate(NamedTuple):
    """What is measured: a package, and how it opens a file of a format."""

    package: str
    way: str
    format: str
    open: Callable[[Path], Reader]
    skips: int = 0
    """Bytes from address 0 on that it is known not to give."""

    @property
    def name(self) -> str:
        return " ".join((self.package, self.way)).strip()

    @property
    def ours(self) -> bool:
        return self.package == "xenmapcache"

    @property
    def peer(self) -> bool:
        """Whether it may be missing, or fail: then that is what its row says."""
        return not self.ours and self.package not in ("mmap", "os.pread")


# --- ours, and the bare things -----------------------------------------------------


class Ours(Reader):
    """A cache over one of our backends."""

    def __init__(self, backend: str, path: Path) -> None:
        self.backend = open_backend(backend, path=path)
        self.cache = MapCache(self.backend)
        self.read = self.cache.read

    def find(self, needle: bytes, size: int) -> list[int]:
        return [address for address, _ in GuestMemory(self.cache).find(needle, 0, size)]

    def close(self) -> None:
        self.cache.close()
        self.backend.close()


class Mmap(Reader):
    """The file mapped whole, and slices of that: the least that Python can do."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.read = lambda address, length: self._memory[address : address + length]

    def loop(self, addresses: Iterable[int], length: int) -> None:
        memory = self._memory
        for address in addresses:
            memory[address : address + length]

    def find(self, needle: bytes, size: int) -> list[int]:
        found = []
        place = self._memory.find(needle, 0, size)
        while place >= 0:
            found.append(place)
            place = self._memory.find(needle, place + 1, size)
        return found

    def close(self) -> None:
        self._memory.close()


class Pread(Reader):
    """A system call for each read."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.read = lambda address, length: os.pread(self._fd, length, address)

    def loop(self, addresses: Iterable[int], length: int) -> None:
        fd, pread = self._fd, os.pread
        for address in addresses:
            pread(fd, length, address)

    def close(self) -> None:
        os.close(self._fd)


# --- peers -------------------------------------------------------------------------


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


def version(package: str) -> str:
    """Return a package's version, or nothing if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


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


def microvmi(_: Path) -> Reader:
    """Raise: microvmi reads no files."""
    package = module("microvmi", "microvmi")
    drivers = [name for name in dir(package.DriverType) if not name.startswith("_")]
    raise Unable(f"has no driver for files: its drivers are {', '.join(drivers)}")


def _ours(format_: str) -> Candidate:
    return Candidate("xenmapcache", "", format_, lambda path: Ours(format_, path))


def _volatility(layer: str, format_: str, skips: int = 0) -> Candidate:
    name = layer.partition(".")[2]
    return Candidate("volatility3", name, format_, lambda path: Volatility(layer, path), skips)


OURS: Sequence[Candidate] = tuple(map(_ours, ("raw", "coredump", "elfcore", "save")))
BARE: Sequence[Candidate] = (
    Candidate("mmap", "", "raw", Mmap),
    Candidate("os.pread", "", "raw", Pread),
)
PEERS: Sequence[Candidate] = (
    _volatility("physical.FileLayer", "raw"),
    _volatility("xen.XenCoreDumpLayer", "coredump", skips=4096),  # it takes pfn 0 for none
    _volatility("elf.Elf64Layer", "elfcore"),
    Candidate("drgn", "", "elfcore", Drgn),
    Candidate("drgn", "", "coredump", Drgn),
    Candidate("libvmi", "FILE", "raw", Libvmi),
    Candidate("pykdumpfile", "", "coredump", Kdumpfile),
    Candidate("pykdumpfile", "", "elfcore", Kdumpfile),
    Candidate("microvmi", "", "raw", microvmi),
)
