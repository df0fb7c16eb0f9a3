"""How much of a live guest a cache maps by default.

A PV Dom0 pays only page tables for what it maps. On Arm and in a PVH Dom0, the kernel needs a page
frame for each mapped page, missing pages included. It takes the frame from Dom0's own memory, or
from unused address space where it was built with CONFIG_XEN_UNPOPULATED_ALLOC; from here it cannot
be seen which. When that memory runs out, the kernel kills processes before a map call fails.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Final

from ..address import MiB
from ..backend import Backend, RoomUser

GUEST_TYPE = Path("/sys/hypervisor/guest_type")
MEMINFO = Path("/proc/meminfo")
MIN_ROOM: Final = 64 * MiB
_SHARE: Final = 4


# Each cache that was made here, until it is garbage. The callbacks are C functions, which no
# interrupt can come into. Two threads may make caches at once: each adds its own, with the highest
# limit that it can get, before it looks at the others.
_users: dict[weakref.ref[RoomUser], None] = {}


def mapping_room() -> int:
    """Return a bound for the memory that a cache maps which is made now, in bytes.

    Where mapped pages may take the available memory, that is a quarter of what the caches of this
    process leave of it, but at least 64 MiB.
    """
    available = _available()
    return Backend.mapping_room if available is None else _part_of(available)


def share_room(user: RoomUser) -> int:
    """Return that bound for a new cache, whose own room is taken off that of later ones."""
    available = _available()
    if available is None:
        return Backend.mapping_room
    user.limit = available // _SHARE
    _users[weakref.ref(user, _users.pop)] = None
    return _part_of(available, user)


def _available() -> int | None:
    """Return how many bytes mapped pages may take; None if they take none, or nobody knows."""
    try:
        if GUEST_TYPE.read_text().strip() == "PV":
            return None
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    known = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return known[0] * 1024 if known else None


def _part_of(available: int, new: RoomUser | None = None) -> int:
    """Return the part for one cache, of what the other ones may not map."""
    others = [reference() for reference in [*_users]]
    taken = sum(user.may_map for user in others if user is not None and user is not new)
    return max(MIN_ROOM, min(Backend.mapping_room, (available - taken) // _SHARE))
