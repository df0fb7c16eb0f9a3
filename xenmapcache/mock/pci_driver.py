"""PciDriver: the PCI code of a mock guest's kernel, which finds functions and sets them up."""

# Theory of operation
#
# A function is set up as Linux does it, because that is what devices meet:
#
#   scan     read the vendor, then the header. Turn decoding off, write all ones to each BAR, read
#            the size back, and restore the BAR and the command register.
#   enable   give each BAR an address of its window, aligned to its size and without RAM; then
#            turn on decoding and bus mastering.
#   MSI-X    enable with all vectors masked, mask each entry, turn INTx off, unmask the function;
#            then write address and data of each entry, and unmask the entry.
#
# As on real hardware all of it goes by ports 0xcf8 and 0xcfc. The first one is shared by the
# domain's vCPUs, so one lock is held over both accesses.

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from typing import Final

from ..address import GiB, page_span
from ..errors import DeviceError
from ..ioreq import bdf_number, bdf_text
from .config_cycle import CONFIG_ADDRESS, CONFIG_DATA, CONFIG_ENABLE
from .domain import MockDomain
from .pci_device import PciBar, PciDevice

_DEVICES, _FUNCTIONS = 32, 8
_HEADER_TYPE, _MULTI_FUNCTION = 0x0E, 0x80
_ABSENT = (0xFFFF, 0x0000)
_FIRST_VECTOR, _VECTORS = 0x21, 0xCE
"""The vectors that a vCPU has for devices."""
_MSI_BASE: Final = 0xFEE00000
_PIRQ_DATA: Final = 0x700
"""Delivery mode ExtINT, vector 0."""


class _Window:
    """Addresses for BARs, handed out in ascending order."""

    def __init__(self, start: int, end: int) -> None:
        self.next = start
        self.end = end


class PciDriver:
    """A kernel's PCI code on bus 0 of a mock guest, for tests of devices.

    It does the same for an HVM guest as for a PVH guest. A guest has one of them, as a kernel has.

    Args:
        domain: the guest.
        vcpu: the vCPU that does all accesses; None takes the one whose code the thread runs.

    Attributes:
        domain: as given.
        vcpu: as given.

    Synchronization: any threads. A :class:`.PciDevice` is for one thread at a time.
    """

    def __init__(self, domain: MockDomain, vcpu: int | None = None) -> None:
        if vcpu is not None:
            domain.vcpu_at(vcpu)
        self.domain = domain
        self.vcpu = vcpu
        self._lock = threading.Lock()
        self._vectors = count()
        self._windows = {
            "io": _Window(0x1000, 0x10000),
            "mmio32": _Window(0xE0000000, 0xFEC00000),
            "mmio64": _Window(4 * GiB, 1 << 46),
        }

    def __repr__(self) -> str:
        return f"<PciDriver of mock domain {self.domain.domid}>"

    def read_config(self, bdf: str, offset: int, size: int = 4) -> int:
        """Read configuration space.

        Args:
            bdf: as ``"0000:00:05.0"``.
            offset: in bytes, below 256.
            size: 1, 2 or 4 bytes, which do not cross a multiple of 4.
        """
        with self._lock:
            port = self._select(bdf, offset, size)
            return self.domain.port_in(port, size, vcpu=self.vcpu)

    def write_config(self, bdf: str, offset: int, value: int, size: int = 4) -> None:
        """Write configuration space; as :meth:`read_config`."""
        with self._lock:
            port = self._select(bdf, offset, size)
            self.domain.port_out(port, value, size, vcpu=self.vcpu)

    def _select(self, bdf: str, offset: int, size: int) -> int:
        """Select a register, and return the port that reaches it."""
        if size not in (1, 2, 4) or not 0 <= offset < 256 or offset % 4 + size > 4:
            raise ValueError(
                f"{size} bytes at {offset:#x} must be 1, 2 or 4 within a register below 0x100"
            )
        number = bdf_number(bdf)
        if number >> 16:
            raise ValueError(f"{bdf}: ports 0xcf8 and 0xcfc reach segment 0 only")
        selection = CONFIG_ENABLE | number << 8 | offset & 0xFC
        self.domain.port_out(CONFIG_ADDRESS, selection, vcpu=self.vcpu)
        return CONFIG_DATA | offset & 3

    # --- finding functions --------------------------------------------------------------

    def scan(self) -> list[PciDevice]:
        """Find all functions of bus 0, and the size of their BARs. Nothing is enabled.

        Raises:
            DeviceError: a BAR is broken.
        """
        return [PciDevice(self, bdf) for bdf in self._present()]

    def find(self, bdf: str) -> PciDevice:
        """Return a function, as :meth:`scan` does.

        Raises:
            DeviceError: no function answers there, or a BAR is broken.
        """
        if self.read_config(bdf, 0, 2) in _ABSENT:
            raise DeviceError(f"{bdf}: no PCI function answers; has a server claimed it?")
        return PciDevice(self, bdf_text(bdf_number(bdf)))

    def _present(self) -> Iterator[str]:
        for device in range(_DEVICES):
            for function in range(_FUNCTIONS):
                bdf = f"0000:00:{device:02x}.{function}"
                if self.read_config(bdf, 0, 2) not in _ABSENT:
                    yield bdf
                elif not function:
                    break  # a device without function 0 has no others
                if not function and not self._has_functions(bdf):
                    break

    def _has_functions(self, bdf: str) -> bool:
        return bool(self.read_config(bdf, _HEADER_TYPE, 1) & _MULTI_FUNCTION)

    # --- what functions are given ----------------------------------------------------------

    def allocate(self, bar: PciBar) -> int:
        """Return an address for a BAR: aligned to its size, and without RAM.

        Raises:
            DeviceError: its window has no room left.
        """
        window = self._windows[bar.kind]
        address = -(-window.next // bar.size) * bar.size
        while bar.kind != "io" and (runs := self.domain.p2m.runs(*page_span(address, bar.size))):
            gfn, _, pages = runs[-1]
            address = -(-(gfn + pages << 12) // bar.size) * bar.size
        if address + bar.size > window.end:
            raise DeviceError(
                f"no room for a BAR of {bar.size:#x} bytes ({bar.kind}) below {window.end:#x}"
            )
        window.next = address + bar.size
        return address

    def message(self, pirq: int | None) -> tuple[int, int]:
        """Return address and data for an interrupt message.

        Args:
            pirq: for Xen's form, which has vector 0 and a pirq in the address; None for an
                interrupt vector that no other message of this driver has.

        Raises:
            DeviceError: all vectors of all vCPUs are taken.
        """
        if pirq is not None:
            return _MSI_BASE | (pirq & 0xFF) << 12 | (pirq & ~0xFF) << 32, _PIRQ_DATA
        vcpu, vector = divmod(next(self._vectors), _VECTORS)
        if vcpu >= self.domain.vcpus:
            raise DeviceError(f"all {_VECTORS} interrupt vectors of each vCPU are taken")
        # The APIC's number on Xen is twice the vCPU's.
        return _MSI_BASE | 2 * vcpu << 12, _FIRST_VECTOR + vector
