"""Operations of the mock, from the guest's side: its vCPUs and its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from xenmapcache import MapCache, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer

from .caches import IMAGE, PAGE, PAGES
from .injector import Outcome
from .world import Operation, World

PORT: Final = 0x100
DATA: Final = 0x1234


class MockWorld(World):
    """A guest whose memory and vCPUs the interrupted thread uses; a server may answer it."""

    def __init__(self, folder: Path, *, serve: bool = False) -> None:
        super().__init__(folder)
        self.hypervisor = MockHypervisor()
        self.domain = self.hypervisor.create_domain(memory=PAGES * PAGE, vcpus=2)
        self.domain.write(0, IMAGE)
        self.domain.vcpu_timeout = 5.0
        self.backend = open_backend("mock", domain=self.domain)
        self.cache = MapCache(self.backend, bucket_shift=12)
        self.domain.on_invalidate(self.cache.invalidate)
        self.server = contextlib.ExitStack()
        self.value = 0
        if serve:
            server = IoreqServer(self.domain, self.cache)
            ports = server.claim_ports(PORT, 4)
            ports.read(lambda offset, size: DATA)
            ports.write(self.on_write)
            self.server.enter_context(server)
            self.server.enter_context(server.serving())

    def on_write(self, offset: int, size: int, value: int) -> None:
        """Keep what the guest wrote."""
        self.value = value

    def handle_read(self) -> None:
        """Read the guest's memory from its side and through the cache."""
        for page in (3, 9):
            mark = IMAGE[page * PAGE : page * PAGE + 8]
            if mark != self.domain.read(page * PAGE, 8) or mark != self.cache.read(page * PAGE, 8):
                self.problem("the handler read wrong bytes")

    def handle_write(self) -> None:
        """Write the guest's memory."""
        self.domain.write(3 * PAGE + 64, b"handler!")

    def handle_invalidate(self) -> None:
        """Let the guest give a page up and take another one, in the middle of whatever it does."""
        self.domain.balloon_out(12 * PAGE, PAGE, vcpu=1)
        self.domain.balloon_in(12 * PAGE, PAGE)

    def check(self, outcome: Outcome) -> None:
        """Find held locks, and a guest that cannot go on."""
        self.in_thread("work with the guest", self.work)
        self.check_locks(self.hypervisor, self.domain, self.backend)

    def work(self) -> None:
        """Do what needs every lock of the mock."""
        self.domain.balloon_out(14 * PAGE, PAGE, vcpu=1)
        self.domain.balloon_in(14 * PAGE, PAGE)
        self.domain.write(14 * PAGE, b"work")
        if self.cache.read(14 * PAGE, 4) != b"work":
            self.problem("a page that the guest took back shows other bytes")
        if self.domain.read(5 * PAGE, 8) != IMAGE[5 * PAGE : 5 * PAGE + 8]:
            self.problem("another page of the guest has changed")
        self.hypervisor.create_domain(memory=PAGE).write(0, b"other")

    def end(self) -> None:
        """Close everything."""
        with self.noting("the end of the server"):
            self.server.close()
        self.cache.close(force=True)
        self.check_accounting(self.cache)
        self.backend.close()


def serving(folder: Path) -> MockWorld:
    """Return a world with a server in a thread of its own."""
    return MockWorld(folder, serve=True)


def allocate(world: MockWorld) -> None:
    """Create another domain."""
    world.result = world.hypervisor.create_domain(memory=4 * PAGE)


def allocate_again(world: MockWorld) -> None:
    """Create one more: none shares a number or a frame with another."""
    other = world.hypervisor.create_domain(memory=4 * PAGE)
    if world.result is not None and other.domid == world.result.domid:
        world.problem("two domains have the same number")
    other.write(0, b"other one")
    if world.domain.read(0, 8) != IMAGE[:8]:
        world.problem("two domains share a frame")


def balloon_out(world: MockWorld) -> None:
    """Give up two pages."""
    world.domain.balloon_out(6 * PAGE, 2 * PAGE)


def balloon_in(world: MockWorld) -> None:
    """Take two pages."""
    world.domain.balloon_in(6 * PAGE, 2 * PAGE)


def cycle(world: MockWorld) -> None:
    """Give them up and take them, which ends what was begun: they are zeroed then."""
    balloon_out(world)
    balloon_in(world)
    if world.domain.read(6 * PAGE, 2 * PAGE) != bytes(2 * PAGE):
        world.problem("pages that were taken are not zeroed")
    if world.cache.read(6 * PAGE, 8) != bytes(8):
        world.problem("the cache shows pages that the guest gave up")


def read_mapped(world: MockWorld) -> None:
    """Have the pages in the cache."""
    world.cache.read(6 * PAGE, 2 * PAGE)


def ballooned(world: MockWorld) -> None:
    """Have the pages given up."""
    balloon_out(world)


def write(world: MockWorld) -> None:
    """Write over an edge, from inside."""
    world.domain.write(7 * PAGE - 8, b"from the inside!")


def write_again(world: MockWorld) -> None:
    """Write again."""
    write(world)
    if world.domain.read(7 * PAGE - 8, 16) != b"from the inside!":
        world.problem("a second write did not reach the guest")


def port_in(world: MockWorld) -> None:
    """Read a port that a server answers."""
    data = world.domain.port_in(PORT, 4)
    if data != DATA:
        world.problem(f"the vCPU read {data:#x}")


def port_out(world: MockWorld) -> None:
    """Write a port."""
    world.domain.port_out(PORT, 7)


def port_out_again(world: MockWorld) -> None:
    """Write it again."""
    port_out(world)
    if world.value != 7:
        world.problem(f"the device has {world.value}")


HANDLERS: Final = ("interrupt", "error", "read", "write", "invalidate", "fork")
VCPU_HANDLERS: Final = ("interrupt", "error", "read", "write")
"""A vCPU in the middle of an instruction cannot begin another one: no INVALIDATE there."""


def operation(
    name: str,
    act: Callable[[Any], object],
    prepare: Callable[[Any], object] | None = None,
    again: Callable[[Any], object] | None = None,
    **more: Any,  # noqa: ANN401 - fields of Operation
) -> Operation:
    """Return a row of the table."""
    more = {"world": MockWorld, "handlers": HANDLERS, **more}
    return Operation(name, act=act, prepare=prepare, again=again, **more)


OPERATIONS: Final = (
    operation("mock.allocate", allocate, None, allocate_again),
    operation("mock.balloon_out", balloon_out, read_mapped, cycle),
    operation("mock.balloon_in", balloon_in, ballooned, cycle),
    operation("mock.read", lambda w: w.domain.read(7 * PAGE - 8, 16)),
    operation("mock.write", write, None, write_again),
    operation("mock.port_in", port_in, None, port_in, world=serving, handlers=VCPU_HANDLERS),
    operation(
        "mock.port_out", port_out, None, port_out_again, world=serving, handlers=VCPU_HANDLERS
    ),
)
