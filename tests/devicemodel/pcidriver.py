"""A PCI function, and what a guest's kernel does to it, in the order in which Linux does it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from xenmapcache import MockDomain
from xenmapcache.devicemodel import IoreqServer, PciFunction
from xenmapcache.ioreq import RequestKind

BDF = "0000:00:05.0"
COMMAND, STATUS, BAR0, CAPABILITIES = 0x04, 0x06, 0x10, 0x34
IO, MEMORY, MASTER, INTX_DISABLE = 0x1, 0x2, 0x4, 0x400
ONES = 0xFFFFFFFF

Claims = set[tuple[RequestKind, int, int]]


class Memory(Protocol):
    """What a driver has of its guest: the mock's domain, or what plays it in a real guest."""

    def read(self, address: int, length: int, /) -> bytes: ...
    def write(self, address: int, data: bytes, /) -> None: ...
    def mmio_read(self, address: int, size: int, /) -> int: ...
    def mmio_write(self, address: int, value: int, size: int, /) -> None: ...


class Machine(Memory, Protocol):
    """That, with a PCI bus."""

    def pci_read(self, bdf: str, offset: int, size: int, /) -> int: ...
    def pci_write(self, bdf: str, offset: int, value: int, size: int, /) -> None: ...


def new(
    server: IoreqServer, bdf: str = BDF, *, interrupt_pin: int = 0, multifunction: bool = False
) -> PciFunction:
    """Return a function with an identity."""
    return PciFunction(
        server,
        bdf,
        vendor=0x1AF4,
        device=0x1041,
        class_code=0x020000,
        revision=0x5A,
        subsystem=(0x1234, 0x5678),
        interrupt_pin=interrupt_pin,
        multifunction=multifunction,
    )


class FoundBar(NamedTuple):
    """What a guest finds out about a BAR."""

    size: int
    flags: int


class PciDriver:
    """A guest that drives the function at ``bdf``."""

    def __init__(self, guest: Machine, bdf: str = BDF) -> None:
        self.guest = guest
        self.bdf = bdf

    def read(self, offset: int, size: int = 4) -> int:
        return self.guest.pci_read(self.bdf, offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.guest.pci_write(self.bdf, offset, value, size)

    def command(self, value: int) -> None:
        """Write the command register."""
        self.write(COMMAND, value, 2)

    def size_bar(self, number: int) -> FoundBar | None:
        """Ask a BAR for its size, as Linux does: with decoding off."""
        offset = BAR0 + 4 * number
        command = self.read(COMMAND, 2)
        self.command(command & ~(IO | MEMORY))
        before, mask = self.read(offset), self._ones(offset)
        flags = mask & (0x3 if mask & 1 else 0xF)
        wide = not mask & 1 and mask & 0x4
        mask = mask & ~flags | (self._ones(offset + 4) << 32 if wide else ONES << 32)
        self.command(command)
        assert self.read(offset) == before
        return FoundBar((1 << 64) - mask, flags) if mask & ~(ONES << 32) or wide else None

    def _ones(self, offset: int) -> int:
        before = self.read(offset)
        self.write(offset, ONES)
        found = self.read(offset)
        self.write(offset, before)
        return found

    def place_bar(self, number: int, address: int) -> None:
        """Write a BAR, the upper half too if it has one."""
        offset = BAR0 + 4 * number
        wide = self.read(offset) & 0x7 == 0x4
        self.write(offset, address & ONES)
        if wide:
            self.write(offset + 4, address >> 32)

    def capabilities(self) -> list[tuple[int, int]]:
        """Return each capability's offset and identifier, in the order of the list."""
        found: list[tuple[int, int]] = []
        at = self.read(CAPABILITIES, 1) if self.read(STATUS, 2) & 0x10 else 0
        while at:
            found.append((at, self.read(at, 1)))
            at = self.read(at + 1, 1)
        return found

    def capability(self, identifier: int) -> int:
        """Return the offset of the first capability of a kind."""
        return next(at for at, number in self.capabilities() if number == identifier)


def claims_of(guest: MockDomain) -> Claims:
    """Return what the mock's Xen has of all servers, both ends included; PCI as a number."""
    return {claim for server in guest.ioreq_servers.values() for claim in server._claims}


def raised(guest: MockDomain) -> list[tuple[object, ...]]:
    """Return the last two numbers of each interrupt: address and data, or pin and level."""
    interrupts: list[tuple[object, ...]] = [*guest.interrupts]
    lasts = [(interrupt, interrupt[-1]) for interrupt in interrupts]
    return [(last if isinstance(last, tuple) else whole)[-2:] for whole, last in lasts]
