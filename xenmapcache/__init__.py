"""A map cache over Xen guests' memory that tells device mappings from DMA mappings."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from .backend import Backend, Capability, open_backend
from .cache import CacheStats, Invalidation, MapCache
from .errors import (
    BackendUnavailableError,
    CacheFullError,
    ClosedError,
    CorruptImageError,
    FaultError,
    LeaseError,
    MappingLostError,
    UnsupportedOperationError,
    XenCallError,
    XenMapCacheError,
)
from .guest import GuestMemory
from .lease import Lease
from .ledger import DmaDirection, LeaseInfo, LeaseKind
from .mapping import Mapping
from .mock import MockDomain, MockHypervisor
from .source import open_source

if _TYPE_CHECKING:
    from .coredump_writer import write_coredump

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "CacheFullError",
    "CacheStats",
    "Capability",
    "ClosedError",
    "CorruptImageError",
    "DmaDirection",
    "FaultError",
    "GuestMemory",
    "Invalidation",
    "Lease",
    "LeaseError",
    "LeaseInfo",
    "LeaseKind",
    "MapCache",
    "Mapping",
    "MappingLostError",
    "MockDomain",
    "MockHypervisor",
    "UnsupportedOperationError",
    "XenCallError",
    "XenMapCacheError",
    "open_backend",
    "open_source",
    "write_coredump",
]


def __getattr__(name: str) -> object:
    # Imported when it is used: it brings what reads and writes files, and few need that.
    if name == "write_coredump":
        from .coredump_writer import write_coredump

        globals()[name] = write_coredump
        return write_coredump
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
