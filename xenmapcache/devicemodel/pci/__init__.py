"""PCI functions: configuration space, BARs, MSI and MSI-X, and a bus for guests without QEMU."""

from .bus import PciBus
from .function import PciFunction
from .msi import MsiCapability
from .msix import MsixTable

__all__ = ["MsiCapability", "MsixTable", "PciBus", "PciFunction"]
