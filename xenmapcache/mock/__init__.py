"""A small Xen without Xen: domains with a p2m, real memory, vCPUs, ballooning, faults on demand.

Frames live in a memfd and are mapped with real ``mmap``: a hole really faults, a
frame that was ballooned out lives on under old mappings as an orphan, and a gfn that
was ballooned in again has a new frame, so that DMA through a stale mapping is really
lost. All of it can be seen from the guest's side.
"""

from .domain import PAGES_PER_INVALIDATE, MockDomain
from .faults import Call
from .guest_code import GuestCode
from .heap import GuestHeap
from .hypervisor import MockHypervisor
from .interrupts import Interrupt, IntxInterrupt, IsaInterrupt, MsiInterrupt, SpiInterrupt
from .pci_device import MsiVector, PciBar, PciDevice
from .pci_driver import PciDriver
from .saving import MockImage
from .vcpu import Vcpu
from .virtio_driver import VirtioDriver
from .virtio_mmio import MmioTransport
from .virtio_pci import PciTransport
from .virtio_ring import Chain, DriverQueue

__all__ = [
    "PAGES_PER_INVALIDATE",
    "Call",
    "Chain",
    "DriverQueue",
    "GuestCode",
    "GuestHeap",
    "Interrupt",
    "IntxInterrupt",
    "IsaInterrupt",
    "MmioTransport",
    "MockDomain",
    "MockHypervisor",
    "MockImage",
    "MsiInterrupt",
    "MsiVector",
    "PciBar",
    "PciDevice",
    "PciDriver",
    "PciTransport",
    "SpiInterrupt",
    "Vcpu",
    "VirtioDriver",
]
