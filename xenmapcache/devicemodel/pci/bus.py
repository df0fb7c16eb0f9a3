"""PciBus: what a guest without QEMU needs before its kernel scans a PCI bus."""

# Theory of operation
#
# Linux looks for the bus like this: a byte to 0xcfb, an address to 0xcf8, and the address reads
# back. Xen takes the address from the write to 0xcf8, and accesses to 0xcfc with it. But it answers
# no read of 0xcf8, and a server cannot claim reads alone. So each access to configuration space
# would cost a request for its address, too; and Linux, before it looks for the bus, looks for
# devices in all places of 256 buses, which is 17,000 requests for nothing.
#
#            _ENOUGH writes in a row
#   0xcf8..0xcfb claimed  ------------>  0xcfb claimed
#                         <------------
#                         a byte to 0xcfb
#
# A kernel that reads 0xcf8 around each access stays on the left side.

from __future__ import annotations

import contextlib

from ...errors import ClosedError
from ..regions import Region
from ..registers import RegisterBank
from ..server import IoreqServer
from .bars import release
from .function import PciFunction

_ADDRESS_PORT, _ADDRESS_BYTES = 0xCF8, 4
_LAST_BYTE, _LAST_BYTE_SHIFT = 0xCFB, 24
_ENOUGH = 64
"""Writes to the address port without a read, after which nobody is expected to read it."""
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
        whole = RegisterBank("PCI address port", _ADDRESS_BYTES, repeatable=True)
        self._address = whole.add(
            "address", 0, _ADDRESS_BYTES, read=self._read, write=self._count_write
        )
        self._whole = whole
        self._part = RegisterBank("PCI address port, last byte", 1, repeatable=True)
        self._part.add("last_byte", 0, 1, write=self._claim_whole)
        self._region: Region | None = None
        self._is_plugged = False
        self._writes = 0  # since the last read

    def plug(self) -> None:
        """Claim the address port and the host bridge; on an error neither.

        Raises:
            ValueError: it is plugged, or this server has claimed one of them.
            XenCallError: Xen refused.
            ClosedError: the server is closed.
        """
        region = self._server.claim_ports(_ADDRESS_PORT, _ADDRESS_BYTES, self._whole)
        try:
            self.host_bridge.plug()
        except BaseException:
            release(region)
            raise
        self._region, self._writes, self._is_plugged = region, 0, True

    def unplug(self) -> None:
        """Release both. Can be repeated.

        Raises:
            XenCallError: Xen refused; call it again.
        """
        self._is_plugged = False
        self.host_bridge.unplug()  # waits for the handler that runs; no later one claims anything
        if self._region is not None:
            release(self._region)
            self._region = None

    # --- the address port, in the thread that serves ----------------------------------------------

    def _read(self) -> int:
        self._writes = 0
        return self._address.value

    def _count_write(self, _: int) -> None:
        self._writes += 1
        if self._writes >= _ENOUGH:
            self._claim(_LAST_BYTE, 1, self._part)

    def _claim_whole(self, last_byte: int) -> None:
        self._address.value = last_byte << _LAST_BYTE_SHIFT
        self._claim(_ADDRESS_PORT, _ADDRESS_BYTES, self._whole)

    def _claim(self, first: int, count: int, device: RegisterBank) -> None:
        """Claim another part of the port than before."""
        self._writes = 0
        if self._region is None or not self._is_plugged:
            return
        with contextlib.suppress(ClosedError):
            self._region.release()
            self._region = None
            self._region = self._server.claim_ports(first, count, device)
