"""The mock's vCPUs and ioreq servers: what cannot be done, and what Xen would do then."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from xenmapcache import MapCache, MockDomain, MockHypervisor, XenCallError, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.ioreq import RING_SLOTS, Request, RequestKind
from xenmapcache.mock.ioreq_server import MockIoreqServer

PORT, MMIO, VGA, RING_PORT = 0x510, 0xF000_0000, 0xA0000, 9
READ = Request(0, RequestKind.PORT, True, PORT, 0, 4)


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="1M", holes=[(VGA, 0x20000)], vcpus=2)


@pytest.fixture
def link(guest: MockDomain) -> Iterator[MockIoreqServer]:
    """An enabled ioreq server, as a device model has it from Xen."""
    link = guest.open_ioreq_server(buffered=True)
    link.enable()
    yield link
    link.close()


INSTRUCTIONS: dict[str, tuple[Callable[[MockDomain], object], str]] = {
    "size": (lambda guest: guest.port_in(PORT, 3), "size 3 is none of"),
    "size of a port": (lambda guest: guest.port_in(PORT, 8), "size 8 is none of"),
    "port": (lambda guest: guest.port_in(0x10000), "port 0x10000 is not in 0..0xffff"),
    "address": (lambda guest: guest.pci_read("00:00.0", -1), "no instruction does that"),
    "count": (lambda guest: guest.port_in_string(PORT, 0, 0), "no instruction does that"),
    "vCPU": (lambda guest: guest.port_in(PORT, vcpu=2), "vCPU 2 is not in 0..1"),
    "value": (lambda guest: guest.port_out(PORT, 256, 1), "value 0x100 does not fit 1 bytes"),
    "sign": (lambda guest: guest.mmio_write(MMIO, -1), "value -0x1 does not fit 4 bytes"),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_no_such_instruction(guest: MockDomain, link: MockIoreqServer, name: str) -> None:
    """What no vCPU can do is refused, and no device model sees it."""
    link.claim(RequestKind.PORT, 0, 0xFFFF)
    call, message = INSTRUCTIONS[name]
    with pytest.raises(ValueError, match=message):
        call(guest)
    assert link.pending() is None


def test_a_guest_has_a_vcpu() -> None:
    """A domain without any is refused."""
    with pytest.raises(ValueError, match="vcpus 0: a guest has at least one"):
        MockHypervisor().create_domain(memory="1M", vcpus=0)


def test_a_vcpu_does_one_thing_at_a_time(guest: MockDomain) -> None:
    """A handler that wants the vCPU which waits for it to do more is told so, and fails."""
    told: list[str] = []

    def read(offset: int, size: int) -> int:
        guest.patience = 0.01
        try:
            return guest.port_in(PORT)
        except TimeoutError as error:
            told.append(str(error))
            raise

    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        server.claim_ports(PORT, 4).read(read)
        with server, server.serving():
            assert guest.port_in(PORT) == 0xFFFFFFFF
    assert told == ["vCPU 0 of mock domain 1 is busy with another instruction"]


def test_what_xen_refuses(link: MockIoreqServer) -> None:
    """Channels that are not there or not bound, and a range that is claimed: as Xen's errnos."""
    link.claim(RequestKind.PORT, PORT, PORT + 3)
    calls: list[tuple[Callable[[], object], int]] = [
        (lambda: link.bind(4), errno.EINVAL),
        (lambda: link.notify(110), errno.EINVAL),
        (lambda: link.claim(RequestKind.PORT, PORT + 3, PORT + 8), errno.EEXIST),
    ]
    for call, number in calls:
        with pytest.raises(XenCallError) as caught:
            call()
        assert caught.value.errno == number
    link.claim(RequestKind.MMIO, PORT, PORT + 3)  # another kind


def test_the_rings_channel_wakes_nobody(link: MockIoreqServer) -> None:
    """No vCPU waits for a buffered request, so notifying its channel does nothing."""
    link.notify(link.bind(RING_PORT))
    assert not any(told.is_set() for told in link._told)


def test_a_full_ring(guest: MockDomain, link: MockIoreqServer) -> None:
    """What the ring has no room for goes by the vCPU's slot, as Xen does it."""
    link.claim(RequestKind.MMIO, VGA, VGA + 0xFFF)
    for number in range(RING_SLOTS):
        guest.mmio_write(VGA, number & 0xFF, 1, buffered=True)
    guest.patience = 0.01
    with pytest.raises(TimeoutError, match="stuck"):
        guest.mmio_write(VGA, 1, 1, buffered=True)


def test_told_before_it_is_answered(link: MockIoreqServer) -> None:
    """An event without an answer leaves a vCPU waiting, as on Xen."""
    port = link.bind(10)
    link.send(0, READ)
    link.notify(port)
    with pytest.raises(TimeoutError, match="has not answered"):
        link.wait(0, 0.01)


def test_destroyed_before_it_is_seen(link: MockIoreqServer) -> None:
    """A vCPU whose server has gone goes on without an answer; a second close does nothing."""
    port = link.bind(10)
    link.send(0, READ)
    link.notify(port)
    link.close()
    assert link.wait(0, 20) is None
    link.close()
