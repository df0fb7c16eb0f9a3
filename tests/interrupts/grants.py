"""Leases of granted pages: over the mock, and over the stand-in for Xen's library."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from tests.fake_xen import DOMID
from xenmapcache import Lease, LeaseError, MapCache, MockHypervisor, open_backend
from xenmapcache.binding import libc
from xenmapcache.errors import ClosedError
from xenmapcache.grants import grant_address

from .bindings import BINDINGS, PAGE, fake_xen
from .injector import Outcome
from .world import Operation, World

REF: Final = 8
ADDRESS: Final = grant_address(REF, PAGE - 8)
LENGTH: Final = 16
MARK: Final = b"granted!granted!"


class GrantWorld(World):
    """A guest that has granted two pages, with a mark over the edge between them."""

    permitted: ClassVar = {"close": (ClosedError,), "other thread": (ClosedError,)}

    def __init__(self, folder: Path, binding: str) -> None:
        super().__init__(folder)
        self.fake: Any = None
        self.domain: Any = None
        if binding == "mock":
            self.domain = MockHypervisor().create_domain(memory=16 * PAGE)
            self.domain.grants.grant(1, 2)
            self.backend = open_backend("mock", domain=self.domain)
        else:
            self.fake = fake_xen(folder)
            self.fake._state.calls = 0
            for number in (0, 1):
                self.fake.grant(REF + number, 1 + number)
            for each in self.fake._state.maps:
                each.address = 0
            self.backend = open_backend(
                "xen", domid=DOMID, binding=binding, library=self.fake.library
            )
        self.guest = self.domain or self.fake
        self.guest.write(2 * PAGE - 8, MARK)
        self.grants = self.backend.open_grants()
        self.cache = MapCache(self.backend, bucket_shift=13, grants=self.grants)
        self.lease: Lease | None = None
        self.view: memoryview | None = None
        self.closed = False

    def mapped(self) -> int:
        """Return how many mappings Xen has of the first page.

        When the descriptor is closed, the kernel drops those whose memory is no longer mapped.
        """
        if self.domain is not None:
            return int(self.domain.grants.mappings)
        if self.closed:
            memory = str(self.fake.inode)
            used = [each.address for each in self.fake._state.maps if each.address]
            files = [libc.file_at(address) for address in used]
            return sum(file is not None and file[1] == memory for file in files)
        return int(self.fake.granted(REF))

    def handle_invalidate(self) -> None:
        """Invalidate the cache, which does not concern grants."""
        self.cache.invalidate()

    def handle_lease(self) -> None:
        """Lease the same pages, and release them."""
        if not self.closed:
            with self.cache.map_dma(ADDRESS, LENGTH, owner="handler") as lease:
                if bytes(lease.view) != MARK:
                    self.problem("the handler's lease shows other bytes")

    def handle_close(self) -> None:
        """Close the source of the grants, whatever is mapped."""
        self.closed = True
        self.grants.close(force=True)

    def may_not_swallow(self, handler: str) -> bool:
        """An Exception that comes amid a log line is the log's, and that is all."""
        logged = any(code.co_name == "safely" for code in self.stack)
        return (handler == "interrupt" or not logged) and super().may_not_swallow(handler)

    def check(self, outcome: Outcome) -> None:
        """Find held locks, leases that nobody knows, and grants that no lease has."""
        self.check_locks(self.cache, self.backend, self.grants)
        self.in_thread("leases", self.cache.leases)
        held = {info.id for info in self.cache.leases()}
        for lease in filter(None, (self.lease, self.result)):
            if not lease.released and lease.id not in held:
                self.problem("a lease is neither released nor in leases()")
            if not lease.released and not lease.stale and bytes(lease.view) != MARK:
                self.problem("a lease that is not stale shows other bytes")
        if not held and self.mapped():
            self.problem(f"{self.mapped()} more mappings of grants than leases")
        if self.view is not None and not held and bytes(self.view) != bytes(LENGTH):
            self.problem("a view that was kept does not show zeros")

    def end(self) -> None:
        """Release and close everything, twice."""
        with self.noting("the last release", LeaseError):
            if self.lease is not None and not self.lease.released:
                self.lease.release()
        if self.view is not None and bytes(self.view) != bytes(LENGTH):
            self.problem("after the release a view does not show zeros")
        self.lease = self.result = self.view = None
        for _ in range(2):
            with self.noting("close"):
                self.cache.close(force=True)
                self.grants.close(force=True)
        if self.grants.mapped or self.mapped():
            self.problem(f"{self.grants.mapped} more grants, {self.mapped()} mappings, after close")
        self.check_accounting(self.cache)
        self.backend.close()


def take(world: GrantWorld) -> None:
    """Lease the two pages."""
    world.result = world.cache.map_dma(ADDRESS, LENGTH, owner="interrupted")


def take_again(world: GrantWorld) -> None:
    """Lease them again."""
    if world.result is not None and not world.result.released:
        world.result.release()
    world.result = None
    if not world.closed:
        world.cache.map_dma(ADDRESS, LENGTH, owner="again").release()


def hold(world: GrantWorld) -> None:
    """Hold a lease, and a view of it."""
    world.lease = world.cache.map_dma(ADDRESS, LENGTH, owner="held")
    world.view = world.lease.view


def release(world: GrantWorld) -> None:
    """Release the lease."""
    assert world.lease is not None
    world.lease.release()


def release_again(world: GrantWorld) -> None:
    """Release it unless it is released: then it must be, and its grants are ended."""
    assert world.lease is not None
    if not world.lease.released:
        with world.noting("a second release", LeaseError):
            world.lease.release()
    if not world.lease.released or world.mapped():
        world.problem("a second release does not end the grants")


def read(world: GrantWorld) -> None:
    """Copy over the edge."""
    if world.cache.read(ADDRESS, LENGTH) != MARK:
        world.problem("read returned other bytes")


def close(world: GrantWorld) -> None:
    """Close the source by force."""
    world.closed = True
    world.grants.close(force=True)


ACTING: Final = ("interrupt", "error", "invalidate", "lease", "close", "fork")
ALL: Final = (*ACTING, "allocation", "depth")


def operation(
    name: str,
    act: Callable[[Any], object],
    prepare: Callable[[Any], object] | None = None,
    again: Callable[[Any], object] | None = None,
) -> list[Operation]:
    """Return a row of the table for the mock, and for each binding."""
    return [
        Operation(
            f"grants.{name}-{binding}",
            partial(GrantWorld, binding=binding),
            act,
            ALL,
            prepare,
            again,
        )
        for binding in ("mock", *BINDINGS)
    ]


OPERATIONS: Final = (
    *operation("map_dma", take, None, take_again),
    *operation("release", release, hold, release_again),
    *operation("read", read),
    *operation("close-force", close, hold, close),
)
