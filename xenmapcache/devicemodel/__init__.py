"""Device models in Python: an ioreq server over live Xen or over the mock."""

from .dma import DmaEngine
from .dma_async import AsyncDmaEngine
from .dma_transfer import DmaStatus, DmaTransfer
from .pci import MsiCapability, MsixTable, PciBus, PciFunction
from .regions import Device, Region
from .registers import Register, RegisterBank
from .server import IoreqServer

__all__ = [
    "AsyncDmaEngine",
    "Device",
    "DmaEngine",
    "DmaStatus",
    "DmaTransfer",
    "IoreqServer",
    "MsiCapability",
    "MsixTable",
    "PciBus",
    "PciFunction",
    "Region",
    "Register",
    "RegisterBank",
]
