"""What the tests of the monitor and of its commands share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from xenmapcache import CacheStats
from xenmapcache.observe.answering import Responder
from xenmapcache.observe.snapshot import (
    CacheState,
    CurrentRequest,
    LeaseState,
    ServerState,
    Snapshot,
)
from xenmapcache.observe.sockets import SocketFolder

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
        id=1,
        owner="vga",
        kind="device",
        start=0xA0000,
        end=0xC0000,
        direction=None,
        taken_ns=NOW - 3650 * S,
        stale=False,
        thread="MainThread",
        origin=None,
    ),
    LeaseState(
        id=4,
        owner="disk0",
        kind="dma",
        start=0x7F000,
        end=0x80010,
        direction="from-device",
        taken_ns=NOW - 61 * S,
        stale=True,
        thread="worker-1",
        origin=("device.py:9 in serve", "device.py:77 in start_read"),
    ),
    LeaseState(
        id=9,
        owner="net",
        kind="dma",
        start=0x13F00F000,
        end=0x13F00F800,
        direction="to-device",
        taken_ns=NOW - S // 2,
        stale=False,
        thread="MainThread",
        origin=(),
    ),
)
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
                    1,
                    "port",
                    False,
                    0x1F0,
                    2,
                    NOW - 9 * S,
                    "<PORT region 0x1f0..0x1f8>",
                    "Disk.write",
                ),
                CurrentRequest(None, "callbacks", None, None, None, NOW - 10 * S, None, None),
            ),
        ),
    ),
    omitted=0,
)


@contextmanager
def processes(folder: Path, *snapshots: Snapshot) -> Iterator[None]:
    """Be processes that answer what is given. In the folder there may be others."""
    responders = []
    with SocketFolder(folder, create=True) as opened:
        for each in snapshots:
            answers = {b"state": each.to_json().encode() + b"\n"}
            responders.append(Responder(opened.listen(each.pid), answers.__getitem__, b""))
            responders[-1].start()
    try:
        yield
    finally:
        for responder in responders:
            responder.stop()


class Program:
    """A child process that runs some code, and has printed a line. Also a context manager.

    Args:
        code: it imports what it needs, prints a line when it is ready, and reads a line to wait.
        folder: for the sockets.
        monitor: the value of XENMAPCACHE_MONITOR.

    Attributes:
        said: the line that it has printed.
    """

    def __init__(self, code: str, folder: Path, monitor: str = "") -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "XENMAPCACHE_RUNTIME_DIR": str(folder),
            "XENMAPCACHE_MONITOR": monitor,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.said = self.line()

    def line(self) -> str:
        """Wait for the next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def end(self) -> int:
        """Let it end, and return its status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


STUCK = """
import sys, threading
from xenmapcache import open_cache
cache = open_cache("mock:16M", bucket_shift=16, record_origin=True)
threading.current_thread().name = "worker-1"
stale = cache.map_dma(0x1000, 0x2000, owner="disk0", direction="from-device")
device = cache.map_device(0xA0000, 0x10000, owner="vga\\x1b[31m")
cache.invalidate()
held = threading.Event()
def hold():
    with cache._budget.lock:
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
print("stuck", flush=True)
sys.stdin.readline()
"""
"""A program of which a thread holds the cache's lock for ever. It holds two leases."""
