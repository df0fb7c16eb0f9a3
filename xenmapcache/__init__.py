"""A map cache over Xen guests' memory that tells device mappings from DMA mappings."""

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
]
