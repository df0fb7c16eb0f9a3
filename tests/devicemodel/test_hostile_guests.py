"""A guest that means harm: every request is answered, in bounded time, memory and log."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.effort import examples
from tests.kit import (
    Memory,
    ask,
    connection_of,
    in_thread,
    link_of,
    put_state,
    wait_for_requests,
    wait_for_the_log,
)
from xenmapcache import MockDomain
from xenmapcache.devicemodel import IoreqServer, report
from xenmapcache.devicemodel.dispatch import MAX_COUNT
from xenmapcache.ioreq import (
    IOREQ,
    RING_POINTERS,
    SLOT_SIZE,
    BufferedRing,
    Request,
    RequestKind,
    RequestSlot,
    State,
)

PORT, VGA, ONES = 0x510, 0xA0000, 0xFFFFFFFF


@pytest.fixture
def opened(server: IoreqServer) -> Iterator[IoreqServer]:
    """The server, open, and closed in the end: what it leaves out of the log it counts then."""
    with server:
        yield server


@settings(
    max_examples=examples(200),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(read=st.integers(0, ONES), entries=st.integers(0, ONES), filler=st.binary(max_size=64))
def test_every_ring_is_emptied(opened: IoreqServer, read: int, entries: int, filler: bytes) -> None:
    """Any pointers, any entries: at most 511 are carried out, and the ring is empty then."""
    server = opened
    page = link_of(server).ring
    assert page is not None
    page[8 : 8 + len(filler)] = filler
    RING_POINTERS.pack_into(page, 0, read, (read + entries) & ONES)
    before = server.requests
    connection_of(server)._unsettled = True  # as after an interrupt: looks at the ring
    server.process_pending()
    assert server.requests - before <= 511
    ring = BufferedRing(page)
    assert ring.read_pointer == ring.write_pointer


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("count", [MAX_COUNT + 1, 0x10000000, 0xFFFFFFFF])
def test_a_count_takes_no_memory(
    guest: MockDomain, live: IoreqServer, device: Memory, count: int, is_read: bool
) -> None:
    """It is refused before anything is allocated, and before the device is asked."""
    tracemalloc.start()
    try:
        answer = ask(guest, live, Request(0, 0, is_read, PORT, 0x1000, 4, count, True))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert (answer, live.failures, device.accesses) == (0x1000, 1, [])


@pytest.mark.parametrize("address", [0x1000000, VGA, (1 << 52) - 8, 1 << 52, (1 << 64) - 4, 0])
@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("df", [False, True])
def test_memory_is_checked_before_the_device_is_asked(
    guest: MockDomain, live: IoreqServer, device: Memory, address: int, is_read: bool, df: bool
) -> None:
    """A string whose data has no place changes nothing in a device."""
    if address == 0 and not df:
        address = 0xFFFFFFE  # the second half lies beyond the end
    ask(guest, live, Request(0, 0, is_read, PORT, address, 4, 3, True, df))
    assert (live.failures, device.accesses) == (1, [])


def test_a_vcpu_that_never_stops_writing_keeps_no_other_waiting(
    guest: MockDomain, server: IoreqServer
) -> None:
    """A round ends although the ring is never empty; the other vCPU is answered."""
    written: list[int] = []

    def write(offset: int, size: int, value: int) -> None:
        written.append(value)
        guest.mmio_write(VGA, value + 1, buffered=True)  # the ring is never empty

    server.claim_mmio(VGA, 4).write(write)
    server.claim_ports(PORT, 4).read(lambda offset, size: 7)
    with server:
        server.process_pending()
        guest.mmio_write(VGA, 0, buffered=True)
        thread, seen = in_thread(lambda: guest.port_in(PORT, vcpu=1))
        wait_for_requests(server)
        assert server.process_pending() == 2
        thread.join()
        assert (seen, written) == ([7], [0])
        assert server.process_pending() == 1
        server._dispatcher.regions.find(RequestKind.MMIO, VGA, 4).write(lambda *_: None)  # type: ignore[union-attr] # it is there


def test_writes_before_a_request_come_before_it(guest: MockDomain, server: IoreqServer) -> None:
    """The slot is looked at first, then the write pointer."""
    order: list[str] = []
    server.claim_mmio(VGA, 4).write(lambda *_: order.append("write"))
    server.claim_ports(PORT, 4).read(lambda *_: order.append("read") or 0)  # type: ignore[func-returns-value] # None, and so 0
    with server:
        server.process_pending()
        connection, link = connection_of(server), link_of(server)
        real = connection._is_waiting
        ring = link.ring
        assert ring is not None

        def looked(channel: object, *, everything: bool) -> bool:
            waiting = real(channel, everything=everything)  # type: ignore[arg-type] # any of its subclasses
            if waiting:  # written before the request was sent, and seen late
                request = Request(None, RequestKind.MMIO, False, VGA, 1, 4)
                assert BufferedRing(ring).append(request)
            return waiting

        connection._is_waiting = looked  # type: ignore[method-assign] # for this test
        thread, _ = in_thread(lambda: guest.port_in(PORT))
        while not order:
            server.process_pending()
        thread.join()
    assert order == ["write", "read"]


@pytest.mark.parametrize("entries", [1, 512, 0x80000000])
def test_a_broken_ring_is_an_error(
    guest: MockDomain, server: IoreqServer, entries: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a quad-word, or pointers too far apart: logged, counted, and the ring goes on."""
    written: list[int] = []
    server.claim_mmio(VGA, 8).write(lambda offset, size, value: written.append(value))
    with server:
        server.process_pending()
        page = link_of(server).ring
        assert page is not None
        assert BufferedRing(page).append(Request(None, RequestKind.MMIO, False, VGA, 1, 8))
        RING_POINTERS.pack_into(page, 0, 0, entries)
        connection_of(server)._unsettled = True
        server.process_pending()
        assert (written, server.failures) == ([], 1)
        guest.mmio_write(VGA, 5, 4, buffered=True)
        while not written:
            server.process_pending()
    assert written == [5]
    assert "buffered ring: failed: buffered ring:" in caplog.text


def test_wrong_accesses_fill_no_log(
    guest: MockDomain, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """One line each without a traceback, a few a region, and the number of the rest."""
    for _ in range(300):
        guest.port_in_string(PORT, 0x7FFFFFFFF000, 1, 2)
    assert live.failures == 300
    live.close()
    assert len(caplog.records) <= 2 * report._BURST
    assert "Traceback" not in caplog.text
    assert "more failures of" in caplog.text
    assert len(caplog.text) < 10000


def test_lines_come_again_after_a_while(
    guest: MockDomain,
    live: IoreqServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next interval's first line says how many were left out."""
    monkeypatch.setattr(report, "_BURST", 1)
    for _ in range(3):
        guest.port_in_string(PORT, 0x7FFFFFFFF000, 1, 2)
    wait_for_the_log(live)
    for budget in connection_of(live).calls.log._budgets.values():
        budget.until = 0.0
    guest.port_in_string(PORT, 0x7FFFFFFFF000, 1, 2)
    wait_for_the_log(live)
    first, second = (record.getMessage() for record in caplog.records)
    assert "not logged" not in first
    assert second.endswith("(2 more failures of no region were not logged)")


def test_a_bug_is_traced_once_a_line(
    guest: MockDomain, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler's own exception has a traceback the first time, and each line of code its own."""
    region = live.claim_ports(0x600, 4)
    region.read(lambda offset, size: 1 // 0)
    region.write(lambda offset, size, value: [][offset])
    for _ in range(50):
        guest.port_in(0x600)
        guest.port_out(0x600, 1)
    wait_for_the_log(live)
    assert caplog.text.count("Traceback") == 2
    assert live.failures == 100
    assert len(caplog.records) <= report._BURST + 2


def test_a_page_that_is_corrupt(guest: MockDomain, server: IoreqServer) -> None:
    """States that no protocol has, and a vp_eport that changes, harm no other vCPU."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 7)
    with server, server.serving():
        page = link_of(server).page
        IOREQ.pack_into(page, SLOT_SIZE, 0, 0, 0, 0, 0xFFFFFFFF, 0, 0x0F, 0)
        connection_of(server)._unsettled = True
        assert guest.port_in(PORT, vcpu=2) == 7
        put_state(page, 1, State.NONE)


def test_a_request_that_nobody_began(guest: MockDomain, server: IoreqServer) -> None:
    """A slot in the middle of a request that this server does not know is carried out."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 7)
    with server:
        server.process_pending()
        mock = guest.ioreq_servers[server.id]
        mock.send(1, Request(1, RequestKind.PORT, True, PORT, 0, 4))
        put_state(link_of(server).page, 1, State.INPROCESS)
        connection_of(server)._unsettled = True
        server.process_pending()
        assert mock.wait(1, 20) == 7


@pytest.mark.parametrize("closing", [False, True])
def test_a_child_of_a_handler_answers_nothing(
    guest: MockDomain, server: IoreqServer, closing: bool
) -> None:
    """A forked child that leaves through the server's frames touches no slot."""
    states: list[int] = []

    def read(offset: int, size: int) -> int:
        pid = os.fork()
        if not pid:
            return 1  # through the rest of the round, in the child
        os.waitpid(pid, 0)
        states.append(RequestSlot(link_of(server).page, 0).state)
        return 2

    server.claim_ports(PORT, 4).read(read)
    parent = os.getpid()
    with server:
        server.process_pending()
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        wait_for_requests(server)
        try:
            if closing:
                server.close()
            while not states and os.getpid() == parent:
                server.process_pending()
        finally:
            if os.getpid() != parent:
                os._exit(0)
        thread.join()
    assert (seen, states) == ([2], [State.INPROCESS])
