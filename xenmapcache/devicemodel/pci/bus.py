"""PciBus: what a guest without QEMU needs before its kernel scans a PCI bus."""

from __future__ import annotations

from ..regions import Region
from ..registers import RegisterBank
from ..server import IoreqServer
from .bars import release
from .function import PciFunction

_ADDRESS_PORT, _ADDRESS_BYTES = 0xCF8, 4
_HOST_BRIDGE = "0000:00:00.0"
_INTEL, _NATOMA, _BRIDGE_CLASS = 0x8086, 0x1237, 0x060000


class PciBus:
    """PCI bus 0 of a PVH guest: the address port, and a host bridge at 0000:00:00.0.

    Linux uses ports 0xcf8 and 0xcfc only if it reads its address back from 0xcf8, and if bus 0
    has a host bridge. Xen sends what the guest writes to 0xcf8 to the server and takes accesses
    to 0xcfc for it, but it does not answer reads of 0xcf8. A PVH guest's ACPI tables describe no
    bus, so its kernel needs ``pci=noacpi`` too.

        bus = PciBus(server)
        bus.plug()
        PciFunction(server, "0000:00:01.0", ...).plug()

    An HVM guest has such a bus, by QEMU. Do not plug this one there.

    Args:
        server: of the guest.

    Attributes:
        host_bridge: the function at 0000:00:00.0.

    Synchronization: ``plug`` and ``unplug`` one at a time.
    """

    def __init__(self, server: IoreqServer) -> None:
        self.host_bridge = PciFunction(
            server, _HOST_BRIDGE, vendor=_INTEL, device=_NATOMA, class_code=_BRIDGE_CLASS
        )
        self._server = server
        self._address = RegisterBank("PCI address port", _ADDRESS_BYTES, repeatable=True)
        self._address.add("address", 0, _ADDRESS_BYTES, mask=(1 << 32) - 1)
        self._region: Region | None = None

    def plug(self) -> None:
        """Claim the address port and the host bridge; on an error neither.

        Raises:
            ValueError: it is plugged, or this server has claimed one of them.
            XenCallError: Xen refused.
            ClosedError: the server is closed.
        """
        region = self._server.claim_ports(_ADDRESS_PORT, _ADDRESS_BYTES, self._address)
        try:
            self.host_bridge.plug()
        except BaseException:
            release(region)
            raise
        self._region = region

    def unplug(self) -> None:
        """Release both. Can be repeated.

        Raises:
            XenCallError: Xen refused; call it again.
        """
        self.host_bridge.unplug()
        if self._region is not None:
            release(self._region)
            self._region = None
