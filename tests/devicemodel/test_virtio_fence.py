"""A virtqueue's fences, which emulation cannot show: it never reorders anything.

What another processor has stored is visible after the device's fence, and perhaps not earlier. So
these tests have the driver's stores arrive when the fence is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tests.devicemodel.virtio_kit import Ring
from xenmapcache import MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioMmio, VirtioRng, Virtqueue
from xenmapcache.devicemodel.virtio.queue import EVENT_IDX, INDIRECT_DESC
from xenmapcache.mock import VirtioDriver
from xenmapcache.mock.ioreq_server import MockIoreqServer

RING, SIZE, MMIO, IRQ = 0x10000, 8, 0xF000_0000, 7


class Fence:
    """A fence that does what a test wants at each call, in order, and nothing afterwards."""

    def __init__(self) -> None:
        self.plan: list[Callable[[], object]] = []
        self.seen: list[object] = []

    def __call__(self) -> None:
        self.seen.append(self.plan.pop(0)() if self.plan else None)


@pytest.fixture
def fence() -> Fence:
    return Fence()


@pytest.fixture(params=[False, True], ids=["flags", "event index"])
def ring(guest: MockDomain, request: pytest.FixtureRequest) -> Ring:
    return Ring(guest, RING, SIZE, events=request.param)


@pytest.fixture
def queue(cache: MapCache, ring: Ring, fence: Fence) -> Virtqueue:
    features = INDIRECT_DESC | (EVENT_IDX if ring.events else 0)
    return Virtqueue(cache, 0, size=SIZE, **ring.at(), features=features, fence=fence)


def entry_of(ring: Ring) -> tuple[int, int]:
    """Return the used ring's idx, and the length in its first entry."""
    return ring.u16(ring.device + 2), ring.u16(ring.device + 8)


def test_an_entry_is_read_after_idx(ring: Ring, queue: Virtqueue, fence: Fence) -> None:
    """The chain and the entry that names it arrive when idx has been read."""
    ring.put_u16(ring.driver + 2, 1)
    fence.plan = [lambda: ring.offer(ring.chain(writable=[(0x1000, 8)]))]
    request = queue.pop()
    assert request is not None
    assert request.writable.ranges == ((0x1000, 8),)
    assert len(fence.seen) == 1


def test_an_entry_is_written_before_idx(ring: Ring, queue: Virtqueue, fence: Fence) -> None:
    """At the first fence the entry is there and idx is old; at the second one idx is new."""
    ring.offer(ring.chain(writable=[(0x1000, 8)]))
    request = queue.pop()
    assert request is not None
    fence.seen.clear()
    fence.plan = [partial(entry_of, ring), partial(entry_of, ring)]
    queue.push((request, 7))
    assert fence.seen == [(0, 7), (1, 7)]


def test_the_drivers_wish_is_read_after_idx_is_written(
    ring: Ring, queue: Virtqueue, fence: Fence
) -> None:
    """A wish for an interrupt that arrives at the second fence is seen."""
    ring.offer(*(ring.chain(writable=[(0x1000, 8)]) for _ in range(2)))
    first, second = queue.pop(), queue.pop()
    assert first is not None
    assert second is not None
    queue.push((first, 1))  # the first time, the device always interrupts
    ring.put_u16(ring.driver, 1)
    ring.ask_for_interrupt(5)

    def wish() -> None:
        ring.put_u16(ring.driver, 0)
        ring.ask_for_interrupt(1)

    fence.plan = [lambda: None, wish]
    assert queue.push((second, 1))


def test_idx_is_read_after_the_device_has_asked(ring: Ring, queue: Virtqueue, fence: Fence) -> None:
    """A request that arrives between the device's wish and its second look is found."""
    offer = partial(ring.offer, ring.chain(writable=[(0x1000, 8)]))
    fence.plan = [lambda: None, offer]  # after the first look, and after the wish
    assert queue.pop() is not None
    assert len(fence.seen) == 3


def test_a_device_has_its_servers_fence(
    guest: MockDomain, server: IoreqServer, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each queue that a driver starts gets it."""
    monkeypatch.setattr(MockIoreqServer, "fence", fence)
    made: list[object] = []
    make = Virtqueue.__init__

    def noted(self: Virtqueue, *arguments: object, **options: object) -> None:
        made.append(options["fence"])
        make(self, *arguments, **options)  # type: ignore[arg-type] # as they came

    monkeypatch.setattr(Virtqueue, "__init__", noted)
    with VirtioRng(server) as rng:
        VirtioMmio(server, MMIO, rng, interrupt=partial(server.set_isa_irq, IRQ))
        with server, server.serving():
            assert server.fence is fence
            VirtioDriver.over_mmio(guest, MMIO, IRQ).start()
    assert made == [fence]
