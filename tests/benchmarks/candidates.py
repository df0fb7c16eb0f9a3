"""The candidates: how each package opens a guest's memory, with the same few methods.

Here are ours and the bare things; the packages of others are in :mod:`.peers`. Nothing is
imported before it is asked for, ours neither, so that a process that opens one candidate holds
no other.
"""

from __future__ import annotations

import abc
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks import xen_stub

MiB = 1 << 20

Read = Callable[[int, int], Any]


class Unable(Exception):  # noqa: N818 - no error, but a row of the table
    """This candidate is not measured, and why."""


class Reader(abc.ABC):
    """An open guest. What is timed calls ``read`` and nothing around it.

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
        """Close the guest."""


class Candidate(NamedTuple):
    """A package to measure, and how it opens a guest that is stored in a format."""

    package: str
    way: str
    format: str
    open: Callable[[Path], Reader]
    modules: str
    """What a program that uses it imports, separated by blanks."""
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
        return not self.ours and self not in BARE


def version(package: str) -> str:
    """Return a package's version, or nothing if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


# --- ours --------------------------------------------------------------------------


class Ours(Reader):
    """A cache over one of our backends."""

    def __init__(self, backend: str, **options: object) -> None:
        from xenmapcache import MapCache, open_backend

        self.backend = open_backend(backend, **options)
        self.cache = MapCache(self.backend)
        self.read = self.cache.read

    def find(self, needle: bytes, size: int) -> list[int]:
        from xenmapcache import GuestMemory

        return [address for address, _ in GuestMemory(self.cache).find(needle, 0, size)]

    def close(self) -> None:
        self.cache.close()
        self.backend.close()


def live(binding: str, path: Path) -> Ours:
    """Open the guest of the stand-in for Xen's libraries."""
    library = need_stub(path)
    return Ours("xen", domid=xen_stub.DOMID, binding=binding, library=library)


def need_stub(path: Path) -> str:
    """Give the stand-in its guest's memory, and return it as libxenforeignmemory."""
    library = xen_stub.library()
    if not library:
        raise Unable("needs gcc, which builds the stand-in for Xen's libraries")
    os.environ[xen_stub.IMAGE] = str(path)
    return library


# --- the bare things ---------------------------------------------------------------


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


class Buckets(Reader):
    """The least that is a cache of mapped buckets: no holes, no leases, no eviction, no threads."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._buckets: dict[int, mmap.mmap] = {}

    def read(self, address: int, length: int) -> bytes:
        number, offset = address >> 20, address & MiB - 1
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = mmap.mmap(self._fd, MiB, prot=mmap.PROT_READ, offset=number << 20)
            self._buckets[number] = bucket
        if offset + length <= MiB:
            return bucket[offset : offset + length]
        first = MiB - offset
        return bucket[offset:] + self.read(address + first, length - first)

    def close(self) -> None:
        self._buckets.clear()
        os.close(self._fd)


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


def _live(binding: str) -> Candidate:
    way = f"xen, {binding}"
    return Candidate("xenmapcache", way, "live", lambda path: live(binding, path), "xenmapcache")


def _file(format_: str) -> Candidate:
    return Candidate(
        "xenmapcache", "", format_, lambda path: Ours(format_, path=path), "xenmapcache"
    )


OURS: Sequence[Candidate] = (
    *map(_live, ("cffi", "ctypes")),
    *map(_file, ("raw", "coredump", "elfcore", "save")),
)
LIMIT = Candidate("mmap", "", "raw", Mmap, "mmap")
BARE: Sequence[Candidate] = (
    LIMIT,
    Candidate("least bucket cache", "", "raw", Buckets, "mmap"),
    Candidate("os.pread", "", "raw", Pread, "os"),
)
