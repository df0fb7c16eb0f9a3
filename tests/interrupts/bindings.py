"""Operations of the code for live domains, over the stand-in for Xen's libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Final

from tests.fake_xen import DOMID, FakeXen
from tests.fake_xen import build as build_fake
from xenmapcache import Lease, LeaseError, MapCache, open_backend
from xenmapcache.errors import ClosedError

from .injector import Outcome
from .world import Operation, World

PAGE: Final = 4096
BINDINGS: Final = ("cffi", "ctypes") if find_spec("_cffi_backend") else ("ctypes",)


@lru_cache(1)
def fake_xen(folder: Path) -> FakeXen:
    """Return the one stand-in of this process."""
    return FakeXen(build_fake(folder / "build"), folder / "copies", pages=64)


class BindingWorld(World):
    """A guest of the stand-in, with a page that differs, opened through a binding."""

    permitted: ClassVar = {"close": (ClosedError,), "other thread": (ClosedError,)}

    def __init__(self, folder: Path, binding: str) -> None:
        super().__init__(folder)
        self.fake = fake_xen(folder)
        self.fake._state.calls = 0
        for page in range(32):
            self.fake.write(page * PAGE, b"page%04d" % page + bytes(PAGE - 8))
        self.fake.take_dirty()
        self.misuses = self.fake.misuses
        self.binding = binding
        self.backend: Any = None
        self.cache: Any = None
        self.lease: Lease | None = None
        self.closed = False

    def open(self) -> None:
        """Open it, as a user does."""
        self.backend = open_backend(
            "xen", domid=DOMID, binding=self.binding, library=self.fake.library
        )
        self.cache = MapCache(self.backend, bucket_shift=13, max_resident="32K")

    def handle_read(self) -> None:
        """Read another page."""
        if self.cache is None or self.closed:
            return
        if self.cache.read(9 * PAGE, 8) != b"page0009":
            self.problem("the handler read wrong bytes")

    def handle_evict(self) -> None:
        """Read so much that everything that can be evicted is."""
        for page in range(20, 30):
            if self.cache is not None and not self.closed:
                self.cache.read(page * PAGE, 8)

    def handle_invalidate(self) -> None:
        """Invalidate."""
        if self.cache is not None:
            self.cache.invalidate()

    def handle_close(self) -> None:
        """Close the backend."""
        self.closed = True
        if self.backend is not None:
            self.backend.close()

    def check(self, outcome: Outcome) -> None:
        """Find held locks and unreported writes."""
        self.check_locks(self.cache, self.backend)
        if self.cache is not None:
            self.in_thread("read", self.look)
        if self.lease is None and not self.closed:
            self.check_dirty()
        if self.closed and self.handled == "close" and outcome.error is None:
            before = len(self.problems)
            self.check_dirty()  # a write that could not be reported has to say so
            del self.problems[before + 1 :]

    def look(self) -> None:
        """Read a page that nobody has mapped."""
        if self.cache.read(30 * PAGE, 8) != b"page0030":
            self.problem("another thread read wrong bytes")

    def check_dirty(self) -> None:
        """Find pages that were written through the cache and not reported."""
        for page in range(32):
            data = self.fake.read(page * PAGE, 64)
            changed = data[:8] != b"page%04d" % page or data[8:] != bytes(56)
            if changed and not self.fake._state.dirty[page]:
                self.problem(f"page {page} was written and is not reported dirty")

    def end(self) -> None:
        """Release and close everything, twice."""
        with self.noting("the last release", LeaseError, ClosedError):
            if self.lease is not None and not self.lease.released:
                self.lease.release()
        if not self.closed:
            self.check_dirty()
        self.lease = self.result = None
        for _ in range(2):
            with self.noting("close"):
                if self.cache is not None:
                    self.cache.close(force=True)
                if self.backend is not None:
                    self.backend.close()
        if self.cache is not None:
            self.check_accounting(self.cache)
        if self.fake.misuses != self.misuses:
            self.problem("the library was used after its handle was closed, or closed in use")
        opened, closed = (self.fake.count(f"xenforeignmemory_{name}") for name in ("open", "close"))
        if opened != closed:
            self.problem(f"xenforeignmemory_open {opened} times, close {closed} times")


def opened(world: BindingWorld) -> None:
    """Have it open."""
    world.open()


def open_again(world: BindingWorld) -> None:
    """Open it unless it is open."""
    if world.cache is None:
        world.open()


def read(world: BindingWorld) -> None:
    """Map and read a page."""
    if world.cache.read(PAGE, 8) != b"page0001":
        world.problem("read returned other bytes")


def reread(world: BindingWorld) -> None:
    """Read again."""
    if not world.closed:
        read(world)


def write(world: BindingWorld) -> None:
    """Write."""
    world.cache.write(PAGE + 8, b"written!")


def rewrite(world: BindingWorld) -> None:
    """Write again."""
    if not world.closed:
        write(world)
        if world.fake.read(PAGE + 8, 8) != b"written!":
            world.problem("a second write did not reach the guest")


def leased(world: BindingWorld) -> None:
    """Hold a device lease through which a device has written."""
    world.open()
    world.lease = world.cache.map_device(4 * PAGE, PAGE, owner="held")
    world.lease.view[16:24] = b"transfer"


def remap(world: BindingWorld) -> None:
    """Let the lease show another page."""
    world.cache.replace(4 * PAGE, 5 * PAGE, PAGE)


def remap_again(world: BindingWorld) -> None:
    """Do it again: the lease shows what it says."""
    lease = world.lease
    assert lease is not None
    if world.closed:
        return
    with world.noting("a second replace"):
        world.cache.replace(lease.address, 5 * PAGE, PAGE)
    if lease.stale or bytes(lease.view) != world.fake.read(lease.address, PAGE):
        world.problem(f"after a second replace the lease {lease!r} shows other bytes")


def holed(world: BindingWorld) -> None:
    """Have it open, and pages 40 and 44 not there."""
    world.open()
    world.fake.set_error(22, 40)
    world.fake.set_error(22, 44)
    world.fake.write(41 * PAGE, b"page0041")


def take_window(world: BindingWorld) -> None:
    """Take a window with holes."""
    window = world.cache.window(39 * PAGE, 6 * PAGE)
    world.result = window
    expected = bytes(2 * PAGE) + b"page0041" + bytes(4 * PAGE - 8)
    if window.view != expected:
        world.problem("the window shows other bytes")


def take_window_again(world: BindingWorld) -> None:
    """Release it, and take another one."""
    if world.result is not None:
        world.result.release()
    world.result = None
    if not world.closed:
        take_window(world)
        world.result.release()
    world.fake.set_error(0, 40)
    world.fake.set_error(0, 44)


def filled(world: BindingWorld) -> None:
    """Have pages mapped."""
    world.open()
    for page in range(0, 8, 2):
        world.cache.read(page * PAGE, 8)


def close(world: BindingWorld) -> None:
    """Close the backend, whose pages are mapped."""
    world.closed = True
    world.backend.close()


HANDLERS: Final = ("interrupt", "error", "read", "evict", "invalidate", "close", "fork")
ALL: Final = (*HANDLERS, "allocation", "depth")


def operation(
    name: str,
    act: Callable[[Any], object],
    prepare: Callable[[Any], object] | None = opened,
    again: Callable[[Any], object] | None = None,
    handlers: tuple[str, ...] = ALL,
) -> list[Operation]:
    """Return a row of the table for each binding."""
    return [
        Operation(
            f"binding.{name}-{binding}",
            partial(BindingWorld, binding=binding),
            act,
            handlers,
            prepare,
            again,
        )
        for binding in BINDINGS
    ]


OPERATIONS: Final = (
    *operation(
        "open", opened, None, open_again, ("interrupt", "error", "fork", "allocation", "depth")
    ),
    *operation("map", read, opened, reread),
    *operation("present", lambda w: list(w.cache.present(0, 4 * PAGE)), opened, reread),
    *operation("write", write, opened, rewrite),
    *operation("evict", read, filled, reread),
    *operation("remap", remap, leased, remap_again),
    *operation("window", take_window, holed, take_window_again),
    *operation("close", close, filled, close),
)
