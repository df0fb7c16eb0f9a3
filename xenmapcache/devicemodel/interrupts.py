"""Interrupts that devices raise in their guest: what may be asked for, and of which guest."""

from __future__ import annotations

from ..address import as_int
from ..errors import UnsupportedOperationError
from ..ioreq import parse_bdf
from .link import HypervisorLink
from .runtime import Runtime

_ISA_IRQS, _PINS = 16, 4


class Interrupts:
    """The interrupts of one server.

    Args:
        runtime: the server's.
        domid: for messages.

    Attributes:
        guest_type: as :func:`.opening.agreed_type` has it; None until the server is open.

    Synchronization: any thread.
    """

    def __init__(self, runtime: Runtime, domid: int) -> None:
        self.guest_type: str | None = None
        self._runtime = runtime
        self._domid = domid

    def inject_msi(self, address: int, data: int) -> None:
        """See :meth:`IoreqServer.inject_msi`."""
        if as_int("address", address) >> 64:
            raise ValueError(f"MSI address {address:#x} does not fit 64 bits")
        if as_int("data", data) >> 32:
            raise ValueError(f"MSI data {data:#x} does not fit 32 bits")
        self._runtime.open_connection().link.inject_msi(address, data)

    def set_isa_irq(self, irq: int, level: bool) -> None:
        """See :meth:`IoreqServer.set_isa_irq`."""
        if not 0 <= as_int("irq", irq) < _ISA_IRQS:
            raise ValueError(f"irq {irq} is not in 0..{_ISA_IRQS - 1}")
        self._link_with_lines().set_isa_irq(irq, level)

    def set_pci_intx(self, bdf: str, pin: int, level: bool) -> None:
        """See :meth:`IoreqServer.set_pci_intx`."""
        if not 0 <= as_int("pin", pin) < _PINS:
            raise ValueError(f"pin {pin} is not in 0..{_PINS - 1}")
        function = parse_bdf(bdf)
        self._link_with_lines().set_pci_intx(function, pin, level)

    def _link_with_lines(self) -> HypervisorLink:
        """Return the link of an HVM guest; no other guest has interrupt lines."""
        connection = self._runtime.open_connection()
        if self.guest_type == "hvm":
            return connection.link
        if self.guest_type is None:
            raise UnsupportedOperationError(
                f"domain {self._domid}: its type is unknown, and a PVH guest has no interrupt "
                'lines; if it is an HVM guest, pass IoreqServer(guest_type="hvm"); inject_msi '
                "works for both"
            )
        raise UnsupportedOperationError(
            f"domain {self._domid}: a {self.guest_type.upper()} guest has no interrupt lines; "
            "inject_msi works"
        )
