"""Operations of the cache and of leases, over the mock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from xenmapcache import (
    CacheFullError,
    ClosedError,
    DmaDirection,
    Lease,
    LeaseError,
    LeaseKind,
    MapCache,
    MockHypervisor,
    open_backend,
)
from xenmapcache.cache import OnStale

from .injector import Outcome
from .world import Operation, World

PAGE: Final = 4096
PAGES: Final = 32
BUCKET_SHIFT: Final = 13
BUCKET: Final = 1 << BUCKET_SHIFT
ROOM: Final = 4 * BUCKET


def marked(page: int) -> bytes:
    """Return what a page holds at the start: its number at both of its ends."""
    mark = b"page%04d" % page
    return mark + bytes(PAGE - 16) + mark


IMAGE: Final = b"".join(map(marked, range(PAGES)))
RENEWED: Final = b"renewed!" + bytes(PAGE - 8)
"""What page 1 holds once a handler has let the guest give it up and take another one."""
WRITTEN: Final = b"written!"
BY_DEVICE: Final = b"transfer"


class CacheWorld(World):
    """A guest of 32 pages and a cache with room for four buckets of two."""

    permitted: ClassVar = {
        "close": (ClosedError, LeaseError),
        "other thread": (ClosedError,),
    }

    def __init__(self, folder: Path, on_stale: OnStale = "warn") -> None:
        super().__init__(folder)
        self.domain = MockHypervisor().create_domain(memory=PAGES * PAGE)
        self.domain.write(0, IMAGE)
        self.backend = open_backend("mock", domain=self.domain)
        self.cache = MapCache(
            self.backend, bucket_shift=BUCKET_SHIFT, max_resident=ROOM, on_stale=on_stale
        )
        self.domain.on_invalidate(self.invalidate_open)
        self.lease: Lease | None = None
        self.other_lease: Lease | None = None
        self.renewed = False
        self.closed = False

    def invalidate_open(self) -> None:
        """Invalidate the cache, unless it is closed, as a device model's owner does."""
        with contextlib.suppress(*((ClosedError,) if self.closed else ())):
            self.cache.invalidate()

    # --- handlers ---------------------------------------------------------------------

    def handle(self, name: str) -> None:
        """Do what a handler does; in the middle of close() the cache may be closed already."""
        if self.closed and name in ("read", "write", "evict"):
            with contextlib.suppress(ClosedError):
                getattr(self, f"handle_{name}")()
            return
        super().handle(name)

    def handle_read(self) -> None:
        """Read where the operation is at work, and elsewhere."""
        for page in (3, 9, 17):
            if self.cache.read(page * PAGE, 8) != IMAGE[page * PAGE : page * PAGE + 8]:
                self.problem(f"the handler read wrong bytes from page {page}")

    def handle_write(self) -> None:
        """Write next to where the operation is at work, and elsewhere."""
        for page in (3, 17):
            self.cache.write(page * PAGE + 0x800, WRITTEN)

    def handle_evict(self) -> None:
        """Read so much that everything that can be evicted is."""
        for bucket in range(6, 12):
            page = bucket << BUCKET_SHIFT >> 12
            if self.cache.read(page * PAGE, 8) != IMAGE[page * PAGE : page * PAGE + 8]:
                self.problem(f"the handler read wrong bytes from page {page}")

    def handle_invalidate(self) -> None:
        """Let the guest give page 1 up and take another one."""
        self.domain.balloon_out(PAGE, PAGE)
        self.domain.balloon_in(PAGE, PAGE)
        self.domain.write(PAGE, RENEWED)
        self.renewed = True

    def handle_close(self) -> None:
        """Close the cache, whatever is held."""
        self.closed = True
        self.cache.close(force=True)

    # --- checks -------------------------------------------------------------------------

    def check(self, outcome: Outcome) -> None:
        """Find held locks, stale bytes, unreported writes, and leases that nobody knows."""
        self.check_locks(self.cache, self.backend, self.domain)
        self.in_thread("work with the cache", self.work)
        self.check_leases()
        self.check_dirty()
        if not self.closed:
            self.check_stale()

    def work(self) -> None:
        """Do what needs every lock of the cache."""
        self.cache.stats()
        self.cache.leases()
        if self.cache.read(28 * PAGE, 8) != IMAGE[28 * PAGE :][:8]:
            self.problem("another thread read wrong bytes")
        self.cache.map_dma(26 * PAGE, 64, owner="check", direction=DmaDirection.TO_DEVICE).release()

    def check_leases(self) -> None:
        """Find leases that are neither held nor released, or not stale although they are."""
        held = {info.id for info in self.cache.leases()}
        for lease in filter(None, (self.lease, self.result)):
            if not isinstance(lease, Lease):
                continue
            if self.closed and self.result is lease and not lease.released:
                self.problem("a lease was given by a closed cache")
            if not lease.released and lease.id not in held:
                self.problem("a lease is neither released nor in leases()")
            guest = self.domain.read(lease.address, lease.length)
            if lease.kind is LeaseKind.DEVICE and self.renewed:
                continue  # it keeps its page across an invalidation
            if not lease.released and not lease.stale and bytes(lease.view) != guest:
                self.problem("a lease shows another page than the guest's and is not stale")

    def check_dirty(self) -> None:
        """Find pages that were written through the cache and not reported."""
        dirty = self.domain.dirty_gfns
        excused = {1} if self.renewed else set()
        for info in self.cache.leases():  # theirs are reported when they are released
            excused |= set(
                range(info.address // PAGE, (info.address + info.length - 1) // PAGE + 1)
            )
        memory = self.domain.read(0, len(IMAGE))
        for page in range(PAGES):
            start = page * PAGE
            changed = memory[start : start + PAGE] != IMAGE[start : start + PAGE]
            if changed and page not in dirty and page not in excused:
                self.problem(f"page {page} was written and is not reported dirty")

    def check_stale(self) -> None:
        """Find what the cache shows and the guest does not have, or the other way round."""
        with self.noting("a read"):
            for page in (1, 4, 1, 1):
                seen, guest = self.cache.read(page * PAGE, 8), self.domain.read(page * PAGE, 8)
                if seen != guest:
                    self.problem(f"stale: the cache shows {seen!r}, the guest has {guest!r}")
        with self.noting("a write"):
            self.cache.write(PAGE + 0x900, WRITTEN)
            if self.domain.read(PAGE + 0x900, 8) != WRITTEN:
                self.problem("a write after an invalidation did not reach the guest")
        with self.noting("a lease"):
            lease = self.cache.map_dma(PAGE, 64, owner="check")
            if bytes(lease.view[:8]) != self.domain.read(PAGE, 8):
                self.problem("a new lease shows an old page")
            lease.release()

    def end(self) -> None:
        """Release, close twice, and compare the accounting."""
        with self.noting("the last release", LeaseError):
            if self.lease is not None and not self.lease.released:
                self.lease.release()
        self.check_dirty()
        self.lease = self.other_lease = self.result = None
        for _ in range(2):
            with self.noting("close(force=True)"):
                self.cache.close(force=True)
        if self.cache.leases():
            self.problem(f"after close there are leases: {self.cache.leases()}")
        self.check_dirty()
        self.check_accounting(self.cache)
        self.backend.close()


# --- operations -----------------------------------------------------------------------------


def fill(world: CacheWorld) -> None:
    """Use all room, but not for page 1."""
    for bucket in range(1, 5):
        world.cache.read(bucket << BUCKET_SHIFT, 8)


def warm(world: CacheWorld) -> None:
    """Make pages 1 and 4 hits, for reading and for writing."""
    for page in (1, 4):
        for _ in range(3):
            world.cache.read(page * PAGE, 8)
            world.cache.write(page * PAGE + 0x700, b"warm")
    world.domain.dirty_gfns.update((1, 4))


def once(world: CacheWorld) -> None:
    """Have page 1 resident, but not yet on the fast path."""
    world.cache.read(PAGE, 8)


def read(world: CacheWorld, address: int = PAGE, length: int = 8) -> None:
    """Read, and compare."""
    data = world.cache.read(address, length)
    expected = [IMAGE[address : address + length]]
    if world.renewed:
        expected.append(world.domain.read(address, length))
    if data not in expected:
        world.problem(f"read returned {data!r:.60}")


def read_into(world: CacheWorld) -> None:
    """Read over an edge into a buffer."""
    buffer = bytearray(16)
    world.cache.read_into(BUCKET - 8, buffer)
    if buffer != IMAGE[BUCKET - 8 : BUCKET + 8] and not world.renewed:
        world.problem(f"read_into gave {bytes(buffer)!r}")


def views(world: CacheWorld) -> None:
    """Look at three buckets, one after the other."""
    data = b"".join(bytes(view[:4]) for view in world.cache.views(PAGE, 2 * BUCKET))
    if len(data) != 12:
        world.problem(f"views gave {data!r}")


def write(world: CacheWorld, address: int = PAGE + 16, length: int = 8) -> None:
    """Write a pattern."""
    world.cache.write(address, (WRITTEN * (length // 8 + 1))[:length])


def write_again(world: CacheWorld, address: int = PAGE + 16, length: int = 8) -> None:
    """Write again, after which the guest must have it."""
    write(world, address, length)
    if world.domain.read(address, length) != (WRITTEN * (length // 8 + 1))[:length]:
        world.problem("a second write did not reach the guest")


def take(world: CacheWorld, address: int = PAGE, length: int = 64) -> None:
    """Take a DMA lease."""
    world.result = world.cache.map_dma(address, length, owner="interrupted")


def take_device(world: CacheWorld) -> None:
    """Take a device lease."""
    world.result = world.cache.map_device(PAGE, 64, owner="interrupted")


def scattered(world: CacheWorld) -> None:
    """Use all room, and have page 2 in another frame than its neighbours."""
    fill(world)
    world.domain.p2m.remove(2, 1)
    world.domain.p2m.add(2, 1)
    world.domain.write(2 * PAGE, IMAGE[2 * PAGE : 3 * PAGE])


def take_window(world: CacheWorld) -> None:
    """Take a window of four pages, for which others have to go."""
    world.result = world.cache.window(PAGE, 4 * PAGE, owner="interrupted")


def take_window_again(world: CacheWorld) -> None:
    """Take another one: it shows what the guest has."""
    if world.result is not None and not world.result.released:
        world.result.release()
    world.result = None
    if world.closed:
        return
    with world.cache.window(PAGE, 4 * PAGE, owner="again") as window:
        if window.view != world.domain.read(PAGE, 4 * PAGE):
            world.problem("a second window shows other bytes")


def hold(world: CacheWorld, address: int = PAGE, length: int = 64) -> None:
    """Hold a DMA lease through which a device has written."""
    world.lease = world.cache.map_dma(address, length, owner="held")
    world.lease.view[:8] = BY_DEVICE


def hold_device(world: CacheWorld) -> None:
    """Hold a device lease through which a device has written."""
    world.lease = world.cache.map_device(PAGE, 64, owner="held")
    world.lease.view[:8] = BY_DEVICE


def hold_stale(world: CacheWorld) -> None:
    """Hold a lease that an invalidation has made stale."""
    hold(world)
    world.handle_invalidate()


def hold_all(world: CacheWorld) -> None:
    """Hold a lease of each kind, and have buckets besides."""
    world.cache.read(5 * BUCKET, 8)
    hold(world)
    world.other_lease = world.cache.map_device(9 * PAGE, 64, owner="held")


def release(world: CacheWorld) -> None:
    """Release the lease."""
    assert world.lease is not None
    world.lease.release()


def release_again(world: CacheWorld) -> None:
    """Release it unless it is released: then it must be."""
    assert world.lease is not None
    if not world.lease.released:
        with world.noting("a second release", LeaseError):
            world.lease.release()
    if not world.lease.released:
        world.problem("a second release did not release it")
    if world.lease.id in {info.id for info in world.cache.leases()}:
        world.problem("a released lease is in leases()")


def delivered(world: CacheWorld) -> None:
    """Look whether a stale lease's bytes were copied to where the guest sees them."""
    if world.handled == "invalidate":
        return  # the page that it was copied to may have gone, too
    if not world.closed and world.domain.read(PAGE, 8) != BY_DEVICE:
        world.problem("on_stale='copy': what the device wrote did not reach the guest")
    elif not world.closed and 1 not in world.domain.dirty_gfns:
        world.problem("on_stale='copy': the copied page was not reported dirty")


def replace(world: CacheWorld) -> None:
    """Let the device lease show page 2."""
    world.cache.replace(PAGE, 2 * PAGE, 64)


def replace_again(world: CacheWorld) -> None:
    """Do it again: it has moved then, and shows what it says."""
    lease = world.lease
    assert lease is not None
    if world.closed:
        return
    if lease.address == PAGE:
        with world.noting("a second replace"):
            replace(world)
    elif lease.stale:
        with world.noting("a second replace"):
            world.cache.replace(2 * PAGE, 2 * PAGE, 64)
    if lease.address != 2 * PAGE or lease.stale:
        world.problem(f"after a second replace the lease is {lease!r}")
    elif bytes(lease.view) != world.domain.read(lease.address, lease.length):
        world.problem("after a second replace the lease shows other bytes")


def invalidate(world: CacheWorld) -> None:
    """Invalidate."""
    world.cache.invalidate()


def close(world: CacheWorld, *, force: bool = False) -> None:
    """Close."""
    world.closed = True  # or on its way there
    world.cache.close(force=force)


def close_again(world: CacheWorld) -> None:
    """Close again: now it is closed, and nothing is resident."""
    with world.noting("a second close"):
        close(world, force=True)
    world.lease = world.other_lease = world.result = None
    try:
        world.cache.read(PAGE, 8)
        world.problem("a closed cache can be read")
    except ClosedError:
        pass


def mark_leases_dirty(world: CacheWorld) -> None:
    """Report leases."""
    world.cache.mark_leases_dirty()


def marked_again(world: CacheWorld) -> None:
    """Report again: now the pages are dirty."""
    if not world.closed:
        mark_leases_dirty(world)
        if not {1, 9} <= world.domain.dirty_gfns:
            world.problem(f"after mark_leases_dirty only {world.domain.dirty_gfns} are dirty")


ACTING = ("interrupt", "error", "read", "write", "evict", "invalidate", "close", "fork")
ALL = (*ACTING, "allocation", "depth")
FULL = (CacheFullError,)


def operation(
    name: str,
    act: Callable[[Any], object],
    prepare: Callable[[Any], object] | None = None,
    again: Callable[[Any], object] | None = None,
    **more: Any,  # noqa: ANN401 - fields of Operation
) -> Operation:
    """Return a row of the table."""
    more = {"world": CacheWorld, "handlers": ALL, **more}
    return Operation(name, act=act, prepare=prepare, again=again, **more)


EDGE: dict[str, Any] = {"address": BUCKET - 8, "length": 16}
OPERATIONS: Final = (
    operation("cache.read-miss", read),
    operation("cache.read-second", read, once),
    operation("cache.read-hit", read, warm),
    operation("cache.read-evicting", read, fill),
    operation("cache.read-edge", partial(read, **EDGE)),
    operation("cache.read_into", read_into),
    operation("cache.views", views),
    operation("cache.write-miss", write, None, write_again),
    operation("cache.write-second", write, once, write_again),
    operation("cache.write-hit", write, warm, write_again),
    operation("cache.write-edge", partial(write, **EDGE), None, partial(write_again, **EDGE)),
    operation("cache.map_dma-miss", take),
    operation("cache.map_dma-hit", take, once),
    operation("cache.map_dma-edge", partial(take, **EDGE)),
    operation("cache.map_device", take_device),
    operation("cache.window", take_window, scattered, take_window_again),
    operation("cache.replace", replace, hold_device, replace_again),
    operation("cache.invalidate", invalidate, hold_all, invalidate),
    operation("cache.close", close, fill, close_again),
    operation("cache.close-force", partial(close, force=True), hold_all, close_again),
    operation("cache.present", lambda w: list(w.cache.present(0, 2 * BUCKET)), once),
    operation("cache.stats", lambda w: w.cache.stats(), fill),
    operation("cache.leases", lambda w: w.cache.leases(), hold_all),
    operation("cache.mark_leases_dirty", mark_leases_dirty, hold_all, marked_again),
    operation("lease.release", release, hold, release_again),
    operation("lease.release-edge", release, partial(hold, **EDGE), release_again),
    operation("lease.release-device", release, hold_device, release_again),
    operation("lease.release-stale-warn", release, hold_stale, release_again),
    operation(
        "lease.release-stale-raise",
        release,
        hold_stale,
        release_again,
        world=partial(CacheWorld, on_stale="raise"),
        raises=(LeaseError,),
    ),
    operation(
        "lease.release-stale-copy",
        release,
        hold_stale,
        release_again,
        check=delivered,
        world=partial(CacheWorld, on_stale="copy"),
    ),
)
