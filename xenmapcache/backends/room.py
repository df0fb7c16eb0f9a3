"""How much of a live guest a cache maps by default.

A PV Dom0 pays only page tables for what it maps. On Arm and in a PVH Dom0, the kernel needs a page
frame for each mapped page, missing pages included. It takes the frame from Dom0's own memory, or
from unused address space where it was built with CONFIG_XEN_UNPOPULATED_ALLOC; from here it cannot
be seen which. When that memory runs out, the kernel kills processes before a map call fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..address import MiB
from ..backend import Backend

GUEST_TYPE = Path("/sys/hypervisor/guest_type")
MEMINFO = Path("/proc/meminfo")
MIN_ROOM: Final = 64 * MiB
_SHARE: Final = 4


def mapping_room() -> int:
    """Return a bound for the memory that a cache maps, in bytes.

    That is a quarter of the available memory where mapped pages may take it, but at least 64 MiB.
    """
    try:
        if GUEST_TYPE.read_text().strip() == "PV":
            return Backend.mapping_room
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return Backend.mapping_room
    known = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return max(MIN_ROOM, min([Backend.mapping_room, *(kib * 1024 // _SHARE for kib in known)]))
