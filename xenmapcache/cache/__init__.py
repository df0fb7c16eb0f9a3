"""The map cache: :class:`MapCache`, its leases, and what it reports of itself."""

from .info import CacheStats, DmaDirection, Invalidation, LeaseInfo, LeaseKind, OnStale
from .lease import Lease
from .mapcache import MapCache
from .opening import open_cache

__all__ = [
    "CacheStats",
    "DmaDirection",
    "Invalidation",
    "Lease",
    "LeaseInfo",
    "LeaseKind",
    "MapCache",
    "OnStale",
    "open_cache",
]
