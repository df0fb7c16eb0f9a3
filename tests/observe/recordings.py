"""Events for tests of recordings: one of each kind, with awkward texts."""

from __future__ import annotations

from typing import Final

from xenmapcache.events import (
    Accessed,
    BucketDropped,
    BucketMapped,
    BucketReplaced,
    CacheClosed,
    CacheOpened,
    Event,
    EventsLost,
    HoleFault,
    Invalidated,
    LeaseHeld,
    LeaseReleased,
    LeaseTaken,
    MapFailed,
    PagesDirtied,
    Quiesced,
    RequestHandled,
    RequestKey,
    RequestsHandled,
    ServerClosed,
    ServerOpened,
)

START: Final = 1_795_930_000_000_000_000
OWNER: Final = 'disk "1"\n\x1b[31m\x7f %d \N{GREEK SMALL LETTER MU}'


def taken(lease: int = 7, owner: str = "disk", at: int = START + 1000) -> LeaseTaken:
    """Return an event of a lease that is taken."""
    return LeaseTaken(at, lease, "dma", 0x5000, 0x2000, owner, "to-device", "MainThread", False)


def released(lease: int = 7, at: int = START + 2_001_000) -> LeaseReleased:
    """Return an event of a lease that is released."""
    return LeaseReleased(at, lease)


EVENTS: Final[list[Event]] = [
    CacheOpened(START, 32768, "xen domain 3 (web)", 1 << 20),
    BucketMapped(START + 1, 0x100000, 0x100000, 30_000, 0x7F0000000000, 8192),
    taken(owner=OWNER)._replace(origin=("disk.py:7 in start", "main.py:1 in run")),
    HoleFault(START + 2000, 0x9000),
    MapFailed(START + 2001, 0xA000),
    PagesDirtied(START + 2002, 0x5000, 0x1000),
    Invalidated(START + 3000, 1, 5, (7, 8), 2500),
    BucketDropped(START + 3000, 0x100000, 0x100000, "invalidated"),
    LeaseReleased(START + 4000, 7, True, 1, 2),
    RequestHandled(START + 5000, -1, 1, False, 0xFEE00000, 4, 9000, "KeyError: '\x1b'", "vga"),
    RequestHandled(START + 5001, 0, 0, True, 0x3F8, 1, 800),
    ServerOpened(START + 5900, 3, "IoreqServer of domain 3"),
    Quiesced(START + 6000, 70_000, 1),
    ServerClosed(START + 6001),
    LeaseHeld(START + 6500, 0x300000, 0x100000, 0x7F1234567000, 2),
    BucketReplaced(START + 6600, 0x300000, 0x500000),
    Accessed({5: 6, 9: 1}),
    RequestsHandled({RequestKey(2, True, 3 << 32 | 4, None): 4, RequestKey(0, False, 0xCF8, 1): 2}),
    EventsLost(None, 12),
    CacheClosed(START + 9_000_000_000),
]
