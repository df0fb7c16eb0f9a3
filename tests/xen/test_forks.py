"""Forked children on a real Xen: whatever the kernel copies for them, our rules are the same."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

import pytest

from tests.xen.lab.platform import Platform
from xenmapcache import ClosedError, DmaDirection, MapCache, open_backend
from xenmapcache.address import MiB
from xenmapcache.mapping import live_mappings

pytestmark = pytest.mark.xen


def in_child(fork: Callable[[], int], work: Callable[[], bool]) -> int:
    """Run something in a forked child; return its status: 0 if it was true."""
    pid = fork()
    if not pid:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def test_a_child_sees_zeros_and_ends_nothing_of_its_parents(
    live_domid: int, machine: Platform, record_property: Callable[[str, object], None]
) -> None:
    """A child's views are private zeros, it uses no cache, and what it drops stays mapped here.

    The same after a fork of C's that Python does not know of, except for what the child sees.
    """
    libc = ctypes.PyDLL(None)
    with open_backend("xen", domid=live_domid) as backend, MapCache(backend) as cache:
        address = next(
            page
            for first, length in cache.present(machine.memory[0] + 16 * MiB, 16 * MiB)
            for page in range(first, first + length, 4096)
            if any(cache.read(page, 64))
        )
        lease = cache.map_dma(address, 64, owner="test", direction=DmaDirection.TO_DEVICE)
        view = lease.view
        before = bytes(view)
        mapped = live_mappings()

        def used() -> bool:
            try:
                cache.read(address, 64)
            except ClosedError:
                return not any(view)
            return False

        def dropped() -> bool:
            cache.invalidate()
            gc.collect()
            return True

        assert in_child(os.fork, used) == 0
        assert in_child(libc.fork, dropped) == 0
        seen = in_child(libc.fork, lambda: bytes(view) == before)
        record_property("measured", f"a child of C's that reads the memory: status {seen:#x}")
        assert live_mappings() == mapped
        assert len(bytes(view)) == 64
        assert cache.read(address, 64) is not None
        lease.release()
