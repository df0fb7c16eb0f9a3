"""Interrupts that devices raise in their guest: what may be asked for, and of which guest."""

from __future__ import annotations

from ..address import as_int
from ..arch import Architecture
from ..errors import UnsupportedOperationError
from ..ioreq import parse_bdf
from .link import HypervisorLink
from .runtime import Runtime

_ISA_IRQS, _PINS = 16, 4
_FIRST_SPI, _SPI_END = 32, 1020
"""A GIC's shared peripheral interrupts; lower numbers are a CPU's own."""


class RaisesInterrupts:
    """The methods of a server that raise an interrupt in its guest.

    Args:
        domid: the domain's number.
        runtime: the server's.
        architecture: the guest's.

    Attributes:
        domid: the domain's number.

    Synchronization: any thread.
    """

    def __init__(self, domid: int, runtime: Runtime, architecture: Architecture) -> None:
        self.domid = domid
        self._runtime = runtime
        self._architecture = architecture
        self._guest_type: str | None = None  # until the server is open

    def inject_msi(self, address: int, data: int) -> None:
        """Raise a message-signalled interrupt, as an x86 guest has programmed it.

        Raises:
            ValueError: the address does not fit 64 bits, or the data 32 bits.
            UnsupportedOperationError: the guest is an Arm guest.
            XenCallError: Xen refused.
            ClosedError: the server is not open.
        """
        if as_int("address", address) >> 64:
            raise ValueError(f"MSI address {address:#x} does not fit 64 bits")
        if as_int("data", data) >> 32:
            raise ValueError(f"MSI data {data:#x} does not fit 32 bits")
        self._link_of_x86("inject_msi").inject_msi(address, data)

    def set_isa_irq(self, irq: int, level: bool) -> None:
        """Set the level of an ISA interrupt line, 0 to 15, of an HVM guest.

        Raises:
            ValueError: there is no such line.
            UnsupportedOperationError: the guest is not HVM, or nobody says what it is.
            XenCallError, ClosedError: as :meth:`inject_msi`.
        """
        if not 0 <= as_int("irq", irq) < _ISA_IRQS:
            raise ValueError(f"irq {irq} is not in 0..{_ISA_IRQS - 1}")
        self._link_with_lines("set_isa_irq").set_isa_irq(irq, level)

    def set_pci_intx(self, bdf: str, pin: int, level: bool) -> None:
        """Set a PCI function's interrupt pin, 0 (INTA) to 3, of an HVM guest.

        Raises:
            ValueError: there is no such pin, or ``bdf`` names no PCI function.
            UnsupportedOperationError, XenCallError, ClosedError: as :meth:`set_isa_irq`.
        """
        if not 0 <= as_int("pin", pin) < _PINS:
            raise ValueError(f"pin {pin} is not in 0..{_PINS - 1}")
        function = parse_bdf(bdf)
        self._link_with_lines("set_pci_intx").set_pci_intx(function, pin, level)

    def set_irq_level(self, irq: int, level: bool) -> None:
        """Set the level of an interrupt line, 32 to 1019, of an Arm guest.

        The line is a shared peripheral interrupt (SPI) of the guest's interrupt controller. A
        device tree counts SPIs from 0, so its number 8 is ``irq=40``.

        Raises:
            ValueError: there is no such SPI.
            UnsupportedOperationError: the guest is not an Arm guest, or Xen's libraries are older
                than 4.15.
            XenCallError, ClosedError: as :meth:`inject_msi`.
        """
        if not _FIRST_SPI <= as_int("irq", irq) < _SPI_END:
            raise ValueError(f"irq {irq} is not in {_FIRST_SPI}..{_SPI_END - 1}")
        link = self._runtime.open_connection().link
        if not self._architecture.mmio_only:
            raise UnsupportedOperationError(
                f"domain {self.domid}: set_irq_level is for Arm guests, and this is an x86 guest; "
                "use inject_msi; an HVM guest also has set_isa_irq and set_pci_intx"
            )
        link.set_irq_level(irq, level)

    def _link_of_x86(self, method: str) -> HypervisorLink:
        """Return the link of an x86 guest."""
        link = self._runtime.open_connection().link
        if self._architecture.mmio_only:
            raise UnsupportedOperationError(
                f"domain {self.domid}: {method} is for x86 guests, and this is an Arm guest; "
                "use set_irq_level"
            )
        return link

    def _link_with_lines(self, method: str) -> HypervisorLink:
        """Return the link of an HVM guest; no other guest has interrupt lines."""
        link = self._link_of_x86(method)
        if self._guest_type == "hvm":
            return link
        if self._guest_type is None:
            raise UnsupportedOperationError(
                f"domain {self.domid}: its type is unknown, and a PVH guest has no interrupt "
                'lines; if it is an HVM guest, pass IoreqServer(guest_type="hvm"); inject_msi '
                "works for both"
            )
        raise UnsupportedOperationError(
            f"domain {self.domid}: a {self._guest_type.upper()} guest has no interrupt lines; "
            "inject_msi works"
        )
