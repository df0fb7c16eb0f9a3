"""A long, mixed use of the cache, in a process of its own, and what it leaves behind.

``python -m tests.lifetime.leaks SOURCE OPERATIONS [--leak] [--library FILE --folder FOLDER]``
prints what grew, as JSON. With ``--leak`` one small object is kept for each hundred operations, to
see that it would be noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fake_xen import DOMID, Behaviour, FakeXen
from xenmapcache import (
    Backend,
    CacheFullError,
    DmaDirection,
    FaultError,
    GuestMemory,
    LeaseError,
    MapCache,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.address import PAGE_SHIFT, PAGE_SIZE
from xenmapcache.mapping import live_mappings

PAGES = 512
SIZE = PAGES * PAGE_SIZE
BUCKET = 0x4000
RESIDENT = 24 * BUCKET
HOT = 12 * BUCKET
HOLE = 100 * PAGE_SIZE
SEED = 5


class State(NamedTuple):
    """What a process holds."""

    resident_kib: int
    blocks: int
    objects: int
    descriptors: int
    maps_of_guest: int
    live_mappings: int
    leases: int
    resident_bytes: int


class MockGuest:
    """A guest of the mock."""

    def __init__(self) -> None:
        self.domain = MockHypervisor().create_domain(memory=SIZE, holes=[(HOLE, PAGE_SIZE)])
        self.backend: Backend = open_backend("mock", domain=self.domain)
        self.inode = os.fstat(self.domain.p2m.frames.fileno()).st_ino

    def balloon(self, address: int) -> None:
        """Give a page up, and get another one."""
        self.domain.balloon_out(address, PAGE_SIZE)
        self.domain.balloon_in(address, PAGE_SIZE)

    def fail_next(self) -> None:
        """Let the next map fail."""
        self.domain.inject_fault("map", errno=5)

    def settle(self) -> None:
        """Forget what a test may look at later."""
        self.domain.clear_faults()
        self.domain.dirty_gfns.clear()


class FakeGuest:
    """The guest of the stand-in."""

    def __init__(self, library: Path, folder: Path, binding: str) -> None:
        self.fake = FakeXen(library, folder, pages=PAGES, holes=[(HOLE >> PAGE_SHIFT, 1)])
        self.inode = self.fake.inode
        self.backend: Backend = open_backend(
            "xen", domid=DOMID, binding=binding, library=self.fake.library
        )

    def balloon(self, address: int) -> None:
        """Let a page be away; the next call lets it be there again."""
        gfn = address >> PAGE_SHIFT
        away = self.fake._state.errors[gfn]
        self.fake.set_error(0 if away else 22, gfn)

    def fail_next(self) -> None:
        """Let the next map fail, if no other one waits to."""
        if not any(plan.nth for plan in self.fake._state.plans):
            self.fake.plan("xenforeignmemory_map2", Behaviour.FAIL, 5)

    def settle(self) -> None:
        """Let nothing fail any more."""
        for plan in self.fake._state.plans:
            plan.nth = 0


class Use:
    """One random operation after the other."""

    def __init__(self, guest: MockGuest | FakeGuest) -> None:
        self.guest = guest
        self.cache = MapCache(
            guest.backend, bucket_shift=14, max_resident=RESIDENT, on_stale="copy"
        )
        self.memory = GuestMemory(self.cache)
        self.random = random.Random(SEED)
        self.kept: list[object] = []
        self.leaked: list[object] | None = None
        weighted: dict[Callable[[], object], int] = {
            self.read: 480,
            self.write: 250,
            self.lease: 180,
            self.keep: 20,
            self.read_hole: 8,
            self.read_anywhere: 20,
            self.wide_lease: 4,
            self.device: 4,
            self.move: 3,
            self.stale: 2,
            self.iterate: 2,
            self.invalidate: 2,
            self.balloon: 2,
            self.fail: 1,
            self.full: 1,
            self.released_twice: 4,
        }
        self.operations = list(weighted)
        self.weights = list(weighted.values())

    def run(self, count: int) -> None:
        """Do N operations, and drop what is kept."""
        errors = (FaultError, XenCallError, CacheFullError, LeaseError)
        chosen = self.random.choices(self.operations, self.weights, k=10_000)
        for number in range(count):
            with contextlib.suppress(*errors):
                chosen[number % 10_000]()
            if self.leaked is not None and not number % 100:
                self.leaked.append(object())
        self.kept.clear()
        self.guest.settle()
        self.cache.invalidate()

    def hot(self) -> int:
        """Return an address that is resident nearly always."""
        return int(self.random.random() * (HOT - 64))

    def anywhere(self) -> int:
        """Return any address."""
        return int(self.random.random() * (SIZE - BUCKET))

    def read(self) -> None:
        self.cache.read(self.hot(), 32)

    def write(self) -> None:
        self.cache.write(self.hot(), b"written")

    def lease(self) -> None:
        with self.cache.map_dma(self.hot(), 16, owner="disk") as lease:
            lease.view[:4] = b"data"

    def keep(self) -> None:
        """Keep a view or what was made of it, over evictions and invalidations."""
        with self.cache.map_dma(self.hot(), 32, owner="kept") as lease:
            self.kept.append(lease.view[8:24].cast("Q"))
        if len(self.kept) > 8:
            del self.kept[self.random.randrange(8)]

    def read_hole(self) -> None:
        self.cache.read(HOLE, 8)

    def read_anywhere(self) -> None:
        self.cache.read(self.anywhere(), 64)

    def wide_lease(self) -> None:
        """One that crosses a bucket's edge."""
        address = (self.anywhere() | BUCKET - 1) - 7
        self.cache.map_dma(address, 16, owner="nic", direction=DmaDirection.TO_DEVICE).release()

    def device(self) -> None:
        self.cache.map_device(self.anywhere(), 64, owner="rom").release()

    def move(self) -> None:
        """Move a device lease, to what may be a hole."""
        address, target = self.anywhere(), self.anywhere()
        with self.cache.map_device(address, 16, owner="vga"):
            self.cache.replace(address, target & -PAGE_SIZE | address & PAGE_SIZE - 1, 16)

    def stale(self) -> None:
        """Release DMA that an invalidation has made stale: what it wrote is copied."""
        with self.cache.map_dma(self.hot(), 16, owner="late") as lease:
            self.cache.invalidate()
            lease.view[:4] = b"late"

    def iterate(self) -> None:
        """Go half through a range, and look for what is not there."""
        next(self.cache.views(self.hot(), 2 * BUCKET))
        for _ in self.memory.find(b"no such text", self.hot(), 2 * BUCKET):
            raise AssertionError

    def invalidate(self) -> None:
        self.cache.invalidate()

    def balloon(self) -> None:
        self.guest.balloon(self.anywhere() & -PAGE_SIZE)
        self.cache.invalidate()

    def fail(self) -> None:
        """Let a map fail that a lease wants."""
        self.guest.fail_next()
        self.cache.map_device(self.hot(), 16, owner="refused").release()

    def full(self) -> None:
        """Ask for more than may be resident."""
        self.cache.map_device(0, RESIDENT + 1, owner="too much")

    def released_twice(self) -> None:
        lease = self.cache.map_dma(self.hot(), 16, owner="twice")
        lease.release()
        lease.release()

    def state(self) -> State:
        """Return what is held now."""
        gc.collect()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        return State(
            int(status.split("VmRSS:")[1].split()[0]),
            sys.getallocatedblocks(),
            len(gc.get_objects()),
            len(os.listdir("/proc/self/fd")),
            sum(int(line.split()[4]) == self.guest.inode for line in maps),
            live_mappings(),
            len(self.cache.leases()),
            self.cache.stats().resident_bytes,
        )


def main() -> None:
    """Warm it up, and use it N times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", choices=["mock", "cffi", "ctypes"])
    parser.add_argument("operations", type=int)
    parser.add_argument("--leak", action="store_true", help="then again, with a leak")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    logging.getLogger("xenmapcache").setLevel(logging.CRITICAL)
    guest = (
        MockGuest()
        if options.source == "mock"
        else FakeGuest(options.library, options.folder, options.source)
    )
    use = Use(guest)
    use.state()
    # The mock's log of calls, its largest memory, is full then.
    use.run(100_000 if options.source == "mock" else 20_000)
    report(use, options.operations)
    if options.leak:
        use.leaked = []
        report(use, options.operations)


def report(use: Use, operations: int) -> None:
    """Use a cache, and print what grew."""
    before = use.state()
    use.run(operations)
    after = use.state()
    grew = {name: now - then for name, now, then in zip(State._fields, after, before, strict=True)}
    held = {name: getattr(after, name) for name in State._fields[4:]}
    stats = use.cache.stats()
    counts = {
        name: getattr(stats, name)
        for name in ("maps", "evictions", "hole_faults", "stale_dma_released")
    }
    sys.stdout.write(json.dumps({"grew": grew, "held": held, "counts": counts}) + "\n")


main()
