"""A device model on the mock: what a guest's vCPUs see, whatever the model does."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from xenmapcache import (
    Backend,
    ClosedError,
    DmaDirection,
    FaultError,
    MapCache,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.devicemodel import IoreqServer, Region
from xenmapcache.ioreq import Request, RequestKind, State, put_buffered, set_state, state_of
from xenmapcache.mock.ioreq_server import MockIoreqServer

PORT, MMIO, VGA, PCI = 0x510, 0xF000_0000, 0xA0000, "0000:00:05.0"
KIT = "xenmapcache.devicemodel"


class Memory:
    """A device of 4 KiB of registers that remembers each access."""

    def __init__(self) -> None:
        self.bytes = bytearray(4096)
        self.accesses: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size))
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size))
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")


@pytest.fixture
def guest() -> MockDomain:
    guest = MockHypervisor().create_domain(memory="16M", holes=[(VGA, 0x20000)], vcpus=4)
    guest.patience = 20.0
    return guest


@pytest.fixture
def cache(guest: MockDomain) -> Iterator[MapCache]:
    with open_backend("mock", domain=guest) as backend:
        cache = MapCache(backend, bucket_shift=16)
        yield cache
        cache.close(force=True)


@pytest.fixture
def server(guest: MockDomain, cache: MapCache) -> IoreqServer:
    return IoreqServer(guest, cache, buffered=True)


@pytest.fixture
def device(server: IoreqServer) -> Memory:
    device = Memory()
    server.claim_ports(PORT, 16, device)
    server.claim_mmio(MMIO, 4096, device)
    server.claim_mmio(VGA, 0x1000, device)
    server.claim_pci(PCI, device)
    return device


@pytest.fixture
def live(server: IoreqServer, device: Memory) -> Iterator[IoreqServer]:
    """The server, open and served by a thread, with the device behind it."""
    with server, server.serving():
        yield server


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Have a vCPU do something, and collect what it sees."""
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(work()))
    thread.start()
    return thread, seen


def wait_for_requests(server: IoreqServer, count: int = 1) -> None:
    """Wait until so many vCPUs have sent a request; their events stay where they are."""
    link = server._link
    assert link is not None
    while sum(state_of(link.page, vcpu) == State.READY for vcpu in range(4)) < count:
        os.sched_yield()


# --- requests -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ports(guest: MockDomain, live: IoreqServer, device: Memory, size: int) -> None:
    """What is written to a port is what the device gets, and the other way round."""
    value = 0x44332211 & (1 << 8 * size) - 1
    guest.port_out(PORT + 4, value, size)
    assert device.bytes[4 : 4 + size] == value.to_bytes(size, "little")
    assert guest.port_in(PORT + 4, size) == value
    assert device.accesses == [("write", 4, size), ("read", 4, size)]
    assert (live.requests, live.failures) == (2, 0)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio(guest: MockDomain, live: IoreqServer, device: Memory, size: int) -> None:
    """Loads and stores of each size."""
    value = 0x8877665544332211 & (1 << 8 * size) - 1
    guest.mmio_write(MMIO + 16, value, size)
    assert guest.mmio_read(MMIO + 16, size) == value
    assert device.accesses == [("write", 16, size), ("read", 16, size)]


def test_memory_is_not_mmio(guest: MockDomain, live: IoreqServer) -> None:
    """A load from RAM never reaches a device model."""
    guest.mmio_write(0x3000, 0x1234)
    assert guest.read(0x3000, 4) == b"\x34\x12\0\0"
    assert guest.mmio_read(0x3000) == 0x1234
    assert live.requests == 0


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_port_strings(
    guest: MockDomain, live: IoreqServer, device: Memory, size: int, backward: bool
) -> None:
    """Rep outs and ins touch one port and walk through memory, up or down, across pages."""
    count = 5
    low = 0x3000 - 2 * size
    start = low + (count - 1) * size if backward else low
    items = [bytes([16 * number + byte for byte in range(size)]) for number in range(count)]
    guest.write(low, b"".join(items))
    written: list[int] = []
    region = live.claim_ports(0x600, 4)
    region.write(lambda offset, size, value: written.append(value))
    order = items[::-1] if backward else items
    guest.port_out_string(0x600, start, count, size, backward=backward)
    assert written == [int.from_bytes(item, "little") for item in order]
    source = iter(written)
    region.read(lambda offset, size: next(source))
    target = start + 0x2000
    guest.port_in_string(0x600, target, count, size, backward=backward)
    assert guest.read(low + 0x2000, count * size) == b"".join(items)
    assert guest.dirty == {0x4, 0x5}
    assert live.requests == 2


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_mmio_strings(
    guest: MockDomain, live: IoreqServer, device: Memory, size: int, backward: bool
) -> None:
    """Rep movs walks through both; rep stos writes one value to each place."""
    count = 4
    back = (count - 1) * size if backward else 0
    guest.write(0x1000, bytes(range(count * size)))
    guest.mmio_write_string(MMIO + back, 0x1000 + back, count, size, backward=backward)
    assert device.bytes[: count * size] == bytes(range(count * size))
    guest.mmio_read_string(MMIO + back, 0x2000 + back, count, size, backward=backward)
    assert guest.read(0x2000, count * size) == bytes(range(count * size))
    guest.mmio_fill(MMIO + 64 + back, 0xA5, count, size, backward=backward)
    assert device.bytes[64 : 64 + count * size] == (0xA5).to_bytes(size, "little") * count
    expected = list(range(0, count * size, size))
    places = [offset for what, offset, _ in device.accesses[:count]]
    assert places == (expected[::-1] if backward else expected)
    assert live.requests == 3


def test_pci(guest: MockDomain, live: IoreqServer, device: Memory) -> None:
    """Configuration space is reached by function; another function is not there."""
    guest.pci_write(PCI, 4, 0x1234, 2)
    assert guest.pci_read("00:05.0", 4, 2) == 0x1234
    assert device.accesses == [("write", 4, 2), ("read", 4, 2)]
    assert guest.pci_read("0000:00:05.1", 0) == 0xFFFFFFFF


@pytest.mark.parametrize("bdf", ["", "5", "0:5", "0:0:0:5.0", "00:20.0", "00:05.8", "-1:0.0", 5])
def test_no_pci_function(server: IoreqServer, bdf: str) -> None:
    """What is no function is named."""
    with pytest.raises(ValueError, match="is no PCI function: write"):
        server.claim_pci(bdf)


def test_buffered_writes_come_first(guest: MockDomain, live: IoreqServer, device: Memory) -> None:
    """Nobody waits for a buffered write, but what the vCPU does next comes after it."""
    for number in range(200):
        guest.mmio_write(VGA, number, 1 << number % 4, buffered=True)
        assert guest.mmio_read(VGA, 1) == number
    guest.mmio_write(VGA + 8, 0x8877665544332211, 8, buffered=True)
    assert guest.mmio_read(VGA + 8, 8) == 0x8877665544332211
    assert live.requests == 402


def test_buffered_writes_are_served_alone(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """More than fit the ring, with no other request in between, all arrive in order."""
    with server:
        for number in range(600):
            if number % 500 == 0:
                server.process_pending()
            guest.mmio_write(VGA + number, number & 0xFF, 1, buffered=True)
        while server.process_pending():
            pass
    assert device.accesses == [("write", number, 1) for number in range(600)]


def test_every_vcpu_is_served(guest: MockDomain, live: IoreqServer, device: Memory) -> None:
    """Four vCPUs at once get each their own answers."""

    def work(vcpu: int) -> bool:
        for number in range(50):
            guest.mmio_write(MMIO + 8 * vcpu, number, 8, vcpu=vcpu)
            if guest.mmio_read(MMIO + 8 * vcpu, 8, vcpu=vcpu) != number:
                return False
        return True

    threads = [in_thread(lambda vcpu=vcpu: work(vcpu)) for vcpu in range(4)]  # type: ignore[misc] # mypy cannot infer it
    for thread, _ in threads:
        thread.join()
    assert [seen for _, seen in threads] == [[True]] * 4
    assert live.requests == 400


def test_spurious_events_are_passed_over(server: IoreqServer) -> None:
    """Binding raises an event on every channel at once: none of them is a request."""
    with server:
        assert select.select([server], [], [], 20)[0]
        assert server.process_pending() == 0
        assert not select.select([server], [], [], 0)[0]
    assert server.requests == 0


def test_the_clock_is_taken_note_of(guest: MockDomain, live: IoreqServer) -> None:
    """TIMEOFFSET is answered, and is no failure; a kind that nobody knows is one."""
    mock = guest.ioreq_servers[live.id]
    for kind, failures in ((RequestKind.TIMEOFFSET, 0), (99, 1)):
        mock.send(1, Request(1, kind, False, 0, 5, 8))
        assert mock.wait(1, 20) == 5
        assert live.failures == failures


# --- who answers ------------------------------------------------------------------------


def test_nobody_answers(guest: MockDomain, live: IoreqServer) -> None:
    """Where nothing is claimed, reads are all ones and writes go nowhere: no request at all."""
    assert [guest.port_in(0x700, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    guest.port_out(0x700, 5)
    guest.port_in_string(0x700, 0x1000, 4, 1)
    assert guest.read(0x1000, 5) == b"\xff\xff\xff\xff\0"
    assert guest.mmio_read(MMIO + 4096, 8) == (1 << 64) - 1
    assert live.requests == 0


def test_no_handler(guest: MockDomain, live: IoreqServer) -> None:
    """A region without handlers reads all ones and ignores writes."""
    live.claim_ports(0x600, 4)
    assert guest.port_in(0x600, 2) == 0xFFFF
    guest.port_out(0x600, 1)
    assert (live.requests, live.failures) == (2, 0)


def test_claims_come_and_go(guest: MockDomain, live: IoreqServer) -> None:
    """A region that is claimed later works at once; one that was released is gone."""
    region = live.claim_ports(0x600, 4)
    region.read(lambda offset, size: 7)
    assert guest.port_in(0x600) == 7
    region.release()
    assert guest.port_in(0x600) == 0xFFFFFFFF
    with pytest.raises(ValueError, match="was given back before"):
        region.release()
    live.claim_ports(0x600, 4).read(lambda offset, size: 8)
    assert guest.port_in(0x600) == 8


def test_a_claim_that_xen_refuses(guest: MockDomain, live: IoreqServer) -> None:
    """It raises, and is not noted: it can be tried again."""
    guest.arm("claim", errno=errno.ENOSPC)
    with pytest.raises(XenCallError) as caught:
        live.claim_ports(0x600, 4)
    assert caught.value.errno == errno.ENOSPC
    live.claim_ports(0x600, 4)


@pytest.mark.parametrize(
    ("first", "count"), [(PORT + 15, 1), (PORT - 1, 2), (PORT, 16), (PORT + 4, 4), (PORT - 9, 99)]
)
def test_claims_do_not_overlap(server: IoreqServer, device: Memory, first: int, count: int) -> None:
    """A range that shares a port with another of this server is refused, by name."""
    with pytest.raises(ValueError, match=r"PORT region .* overlaps <PORT region 0x510\.\.0x520>"):
        server.claim_ports(first, count)
    server.claim_ports(PORT + 16, 4)
    server.claim_ports(PORT - 4, 4)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 0), (0, -1), (0xFFFF, 2)])
def test_no_ports(server: IoreqServer, first: int, count: int) -> None:
    """What are no ports is refused."""
    with pytest.raises(ValueError, match="are not within 0..0x10000"):
        server.claim_ports(first, count)


def test_a_device_without_methods(server: IoreqServer) -> None:
    """Something that can neither be read nor written is no device."""
    with pytest.raises(TypeError, match="has neither read"):
        server.claim_ports(PORT, 4, object())  # type: ignore[arg-type] # wrong on purpose


def test_an_access_over_two_regions(
    guest: MockDomain, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Xen joins neighbours, so that an access may lie in two: it is logged, and reads all ones."""
    live.claim_ports(PORT + 16, 4).read(lambda offset, size: 0)
    assert guest.port_in(PORT + 14, 4) == 0xFFFFFFFF
    assert "no region of this server holds 4 bytes at 0x51e" in caplog.text
    assert live.failures == 1


def test_two_servers(guest: MockDomain, cache: MapCache, live: IoreqServer) -> None:
    """Each answers for its own; both are asked to invalidate; one goes, the other goes on."""
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as other_cache:
        other = IoreqServer(guest, other_cache)
        other.claim_ports(0x600, 4).read(lambda offset, size: 6)
        with other, other.serving():
            assert other.id != live.id
            assert (guest.port_in(0x600), guest.port_in(PORT)) == (6, 0)
            guest.send_invalidate(vcpu=2)
        assert guest.port_in(0x600) == 0xFFFFFFFF
        assert guest.port_in(PORT) == 0
    assert (live.invalidations, other.invalidations) == (1, 1)
    at_open = 1
    assert cache.stats().invalidations == other_cache.stats().invalidations == at_open + 1


# --- what goes wrong --------------------------------------------------------------------


def test_a_handler_that_raises(
    guest: MockDomain, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged with its request; reads give all ones; the server goes on."""
    region = live.claim_ports(0x600, 4)

    @region.read
    def read(offset: int, size: int) -> int:
        raise KeyError("no register")

    @region.write
    def write(offset: int, size: int, value: int) -> None:
        raise OSError("disk on fire")

    assert guest.port_in(0x602, 2, vcpu=3) == 0xFFFF
    guest.port_out(0x600, 0xAB, 1)
    first, second = (record for record in caplog.records if record.name == KIT)
    assert first.getMessage() == "domain 1: vCPU 3: PORT read of 2 bytes at 0x602: failed"
    assert "KeyError: 'no register'" in caplog.text
    assert (
        second.getMessage() == "domain 1: vCPU 0: PORT write of 1 bytes at 0x600, data 0xab: failed"
    )
    assert {first.levelno, second.levelno} == {logging.ERROR}
    assert live.failures == 2
    assert guest.port_in(PORT) == 0


@pytest.mark.parametrize("value", [None, "1", 1.0, -1, 0x100])
def test_a_handler_that_returns_nonsense(
    guest: MockDomain, live: IoreqServer, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no number of that size is logged, and reads all ones."""
    live.claim_ports(0x600, 1).read(lambda offset, size: value)  # type: ignore[type-var] # wrong on purpose
    assert guest.port_in(0x600, 1) == 0xFF
    assert live.failures == 1
    assert "PORT read of 1 bytes at 0x600: failed" in caplog.text


def test_a_string_that_fails_in_the_middle(guest: MockDomain, live: IoreqServer) -> None:
    """What was read before arrives, the rest is all ones; the handler is not asked again."""
    values = iter([1, 2])
    calls: list[int] = []

    def read(offset: int, size: int) -> int:
        calls.append(offset)
        return next(values)

    live.claim_ports(0x600, 1).read(read)
    guest.port_in_string(0x600, 0x1000, 4, 1)
    assert guest.read(0x1000, 5) == b"\x01\x02\xff\xff\0"
    assert (len(calls), live.failures) == (3, 1)


@pytest.mark.parametrize("address", [VGA - 4, VGA, (1 << 64) - 4])
def test_data_that_is_not_there(
    guest: MockDomain, live: IoreqServer, address: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A string instruction over a hole, or no address at all, is answered and logged."""
    guest.port_out_string(PORT, address, 2)
    guest.port_in_string(PORT, address, 2)
    assert live.failures == 2
    assert f"data at {address:#x}" in caplog.text
    assert guest.port_in(PORT) == 0


def test_an_interrupted_handler_has_answered(guest: MockDomain, server: IoreqServer) -> None:
    """A handler that is ended by KeyboardInterrupt reads all ones, and the interrupt goes on."""

    def read(offset: int, size: int) -> int:
        raise KeyboardInterrupt

    server.claim_ports(PORT, 4).read(read)
    with server:
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        wait_for_requests(server)
        with pytest.raises(KeyboardInterrupt):
            server.process_pending()
        thread.join()
    assert seen == [0xFFFFFFFF]


def test_a_vcpu_that_nobody_serves(guest: MockDomain, server: IoreqServer) -> None:
    """The mock's vCPU gives up with a reason, where a real one would wait for ever."""
    guest.patience = 0.01
    server.claim_ports(PORT, 4)
    with server:
        with pytest.raises(TimeoutError, match="vCPU 0 of mock domain 1 is stuck.*another thread"):
            guest.port_in(PORT)


def test_the_mock_notices_a_broken_protocol(guest: MockDomain, live: IoreqServer) -> None:
    """A state that goes astray would crash a real guest: here it raises."""
    mock = guest.ioreq_servers[live.id]
    set_state(mock.page, 2, State.INPROCESS)
    with pytest.raises(RuntimeError, match="Xen would crash the domain"):
        guest.port_in(PORT, vcpu=2)
    assert "vCPU 2" in guest.crashed
    set_state(mock.page, 2, State.NONE)


# --- invalidation -----------------------------------------------------------------------


def test_invalidate_drops_what_is_mapped(
    guest: MockDomain, cache: MapCache, live: IoreqServer
) -> None:
    """A page that was given up and came back is read anew, with nothing done by the model."""
    guest.write(0x5000, b"old")
    assert cache.read(0x5000, 3) == b"old"
    guest.balloon_out(0x5000, 0x1000)
    guest.balloon_in(0x5000, 0x1000)
    assert cache.read(0x5000, 3) == b"\0\0\0"
    assert live.invalidations == guest.invalidations == 1


def test_a_burst(
    guest: MockDomain, cache: MapCache, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Hundreds of requests are one flush each; each DMA lease is warned of once."""
    device = cache.map_device(0xF0000, 0x1000, owner="vga")
    leases = [cache.map_dma(0x8000 * n, 512, owner=f"disk{n}") for n in range(3)]
    guest.balloon_out(0x20_0000, 0xC0_0000)
    assert live.invalidations == guest.invalidations == 37
    assert cache.stats().invalidations == 37 + 1  # one when it was opened
    warned = [r.getMessage() for r in caplog.records if "still held" in r.getMessage()]
    assert sorted(
        owner in text for text in warned for owner in ("'disk0'", "'disk1'", "'disk2'")
    ) == ([False] * 6 + [True] * 3)
    assert not device.stale
    for lease in (device, *leases):
        lease.release()


def test_quiesce_comes_before(
    guest: MockDomain, cache: MapCache, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback finishes its DMA before mappings go: no lease is stale, and nothing is lost."""
    leases = [cache.map_dma(0x5000, 4, owner="disk0", direction=DmaDirection.FROM_DEVICE)]
    order: list[str] = []

    @live.on_quiesce
    def finish() -> None:
        order.append(f"quiesce {live.cache.stats().invalidations - 1}")
        while leases:
            lease = leases.pop()
            lease.view[:] = b"data"
            lease.release()

    guest.send_invalidate()
    guest.send_invalidate()
    assert order == ["quiesce 0", "quiesce 1"]
    assert guest.read(0x5000, 4) == b"data"
    assert cache.stats().stale_dma == 0
    assert not caplog.records


def test_quiesce_that_raises(
    guest: MockDomain, cache: MapCache, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the others are called, the mappings go, and the vCPU goes on."""
    called = []

    @live.on_quiesce
    def broken() -> None:
        raise OSError("cannot drain")

    live.on_quiesce(lambda: called.append(1))
    guest.send_invalidate()
    assert called == [1]
    assert cache.stats().invalidations == 2
    assert "on_quiesce: <function test_quiesce_that_raises" in caplog.text
    assert "cannot drain" in caplog.text
    assert live.failures == 1


def test_invalidate_with_a_closed_cache(
    guest: MockDomain, cache: MapCache, live: IoreqServer
) -> None:
    """The vCPU goes on all the same, and the mistake is counted."""
    cache.close()
    guest.send_invalidate()
    assert live.failures == 1


def test_the_lost_dma_with_a_server(
    guest: MockDomain, live: IoreqServer, cache: MapCache, caplog: pytest.LogCaptureFixture
) -> None:
    """A lease that is held over the guest's ballooning writes to a page that is gone."""
    lease = cache.map_dma(0x5000, 4, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    guest.balloon_out(0x5000, 0x1000)
    guest.balloon_in(0x5000, 0x1000)
    lease.view[:] = b"lost"
    lease.release()
    assert guest.read(0x5000, 4) == bytes(4)
    assert "released stale: DMA lease of 'disk0'" in caplog.text


# --- life -------------------------------------------------------------------------------


def test_pending_requests_are_answered_on_close(guest: MockDomain, server: IoreqServer) -> None:
    """Closing carries out what waits; after it nobody answers for the ports."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        threads = [in_thread(lambda v=v: guest.port_in(PORT, vcpu=v)) for v in range(4)]  # type: ignore[misc] # mypy cannot infer it
        wait_for_requests(server, 4)
    for thread, _ in threads:
        thread.join()
    assert [seen for _, seen in threads] == [[5]] * 4
    assert guest.ioreq_servers == {}
    assert guest.port_in(PORT) == 0xFFFFFFFF


def test_a_handler_that_closes(guest: MockDomain, server: IoreqServer) -> None:
    """Its own request is answered with all ones, and serving ends."""

    def read(offset: int, size: int) -> int:
        server.close()
        return 5

    server.claim_ports(PORT, 4).read(read)
    with server, server.serving():
        assert guest.port_in(PORT) == 0xFFFFFFFF
    assert guest.ioreq_servers == {}
    assert server.failures == 1


def test_a_handler_that_stops(guest: MockDomain, server: IoreqServer) -> None:
    """Its request is answered with what it returns; then serve_forever returns."""

    def read(offset: int, size: int) -> int:
        server.stop()
        return 5

    server.claim_ports(PORT, 4).read(read)
    with server:
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        assert server.serve_forever() is None
        thread.join()
    assert seen == [5]


@pytest.mark.parametrize("call", ["create_ioreq_server", "claim"])
def test_an_open_that_fails(
    guest: MockDomain, server: IoreqServer, device: Memory, call: str
) -> None:
    """Nothing is left behind: no server, no claim."""
    guest.arm(call, errno=errno.EPERM)
    with pytest.raises(XenCallError) as caught, server:
        pass
    assert caught.value.errno == errno.EPERM
    assert guest.ioreq_servers == {}
    with pytest.raises(ClosedError, match="with server"):
        server.fileno()


def test_outside_of_its_life(server: IoreqServer) -> None:
    """Before open and after close it says so; close is idempotent; it opens once."""
    for call in (server.process_pending, server.fileno, lambda: server.inject_msi(0, 0)):
        with pytest.raises(ClosedError, match="not open"):
            call()
    with server:
        with pytest.raises(ClosedError, match="make another one"):
            server.open()
    server.close()
    with pytest.raises(ClosedError, match="closed"):
        server.process_pending()
    with pytest.raises(ClosedError, match="make another one"):
        server.open()
    with pytest.raises(ClosedError, match="can claim no more"):
        server.claim_ports(PORT, 1)


def test_closed_before_it_was_opened(server: IoreqServer) -> None:
    """That is no error, and it cannot be opened any more."""
    server.close()
    with pytest.raises(ClosedError):
        server.open()


def test_no_server_for_that(guest: MockDomain, cache: MapCache) -> None:
    """What is no domain or no cache is refused, and so is a cache of another domain."""
    for domain in ("3", None, True, 3.0):
        with pytest.raises(TypeError, match="domain must be"):
            IoreqServer(domain, cache)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(TypeError, match="cache must be"):
        IoreqServer(guest, cache.backend)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(ValueError, match="the cache maps domain 1, the server is for domain 7"):
        IoreqServer(7, cache)


def test_as_many_servers_as_xen_has(guest: MockDomain, cache: MapCache) -> None:
    """The ninth is refused; numbers are used again."""
    servers = [IoreqServer(guest, cache) for _ in range(9)]
    for server in servers[:8]:
        server.open()
    with pytest.raises(XenCallError, match="ENOSPC.*it has 8"):
        servers[8].open()
    servers[3].close()
    servers[8].open()
    assert servers[8].id == 3
    for server in servers:
        server.close()


def test_interrupts(guest: MockDomain, live: IoreqServer) -> None:
    """The mock notes what was raised."""
    live.inject_msi(0xFEE00000, 0x41)
    live.set_isa_irq(5, True)
    live.set_pci_intx(PCI, 1, False)
    assert guest.interrupts == [
        ("msi", (0xFEE00000, 0x41)),
        ("isa", (5, True)),
        ("intx", (0, 0, 5, 0, 1, False)),
    ]


# --- loops and signals ------------------------------------------------------------------


def test_a_foreign_loop(guest: MockDomain, server: IoreqServer, device: Memory) -> None:
    """Select on the server, then process_pending, which tells how many it answered."""
    with server:
        thread, _ = in_thread(lambda: [guest.port_in(PORT) for _ in range(100)])
        answered = 0
        while answered < 100:
            assert select.select([server], [], [], 20)[0]
            answered += server.process_pending()
        thread.join()
    assert answered == server.requests == 100


def test_a_guest_that_never_stops_asking(server: IoreqServer, device: Memory) -> None:
    """One call of process_pending returns however many events there are."""
    with server:
        link = server._link
        assert link is not None
        port = next(iter(server._vcpus))
        link.pending = lambda: port  # type: ignore[method-assign] # for this test alone
        assert server.process_pending() == 0


def test_stop_before_serving(server: IoreqServer) -> None:
    """It is not forgotten; it ends one serving, and not the next."""
    with server:
        server.stop()
        assert server.serve_forever() is None
        thread, _ = in_thread(server.serve_forever)
        thread.join(0.05)
        assert thread.is_alive()
        server.stop()
        thread.join()


def test_close_ends_serving(guest: MockDomain, server: IoreqServer, device: Memory) -> None:
    """From another thread."""
    server.open()
    thread, seen = in_thread(server.serve_forever)
    guest.port_in(PORT)  # or it might not have begun
    server.close()
    thread.join()
    assert seen == [None]


def test_what_ends_the_thread_is_raised(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """A failure of Xen's own in the serving thread comes out of the with block."""
    failed = threading.Event()

    def fail(port: int) -> None:
        failed.set()
        raise XenCallError("xenevtchn_unmask", 1, errno.EIO)

    with server:
        link = server._link
        assert link is not None
        server.process_pending()  # the events of binding
        link.unmask = fail  # type: ignore[method-assign] # for this test alone
        with pytest.raises(XenCallError, match="xenevtchn_unmask failed"), server.serving():
            thread, seen = in_thread(lambda: guest.port_in(PORT))
            assert failed.wait(20)
    thread.join()
    assert seen == [0]


def test_asyncio(guest: MockDomain, server: IoreqServer, device: Memory) -> None:
    """It serves in the loop, beside other tasks, until stop or cancel."""
    device.bytes[0] = 9

    async def ask() -> int:
        return await asyncio.to_thread(guest.port_in, PORT, 1)

    async def main() -> None:
        task = asyncio.create_task(server.serve_async())
        assert await asyncio.gather(*(ask() for _ in range(10))) == [9] * 10
        server.stop()
        await task
        task = asyncio.create_task(server.serve_async())
        assert await ask() == 9
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with server:
        asyncio.run(main())


def test_asyncio_ends_with_what_fails(server: IoreqServer) -> None:
    """An error of the server ends serve_async with it."""

    async def main() -> None:
        task = asyncio.create_task(server.serve_async())
        await asyncio.sleep(0)
        link = server._link
        assert link is not None
        link.pending = lambda: (_ for _ in ()).throw(XenCallError("x", 1, errno.EIO))  # type: ignore[method-assign] # for this test alone
        link.unmask(110)
        with pytest.raises(XenCallError):
            await asyncio.wait_for(task, 20)

    with server:
        asyncio.run(main())


PROGRAM = """
import asyncio, os, signal, sys, threading, time, warnings
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
from xenmapcache import *
from xenmapcache.devicemodel import IoreqServer
guest = MockHypervisor().create_domain(memory="1M")
cache = MapCache(open_backend("mock", domain=guest))
server = IoreqServer(guest, cache)
region = server.claim_ports(0x510, 4)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_cleanly(number: str) -> None:
    """Serve_forever returns the signal; what the guest asked is answered, the server gone."""
    done = run(f"""
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.{number})
    return 7
seen = []
thread = threading.Thread(target=lambda: seen.append(guest.port_in(0x510)))
before = signal.getsignal(signal.{number})
with server:
    thread.start()
    ended = server.serve_forever()
thread.join()
assert signal.getsignal(signal.{number}) is before
print(signal.Signals(ended).name, seen, guest.ioreq_servers)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{number} [7] {{}}\n", "")


def test_a_second_signal_interrupts_a_handler() -> None:
    """A handler that does not return is interrupted, its request answered with all ones."""
    done = run("""
import logging
@region.read
def read(offset, size):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(1)
seen = []
thread = threading.Thread(target=lambda: seen.append(guest.port_in(0x510)))
try:
    with server:
        thread.start()
        server.serve_forever()
except KeyboardInterrupt as interrupt:
    thread.join()
    print(interrupt, seen)
""")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "SIGTERM came twice [4294967295]\n",
        "",
    )


def test_signals_that_somebody_handles_are_left_alone() -> None:
    """A program's own handler is called, and serving goes on."""
    done = run("""
signal.signal(signal.SIGTERM, lambda *_: (print("mine"), server.stop()))
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    return 7
with server:
    thread = threading.Thread(target=guest.port_in, args=(0x510,))
    thread.start()
    print(server.serve_forever())
    thread.join()
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\nNone\n", "")


def test_sigterm_ends_asyncio() -> None:
    """Serve_async returns on SIGTERM."""
    done = run("""
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    return 7
seen = []
thread = threading.Thread(target=lambda: seen.append(guest.port_in(0x510)))
with server:
    thread.start()
    asyncio.run(server.serve_async())
thread.join()
print(seen, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[7] True\n", "")


def test_an_exit_without_close() -> None:
    """A program that ends without closing closes all the same: no vCPU is left waiting."""
    done = run("""
import atexit
atexit.register(lambda: print(guest.ioreq_servers, server))
server.open()
sys.exit(3)
""")
    assert (done.returncode, done.stdout, done.stderr) == (
        3,
        "{} <IoreqServer of domain 1, closed>\n",
        "",
    )


def test_a_forked_child_is_kept_out() -> None:
    """A child cannot serve, and its end does not end the parent's server."""
    done = run("""
region.read(lambda offset, size: 7)
with server, server.serving():
    pid = os.fork()
    if not pid:
        try:
            server.process_pending()
        except ClosedError as error:
            server.close()
            os._exit("which forked" in str(error))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), guest.port_in(0x510))
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 7\n", "")


def test_a_childs_stop_is_not_the_parents() -> None:
    """Stop in a child, and SIGTERM to a child that a handler forked, leave the parent alone."""
    done = run("""
ready, tell = os.pipe()
@region.read
def read(offset, size):
    pid = os.fork()
    if not pid:
        server.stop()
        os.write(tell, b"x")  # before that, Python drops signals in a child
        time.sleep(60)
        os._exit(9)
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
@region.write
def write(offset, size, value):
    server.stop()
seen = []
def guest_does():
    seen.append(guest.port_in(0x510))
    seen.append(guest.port_in(0x510))
    guest.port_out(0x510, 1)
thread = threading.Thread(target=guest_does)
with server:
    thread.start()
    print(server.serve_forever(), seen)
    thread.join()
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "None [15, 15]\n", "")


def test_sigterm_waits_until_it_is_closed() -> None:
    """What waits at close is carried out before the signal has its way."""
    done = run("""
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    return 7
seen = []
def guest_does():
    seen.append(guest.port_in(0x510))
    print(seen, flush=True)
thread = threading.Thread(target=guest_does)
server.open()
thread.start()
while not guest.ioreq_servers[0].page[30]:
    os.sched_yield()
server.close()
print("not reached")
""")
    assert (done.returncode, done.stderr) == (-15, "")
    assert done.stdout in ("[7]\n", "")  # if it was not too late for the vCPU to say so


def test_sigterm_ends_all_servers_of_a_loop() -> None:
    """One signal, two servers in one asyncio loop: both return."""
    done = run("""
other = IoreqServer(guest, cache)
@region.read
def read(offset, size):
    os.kill(os.getpid(), signal.SIGTERM)
    return 7
async def main():
    await asyncio.gather(server.serve_async(), other.serve_async())
thread = threading.Thread(target=guest.port_in, args=(0x510,))
with server, other:
    thread.start()
    asyncio.run(main())
thread.join()
print(guest.ioreq_servers, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "{} True\n", "")


def test_close_and_another_one_in_one_loop(guest: MockDomain, cache: MapCache) -> None:
    """A server that is closed in the loop does not take the next one's descriptors with it."""

    async def main() -> None:
        first = IoreqServer(guest, cache)
        first.open()
        task = asyncio.create_task(first.serve_async())
        await asyncio.sleep(0)
        first.close()
        with IoreqServer(guest, cache) as second:
            other = asyncio.create_task(second.serve_async())
            await asyncio.wait_for(task, 20)
            await asyncio.sleep(0)
            second.stop()
            await asyncio.wait_for(other, 20)

    asyncio.run(main())


# --- what a review found ------------------------------------------------------------------


def test_a_cache_that_was_filled_before(guest: MockDomain, cache: MapCache) -> None:
    """Nobody told it what the guest gave up before the server was open: it starts anew."""
    guest.write(0x5000, b"old")
    assert cache.read(0x5000, 3) == b"old"
    guest.balloon_out(0x5000, 0x1000)
    guest.balloon_in(0x5000, 0x1000)
    with IoreqServer(guest, cache):
        assert cache.read(0x5000, 3) == b"\0\0\0"


def test_a_buffered_handler_that_serves(guest: MockDomain, server: IoreqServer) -> None:
    """It runs once, whatever it does itself; so does one that closes."""
    ran: list[int] = []

    def write(offset: int, size: int, value: int) -> None:
        ran.append(value)
        if value == 1:
            wait_for_requests(server)
            server.process_pending()
        else:
            server.close()

    server.claim_mmio(VGA, 4).write(write)
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        server.process_pending()
        guest.mmio_write(VGA, 1, buffered=True)
        thread, seen = in_thread(lambda: guest.port_in(PORT, vcpu=1))
        while server.process_pending() or not ran:
            pass
        thread.join()
        guest.mmio_write(VGA, 2, buffered=True)
        while not server._closed:
            server.process_pending()
    assert (ran, seen) == ([1, 2], [5])


def test_buffered_writes_before_a_request_without_their_event(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """The ring is drained for a vCPU's request, though its own event has not come yet."""
    with server:
        server.process_pending()
        mock = guest.ioreq_servers[server.id]
        assert mock.ring is not None
        assert put_buffered(mock.ring, Request(None, RequestKind.MMIO, False, VGA, 7, 1))
        thread, seen = in_thread(lambda: guest.mmio_read(VGA, 1))
        wait_for_requests(server)
        while not seen:
            server.process_pending()
        thread.join()
    assert seen == [7]


def test_buffered_writes_are_carried_out_on_close(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """Nobody waits for them, but they are no less what the guest did."""
    with server:
        for number in range(5):
            guest.mmio_write(VGA + number, 1, 1, buffered=True)
    assert device.accesses == [("write", number, 1) for number in range(5)]


def test_an_interrupted_callback(guest: MockDomain, cache: MapCache, server: IoreqServer) -> None:
    """Mappings go before the answer, though a callback is ended by KeyboardInterrupt."""
    guest.write(0x5000, b"old")

    @server.on_quiesce
    def interrupted() -> None:
        if server.invalidations:
            raise KeyboardInterrupt

    with server:
        assert cache.read(0x5000, 3) == b"old"
        thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
        wait_for_requests(server)
        with pytest.raises(KeyboardInterrupt):
            while True:
                server.process_pending()
        thread.join()
        with pytest.raises(FaultError):
            cache.read(0x5000, 3)
        server._quiesce.clear()


def test_an_invalidate_that_is_given_up(
    guest: MockDomain, cache: MapCache, server: IoreqServer
) -> None:
    """A server that cannot be closed in order drops the mappings before it answers."""
    with server:
        guest.write(0x5000, b"old")
        assert cache.read(0x5000, 3) == b"old"
        thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
        wait_for_requests(server)
        link = server._link
        assert link is not None

        def interrupt() -> None:
            raise KeyboardInterrupt

        link.disable = interrupt  # type: ignore[method-assign] # for this test alone
        with pytest.raises(KeyboardInterrupt):
            server.close()
        thread.join()
    with pytest.raises(FaultError):
        cache.read(0x5000, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), XenCallError("notify", 1, errno.EIO)])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_notify_that_does_not_come_through(
    guest: MockDomain, server: IoreqServer, error: BaseException, goes_on: bool
) -> None:
    """Who was answered and not told is told when it serves again, or closes; others too."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        server.process_pending()
        threads = [in_thread(lambda v=v: guest.port_in(PORT, vcpu=v)) for v in range(4)]  # type: ignore[misc] # mypy cannot infer it
        wait_for_requests(server, 4)
        link = server._link
        assert link is not None
        notify, errors = link.notify, [error]

        def fail_once(port: int) -> None:
            if errors:
                raise errors.pop()
            notify(port)

        link.notify = fail_once  # type: ignore[method-assign] # for this test alone
        if goes_on:
            with pytest.raises(type(error)):
                server.process_pending()
            while not all(seen for _, seen in threads):
                server.process_pending()
        else:
            with pytest.raises(type(error)):
                server.close()
    for thread, _ in threads:
        thread.join()
    seen = [each for _, (each,) in threads]
    if isinstance(error, KeyboardInterrupt) and not goes_on:
        assert seen == [5] + [0xFFFFFFFF] * 3  # who closes is in a hurry
    else:
        assert seen == [5] * 4


def test_an_open_that_fails_with_a_request_waiting(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """A vCPU that was quicker than the binding of its channel is answered all the same."""
    mock_bind = MockIoreqServer.bind
    asked: list[tuple[threading.Thread, list[object]]] = []

    def bind(self: MockIoreqServer, port: int) -> int:
        if not asked:
            self.claim(RequestKind.PORT, PORT, PORT + 3)
            asked.append(in_thread(lambda: guest.port_in(PORT, vcpu=3)))
            wait_for_requests(server)
            raise XenCallError("bind", 1, errno.ENOMEM)
        return mock_bind(self, port)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MockIoreqServer, "bind", bind)
        with pytest.raises(XenCallError, match="bind failed"):
            server.open()
    ((thread, seen),) = asked
    thread.join()
    assert seen == [0]
    assert guest.ioreq_servers == {}


def test_a_guest_that_has_ended(guest: MockDomain, server: IoreqServer) -> None:
    """It takes its servers with it; closing ours is no error."""
    with server:
        guest.destroy()
        with pytest.raises(XenCallError) as caught:
            server.claim_ports(0x700, 4)
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("size", [0, 3, 9, 0xFFFFFFFF])
def test_a_size_that_is_none(guest: MockDomain, live: IoreqServer, size: int) -> None:
    """It is answered, and logged."""
    mock = guest.ioreq_servers[live.id]
    mock.send(0, Request(0, RequestKind.PORT, True, PORT, 0, size))
    assert mock.wait(0, 20) == (1 << 8 * min(size, 8)) - 1
    assert live.failures == 1


def test_a_value_is_cut_to_its_size(guest: MockDomain, live: IoreqServer, device: Memory) -> None:
    """Xen leaves what it likes in the upper bytes."""
    mock = guest.ioreq_servers[live.id]
    mock.send(0, Request(0, RequestKind.PORT, False, PORT, 0x11223344, 1))
    assert mock.wait(0, 20) == 0x11223344
    assert device.bytes[:4] == b"\x44\0\0\0"


def test_a_string_keeps_its_address(guest: MockDomain, live: IoreqServer) -> None:
    """The answer to a request by pointer is the pointer, though its handler fails."""
    live.claim_ports(0x600, 4).read(lambda offset, size: 1 // 0)
    mock = guest.ioreq_servers[live.id]
    mock.send(0, Request(0, RequestKind.PORT, True, 0x600, 0x5000, 4, 2, True))
    assert mock.wait(0, 20) == 0x5000


def test_both_errors_are_seen(guest: MockDomain, server: IoreqServer) -> None:
    """What ended the serving thread is raised, with what it did to the body as its context."""
    with server:
        link = server._link
        assert link is not None

        failed = threading.Event()

        def fail() -> int | None:
            failed.set()
            raise XenCallError("xenevtchn_pending", 1, errno.EIO)

        link.pending = fail  # type: ignore[method-assign] # for this test alone
        with pytest.raises(XenCallError) as caught, server.serving():
            assert failed.wait(20)
            raise TimeoutError("the guest is stuck")
    assert isinstance(caught.value.__context__, TimeoutError)


def test_quiesce_on_close(guest: MockDomain, cache: MapCache, server: IoreqServer) -> None:
    """After close nobody tells the cache anything: DMA is finished before."""
    leases = [cache.map_dma(0x5000, 4, owner="disk0")]

    @server.on_quiesce
    def finish() -> None:
        while leases:
            leases.pop().release()

    with server:
        assert leases
    assert cache.leases() == ()


def test_misuse(guest: MockDomain, server: IoreqServer, cache: MapCache) -> None:
    """Each mistake is named where it is made."""
    for count in ("1", 1.5, None):
        with pytest.raises(TypeError, match="count must be an int"):
            server.claim_ports(PORT, count)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(TypeError, match="callback 5 cannot be called"):
        server.on_quiesce(5)  # type: ignore[type-var] # wrong on purpose
    with pytest.raises(TypeError, match="handler None cannot be called"):
        server.claim_ports(PORT, 4).read(None)  # type: ignore[type-var] # wrong on purpose
    with pytest.raises(ValueError, match="irq 16 is not in"):
        server.set_isa_irq(16, True)
    with pytest.raises(ValueError, match="pin 4 is not in"):
        server.set_pci_intx(PCI, 4, True)
    with pytest.raises(ValueError, match="no message"):
        server.inject_msi(0xFEE00000, 1 << 32)
    for other in (MockHypervisor().create_domain(memory="1M"), guest.domid):
        with pytest.raises(ValueError, match="the cache maps domain 1, the server is for"):
            IoreqServer(other, cache)


def test_as_many_ranges_as_xen_has(live: IoreqServer) -> None:
    """The 257th of a kind is refused."""
    for number in range(255):  # beside the device's
        live.claim_ports(0x8000 + 2 * number, 1)
    with pytest.raises(XenCallError, match="too many ranges"):
        live.claim_ports(0x9000, 1)
    live.claim_mmio(0xE0000000, 1)


def test_regions_show_themselves(server: IoreqServer, backend: Backend) -> None:
    """Messages name a region by kind and half-open range, a server by domain and state."""
    region = server.claim_mmio(MMIO, 0x1000)
    assert isinstance(region, Region)
    assert repr(region) == "<MMIO region 0xf0000000..0xf0001000>"
    assert repr(server) == "<IoreqServer of domain 1, not open>"
