"""What CPython's garbage collector must not know, and what it should start.

The collector finalizes the objects of a garbage cycle in any order, and handles weak references to
them even before. An object that other objects still use in their finalizers must therefore
be freed by its reference count alone.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping

from .ctypes_loader import cause_of

_OLDEST_GENERATION = 2

_untrack = ctypes.pythonapi["PyObject_GC_UnTrack"]
_untrack.argtypes, _untrack.restype = [ctypes.py_object], None


def untrack(thing: object) -> None:
    """Take an object out of the collector's hands.

    The object must not refer, directly or not, to anything that refers to it: such a cycle would
    never be freed. Follows ``PyObject_GC_UnTrack`` of CPython's C API.

    Raises:
        MemoryError, RecursionError: ctypes could not make the call.
    """
    try:
        _untrack(thing)
    except ctypes.ArgumentError as error:
        raise cause_of(error) from error


_sweeps: list[Callable[[], object]] = []


def sweep_after_collections(sweep: Callable[[], object]) -> None:
    """Have a function called after each full collection.

    A weak reference's callback that was interrupted, or that had no memory, leaves work undone.
    Without this it would stay undone until the next call of the package.
    """
    _sweeps.append(sweep)


def _after_collection(phase: str, info: Mapping[str, int]) -> None:
    if phase == "stop" and info["generation"] == _OLDEST_GENERATION:
        for sweep in _sweeps:
            sweep()


gc.callbacks.append(_after_collection)
