"""A map cache over Xen guests' memory that tells device mappings from DMA mappings."""

from os import environ as _environ
from typing import TYPE_CHECKING as _TYPE_CHECKING

from .backend import Backend, Capability, copy_pages, open_backend
from .cache import (
    CacheStats,
    DmaDirection,
    Invalidation,
    Lease,
    LeaseInfo,
    LeaseKind,
    MapCache,
    open_cache,
)
from .errors import (
    BackendUnavailableError,
    CacheFullError,
    ClosedError,
    CorruptImageError,
    DeviceError,
    EmptyRangeError,
    FaultError,
    GrantError,
    LeaseError,
    MappingLostError,
    QueueFullError,
    TranslationError,
    UnsupportedOperationError,
    WrongFormatError,
    XenCallError,
    XenMapCacheError,
)
from .escape import escape_logs as _escape_logs
from .guest import GuestMemory
from .mapping import Mapping
from .source import open_source

if _TYPE_CHECKING:
    from .formats.kernel_layout import kernel_layout
    from .guest.addressspace import AddressSpace
    from .guest.vmcoreinfo import find_vmcoreinfo
    from .mock import MockDomain, MockHypervisor
    from .observe.recorder import record
    from .writers.coredump import write_coredump
    from .writers.lime import write_lime
    from .writers.vmcore import write_vmcore

__version__ = "0.1.0"

__all__ = [
    "AddressSpace",
    "Backend",
    "BackendUnavailableError",
    "CacheFullError",
    "CacheStats",
    "Capability",
    "ClosedError",
    "CorruptImageError",
    "DeviceError",
    "DmaDirection",
    "EmptyRangeError",
    "FaultError",
    "GrantError",
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
    "QueueFullError",
    "TranslationError",
    "UnsupportedOperationError",
    "WrongFormatError",
    "XenCallError",
    "XenMapCacheError",
    "copy_pages",
    "find_vmcoreinfo",
    "kernel_layout",
    "open_backend",
    "open_cache",
    "open_source",
    "record",
    "write_coredump",
    "write_lime",
    "write_vmcore",
]

_escape_logs()

if _environ.get("XENMAPCACHE_RECORD"):
    from .observe.recorder import ProcessRecorder as _ProcessRecorder
    from .stream import new_hooks as _new_hooks

    _new_hooks.append(_ProcessRecorder(_environ["XENMAPCACHE_RECORD"]))

if _environ.get("XENMAPCACHE_MONITOR", "0") not in ("", "0"):
    from .observe.monitor import ProcessMonitor as _ProcessMonitor
    from .stream import new_hooks as _new_hooks

    _new_hooks.append(_ProcessMonitor())

# Imported when they are used: they bring much, and few programs need them.
_LATER = {
    "AddressSpace": "guest.addressspace",
    "MockDomain": "mock",
    "MockHypervisor": "mock",
    "find_vmcoreinfo": "guest.vmcoreinfo",
    "kernel_layout": "formats.kernel_layout",
    "record": "observe.recorder",
    "write_coredump": "writers.coredump",
    "write_lime": "writers.lime",
    "write_vmcore": "writers.vmcore",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value
