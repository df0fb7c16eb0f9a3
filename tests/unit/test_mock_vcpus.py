"""The mock's vCPUs and ioreq servers: what cannot be done, and what Xen would do then."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.kit import in_thread, put_state
from xenmapcache import MapCache, MockDomain, MockHypervisor, XenCallError, ioreq, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.ioreq import RING_SLOTS, Request, RequestKind, RequestSlot, State
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
    "size": (lambda guest: guest.port_in(PORT, 3), "size 3 must be one of"),
    "size of a port": (lambda guest: guest.port_in(PORT, 8), "size 8 must be one of"),
    "port": (lambda guest: guest.port_in(0x10000), "port 0x10000 must be in 0..0xffff"),
    "address": (lambda guest: guest.pci_read("00:00.0", -1), "address -0x1 must be in"),
    "count": (lambda guest: guest.port_in_string(PORT, 0, 0), "count 0 must be in"),
    "vCPU": (lambda guest: guest.port_in(PORT, vcpu=2), "vCPU 2 must be in 0..1"),
    "value": (lambda guest: guest.port_out(PORT, 256, 1), "value 0x100 must fit 1 bytes"),
    "size of memory": (lambda guest: guest.mmio_read(0x1000, 3), "size 3 must be one of"),
    "vCPU at memory": (lambda guest: guest.mmio_write(0x1000, 1, vcpu=9), "vCPU 9 must be in 0..1"),
    "sign": (lambda guest: guest.mmio_write(MMIO, -1), "value -0x1 must fit 4 bytes"),
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
    with pytest.raises(ValueError, match="vcpus must be 1 to 128, not 0"):
        MockHypervisor().create_domain(memory="1M", vcpus=0)


def test_a_vcpu_does_one_thing_at_a_time(guest: MockDomain) -> None:
    """A handler that wants the vCPU which waits for it to do more is told so, and fails."""
    told: list[str] = []

    def read(offset: int, size: int) -> int:
        guest.vcpu_timeout = 0.01
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
    assert not any(bell.wait(0) for bell in link._bells)


def test_a_full_ring(guest: MockDomain, link: MockIoreqServer) -> None:
    """What the ring has no room for goes by the vCPU's slot, as Xen does it."""
    link.claim(RequestKind.MMIO, VGA, VGA + 0xFFF)
    for number in range(RING_SLOTS):
        guest.mmio_write(VGA, number & 0xFF, 1, buffered=True)
    guest.vcpu_timeout = 0.01
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


def test_a_string_that_goes_down_out_of_a_claim(guest: MockDomain, link: MockIoreqServer) -> None:
    """An access that leaves a server's range below is sent to nobody, as on Xen."""
    link.claim(RequestKind.MMIO, VGA + 0x100, VGA + 0x1FF)
    down = Request(0, RequestKind.MMIO, True, VGA + 0x108, 0x2000, 4, 3, True, True)
    assert link.takes(down)
    assert not link.takes(down._replace(count=4))


def test_events_of_a_channel(link: MockIoreqServer) -> None:
    """None before it is bound; one that comes while it is masked comes once, when it is not."""
    link.send(0, READ)
    assert link.pending() is None
    port = link.bind(10)
    assert link.pending() == port
    link._raise(port)
    assert link.pending() is None
    link.unmask(port)
    assert link.pending() == port
    link.unmask(port)
    assert link.pending() is None


def test_a_model_that_overwrites_its_channel(guest: MockDomain, link: MockIoreqServer) -> None:
    """Xen ends a guest whose vp_eport is not the one that it has written there."""
    ioreq.IOREQ.pack_into(link.page, 0, 0, 0, 0, 0, 11, 0, 0, 0)
    with pytest.raises(RuntimeError, match="Xen would crash the domain.*vp_eport 11"):
        link.send(0, READ)
    assert "vp_eport 11" in guest.crashed


def test_a_number_that_is_used_again(guest: MockDomain) -> None:
    """Closing a server twice does not take away the one that has its number by now."""
    first = guest.open_ioreq_server(buffered=False)
    first.close()
    second = guest.open_ioreq_server(buffered=False)
    first.close()
    assert guest.ioreq_servers == {first.id: second}


def test_strings_that_nobody_answers(guest: MockDomain) -> None:
    """All items become ones, up or down from the first one, and no other byte."""
    guest.write(0x1000, bytes(64))
    guest.port_in_string(PORT, 0x1010, 3, 2)
    assert guest.read(0x1000, 64) == bytes(16) + b"\xff" * 6 + bytes(42)
    guest.write(0x1000, bytes(64))
    guest.port_in_string(PORT, 0x1010, 3, 2, backward=True)
    assert guest.read(0x1000, 64) == bytes(12) + b"\xff" * 6 + bytes(46)


def test_an_answer_that_is_too_long(guest: MockDomain, link: MockIoreqServer) -> None:
    """A vCPU takes as many bytes of an answer as it has asked for."""
    link.claim(RequestKind.PORT, PORT, PORT + 3)
    port = link.bind(10)
    thread, seen = in_thread(lambda: guest.port_in(PORT, 1))
    while RequestSlot(link.page, 0).state != State.READY:
        os.sched_yield()
    RequestSlot(link.page, 0).begin()
    RequestSlot(link.page, 0).answer(0x1234)
    link.notify(port)
    thread.join()
    assert seen == [0x34]


def test_invalidate_goes_to_all_at_once(guest: MockDomain, link: MockIoreqServer) -> None:
    """Xen asks every server before it waits for the first one's answer."""
    other = guest.open_ioreq_server(buffered=False)
    other.enable()
    ports = [each.bind(10) for each in (link, other)]
    guest.vcpu_timeout = 1.0
    thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
    end = time.monotonic() + 0.8
    while [RequestSlot(each.page, 0).state for each in (link, other)] != [State.READY] * 2:
        assert time.monotonic() < end
        os.sched_yield()
    for each, port in zip((link, other), ports, strict=True):
        RequestSlot(each.page, 0).begin()
        RequestSlot(each.page, 0).answer(0)
        each.notify(port)
    thread.join()
    other.close()


def test_a_request_lies_in_a_claim_as_a_whole(link: MockIoreqServer) -> None:
    """With its last byte, with all items of a string up or down, over neighbours of one kind."""
    link.claim(RequestKind.PORT, PORT, PORT + 3)
    link.claim(RequestKind.PORT, PORT + 4, PORT + 7)
    link.claim(RequestKind.MMIO, PORT + 8, PORT + 15)

    def port(address: int) -> bool:
        return link.takes(READ._replace(address=address))

    assert [port(PORT + offset) for offset in (-1, 0, 2, 4, 5, 8)] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]

    def string(offset: int, items: int, backward: bool) -> bool:
        return link.takes(
            Request(
                0, RequestKind.MMIO, True, PORT + 8 + offset, 0x200000, 2, items, True, backward
            )
        )

    assert [string(0, 4, False), string(0, 5, False), string(2, 4, False)] == [True, False, False]
    assert [string(6, 4, True), string(6, 5, True), string(0, 4, True)] == [True, False, False]
    link.disable()
    assert not port(PORT)


def test_what_a_vcpu_goes_on_with(guest: MockDomain, link: MockIoreqServer) -> None:
    """Its server gone, with what stood in the request: zeros, as on Xen, not all ones."""
    link.claim(RequestKind.PORT, PORT, PORT + 3)
    port = link.bind(10)
    original = link.send

    def send_and_die(vcpu: int, request: Request) -> None:
        original(vcpu, request)
        link.notify(port)
        link.destroy()

    link.send = send_and_die  # type: ignore[method-assign] # for this test alone
    assert guest.port_in(PORT) == 0


def test_the_youngest_server_is_asked_first(guest: MockDomain, link: MockIoreqServer) -> None:
    """Where two have claimed the same range, as Xen goes through them."""
    second = guest.open_ioreq_server(buffered=False)
    second.enable()
    for server in (link, second):
        server.claim(RequestKind.PORT, PORT, PORT + 3)
    assert guest.vcpu[0].server_of(READ) is second
    second.close()
    assert guest.vcpu[0].server_of(READ) is link


def test_a_vcpu_that_was_given_up_on_can_do_more(guest: MockDomain, link: MockIoreqServer) -> None:
    """A TimeoutError ends the instruction, and with it the vCPU's turn."""
    link.claim(RequestKind.PORT, PORT, PORT + 3)
    guest.vcpu_timeout = 0.01
    with pytest.raises(TimeoutError, match="is stuck"):
        guest.port_in(PORT)
    assert guest.port_in(PORT + 8, 1) == 0xFF


def test_a_slot_that_was_emptied(guest: MockDomain, link: MockIoreqServer) -> None:
    """A device model that throws a request away ends the guest, as on Xen."""
    port = link.bind(10)
    link.send(0, READ)
    put_state(link.page, 0, State.NONE)
    link.notify(port)
    with pytest.raises(RuntimeError, match="the state went astray"):
        link.wait(0, 0.01)
    assert guest.crashed


def test_an_invalidate_is_sent_to_all_before_it_is_waited_for(guest: MockDomain) -> None:
    """Enabled servers get it at once, one after the other; others do not."""
    order: list[tuple[str, int]] = []
    for _ in range(3):
        server = guest.open_ioreq_server(buffered=False)
        server.send = lambda *_, number=server.id: order.append(("send", number))  # type: ignore[method-assign] # for this test alone
        server.wait = lambda *_, number=server.id: order.append(("wait", number))  # type: ignore[method-assign] # as well
        if server.id != 1:
            server.enable()
    guest.send_invalidate()
    assert order == [("send", 0), ("send", 2), ("wait", 0), ("wait", 2)]


def test_a_timeout_names_the_access(guest: MockDomain, link: MockIoreqServer) -> None:
    """The message says what the vCPU waits for: its kind, address and size."""
    link.claim(RequestKind.PORT, PORT, PORT + 3)
    guest.vcpu_timeout = 0.01
    with pytest.raises(TimeoutError, match="'vCPU 1: PORT read of 2 bytes at 0x510'"):
        guest.port_in(PORT, 2, vcpu=1)


@pytest.mark.parametrize("answered", ["before", "after"])
def test_a_vcpu_that_timed_out_can_be_used_again(guest: MockDomain, answered: str) -> None:
    """Whether the old request is answered before the next instruction or not until then."""
    values = iter([1, 2])
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        server.claim_ports(PORT, 4).read(lambda offset, size: next(values))
        with server:
            guest.vcpu_timeout = 0.01
            with pytest.raises(TimeoutError, match="is stuck"):
                guest.port_in(PORT)
            assert answered == "after" or server.process_pending() == 1
            guest.vcpu_timeout = 20
            with server.serving():
                assert guest.port_in(PORT) == 2
                guest.send_invalidate()
            assert (server.requests, server.failures) == (3, 0)
    assert not guest.crashed


def test_more_vcpus_than_an_ioreq_page_holds(guest: MockDomain) -> None:
    """The page has 128 slots; one vCPU more is refused with the reason."""
    assert MockHypervisor().create_domain(memory="64k", vcpus=128).vcpus == 128
    with pytest.raises(ValueError, match="vcpus must be 1 to 128, not 129: .* slot of 32 bytes"):
        MockHypervisor().create_domain(memory="64k", vcpus=129)
