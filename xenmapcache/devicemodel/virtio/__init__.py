"""virtio devices in Python, for the drivers that guests have already."""

from .block import VirtioBlock
from .buffer import BrokenDriverError, GuestBuffer
from .device import VirtioDevice
from .job import Job
from .mmio import VirtioMmio
from .pci import VirtioPci
from .queue import Request, Virtqueue
from .rng import VirtioRng
from .transport import Transport

__all__ = [
    "BrokenDriverError",
    "GuestBuffer",
    "Job",
    "Request",
    "Transport",
    "VirtioBlock",
    "VirtioDevice",
    "VirtioMmio",
    "VirtioPci",
    "VirtioRng",
    "Virtqueue",
]
