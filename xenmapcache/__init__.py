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
from .source import open_source

if _TYPE_CHECKING:
    from .coredump_writer import write_coredump
    from .mock import MockDomain, MockHypervisor

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

# Imported when they are used: they bring much, and few programs need them.
_LATER = {
    "MockDomain": "mock",
    "MockHypervisor": "mock",
    "write_coredump": "coredump_writer",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value
