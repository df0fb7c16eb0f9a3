"""Strict views, for tests: a lease knows whether views of it are in use."""

# Theory of operation
#
# A memoryview that is released says nothing of its slices, and a NumPy array has no release. But
# all of them keep the exporter, the object whose memory they show. With ``strict_views`` each call
# of ``Lease.view`` makes an exporter of its own, a ctypes array over the lease's bytes, and the
# lease has weak references to them: one that is alive has a user. The array keeps the mapping's
# memory; it is taken out of the collector's hands like the mapping's own memory,
# for the same reason: otherwise a garbage cycle would count as ended while it still has to run.

from __future__ import annotations

import ctypes
import weakref

from ..binding.collector import untrack
from ..mapping import Mapping


class Views:
    """The views of one lease that callers were given.

    Synchronization: any thread may call; a view that another thread asks for during
    :meth:`in_use` may be missed.
    """

    __slots__ = ("_exporters",)

    def __init__(self) -> None:
        self._exporters: list[weakref.ref[object]] = []

    def make(self, mapping: Mapping, host_address: int, length: int, readonly: bool) -> memoryview:
        """Return a view of bytes of a mapping whose end can be seen."""
        # SAFETY: the lease lies in its mapping, whose memory `kept` keeps for as long as the
        # array lives.
        array = (ctypes.c_char * length).from_address(host_address)
        array.kept = mapping.memory  # type: ignore[attr-defined] # ctypes arrays have a __dict__
        untrack(array)
        self._exporters = [each for each in [*self._exporters] if each() is not None]
        self._exporters.append(weakref.ref(array))
        view = memoryview(array).cast("B")
        return view.toreadonly() if readonly else view

    def in_use(self) -> int:
        """Return how many of them, or parts of them, are in use."""
        return [each() is not None for each in [*self._exporters]].count(True)
