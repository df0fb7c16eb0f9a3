"""libxendevicemodel, checked: ioreq servers, interrupts, and pages that were written.

Follows ``xendevicemodel.h``, VERS_1.0, 1.3 and 1.4, and ``xen/hvm/dm_op.h``.
"""

from __future__ import annotations

import errno as _errno
import struct
from array import array

from ..errors import XenCallError
from .declarations import DEVICE_MODEL
from .handle import Handle

MODIFIED, MODIFIED_BULK = "xendevicemodel_modified_memory", "xendevicemodel_modified_memory_bulk"
TRACK_VRAM = "xendevicemodel_track_dirty_vram"
_BUFIOREQ_OFF, _BUFIOREQ_LEGACY = 0, 1
# struct xen_dm_op_modified_memory_extent: u32 nr, u32 pad, u64 first_pfn
_EXTENT = struct.Struct("=IIQ")


class DeviceModel(Handle):
    """A ``xendevicemodel_handle``; see :class:`.handle.Handle` for arguments and errors.

    Each method raises XenCallError when its call fails. ``domid`` is the guest, an HVM
    or PVH one: Xen refuses a PV guest (EINVAL). ``server`` is an ioreq server's number,
    which belongs to that guest.
    """

    declared = DEVICE_MODEL
    open_call = "xendevicemodel_open"
    close_call = "xendevicemodel_close"
    required = (MODIFIED,)

    # --- ioreq servers ----------------------------------------------------------

    def create_ioreq_server(self, domid: int, buffered: bool) -> int:
        """Create an ioreq server, which is not enabled yet.

        Args:
            domid: the guest.
            buffered: whether it has a page of buffered requests too
                (HVM_IOREQSRV_BUFIOREQ_LEGACY instead of OFF).

        Returns:
            Its number.

        Raises:
            XenCallError: it failed.
        """
        server = array("H", [0])
        mode = _BUFIOREQ_LEGACY if buffered else _BUFIOREQ_OFF
        self.check("xendevicemodel_create_ioreq_server", domid, domid, mode, server)
        return server[0]

    def destroy_ioreq_server(self, domid: int, server: int) -> None:
        """Destroy an ioreq server and give up its ranges; answer what vCPUs wait for before.

        Raises:
            XenCallError: it failed.
        """
        self.check("xendevicemodel_destroy_ioreq_server", domid, domid, server)

    def set_ioreq_server_state(self, domid: int, server: int, enabled: bool) -> None:
        """Let requests come, or none any more.

        The vCPUs' event channels are in the shared page only once it is enabled.

        Raises:
            XenCallError: it failed.
        """
        name = "xendevicemodel_set_ioreq_server_state"
        self.check(name, domid, domid, server, int(enabled))

    def buffered_port(self, domid: int, server: int) -> int:
        """Return the guest's event channel port that tells of buffered requests.

        Raises:
            XenCallError: it failed.
        """
        # Asked for the frames, Xen would put the pages into the guest's memory: NULL.
        port = array("I", [0])
        name = "xendevicemodel_get_ioreq_server_info"
        self.check(name, domid, domid, server, None, None, port)
        return port[0]

    def has_ioreq_server(self, domid: int, server: int) -> bool:
        """Tell whether an ioreq server exists. Xen destroys it when its domain ends.

        Raises:
            XenCallError: it failed, and not because the server or the domain is gone.
        """
        try:
            self.buffered_port(domid, server)
        except XenCallError as error:
            if error.errno not in (_errno.ENOENT, _errno.ESRCH):
                raise
            return False
        return True

    def nr_vcpus(self, domid: int) -> int:
        """Return how many vCPUs a domain can have, those that are offline included.

        Raises:
            XenCallError: it failed.
            UnsupportedOperationError: the library is of before Xen 4.15.
        """
        vcpus = array("I", [0])
        self.check("xendevicemodel_nr_vcpus", domid, domid, vcpus)
        return vcpus[0]

    def map_io_range(self, domid: int, server: int, is_mmio: bool, first: int, last: int) -> None:
        """Claim I/O ports or guest addresses for an ioreq server.

        Args:
            domid: the guest.
            server: the ioreq server.
            is_mmio: guest physical addresses; False: I/O ports.
            first: of the range.
            last: of the range, inclusive.

        Raises:
            XenCallError: it failed; EEXIST: it overlaps a range that this server has.
        """
        name = "xendevicemodel_map_io_range_to_ioreq_server"
        self.check(name, domid, domid, server, int(is_mmio), first, last)

    def unmap_io_range(self, domid: int, server: int, is_mmio: bool, first: int, last: int) -> None:
        """Give up a range, with the same arguments that claimed it.

        Raises:
            XenCallError: it failed; ENOENT: there is no such range.
        """
        name = "xendevicemodel_unmap_io_range_from_ioreq_server"
        self.check(name, domid, domid, server, int(is_mmio), first, last)

    def map_pcidev(
        self, domid: int, server: int, segment: int, bus: int, device: int, function: int
    ) -> None:
        """Claim the configuration space of an emulated PCI device for an ioreq server.

        Raises:
            XenCallError: it failed; EEXIST: this server has it.
        """
        name = "xendevicemodel_map_pcidev_to_ioreq_server"
        self.check(name, domid, domid, server, segment, bus, device, function)

    def unmap_pcidev(
        self, domid: int, server: int, segment: int, bus: int, device: int, function: int
    ) -> None:
        """Give up the configuration space of a PCI device.

        Raises:
            XenCallError: it failed; ENOENT: this server does not have it.
        """
        name = "xendevicemodel_unmap_pcidev_from_ioreq_server"
        self.check(name, domid, domid, server, segment, bus, device, function)

    # --- memory -----------------------------------------------------------------

    def modified_memory(self, domid: int, gfn: int, count: int) -> None:
        """Report written pages to Xen. Call it after the write.

        It has no effect unless the guest is being migrated.
        Call ``modified_memory_bulk``, or ``modified_memory`` where the library is older.

        Args:
            domid: the guest.
            gfn: the first page's frame number.
            count: pages.

        Raises:
            XenCallError: it failed, and any of the pages may or may not be noted.
        """
        if self.supports(MODIFIED_BULK):
            extent = bytearray(_EXTENT.pack(count, 0, gfn))
            self.check(MODIFIED_BULK, domid, domid, extent, 1)
        else:
            self.check(MODIFIED, domid, domid, gfn, count)

    def track_dirty_vram(self, domid: int, gfn: int, count: int) -> bytes:
        """Return which pages were written since the last call for the same range.

        Xen keeps one range for each guest. The first call for another range sets every bit.

        Args:
            domid: the guest.
            gfn: the first page's frame number.
            count: pages; 0 ends the tracking.

        Returns:
            A bitmap: bit 0 of byte 0 is the first page.

        Raises:
            XenCallError: it failed; ENODATA: Xen did not keep track, and all pages may be written.
        """
        bitmap = array("L", bytes(-(-count // 64) * 8 or 8))
        self.check(TRACK_VRAM, domid, domid, gfn, count, bitmap)
        return bitmap.tobytes()[: -(-count // 8)]

    # --- interrupts -------------------------------------------------------------

    def inject_msi(self, domid: int, address: int, data: int) -> None:
        """Send a message-signalled interrupt, as a device does that writes to 0xfee.....

        Args:
            domid: the guest.
            address: that the guest has put into the device's MSI capability.
            data: as well.

        Raises:
            XenCallError: it failed.
        """
        self.check("xendevicemodel_inject_msi", domid, domid, address, data)

    def set_isa_irq_level(self, domid: int, irq: int, level: bool) -> None:
        """Raise or lower an ISA interrupt line, 0 to 15.

        Raises:
            XenCallError: it failed.
        """
        self.check("xendevicemodel_set_isa_irq_level", domid, domid, irq, int(level))

    def set_pci_intx_level(
        self, domid: int, segment: int, bus: int, device: int, pin: int, level: bool
    ) -> None:
        """Raise or lower an interrupt pin of an emulated PCI device.

        Args:
            domid: the guest.
            segment: of the device; Xen knows 0 only.
            bus: as well.
            device: 0 to 31.
            pin: 0 (INTA) to 3 (INTD).
            level: asserted or not.

        Raises:
            XenCallError: it failed.
        """
        name = "xendevicemodel_set_pci_intx_level"
        self.check(name, domid, domid, segment, bus, device, pin, int(level))

    def set_irq_level(self, domid: int, irq: int, level: bool) -> None:
        """Raise or lower an interrupt line of an Arm guest: a shared peripheral interrupt (SPI).

        Args:
            domid: the guest.
            irq: the interrupt's number, 32 or more; not one of a device that was passed through.
            level: asserted or not.

        Raises:
            XenCallError: it failed.
            UnsupportedOperationError: the library is of before Xen 4.15.
        """
        self.check("xendevicemodel_set_irq_level", domid, domid, irq, int(level))
