"""What the tests of the monitor and of its commands share."""

from __future__ import annotations

from xenmapcache import CacheStats
from xenmapcache.observe.snapshot import (
    CacheState,
    CurrentRequest,
    LeaseState,
    ServerState,
    Snapshot,
)

S = 1_000_000_000
NOW = 1_800_000_000 * S

STATS = CacheStats(
    slow_path_hits=11,
    misses=5,
    maps=7,
    unmaps=4,
    evictions=1,
    hole_faults=2,
    invalidations=3,
    stale_dma_released=1,
    stale_dma_held=1,
    resident_bytes=0x300000,
    resident_buckets=2,
    device_leases=1,
    dma_leases=2,
    copied_bytes=0,
    windows=0,
)
LEASES = (
    LeaseState(
        1, "vga", "device", 0x1000, 0x2000, None, NOW - 100 * S, False, "MainThread", None
    ),
    LeaseState(
        4,
        "disk0 \x1b[31m",
        "dma",
        0x7F000,
        0x80010,
        "from-device",
        NOW - 61 * S,
        True,
        "worker-1",
        ("disk.py:9 in serve", "disk.py:77 in start_read"),
    ),
    LeaseState(
        9, "net", "dma", 0, 1 << 52, "to-device", NOW - S // 2, False, "MainThread", ()
    ),
)  # fmt: skip
SNAPSHOT = Snapshot(
    pid=4321,
    argv="python3 device.py --disk0",
    started_ns=NOW - 3700 * S,
    now_ns=NOW,
    caches=(
        CacheState("MapCache of <xen backend of domain 3>", 3, False, STATS, LEASES, 0, False),
        CacheState("MapCache of <raw backend>", None, True, STATS, (), 2, False),
    ),
    servers=(
        ServerState(
            "<IoreqServer of domain 3, open>",
            3,
            17,
            3,
            1,
            0,
            (
                CurrentRequest(
                    1, "port", False, 0x1F0, 2, NOW - 9 * S, "<PORT region 0x1f0..0x1f8>", "Disk.w"
                ),
                CurrentRequest(None, "callbacks", None, None, None, NOW - 10 * S, None, None),
            ),
        ),
    ),
    omitted=0,
)
